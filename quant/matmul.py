"""One API for products with weights as they are and with nested-bit weights.

Few tokens go through the compiled kernels, which read each weight once; for many the weights are unpacked a block of
rows at a time and multiplied by torch. `moert.quant.dispatch` says which kernel is in use.
"""

# T tokens, N rows (outputs), K columns (inputs), D hidden, F expert inner size

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moert.quant import reference
from moert.quant.dispatch import Kernel, available_kernels, compiled, kernel_name, set_kernel, set_num_threads
from moert.quant.format import ExpertLayout, MatrixLayout, midpoint

__all__ = [
    "ACTIVATIONS",
    "Kernel",
    "PackedExpert",
    "PackedMatrix",
    "available_kernels",
    "expert_ffn",
    "gather_rows",
    "kernel_name",
    "linear",
    "set_kernel",
    "set_num_threads",
]

# Below this many tokens a kernel that streams the weights wins over unpacking them for torch (measured, 2 cores).
FEW_TOKENS = 12
_BLOCK_WEIGHTS = 1 << 20  # weights unpacked at a time: 4 MiB of float32


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def _operand(layout: MatrixLayout, addresses: Sequence[int]) -> tuple[Any, ...]:
    """What the native module takes for the matrix whose first len(addresses) slices are at `addresses`."""
    last = len(addresses) - 1
    shift = layout.widths[last]
    planes = []
    for index, address in enumerate(addresses):
        stride, offset = layout.group_bytes(index), 0
        for bits in layout.planes(index):
            shift -= bits
            planes.append((address + offset, stride, bits, shift))
            offset += 2 * layout.group_size * bits
    scales = addresses[last] + layout.codes_bytes(last)
    return planes, scales, layout.rows, layout.groups, layout.group_size, midpoint(layout.widths[last])


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A nested-bit matrix in memory, used at the width of its last slice.

    slices: contiguous uint8 [layout.slice_bytes(i)] of the first slices (best on 64 bytes). Else ValueError.
    """

    layout: MatrixLayout
    slices: tuple[Tensor, ...]
    operand: tuple[Any, ...] = field(init=False, repr=False)  # what the native module takes; points into the slices

    def __post_init__(self) -> None:
        for index, piece in enumerate(self.slices):
            if piece.dtype != torch.uint8 or not piece.is_contiguous():
                raise ValueError(f"slice {index} is not contiguous uint8")
            if piece.numel() != self.layout.slice_bytes(index):
                raise ValueError(f"slice {index} has {piece.numel()} bytes, not {self.layout.slice_bytes(index)}")
        object.__setattr__(self, "operand", _operand(self.layout, [s.data_ptr() for s in self.slices]))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.layout.rows, self.layout.cols

    def rows(self, first: int, last: int) -> Tensor:
        """Rows first..last dequantised, float32 [last - first, K]. `first` is a multiple of 16."""
        module = compiled()
        if module is None:
            return reference.dequantise(self.slices, self.layout, len(self.slices))[first:last]
        out = torch.empty(last - first, self.layout.cols)
        module.nested_dequantise(*self.operand, self.layout.cols, out.data_ptr(), out.stride(0), first, last)
        return out


@dataclass(frozen=True, eq=False)
class PackedExpert:
    """One expert in memory: gate, up and down as packed matrices, or as tensors where its weights are raw."""

    gate: PackedMatrix | Tensor
    up: PackedMatrix | Tensor
    down: PackedMatrix | Tensor

    @classmethod
    def from_slices(cls, slices: Sequence[Tensor], layout: ExpertLayout) -> PackedExpert:
        """View the first slices of an expert (each uint8 [layout.slice_sizes[i]]) as its matrices; copies nothing."""
        offsets = [layout.offsets(index) for index in range(len(slices))]
        if layout.raw:
            dtype = getattr(torch, layout.raw_dtype)
            raw = [
                slices[0][at : at + rows * cols * dtype.itemsize].view(dtype).view(rows, cols)
                for at, (rows, cols) in zip(offsets[0], layout.shapes, strict=False)
            ]
            return cls(*raw)
        matrices = [
            PackedMatrix(matrix, tuple(s[at[m] : at[m + 1]] for s, at in zip(slices, offsets, strict=True)))
            for m, matrix in enumerate(layout.matrices)
        ]
        return cls(*matrices)


def _few_tokens(x: Tensor, w: Tensor | PackedMatrix, module: ModuleType) -> Tensor:
    rows, cols = w.shape
    if isinstance(w, PackedMatrix):
        padded = w.layout.groups * w.layout.group_size
        if padded != cols:
            x = functional.pad(x, (0, padded - cols))
        x = x.contiguous()
        out = torch.empty(len(x), rows)
        module.nested_matmul(*w.operand, x.data_ptr(), len(x), x.stride(0), out.data_ptr(), rows)
    else:
        x = x.contiguous()
        out = torch.empty(len(x), rows)
        module.bf16_matmul(w.data_ptr(), rows, cols, x.data_ptr(), len(x), x.stride(0), out.data_ptr(), rows)
    return out


def linear(x: Tensor, w: Tensor | PackedMatrix) -> Tensor:
    """x @ w.T in float32, the weights upcast exactly.

    x: float32 [T, K]. w: [N, K], packed, or a contiguous tensor of any float dtype. Returns float32 [T, N].
    Raises ValueError where the shapes do not fit.
    """
    rows, cols = w.shape
    if x.ndim != 2 or x.shape[1] != cols or x.dtype != torch.float32:
        raise ValueError(f"input {tuple(x.shape)} of {x.dtype} does not fit a matrix of {rows} x {cols}")
    if isinstance(w, Tensor) and w.dtype == torch.float32:
        return functional.linear(x, w)
    streams = isinstance(w, PackedMatrix) or (w.dtype == torch.bfloat16 and w.is_contiguous())
    module = compiled()
    if module is not None and streams and len(x) < FEW_TOKENS:
        return _few_tokens(x, w, module)
    out = torch.empty(len(x), rows)
    step = max(16, _BLOCK_WEIGHTS // cols // 16 * 16)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        block = w.rows(first, last) if isinstance(w, PackedMatrix) else w[first:last].float()
        torch.mm(x, block.T, out=out[:, first:last])
    return out


def gather_rows(w: Tensor | PackedMatrix, ids: Tensor) -> Tensor:
    """Rows `ids` (int64 [T]) of a matrix [N, K], as an embedding does: float32 [T, K]."""
    if isinstance(w, Tensor):
        return w[ids].float()
    out = torch.empty(len(ids), w.shape[1])
    for t, row in enumerate(ids.tolist()):
        first = row // 16 * 16
        out[t] = w.rows(first, min(first + 16, w.shape[0]))[row - first]
    return out


def expert_ffn(x: Tensor, expert: PackedExpert, activation: str = "silu") -> Tensor:
    """down(activation(gate(x)) * up(x)). x: float32 [T, D]. Returns float32 [T, D]."""
    hidden = ACTIVATIONS[activation](linear(x, expert.gate)).mul_(linear(x, expert.up))
    return linear(hidden, expert.down)
