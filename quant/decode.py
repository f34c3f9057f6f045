"""The parts of a decode step between the products, for one token, where the compiled module is in use."""

# H query heads, J key/value heads, d head size, C context size, E experts, K experts per token

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from moert.quant.dispatch import compiled


@dataclass(frozen=True, eq=False)
class LayerCache:
    """Keys and values of one layer: numbers [2, J, C, d], float16, or int8 with scales float32 [2, J, C]."""

    numbers: Tensor
    scales: Tensor | None

    def steppable(self) -> bool:
        """Whether `attention_step` can run over this cache."""
        d = self.numbers.shape[-1]
        known = self.numbers.dtype == (torch.float16 if self.scales is None else torch.int8)
        return compiled() is not None and known and d % 16 == 0 and d <= 256

    @cached_property
    def pointers(self) -> tuple[int, ...]:
        """Where keys, values and their scales begin (0: none), and C."""
        _, J, C, d = self.numbers.shape
        keys = self.numbers.data_ptr()
        scales = 0 if self.scales is None else self.scales.data_ptr()
        value_scales = 0 if self.scales is None else scales + 4 * J * C
        return keys, keys + self.numbers.itemsize * J * C * d, scales, value_scales, C


def attention_step(
    qkv: Sequence[Tensor],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    rotation: tuple[Tensor, Tensor],
    cache: LayerCache,
    position: int,
    start: int,
) -> Tensor:
    """Attention of one token, its keys and values written to the cache.

    qkv: float32 contiguous [1, H * d], [1, J * d], [1, J * d]; the first two are overwritten. norms: float32 [d] for q
    and k, or None. rotation: cos and sin, float32 [1, d / 2]. The token stands at `position` and sees start ...
    position. Returns float32 [1, H * d].
    """
    module = compiled()
    assert module is not None
    q, k, v = qkv
    _, J, _, d = cache.numbers.shape
    out = torch.empty_like(q)
    module.attention_step(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), norms[0].data_ptr() if norms else 0,
        norms[1].data_ptr() if norms else 0, eps, rotation[0].data_ptr(), rotation[1].data_ptr(), *cache.pointers,
        position, start, q.shape[1] // d, J, d, out.data_ptr(),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight. x: float32 [1, D], contiguous. weight: float32 [D]. Returns float32 [1, D]."""
    module = compiled()
    if module is None:
        return functional.rms_norm(x, weight.shape, weight, eps)
    out = torch.empty_like(x)
    module.rms_norm(x.data_ptr(), weight.data_ptr(), x.shape[1], eps, out.data_ptr())
    return out


def route(logits: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor] | None:
    """Router of one token: logits float32 [1, E] -> indices int64 [1, K] and weights float32 [1, K], largest first.

    Weights are the softmax over all experts, divided by their sum over the chosen ones if `normalise`. None where the
    compiled module is not in use.
    """
    module = compiled()
    if module is None:
        return None
    indices, weights = torch.empty(1, top_k, dtype=torch.int64), torch.empty(1, top_k)
    module.route(logits.data_ptr(), logits.shape[1], top_k, normalise, indices.data_ptr(), weights.data_ptr())
    return indices, weights
