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

import numpy as np

from moert.scheduler.types import RoutedExpert

# Error of a nested quantiser as a share of the weights' energy: at 2 bits, and its ratio from one bit to the next
# (Gaussian weights in groups of 64). For stores that were not calibrated.
_AT_TWO_BITS, _PER_BIT = 0.106, 0.28
_SAVED = 64  # layers of harm not done that may be saved up: quality is not lent from far away


def generic_damage(widths: Sequence[int]) -> list[float]:
    """Harm of each width, where nothing was measured. Weights of 16 bits do none."""
    return [0.0 if b >= 16 else _AT_TWO_BITS * _PER_BIT ** (b - 2) for b in widths]


def at_mean(curve: Sequence[float], widths: Sequence[int], mean: float) -> float:
    """Harm at a mean width between two of `widths`, on a straight line between their harms."""
    return float(np.interp(mean, widths[: len(curve)], curve))


@dataclass
class Ladder:
    """Decides with how many slices routed experts are computed, and keeps account of the harm.

    damage[layer][e]: harm of expert e at each width that it has. allowed[layer][e]: what the bound allows it.
    sizes[i]: bytes of slice i. skip: experts may be left out whose share of their token's weight is below this, if they
    have no slice in memory (0: none is). free: bytes that can be read without waiting, told before each `settle`.
    left: what the last `settle` decided against: error saved per byte, expert, slice.
    """

    damage: Mapping[int, Sequence[Sequence[float]]]
    allowed: Mapping[int, Sequence[float]]
    sizes: Sequence[int]
    skip: float = 0.0
    free: float = 0.0
    spent: float = 0.0
    granted: float = 0.0
    left: list[tuple[float, int, int]] = field(default_factory=list)
    _saved: float = 0.0

    def settle(
        self, layer: int, routed: Sequence[RoutedExpert], squares: Sequence[float], have: Sequence[int]
    ) -> list[int]:
        """With how many of its slices each expert is computed: at least one, unless it may be left out.

        squares[k]: sum of the squared router weights of its tokens. have[k]: how many of its slices are in memory.
        The harm of what is chosen never exceeds what is granted up to now.
        """
        curves, allowed, sizes = self.damage[layer], self.allowed[layer], self.sizes
        grant = sum(s * allowed[r.expert] for r, s in zip(routed, squares, strict=True))
        counts = [min(max(h, 1), r.slices) for r, h in zip(routed, have, strict=True)]
        for k, r in enumerate(routed):
            if have[k] == 0 and r.weight < self.skip * r.tokens:
                counts[k] = 0
        harm = [s * self._harm(curves[r.expert], n) for r, s, n in zip(routed, squares, counts, strict=True)]
        total, limit = sum(harm), self._saved + grant
        steps = [step for k, r in enumerate(routed) for step in self._step(k, r, squares[k], counts[k], curves)]
        free = self.free
        while steps:
            rate, k = max(steps)
            n = counts[k]
            size = sizes[n]
            if total <= limit and (size > free or rate <= 0):
                break
            after = squares[k] * self._harm(curves[routed[k].expert], n + 1)
            total += after - harm[k]
            harm[k], counts[k] = after, n + 1
            free -= size
            steps = [s for s in steps if s[1] != k] + self._step(k, routed[k], squares[k], n + 1, curves)
        total = sum(harm)
        self.spent, self.granted = self.spent + total, self.granted + grant
        self._saved = min(limit - total, _SAVED * grant)
        self.left = [(rate, routed[k].expert, counts[k]) for rate, k in steps if counts[k] and rate > 0]
        return counts

    @staticmethod
    def _harm(curve: Sequence[float], count: int) -> float:
        return curve[count - 1] if count else 1.0  # without the expert all of its output is missing

    def _step(
        self, k: int, r: RoutedExpert, square: float, n: int, curves: Sequence[Sequence[float]]
    ) -> list[tuple[float, int]]:
        """Error saved per byte by one slice more, if there is one."""
        if n >= r.slices:
            return []
        curve = curves[r.expert]
        return [(square * (self._harm(curve, n) - curve[n]) / self.sizes[n], k)]
