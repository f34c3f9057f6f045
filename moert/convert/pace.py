"""How far a conversion is and how long the rest takes, from what each kind of work took so far.

Kinds differ too much to be added up: of a real model, a byte of calibrated experts takes fifty times as long as one of
the dense weights, and text passes through a layer without that any bytes are written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

RECENT = 0.1  # of the units of a kind: those so long ago count half, since other programs come and go
GUESSED = 0.02  # of the units of a kind: what a guess counts beside those that were measured


class Pace:
    """Measures the seconds that a unit of each kind of work takes, and counts what is left of it.

    total: units of each kind, with those that an earlier run did; left: those that this run has to do. Whoever finds
    that more or less is left corrects `left`. A kind of which nothing was done or guessed is not known, and so neither
    is the rest.
    """

    def __init__(
        self,
        total: Mapping[str, float],
        left: Mapping[str, float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.left = dict(left)
        self._total, self._clock, self._last = dict(total), clock, clock()
        self._seconds = dict.fromkeys(total, 0.0)
        self._units = dict.fromkeys(total, 0.0)
        self._open = dict.fromkeys(total, 0.0)  # seconds for a unit that is not done yet
        self._most = 0.0

    def guess(self, kind: str, rate: float) -> None:
        """A unit of a kind that is not begun yet may take so many seconds."""
        self._units[kind] = GUESSED * self._total[kind]
        self._seconds[kind] = rate * self._units[kind]

    def skip(self) -> None:
        """The time since the last call counts for nothing."""
        self._last = self._clock()

    def spend(self, kind: str, units: float = 0.0) -> None:
        """The time since the last call was for so many `units` of a kind: for none, if one is begun and not done."""
        now = self._clock()
        self._open[kind] += now - self._last
        self._last = now
        if units:
            old = 0.5 ** (units / (RECENT * self._total[kind]))
            self._seconds[kind] = old * self._seconds[kind] + self._open[kind]
            self._units[kind] = old * self._units[kind] + units
            self._open[kind] = 0.0
            self.left[kind] = max(0.0, self.left[kind] - units)

    def _rate(self, kind: str) -> float | None:
        return self._seconds[kind] / self._units[kind] if self._units[kind] else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at the rates so far; None where these are not known yet."""
        seconds = 0.0
        for kind, left in self.left.items():
            if left:
                rate = self._rate(kind)
                if rate is None:
                    return None
                seconds += max(0.0, left * rate - self._open[kind])
        return seconds

    @property
    def share(self) -> float:
        """Share of the whole work, earlier runs included, that is done: in time, and never less than before."""
        left = self.seconds_left
        if left is not None:
            whole = sum(total * (self._rate(kind) or 0.0) for kind, total in self._total.items())
            self._most = max(self._most, 1.0 - left / whole if whole else 1.0)
        return min(1.0, self._most)
