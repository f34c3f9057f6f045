"""Which experts later layers will ask for: their routers, applied to the hidden state of an earlier layer.

The residual stream changes little from layer to layer, so the router of the next layer already knows most of what it
will choose: speculative loading (arXiv 2312.17238, section 3.2), here for several layers at a time, with their routers
stacked (HOBBIT, arXiv 2411.01433). A guess needs no exact router: it is rounded to 4 bits, and with its norm folded in
all routers see the same input, which is rounded once.
"""

# D hidden, E experts

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moert.kernels.native import compiled, loaded
from moert.quant import nested
from moert.quant.format import MatrixLayout
from moert.quant.matmul import PackedMatrix, floats, linear_many

WIDTH = 4
_GROUP_SIZE = 64

Choice = tuple[list[int], list[float]]


def fold(norm: Tensor, router: Tensor | PackedMatrix) -> PackedMatrix:
    """A router [E, D] that takes x / rms(x) instead of `RMSNorm(x)` with weight norm [D], at 4 bits."""
    weights = floats(router) * norm.float()
    rows, cols = weights.shape
    layout = MatrixLayout(rows, cols, _GROUP_SIZE, (WIDTH,))
    return PackedMatrix(layout, tuple(nested.quantise(weights, layout)))


@dataclass(frozen=True, eq=False)
class GateAheadRouters:
    """Routers of later layers that name experts from the hidden state of an earlier one.

    routers: folded ones, [E, D] each. eps: of their norms. count: how many experts to name for each.
    """

    routers: Sequence[PackedMatrix]
    eps: float
    count: int

    @cached_property
    def native(self) -> Any:
        """Return what the compiled module takes; it points into the routers."""
        hidden = self.routers[0].layout.cols
        return loaded().GateAheadRouters([router.native for router in self.routers], hidden, self.eps, self.count)

    def __call__(self, x: Tensor) -> list[Choice]:
        """The likeliest experts of each router for a hidden state x, float32 contiguous [1, D], the likeliest first.

        Beside each its softmax over all experts of that router.
        """
        if compiled() is not None:
            found: list[Choice] = self.native.choose(x.data_ptr())
            return found
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        best = [scores.softmax(-1)[0].topk(self.count) for scores in linear_many(normed, self.routers)]
        return [(indices.tolist(), weights.tolist()) for weights, indices in best]
