"""Layers that run through torch on a device, with the parts of those that run on the host.

A layer fetches its router's choice once, together with what foresight needs; its experts get their input on the device
and leave the result there. For a single token what comes before attention and behind it is launched from a record
where the device has one (CUDA graphs): these are some thirty small kernels, whose launching takes longer than they do.
"""

# T tokens, D hidden, H heads, d head size, K experts per token

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moert.device.link import DeviceBackend
from moert.device.matrix import DeviceMatrix, product
from moert.device.split_cache import SplitCache
from moert.models.architecture import Architecture
from moert.models.attention import Attention
from moert.models.layers import DenseTensors, GatedMLP, Linear, RMSNorm
from moert.models.moe import Experts, MoEBlock, route
from moert.models.router_prediction import GateAhead, PredictionListener


class SequenceRun(NamedTuple):
    """A run of `tokens` tokens of a sequence, behind `past` others in its cache of a layer."""

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

    def inputs(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [H, T, d], keys and values [J, T, d]."""
        q, k, v = self._heads(*self._project(x))
        q, k = torch.split(_rotate(torch.cat((q, k), dim=1), *rotation), [self.num_heads, self.num_kv_heads])
        return q, k, v.transpose(0, 1)

    def attend(self, inputs: Sequence[Tensor], runs: Sequence[SequenceRun]) -> Tensor:
        """Return the output of the attention heads: [T, H * d]."""
        parts = [torch.split(t, [run.tokens for run in runs], 1) for t in inputs]
        y = [run.cache.attend(q, k, v, run.past, self.window) for run, q, k, v in zip(runs, *parts, strict=True)]
        return y[0] if len(y) == 1 else torch.cat(y)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x as `kernels.elementwise.rotate` does: [T, H, d] -> [H, T, d]."""
    first, second = x.transpose(0, 1).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class DeviceBlock(MoEBlock):
    linear, gated_mlp = DeviceLinear, DeviceMLP

    def choose(self, normed: Tensor, routing_bias: Tensor | None) -> Tensor:
        """Return the router's choice for normed [T, D]: indices and weights, float32 [T, 2 * K], for one transfer.

        float32 has room for any index of an expert.
        """
        indices, weights = route(self.gate(normed), self.top_k, self.norm_topk_prob, routing_bias)
        return torch.cat((indices.float(), weights), dim=-1)

    def shared(self, normed: Tensor) -> Tensor | None:
        return None if self.shared_expert is None else self._shared(self.shared_expert, normed)

    def add(self, x: Tensor, normed: Tensor, indices: Tensor, weights: Tensor) -> None:
        """Add what the routed experts make of normed [T, D] to x."""
        if len(x) == 1:
            self.experts.forward_token(self.layer, normed, indices[0].tolist(), weights[0].tolist(), x)
        else:
            x += self.experts(self.layer, normed, indices, weights)


class OneToken(NamedTuple):
    """The fixed place of a single token on the device: what is recorded reads and writes there.

    x: float32 [1, D], the residual stream. rotation: cos and sin, float32 [1, d / 2]. attended: float32 [1, H * d].
    """

    x: Tensor
    rotation: tuple[Tensor, Tensor]
    attended: Tensor


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
        self.watcher: PredictionListener | None = None
        self.foresight: GateAhead | None = None
        self._recorded: tuple[Callable[[], tuple[Tensor, ...]], Callable[[], tuple[Tensor, ...]]] | None = None

    def run(self, x: Tensor, rotation: tuple[Tensor, Tensor], runs: Sequence[SequenceRun], link: DeviceBackend) -> None:
        """Run the layer on tokens x [T, D] on the device, in place."""
        y = self.self_attn.attend(self._before(x, rotation), runs)
        self._end(x, self._behind(x, y, self._bonus(len(x), link)), link)

    def record(self, at: OneToken, link: DeviceBackend) -> None:
        """Prepare `one`; what is in `at` is lost."""
        if all(m.recordable for m in self.modules() if isinstance(m, DeviceMatrix)):
            self._recorded = (
                link.record(lambda: self._before(at.x, at.rotation)),
                link.record(lambda: self._behind(at.x, at.attended, None)),
            )

    def one(self, at: OneToken, run: SequenceRun, link: DeviceBackend) -> None:
        """`run` of the token `at` its place, from the record where there is one."""
        routing_bias = self._bonus(1, link)
        if self._recorded is None or routing_bias is not None:
            y = self.self_attn.attend(self._before(at.x, at.rotation), [run])
            self._end(at.x, self._behind(at.x, y, routing_bias), link)
            return
        before, behind = self._recorded
        at.attended.copy_(self.self_attn.attend(before(), [run]))
        self._end(at.x, behind(), link)

    def _bonus(self, tokens: int, link: DeviceBackend) -> Tensor | None:
        routing_bias = self.mlp.routing_bias(tokens) if isinstance(self.mlp, DeviceBlock) else None
        return None if routing_bias is None else link.send(routing_bias)

    def _before(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Up to attention over what was seen: its inputs."""
        return self.self_attn.inputs(self.input_layernorm(x), rotation)

    def _behind(self, x: Tensor, y: Tensor, routing_bias: Tensor | None) -> tuple[Tensor, ...]:
        """Compute all between the heads' output y [T, H * d] and the routed experts: all that is not theirs is added to
        x.

        Returns what the experts see, [T, D], and what the host wants to know: x behind attention, for a single token,
        and the router's choice, where there is one: [T, D or 0, + 2 * K or 0].
        """
        x += self.self_attn.o_proj(y)
        normed = self.post_attention_layernorm(x)
        told = [x.clone()] if len(x) == 1 else []
        if isinstance(self.mlp, DeviceBlock):
            told.append(self.mlp.choose(normed, routing_bias))
            more = self.mlp.shared(normed)
        else:
            more = self.mlp(normed)
        if more is not None:
            x += more
        return normed, torch.cat(told, dim=-1) if told else normed[:, :0]

    def _end(self, x: Tensor, behind: Sequence[Tensor], link: DeviceBackend) -> None:
        """The routed experts, for what `_behind` returns."""
        normed, told = behind
        D, watched = x.shape[1], len(x) == 1 and self.watcher is not None and self.watcher.horizon > 0
        if not isinstance(self.mlp, DeviceBlock):
            if watched:
                self._tell(link.fetch(told))
            return
        K = self.mlp.top_k
        fetched = link.fetch(told if watched else told[:, -2 * K :].contiguous())
        if watched:
            self._tell(fetched[:, :D].contiguous())
        indices, weights = fetched[:, -2 * K : -K].long(), fetched[:, -K:].contiguous()
        self.mlp.add(x, normed, indices, weights)

    def _tell(self, x: Tensor) -> None:
        if self.watcher is not None and self.foresight is not None:
            self.foresight.on_router_prediction(x, self.watcher)
