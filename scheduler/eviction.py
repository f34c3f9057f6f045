"""What goes first when the slice cache needs room: policies by name.

Belady's optimum (IBM Systems Journal 5(2), 1966), which knows the future, is the bound that simulations show beside
them.
"""

# L layers, E experts, S slices

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moert.scheduler.types import ExpertKey, RoutedExpert

_POOL = 256  # experts that are looked at when one is to be evicted


class CachePolicy(Protocol):
    """Decides the order of eviction. Told of every use, so that it can keep scores."""

    name: str

    def used(self, layer: int, routed: Sequence[RoutedExpert], tokens: int) -> None:
        """All experts that the `tokens` tokens of one step are routed to in `layer`, resident or not."""

    def foreseen(self, layer: int, probabilities: Mapping[int, float]) -> None:
        """What somebody expects the coming step to use in `layer`, in place of what was expected before."""

    def loaded(self, key: ExpertKey, index: int) -> None:
        """Slice `index` of an expert got room."""

    def removed(self, key: ExpertKey, index: int) -> None:
        """Slice `index` of an expert lost its room."""

    def eviction_order(self, index: int) -> Iterable[ExpertKey]:
        """Experts of which slice `index` is resident, the one to evict first at the front. Others may be among them."""

    def worth(self, key: ExpertKey, index: int) -> float:
        """How often a token is expected to use a slice of an expert: what a prefetch must be worth to evict it."""

    def restore(self, key: ExpertKey, worth: Sequence[float]) -> None:
        """What `worth` said of the slices of an expert when another run ended; told before anything is used."""


class _Baseline:
    """What baselines do not care about: they know nothing of the future, and let no prefetch evict anything."""

    def foreseen(self, layer: int, probabilities: Mapping[int, float]) -> None: ...

    def worth(self, key: ExpertKey, index: int) -> float:
        return 1.0

    def restore(self, key: ExpertKey, worth: Sequence[float]) -> None: ...


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
            del self._order[key]

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
            del self._held[key]

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


class RecentScore(_Baseline):
    """Evicts what is least likely to be used soon, after HybriMoE's minus-recent-score (arXiv 2504.05897, 4.4).

    Each slice of each expert has a running mean of its use, S = (1 - rate) * S + rate * (share of the tokens that used
    it); a prompt of T tokens counts as T steps, so that what it routed to warms the scores. (The paper averages router
    weights. On traces of two real models whether one takes weights or uses changes the bytes read by less than 1%, and
    a use is what has to be read.) What a predictor names has at least its probability. A layer whose turn comes
    later in the cycle of layers counts for up to `patience` less: where everything looks alike, what goes is what has
    just been passed, not what comes next.
    """

    name = "score"

    def __init__(
        self, layers: Sequence[int], num_experts: int, num_slices: int, rate: float = 0.1, patience: float = 0.9
    ) -> None:
        L, E, S = len(layers), num_experts, num_slices
        self._layers, self._row = list(layers), {layer: row for row, layer in enumerate(layers)}
        self._num_experts, self._rate = E, rate
        # Means times `scale` of their layer, which grows with every use: so a use changes only what is used.
        self._use = np.zeros((S, L, E))
        self._scale = np.ones((L, 1))
        self._foreseen = np.zeros((L, E))
        self._held = np.zeros((S, L, E), bool)
        self._visit = 0
        ahead = (np.arange(L)[None] - np.arange(L)[:, None] - 1) % L  # [now, of what]: layers until its turn
        self._discount = (patience ** (ahead / L))[..., None]
        self._now = 0
        self._all = np.arange(L * E)
        self._pools: dict[int, tuple[int, NDArray[np.int64]]] = {}  # by slice: since when, places of low scores
        self._queues: dict[int, list[int]] = {}  # by slice, while scores stay: places, the next to evict at the end

    def used(self, layer: int, routed: Sequence[RoutedExpert], tokens: int) -> None:
        row = self._now = self._row[layer]
        self._visit += 1
        kept = (1 - self._rate) ** tokens
        scale = self._scale[row, 0] / kept
        if scale > 1e100:
            self._use[:, row] /= scale
            scale = 1.0
        self._scale[row, 0] = scale
        share = (1 - kept) / tokens * scale
        if tokens == 1:
            begin, size = row * self._num_experts, self._foreseen.size
            self._use.reshape(-1)[[begin + r.expert + i * size for r in routed for i in range(r.slices)]] += share
        else:
            for r in routed:
                self._use[: r.slices, row, r.expert] += share * np.array(r.waiting or (r.tokens,) * r.slices)
        self._foreseen[row] = 0
        self._queues.clear()

    def foreseen(self, layer: int, probabilities: Mapping[int, float]) -> None:
        row = self._foreseen[self._row[layer]]
        row[:] = 0
        row[list(probabilities)] = list(probabilities.values())
        self._queues.clear()

    def loaded(self, key: ExpertKey, index: int) -> None:
        self._held[index, self._row[key[0]], key[1]] = True

    def removed(self, key: ExpertKey, index: int) -> None:
        self._held[index, self._row[key[0]], key[1]] = False

    def eviction_order(self, index: int) -> Iterator[ExpertKey]:
        """Sorted anew after every use, but only those that scored lowest when all were looked at last.

        That is once per cycle of layers, or when none of them is left. What is evicted is then as good as if all were
        sorted every time; sorting once per cycle and passing over what was used since reads 4% more.
        """
        queue = self._queues.get(index)
        if not queue:
            since, pool = self._pools.get(index, (0, self._all[:0]))
            if queue is None and self._visit - since <= len(self._layers):
                queue = self._sorted(index, pool)
            if not queue:
                pool = self._all
                if len(pool) > _POOL:
                    pool = np.argpartition(self._scores(index, pool), _POOL)[:_POOL]
                self._pools[index] = self._visit, pool
                queue = self._sorted(index, pool)
            self._queues[index] = queue
        while queue:
            yield self._key(queue.pop())
        yield from map(self._key, reversed(self._sorted(index, self._all)))

    def _scores(self, index: int, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of experts by their place in the flattened [L, E]; infinite where the slice is not there."""
        row = places // self._num_experts
        use = self._use[index].reshape(-1)[places] / self._scale[row, 0]
        scores = np.maximum(use, self._foreseen.reshape(-1)[places]) * self._discount[self._now][row, 0]
        return np.where(self._held[index].reshape(-1)[places], scores, np.inf)

    def _sorted(self, index: int, places: NDArray[np.int64]) -> list[int]:
        """Those of `places` that are there, the lowest score at the end."""
        scores = self._scores(index, places)
        order = np.argsort(scores, kind="stable")
        return places[order[: int(np.isfinite(scores).sum())]].tolist()[::-1]

    def _key(self, place: int) -> ExpertKey:
        row, expert = divmod(place, self._num_experts)
        return ExpertKey(self._layers[row], expert)

    def worth(self, key: ExpertKey, index: int) -> float:
        row, expert = self._row[key[0]], key[1]
        return float(max(self._use[index, row, expert] / self._scale[row, 0], self._foreseen[row, expert]))

    def restore(self, key: ExpertKey, worth: Sequence[float]) -> None:
        row = self._row[key[0]]
        self._use[: len(worth), row, key[1]] = np.array(worth) * self._scale[row, 0]


# For a model with these layers, experts per layer and slices per expert.
POLICIES: dict[str, Callable[[Sequence[int], int, int], CachePolicy]] = {
    RecentScore.name: RecentScore,
    LeastRecentlyUsed.name: lambda layers, num_experts, num_slices: LeastRecentlyUsed(),
    LeastFrequentlyUsed.name: lambda layers, num_experts, num_slices: LeastFrequentlyUsed(),
}
