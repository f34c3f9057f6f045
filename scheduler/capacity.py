"""Divide an expert budget among the slices of the experts: pure arithmetic."""

# L layers, E experts, S slices

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import zip_longest

SCALE_BITS = 16 / 64  # one fp16 scale for each group of 64 weights, in every slice of the linear code
MAX_TRELLIS_WIDTH = 6  # as in quant/format.py: stores up to there have one scale for a row, which is next to nothing


def slots_for(
    arena_bytes: int, sizes: Sequence[float], experts: Sequence[int], shares: Sequence[float]
) -> tuple[int, ...]:
    """Slots per slice index for as many experts as fit, whichever they are: those used most have most slices.

    sizes[i]: bytes of slices of index i. experts[i]: how many experts use one, not ascending. shares[i]: of the uses of
    an expert, the share that needs slices of index i.
    """

    def slots(n: int) -> tuple[int, ...]:
        return tuple(min(math.ceil(n * share), count) for share, count in zip_longest(shares, experts, fillvalue=0))

    def nbytes(n: int) -> float:
        return sum(count * size for count, size in zip(slots(n), sizes, strict=True))

    most = math.ceil(experts[0] / min(share for share in shares if share))
    return slots(bisect_right(range(1, most + 1), float(arena_bytes), key=nbytes))


def slice_sizes(expert_bytes: int, widths: Sequence[int]) -> tuple[int, ...]:
    """Bytes of the slices of an expert that takes `expert_bytes` at the widest of `widths`.

    As a conversion divides them that was asked for nothing else: those of widths 2, 3, 4 are to each other as 2, 1, 1.
    """
    scale = 0 if widths[-1] <= MAX_TRELLIS_WIDTH else SCALE_BITS
    bits = [scale + b - before for before, b in zip([0, *widths], widths, strict=False)]
    ends = [round(expert_bytes * sum(bits[: i + 1]) / sum(bits)) for i in range(len(bits))]
    return tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False))


def capacities(
    budget: int, sizes: Sequence[Sequence[int]], num_experts: int, shares: Sequence[float]
) -> tuple[int, ...]:
    """Bytes per slice index, of which `budget` is the sum at most: as `slots_for`, for layers of different sizes.

    sizes: [L, S], of the layers that have experts. Raises ValueError with the end of a sentence where some slice would
    have no room.
    """
    L = len(sizes)
    mean = [sum(column) / L for column in zip(*sizes, strict=True)]
    experts = [num_experts * L if i < len(shares) else 0 for i in range(len(mean))]
    most = [max(column) for column in zip(*sizes, strict=True)]

    def room(nbytes: int) -> tuple[int, ...]:
        return tuple(int(n * size) for n, size in zip(slots_for(nbytes, mean, experts, shares), mean, strict=True))

    def holds(nbytes: int) -> bool:
        return all(have >= size for have, size, _ in zip(room(nbytes), most, shares, strict=False))

    if not holds(budget):
        least = bisect_right(range(1, 2 * len(shares) * sum(most) + 1), False, key=holds) + 1
        raise ValueError(f"holds not one expert; {least} bytes would")
    return room(budget)
