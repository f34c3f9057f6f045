"""Grouped-query attention over the KV cache, with the families' variants: q/k norms, biases, clipping, windows."""

# T tokens, S positions seen, D hidden, H query heads, J key/value heads, d head size

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moert.kernels.elementwise import rotate
from moert.models.architecture import Architecture
from moert.models.kv_cache import KVCache
from moert.models.layers import DenseTensors, Linear, RMSNorm, linear_many


@dataclass(frozen=True)
class Span:
    """The cached positions start .. end that a forward pass reads in layers of one window, and who sees what.

    `mask` float32 [T, S] is added to the scores; None with `causal` means that query i sees keys 0 .. i, and None
    without it that every query sees every key.
    """

    start: int
    end: int
    mask: Tensor | None
    causal: bool


def span(past: int, count: int, window: int | None) -> Span:
    """Return the span of positions that `count` tokens behind `past` cached ones see; made once per forward pass and
    window, not per layer.
    """
    end = past + count
    start = 0 if window is None else max(0, past - window + 1)
    if count == 1:
        return Span(start, end, None, causal=False)
    if past == 0 and (window is None or window >= count):
        return Span(start, end, None, causal=True)
    # The first query sees the keys from start to past, each further one a key more, and with a window one less.
    mask = torch.full((count, end - start), -torch.inf).triu_(past - start + 1)
    if window is not None:
        keys = torch.arange(start, end)
        mask.masked_fill_(keys <= torch.arange(past, end)[:, None] - window, -torch.inf)
    return Span(start, end, mask, causal=False)


class Attention(nn.Module):
    """Self-attention of one layer: [T, D] -> [T, D]."""

    linear: ClassVar[type[Linear]] = Linear
    norm: ClassVar[type[RMSNorm]] = RMSNorm

    def __init__(self, arch: Architecture, dense: DenseTensors, layer: int) -> None:
        super().__init__()
        name = f"model.layers.{layer}.self_attn"
        self.layer, self.window = layer, arch.sliding_windows[layer]
        self.num_heads, self.num_kv_heads, self.head_dim = arch.num_heads, arch.num_kv_heads, arch.head_dim
        self.qk_norm, self.clip_qkv = arch.qk_norm, arch.clip_qkv
        self.q_proj = self.linear(dense, f"{name}.q_proj", arch.qkv_bias)
        self.k_proj = self.linear(dense, f"{name}.k_proj", arch.qkv_bias)
        self.v_proj = self.linear(dense, f"{name}.v_proj", arch.qkv_bias)
        self.o_proj = self.linear(dense, f"{name}.o_proj", arch.o_bias)
        if arch.qk_norm != "none":
            self.q_norm = self.norm(dense, f"{name}.q_norm", arch.rms_norm_eps)
            self.k_norm = self.norm(dense, f"{name}.k_norm", arch.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Span, cache: KVCache) -> Tensor:
        q, k, v = self._heads(*self._project(x))
        # Keys and values come back from the cache, the new ones too: its rounding must not depend on the chunking.
        cache.append(self.layer, rotate(k, cos, sin), v.transpose(0, 1))
        keys, values = cache.read(self.layer, seen.start, seen.end)
        y = self._attend(rotate(q, cos, sin), keys, values, seen)
        result: Tensor = self.o_proj(y)
        return result

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H * d], k and v [T, J * d], before rotation and norms per head."""
        q, k, v = linear_many(x, (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip_qkv is not None:
            q, k, v = (t.clamp(-self.clip_qkv, self.clip_qkv) for t in (q, k, v))
        return q, k, v

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, d], k and v [T, J, d], with norms per head, before rotation."""
        q, k, v = (t.view(len(t), -1, self.head_dim) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, seen: Span) -> Tensor:
        """Softmax attention of q [H, T, d] over keys and values [J, S, d]: [T, H * d]."""
        count = q.shape[1]
        if count == 1:
            # The query heads that share a key head become its queries: no copy of the keys per query head.
            q = q.view(self.num_kv_heads, -1, self.head_dim)
        y = functional.scaled_dot_product_attention(
            q[None],
            keys[None],
            values[None],
            attn_mask=seen.mask,
            is_causal=seen.causal,
            enable_gqa=count > 1 and self.num_heads != self.num_kv_heads,
        )[0]
        return y.reshape(1, -1) if count == 1 else y.transpose(0, 1).reshape(count, -1)
