"""Measure how likely a guess is to be right, by how far ahead and at which rank it was made: measured while running."""

from __future__ import annotations

from collections.abc import Collection, Sequence

_MEMORY = 0.995  # so that what was measured some hundred guesses ago counts little


class RankPrecision:
    """Running shares of right guesses among those that were not in memory.

    What is not in memory is used less often than its rank alone would say.
    """

    def __init__(self) -> None:
        self._right: dict[tuple[int, int], tuple[float, float]] = {}
        self._open: dict[int, list[tuple[int, Sequence[tuple[int, int]]]]] = {}

    def of(self, ahead: int, rank: int) -> float:
        """Probability that an expert is used that was named `ahead` layers before, at this rank (0: likeliest)."""
        right, total = self._right.get((ahead, rank), (0.5, 1.0))
        return right / total

    def watch(self, ahead: int, layer: int, named: Sequence[tuple[int, int]]) -> None:
        """A guess to be checked when `layer` comes: ranks and experts."""
        self._open.setdefault(layer, []).append((ahead, named))

    def learn(self, layer: int, used: Collection[int]) -> None:
        """Learn what `layer` used in the end."""
        for ahead, named in self._open.pop(layer, ()):
            for rank, expert in named:
                right, total = self._right.get((ahead, rank), (0.5, 1.0))
                self._right[ahead, rank] = right * _MEMORY + (expert in used), total * _MEMORY + 1
