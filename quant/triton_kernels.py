"""Triton kernels for nested-bit experts in device memory: GEMV, grouped GEMM and the whole expert feed-forward.

They read the bytes of `format.py` where they lie: experts are offsets into one arena, and in one launch each expert is
used with as many of its slices as it has there. Activations stay in their float16, bfloat16 or float32 (nothing is
rounded to int8 as the CPU kernels do: on a GPU that would save no bytes that matter) and are summed in float32. The
codes less their midpoint are half-integers below 128, exact in all three dtypes, so that only the activations are
rounded, by their dtype: x by the caller, the product of gate and up once more between the two launches.

Sums have a fixed order (no atomics), so the same call gives the same bits. None of it has run on a device, and the
sizes of blocks are guesses. Importing this module needs triton 3.4; with TRITON_INTERPRET=1, set before triton 3.7 is
imported, all of it runs on the CPU. Raw weights are not for it: torch multiplies those.
"""

# T tokens, P pairs of a token and an expert, E experts, S slices, N rows (outputs), K columns (inputs), G group size,
# D hidden, F expert inner size

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moert.quant.format import TILE_ROWS
from moert.quant.matmul import placed_planes
from moert.quant.placed import PlacedExperts, Work, plan_work

GATE, UP, DOWN = range(3)

_VECTOR_STEP = 512  # columns that a product with a vector takes at once
_GEMM_ROWS = 2 * TILE_ROWS
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _codes(word: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """The codes of the columns that 32-bit words [chunks, rows] of a plane hold: int32 [chunks, columns, rows]."""
    lane = tl.arange(0, 32 // BITS)
    shift = lane % 4 * 8 + lane // 4 * BITS
    return (word[:, None, :] >> shift[None, :, None]) & ((1 << BITS) - 1)


@triton.jit
def _vector_plane(
    x: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    tile: tl.tensor,
    STRIDE: tl.constexpr,
    BITS: tl.constexpr,
    COLS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
) -> tl.tensor:
    """What a plane, taken alone and about its own midpoint, makes of x [K]: float32 [16], without its shift.

    The midpoints of the planes, shifted, add up to that of the code, so that planes need not meet before the sum.
    """
    SPAN: tl.constexpr = 32 // BITS
    CHUNKS: tl.constexpr = GROUP // SPAN
    row = tl.arange(0, 16)
    total = tl.zeros([STEP // SPAN, 16], tl.float32)
    for first in range(0, GROUPS * CHUNKS, STEP // SPAN):
        chunk = first + tl.arange(0, STEP // SPAN)
        there = (chunk < GROUPS * CHUNKS)[:, None]
        cell = tile * GROUPS + chunk // CHUNKS
        at = cell * (STRIDE // 4) + chunk % CHUNKS * 16
        word = tl.load(words + at[:, None] + row[None, :], mask=there, other=0)
        k = chunk[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
        inputs = tl.load(x + k, mask=k < COLS, other=0).to(tl.float32)
        level = _codes(word, BITS).to(tl.float32) - ((1 << BITS) - 1) / 2
        scale = tl.load(scales + cell[:, None] * 16 + row[None, :], mask=there, other=0).to(tl.float32)
        total += tl.sum(level * inputs[:, :, None], axis=1) * scale
    return tl.sum(total, axis=0)


@triton.jit
def _product(
    x: tl.tensor,
    index: tl.tensor,
    used: tl.tensor,
    words: tl.tensor,
    halves: tl.tensor,
    entry: tl.tensor,
    block: tl.tensor,
    STARTS: tl.constexpr,
    PLANES: tl.constexpr,
    SCALES: tl.constexpr,
    WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STEP: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """Rows of a matrix times rows `index` of x where `used`: float32 [BLOCK, BLOCK_ROWS].

    entry: the expert's line of the table. STARTS: where the matrix begins in each slice; SCALES: its scales from there.
    PLANES: slice, offset from there, stride, bits and shift at the largest width of each plane.
    """
    n = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    there = n < ROWS
    slices = tl.load(entry)
    total = tl.zeros([BLOCK, BLOCK_ROWS], tl.float32)
    for c in tl.static_range(len(WIDTHS)):
        if slices == c + 1:  # a loop for each width, so that its planes are known; a whole program takes the same one
            scales = halves + (tl.load(entry + 1 + c) + (STARTS[c] + SCALES[c])) // 2
            if BLOCK == 1:
                one = tl.zeros([BLOCK_ROWS], tl.float32)
                v = x + tl.sum(index, axis=0) * COLS
                for p in tl.static_range(len(PLANES) // 5):
                    if PLANES[5 * p] <= c:
                        at = tl.load(entry + 1 + PLANES[5 * p]) + (STARTS[PLANES[5 * p]] + PLANES[5 * p + 1])
                        part = _vector_plane(
                            v,
                            words + tl.multiple_of(at // 4, 16),
                            scales,
                            block,
                            PLANES[5 * p + 2],
                            PLANES[5 * p + 3],
                            COLS,
                            GROUPS,
                            GROUP,
                            STEP,
                        )
                        one += part * (1 << (PLANES[5 * p + 4] - (WIDTHS[len(WIDTHS) - 1] - WIDTHS[c])))
                total = one[None, :]
            else:
                for group in range(GROUPS):
                    cell = n // 16 * GROUPS + group
                    code = tl.zeros([GROUP, BLOCK_ROWS], tl.int32)
                    for p in tl.static_range(len(PLANES) // 5):
                        if PLANES[5 * p] <= c:
                            at = tl.load(entry + 1 + PLANES[5 * p]) + (STARTS[PLANES[5 * p]] + PLANES[5 * p + 1])
                            inner = tl.arange(0, GROUP * PLANES[5 * p + 3] // 32)[:, None] * 16 + (n % 16)[None, :]
                            line = words + tl.multiple_of(at // 4, 16) + (cell * (PLANES[5 * p + 2] // 4))[None, :]
                            word = tl.load(line + inner, mask=there[None, :], other=0)
                            codes = tl.reshape(_codes(word, PLANES[5 * p + 3]), [GROUP, BLOCK_ROWS])
                            code += codes << (PLANES[5 * p + 4] - (WIDTHS[len(WIDTHS) - 1] - WIDTHS[c]))
                    level = (code.to(tl.float32) - ((1 << WIDTHS[c]) - 1) / 2).to(DOT)
                    k = group * GROUP + tl.arange(0, GROUP)
                    mask = used[:, None] & (k < COLS)[None, :]
                    inputs = tl.load(x + index[:, None] * COLS + k[None, :], mask=mask, other=0).to(DOT)
                    scale = tl.load(scales + cell * 16 + n % 16, mask=there, other=0).to(tl.float32)
                    total += tl.dot(inputs, level, input_precision="ieee") * scale[None, :]
    return total


@triton.jit
def _forward_kernel(
    x: tl.tensor,
    words: tl.tensor,
    halves: tl.tensor,
    table: tl.tensor,
    items: tl.tensor,
    order: tl.tensor,
    out: tl.tensor,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    PLANES: tl.constexpr,
    SCALES: tl.constexpr,
    WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STEP: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """out[p] = w(x[order[p]]), or with SECOND silu(w(x)) * v(x), for the pairs p of an item and a block of rows."""
    item = items + 3 * tl.program_id(0)
    block = tl.program_id(1)
    first = tl.load(item + 1)
    position = first + tl.arange(0, BLOCK)
    used = position < first + tl.load(item + 2)
    token = tl.load(order + position, mask=used, other=0).to(tl.int64)
    entry = table + tl.load(item) * (len(WIDTHS) + 1)
    result = _product(
        x,
        token,
        used,
        words,
        halves,
        entry,
        block,
        FIRST,
        PLANES,
        SCALES,
        WIDTHS,
        ROWS,
        COLS,
        GROUPS,
        GROUP,
        BLOCK,
        BLOCK_ROWS,
        STEP,
        DOT,
    )
    if SECOND is not None:
        other = _product(
            x,
            token,
            used,
            words,
            halves,
            entry,
            block,
            SECOND,
            PLANES,
            SCALES,
            WIDTHS,
            ROWS,
            COLS,
            GROUPS,
            GROUP,
            BLOCK,
            BLOCK_ROWS,
            STEP,
            DOT,
        )
        result = result * tl.sigmoid(result) * other
    n = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    target = out + position.to(tl.int64)[:, None] * ROWS + n[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=used[:, None] & (n < ROWS)[None, :])


@triton.jit
def _sum_kernel(
    h: tl.tensor,
    words: tl.tensor,
    halves: tl.tensor,
    table: tl.tensor,
    items: tl.tensor,
    starts: tl.tensor,
    order: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    STARTS: tl.constexpr,
    PLANES: tl.constexpr,
    SCALES: tl.constexpr,
    WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STEP: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """out[order[p]] += weights[p] * down(h[p]) for all pairs of a range of tokens and a block of rows.

    The program alone owns these sums and takes its items one after the other: no atomics, one order.
    """
    block = tl.program_id(0)
    n = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    last = tl.load(starts + tl.program_id(1) + 1)
    for number in range(tl.load(starts + tl.program_id(1)), last):
        item = items + 3 * number
        first = tl.load(item + 1)
        position = first + tl.arange(0, BLOCK)
        used = position < first + tl.load(item + 2)
        entry = table + tl.load(item) * (len(WIDTHS) + 1)
        result = _product(
            h,
            position.to(tl.int64),
            used,
            words,
            halves,
            entry,
            block,
            STARTS,
            PLANES,
            SCALES,
            WIDTHS,
            ROWS,
            COLS,
            GROUPS,
            GROUP,
            BLOCK,
            BLOCK_ROWS,
            STEP,
            DOT,
        )
        token = tl.load(order + position, mask=used, other=0).to(tl.int64)
        weight = tl.load(weights + position, mask=used, other=0)
        target = out + token[:, None] * ROWS + n[None, :]
        mask = used[:, None] & (n < ROWS)[None, :]
        tl.store(target, tl.load(target, mask=mask, other=0) + weight[:, None] * result, mask=mask)
        tl.debug_barrier()  # the next item may add to the same token from another thread


def _check_inputs(x: Tensor, experts: PlacedExperts, cols: int) -> None:
    if x.ndim != 2 or x.shape[1] != cols or x.dtype not in _DTYPES or not x.is_contiguous():
        raise ValueError(f"input {tuple(x.shape)} of {x.dtype} is not contiguous floats of {cols} columns")
    if x.device != experts.arena.device:
        raise ValueError(f"the input is on {x.device}, the experts are on {experts.arena.device}")


def _constants(experts: PlacedExperts, matrix: int, work: Work, dtype: torch.dtype) -> dict[str, Any]:
    layout = experts.layout.matrices[matrix]
    # The interpreter computes with numpy, which has no bfloat16; what it gets instead holds the same values.
    upcast = dtype == torch.float32 or not isinstance(_codes, triton.JITFunction)
    planes, *_ = placed_planes(layout, [(index, 0) for index in range(len(layout.widths))])
    return {
        "PLANES": tuple(number for plane in planes for number in plane),
        "SCALES": tuple(layout.codes_bytes(index) for index in range(len(layout.widths))),
        "WIDTHS": experts.layout.widths,
        "ROWS": layout.rows,
        "COLS": layout.cols,
        "GROUPS": layout.groups,
        "GROUP": layout.group_size,
        "BLOCK": work.block,
        "BLOCK_ROWS": TILE_ROWS if work.block == 1 else _GEMM_ROWS,
        "STEP": min(_VECTOR_STEP, triton.next_power_of_2(layout.groups * layout.group_size)),
        "DOT": tl.float32 if upcast else tl.bfloat16 if dtype == torch.bfloat16 else tl.float16,
    }


def _forward(x: Tensor, experts: PlacedExperts, first: int, second: int | None, work: Work, out: Tensor) -> None:
    constants = _constants(experts, first, work, x.dtype)
    grid = (work.num_items, triton.cdiv(constants["ROWS"], constants["BLOCK_ROWS"]))
    arena = experts.arena
    _forward_kernel[grid](
        x,
        arena.view(torch.int32),
        arena.view(torch.float16),
        experts.table,
        work.items,
        work.order,
        out,
        FIRST=experts.starts(first),
        SECOND=None if second is None else experts.starts(second),
        **constants,
    )


def products(x: Tensor, experts: PlacedExperts, matrix: int, tokens_of: Sequence[Tensor]) -> Tensor:
    """x[tokens_of[e]] @ w.T for one matrix (GATE, UP or DOWN) of every expert e, in one launch.

    x: float16, bfloat16 or float32 [T, K], contiguous. tokens_of[e]: int64, the tokens of expert e, on the CPU at
    best. Returns float32 [P, N], one expert after the other. Raises ValueError where something does not fit.
    """
    rows, cols = experts.layout.shapes[matrix]
    _check_inputs(x, experts, cols)
    work = plan_work(experts, tokens_of, None, x.shape[0])
    out = torch.empty(sum(map(len, tokens_of)), rows, device=x.device)
    if work.num_items:
        _forward(x, experts, matrix, None, work, out)
    return out


def add_experts(
    x: Tensor, experts: PlacedExperts, tokens_of: Sequence[Tensor], weights_of: Sequence[Tensor], out: Tensor
) -> None:
    """Add to out[t] the sum of weight * down(silu(gate(x[t])) * up(x[t])) over the experts of token t: two launches.

    x: float16, bfloat16 or float32 [T, D], contiguous; so is what lies between the launches. tokens_of[e]: int64, the
    tokens of expert e, none twice; weights_of[e]: float, their router weights; both on the CPU at best. out: float32
    [T, D], contiguous. Raises ValueError where something does not fit.
    """
    hidden, inner = experts.layout.hidden, experts.layout.inner
    _check_inputs(x, experts, hidden)
    if out.shape != x.shape or out.dtype != torch.float32 or not out.is_contiguous() or out.device != x.device:
        raise ValueError(f"output {tuple(out.shape)} of {out.dtype} is not contiguous float32 of the input's shape")
    work = plan_work(experts, tokens_of, weights_of, x.shape[0])
    if not work.num_items:
        return
    h = torch.empty(sum(map(len, tokens_of)), inner, dtype=x.dtype, device=x.device)
    _forward(x, experts, GATE, UP, work, h)
    constants = _constants(experts, DOWN, work, x.dtype)
    arena = experts.arena
    _sum_kernel[triton.cdiv(hidden, constants["BLOCK_ROWS"]), work.num_ranges](
        h,
        arena.view(torch.int32),
        arena.view(torch.float16),
        experts.table,
        work.items,
        work.starts,
        work.order,
        work.weights,
        out,
        STARTS=experts.starts(DOWN),
        **constants,
    )
