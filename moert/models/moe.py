"""The mixture-of-experts block: router, routed experts (computed by whoever is injected) and shared expert."""

# T tokens, D hidden, E experts, K experts per token

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from moert.models.architecture import Architecture
from moert.models.layers import DenseTensors, GatedMLP, Linear


class Experts(Protocol):
    """Computes the routed experts of a layer."""

    def __call__(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Sum over k of weights[t, k] * expert[indices[t, k]](x[t]).

        x float32 [T, D], indices int64 [T, K] (distinct in each row), weights float32 [T, K] -> float32 [T, D].
        """
        ...


def route(logits: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Router logits [T, E] -> indices int64 [T, K] and weights float32 [T, K], largest first.

    Weights are the softmax over all experts, divided by their sum over the chosen ones if `normalise`.
    """
    weights, indices = torch.softmax(logits, dim=-1).topk(top_k, dim=-1)
    if normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return indices, weights


class MoEBlock(nn.Module):
    """[T, D] -> [T, D]: the routed experts of `layer` plus the gated shared expert, if there is one."""

    def __init__(self, arch: Architecture, dense: DenseTensors, layer: int, experts: Experts) -> None:
        super().__init__()
        name = f"model.layers.{layer}.mlp"
        self.layer, self.top_k, self.norm_topk_prob = layer, arch.top_k, arch.norm_topk_prob
        self.experts = experts
        self.gate = Linear(dense, f"{name}.gate")
        self.shared_expert: GatedMLP | None = None
        if arch.shared_inner:
            self.shared_expert = GatedMLP(dense, f"{name}.shared_expert", arch.hidden_act)
            self.shared_expert_gate = Linear(dense, f"{name}.shared_expert_gate")

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, *route(self.gate(x), self.top_k, self.norm_topk_prob))

    def compute(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """What the block makes of x [T, D] once its router has chosen indices and weights [T, K]."""
        y = self.experts(self.layer, x, indices, weights)
        if self.shared_expert is not None:
            y = y + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y
