"""Levels of the trellis code for the kernels of `triton_kernels.py`, in the place of codes.

A level is a load from a table of 64 bytes, by a window of a plane and of what lies before it (`trellis.py`). It takes
some seven instructions for a weight and a plane, where the linear code takes less than one, so that instructions may
bound products with vectors, not memory. None of it has run on a device.
"""

# T tokens, R rows of a program, S groups of a program, G group size

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from moert.quant.format import TRELLIS, ExpertLayout
from moert.quant.trellis import BIAS, kernel_tables


@lru_cache
def device_tables(layout: ExpertLayout, device: torch.device) -> Tensor | None:
    """Return the levels of every plane of a matrix, int8 [planes, 64]; None for the linear code."""
    if layout.code != TRELLIS:
        return None
    tables = kernel_tables(layout.matrices[0], layout.num_slices).clone()
    tables[0] -= BIAS
    return tables.view(torch.int8).to(device)


@triton.jit
def _pairs(word: tensor, before: tensor, shift: tensor) -> tensor:
    """The byte of 32-bit words that begins at bit `shift`, above the one that lies before it in its sequence."""
    return (word >> shift & 255) << 8 | (before >> shift & 255)


@triton.jit
def _turned(word: tensor) -> tensor:
    """Each byte of 32-bit words in the place of the next: what lies before the first group of a tile, in the ring."""
    return word << 8 | (word >> 24 & 255)


@triton.jit
def _levels(pair: tensor, place: tensor, table: tensor, BITS: constexpr) -> tensor:
    """The levels, int32, whose codes are at `place` of the upper byte: windows end there and are indices of `table`."""
    WINDOW: tl.constexpr = 6 if BITS == 2 else 4  # as trellis.WINDOW_BITS has it
    index = pair >> (8 - WINDOW + BITS) + place * BITS & ((1 << WINDOW) - 1)
    return tl.load(table + index).to(tl.int32)


@triton.jit
def levels_of(words: tensor, there: tensor, group: tensor, tables: tensor, p: constexpr, M: constexpr) -> tensor:
    """The levels that plane p of a matrix adds to some groups of rows: int32 [S, G, R].

    words [S, R]: where the groups of rows begin in the plane; there [S, R]: which exist. group [S]: their numbers.
    """
    BITS: tl.constexpr = M.planes[p][3]
    CHUNKS: tl.constexpr = M.group * BITS // 32
    S: tl.constexpr = words.shape[0]
    R: tl.constexpr = words.shape[1]
    chunk = tl.arange(0, CHUNKS)[None, :, None]
    word = tl.load(words[:, None, :] + chunk * 16, mask=there[:, None, :], other=0)
    first = (group == 0)[:, None, None] & (chunk == 0)
    back = tl.where(chunk > 0, 16 * (chunk - 1), 16 * (CHUNKS - 1) - M.planes[p][2] // 4)
    back = back + tl.where(first, M.groups * (M.planes[p][2] // 4), 0)
    before = tl.load(words[:, None, :] + back, mask=there[:, None, :], other=0)
    before = tl.where(first, _turned(before), before)
    lane = tl.arange(0, 32 // BITS)[None, :, None]
    word, before = (tl.reshape(word, [S * CHUNKS, 1, R]), tl.reshape(before, [S * CHUNKS, 1, R]))
    pair = _pairs(word, before, lane % 4 * 8)
    return tl.reshape(_levels(pair, lane // 4, tables + p * 64, BITS), [S, M.group, R])


@triton.jit
def level_dots(
    q: tensor, words: tensor, there: tensor, group: tensor, tables: tensor, p: constexpr, M: constexpr, C: constexpr
) -> tensor:
    """Products of the levels of plane p of a matrix and the inputs over some groups, exactly: int32 [S, R].

    q [S]: where int8 inputs begin. The others as for `levels_of`.
    """
    if C.DP4A:
        BITS: tl.constexpr = M.planes[p][3]
        CHUNKS: tl.constexpr = M.group * BITS // 32
        total = tl.zeros(words.shape, tl.int32)
        last = words - (M.planes[p][2] // 4 - 16 * (CHUNKS - 1))  # of the group before
        first = (group == 0)[:, None]
        last += tl.where(first, M.groups * (M.planes[p][2] // 4), 0)
        before = tl.load(last, mask=there, other=0)
        before = tl.where(first, _turned(before), before)
        for chunk in range(CHUNKS):
            word = tl.load(words + chunk * 16, mask=there, other=0)
            for byte in range(4):  # unrolled here it would take a minute to compile
                pair = _pairs(word, before, 8 * byte)
                for place in tl.static_range(8 // BITS):
                    inputs = tl.load(q + (chunk * (32 // BITS) + 4 * place + byte)).to(tl.int32)
                    total += _levels(pair, place, tables + p * 64, BITS) * inputs[:, None]
            before = word
        return total
    else:
        inputs = tl.load(q[:, None] + tl.arange(0, M.group)[None, :]).to(tl.int32)
        return tl.sum(levels_of(words, there, group, tables, p, M) * inputs[:, :, None], axis=1)
