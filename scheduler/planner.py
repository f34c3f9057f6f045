"""Turns what the router asks into a plan, and advances the cache to the state after that plan."""

from __future__ import annotations

from collections.abc import Sequence

from moert.scheduler.cache import SliceCache
from moert.scheduler.types import ExpertKey, Load, Plan, RoutedExpert, Wave


def hottest_first(routed: Sequence[RoutedExpert]) -> list[RoutedExpert]:
    """Order of loads: most waiting tokens first, then the largest router weight.

    D2MoE's hottest-expert-bit-first (arXiv 2504.15299) orders by waiting tokens; at batch 1 every count is 1, and what
    an expert contributes is its router weight.
    """
    return sorted(routed, key=lambda r: (-r.tokens, -r.weight, r.expert))


def plan_layer(layer: int, routed: Sequence[RoutedExpert], cache: SliceCache) -> Plan:
    """Plan one layer of one step; `cache` is advanced to the state in which the plan leaves it.

    Experts that are resident compute first. What is missing is loaded in waves, as many experts at a time as fit, each
    read once. Deterministic. Raises ValueError for an expert without tokens or slices, and where the
    slots cannot hold a single one of the experts.
    """
    if any(r.tokens < 1 or r.slices < 1 for r in routed):
        raise ValueError(f"layer {layer}: an expert with no tokens or no slices among {list(routed)}")
    cache.policy.used(layer, routed)
    resident: list[RoutedExpert] = []
    missing: list[RoutedExpert] = []
    for r in hottest_first(routed):
        (resident if cache.resident(layer, r.expert) >= r.slices else missing).append(r)
    waves: list[Wave] = []
    ready = tuple(r.expert for r in resident)
    if not missing:  # most steps, so they do not pay for what follows
        return Plan(layer, {r.expert: r.slices for r in routed}, (Wave((), (), ready),))
    keep = {ExpertKey(layer, r.expert) for r in resident}
    while missing or ready:
        room = cache.room(keep)
        chosen: list[RoutedExpert] = []
        for r in missing:
            if any(room[index] < 1 for index in range(r.slices)):
                break  # later ones could be smaller, but the order is the hottest first
            for index in range(r.slices):
                room[index] -= 1
            chosen.append(r)
        if not chosen and not ready:
            raise ValueError(f"layer {layer}: the arena holds no expert of {missing[0].slices} slices")
        missing = missing[len(chosen) :]
        keep |= {ExpertKey(layer, r.expert) for r in chosen}
        loads, evictions = [], []
        for r in chosen:
            first = cache.resident(layer, r.expert)
            evictions += cache.insert(ExpertKey(layer, r.expert), r.slices, keep)
            loads.append(Load(r.expert, first, r.slices))
        waves.append(Wave(tuple(evictions), tuple(loads), ready))
        keep, ready = set(), ()
    return Plan(layer, {r.expert: r.slices for r in routed}, tuple(waves))
