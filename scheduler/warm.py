"""Remember what a cache held, so that the next run begins with it: SliceMoE's warm start (arXiv 2512.12990), across
runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moert.scheduler.cache import SliceCache
from moert.scheduler.types import ExpertKey, Load


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of one cache: experts with the number of their slices that were resident, the one to evict last at the
    front.

    reuse_scores: of each expert that was used lately, resident or not, what the policy thought of each of its slices.
    """

    resident: Mapping[ExpertKey, int]
    reuse_scores: Mapping[ExpertKey, Sequence[float]]


def remember(cache: SliceCache, kept: Mapping[int, Sequence[int]]) -> Memory:
    """Return what `cache` holds now. kept: of each layer how many slices each expert has."""
    held, policy = cache.resident_experts(), cache.policy
    order = dict.fromkeys(key for key in policy.eviction_order(0) if key in held)
    reuse_score = {
        ExpertKey(layer, e): [policy.reuse_score(ExpertKey(layer, e), index) for index in range(count)]
        for layer, counts in kept.items()
        for e, count in enumerate(counts)
    }
    return Memory(
        {key: held[key] for key in reversed(order)}, {key: row for key, row in reuse_score.items() if any(row)}
    )


def restore(cache: SliceCache, memory: Memory, most: int) -> list[Load]:
    """Fill an empty cache with as much as fits of what is remembered, the best first, `most` slices of each expert.

    Returns what has to be read, in the order of layers and experts. The policy takes over what it thought of experts.
    """
    chosen: dict[ExpertKey, int] = {}
    free = list(cache.free)
    for key, count in memory.resident.items():
        sizes = cache.sizes(key.layer)
        fits = 0
        while fits < min(count, most) and free[fits] >= sizes[fits]:
            free[fits] -= sizes[fits]
            fits += 1
        if fits:
            chosen[key] = fits
    for key, row in memory.reuse_scores.items():
        cache.policy.restore(key, row)
    loads = [Load(key.layer, key.expert, 0, count) for key, count in sorted(chosen.items())]
    change = cache.draft()
    for key, count in reversed(chosen.items()):  # for a policy that goes by the order of loading
        change.insert(key, count)
    for load in loads:
        change.load(load)
    cache.commit(change)
    return loads
