"""Hottest expert bit first: in which order the slices that are missing are read.

D2MoE (arXiv 2504.15299, section 4.3): each expert has a queue of missing slices in ascending order, and what is read
next is the head of a queue that most tokens wait for. Slices differ in size, so here it is tokens per byte; with a
single token every count is 1, and the router weight says what a byte is worth. A slice that is wanted more per byte
than those before it pulls them along: it is of no use without them. Reading blocks by falling value per byte is then
the order with the least weighted waiting time (Sidney 1975, for jobs in chains).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moert.scheduler.types import Load, RoutedExpert

Order = Callable[[int, Sequence[tuple[RoutedExpert, int]], Sequence[int]], list[Load]]


def hottest_first(routed: Sequence[RoutedExpert]) -> list[RoutedExpert]:
    """Experts by most waiting tokens, then by router weight: the order in which they get room."""
    return sorted(routed, key=lambda r: (-r.tokens, -r.weight, r.expert))


def hottest_bit_first(layer: int, missing: Sequence[tuple[RoutedExpert, int]], sizes: Sequence[int]) -> list[Load]:
    """Loads for `missing`: experts, each with the first of its slices that is not there. sizes: bytes by slice."""
    if len(missing) == 1 and not missing[0][0].waiting:
        r, first = missing[0]
        return [Load(layer, r.expert, first, r.slices)]
    single = all(r.tokens == 1 for r, _ in missing)
    blocks: list[tuple[float, Load]] = []
    for r, first in missing:
        waiting = r.waiting or (r.tokens,) * r.slices
        chain: list[tuple[float, int, int]] = []  # what blocks of slices are worth, their bytes, and where they begin
        for index in range(first, r.slices):
            value, nbytes, begin = waiting[index] * (r.weight if single else 1.0), sizes[index], index
            while chain and value * chain[-1][1] >= chain[-1][0] * nbytes:
                before, more, begin = chain.pop()
                value, nbytes = value + before, nbytes + more
            chain.append((value, nbytes, begin))
        ends = [begin for _, _, begin in chain[1:]] + [r.slices]
        blocks += [
            (-value / nbytes, Load(layer, r.expert, begin, end))
            for (value, nbytes, begin), end in zip(chain, ends, strict=True)
        ]
    return [load for _, load in sorted(blocks)]


def as_routed(layer: int, missing: Sequence[tuple[RoutedExpert, int]], sizes: Sequence[int]) -> list[Load]:
    """The baseline: whole experts, in the order of their numbers."""
    return [Load(layer, r.expert, first, r.slices) for r, first in sorted(missing, key=lambda item: item[0].expert)]


ORDERS: dict[str, Order] = {"hottest": hottest_bit_first, "number": as_routed}
