"""Whether prefetching pays is measured, not assumed: a few tokens with it and a few without, again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

PROBE = 12  # tokens of each choice in a trial
HOLD = 384  # tokens until the next one
WARM = 64  # tokens before the first one: a cache that fills up says nothing of what comes after
_DROP = 2  # tokens after a change that still feel the one before


@dataclass
class Trial:
    """Chooses among `choices` (say, how many layers to look ahead) the one with the least time per token.

    Told the seconds of each step, it tries all choices in turn, twice, the second time backwards, so that a machine
    that slows down or speeds up meanwhile does not decide; then it holds on to the fastest for a while. The first
    choice is kept unless another is faster by `margin`: a difference below the noise is not worth a change.
    """

    choices: Sequence[int]
    margin: float = 0.05
    choice: int = field(init=False)
    seconds: dict[int, float] = field(default_factory=dict)  # medians of the last trial
    _samples: dict[int, list[float]] = field(default_factory=dict)
    _left: int = 0
    _turns: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.choice, self._left = self.choices[0], WARM

    def _begin(self) -> None:
        self._samples = {choice: [] for choice in self.choices}
        self._turns = [*self.choices, *reversed(self.choices)]  # taken from the end
        self._next()

    def _next(self) -> None:
        self.choice, self._left = self._turns.pop(), PROBE

    def step(self, seconds: float) -> int:
        """A token took so long; returns the choice for the next one."""
        if len(self.choices) == 1:
            return self.choice
        self._left -= 1
        if self._samples and self._left < PROBE - _DROP:
            self._samples[self.choice].append(seconds)
        if self._left == 0:
            if self._turns:
                self._next()
            elif self._samples:
                self.seconds = {choice: median(times) for choice, times in self._samples.items()}
                first, best = self.choices[0], min(self.choices, key=self.seconds.__getitem__)
                faster = self.seconds[best] < self.seconds[first] * (1 - self.margin)
                self.choice, self._left, self._samples = best if faster else first, HOLD, {}
            else:
                self._begin()
        return self.choice
