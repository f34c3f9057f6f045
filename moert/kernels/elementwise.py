"""Work on tokens between the products of a forward pass: norms, rotation, the weighted sum of experts.

Compiled where the module is in use: torch would write several temporary tensors for each.
"""

# T tokens, H heads, d head size, D hidden, K experts per token

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moert.kernels.native import compiled


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


def combine(parts: Tensor, rows: Tensor, weights: Tensor, more: Tensor | None = None) -> Tensor:
    """Sum over k of weights[t, k] * parts[rows[t * K + k]], without those whose row is -1, and `more`.

    parts: float32 [N, D]. rows: int64 [T * K]. weights: float32 [T, K]. more: float64 contiguous [T, D]. Returns
    float32 [T, D], summed in float64, so that the order does not show.
    """
    T, K = weights.shape
    module = compiled()
    if module is None:
        found = torch.zeros(T * K, parts.shape[1], dtype=torch.float64)
        found[rows >= 0] = parts[rows[rows >= 0]].double()
        sums = torch.bmm(weights.double().view(T, 1, K), found.view(T, K, -1)).view(T, -1)
        return (sums if more is None else sums + more).float()
    weights, D = weights.contiguous(), parts.shape[1]
    out = torch.empty(T, D)
    module.combine(
        parts.data_ptr(), rows.data_ptr(), weights.data_ptr(), T, K, D, _address(more), out.data_ptr()
    )  # fmt: skip
    return out


def add_rows(
    parts: Tensor, rows: Sequence[int], weights: Sequence[float], out: Tensor, more: Tensor | None = None
) -> None:
    """Add sum over i of weights[i] * parts[rows[i]], and `more`, to out; summed as in `combine`.

    parts: float32 contiguous [N, D]. out: the same [1, D]. more: float64 contiguous [1, D].
    """
    module = compiled()
    if module is None:
        sums = torch.tensor(weights, dtype=torch.float32).double() @ parts[list(rows)].double()
        out += (sums if more is None else sums + more).float()
    else:
        module.add_rows(rows, weights, parts.data_ptr(), parts.shape[1], _address(more), out.data_ptr())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
