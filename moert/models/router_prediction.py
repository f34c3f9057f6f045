"""Tells whoever wants to know which experts the next layers will probably ask for, while this layer's are computed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

from torch import Tensor

from moert.kernels.gate_ahead import GateAheadRouters, fold
from moert.models.layers import RMSNorm
from moert.models.moe import MoEBlock
from moert.quant.matmul import PackedMatrix

MOST_AHEAD = 3  # further on a guess is worth little more than the experts' popularity


class RouterPrediction(NamedTuple):
    """Experts that a router will probably choose, the likeliest first, and its softmax over all experts."""

    layer: int
    experts: Sequence[int]
    weights: Sequence[float]


class PredictionListener(Protocol):
    """Wants guesses; `horizon`, which may change at any time, says for how many MoE layers ahead (0: none)."""

    @property
    def horizon(self) -> int: ...

    def on_router_prediction(self, layer: int, guesses: Sequence[RouterPrediction]) -> None:
        """Take what the next MoE layers behind `layer` will probably ask for, the nearest first.

        Called for a single token, when the experts of `layer` are known and before they are computed; before the first
        layer as -1, with what the token alone says.
        """
        ...


class Gate:
    """The router of a layer with the norm before it, as guesses see them. Rounded when it is used first."""

    def __init__(self, layer: int, norm: RMSNorm, block: MoEBlock) -> None:
        self.layer, self._norm, self._block = layer, norm, block

    @cached_property
    def folded(self) -> PackedMatrix:
        router = self._block.gate.weight
        return fold(self._norm.weight.cpu(), router.cpu() if isinstance(router, Tensor) else router)


class GateAhead:
    """Predictions of a layer about the MoE layers behind it, whose `gates` come in their order.

    Twice as many experts are named as a router chooses: nearly all of those that it will choose are among them.
    """

    def __init__(self, layer: int, gates: Sequence[Gate], eps: float, top_k: int, num_experts: int) -> None:
        self.layer, self._gates, self._eps = layer, gates[:MOST_AHEAD], eps
        self._count = min(2 * top_k, num_experts)
        self._ahead: dict[int, GateAheadRouters] = {}  # by the number of layers

    def on_router_prediction(self, x: Tensor, watcher: PredictionListener) -> None:
        """x: float32 contiguous [1, D]: the residual stream behind the layer's attention; the embedding for -1."""
        gates = self._gates[: watcher.horizon]
        if not gates:
            return
        ahead = self._ahead.get(len(gates))
        if ahead is None:
            ahead = GateAheadRouters([gate.folded for gate in gates], self._eps, self._count)
            self._ahead[len(gates)] = ahead
        found = zip(gates, ahead(x), strict=True)
        watcher.on_router_prediction(self.layer, [RouterPrediction(gate.layer, *choice) for gate, choice in found])
