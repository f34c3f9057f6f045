"""A compact Mixture-of-Experts transformer for training on a CPU, in the shape of Qwen3-MoE or OLMoE.

It computes in bfloat16 on float32 weights, and keeps the experts of a layer stacked in one parameter.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    family: str = "qwen3_moe"
    vocab: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    experts: int = 32
    top_k: int = 4
    expert_width: int = 128
    rope_theta: float = 10000.0
    max_positions: int = 2048

    @property
    def whole_norm(self) -> bool:  # OLMoE normalises the whole query and key projections, Qwen3 each head of them
        return self.family == "olmoe"


BLOCK = 128  # slots of an expert come in blocks of this many


def fused(function: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
    """Compile a chain of elementwise operations: run one by one they cost more than all the matrix products."""
    return torch.compile(function, dynamic=dynamic) if shutil.which("g++") else function


@fused
def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, whole: bool) -> Tensor:
    """Normalise [batch, time, heads, dim] and rotate it by position; returns [batch, heads, time, dim]."""
    x = x.float()
    square = x.square().mean((-2, -1) if whole else -1, keepdim=True)
    x = x * torch.rsqrt(square + 1e-6) * weight
    first, second = x.chunk(2, -1)
    x = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return x.bfloat16().transpose(1, 2).contiguous()


@fused
def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(scores.float() + mask, -1).bfloat16()


@fused
def residual_norm(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x + delta
    return x, (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight).bfloat16()


@fused
def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


# The number of rows differs from batch to batch, so this one is compiled for any size.
@partial(fused, dynamic=True)
def swiglu(gate_up: Tensor, weight: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up * weight).bfloat16()


class ToExperts(torch.autograd.Function):
    """Copy each token into its experts' slots; backwards, sum the gradients of a token's slots."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of_slot: Tensor, slots_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_slot, slots_of_token)
        return x.index_select(0, token_of_slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return F.embedding_bag(ctx.saved_tensors[1], grad, mode="sum"), None, None


class FromExperts(torch.autograd.Function):
    """Sum a token's slots; backwards, copy its gradient into them: the transpose of ToExperts."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, token_of_slot: Tensor, slots_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_slot, slots_of_token)
        return F.embedding_bag(slots_of_token, y, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.contiguous().index_select(0, ctx.saved_tensors[0]), None, None


class ExpertProduct(torch.autograd.Function):
    """Multiply the rows ends[e]..ends[e + 1] by the matrix of expert e, writing straight into the one result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ends, out = ends, x.new_empty(len(x), weight.shape[-1])
        for w, start, end in zip(weight, ends, ends[1:], strict=False):
            torch.mm(x[start:end], w, out=out[start:end])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        for w, g, start, end in zip(weight, grad_weight, ctx.ends, ctx.ends[1:], strict=False):
            torch.mm(grad[start:end], w.t(), out=grad_x[start:end])
            torch.mm(x[start:end].t(), grad[start:end], out=g)
        return grad_x, grad_weight, None


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        rows = (s.heads, s.kv_heads) if s.whole_norm else (1, 1)
        self.norm1, self.norm2 = nn.Parameter(torch.ones(s.hidden)), nn.Parameter(torch.ones(s.hidden))
        self.q_norm = nn.Parameter(torch.ones(rows[0], s.head_dim))
        self.k_norm = nn.Parameter(torch.ones(rows[1], s.head_dim))
        self.qkv = nn.Parameter(torch.randn(q + 2 * kv, s.hidden) * 0.02)
        self.o = nn.Parameter(torch.randn(s.hidden, q) * 0.02 / math.sqrt(2 * s.layers))
        self.router = nn.Parameter(torch.randn(s.experts, s.hidden) * 0.02)
        self.gate_up = nn.Parameter(torch.randn(s.experts, s.hidden, 2 * s.expert_width) * 0.02)
        self.down = nn.Parameter(torch.randn(s.experts, s.expert_width, s.hidden) * 0.02 / math.sqrt(2 * s.layers))

    def attention(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        s, (batch, time_, _) = self.s, x.shape
        heads = F.linear(x, self.qkv.bfloat16()).view(batch, time_, s.heads + 2 * s.kv_heads, s.head_dim)
        q, k, v = heads.split((s.heads, s.kv_heads, s.kv_heads), 2)
        group = s.heads // s.kv_heads
        q = norm_rope(q, self.q_norm / math.sqrt(s.head_dim), *rope, s.whole_norm)
        k = norm_rope(k, self.k_norm, *rope, s.whole_norm)
        # Written out, since the fused attention's backward pass takes three times as long on a CPU.
        q = q.view(batch * s.kv_heads, group * time_, s.head_dim)
        scores = q @ k.flatten(0, 1).mT
        weights = masked_softmax(scores.view(-1, group, time_, time_), mask).view_as(scores)
        out = weights @ v.transpose(1, 2).flatten(0, 1)
        out = out.view(batch, s.heads, time_, s.head_dim).transpose(1, 2).reshape(batch, time_, -1)
        return F.linear(out, self.o.bfloat16())

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chosen experts [tokens, k], their weights, and the load-balancing loss (as in the Switch Transformer)."""
        probs = torch.softmax(F.linear(x.float(), self.router), -1)
        weights, chosen = probs.topk(self.s.top_k, -1)
        if not self.s.whole_norm:
            weights = weights / weights.sum(-1, keepdim=True)
        share = torch.bincount(chosen.flatten(), minlength=self.s.experts) / chosen.numel()
        return chosen, weights, self.s.experts * (share * probs.mean(0)).sum()

    def experts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s, tokens = self.s, len(x)
        chosen, weights, balance = self.route(x)
        # Sort the assignments by expert, and give each expert a whole number of blocks of slots: experts get unequal
        # numbers of tokens, and rounding them up keeps the number of different matrix shapes small.
        order = chosen.flatten().argsort(stable=True)
        count = torch.bincount(chosen.flatten(), minlength=s.experts)
        room = (count + BLOCK - 1) // BLOCK * BLOCK
        expert = chosen.flatten()[order]
        slot = torch.arange(len(order), device=x.device) + (room.cumsum(0) - room - count.cumsum(0) + count)[expert]
        ends = [0, *room.cumsum(0).tolist()]
        slots = torch.empty_like(slot).index_copy_(0, order, slot).view(tokens, s.top_k)
        token_of_slot = torch.zeros(ends[-1], dtype=torch.long, device=x.device).index_copy_(0, slot, order // s.top_k)
        weight = torch.zeros(ends[-1], device=x.device).index_put((slots.flatten(),), weights.flatten())
        rows = ToExperts.apply(x, token_of_slot, slots)  # unused slots hold token 0, with weight 0
        inner = swiglu(ExpertProduct.apply(rows, self.gate_up.bfloat16(), ends), weight[:, None])
        return FromExperts.apply(ExpertProduct.apply(inner, self.down.bfloat16(), ends), token_of_slot, slots), balance


class Model(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.embed = nn.Parameter(torch.randn(s.vocab, s.hidden) * 0.02)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = nn.Parameter(torch.ones(s.hidden))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        s, time_ = self.s, ids.shape[1]
        frequency = s.rope_theta ** (-torch.arange(0, s.head_dim, 2, device=ids.device) / s.head_dim)
        angle = (torch.arange(time_, device=ids.device)[:, None] * frequency)[:, None]
        mask = torch.full((time_, time_), -math.inf, device=ids.device).triu(1)
        x, balance = F.embedding(ids, self.embed), torch.zeros((), device=ids.device)
        delta = torch.zeros((), device=ids.device).bfloat16().expand_as(x)
        for layer in cast(list[Layer], self.layers):
            x, normed = residual_norm(x, delta, layer.norm1)
            x, normed = residual_norm(x, layer.attention(normed, (angle.cos(), angle.sin()), mask), layer.norm2)
            delta, aux = layer.experts(normed.flatten(0, 1))
            delta, balance = delta.view_as(x), balance + aux / s.layers
        return F.linear(residual_norm(x, delta, self.norm)[1], self.embed.bfloat16()), balance


def hf_tensors(model: Model) -> dict[str, Tensor]:
    """The model's weights by their Hugging Face names: one tensor per projection and expert, out features first."""
    s = model.s
    out: dict[str, Tensor] = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm}
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    for i, layer in enumerate(cast(list[Layer], model.layers)):
        parts: dict[str, Tensor] = {
            "input_layernorm": layer.norm1,
            "post_attention_layernorm": layer.norm2,
            "mlp.gate": layer.router,
        }
        parts |= {f"self_attn.{n}_proj": w for n, w in zip("qkv", layer.qkv.split((q, kv, kv)), strict=True)}
        parts |= {"self_attn.o_proj": layer.o}
        parts |= {"self_attn.q_norm": layer.q_norm.flatten(), "self_attn.k_norm": layer.k_norm.flatten()}
        for e in range(s.experts):
            gate, up = layer.gate_up[e].t().chunk(2)
            weights = {"gate_proj": gate, "up_proj": up, "down_proj": layer.down[e].t()}
            parts |= {f"mlp.experts.{e}.{name}": weight for name, weight in weights.items()}
        out |= {f"model.layers.{i}.{name}.weight": weight for name, weight in parts.items()}
    return {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in out.items()}
