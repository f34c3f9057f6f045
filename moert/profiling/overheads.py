"""What a decoded token takes beside kernels and waiting for the disk: Python, measured on the model that ships.

That model is small, so everything it needs stays in the processor's caches, where nothing of Python stays beside the
weights of a large one. So before and after the experts of every layer the caches are filled with something else, and
the time that this takes is left out.
"""

# L layers

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moert.config import EngineConfig
from moert.engine import Engine
from moert.errors import ProfileError
from moert.profiling.figure import Measured, Progress, measured
from moert.quant.dispatch import kernel_seconds
from moert.runtime.timeline import Spans
from moert.store.reader import Store

SHARES = (0.85, 0.6, 0.35)  # of the experts' bytes that are in memory
TOKENS = 150  # decoded for each of these
SWEEP_BYTES = 8 << 20  # more than a core has for itself
_PARTS = 3  # of the tokens, for which everything is worked out apart: gives the spread
_KEPT = 0.85  # share of the tokens that count: others were interrupted by something else


@dataclass(frozen=True)
class Overheads:
    """Seconds: of a token, of each layer, of a layer in which something is missing, of each read."""

    token_s: Measured
    layer_s: Measured
    miss_s: Measured
    load_s: Measured


class _Sweeper(Spans):
    """Fills the caches wherever the runtime says what it has done. swept_s: what that took. marks: of each layer of a
    step, when its experts were asked for, less what was swept until then, and the kernels' time by then."""

    def __init__(self) -> None:
        self._other = np.ones(max(SWEEP_BYTES // 8, 1))
        self.begin()

    def begin(self) -> None:
        self.swept_s = 0.0
        self.marks: list[float] = []

    def _sweep(self) -> None:
        before = time.perf_counter()
        self._other.sum()
        self.swept_s += time.perf_counter() - before

    @contextmanager
    def step(self, count: int, first: int | None) -> Iterator[None]:
        yield

    def dense(self, name: str, end: float) -> None:
        self.marks.append(end - self.swept_s - kernel_seconds())
        self._sweep()

    def compute(self, name: str, begin: float, end: float) -> None:
        self._sweep()

    def read(self, name: str, begin: float, end: float, nbytes: int, ahead: bool) -> None:
        pass


def measure_overheads(store: Store, threads: int, progress: Progress) -> Overheads:
    """Decode with `store`, a small model. Raises ProfileError where the model has too few layers or experts."""
    if len(store.moe_layers) < 2 or store.num_experts < 2:
        raise ProfileError(f"{store.path} has too few layers with experts to measure what a layer takes.")
    tokens, layers = _resident(store, threads, progress)
    L = store.architecture.num_layers
    parts = [slice(number, None, _PARTS) for number in range(_PARTS)]
    layer = [float(np.median(layers[part])) for part in parts]
    token = [max(float(np.median(tokens[part])) - L * of, 0.0) for part, of in zip(parts, layer, strict=True)]
    rows = np.concatenate([_missing(store, threads, share, progress) for share in SHARES])
    fits = [_fit(rows[part], float(np.median(tokens))) for part in parts]
    miss, load = ([fit[i] for fit in fits] for i in (0, 1))
    return Overheads(measured(token), measured(layer), measured(miss), measured(load))


def _fit(rows: NDArray[np.float64], resident_s: float) -> tuple[float, float]:
    """Seconds of a layer with a miss and of a read: least squares over tokens [n, 3], neither below zero.

    rows: seconds, layers with a miss, reads. Tokens far from the fit are left out, one round after the other.
    """
    seconds, causes = rows[:, 0] - resident_s, rows[:, 1:]
    for _ in range(3):
        found = np.linalg.lstsq(causes, seconds, rcond=None)[0]
        if min(found) < 0:  # one cause explains all
            cause = int(np.argmax(found))
            weight = causes[:, cause]
            found = np.zeros(2)
            found[cause] = max(float(weight @ seconds) / max(float(weight @ weight), 1e-9), 0.0)
        away = np.abs(seconds - causes @ found)
        near = away <= np.quantile(away, _KEPT)
        seconds, causes = seconds[near], causes[near]
    return float(found[0]), float(found[1])


def _resident(store: Store, threads: int, progress: Progress) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Everything in memory: seconds of each token, and of one layer in the middle of it, beside the kernels."""
    with _decoding(store, threads, None) as (engine, sweeper):
        tokens, layers = [], []
        for number, token in enumerate(_ids(store)):
            _say(progress, "all in memory", number)
            tokens.append(_forward(engine, sweeper, token))
            layers.append(float(np.median(np.diff(sweeper.marks))))
        return np.array(tokens), np.array(layers)


def _missing(store: Store, threads: int, share: float, progress: Progress) -> NDArray[np.float64]:
    """Some experts in memory: [n, 3], of each token seconds, layers with a miss, reads."""
    with _decoding(store, threads, share) as (engine, sweeper):
        rows = []
        for number, token in enumerate(_ids(store)):
            _say(progress, f"{share:.0%} of the experts in memory", number)
            before = {layer: counters.copy() for layer, counters in engine.layer_counters(True).items()}
            seconds = _forward(engine, sweeper, token)
            counts = [c.since(before[layer]) for layer, c in engine.layer_counters(True).items()]
            seconds -= sum(c.waited_s for c in counts)
            rows.append((seconds, sum(c.reads > 0 for c in counts), sum(c.reads for c in counts)))
        return np.array(rows, dtype=np.float64)


def _say(progress: Progress, what: str, number: int) -> None:
    if number % 50 == 0:
        progress(f"decoding: {what}, {number} of {TOKENS} tokens")


def _ids(store: Store) -> list[int]:
    return random.Random(0).choices(range(store.architecture.vocab_size), k=TOKENS)


def _forward(engine: Engine, sweeper: _Sweeper, token: int) -> float:
    """Seconds beside kernels and sweeps."""
    sweeper.begin()
    start, busy = time.perf_counter(), kernel_seconds()
    engine.forward([token])
    return time.perf_counter() - start - (kernel_seconds() - busy) - sweeper.swept_s


@contextmanager
def _decoding(store: Store, threads: int, share: float | None) -> Iterator[tuple[Engine, _Sweeper]]:
    """An engine that has decoded a few tokens, with this share of the experts' bytes in memory; None: all."""
    every = store.experts_bytes(store.layout.num_slices)
    budget = None if share is None else max(int(every * share), sum(store.layout.slice_sizes))
    config = EngineConfig(expert_budget=budget or every, ctx_size=TOKENS + 64, threads=threads, prefetch="off")
    engine = Engine(store, config, lambda text: None)
    try:
        engine.preload()
        for token in _ids(store)[:32]:
            engine.forward([token])
        sweeper = _Sweeper()
        engine.draw(sweeper)
        yield engine, sweeper
    finally:
        engine.close()
