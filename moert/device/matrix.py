"""Weights in device memory: in 16 bits, or as bitsandbytes computes with them, in INT8 (LLM.int8(), arXiv 2208.07339,
section 3) or NF4 (QLoRA, arXiv 2305.14314, section 3). bitsandbytes is loaded where it is needed first.

Inputs come in float32 and are rounded as the kind of weights asks for; results are float32.
"""

# T tokens, N rows (outputs), K columns (inputs)

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from moert.device.bitsandbytes import bitsandbytes
from moert.quant.matmul import linear

DenseQuant = Literal["16", "int8", "nf4"]
Allocate = Callable[[torch.dtype, tuple[int, ...]], Tensor]

NF4_BLOCK = 64  # weights that share a scale: what QLoRA uses
_OUTLIER = 6.0  # inputs from here on are multiplied in 16 bits: the threshold of LLM.int8()
BLOCK_WEIGHTS = 1 << 20  # weights that are dequantised at a time
_HALF_MAX = 65504.0


def product(x: Tensor, w: Tensor) -> Tensor:
    """x [T, K], rounded to the dtype of w [N, K], times w.T: float32 [T, N], summed in float32."""
    x = _rounded(x, w.dtype)
    if not x.is_cuda:
        return linear(x.float(), w)
    if w.dtype != torch.float32 and _mixed("mm"):
        return torch.mm(x, w.T, out_dtype=torch.float32)
    return functional.linear(x, w).float()


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Devices without bfloat16 compute in float16, whose range some models' inputs leave."""
    return (x.clamp(-_HALF_MAX, _HALF_MAX) if dtype == torch.float16 else x).to(dtype)


def products(a: Tensor, b: Tensor) -> Tensor:
    """Multiply batches of matrices: a [B, M, K], b [B, K, N] of any dtype: float32 [B, M, N]."""
    if a.is_cuda and b.dtype == torch.float16 and _mixed("bmm"):
        return torch.bmm(a.to(b.dtype), b, out_dtype=torch.float32)
    return torch.bmm(a, b.float())


@cache
def _mixed(name: str) -> bool:
    """Tell whether this torch can give a product of 16-bit numbers in float32."""
    return "dtype" in getattr(torch.ops.aten, name).overloads()


@cache
def _nf4_code(device: torch.device) -> Tensor:
    """The 16 numbers that the codes stand for; made once, as it takes a copy to the device."""
    return cast(Tensor, bitsandbytes().functional.get_4bit_type("nf4", device=device))


class DeviceMatrix(nn.Module, ABC):
    """A matrix [N, K] in memory that `allocate` gives, which `fill` writes: x float32 [T, K] -> float32 [T, N].

    dtype: in what is computed where that is not integers. recordable: whether what is launched is the same for all x.
    """

    recordable = True

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, allocate: Allocate) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        for name, (kind, size) in self.parts().items():
            self.register_buffer(name, allocate(kind, size))

    @abstractmethod
    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return types and shapes of the tensors that it keeps, by name."""

    @abstractmethod
    def fill(self, first: int, weights: Tensor) -> None:
        """Write rows first .. first + n: float32 [n, K] on the matrix's device."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids`, int64 [T] on the matrix's device, as an embedding: float32 [T, K]."""


class Matrix16(DeviceMatrix):
    """weights: [N, K] in `dtype`."""

    weights: Tensor

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"weights": (self.dtype, self.shape)}

    def fill(self, first: int, weights: Tensor) -> None:
        self.weights[first : first + len(weights)] = weights

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weights)

    def rows(self, ids: Tensor) -> Tensor:
        return self.weights[ids].float()


class MatrixInt8(DeviceMatrix):
    """codes: int8 [N, K]. peaks: float32 [N], the largest magnitude of each row, which the code 127 stands for."""

    codes: Tensor
    peaks: Tensor
    recordable = False

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"codes": (torch.int8, self.shape), "peaks": (torch.float32, self.shape[:1])}

    def fill(self, first: int, weights: Tensor) -> None:
        codes, peaks, _ = bitsandbytes().functional.int8_vectorwise_quant(weights.to(torch.float16))
        self.codes[first : first + len(weights)], self.peaks[first : first + len(weights)] = codes, peaks

    def forward(self, x: Tensor) -> Tensor:
        """Columns with an input from _OUTLIER on apart, in float32; the others with inputs in int8 for each token."""
        lib = bitsandbytes().functional
        x = _rounded(x, torch.float16)
        codes, peaks, outliers = lib.int8_vectorwise_quant(x, threshold=_OUTLIER)
        y: Tensor = lib.int8_linear_matmul(codes, self.codes).float()
        y *= (peaks / 127)[:, None] * (self.peaks / 127)
        if outliers is not None and len(outliers):
            for some in torch.split(outliers, max(BLOCK_WEIGHTS // len(self.codes), 1)):
                columns = self.codes[:, some].float() * (self.peaks / 127)[:, None]
                y.addmm_(x[:, some].float(), columns.T)
        return y

    def rows(self, ids: Tensor) -> Tensor:
        return self.codes[ids].float() * (self.peaks[ids] / 127)[:, None]


class MatrixNF4(DeviceMatrix):
    """codes: uint8 [N, K / 2], two weights each. peaks: float32 [N, K / 64], the largest magnitude of each block.

    K is a multiple of NF4_BLOCK: bitsandbytes' blocks run on from row to row, but its CPU code (0.50) takes them to end
    with a row.
    """

    codes: Tensor
    peaks: Tensor

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        N, K = self.shape
        return {"codes": (torch.uint8, (N, K // 2)), "peaks": (torch.float32, (N, K // NF4_BLOCK))}

    def fill(self, first: int, weights: Tensor) -> None:
        lib, own = bitsandbytes().functional, slice(first, first + len(weights))
        codes, state = lib.quantize_4bit(weights.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
        self.codes[own] = codes.view(len(weights), -1)
        self.peaks[own] = state.absmax.view(len(weights), -1)

    def _state(self, peaks: Tensor) -> Any:
        """Return the state that bitsandbytes wants for rows with these peaks."""
        lib = bitsandbytes().functional
        return lib.QuantState(
            absmax=peaks.reshape(-1),
            shape=torch.Size((len(peaks), self.shape[1])),
            code=_nf4_code(peaks.device),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
        )

    def _dequantise(self, codes: Tensor, peaks: Tensor) -> Tensor:
        weights = bitsandbytes().functional.dequantize_4bit(codes.reshape(-1, 1), self._state(peaks))
        return cast(Tensor, weights).view(len(peaks), -1)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and len(x) == 1:  # a kernel of its own, which writes no weights
            codes = self.codes.view(-1, 1).t()
            y: Tensor = bitsandbytes().matmul_4bit(_rounded(x, self.dtype), codes, quant_state=self._state(self.peaks))
            return y.float()
        step = max(BLOCK_WEIGHTS // self.shape[1], 1)
        blocks = zip(torch.split(self.codes, step), torch.split(self.peaks, step), strict=True)
        parts = [product(x, self._dequantise(codes, peaks)) for codes, peaks in blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def rows(self, ids: Tensor) -> Tensor:
        return self._dequantise(self.codes[ids], self.peaks[ids]).float()


KINDS: dict[DenseQuant, type[DeviceMatrix]] = {"16": Matrix16, "int8": MatrixInt8, "nf4": MatrixNF4}


def dtype_of(device: torch.device) -> torch.dtype:
    """Return the 16-bit type in which this device computes: bfloat16 where it has it."""
    without = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if without else torch.bfloat16
