"""Experts in one arena, and which tokens meet which of them: what the kernels of a device are given to do.

Knows nothing of the kernels; needs no triton.
"""

# T tokens, P pairs of a token and an expert, E experts, S slices

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from moert.quant.format import PART_ALIGN, ExpertLayout, align

# Up to so many tokens for every expert each token is a product with a vector: a tile of tensor cores would be empty.
FEW_TOKENS = 4
LEAST_BLOCK, MOST_BLOCK = 16, 64  # tokens that share unpacked weights
RANGE_TOKENS = 512  # tokens whose sums one program owns, for which it unpacks weights once


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
        for expert, offsets in enumerate(self.offsets):
            if not 1 <= len(offsets) <= self.layout.num_slices:
                raise ValueError(f"expert {expert} has {len(offsets)} slices, not 1 to {self.layout.num_slices}")
            for index, at in enumerate(offsets):
                if at % PART_ALIGN or not 0 <= at <= self.arena.numel() - self.layout.offsets(index)[-1]:
                    raise ValueError(f"slice {index} of expert {expert} does not lie in the arena at offset {at}")

    @cached_property
    def table(self) -> Tensor:
        """int64 [E, 1 + S] on the arena's device: the number of slices, then their offsets."""
        rows = [[len(o), *o, *[0] * (self.layout.num_slices - len(o))] for o in self.offsets]
        return torch.tensor(rows, dtype=torch.int64).to(self.arena.device)

    def starts(self, matrix: int) -> tuple[int, ...]:
        """Where a matrix begins in each slice."""
        return tuple(self.layout.offsets(index)[matrix] for index in range(self.layout.num_slices))


@dataclass(frozen=True, eq=False)
class Work:
    """Pairs of tokens and experts in the order in which the kernels take them, on the device.

    items: int32 [I, 3], an expert and the first and number of its pairs; of one range of tokens, at most `block`.
    starts: int32, the first item of each range, and the end. order: int32 [P], the token of each pair. weights:
    float32 [P].
    """

    items: Tensor
    starts: Tensor
    order: Tensor
    weights: Tensor
    num_items: int
    num_ranges: int
    block: int


def plan_work(
    experts: PlacedExperts, tokens_of: Sequence[Tensor], weights_of: Sequence[Tensor] | None, num_tokens: int
) -> Work:
    """Without weights the pairs keep their order; else they are sorted into ranges of tokens."""
    counts = [len(tokens) for tokens in tokens_of]
    if len(counts) != len(experts.offsets):
        raise ValueError(f"there are tokens for {len(counts)} experts, and {len(experts.offsets)} experts")
    if weights_of is not None and [len(w) for w in weights_of] != counts:
        raise ValueError("there is not one weight for each token of each expert")
    expert = np.repeat(np.arange(len(counts)), counts)
    order = np.concatenate([np.zeros(0, np.int64), *(tokens.cpu().numpy() for tokens in tokens_of)])
    if len(order) and not 0 <= order.min() <= order.max() < num_tokens:
        raise ValueError(f"a token is not one of the {num_tokens} inputs")
    weights = np.zeros(0, np.float32)
    most = max(counts, default=0)
    block = 1 if most <= FEW_TOKENS else min(MOST_BLOCK, max(LEAST_BLOCK, 1 << (most - 1).bit_length()))
    part = np.zeros(len(order), np.int64)
    if weights_of is not None:
        if len(np.unique(expert * num_tokens + order)) != len(order):
            raise ValueError("an expert has the same token twice")
        weights = np.concatenate([weights, *(w.float().cpu().numpy() for w in weights_of)])
        part = order if block == 1 else order // RANGE_TOKENS
        sort = np.argsort(part, kind="stable")
        part, expert, order, weights = part[sort], expert[sort], order[sort], weights[sort]
    # A run: the pairs of one expert in one range. It is cut into items of `block` pairs.
    place = np.arange(len(order))
    new = np.ones(len(order), bool)
    new[1:] = (part[1:] != part[:-1]) | (expert[1:] != expert[:-1])
    within = place - np.maximum.accumulate(np.where(new, place, 0))
    first = np.flatnonzero(within % block == 0)
    items = np.stack([expert[first], first, np.diff(first, append=len(order))], 1)
    num_ranges = int(part[-1]) + 1 if len(part) else 0
    starts = np.searchsorted(part[first], np.arange(num_ranges + 1))
    # One copy to the device; every part starts on 16 bytes, or triton compiles anew for each alignment.
    parts = [a.astype(np.int32).reshape(-1) for a in (items, starts, order)] + [weights.view(np.int32)]
    sizes = [align(len(a), 4) for a in parts]
    joined = torch.from_numpy(np.concatenate([np.pad(a, (0, n - len(a))) for a, n in zip(parts, sizes, strict=True)]))
    sent = torch.split(joined.to(experts.arena.device), sizes)
    return Work(sent[0], sent[1], sent[2], sent[3].view(torch.float32), len(first), num_ranges, block)
