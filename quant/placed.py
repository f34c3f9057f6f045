"""Experts in one arena, and which tokens meet which of them: what the kernels of a device are given to do.

Knows nothing of the kernels; needs no triton.
"""

# T tokens, P pairs of a token and an expert, E experts, S slices

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from moert.quant.format import PART_ALIGN, ExpertLayout

# Up to so many tokens for every expert each token is a product with a vector: a tile of tensor cores would be empty.
FEW_TOKENS = 4
LEAST_BLOCK, MOST_BLOCK = 16, 64  # tokens that share unpacked weights
RANGE_TOKENS = 256  # tokens whose sums one program owns, for which it unpacks weights once


@dataclass(frozen=True, eq=False)
class PlacedExperts:
    """Experts in an arena, each with the slices that it is used with.

    arena: contiguous uint8 that begins and ends on 64 bytes. offsets[e][i]: where slice i of expert e begins in it, a
    multiple of 64; as many as the expert is used with, so that its width is layout.widths[len(offsets[e]) - 1].
    Raises ValueError for raw layouts and for slices that do not lie in the arena.
    """

    layout: ExpertLayout
    arena: Tensor
    offsets: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        if self.layout.raw:
            raise ValueError("raw experts have no planes: multiply their weights with torch")
        aligned = self.arena.storage_offset() % PART_ALIGN == self.arena.numel() % PART_ALIGN == 0
        if self.arena.dtype != torch.uint8 or not self.arena.is_contiguous() or not aligned:
            raise ValueError(f"the arena is not contiguous uint8 that begins and ends on {PART_ALIGN} bytes")
        room = [self.arena.numel() - starts[-1] for starts in starts_of(self.layout)]
        for expert, offsets in enumerate(self.offsets):
            if not 1 <= len(offsets) <= len(room):
                raise ValueError(f"expert {expert} has {len(offsets)} slices, not 1 to {len(room)}")
            for index, at in enumerate(offsets):
                if at % PART_ALIGN or not 0 <= at <= room[index]:
                    raise ValueError(f"slice {index} of expert {expert} does not lie in the arena at offset {at}")


@lru_cache
def starts_of(layout: ExpertLayout) -> tuple[tuple[int, ...], ...]:
    """Return where gate, up and down begin in each slice, and where down ends."""
    return tuple(layout.offsets(index) for index in range(layout.num_slices))


@dataclass(frozen=True, eq=False)
class Work:
    """Pairs of tokens and experts in the order in which the kernels take them.

    numbers: int32 on the arena's device, one part after the other: order [P], the token of each pair; weights [P],
    float32; items [I, 3 + S], how many slices an expert is used with, the first and the number of its pairs (of one
    range of tokens, at most `block`), and where its slices begin, in units of 64 bytes; starts [R + 1], the first item
    of each range, and the end.
    """

    numbers: Tensor
    num_pairs: int
    num_items: int
    num_ranges: int
    block: int


def plan_work(
    experts: PlacedExperts, tokens_of: Sequence[Tensor], weights_of: Sequence[Tensor] | None, num_tokens: int
) -> Work:
    """Without weights the pairs keep their order; else they are sorted into ranges of tokens."""
    counts = [tokens.shape[0] for tokens in tokens_of]  # len takes five times as long
    if len(counts) != len(experts.offsets):
        raise ValueError(f"there are tokens for {len(counts)} experts, and {len(experts.offsets)} experts")
    if weights_of is not None and [w.shape[0] for w in weights_of] != counts:
        raise ValueError("there is not one weight for each token of each expert")
    most, num_pairs = max(counts, default=0), sum(counts)
    block = 1 if most <= FEW_TOKENS else min(MOST_BLOCK, max(LEAST_BLOCK, 1 << (most - 1).bit_length()))
    if not num_pairs:
        return Work(torch.empty(0, dtype=torch.int32, device=experts.arena.device), 0, 0, 0, block)
    expert = np.arange(len(counts)).repeat(counts)
    order = torch.cat(list(tokens_of)).numpy(force=True)
    if not 0 <= order.min() <= order.max() < num_tokens:
        raise ValueError(f"a token is not one of the {num_tokens} inputs")
    weights = torch.cat(list(weights_of)).numpy(force=True) if weights_of is not None else None
    if weights is not None and np.bincount(expert * num_tokens + order).max() > 1:
        raise ValueError("an expert has the same token twice")
    part = order * 0 if weights is None else order if block == 1 else order // RANGE_TOKENS
    if weights is not None and num_tokens > 1:
        sort = part.argsort(kind="stable")
        part, expert, order, weights = part[sort], expert[sort], order[sort], weights[sort]
    place = np.arange(num_pairs)
    if block == 1:
        first = place
    else:  # a run is the pairs of one expert in one range; it is cut into items of `block` pairs
        new = np.ones(num_pairs, bool)
        new[1:] = (part[1:] != part[:-1]) | (expert[1:] != expert[:-1])
        first = np.flatnonzero((place - np.maximum.accumulate(place * new)) % block == 0)
    num_items, num_ranges = len(first), int(part[-1]) + 1
    size, slices = 3 + experts.layout.num_slices, experts.layout.num_slices
    ends = 2 * num_pairs, 2 * num_pairs + num_items * size
    # One copy to the device, out of locked memory so that nobody waits for it.
    joined = torch.empty(ends[1] + num_ranges + 1, dtype=torch.int32, pin_memory=experts.arena.is_cuda)
    numbers = joined.numpy()
    numbers[:num_pairs] = order
    numbers[num_pairs : ends[0]].view(np.float32)[:] = 0 if weights is None else weights
    rows = np.array([(len(o), 0, 0, *o, *[0] * (slices - len(o))) for o in experts.offsets])
    rows[:, 3:] //= PART_ALIGN
    items = numbers[ends[0] : ends[1]].reshape(num_items, size)
    items[:] = rows[expert[first]]
    items[:, 1] = first
    items[:-1, 2] = first[1:]
    items[-1, 2] = num_pairs
    items[:, 2] -= items[:, 1]
    numbers[ends[1] :] = part[first].searchsorted(np.arange(num_ranges + 1))
    return Work(joined.to(experts.arena.device, non_blocking=True), num_pairs, num_items, num_ranges, block)
