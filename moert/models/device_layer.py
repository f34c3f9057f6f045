"""Layers that run through torch on a device, with the parts of those that run on the host.

A layer fetches its router's choice once, together with what foresight needs; its experts get their input on the device
and leave the result there.
"""

# T tokens, D hidden, H heads, d head size, K experts per token

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moert.models.architecture import Architecture
from moert.models.attention import Attention
from moert.models.device_matrix import DeviceMatrix, product
from moert.models.foresight import Foresight, Watcher
from moert.models.layers import DenseTensors, GatedMLP, Linear, RMSNorm
from moert.models.link import Link
from moert.models.moe import Experts, MoEBlock, route
from moert.models.split_cache import SplitCache


class Run(NamedTuple):
    """So many `tokens` of a sequence, behind `past` others in its cache of a layer."""

    cache: SplitCache
    past: int
    tokens: int


class DeviceNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class DeviceLinear(Linear):
    """The weight is a matrix on the device, or a small tensor there, which is float32."""

    weight: Tensor | DeviceMatrix  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        y: Tensor = product(x, weight) if isinstance(weight, Tensor) else weight(x)
        return y if self.bias is None else y + self.bias


class DeviceMLP(GatedMLP):
    linear = DeviceLinear


class DeviceAttention(Attention):
    """Self-attention of one layer for tokens [T, D] of several sequences."""

    linear, norm = DeviceLinear, DeviceNorm

    def attend(self, x: Tensor, rotation: tuple[Tensor, Tensor], runs: Sequence[Run]) -> Tensor:
        q, k, v = self._heads(*self._project(x))
        q, k = torch.split(_rotate(torch.cat((q, k), dim=1), *rotation), [self.num_heads, self.num_kv_heads])
        parts = [torch.split(t, [run.tokens for run in runs], 1) for t in (q, k, v.transpose(0, 1))]
        y = [run.cache.attend(q, k, v, run.past, self.window) for run, q, k, v in zip(runs, *parts, strict=True)]
        result: Tensor = self.o_proj(y[0] if len(y) == 1 else torch.cat(y))
        return result


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `quant.rows.rotate`: [T, H, d] -> [H, T, d]."""
    first, second = x.transpose(0, 1).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class DeviceBlock(MoEBlock):
    linear, gated_mlp = DeviceLinear, DeviceMLP

    def choose(self, x: Tensor, normed: Tensor, link: Link, watched: bool) -> tuple[Tensor, Tensor, Tensor]:
        """What the router chooses for normed [T, D], on the host: indices int64 and weights [T, K]; and x, if watched.

        One transfer: float32 has room for any index of an expert.
        """
        bonus = self.bonus(len(x))
        bonus = None if bonus is None else link.send(bonus)
        indices, weights = route(self.gate(normed), self.top_k, self.norm_topk_prob, bonus)
        parts = [indices.float(), weights, x] if watched else [indices.float(), weights]
        fetched = link.fetch(torch.cat(parts, dim=-1))
        K = self.top_k
        return fetched[:, :K].long(), fetched[:, K : 2 * K].contiguous(), fetched[:, 2 * K :].contiguous()

    def add(self, x: Tensor, normed: Tensor, indices: Tensor, weights: Tensor) -> None:
        """Add what the block makes of normed [T, D] to x."""
        if self.shared_expert is not None:
            x += self._shared(self.shared_expert, normed)
        if len(x) == 1:
            self.experts.add_one(self.layer, normed, indices[0].tolist(), weights[0].tolist(), x)
        else:
            x += self.experts(self.layer, normed, indices, weights)


class DeviceLayer(nn.Module):
    """A layer on the device, with the parts of `DecoderLayer`."""

    def __init__(self, arch: Architecture, dense: DenseTensors, layer: int, experts: Experts) -> None:
        super().__init__()
        name = f"model.layers.{layer}"
        self.input_layernorm = DeviceNorm(dense, f"{name}.input_layernorm", arch.rms_norm_eps)
        self.self_attn = DeviceAttention(arch, dense, layer)
        self.post_attention_layernorm = DeviceNorm(dense, f"{name}.post_attention_layernorm", arch.rms_norm_eps)
        self.mlp: nn.Module
        if arch.is_moe_layer[layer]:
            self.mlp = DeviceBlock(arch, dense, layer, experts)
        else:
            self.mlp = DeviceMLP(dense, f"{name}.mlp", arch.hidden_act)
        self.watcher: Watcher | None = None
        self.foresight: Foresight | None = None

    def run(self, x: Tensor, rotation: tuple[Tensor, Tensor], runs: Sequence[Run], link: Link) -> Tensor | None:
        """What the layer does with tokens x [T, D] on the device, in place; returns the experts chosen, on the host."""
        x += self.self_attn.attend(self.input_layernorm(x), rotation, runs)
        normed = self.post_attention_layernorm(x)
        watched = len(x) == 1 and self.watcher is not None and self.watcher.horizon > 0
        if not isinstance(self.mlp, DeviceBlock):
            if watched:
                self._tell(link.fetch(x))
            x += self.mlp(normed)
            return None
        indices, weights, seen = self.mlp.choose(x, normed, link, watched)
        if watched:
            self._tell(seen)
        self.mlp.add(x, normed, indices, weights)
        return indices

    def _tell(self, x: Tensor) -> None:
        if self.watcher is not None and self.foresight is not None:
            self.foresight.tell(x, self.watcher)
