"""Precision policies: at which width a routed expert is used.

Dual routing after D2MoE (arXiv 2504.15299, section 4.1): a second decision gives every token's experts their widths. It
sees nothing but the router's choice and weights, so that the text does not depend on budget, cache or timing.
"""

# T tokens, K experts per token, E experts, B widths, Q quantiles, N experts of all layers

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moert.scheduler.elastic import ErrorBudget, absence_sensitivity, at_mean, generic_sensitivity

Floats = NDArray[np.float64]


class Chooser(Protocol):
    """Chooses with how many slices each expert is computed that tokens are routed to in a layer."""

    def one(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> list[int]:
        """Choose the slices for the experts of a single token and their router weights."""
        ...

    def many(self, layer: int, experts: NDArray[np.int64], weights: NDArray[Any]) -> NDArray[np.int64]:
        """Choose the slices for the experts of every token: [T, K] each."""
        ...


class Precision(Protocol):
    """A precision policy as `--precision` names it; `str` of it names it again."""

    @property
    def route(self) -> float:
        """Bonus of experts in memory when the router chooses, in units of the range of its logits; 0: none."""
        ...

    def slices(self, widths: Sequence[int]) -> int:
        """The most slices that it uses of any expert, of a store with `widths`."""
        ...

    def chooser(self, widths: Sequence[int], kept: Mapping[int, Sequence[int]]) -> Chooser:
        """Return the chooser of slices for a store with `widths` that has, by layer, so many slices of each expert."""
        ...

    def shares(self, widths: Sequence[int]) -> list[float]:
        """Return, for each of those `slices`, the share of uses of experts expected to need it; the first: 1."""
        ...

    def error_budget(
        self, widths: Sequence[int], kept: Mapping[int, Sequence[int]], sizes: Sequence[int]
    ) -> ErrorBudget | None:
        """Return what computes with fewer slices where some are missing, of sizes[i] bytes; None where the text must
        not depend on that.
        """
        ...


class _Reproducible:
    """Precision that does not depend on what is in memory."""

    @property
    def route(self) -> float:
        return 0.0

    def error_budget(self, widths: Sequence[int], kept: Mapping[int, Sequence[int]], sizes: Sequence[int]) -> None:
        return None


class _Same:
    """Always the same number of slices for an expert: `most`, or all that there are of it."""

    def __init__(self, most: int, kept: Mapping[int, Sequence[int]]) -> None:
        self._counts = {layer: [min(most, n) for n in counts] for layer, counts in kept.items()}
        self._arrays = {layer: np.array(counts) for layer, counts in self._counts.items()}

    def one(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> list[int]:
        counts = self._counts[layer]
        return [counts[e] for e in experts]

    def many(self, layer: int, experts: NDArray[np.int64], weights: NDArray[Any]) -> NDArray[np.int64]:
        return self._arrays[layer][experts]


@dataclass(frozen=True, slots=True)
class FixedPrecision(_Reproducible):
    """Every routed expert at the same width: the text does not depend on budget, cache or timing."""

    width: int

    def __str__(self) -> str:
        return f"fixed:{self.width}"

    def slices(self, widths: Sequence[int]) -> int:
        """Return how many slices that is, of a store with `widths`."""
        return tuple(widths).index(self.width) + 1

    def chooser(self, widths: Sequence[int], kept: Mapping[int, Sequence[int]]) -> Chooser:
        return _Same(self.slices(widths), kept)

    def shares(self, widths: Sequence[int]) -> list[float]:
        return [1.0] * self.slices(widths)


@dataclass(frozen=True, eq=False)
class BitRouter:
    """Chooses for a token that gives expert e of a layer the router weight w the width b that minimises

        w ** 2 * sensitivity[layer][e][b] + price * b,

    for errors add up squared. widths: those of the store, ascending. sensitivity: of each expert, at as many of these
    widths as it has, the harm that it does to a token with weight 1. usage: of each expert, the number of tokens of the
    calibration text that were routed to it, and quantiles of the weights that they gave it, at even distances from
    least to largest.
    """

    widths: tuple[int, ...]
    sensitivity: Mapping[int, Sequence[Sequence[float]]]
    usage: Mapping[int, Sequence[Sequence[float]]]

    @cached_property
    def _rates(self) -> Floats:
        """[N, B - 1]: an expert gets more than i + 1 slices where price * rates[i] is below the weight squared.

        Infinite for slices that it does not have or that do it no good. What is minimised lies on the lower convex
        hull of sensitivity over width, so that widths above the hull are skipped: both steps have the same rate.
        """
        rows = np.full((sum(map(len, self.sensitivity.values())), len(self.widths) - 1), np.inf)
        for row, curve in zip(rows, (curve for curves in self.sensitivity.values() for curve in curves), strict=True):
            at = 0
            while at + 1 < len(curve):
                gains = [(curve[at] - curve[i]) / (self.widths[i] - self.widths[at]) for i in range(at + 1, len(curve))]
                best = max(gains)
                if best <= 0:
                    break
                to = at + 1 + max(i for i, gain in enumerate(gains) if gain == best)
                row[at:to] = 1 / best
                at = to
        return rows

    @cached_property
    def _usage(self) -> Floats:
        """[N, 1 + Q]"""
        return np.array([row for layer in self.sensitivity for row in self.usage[layer]], dtype=np.float64)

    def thresholds(self, price: float) -> Floats:
        """[N, B - 1]: a token gives an expert one slice, and one more for each threshold that its weight reaches."""
        with np.errstate(over="ignore"):
            return np.sqrt(price * self._rates)

    def shares(self, thresholds: Floats) -> list[float]:
        """Return, of all uses of experts by the calibration text, the share with more than i slices; the first is 1."""
        counts, quantiles = self._usage[:, 0], self._usage[:, 1:]
        low, high = quantiles[:, None, :-1], quantiles[:, None, 1:]
        bounded = np.minimum(thresholds, 2.0)[..., None]  # above any router weight
        step = np.maximum(high - low, 1e-30)  # where both are the same, all at once
        below = np.clip((bounded - low) / step, 0, 1).sum(-1)
        above = 1 - below / (quantiles.shape[1] - 1)
        return [1.0, *(counts @ above / counts.sum()).tolist()]

    def mean_width(self, thresholds: Floats) -> float:
        """Bits, over all uses of experts by the calibration text."""
        steps = np.diff(self.widths, prepend=0)
        return float(np.dot(self.shares(thresholds), steps))

    def price(self, mean: float) -> float:
        """The one at which the calibration text has this mean width. ValueError, with the end of a sentence, if none
        has."""
        low, high = -100.0, 100.0  # powers of two: beyond what any price is
        least, most = (self.mean_width(self.thresholds(2**power)) for power in (high, low))
        if not least - 1e-6 <= mean <= most + 1e-6:
            raise ValueError(f"a mean width that this store cannot have; it can have {least:g} to {most:g}")
        if mean <= least:
            return float(2**high)
        for _ in range(60):
            middle = (low + high) / 2
            if self.mean_width(self.thresholds(2**middle)) > mean:
                low = middle
            else:
                high = middle
        return float(2**high)


# Of slices that a weight could ask for but none of the calibration text did: another text may, and wants a place.
_RARE = 1e-9


class RoutedPrecision(_Reproducible):
    """Widths from the router's output alone, of the given mean over the calibration text."""

    def __init__(self, mean: float, router: BitRouter) -> None:
        self.mean, self.router = mean, router
        table = router.thresholds(router.price(mean))
        self._shares = [share for share in router.shares(table) if share > 0]
        sizes = np.cumsum([len(curves) for curves in router.sensitivity.values()])[:-1]
        self._table = dict(zip(router.sensitivity, np.split(table, sizes), strict=True))
        self._rows = {layer: rows.tolist() for layer, rows in self._table.items()}

    def __str__(self) -> str:
        return f"routed:{self.mean:g}"

    def slices(self, widths: Sequence[int]) -> int:
        reachable = np.concatenate(list(self._table.values())) <= 1  # a router weight is at most 1
        return 1 + int(reachable.any(0).sum())

    def chooser(self, widths: Sequence[int], kept: Mapping[int, Sequence[int]]) -> Chooser:
        return self  # the router knows what is kept

    def shares(self, widths: Sequence[int]) -> list[float]:
        return (self._shares + [_RARE] * len(widths))[: self.slices(widths)]

    def one(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> list[int]:
        rows = self._rows[layer]
        return [bisect_right(rows[e], w) + 1 for e, w in zip(experts, weights, strict=True)]

    def many(self, layer: int, experts: NDArray[np.int64], weights: NDArray[Any]) -> NDArray[np.int64]:
        reached: NDArray[np.bool_] = self._table[layer][experts] <= weights[..., None]
        return reached.sum(-1) + 1


class ElasticPrecision:
    """Widths from what is in memory, too: not reproducible, but in sum never worse than `bound` bits for every use.

    router: what the store knows about its experts, if it does; else each width is taken to do the harm that it does to
    Gaussian weights. skip: missing experts whose router weight is below this are left out where the bound allows it
    (0: none). route: bonus of experts in memory when the router chooses, in units of the range of its logits (0: none);
    the bound knows nothing of what that does.
    """

    def __init__(self, bound: float, router: BitRouter | None = None, skip: float = 0.0, route: float = 0.0) -> None:
        self.bound, self.router, self.skip, self.route = bound, router, skip, route

    def __str__(self) -> str:
        options = {"skip": self.skip, "route": self.route}
        return f"elastic:{self.bound:g}" + "".join(f",{name}={x:g}" for name, x in options.items() if x)

    def slices(self, widths: Sequence[int]) -> int:
        return len(widths)

    def chooser(self, widths: Sequence[int], kept: Mapping[int, Sequence[int]]) -> Chooser:
        return _Same(len(widths), kept)  # the ladder says how many of these it is worth waiting for

    def shares(self, widths: Sequence[int]) -> list[float]:
        """The lower the bound, the fewer experts keep their refinements."""
        span = widths[-1] - widths[0]
        most = (self.bound - widths[0]) / span if span else 1.0
        # Of several falls tried on the trace of a model of 30 G parameters the one that reads least: a fifth less than
        # shares that fall evenly.
        return [1.0, *(max(0.1, most ** (0.5 * 6 ** (i - 1))) for i in range(1, len(widths)))]

    def error_budget(
        self, widths: Sequence[int], kept: Mapping[int, Sequence[int]], sizes: Sequence[int]
    ) -> ErrorBudget:
        generic = generic_sensitivity(widths)
        sensitivity = (
            self.router.sensitivity if self.router else {layer: [generic[:n] for n in kept[layer]] for layer in kept}
        )
        allowed = {layer: [at_mean(curve, widths, self.bound) for curve in sensitivity[layer]] for layer in sensitivity}
        absent = {layer: [absence_sensitivity(curve, widths) for curve in sensitivity[layer]] for layer in sensitivity}
        return ErrorBudget(sensitivity, allowed, absent, sizes, self.skip)


_USUAL_BITS = 4  # what people compare, at half the bytes of 8
_NUMBER = r"\d+(?:\.\d*)?|\.\d+"


def _elastic_options(text: str, options: str) -> dict[str, float]:
    """Parse the options behind the bound, each with a comma before it."""
    found: dict[str, float] = {}
    for option in options.split(",")[1:]:
        match = re.fullmatch(rf"(skip|route)=({_NUMBER})", option)
        if match is None or match[1] in found or float(match[2]) > 1:
            raise ValueError(
                f"precision {text} has the option {option!r}, which is not one of its two: skip=W leaves missing "
                "experts of router weights below W out, route=S favours experts in memory, each from 0 to 1 and once"
            )
        found[match[1]] = float(match[2])
    return found


def usual_width(widths: Sequence[int]) -> int:
    """The width at which a store is used if none is asked for: the least from 4 bits on, else the widest."""
    return next((b for b in widths if b >= _USUAL_BITS), widths[-1])


def parse_precision(text: str | None, widths: Sequence[int], router: BitRouter | None = None) -> Precision:
    """Read `fixed:B`, `routed[:MEAN]` or `elastic[:BOUND][,skip=W][,route=S]` (each alone: the mean of the widths).

    None is `usual_width`. router: what the store knows about its experts, if it does. Raises ValueError with
    one sentence for anything else.
    """
    if text is None:
        return FixedPrecision(usual_width(widths))
    stored = ", ".join(str(b) for b in widths)
    match = re.fullmatch(rf"fixed:(\d+)|(routed|elastic)(?::({_NUMBER}))?((?:,[^,]*)*)", text)
    if match is None or (match[4] and match[2] != "elastic"):
        raise ValueError(
            f"precision {text!r} is not known; use fixed:B with B one of {stored}, routed, routed:B with any mean B, "
            "elastic, or elastic:B with B the bits that it must be as good as"
        )
    if match[2] == "elastic":
        bound = float(match[3]) if match[3] else sum(widths) / len(widths)
        if not widths[0] <= bound <= widths[-1]:
            raise ValueError(f"precision {text} asks for a bound outside the widths of the store; it holds {stored}")
        return ElasticPrecision(bound, router, **_elastic_options(text, match[4]))
    if match[2]:
        if router is None:
            raise ValueError(
                f"precision {text} needs to know how sensitive each expert is, which this store does not say; convert"
                f" the checkpoint again, without --fast, or use fixed:B with B one of {stored}"
            )
        mean = float(match[3]) if match[3] else sum(widths) / len(widths)
        try:
            return RoutedPrecision(mean, router)
        except ValueError as error:
            raise ValueError(f"precision {text} asks for {error}") from None
    width = int(match[1])
    if width not in widths:
        raise ValueError(f"precision {text} asks for a width that the store does not hold; it holds {stored}")
    return FixedPrecision(width)
