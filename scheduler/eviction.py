"""Eviction policies: what goes first when the slice cache needs room: policies by name.

Belady's optimum (IBM Systems Journal 5(2), 1966), which knows the future, is the bound that simulations show beside
them.
"""

# L layers, E experts, S slices

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from math import inf
from typing import Protocol

import numpy as np

from moert.scheduler.types import ExpertKey, RoutedExpert


class CachePolicy(Protocol):
    """Decides the order of eviction. Told of every use, so that it can keep scores."""

    name: str

    def used(self, layer: int, routed: Sequence[RoutedExpert], tokens: int) -> None:
        """Note all experts that the `tokens` tokens of one step are routed to in `layer`, resident or not."""

    def on_prediction(self, layer: int, probabilities: Mapping[int, float]) -> None:
        """Note what somebody expects the coming step to use in `layer`, in place of what was expected before."""

    def loaded(self, key: ExpertKey, index: int) -> None:
        """Slice `index` of an expert got room. It does no harm to say so twice."""

    def removed(self, key: ExpertKey, index: int) -> None:
        """Slice `index` of an expert lost its room. It does no harm to say so twice."""

    def eviction_order(self, index: int) -> Iterable[ExpertKey]:
        """Experts of which slice `index` is resident, the one to evict first at the front."""

    def victim(self, index: int, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """The first of these that is evictable, None where there is none. Asking changes nothing."""

    def reuse_score(self, key: ExpertKey, index: int) -> float:
        """Return how often a token is expected to use a slice of an expert: the least for a prefetch that evicts it."""

    def restore(self, key: ExpertKey, reuse_score: Sequence[float]) -> None:
        """Take over what `reuse_score` said of an expert's slices when another run ended, before anything is used."""


class _Baseline(CachePolicy):
    """Defaults for what baselines do not care about: they know nothing of the future, and let no prefetch evict
    anything.
    """

    def victim(self, index: int, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        return next(filter(evictable, self.eviction_order(index)), None)

    def on_prediction(self, layer: int, probabilities: Mapping[int, float]) -> None: ...

    def reuse_score(self, key: ExpertKey, index: int) -> float:
        return 1.0

    def restore(self, key: ExpertKey, reuse_score: Sequence[float]) -> None: ...


class LeastRecentlyUsed(_Baseline):
    """Evicts the expert whose last use is longest ago: the baseline of every published expert cache."""

    name = "lru"

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def used(self, layer: int, routed: Sequence[RoutedExpert], tokens: int) -> None:
        for r in routed:
            key = (layer, r.expert)  # equal to an ExpertKey, and made ten times faster
            if key in self._order:
                self._order.move_to_end(key)  # type: ignore[arg-type]

    def loaded(self, key: ExpertKey, index: int) -> None:
        if index == 0:
            self._order[key] = None

    def removed(self, key: ExpertKey, index: int) -> None:
        if index == 0:
            self._order.pop(key, None)

    def eviction_order(self, index: int) -> Iterator[ExpertKey]:
        return iter(self._order)


class LeastFrequentlyUsed(_Baseline):
    """Evicts the expert that the fewest tokens used so far."""

    name = "lfu"

    def __init__(self) -> None:
        self._uses: Counter[ExpertKey] = Counter()
        self._held: dict[ExpertKey, None] = {}

    def used(self, layer: int, routed: Sequence[RoutedExpert], tokens: int) -> None:
        for r in routed:
            self._uses[ExpertKey(layer, r.expert)] += r.tokens

    def loaded(self, key: ExpertKey, index: int) -> None:
        if index == 0:
            self._held[key] = None

    def removed(self, key: ExpertKey, index: int) -> None:
        if index == 0:
            self._held.pop(key, None)

    def eviction_order(self, index: int) -> Iterator[ExpertKey]:
        return iter(sorted(self._held, key=self._uses.__getitem__))


class Belady(_Baseline):
    """Evicts the slice that is used again last.

    visits[i]: layer of the i-th call of `used` that is to come, and of each of its experts the number of slices.
    Where all slices of an index have one size and nothing is prefetched, no order reads less of that index.
    """

    name = "belady"

    def __init__(self, visits: Sequence[tuple[int, Mapping[int, int]]]) -> None:
        L = 1 + max((layer for layer, _ in visits), default=0)
        E = 1 + max((e for _, slices in visits for e in slices), default=0)
        S = max((n for _, slices in visits for n in slices.values()), default=1)
        self._next = np.full((S, L, E), np.inf)  # visit at which a slice is used next
        self._held = np.zeros((S, L, E), bool)
        self._after: list[list[tuple[int, int, float]]] = []  # by visit: expert, slice, visit of its next use
        for at in range(len(visits) - 1, -1, -1):
            layer, slices = visits[at]
            used = [(e, index) for e, n in slices.items() for index in range(n)]
            self._after.append([(e, index, float(self._next[index, layer, e])) for e, index in used])
            for e, index in used:
                self._next[index, layer, e] = at

    def used(self, layer: int, routed: Sequence[RoutedExpert], tokens: int) -> None:
        for e, index, following in self._after.pop():
            self._next[index, layer, e] = following

    def loaded(self, key: ExpertKey, index: int) -> None:
        self._held[index, key[0], key[1]] = True

    def removed(self, key: ExpertKey, index: int) -> None:
        self._held[index, key[0], key[1]] = False

    def eviction_order(self, index: int) -> Iterator[ExpertKey]:
        layers, experts = np.nonzero(self._held[index])
        last = np.argsort(-self._next[index, layers, experts], kind="stable")
        yield from map(ExpertKey, layers[last].tolist(), experts[last].tolist())


class RecentScore:
    """Evicts what is least likely to be used soon, after HybriMoE's minus-recent-score (arXiv 2504.05897, 4.4).

    Each slice of each expert has a running mean of its use, S = (1 - rate) * S + rate * (share of the tokens that used
    it); a prompt of T tokens counts as T steps, so that what it routed to warms the scores. (The paper averages router
    weights. On traces of two real models whether one takes weights or uses changes the bytes read by less than 1%, and
    a use is what has to be read.) What a predictor names has at least its probability. A layer whose turn comes
    later in the cycle of layers counts for up to `patience` less: where everything looks alike, what goes is what has
    just been passed, not what comes next.

    Within a layer only what is used changes its place, so there is a heap for each layer and slice, and a victim is the
    least of their tops. No numpy: between kernels that stream weights through the caches of the processor, its many
    small calls took twice as long as this.
    """

    name = "score"

    def __init__(
        self, layers: Sequence[int], num_experts: int, num_slices: int, rate: float = 0.1, patience: float = 0.9
    ) -> None:
        L, E, S = len(layers), num_experts, num_slices
        self._layers, self._row = list(layers), {layer: row for row, layer in enumerate(layers)}
        self._num_experts, self._rate = E, rate
        # Means times `scale` of their layer, which grows with every use: so a use changes only what is used.
        self._use = [[[0.0] * E for _ in layers] for _ in range(S)]
        self._scale = [1.0] * L
        self._held = [[[False] * E for _ in layers] for _ in range(S)]
        # [S][L]: of all that is held (use, expert), where the use may have grown since; of others too.
        self._heaps: list[list[list[tuple[float, int]]]] = [[[] for _ in layers] for _ in range(S)]
        self._foreseen: list[dict[int, float]] = [{} for _ in layers]
        # [now][of what]: by how many layers there are until its turn
        self._discount = [[patience ** ((row - now - 1) % L / L) for row in range(L)] for now in range(L)]
        self._now = 0

    def used(self, layer: int, routed: Sequence[RoutedExpert], tokens: int) -> None:
        row = self._now = self._row[layer]
        kept = (1 - self._rate) ** tokens
        scale = self._scale[row] / kept
        if scale > 1e100:
            for index, rows in enumerate(self._use):
                rows[row] = [value / scale for value in rows[row]]
                self._rebuild(index, row)
            scale = 1.0
        self._scale[row] = scale
        share = (1 - kept) / tokens * scale
        uses = [use[row] for use in self._use]
        for r in routed:
            if r.waiting:
                for use, count in zip(uses, r.waiting, strict=False):
                    use[r.expert] += share * count
            else:
                for use in uses[: r.slices]:
                    use[r.expert] += share * r.tokens
        self._foreseen[row] = {}

    def on_prediction(self, layer: int, probabilities: Mapping[int, float]) -> None:
        self._foreseen[self._row[layer]] = dict(probabilities)

    def loaded(self, key: ExpertKey, index: int) -> None:
        row, expert = self._row[key[0]], key[1]
        self._held[index][row][expert] = True
        heap = self._heaps[index][row]
        heappush(heap, (self._use[index][row][expert], expert))
        if len(heap) > 2 * self._num_experts:  # entries of what is not held any more
            self._rebuild(index, row)

    def removed(self, key: ExpertKey, index: int) -> None:
        self._held[index][self._row[key[0]]][key[1]] = False

    def eviction_order(self, index: int) -> list[ExpertKey]:
        discount = self._discount[self._now]
        scores = [
            (self._score(index, row, e) * discount[row], row, e)
            for row, held in enumerate(self._held[index])
            for e in range(self._num_experts)
            if held[e]
        ]
        return [ExpertKey(self._layers[row], e) for _, row, e in sorted(scores)]

    def victim(self, index: int, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        heaps, foreseen, layers = self._heaps[index], self._foreseen, self._layers
        discount = self._discount[self._now]
        factors = [d / scale for d, scale in zip(discount, self._scale, strict=True)]
        least = [self._least(index, row) * factor for row, factor in enumerate(factors)]
        # Nothing is taken off the heaps, so that an interrupt here loses nothing: rows of which the first is passed
        # over are walked through in order.
        walks: dict[int, Iterator[tuple[float, int]]] = {}
        passed_to: dict[int, int] = {}  # the expert that a row has come to
        raised: list[tuple[float, int, int]] = []  # score, row and expert of those that somebody foresees
        while True:
            score = min(least)
            row = least.index(score)
            expert = -1 if score == inf else passed_to[row] if row in passed_to else heaps[row][0][1]
            if raised and raised[0] < (score, row, expert):
                _, row, expert = heappop(raised)
                found = ExpertKey(layers[row], expert)
                if evictable(found):
                    return found
                continue
            if score == inf:
                return None
            expected = foreseen[row].get(expert, 0.0) * discount[row]
            if expected > score:
                heappush(raised, (expected, row, expert))
            elif evictable(found := ExpertKey(layers[row], expert)):
                return found
            if row not in walks:
                walks[row] = self._ascending(index, row)
                next(walks[row])
            use, passed_to[row] = next(walks[row], (inf, -1))
            least[row] = use * factors[row]

    def _ascending(self, index: int, row: int) -> Iterator[tuple[float, int]]:
        """Uses and experts of what is held in a row, the least first, without changing its heap."""
        heap, use, held = self._heaps[index][row], self._use[index][row], self._held[index][row]
        frontier = [(*entry, 0) for entry in heap[:1]]
        while frontier:
            value, expert, at = heappop(frontier)
            if at >= 0:
                for child in range(2 * at + 1, min(2 * at + 3, len(heap))):
                    heappush(frontier, (*heap[child], child))
            if held[expert]:
                if use[expert] == value:
                    yield value, expert
                else:  # it has grown
                    heappush(frontier, (use[expert], expert, -1))

    def _least(self, index: int, row: int) -> float:
        """The least use of what is held in a row, then at the top of its heap; infinite where nothing is held."""
        heap, use, held = self._heaps[index][row], self._use[index][row], self._held[index][row]
        while heap:
            value, expert = heap[0]
            if not held[expert]:
                heappop(heap)
            elif use[expert] != value:
                heapreplace(heap, (use[expert], expert))
            else:
                return value
        return inf

    def _rebuild(self, index: int, row: int) -> None:
        use, held = self._use[index][row], self._held[index][row]
        heap = [(use[e], e) for e in range(self._num_experts) if held[e]]
        heapify(heap)
        self._heaps[index][row] = heap

    def _score(self, index: int, row: int, expert: int) -> float:
        return max(self._use[index][row][expert] / self._scale[row], self._foreseen[row].get(expert, 0.0))

    def reuse_score(self, key: ExpertKey, index: int) -> float:
        return self._score(index, self._row[key[0]], key[1])

    def restore(self, key: ExpertKey, reuse_score: Sequence[float]) -> None:
        row, expert = self._row[key[0]], key[1]
        for index, value in enumerate(reuse_score):
            self._use[index][row][expert] = value * self._scale[row]
            self._rebuild(index, row)


# For a model with these layers, experts per layer and slices per expert.
POLICIES: dict[str, Callable[[Sequence[int], int, int], CachePolicy]] = {
    RecentScore.name: RecentScore,
    LeastRecentlyUsed.name: lambda layers, num_experts, num_slices: LeastRecentlyUsed(),
    LeastFrequentlyUsed.name: lambda layers, num_experts, num_slices: LeastFrequentlyUsed(),
}
