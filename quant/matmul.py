"""One API for products with weights as they are and with nested-bit weights.

Packed weights meet int8 inputs in the compiled kernels; tensors are upcast exactly and multiplied in float32, through a
kernel that streams 16-bit weights for few tokens, through torch for many. `moert.quant.dispatch` says which kernel is
in use.
"""

# T tokens, N rows (outputs), K columns (inputs), D hidden, F expert inner size

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moert.quant import reference
from moert.quant.dispatch import Kernel, available_kernels, compiled, kernel_name, loaded, set_kernel, set_num_threads
from moert.quant.format import RAW_DTYPE_BYTES, TRELLIS, ExpertLayout, MatrixLayout
from moert.quant.trellis import kernel_tables

__all__ = [
    "ACTIVATIONS",
    "Kernel",
    "PackedExpert",
    "PackedMatrix",
    "available_kernels",
    "expert_ffn",
    "experts_ffn",
    "floats",
    "gather_rows",
    "kernel_name",
    "linear",
    "linear_many",
    "native_matrix",
    "set_kernel",
    "set_num_threads",
    "streamable",
]

# Below this many tokens 16-bit weights are streamed by a kernel instead of upcast in blocks for torch.
FEW_TOKENS = 12
FEW_ROWS = 16
_BLOCK_WEIGHTS = 1 << 20  # weights unpacked at a time: 4 MiB of float32


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def placed_planes(layout: MatrixLayout, places: Sequence[tuple[int, int]]) -> tuple[Any, ...]:
    """A matrix as the compiled module describes it, of which the i-th slice lies at places[i]: (number, offset).

    Returns planes (number, offset, stride, bits, shift) from the most significant, (number, offset) of the scales,
    rows, groups, group size, and the address of the tables of the trellis code (0: the linear code).
    """
    last = len(places) - 1
    shift = layout.widths[last]
    planes = []
    for index, (number, begin) in enumerate(places):
        stride, offset = layout.group_bytes(index), 0
        for bits in layout.planes(index):
            shift -= bits
            planes.append((number, begin + offset, stride, bits, shift))
            offset += 2 * layout.group_size * bits
    number, begin = places[last]
    scales = (number, begin + layout.codes_bytes(last))
    tables = kernel_tables(layout, len(places)).data_ptr() if layout.code == TRELLIS else 0
    return planes, scales, layout.rows, layout.groups, layout.group_size, tables


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A nested-bit matrix in memory, used at the width of its last slice.

    slices: contiguous uint8 [layout.slice_bytes(i)] of the first slices (best on 64 bytes). Else ValueError.
    """

    layout: MatrixLayout
    slices: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        for index, piece in enumerate(self.slices):
            if piece.dtype != torch.uint8 or not piece.is_contiguous():
                raise ValueError(f"slice {index} is not contiguous uint8")
            if piece.numel() != self.layout.slice_bytes(index):
                raise ValueError(f"slice {index} has {piece.numel()} bytes, not {self.layout.slice_bytes(index)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.layout.rows, self.layout.cols

    @cached_property
    def native(self) -> Any:
        """Return the object that the compiled module takes; it points into the slices."""
        planes, (_, scales), *shape = placed_planes(self.layout, [(0, s.data_ptr()) for s in self.slices])
        return loaded().Matrix([plane[1:] for plane in planes], scales, *shape)

    def rows(self, first: int, last: int) -> Tensor:
        """Rows first..last dequantised, float32 [last - first, K]. `first` is a multiple of 16."""
        module = compiled()
        if module is None:
            return reference.dequantise(self.slices, self.layout, len(self.slices))[first:last]
        out = torch.empty(last - first, self.layout.cols)
        module.dequantise(self.native, self.layout.cols, out.data_ptr(), out.stride(0), first, last)
        return out


@dataclass(frozen=True, eq=False)
class PackedExpert:
    """One expert in memory: gate, up and down as packed matrices, or as tensors where its weights are raw."""

    gate: PackedMatrix | Tensor
    up: PackedMatrix | Tensor
    down: PackedMatrix | Tensor

    @cached_property
    def native(self) -> Any:
        """Return the object that the compiled module takes; None for raw weights."""
        if isinstance(self.gate, Tensor) or isinstance(self.up, Tensor) or isinstance(self.down, Tensor):
            return None
        return loaded().Expert(self.gate.native, self.up.native, self.down.native)

    def floats(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down in float32, exactly."""
        return floats(self.gate), floats(self.up), floats(self.down)

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


def floats(w: Tensor | PackedMatrix) -> Tensor:
    """The weights [N, K] of a matrix, packed or of any float dtype, in float32, exactly."""
    return w.float() if isinstance(w, Tensor) else w.rows(0, w.shape[0])


def linear(x: Tensor, w: Tensor | PackedMatrix) -> Tensor:
    """x @ w.T in float32: tensors upcast exactly; with packed weights the inputs are rounded to int8 per group.

    x: float32 [T, K]. w: [N, K], packed, or a contiguous tensor of any float dtype. Returns float32 [T, N].
    Raises ValueError where the shapes do not fit.
    """
    rows, cols = w.shape
    if x.ndim != 2 or x.shape[1] != cols or x.dtype != torch.float32:
        raise ValueError(f"input {tuple(x.shape)} of {x.dtype} does not fit a matrix of {rows} x {cols}")
    module = compiled()
    if isinstance(w, Tensor):
        return _linear_raw(x, w, module)
    if module is None:
        return functional.linear(_round_inputs(x, w.layout), reference.rotated(w.slices, w.layout, len(w.slices)))
    return linear_many(x, [w])[0]


def _round_inputs(x: Tensor, layout: MatrixLayout) -> Tensor:
    """Round x [T, K] as the integer kernels see it: int8 per group of columns, as float32 [T, K padded]."""
    groups = reference.rotated_inputs(x, layout).view(x.shape[0], layout.groups, layout.group_size)
    peak = groups.abs().amax(-1, keepdim=True)
    # Groups without a usable scale (zeros, subnormals) become 0; what is not finite stays so through the scale.
    # A tensor over a tensor: torch multiplies a number by the reciprocal, which rounds twice.
    rounded = (groups * (torch.full_like(peak, 127) / peak)).round().nan_to_num(0).clamp(-127, 127) * (peak / 127)
    return rounded.flatten(1)


def streamable(w: Tensor | PackedMatrix) -> bool:
    """Tell whether a kernel reads these weights as they lie in memory."""
    return isinstance(w, PackedMatrix) or (w.is_contiguous() and str(w.dtype).removeprefix("torch.") in RAW_DTYPE_BYTES)


def native_matrix(w: Tensor | PackedMatrix) -> Any:
    """Return the object that the compiled module takes for streamable weights; points into them."""
    if isinstance(w, PackedMatrix):
        return w.native
    return loaded().Matrix(w.data_ptr(), str(w.dtype).removeprefix("torch."), w.shape[0])


def _linear_raw(x: Tensor, w: Tensor, module: ModuleType | None) -> Tensor:
    rows, cols = w.shape
    # A few rows, as of a shared expert's gate, always go this way, so that a token's are the same beside any others.
    if module is not None and streamable(w) and (x.shape[0] < FEW_TOKENS or rows < FEW_ROWS):
        return _products(x, [w], module)[0]
    if w.dtype == torch.float32:
        return functional.linear(x, w)
    out = torch.empty(x.shape[0], rows)
    step = max(16, _BLOCK_WEIGHTS // cols)
    for first in range(0, rows, step):
        torch.mm(x, w[first : first + step].float().T, out=out[:, first : first + step])
    return out


def linear_many(x: Tensor, matrices: Sequence[PackedMatrix]) -> list[Tensor]:
    """`linear` with several packed matrices of the same K and group size: the inputs are rounded once."""
    module = compiled()
    if module is None:
        return [linear(x, w) for w in matrices]
    return _products(x, matrices, module)


def _products(x: Tensor, matrices: Sequence[Tensor | PackedMatrix], module: ModuleType) -> list[Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    outs = [torch.empty(x.shape[0], w.shape[0]) for w in matrices]
    natives = [native_matrix(w) for w in matrices]
    module.linear(natives, x.data_ptr(), x.shape[0], x.stride(0), x.shape[1], [out.data_ptr() for out in outs])
    return outs


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


def experts_ffn(
    x: Tensor,
    experts: Sequence[PackedExpert],
    tokens_of: Sequence[Tensor],
    out: Tensor,
    activation: str = "silu",
) -> None:
    """`expert_ffn` of several experts in one call.

    x: float32 [T, D]. tokens_of[i]: int64 [n_i], the tokens of expert i. out: float32 [sum of n_i, D], contiguous, gets
    the results, one expert after the other.
    """
    module = compiled()
    natives = [e.native for e in experts] if module is not None and activation == "silu" else [None]
    if module is None or None in natives:
        start = 0
        for expert, tokens in zip(experts, tokens_of, strict=True):
            out[start : start + len(tokens)] = expert_ffn(x[tokens], expert, activation)
            start += len(tokens)
        return
    x = x.contiguous()
    counts, order = [tokens.shape[0] for tokens in tokens_of], torch.cat(list(tokens_of))
    inner = experts[0].gate.shape[0]
    module.experts(natives, counts, order.data_ptr(), x.data_ptr(), x.shape[0], x.shape[1], inner, out.data_ptr())
