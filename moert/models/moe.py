"""The mixture-of-experts block: router, routed experts (computed by whoever is injected) and shared expert."""

# T tokens, D hidden, E experts, K experts per token

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

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

    def routing_bias(self, layer: int, choices: int) -> Tensor | None:
        """Return what `route` adds to the logits of these experts, where they are asked for `choices` contributions in
        all.
        """
        return None

    def forward_token(
        self, layer: int, x: Tensor, experts: Sequence[int], weights: Sequence[float], out: Tensor
    ) -> None:
        """Add the experts' output for a single token to `out`: x and out float32 contiguous [1, D]. What decoding
        calls.
        """
        out += self(layer, x, torch.tensor([experts]), torch.tensor([weights]))


def route(logits: Tensor, top_k: int, normalise: bool, routing_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Router logits [T, E] -> indices int64 [T, K] and weights float32 [T, K], largest first.

    Weights are the softmax over all experts, divided by their sum over the chosen ones if `normalise`.

    bonus [E]: cache-conditional routing (arXiv 2412.00099, the method that it calls Cache-Prior): each expert's logit
    gets so many times the range of its token's logits on top when the experts are chosen, but the weights are those
    without it, and each token's best expert is always chosen. (The paper takes the mean range of the tokens so far; the
    token's own needs no state.)
    """
    weights = torch.softmax(logits, dim=-1)
    if routing_bias is None:
        weights, indices = weights.topk(top_k, dim=-1)
    else:
        low, high = logits.aminmax(dim=-1, keepdim=True)
        favoured = torch.where(logits == high, torch.inf, logits + routing_bias * (high - low))
        chosen = favoured.topk(top_k, dim=-1).indices
        weights, order = weights.gather(-1, chosen).sort(dim=-1, descending=True)
        indices = chosen.gather(-1, order)
    if normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return indices, weights


class MoEBlock(nn.Module):
    """[T, D] -> [T, D]: the routed experts of `layer` plus the gated shared expert, if there is one."""

    linear: ClassVar[type[Linear]] = Linear
    gated_mlp: ClassVar[type[GatedMLP]] = GatedMLP

    def __init__(self, arch: Architecture, dense: DenseTensors, layer: int, experts: Experts) -> None:
        super().__init__()
        name = f"model.layers.{layer}.mlp"
        self.layer, self.top_k, self.norm_topk_prob = layer, arch.top_k, arch.norm_topk_prob
        self.experts = experts
        self.gate = self.linear(dense, f"{name}.gate")
        self.shared_expert: GatedMLP | None = None
        if arch.shared_inner:
            self.shared_expert = self.gated_mlp(dense, f"{name}.shared_expert", arch.hidden_act)
            self.shared_expert_gate = self.linear(dense, f"{name}.shared_expert_gate")

    def forward(self, x: Tensor, chosen: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """`chosen`: what `route` says, where it is known already."""
        if chosen is None:
            chosen = route(self.gate(x), self.top_k, self.norm_topk_prob, self.routing_bias(len(x)))
        y = self.experts(self.layer, x, *chosen)
        return y if self.shared_expert is None else y + self._shared(self.shared_expert, x)

    def routing_bias(self, tokens: int) -> Tensor | None:
        """Return what the router of so many tokens adds to the logits, [E]; see `route`."""
        return self.experts.routing_bias(self.layer, tokens * self.top_k)

    def forward_token(self, x: Tensor, experts: Sequence[int], weights: Sequence[float], out: Tensor) -> None:
        """Add what the block makes of one token x [1, D], for which its router has chosen, to `out` [1, D]."""
        self.experts.forward_token(self.layer, x, experts, weights, out)
        if self.shared_expert is not None:
            out += self._shared(self.shared_expert, x)

    def _shared(self, expert: GatedMLP, x: Tensor) -> Tensor:
        return torch.sigmoid(self.shared_expert_gate(x)) * expert(x)
