"""Kernels and attention: what a byte of weights out of memory takes when decoding, and how fast prompts are computed.

Decoding takes the kernels' own time: what Python adds is measured apart, see overheads.py.
"""

# T tokens, D hidden, F expert inner size, N rows (outputs), K columns (inputs), H query heads, d head size

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moert.kernels.layer_step import LayerCache, LayerStep, Place, Projection
from moert.measure.bench_kernels import EXPERTS_PER_CALL, ExpertPool, random_buffer
from moert.measure.figure import Measured, Progress, measured
from moert.quant.dispatch import compiled, kernel_seconds
from moert.quant.format import KEY_BLOCK, ExpertLayout, MatrixLayout
from moert.quant.matmul import PackedMatrix, experts_ffn, linear

DEFAULT_LAYOUTS = ((2, 3, 4), (6,), (8,))  # widths of the stores that are measured where none is given
HIDDEN, INNER, GROUP = 2048, 768, 64  # those of Qwen3-30B-A3B
DENSE_SHAPE = (4096, 2048)
DENSE_BITS = 8
TOKENS = 512  # of a prompt
BUFFER_BYTES = 1 << 30  # more than any cache
SAMPLE_SECONDS = 0.15  # a sample takes at least this long
REPETITIONS = 5
HEADS, KEY_HEADS, HEAD_DIM = 32, 4, 128
DEPTH = 1024  # positions that stand before those whose attention is measured


@dataclass(frozen=True)
class ComputeFigures:
    """Figures of computing, as `moert.scheduler.profile` names them; the spread of what has several values is the
    widest.
    """

    expert_s_per_byte: dict[int, float]
    expert_spread: float
    dense_s_per_byte: Measured
    prefill_macs_per_s: dict[int, float]
    prefill_spread: float
    dense_prefill_macs_per_s: Measured
    attention_macs_per_s: Measured


def default_layouts() -> list[ExpertLayout]:
    """Experts as those of a common model, stored as `moert convert` does."""
    return [ExpertLayout(HIDDEN, INNER, GROUP, widths) for widths in DEFAULT_LAYOUTS]


def measure_compute(layouts: Sequence[ExpertLayout], progress: Progress) -> ComputeFigures:
    """Each width of `layouts`, the first that has it, and what is not an expert. Threads are those that are set."""
    decode: dict[int, Measured] = {}
    prefill: dict[int, Measured] = {}
    buffer = random_buffer(BUFFER_BYTES)
    for layout in layouts:
        for slices, width in enumerate(layout.widths, 1):
            if width not in decode:
                progress(f"kernels: experts of {width} bits")
                decode[width], prefill[width] = _expert(buffer, layout, slices)
    progress(f"kernels: dense weights of {DENSE_BITS} bits")
    dense, dense_prefill = _dense(buffer)
    del buffer
    progress("attention of a prompt")
    return ComputeFigures(
        {width: m.value for width, m in decode.items()},
        max(m.spread for m in decode.values()),
        dense,
        {width: m.value for width, m in prefill.items()},
        max(m.spread for m in prefill.values()),
        dense_prefill,
        measured(_attention()),
    )


def _expert(buffer: Tensor, layout: ExpertLayout, slices: int) -> tuple[Measured, Measured]:
    """(seconds per byte for one token, multiply-accumulates per second with many), of the first `slices` slices."""
    pool = ExpertPool(buffer, layout, slices)
    nbytes = sum(layout.slice_sizes[:slices])
    macs = sum(rows * cols for rows, cols in layout.shapes)

    def calls(tokens: int) -> Callable[[], None]:
        x = torch.randn(tokens, layout.hidden, generator=torch.Generator().manual_seed(0))
        out = torch.empty(EXPERTS_PER_CALL * tokens, layout.hidden)
        every = [torch.arange(tokens)] * EXPERTS_PER_CALL
        return lambda: experts_ffn(x, pool.take(EXPERTS_PER_CALL), every, out)

    one, many = (_seconds(calls(tokens)) for tokens in (1, TOKENS))
    return (
        measured([seconds / (EXPERTS_PER_CALL * nbytes) for seconds in one]),
        measured([EXPERTS_PER_CALL * macs * TOKENS / seconds for seconds in many]),
    )


def _dense(buffer: Tensor) -> tuple[Measured, Measured]:
    """Measure the products of 8-bit matrices."""
    layout = MatrixLayout(*DENSE_SHAPE, GROUP, (DENSE_BITS,))
    nbytes = layout.slice_bytes(0)
    matrices = [PackedMatrix(layout, (piece,)) for piece in torch.split(buffer, nbytes) if len(piece) == nbytes]
    turn = itertools.cycle(matrices)
    rows, cols = DENSE_SHAPE
    one, many = torch.randn(1, cols), torch.randn(TOKENS, cols)
    return (
        measured([seconds / nbytes for seconds in _seconds(lambda: linear(one, next(turn)))]),
        measured([rows * cols * TOKENS / seconds for seconds in _seconds(lambda: linear(many, next(turn)))]),
    )


def _seconds(call: Callable[[], object]) -> list[float]:
    """Return for each sample the mean time of a call in the compiled kernels; where torch computes, all of its time."""
    call()  # what is made at the first use
    samples = []
    for _ in range(REPETITIONS):
        count, start, busy = 0, time.perf_counter(), kernel_seconds()
        while (elapsed := time.perf_counter() - start) < SAMPLE_SECONDS or count == 0:
            call()
            count += 1
        samples.append(((kernel_seconds() - busy) if compiled() is not None else elapsed) / count)
    return samples


def _attention() -> list[float]:
    """Multiply-accumulates per second: what TOKENS tokens take longer with DEPTH positions before them."""
    more = 2 * HEADS * HEAD_DIM * TOKENS * DEPTH
    run = _torch_attention if compiled() is None else _compiled_attention()
    samples = []
    for _ in range(REPETITIONS + 1):  # the first is slower
        deep, flat = _time(run, DEPTH), _time(run, 0)
        samples.append(more / max(deep - flat, deep / 100))
    return samples[1:]


def _time(run: Callable[[int], object], depth: int) -> float:
    start = time.perf_counter()
    run(depth)
    return time.perf_counter() - start


def _torch_attention(depth: int) -> None:
    """Compute attention where torch computes it."""
    q = torch.ones(1, HEADS, TOKENS, HEAD_DIM)
    keys = torch.ones(1, KEY_HEADS, depth + TOKENS, HEAD_DIM)
    functional.scaled_dot_product_attention(q, keys, keys, enable_gqa=True)


def _compiled_attention() -> Callable[[int], None]:
    """A layer's step with projections so small that they do not matter."""
    hidden = GROUP
    q, k = HEADS * HEAD_DIM, KEY_HEADS * HEAD_DIM
    shapes = ((q, hidden), (k, hidden), (k, hidden), (hidden, q))
    q_proj, k_proj, v_proj, o_proj = (Projection(_random_matrix(rows, cols)) for rows, cols in shapes)
    norm = torch.ones(hidden)
    step = LayerStep((norm, norm), 1e-6, HEAD_DIM, (q_proj, k_proj, v_proj, o_proj), None, None, None)
    positions = DEPTH + TOKENS
    keys = torch.zeros(KEY_HEADS, positions // KEY_BLOCK, HEAD_DIM, KEY_BLOCK, dtype=torch.float16)
    values = torch.zeros(KEY_HEADS, positions, HEAD_DIM, dtype=torch.float16)
    cache = LayerCache(keys, values, None)
    rotation = torch.ones(TOKENS, HEAD_DIM // 2), torch.zeros(TOKENS, HEAD_DIM // 2)
    x = torch.randn(TOKENS, hidden)

    def run(depth: int) -> None:
        step.many(x.clone(), [(cache, Place(rotation, depth, None))])

    return run


def _random_matrix(rows: int, cols: int) -> PackedMatrix:
    layout = MatrixLayout(rows, cols, GROUP, (DENSE_BITS,))
    return PackedMatrix(layout, (random_buffer(layout.slice_bytes(0)).clone(),))
