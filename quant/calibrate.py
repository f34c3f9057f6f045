"""Codes and scales that keep a matrix's outputs, for all widths together.

With H = X^T X of the inputs X, a width b costs E_b = tr((W - W_b) H (W - W_b)^T). The codes that all widths share are
chosen so that the sum of weight_b * E_b is small:

1. Column by column with compensation as in GPTQ (arXiv 2210.17323, section 3), except that every width has targets of
   its own: the error that a column leaves at width b moves the later columns' targets of width b. A column's code is the
   one that is best for all widths' targets together. Scales are fitted when a group is reached.
2. Sweeps of coordinate descent over the same sum: each code again, given all others, then the group's scale of each
   width by least squares against the original weights. No sweep makes the sum larger.

Refitting scales per width is what makes prefixes usable: Any-Precision LLM (arXiv 2402.10517).
"""

# N rows, K columns (padded to whole groups), G group size, B widths

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moert.quant.dispatch import compiled
from moert.quant.format import MatrixLayout, midpoint
from moert.quant.reference import padded_columns

DAMPING = 0.01  # of the mean of H's diagonal, added to it: columns that the text never used keep their weights
SWEEPS = 2
_LEAST_SCALE = 2.0**-24  # the smallest positive fp16
_MOST_SCALE = 65504.0


@dataclass(frozen=True)
class Nested:
    """codes: uint8 [N, K] of the largest width; scales: float32 [B, N, K / G], exact in fp16."""

    codes: Tensor
    scales: Tensor


def width_weights(widths: Sequence[int]) -> list[float]:
    """What an error at each width counts: relative to what rounding costs there, a factor of 4 per bit."""
    return [4.0 ** (b - widths[0]) for b in widths]


def choose(w: Tensor, hessian: Tensor, layout: MatrixLayout, damping: float = DAMPING, sweeps: int = SWEEPS) -> Nested:
    """Quantise w float [N, K'] for inputs with X^T X = `hessian` float [K', K'] (K' columns before padding).

    Deterministic. Raises ValueError for shapes that do not fit.
    """
    if tuple(w.shape) != (layout.rows, layout.cols) or tuple(hessian.shape) != (layout.cols, layout.cols):
        raise ValueError(f"shapes {tuple(w.shape)} and {tuple(hessian.shape)} are not those of the layout")
    pad = padded_columns(layout) - layout.cols
    w = functional.pad(w.float(), (0, pad))
    hessian = functional.pad(hessian.float(), (0, pad, 0, pad))
    hessian.diagonal().add_(damping * hessian.diagonal().mean().clamp_min(1e-30))
    problem = _Problem(w, hessian, layout)
    problem.compensate()
    for _ in range(sweeps):
        problem.descend()
    return Nested(problem.codes, problem.scales)


class _Problem:
    """The state of the search: targets, codes, scales [B, N, K / G]."""

    def __init__(self, w: Tensor, hessian: Tensor, layout: MatrixLayout) -> None:
        self.w, self.hessian = w, hessian
        self.widths, self.size = list(layout.widths), layout.group_size
        self.weights = width_weights(layout.widths)
        self.codes = torch.zeros(w.shape, dtype=torch.uint8)
        self.scales = w.new_zeros(len(self.widths), w.shape[0], w.shape[1] // self.size)

    def compensate(self) -> None:
        N, K = self.w.shape
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.hessian.double()))
        factor = torch.linalg.cholesky(inverse, upper=True)
        column_weights = factor.diagonal().square().reciprocal().float()
        column_weights /= column_weights.mean()
        coupling = (-factor / factor.diagonal()[:, None]).float()
        targets = self.w.repeat(len(self.widths), 1)  # [B * N, K]
        for group, start in enumerate(range(0, K, self.size)):
            end = start + self.size
            scales = self._fit(targets, start, column_weights[start:end])
            self.scales[..., group] = scales
            moved = self._choose(targets, None, coupling, start, scales)
            targets[:, end:].addmm_(moved, coupling[start:end, end:], alpha=-1)

    def dequantised(self) -> Tensor:
        """[B, N, K]."""
        scales = self.scales.repeat_interleave(self.size, dim=-1)
        return torch.stack([levels(self.codes, b, self.widths[-1]) for b in self.widths]).mul_(scales)

    def descend(self) -> None:
        N, K = self.w.shape
        B, top = len(self.widths), self.widths[-1]
        diagonal = self.hessian.diagonal()
        coupling = self.hessian / diagonal
        coupling.fill_diagonal_(0)
        rest = (self.w - self.dequantised()).view(B * N, K)
        for group, start in enumerate(range(0, K, self.size)):
            end = start + self.size
            gradient = rest @ self.hessian[:, start:end]
            now = (self.w[:, start:end] - rest[:, start:end].view(B, N, -1)).view(B * N, -1)
            targets = now + gradient / diagonal[start:end]
            block = self.hessian[start:end, start:end]
            moved = self._choose(targets, now, coupling[:, start:], start, self.scales[..., group].contiguous(), local=True)
            gradient -= moved @ block
            rest[:, start:end] -= moved
            lev = torch.stack([levels(self.codes[:, start:end], b, top) for b in self.widths]).view(B * N, -1)
            slope = (lev * gradient).sum(-1)
            curve = ((lev @ block) * lev).sum(-1)
            old = self.scales[..., group].reshape(-1)
            new = _half(old + slope / curve)
            step = new - old
            step = torch.where(step * curve * step <= 2 * step * slope, step, 0.0)
            self.scales[..., group] = (old + step).view(B, N)
            rest[:, start:end] -= step[:, None] * lev

    def _fit(self, targets: Tensor, start: int, column_weights: Tensor) -> Tensor:
        N, K = self.w.shape
        scales = targets.new_empty(len(self.widths), N)
        module = compiled()
        column_weights = column_weights.contiguous()
        module.fit_scales(self.widths, self.weights, self.size, N, K, targets.data_ptr() + 4 * start, column_weights.data_ptr(), scales.data_ptr())
        return _half(scales)

    def _choose(self, targets, before, coupling, start, scales, local=False) -> Tensor:
        N, K = self.w.shape
        moved = targets.new_empty(len(targets), self.size)
        module = compiled()
        off = 0 if local else 4 * start
        module.choose_codes(self.widths, self.weights, self.size, N, targets.stride(0), targets.data_ptr() + off,
            0 if before is None else before.data_ptr(), coupling.data_ptr() + 4 * start * K + (0 if local else 4 * start), K, scales.data_ptr(), self.codes.data_ptr() + start, K, moved.data_ptr())
        return moved


def levels(codes: Tensor, width: int, top: int) -> Tensor:
    """Weights in units of their scale, float32, of codes of `top` bits cut to `width`."""
    return (codes >> (top - width)).float() - midpoint(width)


def _half(scales: Tensor) -> Tensor:
    return scales.clamp(_LEAST_SCALE, _MOST_SCALE).half().float()
