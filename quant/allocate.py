"""Choose which width each expert keeps, so that the errors together are least under a limit on their bytes.

A multiple-choice knapsack problem. The Lagrangian relaxation charges a price per byte; at the price at which the limit
is met its optimum is the linear program's, and a bound that no allocation can beat: the greedy walk down the convex
hulls of the items' choices finds it (Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research
27(3), 1979; Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, sections 11.2 and 11.5). What is left over is
filled by dynamic programming over the choices that could still be part of something better: a choice whose reduced cost
exceeds the gap between the best allocation known and the bound cannot. Few are left, so that this is almost always
exact; where it would take too many states, the gap that remains is reported.
"""

# n items, B widths

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

MOST_STATES = 4096  # kept of the dynamic programme: beyond, those of the least cost

_Path: TypeAlias = "tuple[_Path, int] | None"  # the choices that led to a state, the last one outermost


@dataclass(frozen=True, slots=True)
class Allocation:
    """choices[n]: index of the width that an item keeps. error: sum of theirs. nbytes: sum of their sizes, at most the
    limit. bound: no allocation under the limit has less error; equal to `error` where that is proven to be the least.
    """

    choices: tuple[int, ...]
    error: float
    nbytes: int
    bound: float

    @property
    def gap(self) -> float:
        """Return how far above the least error this may be at most, as a share of that."""
        if self.error <= self.bound:
            return 0.0
        return (self.error - self.bound) / self.bound if self.bound > 0 else math.inf


def allocate(errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], limit: int) -> Allocation:
    """Choose a width for every item.

    errors: [n][B] from 0 on, in any order. sizes: [n][B] in bytes, ascending. Deterministic. Raises ValueError where
    the smallest sizes exceed the limit, with the least that would do, and for lists that do not fit together.
    """
    if [len(row) for row in errors] != [len(row) for row in sizes]:
        raise ValueError("errors and sizes are not of the same shape")
    least = sum(row[0] for row in sizes)
    if least > limit:
        raise ValueError(f"the smallest sizes add up to {least} bytes, more than the limit of {limit}")
    found, price = _greedy(errors, sizes, limit)
    costs = [[e + price * s for e, s in zip(*rows, strict=True)] for rows in zip(errors, sizes, strict=True)]
    floors = [min(row) for row in costs]
    best = _describe(found, errors, sizes, min(sum(floors) - price * limit, _total(found, errors)))
    if price == 0 or best.gap == 0:
        return best
    # Rounding must not lose what is as good as the best known.
    slack = (best.error - best.bound) * (1 + 1e-9) + 1e-12 * best.error
    open_choices = [
        [(b, cost - floor) for b, cost in enumerate(row) if cost - floor <= slack]
        for row, floor in zip(costs, floors, strict=True)
    ]
    better, complete = _search(open_choices, errors, sizes, limit, slack)
    chosen = min(found, better or found, key=lambda choices: _total(choices, errors))
    return _describe(chosen, errors, sizes, _total(chosen, errors) if complete else best.bound)


def _total(choices: Sequence[int], errors: Sequence[Sequence[float]]) -> float:
    return sum(row[b] for row, b in zip(errors, choices, strict=True))


def _describe(
    choices: Sequence[int], errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], bound: float
) -> Allocation:
    nbytes = sum(row[b] for row, b in zip(sizes, choices, strict=True))
    return Allocation(tuple(choices), _total(choices, errors), nbytes, bound)


def _hull(errors: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """The choices on the lower convex hull, each larger and better than the one before."""
    hull: list[int] = []
    for b, (error, size) in enumerate(zip(errors, sizes, strict=True)):
        if hull and (error >= errors[hull[-1]] or size <= sizes[hull[-1]]):
            continue
        while len(hull) > 1:
            first, last = hull[-2], hull[-1]
            gained = (errors[first] - errors[last]) * (size - sizes[first])
            if gained > (errors[first] - error) * (sizes[last] - sizes[first]):
                break
            hull.pop()
        hull.append(b)
    return hull


def _greedy(errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], limit: int) -> tuple[list[int], float]:
    """Steps along the hulls, those that gain most per byte first, as long as they fit; and the price of a byte: what
    the first step that did not fit gains, 0 where all fit."""
    steps: list[tuple[float, int, int]] = []
    for n, (error, size) in enumerate(zip(errors, sizes, strict=True)):
        hull = _hull(error, size)
        steps += [((error[b] - error[a]) / (size[b] - size[a]), n, b) for a, b in pairwise(hull)]
    choices = [0] * len(errors)
    left, price, blocked = limit - sum(row[0] for row in sizes), 0.0, set()
    for slope, n, b in sorted(steps):
        need = sizes[n][b] - sizes[n][choices[n]]
        if n not in blocked and need <= left:
            choices[n], left = b, left - need
        else:  # later steps fill what is left
            blocked.add(n)
            price = price or -slope
    return choices, price


def _search(
    open_choices: Sequence[Sequence[tuple[int, float]]],
    errors: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[int]],
    limit: int,
    slack: float,
) -> tuple[list[int] | None, bool]:
    """The best allocation under the limit whose reduced costs add up to at most `slack`, if there is one; and whether
    it is surely that (Nemhauser and Ullmann, Management Science 15(9), 1969: a state goes that another beats in both
    size and error)."""
    fixed = [row[0][0] for row in open_choices]
    core = [n for n, row in enumerate(open_choices) if len(row) > 1]
    rest = sum(sizes[n][fixed[n]] for n in set(range(len(fixed))) - set(core))
    smallest = [min(sizes[n][b] for b, _ in open_choices[n]) for n in core]
    needed = sum(smallest)
    states: list[tuple[int, float, float, _Path]] = [(rest, 0.0, 0.0, None)]  # size, error, reduced cost, choices
    complete = True
    for n, least in zip(core, smallest, strict=True):
        needed -= least
        grown = [
            (size + sizes[n][b], error + errors[n][b], cost + extra, (path, b))
            for size, error, cost, path in states
            for b, extra in open_choices[n]
            if cost + extra <= slack and size + sizes[n][b] + needed <= limit
        ]
        grown.sort(key=lambda s: s[:2])
        states = []
        for state in grown:
            if not states or state[1] < states[-1][1]:
                states.append(state)
        if len(states) > MOST_STATES:
            complete = False
            states = sorted(sorted(states, key=lambda s: s[2])[:MOST_STATES], key=lambda s: s[0])
    if not states:
        return None, complete
    choices, path = fixed, states[-1][3]  # the largest has the least error
    for n in reversed(core):
        assert path is not None
        path, choices[n] = path
    return choices, complete
