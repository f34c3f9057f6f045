"""The result of a measurement."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

Progress = Callable[[str], None]


class Measured(NamedTuple):
    """The median of some repetitions; spread: their (highest - lowest) / median, 0 where that is 0."""

    value: float
    spread: float


def measured(samples: Sequence[float]) -> Measured:
    """Sum up `samples`, at least one, as one measurement."""
    value = statistics.median(samples)
    return Measured(value, (max(samples) - min(samples)) / value if value else 0.0)
