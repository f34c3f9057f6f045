"""Triton kernels for nested-bit experts in device memory: products with few tokens, with many, and the whole expert
feed-forward.

They read the bytes of `format.py` where they lie: experts are offsets into one arena, and in one launch each expert is
used with as many of its slices as it has there. Inputs, and what lies between the launches, are rounded to int8 per
group of columns exactly as the CPU kernels do (`csrc/kernel_body.h`), and products of codes are exact within a group,
so that where an expert is computed shows only in the order of float32 sums over groups and in silu's last bits.

Up to four tokens of each expert are products with vectors. They are bound by memory only if few instructions fall to a
weight: a 32-bit word holds four columns of a row for each shift, which `dp4a` multiplies at once. Each thread asks for
16 bytes of a plane at a time, two (1 bit) to 16 times (8 bits) before it needs the first, and takes at most 64
registers at usual widths, so that a processor has room for four such programs of 256 threads. More tokens are
multiplied in float16 by tensor cores: codes up to 127 and levels, half-integers below 128, are exact there. The trellis
code has levels of its own, and loads them one by one (`triton_trellis.py`).

Programs of the first product take the rows of a whole group of the second's columns, so that they can round them. OLMoE
has 128 of them for a token (8 experts, 1024 rows in groups of 64), which is for the 8 to 24 processors of a Jetson or a
laptop's GPU several each, and for the 132 of an H100 one. The second product has one for each 16 rows, 128 too, which
takes the experts one after the other: sums have a fixed order without a launch more, so the same call gives the same
bits, but an H100 would rather have had more programs.

None of it has run on a device; it compiles for those of compute capability 8.0, 8.7 and 9.0. Importing this module
needs triton 3.4; with TRITON_INTERPRET=1, set before triton 3.7 is imported, all of it but `_dot4` runs on the CPU. Raw
weights are not for it: torch multiplies those.
"""

# T tokens, P pairs of a token and an expert, E experts, N rows (outputs), K columns (inputs), G group size, D hidden,
# F expert inner size; of a program: B tokens, R rows, S groups

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from moert.quant.format import TILE_ROWS, TRELLIS, ExpertLayout
from moert.quant.matmul import placed_planes
from moert.quant.placed import PlacedExperts, Work, plan_work, starts_of
from moert.quant.triton_inputs import put_rounded
from moert.quant.triton_trellis import device_tables, level_dots, levels_of

GATE, UP, DOWN = range(3)

_STEP_WORDS = 1024  # of a plane, for which a program of a product with a vector asks at once
_ROUND_NUMBERS = 512  # that a program rounds
_SUM_ROWS = 32  # of a program of the second product with many tokens


@dataclass(frozen=True, eq=False)
class _Matrix:
    """The constants that kernels know of a matrix when they are compiled, one object for each matrix of a layout.

    planes: of each, the most significant first, its slice, offset there, bytes for a group of a tile, and bits.
    scales: where those of each width begin in its slice. row_bytes: of a row of inputs, as `_round_kernel` has them.
    """

    planes: tuple[tuple[int, int, int, int], ...]
    scales: tuple[int, ...]
    widths: tuple[int, ...]
    rows: int
    cols: int
    tiles: int
    groups: int
    group: int
    row_bytes: int
    trellis: bool


@dataclass(frozen=True, eq=False)
class _Tile:
    """The part of a matrix that a program takes at once: tokens, rows, and with one token groups, in loops if DP4A."""

    B: int
    R: int
    S: int
    DP4A: bool


@lru_cache
def _matrix(layout: ExpertLayout, matrix: int) -> _Matrix:
    m, starts = layout.matrices[matrix], starts_of(layout)
    planes, *_ = placed_planes(m, [(index, at[matrix]) for index, at in enumerate(starts)])
    scales = tuple(at[matrix] + m.codes_bytes(index) for index, at in enumerate(starts))
    G, kept = m.group_size, tuple(plane[:4] for plane in planes)
    sizes = m.rows, m.cols, m.tiles, m.groups, G, m.groups * (G + 8)
    return _Matrix(kept, scales, m.widths, *sizes, m.code == TRELLIS)


@triton.jit
def _round_kernel(x: tensor, out: tensor, M: constexpr, S: constexpr) -> None:
    """Rows x [T, K] as inputs of products: int8 [groups * G], then float32 scales and sums of codes [groups] each."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * S + tl.arange(0, S)
    k = group[:, None] * M.group + tl.arange(0, M.group)[None, :]
    row = out + token * M.row_bytes + tl.full([S], 0, tl.int32)
    put_rounded(tl.load(x + token * M.cols + k, mask=k < M.cols, other=0), row, group, group < M.groups, M)


@triton.jit
def _codes(word: tensor, BITS: constexpr) -> tensor:
    """The codes of the columns that 32-bit words [chunks, rows] of a plane hold: int32 [chunks, columns, rows]."""
    lane = tl.arange(0, 32 // BITS)
    shift = lane % 4 * 8 + lane // 4 * BITS
    return (word[:, None, :] >> shift[None, :, None]) & ((1 << BITS) - 1)


@triton.jit
def _dot4(codes: tensor, inputs: tensor, total: tensor) -> tensor:
    """total plus the sum of products of four unsigned bytes and four signed ones."""
    return tl.inline_asm_elementwise(
        "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, inputs, total], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _dots(q: tensor, words: tensor, there: tensor, BITS: constexpr, G: constexpr, C: constexpr) -> tensor:
    """Products of a plane's codes and the inputs over some groups, exactly: int32 [S, R].

    q [S]: where int8 inputs begin. words [S, R]: where the groups of rows begin; there [S, R]: which exist.
    """
    if C.DP4A:
        UNROLLED: tl.constexpr = 16 if G > 32 else 8  # fours of columns: compiling more takes minutes
        fours = q.to(tl.pointer_type(tl.int32))
        total = tl.full([C.S, C.R], 0, tl.int32)
        for first in range(0, G // 4, UNROLLED):
            for k in tl.static_range(UNROLLED):
                if k % (8 // BITS) == 0:
                    word = tl.load(words + (first + k) * BITS // 8 * 16, mask=there, other=0)
                codes = word if BITS == 8 else (word >> k % (8 // BITS) * BITS) & (((1 << BITS) - 1) * 0x01010101)
                total = _dot4(codes, tl.load(fours + first + k)[:, None], total)
        return total
    else:
        CHUNKS: tl.constexpr = G * BITS // 32
        at = words[:, None, :] + (tl.arange(0, CHUNKS) * 16)[None, :, None]
        word = tl.reshape(tl.load(at, mask=there[:, None, :], other=0), [C.S * CHUNKS, C.R])
        inputs = tl.load(q[:, None] + tl.arange(0, G)[None, :]).to(tl.int32)
        return tl.sum(tl.reshape(_codes(word, BITS), [C.S, G, C.R]) * inputs[:, :, None], axis=1)


@triton.jit
def _place(item: tensor, index: constexpr, offset: constexpr) -> tensor:
    """Where something lies in the arena that begins at `offset` in slice `index` of an item's expert."""
    return tl.multiple_of(tl.load(item + 3 + index).to(tl.int64) * 64 + offset, 64)


@triton.jit
def _vector_product(
    row: tensor, item: tensor, arena: tensor, tables: tensor, n: tensor, M: constexpr, C: constexpr
) -> tensor:
    """Rows n [R] of a matrix of an item's expert times the inputs that begin at `row`: float32 [R]."""
    slices = tl.load(item)
    scales, middle = arena, tl.full([], 0, tl.float32)
    for c in tl.static_range(len(M.widths)):
        if slices == c + 1:
            scales, middle = arena + _place(item, c, M.scales[c]), tl.full([], ((1 << M.widths[c]) - 1) / 2, tl.float32)
    halves = scales.to(tl.pointer_type(tl.float16))
    side = (row + M.groups * M.group).to(tl.pointer_type(tl.float32))
    total = tl.full([C.S, C.R], 0, tl.float32)
    for first in range(0, M.groups, C.S):
        group = first + tl.arange(0, C.S)
        there = (group < M.groups)[:, None] & (n // 16 < M.tiles)[None, :]
        group = tl.minimum(group, M.groups - 1)
        cell = (n // 16 * M.groups)[None, :] + group[:, None]
        dot = tl.full([C.S, C.R], 0, tl.int32)
        for p in tl.static_range(len(M.planes)):
            if slices > M.planes[p][0]:  # a whole program goes the same way
                words = (arena + _place(item, M.planes[p][0], M.planes[p][1])).to(tl.pointer_type(tl.int32))
                words += cell * (M.planes[p][2] // 4) + (n % 16)[None, :]
                if M.trellis:
                    dot += level_dots(row + group * M.group, words, there, group, tables, p, M, C)
                else:
                    part = _dots(row + group * M.group, words, there, M.planes[p][3], M.group, C)
                    dot = (dot << M.planes[p][3]) + part
        level, at = dot.to(tl.float32), tl.broadcast_to(n[None, :], [C.S, C.R])
        if not M.trellis:
            level, at = level - (tl.load(side + M.groups + group) * middle)[:, None], cell * 16 + (n % 16)[None, :]
        scale = tl.load(halves + at, mask=there, other=0).to(tl.float32)
        total += level * (scale * tl.load(side + group)[:, None])
    return tl.sum(total, axis=0)


@triton.jit
def _block_product(
    row: tensor,
    used: tensor,
    item: tensor,
    arena: tensor,
    tables: tensor,
    n: tensor,
    c: constexpr,
    M: constexpr,
    C: constexpr,
) -> tensor:
    """Rows n [R] of a matrix at width c times the inputs that begin at `row` [B], where `used`: float32 [B, R]."""
    G: tl.constexpr = M.group
    there = n // 16 < M.tiles
    side = (row + M.groups * M.group).to(tl.pointer_type(tl.float32))
    scales = (arena + _place(item, c, M.scales[c])).to(tl.pointer_type(tl.float16)) + n % 16
    total = tl.full([C.B, C.R], 0, tl.float32)
    for group in range(M.groups):
        cell = n // 16 * M.groups + group
        code = tl.full([G, C.R], 0, tl.int32)
        for p in tl.static_range(len(M.planes)):
            if M.planes[p][0] <= c:
                words = (arena + _place(item, M.planes[p][0], M.planes[p][1])).to(tl.pointer_type(tl.int32))
                words += (cell * (M.planes[p][2] // 4) + n % 16)[None, :]
                if M.trellis:
                    levels = levels_of(words, there[None, :], tl.full([1], group, tl.int32), tables, p, M)
                    code += tl.reshape(levels, [G, C.R])
                else:
                    chunk = tl.arange(0, G * M.planes[p][3] // 32)
                    word = tl.load(words + (chunk * 16)[:, None], mask=there[None, :], other=0)
                    codes = tl.reshape(_codes(word, M.planes[p][3]), [G, C.R])
                    code = (code << M.planes[p][3]) + codes
        level = code.to(tl.float16) - (0 if M.trellis else ((1 << M.widths[c]) - 1) / 2)
        k = group * G + tl.arange(0, G)
        inputs = tl.load(row[:, None] + k[None, :], mask=used[:, None], other=0).to(tl.float16)
        place = n // 16 if M.trellis else cell
        scale = tl.load(scales + place * 16, mask=there, other=0).to(tl.float32)
        scale = tl.load(side + group, mask=used, other=0)[:, None] * scale[None, :]
        total += tl.dot(inputs, level) * scale
    return total


@triton.jit
def _product(
    x: tensor,
    index: tensor,
    used: tensor,
    item: tensor,
    arena: tensor,
    tables: tensor,
    n: tensor,
    M: constexpr,
    C: constexpr,
) -> tensor:
    """Rows n [R] of a matrix of an item's expert times rows `index` [B] of the inputs, where `used`: float32 [B, R]."""
    if C.B == 1:
        row = x + tl.sum(index, axis=0) * M.row_bytes
        return _vector_product(row, item, arena, tables, n, M, C)[None, :]
    else:
        slices = tl.load(item)
        total = tl.full([C.B, C.R], 0, tl.float32)
        for c in tl.static_range(len(M.widths)):
            if slices == c + 1:  # a loop for each width, so that its planes are known and asked for ahead
                total = _block_product(x + index * M.row_bytes, used, item, arena, tables, n, c, M, C)
        return total


@triton.jit(do_not_specialize=["num_pairs"])
def _forward_kernel(
    x: tensor,
    arena: tensor,
    tables: tensor,
    work: tensor,
    out: tensor,
    num_pairs: tensor,
    FIRST: constexpr,
    SECOND: constexpr,
    NEXT: constexpr,
    C: constexpr,
) -> None:
    """out[p] = w(x[order[p]]) for the pairs p of an item and a group of rows; with SECOND silu(w(x)) * v(x), rounded
    to be inputs of NEXT."""
    item = work + 2 * num_pairs + tl.program_id(0) * (3 + len(FIRST.widths))
    first = tl.load(item + 1)
    position = first + tl.arange(0, C.B)
    used = position < first + tl.load(item + 2)
    token = tl.load(work + position, mask=used, other=0).to(tl.int64)
    position = position.to(tl.int64)
    n = tl.program_id(1) * C.R + tl.arange(0, C.R)
    result = _product(x, token, used, item, arena, tables, n, FIRST, C)
    if SECOND is None:
        target = out + position[:, None] * FIRST.rows + n[None, :]
        tl.store(target, result, mask=used[:, None] & (n < FIRST.rows)[None, :])
    else:
        result = result / (1 + tl.exp(-result)) * _product(x, token, used, item, arena, tables, n, SECOND, C)
        group = tl.program_id(1) + tl.full([C.B], 0, tl.int32)
        put_rounded(result, out + position * NEXT.row_bytes, group, used, NEXT)


@triton.jit(do_not_specialize=["num_pairs", "num_items"])
def _sum_kernel(
    h: tensor,
    arena: tensor,
    tables: tensor,
    work: tensor,
    out: tensor,
    num_pairs: tensor,
    num_items: tensor,
    M: constexpr,
    C: constexpr,
) -> None:
    """out[order[p]] += weights[p] * down(h[p]) for all pairs of a range of tokens and a block of rows.

    The program alone owns these sums and takes its items one after the other: no atomics, one order.
    """
    n = tl.program_id(0) * C.R + tl.arange(0, C.R)
    items = work + 2 * num_pairs
    starts = items + num_items * (3 + len(M.widths)) + tl.program_id(1)
    last = tl.load(starts + 1)
    for number in range(tl.load(starts), last):
        item = items + number * (3 + len(M.widths))
        first = tl.load(item + 1)
        position = first + tl.arange(0, C.B)
        used = position < first + tl.load(item + 2)
        token = tl.load(work + position, mask=used, other=0).to(tl.int64)
        weights = (work + num_pairs).to(tl.pointer_type(tl.float32))
        weight = tl.load(weights + position, mask=used, other=0)
        result = _product(h, position.to(tl.int64), used, item, arena, tables, n, M, C)
        target = out + token[:, None] * M.rows + n[None, :]
        mask = used[:, None] & (n < M.rows)[None, :]
        tl.store(target, tl.load(target, mask=mask, other=0) + weight[:, None] * result, mask=mask)
        tl.debug_barrier()  # the next item may add to the same token from another thread


_INTERPRETED = not isinstance(_dot4, triton.JITFunction)


def _check_inputs(x: Tensor, experts: PlacedExperts, cols: int) -> None:
    if x.ndim != 2 or x.shape[1] != cols or x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(f"input {tuple(x.shape)} of {x.dtype} is not contiguous float32 of {cols} columns")
    if x.device != experts.arena.device:
        raise ValueError(f"the input is on {x.device}, the experts are on {experts.arena.device}")


def _round(x: Tensor, m: _Matrix) -> Tensor:
    out = torch.empty(x.shape[0], m.row_bytes, dtype=torch.int8, device=x.device)
    step = _ROUND_NUMBERS // m.group
    _round_kernel[x.shape[0], triton.cdiv(m.groups, step)](x, out, M=m, S=step, num_warps=4, enable_fp_fusion=False)
    return out


@lru_cache
def _launch(m: _Matrix, tokens: int, rows: int) -> dict[str, Any]:
    """How programs for so many tokens and rows of a matrix are launched."""
    if tokens > 1:
        warps = 8 if tokens >= 64 or (m.trellis and m.group > 64) else 4  # registers have to hold gate's sums and up's
        return {"C": _Tile(tokens, rows, 1, False), "num_warps": warps, "num_stages": 2}
    step = min(max(_STEP_WORDS // rows, 1), triton.next_power_of_2(m.groups))
    warps = max(step * rows // 128, 1)  # a thread asks for four words
    return {"C": _Tile(1, rows, step, not _INTERPRETED), "num_warps": warps, "num_stages": 1}


def _forward(
    x: Tensor, experts: PlacedExperts, matrices: Sequence[_Matrix], then: _Matrix | None, work: Work, out: Tensor
) -> None:
    first, second = matrices[0], matrices[1] if then else None
    tables = device_tables(experts.layout, experts.arena.device)
    _forward_kernel[work.num_items, triton.cdiv(first.rows, first.group)](
        _round(x, first), experts.arena, tables, work.numbers, out, work.num_pairs,
        FIRST=first, SECOND=second, NEXT=then, **_launch(first, work.block, first.group), enable_fp_fusion=False,
    )  # fmt: skip


def products(x: Tensor, experts: PlacedExperts, matrix: int, tokens_of: Sequence[Tensor]) -> Tensor:
    """x[tokens_of[e]] @ w.T for one matrix (GATE, UP or DOWN) of every expert e, x rounded to int8, in two launches.

    x: float32 [T, K], contiguous. tokens_of[e]: int64, the tokens of expert e, on the CPU at best. Returns float32
    [P, N], one expert after the other. Raises ValueError where something does not fit.
    """
    m = _matrix(experts.layout, matrix)
    _check_inputs(x, experts, m.cols)
    work = plan_work(experts, tokens_of, None, x.shape[0])
    out = torch.empty(work.num_pairs, m.rows, device=x.device)
    if work.num_items:
        _forward(x, experts, [m], None, work, out)
    return out


def add_experts(
    x: Tensor, experts: PlacedExperts, tokens_of: Sequence[Tensor], weights_of: Sequence[Tensor], out: Tensor
) -> None:
    """Add to out[t] the sum of weight * down(silu(gate(x[t])) * up(x[t])) over the experts of token t.

    One small copy to the device and three launches. x: float32 [T, D], contiguous. tokens_of[e]: int64, the tokens of
    expert e, none twice; weights_of[e]: float32, their router weights; both on the CPU at best. out: float32 [T, D],
    contiguous. Raises ValueError where something does not fit.
    """
    gate, up, down = (_matrix(experts.layout, matrix) for matrix in (GATE, UP, DOWN))
    _check_inputs(x, experts, gate.cols)
    if out.shape != x.shape or out.dtype != torch.float32 or not out.is_contiguous() or out.device != x.device:
        raise ValueError(f"output {tuple(out.shape)} of {out.dtype} is not contiguous float32 of the input's shape")
    work = plan_work(experts, tokens_of, weights_of, x.shape[0])
    if not work.num_items:
        return
    h = torch.empty(work.num_pairs, down.row_bytes, dtype=torch.int8, device=x.device)
    _forward(x, experts, (gate, up), down, work, h)
    rows = TILE_ROWS if work.block == 1 else _SUM_ROWS
    _sum_kernel[triton.cdiv(down.rows, rows), work.num_ranges](
        h, experts.arena, device_tables(experts.layout, experts.arena.device), work.numbers, out, work.num_pairs,
        work.num_items, M=down, **_launch(down, work.block, rows),
    )  # fmt: skip
