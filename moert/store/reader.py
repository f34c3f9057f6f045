"""Opens a store and says where each slice lies. Reading slices into slots is the runtime's work, not done here."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from moert.errors import StoreError
from moert.hardware.allocator import allocate
from moert.quant.format import SLICE_ALIGN, ExpertLayout
from moert.quant.matmul import PackedMatrix
from moert.scheduler.precision import BitRouter
from moert.store.fileio import as_bytes, opened, read_into
from moert.store.layout import (
    CONFIG_FILE,
    DENSE_FILE,
    LENGTH_BYTES,
    META_FILE,
    DenseTensor,
    build_header,
)
from moert.store.meta import StoreMeta, read_meta


class Location(NamedTuple):
    """The place where slice 0 of an expert begins; its further slices follow."""

    file: Path
    offset: int


class Store:
    """A converted model on disk: `path`, `meta` (moert.json) and `config` (config.json).

    Opening checks all that is cheap: moert.json, that every file is there and as long as it should be, and that
    config.json is unchanged. What was written is checked when it is read. `moert.models.stored_model` knows the model.
    """

    def __init__(self, path: Path, meta: StoreMeta, config: dict[str, Any]) -> None:
        self.path = path
        self.meta = meta
        self.config = config
        self.layout: ExpertLayout = meta.layout
        self.num_experts = meta.num_experts
        self.moe_layers = meta.moe_layers
        self._experts = {layer: meta.expert_file(layer) for layer in meta.moe_layers}
        # For each layer and expert how many slices it has; at wider precisions it is computed with these.
        self.kept = {layer: file.counts for layer, file in self._experts.items()}

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open the store in a folder. Raises StoreError with one sentence that names the file."""
        path = Path(path)
        if not path.is_dir():
            raise StoreError(f"There is no store {path}.")
        meta = read_meta(path / META_FILE)
        sizes = {name: file.size for name, file in meta.weights.items()}
        for name, size in (sizes | {name: file.size for name, file in meta.copies.items()}).items():
            _check_size(path / name, size)
        data = _read(path / CONFIG_FILE)
        if zlib.crc32(data) != meta.copies[CONFIG_FILE].crc32:
            raise changed(path / CONFIG_FILE, "is not as it was written")
        store = cls(path, meta, json.loads(data))
        store._check_layout()
        return store

    def _check_layout(self) -> None:
        meta = self.meta
        dense_header = build_header(t.entry for t in meta.dense)
        dense = meta.weights[DENSE_FILE]
        if (dense.data_start, dense.size) != (len(dense_header), len(dense_header) + self.dense_bytes):
            raise changed(self.path / META_FILE, f"gives sizes that are not those of {DENSE_FILE}")
        _check_start(self.path / DENSE_FILE, dense_header)
        for file in self._experts.values():
            weights = meta.weights[file.name]
            start = weights.data_start
            if start % SLICE_ALIGN or weights.size != start + file.data_bytes:
                raise changed(self.path / META_FILE, f"gives sizes that are not those of {file.name}")
            _check_start(self.path / file.name, (start - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little"))

    @property
    def dense_bytes(self) -> int:
        """Bytes of memory that the tensors of `load_dense` take."""
        return sum(t.nbytes for t in self.meta.dense)

    def location(self, layer: int, expert: int) -> Location:
        """Return where slice 0 of an expert begins, a multiple of 4096. KeyError or IndexError where there is none."""
        file = self._experts[layer]
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"expert {expert} is not one of {self.num_experts}")
        return Location(self.path / file.name, self.meta.weights[file.name].data_start + file.starts[expert])

    def experts_with(self, index: int) -> int:
        """Count how many experts, over all layers, have slice `index`."""
        return sum(count > index for counts in self.kept.values() for count in counts)

    def experts_bytes(self, slices: int) -> int:
        """Bytes of the first `slices` slices of all experts, so far as they have them."""
        return sum(size * self.experts_with(i) for i, size in enumerate(self.layout.slice_sizes[:slices]))

    @property
    def widest(self) -> dict[int, int]:
        """Count how many experts, over all layers, have slices up to each width, ascending."""
        counts = Counter(self.layout.widths[count - 1] for counts in self.kept.values() for count in counts)
        return dict(sorted(counts.items()))

    def kept_widths(self) -> str:
        """Describe the counts of `widest` for people."""
        mean = sum(width * n for width, n in self.widest.items()) / sum(self.widest.values())
        parts = (f"{n} experts at {width}" for width, n in self.widest.items())
        return f"{mean:.2f} bits on average ({', '.join(parts)})"

    def checksum(self, layer: int, expert: int, index: int) -> int:
        """zlib.crc32 of a padded slice."""
        return self.meta.checksums[layer][expert][index]

    def load_dense(self, but: Container[str] = ()) -> dict[str, Tensor | PackedMatrix]:
        """Read all tensors but the experts' and those named, by canonical name, in memory of their own.

        StoreError names a damaged one.
        """
        chosen = [t.name for t in self.meta.dense if t.name not in but]
        sizes = [t.nbytes for t in self.meta.dense if t.name not in but]
        places = iter(torch.split(allocate(sum(sizes)), sizes) if sizes else ())
        return dict(self.read_dense(chosen, lambda nbytes: next(places)))

    def read_dense(
        self, names: Container[str], room: Callable[[int], Tensor] = allocate
    ) -> Iterator[tuple[str, Tensor | PackedMatrix]]:
        """Read the named tensors, experts' excepted, one after the other, each in memory that `room` gives for it."""
        offset = self.meta.weights[DENSE_FILE].data_start
        with _reading(self.path / DENSE_FILE) as fd:
            for tensor, crc in zip(self.meta.dense, self.meta.dense_checksums, strict=True):
                if tensor.name in names:
                    yield tensor.name, self._read_dense(fd, tensor, offset, crc, room(tensor.nbytes))
                offset += tensor.nbytes

    def _read_dense(self, fd: int, tensor: DenseTensor, offset: int, crc: int, place: Tensor) -> Tensor | PackedMatrix:
        data = place[: tensor.nbytes]
        buffer = as_bytes(data)
        if read_into(fd, buffer, offset) != len(buffer) or zlib.crc32(buffer) != crc:
            raise changed(self.path / DENSE_FILE, f"is damaged at tensor {tensor.name}")
        if tensor.packed is not None:
            return PackedMatrix(tensor.packed, (data,))
        return data.view(getattr(torch, tensor.dtype)).view(tensor.shape)

    def bit_router(self) -> BitRouter | None:
        """Return what decides on routed widths; None where the conversion did not measure sensitivities."""
        meta, kept = self.meta, self.kept
        if meta.sensitivity is None or meta.router_weights is None:
            return None
        curves = {
            layer: [row[:n] for row, n in zip(meta.sensitivity[layer], kept[layer], strict=True)]
            for layer in self.moe_layers
        }
        return BitRouter(meta.widths, curves, meta.router_weights)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every byte that has a checksum; `progress` gets the bytes checked and the bytes in all.

        Raises StoreError that names the first file, layer, expert and slice, or tensor, that is damaged.
        """
        done, total = 0, sum(file.size for file in self.meta.weights.values())

        def advance(to: int) -> None:
            nonlocal done
            done = to
            if progress is not None:
                progress(done, total)

        for name, copy in self.meta.copies.items():
            if zlib.crc32(_read(self.path / name)) != copy.crc32:
                raise changed(self.path / name, "is not as it was written")
        start = self.meta.weights[DENSE_FILE].data_start
        with _reading(self.path / DENSE_FILE) as fd:
            for tensor, crc in zip(self.meta.dense, self.meta.dense_checksums, strict=True):
                self._read_dense(fd, tensor, start, crc, torch.empty(tensor.nbytes, dtype=torch.uint8))
                start += tensor.nbytes
                advance(start)
        for layer, file in self._experts.items():
            self._verify_layer(layer, self.path / file.name, done, advance)

    def _verify_layer(self, layer: int, file: Path, before: int, advance: Callable[[int], None]) -> None:
        _check_start(file, self._experts[layer].header)
        with _reading(file) as fd:
            for e in range(self.num_experts):
                read = sum(piece.nbytes for piece in self._read_slices(fd, layer, e))
                advance(before + self.location(layer, e).offset + read)

    def read_expert(self, layer: int, expert: int) -> list[Tensor]:
        """Read the slices of an expert, uint8 [layout.slice_sizes[i]] each, checked: StoreError names a damaged one."""
        with _reading(self.location(layer, expert).file) as fd:
            return list(self._read_slices(fd, layer, expert))

    def _read_slices(self, fd: int, layer: int, expert: int) -> Iterator[Tensor]:
        file, offset = self.location(layer, expert)
        for i, size in enumerate(self.layout.slice_sizes[: self.kept[layer][expert]]):
            piece = torch.empty(size, dtype=torch.uint8)
            buffer = as_bytes(piece)
            if read_into(fd, buffer, offset) != size or zlib.crc32(buffer) != self.checksum(layer, expert, i):
                raise changed(file, f"is damaged at layer {layer}, expert {expert}, slice {i}")
            offset += size
            yield piece


def changed(file: Path, what: str) -> StoreError:
    """Make the error for a file that is not as the conversion wrote it."""
    return StoreError(f"{file} {what}: convert the model again.")


@contextmanager
def _reading(file: Path) -> Iterator[int]:
    try:
        with opened(file) as fd:
            yield fd
    except OSError as error:
        raise StoreError(f"Cannot read {file}: {error.strerror}.") from error


def _read(file: Path) -> bytes:
    with _reading(file) as fd:
        data = bytearray(os.fstat(fd).st_size)
        read_into(fd, memoryview(data), 0)
    return bytes(data)


def _check_size(file: Path, size: int) -> None:
    try:
        found = file.stat().st_size
    except OSError as error:
        raise changed(file, "is missing") from error
    if found != size:
        raise changed(file, f"is {'cut short' if found < size else 'too long'} ({found} bytes, not {size})")


def _check_start(file: Path, expected: bytes) -> None:
    found = bytearray(len(expected))
    with _reading(file) as fd:
        read_into(fd, memoryview(found), 0)
    if found != expected:
        raise changed(file, "has a damaged header")
