"""Measure whether prefetching pays, instead of assuming it: a few tokens with it and a few without, again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import median

PROBE = 12  # tokens of each choice in a trial
HOLD = 384  # tokens until the next one
WARM = 64  # tokens before the first one: a cache that fills up says nothing of what comes after
MARGIN = 0.02  # what a choice must gain
_DROP = 2  # tokens after a change that still feel the one before


def pays(seconds: float, without: float, margin: float = MARGIN) -> bool:
    """Tell whether something that takes so long per token is faster by more than `margin` than doing without it."""
    return seconds < without * (1 - margin)


@dataclass
class Trial:
    """Chooses among `choices` (say, how many layers to look ahead) the one with the least time per token.

    Told the seconds of each step, it tries all choices in turn; those that were faster than the first choice are tried
    again, backwards, so that a machine that slows down or speeds up meanwhile does not decide, and the first choice
    beside them. Then it holds on to the fastest for a while. The first choice is kept unless another is faster by
    `margin`, and faster both times: a difference below the noise is not worth a change, and a trial that has shown
    that a choice does not pay goes on costing what it costs.
    """

    choices: Sequence[int]
    margin: float = MARGIN
    choice: int = field(init=False)
    seconds: dict[int, float] = field(default_factory=dict)  # medians of the last trial
    _rounds: list[dict[int, list[float]]] = field(default_factory=list)
    _left: int = 0
    _turns: list[int] = field(default_factory=list)  # still to come in this round, from the end

    def __post_init__(self) -> None:
        self.choice, self._left = self.choices[0], WARM

    def step(self, seconds: float) -> int:
        """A token took so long; returns the choice for the next one."""
        if len(self.choices) == 1:
            return self.choice
        self._left -= 1
        if self._rounds and self._left < PROBE - _DROP:
            self._rounds[-1].setdefault(self.choice, []).append(seconds)
        if self._left == 0:
            self._next()
        return self.choice

    def _next(self) -> None:
        if not self._turns:
            rivals = self._rivals()
            if len(self._rounds) == 2 or (self._rounds and not rivals):
                self._decide(rivals)
                return
            self._turns = [self.choices[0], *rivals] if self._rounds else list(reversed(self.choices))
            self._rounds.append({})
        self.choice, self._left = self._turns.pop(), PROBE

    def _rivals(self) -> list[int]:
        """Return the choices that were faster than the first choice in every round."""
        medians = [{c: median(times) for c, times in r.items()} for r in self._rounds]
        first = self.choices[0]
        return [c for c in self.choices[1:] if all(m.get(c, inf) < m[first] for m in medians)]

    def _decide(self, rivals: Sequence[int]) -> None:
        times = {c: [s for r in self._rounds for s in r.get(c, ())] for c in self.choices}
        self.seconds = {c: median(samples) for c, samples in times.items()}
        first = self.choices[0]
        best = min([first, *rivals], key=self.seconds.__getitem__)
        faster = pays(self.seconds[best], self.seconds[first], self.margin)
        self.choice, self._left, self._rounds = best if faster else first, HOLD, []
