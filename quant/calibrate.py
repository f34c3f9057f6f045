"""Codes and scales that keep a matrix's outputs, for all widths together.

With H = X^T X of the inputs X, a width b costs E_b = tr((W - W_b) H (W - W_b)^T). The codes that all widths share are
chosen so that the sum of weight_b * E_b is small:

1. Column by column with compensation as in GPTQ (arXiv 2210.17323, section 3), except that every width has targets of
   its own: the error that a column leaves at width b moves the later columns' targets of width b. A column's code is
   the one that is best for all widths' targets together. Scales are fitted when a group is reached.
2. Sweeps of coordinate descent over the same sum: each code again, given all others, then the group's scale of each
   width by least squares against the original weights. No sweep makes the sum larger.

Refitting scales per width is what makes prefixes usable: Any-Precision LLM (arXiv 2402.10517).
"""

# N rows, K columns (padded to whole groups), G group size, B widths

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from moert.quant.dispatch import compiled
from moert.quant.format import ExpertLayout, MatrixLayout, midpoint
from moert.quant.nested import join_parts
from moert.quant.reference import pack, padded_columns

DAMPING = 0.005  # of the mean of H's diagonal, added to it: columns that the text never used keep their weights
SWEEPS = 2
# Exponent of the inputs. On a trained model 0 and 0.15 lose least; 0.3 loses 3% and 0.5 lost 12% more behind `down`.
BALANCE = 0.15
_LEAST_SCALE = 2.0**-24  # the smallest positive fp16
_MOST_SCALE = 65504.0
_CLIPS = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58, 0.5, 0.42)  # as in csrc/calibrate.cpp
_ROUNDS = 3


@dataclass(frozen=True)
class Nested:
    """codes: uint8 [N, K] of the largest width; scales: float32 [B, N, K / G], exact in fp16."""

    codes: Tensor
    scales: Tensor


def width_weights(widths: Sequence[int]) -> list[float]:
    """Return what an error at each width counts: relative to what rounding costs there, a factor of 4 per bit."""
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
        K = self.w.shape[1]
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
            moved = self._choose(targets[:, start:end], None, coupling[start:end, start:end], start, scales)
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
            moved = self._choose(targets, now, coupling[start:end, start:end], start, self.scales[..., group])
            gradient -= moved @ block
            rest[:, start:end] -= moved
            lev = torch.stack([levels(self.codes[:, start:end], b, top) for b in self.widths]).view(B * N, -1)
            slope = (lev * gradient).sum(-1)
            curve = ((lev @ block) * lev).sum(-1)
            old = self.scales[..., group].reshape(-1)
            step = _half(old + slope / curve) - old
            # Rounded to fp16 a step can overshoot; one that does not lower the error is not taken.
            step = torch.where(step * step * curve <= 2 * step * slope, step, 0.0)
            self.scales[..., group] = (old + step).view(B, N)
            rest[:, start:end] -= step[:, None] * lev

    def _fit(self, targets: Tensor, start: int, column_weights: Tensor) -> Tensor:
        """Scales [B, N] for targets [B * N, K] in the group that begins at column `start`."""
        N, K = self.w.shape
        scales = targets.new_empty(len(self.widths), N)
        module = compiled()
        if module is None:
            part = targets[:, start : start + self.size].view(len(self.widths), N, -1)
            return _half(_fit_scales(part, column_weights, self.widths, self.weights))
        column_weights = column_weights.contiguous()
        addresses = (targets.data_ptr() + 4 * start, column_weights.data_ptr(), scales.data_ptr())
        module.fit_scales(self.widths, self.weights, self.size, N, K, *addresses)
        return _half(scales)

    def _choose(self, targets: Tensor, before: Tensor | None, coupling: Tensor, start: int, scales: Tensor) -> Tensor:
        """Choose the codes of the group that begins at `start`; returns how far they move [B * N, G].

        targets, before: [B * N, G]. coupling: [G, G]. scales: [B, N].
        """
        N, K = self.w.shape
        moved = targets.new_empty(len(targets), self.size)
        module = compiled()
        if module is None:
            codes = self.codes[:, start : start + self.size]
            return _choose_codes(targets, before, coupling, scales, self.widths, self.weights, codes)
        targets, coupling, scales = targets.contiguous(), coupling.contiguous(), scales.contiguous()
        old = 0 if before is None else before.data_ptr()
        addresses = (targets.data_ptr(), old, coupling.data_ptr(), scales.data_ptr())
        codes_at = self.codes.data_ptr() + start
        module.choose_codes(self.widths, self.weights, self.size, N, *addresses, codes_at, K, moved.data_ptr())
        return moved


def levels(codes: Tensor, width: int, top: int) -> Tensor:
    """Weights in units of their scale, float32, of codes of `top` bits cut to `width`."""
    return (codes >> (top - width)).float() - midpoint(width)


def balance(inputs: Tensor, weights: Tensor) -> Tensor:
    """Factors [K] for the columns of a matrix whose inputs are divided by them, with the median 1.

    inputs, weights: root mean squares [K] of the inputs and of the columns. As in AWQ (arXiv 2306.00978, section 3.2)
    with exponents that undo any factors put between the two. That columns of a group are alike in size is worth more
    than that large inputs have large weights, which compensation sees to: see BALANCE.
    """
    factors = _floored(inputs) ** BALANCE / _floored(weights) ** (1 - BALANCE)
    return factors / factors.median()


def _floored(x: Tensor) -> Tensor:
    return x.clamp_min(x.mean() * 1e-4 + 1e-30)


def pack_expert(
    matrices: tuple[Tensor, Tensor, Tensor], x: Tensor, inner: Tensor, weights: Tensor, layout: ExpertLayout
) -> list[Tensor]:
    """Slices of one expert, uint8 [layout.slice_sizes[i]], for the inputs x [n, D] and `inner` [n, F] of `down`.

    matrices: gate, up [F, D], down [D, F]. weights: what each token's output counts [n]. Rows of `up` are divided by
    factors that multiply the columns of `down`, which leaves the expert's function alone. Raises ValueError for weights
    or inputs that are not finite or too large for fp16 scales.
    """
    gate, up, down = matrices
    if not all(float(t.abs().max()) < _MOST_SCALE for t in matrices):  # also true for NaN
        raise ValueError("the weights hold values that are not finite or above 65504")
    if not (bool(x.isfinite().all()) and bool(inner.isfinite().all())):
        raise ValueError("the calibration text leads to inputs that are not finite")
    factors = balance(inner.square().mean(0).sqrt(), down.square().mean(0).sqrt())
    x, inner = x * weights[:, None], inner / factors * weights[:, None]
    both = replace(layout.matrices[0], rows=2 * len(gate))
    chosen = choose(torch.cat([gate, up / factors[:, None]]), x.T @ x, both)
    last = choose(down * factors, inner.T @ inner, layout.matrices[2])
    parts = [(chosen.codes[: len(gate)], chosen.scales[:, : len(gate)])]
    parts += [(chosen.codes[len(gate) :], chosen.scales[:, len(gate) :]), (last.codes, last.scales)]
    packed = [
        pack(codes[:, : matrix.cols], list(scales), matrix)
        for (codes, scales), matrix in zip(parts, layout.matrices, strict=True)
    ]
    return join_parts(packed, layout)


def _half(scales: Tensor) -> Tensor:
    return scales.clamp(_LEAST_SCALE, _MOST_SCALE).half().float()


def _candidates(targets: Tensor, scales: Tensor, widths: Sequence[int]) -> Tensor:
    """Codes worth trying for targets [B, ...] in units of scales that broadcast: [C, ...], all of the largest width.

    Of the nearest code of the largest width, the nearest to it with each of the prefixes around each width's best.
    """
    top = widths[-1]
    nearest = [
        (target / scale + 2.0 ** (b - 1)).floor().clamp(0, 2**b - 1).int()
        for target, scale, b in zip(targets, scales, widths, strict=True)
    ]
    found = [nearest[-1]]
    for prefix, b in zip(nearest[:-1], widths[:-1], strict=True):
        for step in (-1, 0, 1):
            least = (prefix + step).clamp(0, 2**b - 1) << (top - b)
            found.append(torch.minimum(torch.maximum(nearest[-1], least), least + 2 ** (top - b) - 1))
    return torch.stack(found)


def _best_codes(targets: Tensor, scales: Tensor, widths: Sequence[int], weights: Sequence[float]) -> Tensor:
    candidates = _candidates(targets, scales, widths)
    cost = torch.zeros(candidates.shape)
    for target, scale, b, weight in zip(targets, scales, widths, weights, strict=True):
        cost += weight * (target - scale * levels(candidates, b, widths[-1])).square()
    return candidates.gather(0, cost.argmin(0, keepdim=True))[0]


def _fit_scales(targets: Tensor, column_weights: Tensor, widths: Sequence[int], weights: Sequence[float]) -> Tensor:
    """Scales [B, N] of targets [B, N, G]: a clipping range, then rounds of codes and least squares."""
    top = widths[-1]
    peak = targets[-1].abs().amax(-1, keepdim=True).clamp_min(1e-30)
    best, least = targets.new_zeros(len(widths), len(peak), 1), torch.full_like(peak, torch.inf)
    for attempt in range(len(_CLIPS) + _ROUNDS):
        if attempt < len(_CLIPS):
            step = peak * _CLIPS[attempt] / 2 ** (top - 1)
            codes = (targets[-1] / step + 2 ** (top - 1)).floor().clamp(0, 2**top - 1).int()
        else:
            codes = _best_codes(targets, best, widths, weights)
        level = torch.stack([levels(codes, b, top) for b in widths])
        product, square = ((column_weights * x * level).sum(-1, keepdim=True) for x in (targets, level))
        scales = (product / square).clamp_min(1e-30)
        error = (column_weights * targets.square()).sum(-1, keepdim=True) - scales * product
        cost = torch.einsum("b,bnk->nk", targets.new_tensor(weights), error)
        better = cost < least
        best, least = torch.where(better, scales, best), torch.where(better, cost, least)
    return best[..., 0]


def _choose_codes(
    targets: Tensor,
    before: Tensor | None,
    coupling: Tensor,
    scales: Tensor,
    widths: Sequence[int],
    weights: Sequence[float],
    codes: Tensor,
) -> Tensor:
    """Choose the codes as the compiled `choose_codes` does: fills codes [N, G] and returns the moves [B * N, G]."""
    B, N = scales.shape
    left = targets.reshape(B, N, -1).clone()
    now = left if before is None else before.view(B, N, -1)
    moved = torch.empty_like(left)
    for j in range(left.shape[-1]):
        chosen = _best_codes(left[..., j], scales, widths, weights)
        codes[:, j] = chosen.to(torch.uint8)
        values = scales * torch.stack([levels(chosen, b, widths[-1]) for b in widths])
        moved[..., j] = values - now[..., j]
        later = slice(j + 1 if before is None else 0, None)
        left[..., later] -= moved[..., j, None] * coupling[j, later]
    return moved.view(B * N, -1)
