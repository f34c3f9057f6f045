"""Turns a checkpoint into a store: one expert, or some rows of a dense matrix, in memory at a time for each core.

Works in OUT.partial beside OUT: progress.json records every finished file with its checksums, and store/ becomes OUT
by one rename at the end, so that OUT is whole or not there. The source is only read. Under a limit of the size, or
where widths are chosen, all experts are quantised and measured before it is known what is kept of them (settle.py).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from moert.convert import harm
from moert.convert.calibration import Calibrated, CalibrationText
from moert.convert.pace import Pace
from moert.convert.parallel import Workers, workers
from moert.convert.partial import Finished, Partial
from moert.convert.plan import ConversionPlan, check_settings
from moert.convert.quantiser import Quantiser, RoundToNearest
from moert.convert.settle import settle
from moert.convert.side_files import check_side_files
from moert.convert.source_model import SourceModel, row_chunks
from moert.convert.widths import AUTO_WIDTHS, DEFAULT_WIDTHS
from moert.errors import BudgetError, CheckpointError, StoreError, UsageError
from moert.models.stored_model import StoredModel
from moert.quant import nested
from moert.quant.format import RAW_WIDTH
from moert.store.fileio import atomic_file, readable
from moert.store.layout import CONFIG_FILE, DENSE_FILE, TOKENIZER_FILE, DenseTensor, ExpertFile
from moert.store.meta import CopiedFile
from moert.store.writer import TensorWriter, file_checksum

# Kinds of work: layers that a text passes through, bytes that are written, windows of the text that the whole model is
# run on, and bytes that are copied to cut a store.
PASS, EXPERTS, DENSE, COMPARE, CUT = "pass", "experts", "dense", "compare", "cut"
# Seconds for a byte that is copied, or for one of the experts that a window meets, before there was such work.
COPIED, MET = 2e-9, 3e-8


@dataclass(frozen=True, slots=True)
class ConvertProgress:
    """`done` of `total` bytes; `resumed` of them were there before this run began.

    share: of the time that all of it takes, 0 to 1. seconds_left: None before there is anything to go by. Bytes say
    little of either: see `Pace`.
    """

    stage: str
    done: int
    total: int
    resumed: int
    share: float = 0.0
    seconds_left: float | None = None


def convert(
    source: Path,
    out: Path,
    *,
    widths: Sequence[int] | None = None,
    group_size: int = 64,
    dense_bits: int = 8,
    resume: bool = False,
    progress: Callable[[ConvertProgress], None] | None = None,
    quantiser: Quantiser | None = None,
    calibration: CalibrationText | None = None,
    on_status: Callable[[str], None] | None = None,
    source_name: str | None = None,
    max_size: int | None = None,
) -> StoredModel:
    """Convert the checkpoint folder `source` into the store `out`, which must not exist yet.

    Without `widths` these are those of AUTO_WIDTHS that pay, by what the whole model loses at each (see widths.py), or
    with a `max_size` all of these; 2, 3 and 4 where nothing is calibrated. With a `calibration` text (in place of a
    `quantiser`) the codes are chosen by their effect on the outputs for it;
    `on_status` is told how many experts saw too little of it, and which defaults of the source cannot be used.
    `source_name` is recorded as where the model came from (default: the folder's name). A run that was cut off goes on
    with `resume`, which also begins where there is nothing to resume.

    max_size: bytes of the whole store. Each expert then keeps only as many slices as minimise the errors together, by
    what the calibration measures. Until that is known the disk holds the store with all slices.

    Raises UsageError for impossible settings, CheckpointError and UnsupportedModelError for the source (also where a
    chat could not use its tokenizer or chat template), StoreError for the output: a full disk, an OUT that exists,
    settings or a source other than those of the run to be resumed.
    """
    source, out = Path(source), Path(out)
    auto = widths is None and calibration is not None
    checked = check_settings(AUTO_WIDTHS if auto else widths or DEFAULT_WIDTHS, group_size, dense_bits)
    if os.path.lexists(out):
        raise StoreError(f"{out} exists already: delete it or choose another name.")
    if out.resolve().is_relative_to(source.resolve()):
        raise StoreError(f"{out} lies inside the checkpoint, which is never written to: choose another folder.")
    if calibration is not None and checked == (RAW_WIDTH,):
        raise UsageError("Calibration has no effect on experts that are kept as they are: choose widths from 2 to 8.")
    if max_size is not None and checked == (RAW_WIDTH,):
        raise UsageError("Under a limit of the size experts keep fewer widths, but of 16 bits there is one only.")
    if max_size is not None and calibration is None:
        raise UsageError("A limit of the size needs to know which experts matter: give a text with --calibrate.")
    model = SourceModel.open(source)
    known = model.architecture.vocab_size
    if calibration is not None and max(calibration.tokens, default=0) >= known:
        raise UsageError(f"The calibration text has tokens beyond the {known} that the model knows: name another one.")
    warnings = check_side_files(source, model.architecture.vocab_size)
    if calibration is not None:
        quantiser = Calibrated(model, calibration)
    quantiser = quantiser or RoundToNearest(model)
    name = source_name or source.resolve().name
    plan = ConversionPlan(
        model,
        checked,
        group_size,
        dense_bits,
        quantiser.name,
        name,
        max_size,
        quantiser.code(checked),
        auto and max_size is None,
    )
    fingerprint = plan.source.checkpoint.fingerprint()
    run = _Run(plan, quantiser, out, progress)
    if on_status is not None:
        for warning in warnings:
            on_status(warning)
    try:
        with Partial.begin(out, plan.settings(), fingerprint, resume, quantiser.files) as partial:
            run.write(partial)
            settled = settle(plan, partial, run.cut)
            copies = {name: CopiedFile(*file_checksum(partial.store / name)) for name in (CONFIG_FILE, TOKENIZER_FILE)}
            partial.publish(settled.plan.meta(settled.files, copies, settled.kept, settled.kl))
    except OSError as error:
        raise run.explain(error) from error
    store = StoredModel.open(out)
    if on_status is not None and isinstance(quantiser, Calibrated):
        limited = f"Kept under the limit: {store.kept_widths()}. {settled.gap}".rstrip() if max_size is not None else ""
        for line in (quantiser.summary(), run.unmeasured, *settled.said, limited):
            if line:
                on_status(line)
    return store


class _Run:
    """Writes the files of a plan that are not there yet, and reports on the way."""

    def __init__(
        self, plan: ConversionPlan, quantiser: Quantiser, out: Path, progress: Callable[[ConvertProgress], None] | None
    ) -> None:
        self.plan, self.quantiser, self.out, self.progress = plan, quantiser, out, progress
        self.done = self.resumed = self.kept = 0  # bytes written, there before this run, and in finished files
        self.total = plan.total_bytes
        self.pace = Pace({}, {})
        self.unmeasured = ""  # why it is not known what the whole model loses at each width
        self._cut = 0

    def _report(self, stage: str, done: int, total: int, resumed: int) -> None:
        if self.progress is not None:
            pace = self.pace
            self.progress(ConvertProgress(stage, min(done, total), total, resumed, pace.share, pace.seconds_left))

    def _advance(self, stage: str, kind: str, nbytes: int) -> None:
        self.done += nbytes
        self.pace.spend(kind, nbytes)
        self._report(stage, self.done, self.total, self.resumed)

    def cut(self, stage: str, done: int, total: int) -> None:
        """Report what is copied of the experts: `done` of `total` bytes."""
        self.pace.left[CUT] = total - self._cut
        self.pace.spend(CUT, done - self._cut)
        self._cut = done
        self._report(stage, done, total, 0)

    @property
    def needed(self) -> int:
        """Bytes of disk that are still needed; to cut a file down, room for both."""
        return self.total - self.kept + (max(file.size for file in self.plan.experts) if self.plan.staged else 0)

    def write(self, partial: Partial) -> None:
        """Everything, with all slices of the experts."""
        names = {file.name: self.plan.first_name(file) for file in self.plan.experts}
        missing = [file for file in self.plan.experts if not {file.name, names[file.name]} & partial.finished.keys()]
        self.kept = self.total - sum(file.size for file in missing)
        self.kept -= 0 if DENSE_FILE in partial.finished else self.plan.dense_bytes
        self.done = self.resumed = self.kept
        needed, free = self.needed, shutil.disk_usage(partial.folder).free
        if free < needed:
            partial.abandon()
            before = " before the store is cut down to what is kept" if self.plan.staged else ""
            raise StoreError(
                f"Converting needs {readable(needed)} on the disk of {self.out}{before}, but only {readable(free)}"
                " are free: free some space or choose another place."
            )
        self._copy(partial)
        weights = sum(n * k for n, k in self.plan.layout.shapes)
        self.quantiser.begin(partial.folder)
        with workers(4 * weights) as pool:
            passed = self._begin_pace(missing, DENSE_FILE in partial.finished, pool)
            for file in missing:
                self._prepare(file.layer, file.layer + 1 - passed, pool)
                passed = file.layer + 1
                stage = f"experts of layer {self.plan.experts.index(file) + 1} of {len(self.plan.experts)}"
                name = names[file.name]
                written = self._write_experts(partial.store / name, file, stage, pool)
                if (found := self.quantiser.finish(file.layer)) is not None:
                    measured = {field.name: getattr(found, field.name) for field in fields(found)}
                    written = replace(written, **measured)
                self._finish(partial, name, written)
            # After the experts: some of it may depend on how these were quantised.
            if DENSE_FILE not in partial.finished:
                self._finish(partial, DENSE_FILE, self._write_dense(partial.store / DENSE_FILE, pool))
            if isinstance(self.quantiser, Calibrated) and partial.kl is None:
                self._compare(partial, self.quantiser, pool)

    def _compare(self, partial: Partial, calibrated: Calibrated, pool: Workers) -> None:
        """Measure what the whole model loses at each width. Where it cannot run here, `unmeasured` says why."""
        plan = self.plan
        firsts = {file.name: plan.first_name(file) for file in plan.experts}
        files = {name: partial.finished[first] for name, first in firsts.items()}
        files[DENSE_FILE] = partial.finished[DENSE_FILE]
        copies = {name: CopiedFile(*file_checksum(partial.store / name)) for name in (CONFIG_FILE, TOKENIZER_FILE)}
        places = {name: partial.store / firsts.get(name, name) for name in (*files, *copies)}
        self.pace.skip()
        try:
            with harm.trial_store(partial.folder / "trial", places, plan.meta(files, copies, None)) as store:
                report = functools.partial(self._advance, kind=COMPARE, nbytes=1)
                partial.measured(harm.divergences(store, calibrated.lossless(harm.WINDOWS, pool), report))
        except (BudgetError, UsageError) as error:
            self.unmeasured = f"What the whole model loses at each width was not measured: {error}"

    def _begin_pace(self, missing: Sequence[ExpertFile], dense_there: bool, pool: Workers) -> int:
        """Say what there is to do; the dense weights come last, so their rate is tried with rows of the largest.

        Returns through how many layers the text of a calibration has passed, or would have.
        """
        plan = self.plan
        kept = sum(file.size for file in plan.experts) if plan.auto else 0  # perhaps
        if plan.cut and plan.max_size is not None:
            kept = plan.max_size - plan.fixed_bytes
        layers = plan.experts[-1].layer + 1
        passed = 0 if len(missing) == len(plan.experts) else missing[0].layer if missing else layers
        experts = sum(file.size for file in plan.experts), sum(file.size for file in missing)
        dense = plan.dense_bytes, 0 if dense_there else plan.dense_bytes
        ahead = missing[-1].layer + 1 - passed if missing else 0
        compared = harm.WINDOWS * plan.layout.num_slices if isinstance(self.quantiser, Calibrated) else 0
        total = {PASS: layers, EXPERTS: experts[0], DENSE: dense[0], COMPARE: compared, CUT: kept}
        left = {PASS: ahead, EXPERTS: experts[1], DENSE: dense[1], COMPARE: compared, CUT: kept}
        self.pace = Pace(total, left)
        self.pace.guess(CUT, COPIED)
        self.pace.guess(COMPARE, MET * experts[0])
        with contextlib.suppress(ValueError):  # will be raised again where it can be explained
            largest = max(plan.dense, key=lambda tensor: tensor.nbytes)
            rows = itertools.islice(row_chunks(largest.shape), pool.count)
            begin, tried = time.monotonic(), pool.map(functools.partial(self._dense_rows, largest), rows)
            nbytes = sum(part.nbytes + rest.nbytes for part, rest in tried)
            self.pace.guess(DENSE, (time.monotonic() - begin) / nbytes)
        self.pace.skip()
        return passed

    def _prepare(self, layer: int, planned: int, pool: Workers) -> None:
        """Before the experts of a layer; planned: through how many layers a text has to pass for that."""
        stages: set[str] = set()

        def report(stage: str) -> None:
            stages.add(stage)
            self._advance(stage, PASS, 0)

        self.quantiser.prepare(layer, pool, report)
        passed = len(stages) or planned  # a resumed run may go again through a layer, or not through all
        self.pace.left[PASS] += passed - planned
        self.pace.spend(PASS, passed)

    def _finish(self, partial: Partial, name: str, file: Finished) -> None:
        partial.finish(name, file)
        self.kept += file.size

    def _copy(self, partial: Partial) -> None:
        for path in self.plan.copied_files():
            target = partial.store / path.relative_to(self.plan.source.checkpoint.path)
            target.parent.mkdir(exist_ok=True)
            with atomic_file(target) as file:
                file.write(path.read_bytes())

    def _write_dense(self, path: Path, pool: Workers) -> Finished:
        with atomic_file(path) as file:
            writer = TensorWriter(file, [t.entry for t in self.plan.dense])
            self.pace.skip()
            self._advance("dense weights", DENSE, writer.size)
            checksums = []
            for tensor in self.plan.dense:
                try:
                    checksums.append(writer.write(self._dense_parts(tensor, pool)))
                except ValueError as error:
                    raise CheckpointError(f"Cannot convert tensor {tensor.name}: {error}.") from error
            writer.finish()
        return Finished(writer.size, writer.data_start, checksums)

    def _dense_parts(self, tensor: DenseTensor, pool: Workers) -> Iterator[Tensor]:
        """The bytes of a dense tensor, some rows at a time: all codes, then all scales (rows are independent)."""
        scales: list[Tensor] = []
        left = tensor.nbytes
        for part, rest in pool.map(functools.partial(self._dense_rows, tensor), row_chunks(tensor.shape)):
            scales.append(rest)
            self._advance("dense weights", DENSE, part.nbytes)
            left -= part.nbytes
            yield part
        if left:
            padding = torch.zeros(left - sum(s.nbytes for s in scales), dtype=torch.uint8)
            self._advance("dense weights", DENSE, left)
            yield torch.cat([*scales, padding])

    def _dense_rows(self, tensor: DenseTensor, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Codes and scales of some rows of a packed tensor; of another the rows as they are, and nothing."""
        weights = self.quantiser.dense(tensor.name, rows[0], self.plan.source.dense(tensor.name, *rows))
        if tensor.packed is None:
            return weights, weights.new_empty(0, dtype=torch.uint8)
        layout = replace(tensor.packed, rows=len(weights))
        (packed,) = nested.quantise(weights.float(), layout)
        codes, scales = packed[: layout.codes_bytes(0)], packed[layout.codes_bytes(0) :]
        return codes, scales[: layout.scales_bytes()].clone()

    def _write_experts(self, path: Path, plan: ExpertFile, stage: str, pool: Workers) -> Finished:
        with atomic_file(path) as file:
            writer = TensorWriter(file, list(plan.entries()))
            self._advance(stage, EXPERTS, writer.size)
            checksums = []
            for slices in pool.map(functools.partial(self._expert, plan.layer), range(plan.num_experts)):
                checksums += [writer.write([piece]) for piece in slices]
                self._advance(stage, EXPERTS, sum(piece.nbytes for piece in slices))
            writer.finish()
        return Finished(writer.size, writer.data_start, checksums)

    def _expert(self, layer: int, e: int) -> Sequence[Tensor]:
        weights, layout = self.plan.source.expert(layer, e), self.plan.layout
        try:
            slices = self.quantiser(layer, e, *weights, layout)
            if tuple(piece.nbytes for piece in slices) != layout.slice_sizes:
                raise ValueError(f"{self.quantiser.name} gave slices of other sizes than planned")
        except ValueError as error:
            raise CheckpointError(f"Cannot convert expert {e} of layer {layer}: {error}.") from error
        return slices

    def explain(self, error: OSError) -> StoreError:
        """The sentence for a write that failed."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return StoreError(
                f"The disk of {self.out} is full: converting needs {readable(self.needed)} of free space there;"
                " make room and go on with --resume."
            )
        return StoreError(f"Cannot convert to {self.out}: {error.filename or 'writing'}: {error.strerror}.")
