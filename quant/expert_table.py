"""The experts that can be used at once, by layer, expert and number of slices."""

# T tokens, D hidden

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moert.quant.dispatch import compiled
from moert.quant.format import ExpertLayout
from moert.quant.matmul import PackedExpert, expert_ffn, experts_ffn, placed_planes


class ExpertTable:
    """A table of where the slices of experts lie, so that experts are computed without a Python object for each.

    The compiled module knows them by number; where it cannot compute them (raw weights, other activations, the
    reference kernel) they are kept as `PackedExpert`.
    """

    def __init__(self, layout: ExpertLayout, activation: str, memory: Tensor) -> None:
        """memory: contiguous uint8, in which all slices lie."""
        self._layout, self._activation, self._memory = layout, activation, memory
        self._packed: dict[tuple[int, int, int], PackedExpert] = {}
        module = compiled() if activation == "silu" and not layout.raw else None
        self._native: Any = None if module is None else module.ExpertTable(_places(layout), memory.data_ptr())

    def put(self, layer: int, expert: int, offsets: Sequence[int]) -> None:
        """Enter the first slices of an expert, which must stay at these offsets until `drop_from` forgets them."""
        if self._native is not None:
            self._native.put(layer, expert, offsets)
            return
        sizes = self._layout.slice_sizes
        slices = [self._memory[at : at + size] for at, size in zip(offsets, sizes, strict=False)]
        for n in range(1, len(slices) + 1):
            self._packed[layer, expert, n] = PackedExpert.from_slices(slices[:n], self._layout)

    def drop_from(self, layer: int, expert: int, count: int) -> None:
        """Forget the slices of an expert from index `count` on."""
        if self._native is not None:
            self._native.keep(layer, expert, count)
        for n in range(count + 1, self._layout.num_slices + 1):
            self._packed.pop((layer, expert, n), None)

    def held(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Return with how many slices each of `experts` could be computed now."""
        if self._native is not None:
            counts: list[int] = self._native.held(layer, experts)
            return counts
        most = self._layout.num_slices
        return [sum((layer, e, n) in self._packed for n in range(1, most + 1)) for e in experts]

    def missing(self, layer: int, experts: Sequence[int], slices: Sequence[int]) -> list[int]:
        """Positions in `experts` of those that are not there with so many slices."""
        if self._native is not None:
            found: list[int] = self._native.missing(layer, experts, slices)
            return found
        pairs = enumerate(zip(experts, slices, strict=True))
        return [i for i, (e, n) in pairs if (layer, e, n) not in self._packed]

    def add(
        self,
        layer: int,
        experts: Sequence[int],
        slices: Sequence[int],
        weights: Sequence[float],
        x: Tensor,
        out: Tensor,
    ) -> bool:
        """Add sum over k of weights[k] * `expert_ffn`(x, experts[k]) to out; x and out: float32 contiguous [1, D].

        slices[k]: with how many slices experts[k] is used. Returns False, having done nothing, unless the compiled
        module has all of them.
        """
        if self._native is None:
            return False
        found: bool = self._native.add(layer, experts, slices, weights, x.data_ptr(), out.data_ptr())
        return found

    def compute_one(
        self, layer: int, experts: Sequence[int], slices: Sequence[int], rows: Sequence[int], x: Tensor, parts: Tensor
    ) -> None:
        """`expert_ffn` of a single token x, float32 contiguous [1, D], by experts all of which must be there.

        What experts[i] makes of it goes to row rows[i] of parts, float32 contiguous [K, D].
        """
        if self._native is not None:
            self._native.compute_one(layer, experts, slices, rows, x.data_ptr(), parts.data_ptr())
            return
        for e, n, row in zip(experts, slices, rows, strict=True):
            parts[row : row + 1] = expert_ffn(x, self._packed[layer, e, n], self._activation)

    def compute(
        self,
        layer: int,
        experts: Sequence[int],
        slices: Sequence[int],
        tokens_of: Sequence[Tensor],
        x: Tensor,
        out: Tensor,
    ) -> None:
        """`expert_ffn` of several experts, all of which must be there.

        x: float32 [T, D]. tokens_of[i]: int64 [n_i], the tokens of expert i. out: float32 [sum of n_i, D], contiguous,
        gets the results, one expert after the other.
        """
        if self._native is None:
            packed = [self._packed[layer, e, n] for e, n in zip(experts, slices, strict=True)]
            experts_ffn(x, packed, tokens_of, out, self._activation)
            return
        x, order = x.contiguous(), torch.cat(list(tokens_of))
        counts = [len(tokens) for tokens in tokens_of]
        self._native.compute(layer, experts, slices, counts, order.data_ptr(), x.data_ptr(), x.shape[0], out.data_ptr())


def _places(layout: ExpertLayout) -> list[list[Any]]:
    """Return the offsets that the compiled module wants: for each number of slices those of gate, up and down."""
    offsets = [layout.offsets(index) for index in range(layout.num_slices)]
    return [
        [
            placed_planes(matrix, [(index, offsets[index][m]) for index in range(count)])
            for m, matrix in enumerate(layout.matrices)
        ]
        for count in range(1, layout.num_slices + 1)
    ]
