"""Turns a checkpoint into a store: one expert, or some rows of a dense matrix, in memory at a time for each core.

Works in OUT.partial beside OUT: progress.json records every finished file with its checksums, and store/ becomes OUT
by one rename at the end, so that OUT is whole or not there. The source is only read.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moert import __version__
from moert.errors import CheckpointError, StoreError, UsageError
from moert.quant import nested
from moert.quant.format import GROUP_SIZES, RAW_WIDTH, ExpertLayout, MatrixLayout, check_widths
from moert.store.calibration import Calibrated, CalibrationText
from moert.store.fileio import atomic_file
from moert.store.layout import (
    CONFIG_FILE,
    DENSE_FILE,
    DENSE_WIDTHS,
    TOKENIZER_FILE,
    DenseTensor,
    ExpertFile,
    build_header,
    dense_order,
    dense_width,
    experts_file,
)
from moert.store.meta import CopiedFile, StoreMeta, WeightFile
from moert.store.parallel import Workers, workers
from moert.store.partial import Finished, Partial
from moert.store.reader import Store
from moert.store.source import SourceModel, row_chunks
from moert.store.writer import TensorWriter, file_checksum

COPIED_FILES = (
    CONFIG_FILE,
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
COPIED_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*")


@dataclass(frozen=True, slots=True)
class ConvertProgress:
    """`done` of `total` bytes of the store; `resumed` of them were there before this run began."""

    stage: str
    done: int
    total: int
    resumed: int


class Quantiser(Protocol):
    """Chooses the codes of experts. Results of one `name`, which is recorded in the store, must always be the same.

    Called in this order: `begin`; for each layer that is not finished yet, ascending, `prepare`, the call for each of
    its experts from several threads at once, `finish`; at last `dense`. What it keeps between runs is in `files`.
    """

    name: str
    files: Sequence[str]

    def begin(self, folder: Path) -> None:
        """Start, or go on from what an earlier run left in `folder`, the folder of the conversion."""
        ...

    def prepare(self, layer: int, pool: Workers, report: Callable[[str], None]) -> None:
        """Before the experts of a layer; `report` is told a stage now and then where this takes long."""
        ...

    def __call__(
        self, layer: int, expert: int, gate: Tensor, up: Tensor, down: Tensor, layout: ExpertLayout
    ) -> Sequence[Tensor]:
        """The slices of one expert, uint8 [layout.slice_sizes[i]]. gate, up: [F, D]; down: [D, F].

        Raises ValueError for weights that cannot be stored.
        """
        ...

    def finish(self, layer: int) -> list[list[float]] | None:
        """After the experts of the layer that was prepared: their `sensitivity` (see meta.py) where it is known."""
        ...

    def dense(self, name: str, start: int, weights: Tensor) -> Tensor:
        """What is stored instead of rows `start` ... of a dense tensor: of the same shape and dtype."""
        ...


class RoundToNearest:
    """Codes from the weights alone, with a search of the clipping range."""

    name = "round-to-nearest"
    files: Sequence[str] = ()

    def begin(self, folder: Path) -> None:
        pass

    def prepare(self, layer: int, pool: Workers, report: Callable[[str], None]) -> None:
        pass

    def __call__(
        self, layer: int, expert: int, gate: Tensor, up: Tensor, down: Tensor, layout: ExpertLayout
    ) -> Sequence[Tensor]:
        return nested.pack_expert(gate, up, down, layout)

    def finish(self, layer: int) -> list[list[float]] | None:
        return None

    def dense(self, name: str, start: int, weights: Tensor) -> Tensor:
        return weights


def convert(
    source: Path,
    out: Path,
    *,
    widths: Sequence[int] = (2, 3, 4),
    group_size: int = 64,
    dense_bits: int = 8,
    resume: bool = False,
    progress: Callable[[ConvertProgress], None] | None = None,
    quantiser: Quantiser | None = None,
    calibration: CalibrationText | None = None,
    on_status: Callable[[str], None] | None = None,
    source_name: str | None = None,
) -> Store:
    """Convert the checkpoint folder `source` into the store `out`, which must not exist yet.

    With a `calibration` text (in place of a `quantiser`) the codes are chosen by their effect on the outputs for it;
    `on_status` is told how many experts saw too little of it. `source_name` is recorded as where the model came from
    (default: the folder's name). A run that was cut off goes on with `resume`, which also begins where there is nothing
    to resume.

    Raises UsageError for impossible settings, CheckpointError and UnsupportedModelError for the source, StoreError for
    the output: a full disk, an OUT that exists, settings or a source other than those of the run to be resumed.
    """
    source, out = Path(source), Path(out)
    try:
        checked = check_widths(widths)
    except ValueError as error:
        raise UsageError(f"Cannot convert: {error}.") from error
    if group_size not in GROUP_SIZES:
        raise UsageError(f"Group size {group_size} is not one of {', '.join(map(str, GROUP_SIZES))}.")
    if dense_bits not in (*DENSE_WIDTHS, 16):
        choices = ", ".join(map(str, DENSE_WIDTHS))
        raise UsageError(f"Dense weights can be stored at {choices} or 16 bits, not {dense_bits}.")
    if os.path.lexists(out):
        raise StoreError(f"{out} exists already: delete it or choose another name.")
    if out.resolve().is_relative_to(source.resolve()):
        raise StoreError(f"{out} lies inside the checkpoint, which is never written to: choose another folder.")
    if calibration is not None and checked == (RAW_WIDTH,):
        raise UsageError("Calibration has no effect on experts that are kept as they are: choose widths from 2 to 8.")
    model = SourceModel.open(source)
    if calibration is not None:
        quantiser = Calibrated(model, calibration)
    plan = _Plan(model, checked, group_size, dense_bits, quantiser or RoundToNearest())
    fingerprint = plan.source.checkpoint.fingerprint()
    run = _Run(plan, out, progress)
    try:
        with Partial.begin(out, plan.settings(), fingerprint, resume, plan.quantiser.files) as partial:
            run.write(partial)
            partial.publish(plan.meta(partial, source_name or source.resolve().name))
    except OSError as error:
        raise run.explain(error) from error
    if on_status is not None and isinstance(quantiser, Calibrated):
        on_status(quantiser.summary())
    return Store.open(out)


class _Plan:
    """What the store will hold, worked out from the headers of the source before anything is written."""

    def __init__(
        self, source: SourceModel, widths: tuple[int, ...], group_size: int, dense_bits: int, quantiser: Quantiser
    ) -> None:
        self.source, self.quantiser = source, quantiser
        self.group_size, self.dense_bits = group_size, dense_bits
        arch = source.architecture
        dtype = source.expert_dtype
        self.layout = ExpertLayout(
            arch.hidden_size, arch.expert_inner, group_size, widths, "bfloat16" if dtype == "mixed" else dtype
        )
        if self.layout.raw and dtype == "mixed":
            raise CheckpointError(
                f"The experts in {source.checkpoint.path} have several dtypes and cannot be kept as they are:"
                " choose widths from 2 to 8."
            )
        self.dense = dense_order(self._dense_tensors())
        self.experts = [ExpertFile(layer, arch.num_experts, self.layout) for layer in arch.moe_layers]

    def _dense_tensors(self) -> Iterator[DenseTensor]:
        for name, spec in self.source.architecture.dense_tensors().items():
            packed = None
            if spec.quantise and self.dense_bits in DENSE_WIDTHS:
                width = dense_width(name, self.dense_bits)
                packed = MatrixLayout(spec.shape[0], spec.shape[1], self.group_size, (width,))
            yield DenseTensor(name, tuple(spec.shape), self.source.dense_dtype(name), packed)

    @property
    def total_bytes(self) -> int:
        header = len(build_header(t.entry for t in self.dense))
        return header + sum(t.nbytes for t in self.dense) + sum(file.size for file in self.experts)

    def settings(self) -> dict[str, Any]:
        """What a run that is resumed must have in common with the one before; `version`: the codes may change."""
        return {
            "version": __version__,
            "widths": list(self.layout.widths),
            "group_size": self.group_size,
            "dense_bits": self.dense_bits,
            "quantiser": self.quantiser.name,
        }

    def meta(self, partial: Partial, source_name: str) -> StoreMeta:
        arch = self.source.architecture
        files = {name: partial.finished[name] for name in (DENSE_FILE, *(f.name for f in self.experts))}
        return StoreMeta(
            created_by=f"moert {__version__}",
            source_name=source_name,
            model_type=arch.model_type,
            quantiser=self.quantiser.name,
            group_size=self.group_size,
            dense_bits=self.dense_bits,
            moe_layers=arch.moe_layers,
            num_experts=arch.num_experts,
            layout=self.layout,
            dense=tuple(self.dense),
            dense_checksums=tuple(files[DENSE_FILE].checksums),
            weights={name: WeightFile(file.size, file.data_start) for name, file in files.items()},
            copies={n: CopiedFile(*file_checksum(partial.store / n)) for n in (CONFIG_FILE, TOKENIZER_FILE)},
            checksums={
                layer: _rows(files[experts_file(layer)].checksums, self.layout.num_slices) for layer in arch.moe_layers
            },
            sensitivity=_all_known({layer: files[experts_file(layer)].sensitivity for layer in arch.moe_layers}),
        )


def _rows(values: Sequence[int], length: int) -> list[list[int]]:
    return [list(values[i : i + length]) for i in range(0, len(values), length)]


def _all_known(values: dict[int, list[list[float]] | None]) -> dict[int, list[list[float]]] | None:
    known = {layer: value for layer, value in values.items() if value is not None}
    return known if known and len(known) == len(values) else None


class _Run:
    """Writes the files of a plan that are not there yet, and reports on the way."""

    def __init__(self, plan: _Plan, out: Path, progress: Callable[[ConvertProgress], None] | None) -> None:
        self.plan, self.out, self.progress = plan, out, progress
        self.done = self.resumed = self.kept = 0  # bytes written, there before this run, and in finished files
        self.total = plan.total_bytes

    def _advance(self, stage: str, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(ConvertProgress(stage, min(self.done, self.total), self.total, self.resumed))

    def write(self, partial: Partial) -> None:
        self.done = self.resumed = self.kept = sum(file.size for file in partial.finished.values())
        needed, free = self.total - self.kept, shutil.disk_usage(partial.folder).free
        if free < needed:
            partial.abandon()
            raise StoreError(
                f"Converting needs {_size(needed)} on the disk of {self.out}, but only {_size(free)} are free:"
                " free some space or choose another place."
            )
        self._copy(partial)
        weights = sum(n * k for n, k in self.plan.layout.shapes)
        quantiser = self.plan.quantiser
        quantiser.begin(partial.folder)
        with workers(4 * weights) as pool:
            for index, file in enumerate(self.plan.experts):
                if file.name not in partial.finished:
                    quantiser.prepare(file.layer, pool, lambda stage: self._advance(stage, 0))
                    stage = f"experts of layer {index + 1} of {len(self.plan.experts)}"
                    written = self._write_experts(partial.store / file.name, file, stage, pool)
                    sensitivity = quantiser.finish(file.layer)
                    self._finish(partial, file.name, replace(written, sensitivity=sensitivity))
            # After the experts: some of it may depend on how these were quantised.
            if DENSE_FILE not in partial.finished:
                self._finish(partial, DENSE_FILE, self._write_dense(partial.store / DENSE_FILE, pool))

    def _finish(self, partial: Partial, name: str, file: Finished) -> None:
        partial.finish(name, file)
        self.kept += file.size

    def _copy(self, partial: Partial) -> None:
        source = self.plan.source.checkpoint.path
        found = [source / name for name in COPIED_FILES]
        found += [path for pattern in COPIED_PATTERNS for path in sorted(source.glob(pattern))]
        for path in found:
            if path.is_file():
                with atomic_file(partial.store / path.name) as file:
                    file.write(path.read_bytes())

    def _write_dense(self, path: Path, pool: Workers) -> Finished:
        with atomic_file(path) as file:
            writer = TensorWriter(file, [t.entry for t in self.plan.dense])
            self._advance("dense weights", writer.size)
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
            self._advance("dense weights", part.nbytes)
            left -= part.nbytes
            yield part
        if left:
            padding = torch.zeros(left - sum(s.nbytes for s in scales), dtype=torch.uint8)
            self._advance("dense weights", left)
            yield torch.cat([*scales, padding])

    def _dense_rows(self, tensor: DenseTensor, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Codes and scales of some rows of a packed tensor; of another the rows as they are, and nothing."""
        weights = self.plan.quantiser.dense(tensor.name, rows[0], self.plan.source.dense(tensor.name, *rows))
        if tensor.packed is None:
            return weights, weights.new_empty(0, dtype=torch.uint8)
        layout = replace(tensor.packed, rows=len(weights))
        (packed,) = nested.quantise(weights.float(), layout)
        codes, scales = packed[: layout.codes_bytes(0)], packed[layout.codes_bytes(0) :]
        return codes, scales[: layout.scales_bytes()].clone()

    def _write_experts(self, path: Path, plan: ExpertFile, stage: str, pool: Workers) -> Finished:
        with atomic_file(path) as file:
            writer = TensorWriter(file, list(plan.entries()))
            self._advance(stage, writer.size)
            checksums = []
            for slices in pool.map(functools.partial(self._expert, plan.layer), range(plan.num_experts)):
                checksums += [writer.write([piece]) for piece in slices]
                self._advance(stage, plan.expert_bytes)
            writer.finish()
        return Finished(writer.size, writer.data_start, checksums)

    def _expert(self, layer: int, e: int) -> Sequence[Tensor]:
        weights, layout = self.plan.source.expert(layer, e), self.plan.layout
        try:
            slices = self.plan.quantiser(layer, e, *weights, layout)
            if tuple(piece.nbytes for piece in slices) != layout.slice_sizes:
                raise ValueError(f"{self.plan.quantiser.name} gave slices of other sizes than planned")
        except ValueError as error:
            raise CheckpointError(f"Cannot convert expert {e} of layer {layer}: {error}.") from error
        return slices

    def explain(self, error: OSError) -> StoreError:
        """The sentence for a write that failed."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return StoreError(
                f"The disk of {self.out} is full: converting needs {_size(self.total - self.kept)} of free space there;"
                " make room and go on with --resume."
            )
        return StoreError(f"Cannot convert to {self.out}: {error.filename or 'writing'}: {error.strerror}.")


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:.1f} MiB"
