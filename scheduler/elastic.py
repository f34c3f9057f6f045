"""Precision as a scheduling act: which of the slices that are missing are worth waiting for.

A missing expert of low weight costs little accuracy at few bits (HOBBIT, arXiv 2411.01433, section 4.2; SliceMoE, arXiv
2512.12990), so what is resident is used as it is, and slices are read where they save most error per byte. The error
that may be made is bounded: a token that gives an expert the router weight w adds w ** 2 * sensitivity, and the sum of
all that was added never exceeds what the same tokens would have added at the precision that the user named.
"""

# E experts, B widths, K routed experts

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

import numpy as np

from moert.scheduler.types import RoutedExpert

# Error of a nested quantiser as a share of the weights' energy: at 2 bits, and its ratio from one bit to the next
# (Gaussian weights in groups of 64). For stores that were not calibrated.
_AT_TWO_BITS, _PER_BIT = 0.106, 0.28
# So much of what a token may lose in a layer can be saved up: what a long prompt did too well is not lent to all of the
# answer.
_SAVED = 64


def generic_sensitivity(widths: Sequence[int]) -> list[float]:
    """Return the sensitivity at each width, where nothing was measured. Weights of 16 bits have none."""
    return [0.0 if b >= 16 else _AT_TWO_BITS * _PER_BIT ** (b - 2) for b in widths]


def at_mean(curve: Sequence[float], widths: Sequence[int], mean: float) -> float:
    """Interpolate the sensitivity at a mean width between two of `widths`, on a straight line."""
    return float(np.interp(mean, widths[: len(curve)], curve))


def absence_sensitivity(curve: Sequence[float], widths: Sequence[int]) -> float:
    """Return the sensitivity of leaving an expert out: all of its output is missing.

    Measured is only what rounding does, as a share of what leaves the layer. At 2 bits the error of the outputs of two
    calibrated models is 0.05 to 0.19 of these (0.13 in the mean of their layers), and 0.106 is what rounding Gaussian
    weights gives, so the latter says how large the outputs are.
    """
    share = generic_sensitivity(widths)[0]
    return curve[0] / share if share else 1.0


@dataclass
class ErrorBudget:
    """Decides with how many slices routed experts are computed, and keeps account of the error that this makes.

    sensitivity[layer][e]: error of expert e at each width that it has. limits[layer][e]: what the bound allows it, no
    less than the least of these. absent[layer][e]: error of leaving it out. sizes[i]: bytes of slice i. skip: experts
    may be left out whose mean router weight is below this, if they have no slice in memory (0: none is). used, allowed:
    error made and error allowed so far. left: what the last `choose` decided against: error saved per byte, expert,
    slice.
    """

    sensitivity: Mapping[int, Sequence[Sequence[float]]]
    limits: Mapping[int, Sequence[float]]
    absent: Mapping[int, Sequence[float]]
    sizes: Sequence[int]
    skip: float = 0.0
    used: float = 0.0
    allowed: float = 0.0
    left: list[tuple[float, int, int]] = field(default_factory=list)
    _saved: float = 0.0
    _chosen: int = 0  # tokens, once for each layer
    _experts: dict[int, list[_Expert]] = field(default_factory=dict)

    def choose(
        self, layer: int, routed: Sequence[RoutedExpert], squares: Sequence[float], have: Sequence[int], tokens: int = 1
    ) -> list[int]:
        """Choose with how many of its slices each expert is computed: at least one, unless it may be left out.

        squares[k]: sum of the squared router weights of its tokens. have[k]: how many of its slices are in memory.
        `used` never exceeds `allowed`, if each expert is wanted with all the slices that it has. What is read beyond
        memory goes by error saved per byte, along the lower convex hull of each expert's error over bytes, so it is at
        most one step more than the cheapest choice that the bound allows; what this step does too well is saved up.
        """
        allowance, total, counts, steps = 0.0, 0.0, list[int](), list[tuple[float, int, int]]()
        known = self._experts[layer] if layer in self._experts else self._meet(layer)
        experts = [known[r.expert] for r in routed]
        skip = self.skip
        for k, (r, expert, square, held) in enumerate(zip(routed, experts, squares, have, strict=True)):
            allowance += square * expert.limits
            if skip and held == 0 and r.weight < skip * r.tokens:
                n, sensitivity, step = 0, expert.sensitivity[0], expert.step(0, held, r.slices)
            else:
                n, sensitivity, step = expert.begin(held, r.slices)
            counts.append(n)
            total += square * sensitivity
            if step:
                steps.append((-square * step[0], k, step[1]))
        limit = self._saved + allowance
        if total > limit:
            heapify(steps)
        while steps and total > limit:
            _, k, n = heappop(steps)
            expert, square, most = experts[k], squares[k], routed[k].slices
            total += square * (expert.sensitivity[n] - expert.sensitivity[counts[k]])
            counts[k] = n
            if step := expert.step(n, have[k], most):
                heappush(steps, (-square * step[0], k, step[1]))
        # In this order, so that the bound holds wherever this is interrupted.
        self.allowed, self._chosen, self.used = self.allowed + allowance, self._chosen + tokens, self.used + total
        self._saved = min(limit - total, _SAVED * self.allowed / self._chosen)
        self.left = [(-rate, routed[k].expert, counts[k]) for rate, k, _ in steps if counts[k]]
        return counts

    def _meet(self, layer: int) -> list[_Expert]:
        found = self._experts[layer] = [
            _Expert((absent, *curve), limits, self.sizes)
            for absent, curve, limits in zip(
                self.absent[layer], self.sensitivity[layer], self.limits[layer], strict=True
            )
        ]
        return found


class _Expert:
    """One expert: its sensitivity by number of slices, from none on. Answers asked for again and again are kept."""

    def __init__(self, sensitivity: Sequence[float], limits: float, sizes: Sequence[int]) -> None:
        self.sensitivity, self.limits, self._sizes = sensitivity, limits, sizes
        self._best = [min(range(1, max(n, 1) + 1), key=sensitivity.__getitem__) for n in range(len(sensitivity))]
        self._begins: dict[tuple[int, int], tuple[int, float, tuple[float, int] | None]] = {}
        self._steps: dict[tuple[int, int, int], tuple[float, int] | None] = {}

    def begin(self, held: int, most: int) -> tuple[int, float, tuple[float, int] | None]:
        """With how many slices to begin, their sensitivity, and the step up from there.

        Of those held it is the number up to `most` of least sensitivity, the lowest of equals; the base where none is.
        """
        most = min(most, len(self.sensitivity) - 1)  # a plan may not know that an expert has fewer slices
        found = self._begins.get((held, most))
        if found is None:
            n = self._best[min(max(held, 1), most)]
            found = self._begins[held, most] = n, self.sensitivity[n], self.step(n, held, most)
        return found

    def step(self, n: int, held: int, most: int) -> tuple[float, int] | None:
        """The step up from n slices that saves most error per byte beyond those held: how much, and to how many.

        None where more slices than these, up to `most`, are no less sensitive.
        """
        key = n, held, min(most, len(self.sensitivity) - 1)
        if key not in self._steps:
            self._steps[key] = self._find(*key)
        return self._steps[key]

    def _find(self, n: int, held: int, most: int) -> tuple[float, int] | None:
        rates = [
            ((self.sensitivity[n] - self.sensitivity[m]) / sum(self._sizes[max(n, held) : m]), m)
            for m in range(max(n, held) + 1, most + 1)
            if self.sensitivity[m] < self.sensitivity[n]
        ]
        return max(rates) if rates else None
