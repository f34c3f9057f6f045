"""Sort what the router asks of a layer by expert."""

# T tokens, K experts per token

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from moert.quant.format import MAX_WIDTH
from moert.scheduler.types import RoutedExpert

TokenGroups: TypeAlias = dict[int, dict[int, Tensor]]


def route_token(experts: Sequence[int], weights: Sequence[float], slices: Sequence[int]) -> list[RoutedExpert]:
    """List the experts that a single token asks of a layer."""
    return [RoutedExpert(e, 1, w, n) for e, w, n in zip(experts, weights, slices, strict=True)]


def route_tokens(indices: Tensor, weights: Tensor, counts: Tensor) -> tuple[TokenGroups, list[RoutedExpert]]:
    """Group what many tokens ask by expert: indices and counts (of slices) int64 [T, K], weights float32 [T, K].

    TokenGroups: for each expert, ascending, and each number of slices that it is wanted with, ascending, where it
    stands in the flattened [T, K].
    """
    places, sums = _places(indices, counts), sums_by_expert(indices, weights)
    return places, [
        RoutedExpert(e, sum(at.shape[0] for at in groups.values()), sums[e], max(groups), _waiting(groups))
        for e, groups in places.items()
    ]


def _places(indices: Tensor, counts: Tensor) -> TokenGroups:
    most = MAX_WIDTH + 1  # above any number of slices
    flat = (indices * most + counts).flatten()
    order = flat.argsort(stable=True)
    sizes = torch.bincount(flat)
    found = sizes.nonzero().flatten()
    result: TokenGroups = {}
    for key, at in zip(found.tolist(), torch.split(order, sizes[found].tolist()), strict=True):
        result.setdefault(key // most, {})[key % most] = at
    return result


def _waiting(groups: dict[int, Tensor]) -> tuple[int, ...]:
    """Count for each slice the tokens that need it; empty where all need all of them."""
    if len(groups) == 1:
        return ()
    return tuple(sum(len(at) for n, at in groups.items() if n > index) for index in range(max(groups)))


def sums_by_expert(indices: Tensor, weights: Tensor) -> dict[int, float]:
    """Sum up by expert the numbers that stand beside its index, weights [T, K]."""
    flat = indices.flatten()
    sums = torch.zeros(int(flat.max()) + 1).index_add_(0, flat, weights.flatten())
    return dict(enumerate(sums.tolist()))
