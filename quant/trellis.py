"""The trellis code of nested slices: how planes of 2 and 1 bits become levels, and the rotation of inputs before it.

In a plane the codes of a row form a ring: columns 0, 4, 8, ..., then 1, 5, 9, ..., then those from 2 and from 3 on, and
from the last one to column 0 again. The level that a plane adds to a weight is looked up by a window of it: the code of
the weight itself and those before it, so that a plane of 2 bits
chooses among 64 levels rather than 4, though each code leaves a choice of 4 only (trellis-coded quantisation: Marcellin
and Fischer, IEEE Transactions on Communications 38(1), 1990; with the window as an index: QTIP, arXiv 2406.11235,
section 3.1). On Gaussian weights 2 bits leave 8.4% of the energy where the best 4 levels leave 11.7%.

A weight at a width is the sum of the levels of all planes up to it, times a scale of its row. Tables are fixed: they
were fitted to Gaussian weights, which weights become when their inputs are rotated (QuaRot, arXiv 2404.00456).
"""

# N rows, K columns padded to whole groups, T tokens, G group size

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from moert.quant.format import MatrixLayout

UNIT = 32  # levels for the standard deviation of the weights
WINDOW_BITS = {2: 6, 1: 4}  # of a window: three codes of 2 bits, or four of 1 bit
STRIDE = 4  # from a column to the next in the ring: the bytes of a lane
BIAS = 128  # what the kernels add to a level, so that it is an unsigned byte
# Levels of a plane in thousandths of the standard deviation of what it refines. Bits of the index, from the lowest: the
# oldest code of the window first.
_TWO_BITS = [
    -1400, -529, 332, 1303, 771, 1862, -368, 119, -955, 1624, 666, -116, -1904, 948, 42, -487,
    541, 94, -1235, -391, 2089, 699, 1248, -704, -37, -566, -2141, 800, -650, 118, 1140, -1615,
    -369, -1456, 1288, 341, -79, 64, -1099, 993, 515, -1247, -133, -2564, 868, -657, 193, 1710,
    1559, 779, -328, -1310, -941, -570, 405, 2586, 1249, 303, -643, -1078, 26, -1779, -842, 563,
]  # fmt: skip
_ONE_BIT = [402, -1534, -549, 781, 1269, -306, -885, 502, -1125, 334, 809, -548, -315, 1597, 553, -955]
# Standard deviation of what is left after so many bits, as a share of the weights', behind compensation.
_LEFT = {0: 1.0, 2: 0.34, 3: 0.215, 4: 0.14, 5: 0.085, 6: 0.05}


@lru_cache
def table(bits: int, above: int) -> Tensor:
    """Return the levels that a plane of `bits` bits adds below `above` bits: int32 [2 ** WINDOW_BITS[bits]]."""
    shares = _TWO_BITS if bits == 2 else _ONE_BIT
    return torch.tensor([round(share * UNIT * _LEFT[above] / 1000) for share in shares], dtype=torch.int32)


def deviation(above: int) -> float:
    """Return the standard deviation, in levels, of what `above` bits leave for the planes below."""
    return UNIT * _LEFT[above]


def plane_list(layout: MatrixLayout, num_slices: int) -> list[tuple[int, int]]:
    """Return (bits, bits above) of every plane of the first slices."""
    planes, above = [], 0
    for index in range(num_slices):
        for bits in layout.planes(index):
            planes.append((bits, above))
            above += bits
    return planes


@lru_cache
def kernel_tables(layout: MatrixLayout, num_slices: int) -> Tensor:
    """Return the tables of all planes as kernels want them: uint8 [planes, 64], repeated to 64 levels, the first one
    with BIAS added, the others modulo 256.
    """
    rows = [table(*plane).repeat(64 >> WINDOW_BITS[plane[0]]) for plane in plane_list(layout, num_slices)]
    rows[0] = rows[0] + BIAS
    return (torch.stack(rows) & 255).to(torch.uint8)


def to_ring(x: Tensor) -> Tensor:
    """Put columns [., K] into the order of the ring."""
    return x.view(len(x), -1, STRIDE).transpose(1, 2).reshape(x.shape)


def from_ring(x: Tensor) -> Tensor:
    """Undo `to_ring`."""
    return x.view(len(x), STRIDE, -1).transpose(1, 2).reshape(x.shape)


def windows(ring: Tensor, bits: int) -> Tensor:
    """Return the index of each code's window, int32 [N, K], for a plane of codes, uint8 [N, K]: both in ring order."""
    result = ring << (WINDOW_BITS[bits] - bits)
    for back in range(1, WINDOW_BITS[bits] // bits):
        result |= ring.roll(back, 1) << (WINDOW_BITS[bits] - bits * (back + 1))
    return result.int()


def levels(codes: Tensor, layout: MatrixLayout, num_slices: int) -> Tensor:
    """Return the sums of levels, int32 [N, K], for codes [N, K] of widths[num_slices - 1] bits."""
    width, total = layout.widths[num_slices - 1], torch.zeros(codes.shape, dtype=torch.int32)
    for bits, above in plane_list(layout, num_slices):
        part = codes >> (width - above - bits) & (2**bits - 1)
        total += table(bits, above)[from_ring(windows(to_ring(part), bits))]
    return total


def rotate(x: Tensor, group_size: int) -> Tensor:
    """Apply a Hadamard transform of length one to every group of columns of x float32 [., K]; it undoes itself.

    The sums are those of the kernels, in their order.
    """
    y = x.reshape(-1, group_size)
    step = 1
    while step < group_size:
        pairs = y.view(-1, group_size // (2 * step), 2, step)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack([a + b, a - b], dim=2).view(-1, group_size)
        step *= 2
    return (y * torch.tensor(1 / math.sqrt(group_size), dtype=torch.float32)).view(x.shape)
