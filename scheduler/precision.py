"""Precision policies: at which width a routed expert is used."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FixedPrecision:
    """Every routed expert at the same width: the text does not depend on budget, cache or timing."""

    width: int

    def __str__(self) -> str:
        return f"fixed:{self.width}"

    def slices(self, widths: Sequence[int]) -> int:
        """How many slices that is, of a store with `widths`."""
        return tuple(widths).index(self.width) + 1


def parse_precision(text: str | None, widths: Sequence[int]) -> FixedPrecision:
    """Read `fixed:B`; None is the largest width stored. Raises ValueError with one sentence for anything else."""
    if text is None:
        return FixedPrecision(widths[-1])
    stored = ", ".join(str(b) for b in widths)
    match = re.fullmatch(r"fixed:(\d+)", text)
    if match is None:
        raise ValueError(f"precision {text!r} is not known; use fixed:B with B one of {stored}")
    width = int(match[1])
    if width not in widths:
        raise ValueError(f"precision {text} asks for a width that the store does not hold; it holds {stored}")
    return FixedPrecision(width)
