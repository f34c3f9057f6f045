"""Codes of the trellis code, and their scales, that keep a matrix's outputs at every width.

With H = X^T X of the inputs X, a width b costs E_b = tr((W - W_b) H (W - W_b)^T). Plane by plane, from the base on:

1. Columns are taken in the order of the four sequences. What a column leaves of its target moves the targets of the
   later columns as in GPTQ (arXiv 2210.17323, section 3).
2. The codes of up to 64 columns are chosen together by the Viterbi algorithm over the states of the trellis, where each
   survivor has moved the targets by its own errors (per-survivor processing: Raheli, Polydoros and Tzou, IEEE
   Transactions on Communications 43(2), 1995): the choice of a code sees what it does to those after it.
3. Codes that only kept their own width would leave errors that are small in the outputs but large in the weights, which
   the next planes would have to cover. So the base also looks ahead: a second set of targets, that of a larger width,
   to which the planes to come are taken to add one of a few levels.

Then the scale of each row is fitted by least squares.
"""

# N rows, K columns padded to whole groups, S states, C columns of a block, D hidden, F expert inner size, n tokens

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from moert.quant import trellis
from moert.quant.dispatch import compiled
from moert.quant.format import ExpertLayout, MatrixLayout
from moert.quant.nested import join_parts
from moert.quant.reference import pack, padded_columns

DAMPING = 0.03  # of the mean of H's diagonal, added to it: less is better on the text itself, worse on another
MOST_COLUMNS = 64
AHEAD = 4.0  # what an error at the width looked ahead to counts, at equal squares
# Best 2 and 4 levels for a Gaussian of deviation 1, as (inner, outer): Max, IRE Transactions 6(1), 1960.
_GAUSSIAN = {1: (0.798, 0.798), 2: (0.4528, 1.51)}
_ANY_STATE = 255  # as in csrc/trellis.h
_LEAST_SCALE, _MOST_SCALE = 2.0**-24, 65504.0  # of fp16


@dataclass(frozen=True)
class Chosen:
    """codes: uint8 [N, K] of the largest width, with padded columns; scales: of each width, float32 [N, 1], exact in
    fp16.
    """

    codes: Tensor
    scales: list[Tensor]


def choose(w: Tensor, hessian: Tensor, layout: MatrixLayout, damping: float = DAMPING) -> Chosen:
    """Quantise w float [N, K'] for inputs with X^T X = `hessian` float [K', K'] (K' columns before padding).

    Deterministic. Raises ValueError for shapes that do not fit.
    """
    if tuple(w.shape) != (layout.rows, layout.cols) or tuple(hessian.shape) != (layout.cols, layout.cols):
        raise ValueError(f"shapes {tuple(w.shape)} and {tuple(hessian.shape)} are not those of the layout")
    pad, size = padded_columns(layout) - layout.cols, layout.group_size
    order = trellis.to_ring(torch.arange(layout.cols + pad)[None])[0]
    hessian = functional.pad(hessian.float(), (0, pad, 0, pad))
    hessian = trellis.rotate(trellis.rotate(hessian, size).T.contiguous(), size)[order][:, order]
    # Rounding leaves it a little unsymmetric, and its least eigenvalues a little negative.
    hessian = (hessian + hessian.T) / 2
    hessian.diagonal().add_(damping * hessian.diagonal().mean().clamp_min(1e-30))
    targets = trellis.rotate(functional.pad(w.float(), (0, pad)), size)[:, order].contiguous()
    search = _Search(targets, hessian, layout)
    codes = torch.zeros(targets.shape, dtype=torch.uint8)
    scales: list[Tensor] = []
    for index in range(layout.num_slices):
        for bits in layout.planes(index):
            codes = codes << bits | search.add_plane(bits)
        scales.append(search.scale[:, None])
    unordered = torch.empty_like(codes)
    unordered[:, order] = codes
    return Chosen(unordered, scales)


class _Search:
    """The state of the search: targets [N, K] in the order of the sequences, levels so far, and the scale [N]."""

    def __init__(self, targets: Tensor, hessian: Tensor, layout: MatrixLayout) -> None:
        self.targets, self.hessian, self.widths = targets, hessian, layout.widths
        self.levels = torch.zeros_like(targets)
        self.scale = _half(targets.square().mean(1).sqrt() / trellis.UNIT)
        self.width = 0
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
        factor = torch.linalg.cholesky(inverse, upper=True)
        weights = factor.diagonal().square().reciprocal()
        self.column_weights = (weights / weights.mean()).float()
        self.coupling = (factor / factor.diagonal()[:, None]).float()

    def add_plane(self, bits: int) -> Tensor:
        """Choose the codes of the next plane, uint8 [N, K] in the order of the sequences, and fit the scale again."""
        N, K = self.targets.shape
        table = trellis.table(bits, self.width).float()
        self.width += bits
        ahead = self._ahead()
        left = self.targets - self.scale[:, None] * self.levels
        targets, ahead_targets = left, left.clone() if ahead else None
        codes = torch.empty(N, K, dtype=torch.uint8)
        anything = torch.full((N,), _ANY_STATE, dtype=torch.uint8)
        first = ends = anything
        for start, kept, end in _blocks(K):
            # A ring: it ends in the state that its beginning was chosen for.
            states = (ends if start else anything.clone()), (first if kept == K else anything.clone())
            block = _Block(
                bits,
                kept - start,
                table,
                self.coupling[start:end, start:end],
                self.column_weights[start:end],
                self.scale,
            )
            rest, ahead_rest = block.choose(targets, ahead_targets, ahead, start, states, codes)
            first, ends = (first if start else states[0]), states[1]
            targets[:, kept:].addmm_(rest, self.coupling[start:kept, kept:], alpha=-1)
            if ahead_targets is not None:
                ahead_targets[:, kept:].addmm_(ahead_rest, self.coupling[start:kept, kept:], alpha=-1)
        self.levels += table[trellis.windows(codes, bits)]
        product = self.levels @ self.hessian
        fitted = (product * self.targets).sum(1) / (product * self.levels).sum(1).clamp_min(1e-30)
        self.scale = _half(torch.where(fitted > 0, fitted, self.scale))
        return codes

    def _ahead(self) -> tuple[float, float, float] | None:
        """Return what the next planes are taken to add: inner and outer level in units of the scale, and what their
        errors count. None behind the last plane that matters to others.
        """
        later = [b for b in self.widths if b > self.width]
        if not later or self.width > 3:
            return None
        more = min(later[-1], 4 if self.width < 4 else later[-1]) - self.width
        inner, outer = _GAUSSIAN[min(2, max(1, more))]
        deviation = trellis.deviation(self.width)
        return inner * deviation, outer * deviation, AHEAD if self.width == 2 else 1.0


def _blocks(columns: int) -> Iterator[tuple[int, int, int]]:
    """Yield blocks of columns, at least two: the first one, and the ends of those kept and of those looked at.

    The last codes that a survivor chose are those that more columns would change: they are chosen again.
    """
    length = min(MOST_COLUMNS, columns // 2)
    start = 0
    while start < columns:
        end = min(start + length, columns)
        kept = end if end == columns else end - length // 4
        yield start, kept, end
        start = kept


@dataclass(frozen=True)
class _Block:
    """Columns whose codes are chosen together."""

    bits: int
    kept: int
    table: Tensor
    coupling: Tensor
    weights: Tensor
    scale: Tensor

    def choose(
        self,
        targets: Tensor,
        ahead_targets: Tensor | None,
        ahead: tuple[float, float, float] | None,
        start: int,
        states: tuple[Tensor, Tensor],
        codes: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Fill codes [N, K] from column `start` on. states: uint8 [N] before and after the block; where one is
        _ANY_STATE it takes the one that was found best.

        Returns what is left of the targets, and of those looked ahead to, [N, C] each.
        """
        N, K = targets.shape
        C = len(self.weights)
        left, ahead_left = torch.empty(N, self.kept), torch.empty(N, self.kept if ahead else 0)
        module = compiled()
        if module is None:
            return self._choose(targets[:, start : start + C], ahead_targets, ahead, start, states, codes)
        coupling = self.coupling.contiguous()
        at = 4 * start
        module.choose_trellis(
            self.bits, C, self.kept, N, K, self.table.data_ptr(), self.weights.data_ptr(), coupling.data_ptr(),
            self.scale.data_ptr(), targets.data_ptr() + at,
            ahead_targets.data_ptr() + at if ahead_targets is not None else 0, *(ahead or (0.0, 0.0, 0.0)),
            *(s.data_ptr() for s in states), codes.data_ptr() + start, K, left.data_ptr(), ahead_left.data_ptr(),
        )  # fmt: skip
        return left, ahead_left

    def _choose(
        self,
        targets: Tensor,
        ahead_targets: Tensor | None,
        ahead: tuple[float, float, float] | None,
        start: int,
        states: tuple[Tensor, Tensor],
        codes: Tensor,
    ) -> tuple[Tensor, Tensor]:
        N, C = targets.shape
        S, choices = 1 << (trellis.WINDOW_BITS[self.bits] - self.bits), 1 << self.bits
        lane = torch.arange(S)
        before = lane[:, None] % (S // choices) * choices + torch.arange(choices)  # [S, choices]
        level = self.table.view(S, choices) * self.scale[:, None, None]
        sets = [targets] + ([ahead_targets[:, start : start + C]] if ahead_targets is not None else [])
        survivors = [t[:, None].expand(N, S, C) for t in sets]
        before_block, after_block = (s.long() for s in states)
        cost = torch.where((lane == before_block[:, None]) | (before_block == _ANY_STATE)[:, None], 0.0, 1e30)
        lefts, froms = [torch.zeros(N, S, C) for _ in sets], []
        for j in range(C):
            rests = [t[:, before, j] - level for t in survivors]
            harm = rests[0].square()
            if ahead is not None:
                near, far = (self.scale[:, None, None] * x for x in ahead[:2])
                size = rests[1].abs()
                rests[1] = rests[1].sign() * torch.where(size < (near + far) / 2, size - near, size - far)
                harm = harm + ahead[2] * rests[1].square()
            cost, best = (cost[:, before] + self.weights[j] * harm).min(-1)
            origin = before[lane, best]
            froms.append(origin)
            for i, rest in enumerate(rests):
                kept = rest.gather(2, best[..., None])
                moved = survivors[i].gather(1, origin[..., None].expand(N, S, C)).clone()
                moved[..., j + 1 :] -= kept * self.coupling[j, j + 1 :]
                survivors[i] = moved
                lefts[i][:, :, j] = kept[..., 0]
        place = torch.where(after_block == _ANY_STATE, cost.argmin(1), after_block)
        result = [torch.empty(N, self.kept) for _ in sets]
        rows = torch.arange(N)
        for j in range(C - 1, -1, -1):
            if j == self.kept - 1:
                states[1].copy_(place)
            if j < self.kept:
                codes[:, start + j] = (place // (S // choices)).to(torch.uint8)
                for i, part in enumerate(lefts):
                    result[i][:, j] = part[rows, place, j]
            place = froms[j][rows, place]
        states[0].copy_(place)
        return result[0], result[1] if len(result) > 1 else torch.empty(N, 0)


def _half(scales: Tensor) -> Tensor:
    return scales.clamp(_LEAST_SCALE, _MOST_SCALE).half().float()


def pack_expert(
    matrices: tuple[Tensor, Tensor, Tensor], x: Tensor, inner: Tensor, weights: Tensor, layout: ExpertLayout
) -> list[Tensor]:
    """Slices of one expert, uint8 [layout.slice_sizes[i]], for the inputs x [n, D] and `inner` [n, F] of `down`.

    matrices: gate, up [F, D], down [D, F]. weights: what the square root of a token's squared error counts [n]. Raises
    ValueError for weights or inputs that are not finite or too large for fp16 scales.
    """
    gate, up, down = matrices
    if not all(float(t.abs().max()) < _MOST_SCALE for t in matrices):  # also true for NaN
        raise ValueError("the weights hold values that are not finite or above 65504")
    x, inner = x * weights[:, None], inner * weights[:, None]
    if not (bool(x.isfinite().all()) and bool(inner.isfinite().all())):
        raise ValueError("the calibration text leads to inputs that are not finite")
    both = replace(layout.matrices[0], rows=2 * len(gate))
    first, last = choose(torch.cat([gate, up]), x.T @ x, both), choose(down, inner.T @ inner, layout.matrices[2])
    half = len(gate)
    parts = [
        pack(first.codes[:half], [s[:half] for s in first.scales], layout.matrices[0]),
        pack(first.codes[half:], [s[half:] for s in first.scales], layout.matrices[1]),
        pack(last.codes, last.scales, layout.matrices[2]),
    ]
    return join_parts(parts, layout)
