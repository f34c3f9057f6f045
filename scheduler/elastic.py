"""Precision as a scheduling act: which of the slices that are missing are worth waiting for.

A missing expert of low weight does little harm at few bits (HOBBIT, arXiv 2411.01433, section 4.2; SliceMoE, arXiv
2512.12990), so what is resident is used as it is, and slices are read where they save most error per byte. The harm
that may be done is bounded: a token that gives an expert the router weight w loses w ** 2 * damage, and the sum of
all that was lost never exceeds what the same tokens would have lost at the precision that the user named.
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


def generic_damage(widths: Sequence[int]) -> list[float]:
    """Harm of each width, where nothing was measured. Weights of 16 bits do none."""
    return [0.0 if b >= 16 else _AT_TWO_BITS * _PER_BIT ** (b - 2) for b in widths]


def at_mean(curve: Sequence[float], widths: Sequence[int], mean: float) -> float:
    """Harm at a mean width between two of `widths`, on a straight line between their harms."""
    return float(np.interp(mean, widths[: len(curve)], curve))


def harm_of_absence(curve: Sequence[float], widths: Sequence[int]) -> float:
    """Harm of leaving an expert out: all of its output is missing.

    Measured is only what rounding does, as a share of what leaves the layer. At 2 bits the error of the outputs of two
    calibrated models is 0.05 to 0.19 of these (0.13 in the mean of their layers), and 0.106 is what rounding Gaussian
    weights gives, so the latter says how large the outputs are.
    """
    share = generic_damage(widths)[0]
    return curve[0] / share if share else 1.0


@dataclass
class Ladder:
    """Decides with how many slices routed experts are computed, and keeps account of the harm.

    damage[layer][e]: harm of expert e at each width that it has. allowed[layer][e]: what the bound allows it, no less
    than the least of these. absent[layer][e]: harm of leaving it out. sizes[i]: bytes of slice i. skip: experts may be
    left out whose mean router weight is below this, if they have no slice in memory (0: none is). spent, granted: harm
    done and harm allowed so far. left: what the last `settle` decided against: error saved per byte, expert, slice.
    """

    damage: Mapping[int, Sequence[Sequence[float]]]
    allowed: Mapping[int, Sequence[float]]
    absent: Mapping[int, Sequence[float]]
    sizes: Sequence[int]
    skip: float = 0.0
    spent: float = 0.0
    granted: float = 0.0
    left: list[tuple[float, int, int]] = field(default_factory=list)
    _saved: float = 0.0
    _settled: int = 0  # tokens, once for each layer

    def settle(
        self, layer: int, routed: Sequence[RoutedExpert], squares: Sequence[float], have: Sequence[int], tokens: int = 1
    ) -> list[int]:
        """With how many of its slices each expert is computed: at least one, unless it may be left out.

        squares[k]: sum of the squared router weights of its tokens. have[k]: how many of its slices are in memory.
        `spent` never exceeds `granted`, if each expert is wanted with all the slices that it has. What is read beyond
        memory goes by error saved per byte, along the lower convex hull of each expert's harm over bytes, so it is at
        most one step more than the cheapest choice that the bound allows; what this step does too well is saved up.
        """
        curves, absent, allowed = self.damage[layer], self.absent[layer], self.allowed[layer]
        harms = [(absent[r.expert], *curves[r.expert]) for r in routed]
        grant = sum(s * allowed[r.expert] for r, s in zip(routed, squares, strict=True))
        counts = [_least(harm, 1, min(max(h, 1), r.slices)) for r, h, harm in zip(routed, have, harms, strict=True)]
        if self.skip:
            for k, r in enumerate(routed):
                if have[k] == 0 and r.weight < self.skip * r.tokens:
                    counts[k] = 0
        spent = [s * harm[n] for s, harm, n in zip(squares, harms, counts, strict=True)]
        total, limit = sum(spent), self._saved + grant
        steps = []
        for k, r in enumerate(routed):
            steps += self._step(k, harms[k], squares[k], counts[k], have[k], r.slices)
        heapify(steps)
        while steps and total > limit:
            _, k, n = heappop(steps)
            counts[k], before, spent[k] = n, spent[k], squares[k] * harms[k][n]
            total += spent[k] - before
            for step in self._step(k, harms[k], squares[k], n, have[k], routed[k].slices):
                heappush(steps, step)
        total = sum(spent)
        self.spent, self.granted, self._settled = self.spent + total, self.granted + grant, self._settled + tokens
        self._saved = min(limit - total, _SAVED * self.granted / self._settled)
        self.left = [(-rate, routed[k].expert, counts[k]) for rate, k, _ in steps if counts[k]]
        return counts

    def _step(
        self, k: int, harm: Sequence[float], square: float, n: int, have: int, most: int
    ) -> list[tuple[float, int, int]]:
        """The next step up from n slices: minus the error that it saves per byte, k, and to how many slices."""
        best, nbytes = (0.0, k, n), 0
        for m in range(n + 1, most + 1):
            nbytes += self.sizes[m - 1] if m > have else 0
            if nbytes and harm[m] < harm[n]:
                best = min(best, (-square * (harm[n] - harm[m]) / nbytes, k, m))
        return [best] if best[0] < 0 else []


def _least(harm: Sequence[float], first: int, last: int) -> int:
    """The number of slices from first to last that does least harm, the lowest of equals."""
    return min(range(first, last + 1), key=harm.__getitem__)
