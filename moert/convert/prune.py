"""`moert convert --max-size`: once every layer is quantised and measured, copies what is kept of each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from moert.convert.partial import Finished, Partial
from moert.convert.plan import ConversionPlan
from moert.errors import StoreError
from moert.store.fileio import as_bytes, atomic_file, opened, read_into
from moert.store.layout import ExpertFile
from moert.store.writer import TensorWriter


def measured(plan: ConversionPlan, finished: Mapping[str, Finished]) -> dict[int, Finished]:
    """Find for each layer a file that knows what was measured: the one with all slices, or the one that was cut from
    it.
    """
    return {file.layer: finished.get(file.name) or finished[plan.first_name(file)] for file in plan.experts}


def prune(
    plan: ConversionPlan, partial: Partial, kept: Mapping[int, Sequence[int]], progress: Callable[[str, int, int], None]
) -> None:
    """Write the files with what is kept, which are not there yet, and remove those with all slices, one by one.

    Broken off at any moment, it goes on from there. `progress` gets a stage, and bytes done and in all.
    """
    files = [replace(file, kept=tuple(kept[file.layer])) for file in plan.experts]
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
            for i, size in enumerate(file.layout.slice_sizes[:count]):
                piece = torch.empty(size, dtype=torch.uint8)
                complete = read_into(fd, as_bytes(piece), whole.offset(e, i)) == size
                checksums.append(writer.write([piece]))
                if not complete or checksums[-1] != known[i]:
                    raise StoreError(f"{source} is damaged at expert {e}: delete {partial.folder} and convert again.")
        writer.finish()
    return replace(recorded, size=writer.size, data_start=writer.data_start, checksums=checksums)
