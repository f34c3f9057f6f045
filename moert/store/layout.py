"""Names and offsets in a store. Pure arithmetic: opens no file and knows nothing of tensors' contents.

A store is a folder:
    moert.json                   what is in it (see meta.py)
    config.json, tokenizer.json  copied from the source, with generation config, chat template and licence where present
    dense.safetensors            everything but the experts
    experts-<layer>.safetensors  one per MoE layer: U8 tensors `layers.{l}.experts.{e}.slice.{i}`, shape [bytes]

The header of each safetensors file is padded with spaces to a multiple of 4096 bytes. Slices are padded to 4096 bytes
and follow each other, expert by expert, slice by slice, so that any prefix of an expert is one aligned read. Of an
expert only the first slices may be kept.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from moert.quant.format import RAW_DTYPE_BYTES, SLICE_ALIGN, ExpertLayout, MatrixLayout, align

META_FILE = "moert.json"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
DENSE_FILE = "dense.safetensors"
DENSE_WIDTHS = (4, 6, 8)  # bits at which large dense matrices can be stored, beside 16: as they are
_LEAST_HEAD_WIDTH = 6  # every token passes through the head alone; GGUF mixes of 4 bits keep it at 6 too
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LENGTH_BYTES = 8  # a safetensors file starts with the length of its header as a little-endian 64-bit integer
SAFETENSORS_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_DTYPE_CODES = {name: code for code, name in SAFETENSORS_DTYPES.items()}


def experts_file(layer: int) -> str:
    """Name of the file that holds the experts of `layer`."""
    return f"experts-{layer:05d}.safetensors"


def slice_name(layer: int, expert: int, index: int) -> str:
    """Name of the tensor that holds one slice of one expert."""
    return f"layers.{layer}.experts.{expert}.slice.{index}"


@dataclass(frozen=True)
class TensorSpec:
    """Shape of a tensor, and whether it is a large matrix that may be stored at 8 bits."""

    shape: tuple[int, ...]
    quantise: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a safetensors file; `dtype` is the format's own name for it (U8, BF16 ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def build_header(entries: Iterable[Entry]) -> bytes:
    """The start of a safetensors file whose tensors follow each other without holes; the data begin at its end, which
    is a multiple of 4096."""
    table, offset = {}, 0
    for entry in entries:
        end = offset + entry.nbytes
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    size = align(LENGTH_BYTES + len(text), SLICE_ALIGN)
    return struct.pack("<Q", size - LENGTH_BYTES) + text.ljust(size - LENGTH_BYTES)


@dataclass(frozen=True)
class ExpertFile:
    """The layout of the file of one MoE layer. kept[e]: how many slices expert e has; None: all."""

    layer: int
    num_experts: int
    layout: ExpertLayout
    kept: tuple[int, ...] | None = None

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Return how many slices each expert has."""
        return self.kept or (self.layout.num_slices,) * self.num_experts

    @property
    def name(self) -> str:
        return experts_file(self.layer)

    def entries(self) -> Iterator[Entry]:
        for e, count in enumerate(self.counts):
            for i, size in enumerate(self.layout.slice_sizes[:count]):
                yield Entry(slice_name(self.layer, e, i), "U8", (size,), size)

    @cached_property
    def header(self) -> bytes:
        return build_header(self.entries())

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Return where each expert begins, counted from the first, and where the last one ends."""
        prefixes = [0, *itertools.accumulate(self.layout.slice_sizes)]
        return (0, *itertools.accumulate(prefixes[count] for count in self.counts))

    def offset(self, expert: int, index: int = 0) -> int:
        """Offset in the file of slice `index` of `expert`."""
        return len(self.header) + self.starts[expert] + sum(self.layout.slice_sizes[:index])

    @property
    def data_bytes(self) -> int:
        """Bytes of all slices."""
        return self.starts[-1]

    @cached_property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.data_bytes


@dataclass(frozen=True)
class DenseTensor:
    """The form in which one dense tensor is stored: packed (`packed` set), or row-major in `dtype` (`packed` None)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    packed: MatrixLayout | None

    @property
    def nbytes(self) -> int:
        if self.packed is not None:
            return self.packed.slice_bytes(0)
        return math.prod(self.shape) * RAW_DTYPE_BYTES[self.dtype]

    @property
    def entry(self) -> Entry:
        if self.packed is not None:
            return Entry(f"{self.name}.slice.0", "U8", (self.nbytes,), self.nbytes)
        return Entry(self.name, _DTYPE_CODES[self.dtype], self.shape, self.nbytes)


def dense_width(name: str, dense_bits: int) -> int:
    """Bits at which the large dense matrix `name` is stored."""
    return max(dense_bits, _LEAST_HEAD_WIDTH) if name in (EMBEDDING, HEAD) else dense_bits


def dense_order(tensors: Iterable[DenseTensor]) -> list[DenseTensor]:
    """The order in dense.safetensors that keeps every tensor aligned to its element size without padding."""
    return sorted(tensors, key=lambda t: 0 if t.packed else 1 if t.dtype == "float32" else 2)


def stored_dense(
    tensors: Mapping[str, TensorSpec], dtype_of: Callable[[str], str], group_size: int, dense_bits: int
) -> list[DenseTensor]:
    """Decide how each of `tensors`, by canonical name, is stored, in order; dtype_of gives the source's dtype for a
    name.
    """

    def stored(name: str, spec: TensorSpec) -> DenseTensor:
        packed = None
        if spec.quantise and dense_bits in DENSE_WIDTHS:
            packed = MatrixLayout(spec.shape[0], spec.shape[1], group_size, (dense_width(name, dense_bits),))
        return DenseTensor(name, tuple(spec.shape), dtype_of(name), packed)

    return dense_order(stored(name, spec) for name, spec in tensors.items())
