"""What a forward pass does with its tokens between the products: norms, rotation, the weighted sum of experts.

Compiled where the module is in use: torch would write several temporary tensors for each.
"""

# T tokens, H heads, d head size, D hidden, K experts per token

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moert.quant.dispatch import compiled


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension. x: float32 [..., D]. weight: float32 [D]. Returns [..., D]."""
    module = compiled()
    if module is None:
        return functional.rms_norm(x, weight.shape, weight, eps)
    x = x.contiguous()
    out = torch.empty_like(x)
    size = weight.numel()
    module.rms_norm(x.data_ptr(), weight.data_ptr(), x.numel() // size, size, eps, out.data_ptr())
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of x, float32 [T, H, d], by the angles of cos and sin, float32 [T, d/2].

    Returns float32 [H, T, d].
    """
    module = compiled()
    if module is None:
        first, second = x.transpose(0, 1).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    T, H, d = x.shape
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty(H, T, d)
    module.rotate(x.data_ptr(), T, H, d, cos.data_ptr(), sin.data_ptr(), out.data_ptr())
    return out


def combine(parts: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Sum over k of weights[t, k] * parts[rows[t * K + k]].

    parts: float32 [N, D]. rows: int64 [T * K]. weights: float32 [T, K]. Returns float32 [T, D].
    """
    T, K = weights.shape
    module = compiled()
    if module is None:
        return torch.bmm(weights.view(T, 1, K), parts[rows].view(T, K, -1)).view(T, -1)
    weights, D = weights.contiguous(), parts.shape[1]
    out = torch.empty(T, D)
    module.combine(parts.data_ptr(), rows.data_ptr(), weights.data_ptr(), T, K, D, out.data_ptr())
    return out


def add_rows(parts: Tensor, rows: Sequence[int], weights: Sequence[float], out: Tensor) -> None:
    """Add sum over i of weights[i] * parts[rows[i]] to out. parts: float32 contiguous [N, D]. out: the same [1, D]."""
    module = compiled()
    if module is None:
        out += torch.tensor(weights) @ parts[list(rows)]
    else:
        module.add_rows(rows, weights, parts.data_ptr(), parts.shape[1], out.data_ptr())
