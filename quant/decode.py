"""The parts of a decode step between the products, for one token, where the compiled module is in use."""

# H query heads, J key/value heads, d head size, C context size, E experts, K experts per token

from __future__ import annotations

import torch
from torch import Tensor

from moert.quant.dispatch import compiled


def available(cache: Tensor) -> bool:
    """Whether `attention_step` can run over keys and values [2, J, C, d] such as these."""
    d = cache.shape[-1]
    return compiled() is not None and cache.dtype == torch.float16 and d % 16 == 0 and d <= 256


def attention_step(
    qkv: tuple[Tensor, Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    position: int,
    start: int,
) -> Tensor:
    """Attention of one token, its keys and values written to the cache.

    qkv: float32 contiguous [1, H * d], [1, J * d], [1, J * d]; the first two are overwritten. norms: float32 [d] for q
    and k, or None. cos, sin: float32 [1, d / 2]. cache: float16 [2, J, C, d], contiguous. The token stands at
    `position` and sees start ... position. Returns float32 [1, H * d].
    """
    module = compiled()
    assert module is not None
    q, k, v = qkv
    _, J, C, d = cache.shape
    out = torch.empty_like(q)
    keys = cache.data_ptr()
    module.attention_step(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), norms[0].data_ptr() if norms else 0,
        norms[1].data_ptr() if norms else 0, eps, cos.data_ptr(), sin.data_ptr(), keys, keys + 2 * J * C * d, C * d,
        position, start, q.shape[1] // d, J, d, out.data_ptr(),
    )  # fmt: skip
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
