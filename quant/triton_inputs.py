"""Inputs of the kernels of `triton_kernels.py`: rounded to int8 per group of columns as the CPU kernels round them, and
rotated before where experts have the trellis code (`trellis.py`).

Launch what uses them with enable_fp_fusion=False: where products were fused with sums, ties would fall differently.
"""

# G group size

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr, tensor


@triton.jit
def _rotated(x: tensor, G: constexpr) -> tensor:
    """Groups x [., G], each times a Hadamard matrix: to the bit what `trellis.rotate` makes of them."""
    for stage in tl.static_range(7):  # groups have 128 columns at most
        if (1 << stage) < G:
            pairs = tl.reshape(x, [x.shape[0], G >> (stage + 1), 2, 1 << stage])
            a, b = tl.split(tl.permute(pairs, [0, 1, 3, 2]))
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2]), [x.shape[0], G])
    return x * G**-0.5


@triton.jit
def _rounded(x: tensor) -> tl.tuple:
    """Groups x [., G] as int8 per group: codes, their scale and their sum, all float32."""
    size = tl.abs(x)
    finite = size < float("inf")
    peak = tl.max(tl.where(finite, size, 0), axis=1)
    usable = peak > 1e-36  # 127 / 1e-37 is infinite
    inverse = tl.div_rn(tl.where(usable, 127.0, 0.0), tl.where(usable, peak, 1.0))
    code = (tl.where(finite, x, 0) * inverse[:, None] + 12582912.0) - 12582912.0  # to the nearest, ties to even
    bad = tl.max(tl.where(finite, 0, 1), axis=1) > 0
    return code, tl.where(bad, float("nan"), tl.div_rn(peak, 127.0)), tl.sum(code, axis=1)


@triton.jit
def put_rounded(x: tensor, row: tensor, group: tensor, used: tensor, M: constexpr) -> None:
    """Rounds x [., G] and makes it groups `group` of the rows of inputs that begin at `row`, where `used`.

    Those of the trellis code are rotated before.
    """
    code, scale, total = _rounded(_rotated(x, M.group) if M.trellis else x)
    k = group[:, None] * M.group + tl.arange(0, M.group)[None, :]
    tl.store(row[:, None] + k, code.to(tl.int8), mask=used[:, None])
    side = (row + M.groups * M.group).to(tl.pointer_type(tl.float32)) + group
    tl.store(side, scale, mask=used)
    tl.store(side + M.groups, total, mask=used)
