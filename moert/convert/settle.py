"""Once every layer is quantised and measured: which slices the store keeps, and copies of these.

Under `--max-size` experts keep different numbers of slices; with `--widths auto` some widths are left out.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moert.convert import harm
from moert.convert.partial import Finished, Partial
from moert.convert.plan import ConversionPlan
from moert.convert.widths import DEFAULT_WIDTHS, chosen
from moert.errors import StoreError
from moert.quant import nested
from moert.store.fileio import as_bytes, atomic_file, opened, read_into
from moert.store.layout import ExpertFile
from moert.store.writer import TensorWriter


def measured(plan: ConversionPlan, finished: Mapping[str, Finished]) -> dict[int, Finished]:
    """Find for each layer a file that knows what was measured: the one with all slices, or what was made of it."""
    return {file.layer: finished.get(file.name) or finished[plan.first_name(file)] for file in plan.experts}


@dataclass(frozen=True)
class Settled:
    """What the store holds in the end: its plan, files with what was measured of their experts in nats, how many slices
    of each expert are kept (None: all), nats that the whole model loses at each width, lines to be said about it, and
    how good the choice under a limit is.
    """

    plan: ConversionPlan
    files: Mapping[str, Finished]
    kept: Mapping[int, Sequence[int]] | None
    kl: Sequence[float] | None
    said: Sequence[str]
    gap: str


def settle(plan: ConversionPlan, partial: Partial, progress: Callable[[str, int, int], None]) -> Settled:
    """Decide what is kept of what is written, and keep that alone.

    Broken off at any moment, it goes on from there. `progress` gets a stage, and bytes done and in all.
    """
    found, kl, said, gap = measured(plan, partial.finished), partial.kl, list[str](), ""
    if kl is not None:
        found = harm.in_nats(found, kl)
    final, kept = plan, None
    if plan.auto:
        final = plan.with_widths(DEFAULT_WIDTHS if kl is None else chosen(kl))
    if kl is not None:
        losses = ", ".join(f"{width} bits {loss:.3g}" for width, loss in zip(plan.layout.widths, kl, strict=True))
        said.append(f"KL from the source on the calibration text, nats per token: {losses}.")
    if plan.auto:
        said.append(f"Widths kept: {', '.join(map(str, final.layout.widths))}.")
    if plan.cut:
        kept, allocation = plan.allocate(found)
        how_good = f"at most {allocation.gap:.2%} above the least" if allocation.gap else "the least possible"
        gap = f"The error that is expected of this is {how_good}."
    _keep(plan, partial, final, kept, progress)
    places = [plan.layout.widths.index(width) for width in final.layout.widths]
    files = dict(partial.finished)
    for file in final.experts:
        rows = found[file.layer].sensitivity
        columns = None if rows is None else [[row[i] for i in places] for row in rows]
        files[file.name] = replace(files[file.name], sensitivity=columns)
    # Of a store without some slices it would not be true.
    of_all = None if kl is None or kept is not None else [kl[i] for i in places]
    return Settled(final, files, kept, of_all, said, gap)


def _keep(
    plan: ConversionPlan,
    partial: Partial,
    final: ConversionPlan,
    kept: Mapping[int, Sequence[int]] | None,
    progress: Callable[[str, int, int], None],
) -> None:
    """Write the files that `final` wants, and remove the first ones, one by one."""
    if kept is None and final.layout == plan.layout:
        for whole in plan.experts:
            if plan.staged:
                partial.rename(plan.first_name(whole), whole.name)
        return
    files = [replace(file, kept=tuple(kept[file.layer]) if kept else None) for file in final.experts]
    total, done = sum(file.size for file in files), 0
    for number, (whole, file) in enumerate(zip(plan.experts, files, strict=True), 1):
        if file.name not in partial.finished:
            progress(f"what is kept of layer {number} of {len(files)}", done, total)
            partial.finish(file.name, _copy(plan, partial, whole, file))
        partial.drop(plan.first_name(file))
        done += file.size
    progress("what is kept", total, total)


def _copy(plan: ConversionPlan, partial: Partial, whole: ExpertFile, file: ExpertFile) -> Finished:
    name = plan.first_name(file)
    source, recorded = partial.store / name, partial.finished[name]
    expected, checksums = iter(recorded.checksums), []
    with opened(source) as fd, atomic_file(partial.store / file.name) as out:
        writer = TensorWriter(out, list(file.entries()))
        for e, count in enumerate(file.counts):
            known = list(itertools.islice(expected, whole.layout.num_slices))
            needed = whole.layout.slices_for(file.layout.widths[count - 1])
            pieces = [torch.empty(size, dtype=torch.uint8) for size in whole.layout.slice_sizes[:needed]]
            for i, piece in enumerate(pieces):
                complete = read_into(fd, as_bytes(piece), whole.offset(e, i)) == piece.nbytes
                if not complete or zlib.crc32(as_bytes(piece)) != known[i]:
                    raise StoreError(f"{source} is damaged at expert {e}: delete {partial.folder} and convert again.")
            if file.layout != whole.layout:
                pieces = nested.regroup(pieces, whole.layout, replace(file.layout, widths=file.layout.widths[:count]))
            checksums += [writer.write([piece]) for piece in pieces]
        writer.finish()
    return replace(recorded, size=writer.size, data_start=writer.data_start, checksums=checksums)
