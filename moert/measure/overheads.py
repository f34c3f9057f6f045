"""Measure what a decoded token takes beside kernels and waiting for the disk: Python, and threads that are woken.

Measured on a store of large experts if one is given, else on the model that ships. That one is small, so everything it
needs stays in the processor's caches, where nothing of Python stays beside the weights of a large one: before and after
the experts of every layer the caches are filled with something else, and the time that this takes is left out.
"""

# L layers, K experts per token

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from moert.api import LLM
from moert.config import EngineConfig, format_bytes, parse_bytes
from moert.engine.model_runner import ModelRunner
from moert.errors import ProfileError
from moert.hardware.memory import available_bytes
from moert.measure.figure import Measured, Progress, measured
from moert.models.stored_model import StoredModel as Store
from moert.quant.dispatch import kernel_seconds
from moert.runtime.timeline import Spans

TOKENS = 120  # decoded with a small model, for each share of the experts that is in memory
SHARES = (0.85, 0.6, 0.35)
LARGE_TOKENS = 40  # with a large one, all in memory
LARGE_READS = 2_000_000_000  # bytes that it may read besides, about
LARGE_EXPERT = 1 << 20  # bytes from which on an expert is large
ANSWERS, ANSWER_TOKENS = 4, 100
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
MOST_CACHED = 32 << 20  # of the cache that all cores of a machine, and its other guests, share
SWEEP_BYTES = 8 << 20  # more than a core has for itself
_PARTS = 3  # of what was measured, for which everything is worked out apart: gives the spread
_KEPT = 0.85  # share of it that counts: the rest was interrupted by something else

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Overheads:
    """Seconds: of a token, of each layer, of a layer in which something is missing, of each read. model: for people."""

    token_s: Measured
    layer_s: Measured
    miss_s: Measured
    load_s: Measured
    model: str


class _Sweeper(Spans):
    """Notes when the experts of each layer are asked for, and fills the caches there and where something was computed.

    nbytes: 0 to leave the caches alone. swept_s: what that took. marks: of each layer, the time beside sweeps and
    kernels.
    """

    def __init__(self, nbytes: int) -> None:
        self._other = np.ones(nbytes // 8)
        self.begin()

    def begin(self) -> None:
        self.swept_s = 0.0
        self.marks: list[float] = []

    def _sweep(self) -> None:
        if len(self._other):
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

    def device(self, name: str, begin: float, end: float) -> None:
        pass

    def move(self, name: str, begin: float, end: float) -> None:
        pass


def measure_overheads(store: Store, shipped: Store, threads: int, progress: Progress) -> Overheads:
    """Decode with `store` where its experts are large and those of three tokens fit into memory, else with `shipped`.

    Raises ProfileError where that does not tell what costs how much.
    """
    found = _of_large(store, threads, progress) or _of_small(shipped, threads, progress)
    if found is None:
        raise ProfileError(f"Decoding with {shipped.path} did not give what it takes to tell costs apart: try again.")
    return found


def _of_large(store: Store, threads: int, progress: Progress) -> Overheads | None:
    touched = len(store.moe_layers) * store.architecture.top_k * sum(store.layout.slice_sizes)
    arena = min(3 * touched, store.experts_bytes(store.layout.num_slices))
    if sum(store.layout.slice_sizes) < LARGE_EXPERT or store.dense_bytes + arena > available_bytes() // 2:
        return None
    vocabulary = range(store.architecture.vocab_size)
    draw = random.Random(0)
    with _decoding(store, threads, arena, sweep=0) as run:
        same = [draw.choice(vocabulary)] * LARGE_TOKENS  # which has nearly all of its experts in memory from then on
        resident = run.decode(same, progress, "all in memory")
        others = draw.choices(vocabulary, k=max(LARGE_READS // touched, 8))
        missing = run.decode(others, progress, "some experts in memory")
    return _overheads(resident, [missing], store)


def measure_cached(shipped: Store, threads: int, progress: Progress) -> tuple[int, Measured, Overheads] | None:
    """Return the bytes that stay in the processor's caches, seconds per byte of weights there, and overheads beside
    them.

    None where the system does not say how large its caches are, or the model that ships does not fit.
    """
    sizes = [_cache_bytes(path.read_text()) for path in CACHES.glob("index*/size")]
    held, layout = shipped.dense_bytes + shipped.experts_bytes(shipped.layout.num_slices), shipped.layout
    if max(sizes, default=0) < 2 * held:
        return None
    found = _of_small(shipped, threads, progress, sweep=0)
    with _decoding(shipped, threads, held, sweep=0) as run:
        seconds = [run.kernel_s(progress) for _ in range(_PARTS + 1)][1:]
    experts = len(shipped.moe_layers) * shipped.architecture.top_k * sum(layout.slice_sizes)
    cost = measured([s / (shipped.dense_bytes + experts) for s in seconds])
    return None if found is None else (min(max(sizes), MOST_CACHED), cost, found)


def _cache_bytes(text: str) -> int:
    """`2048K` of the system's description of a cache."""
    return parse_bytes(text.strip(), "cache")


def _of_small(store: Store, threads: int, progress: Progress, sweep: int = SWEEP_BYTES) -> Overheads | None:
    every, one = store.experts_bytes(store.layout.num_slices), sum(store.layout.slice_sizes)
    ids = random.Random(0).choices(range(store.architecture.vocab_size), k=TOKENS)
    with _decoding(store, threads, every, sweep) as run:
        resident = run.decode(ids, progress, "all in memory")
    missing = []
    for share in SHARES:
        with _decoding(store, threads, max(int(share * every), one), sweep) as run:
            missing.append(run.decode(ids, progress, f"{share:.0%} of the experts in memory"))
    return _overheads(resident, missing, store)


def measure_answer(threads: int, progress: Progress) -> Measured:
    """Seconds of a token of an answer beside decoding it: choosing it, its text, the figures of the answer."""
    progress("answering")
    times = []
    with LLM(threads=threads) as llm:
        params = llm.default_params.replace(max_tokens=ANSWER_TOKENS, ignore_eos=True, seed=0)
        prompt = llm.tokenizer.encode("import")
        for _ in range(ANSWERS):
            done = llm.generate("import", params)[0]
            decoding = llm.call(lambda runner: _decoding_s(runner, prompt, done.token_ids[:-1]))  # noqa: B023
            times.append(max(1 / (done.stats.decode_tokens_per_s or 1.0) - decoding, 0.0))
    return measured(times[1:])  # the first has experts to read


def _decoding_s(runner: ModelRunner, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Seconds that each of `tokens` takes behind a prompt."""
    runner.rewind(0)
    runner.forward(prompt)
    start = time.perf_counter()
    for token in tokens:
        runner.forward([token])
    return (time.perf_counter() - start) / len(tokens)


@dataclass(frozen=True)
class _Decoded:
    """tokens: of each token without reads, its seconds. layers [n, 2]: of layers, seconds and reads."""

    tokens: Array
    layers: Array


def _overheads(resident: _Decoded, missing: Sequence[_Decoded], store: Store) -> Overheads | None:
    """Work out the overheads; None where there is too little to go by."""
    hits = resident.layers[resident.layers[:, 1] == 0]
    misses = np.concatenate([run.layers[run.layers[:, 1] > 0] for run in missing])
    if len(resident.tokens) < _PARTS or len(hits) < _PARTS or len(misses) < _PARTS:
        return None
    parts = [slice(number, None, _PARTS) for number in range(_PARTS)]
    layer = [float(np.median(hits[part, 0])) for part in parts]
    L = store.architecture.num_layers
    token = [max(float(np.median(resident.tokens[p])) - L * of, 0.0) for p, of in zip(parts, layer, strict=True)]
    beside = float(np.median(hits[:, 0]))
    fits = [fit(misses[part, 1], misses[part, 0] - beside) for part in parts]
    miss, load = ([found[i] for found in fits] for i in (0, 1))
    model = f"a model of {L} layers with experts of {format_bytes(sum(store.layout.slice_sizes))}"
    return Overheads(measured(token), measured(layer), measured(miss), measured(load), model)


def fit(reads: Array, seconds: Array) -> tuple[float, float]:
    """Fit the seconds of layers with reads: seconds once and seconds for each read, neither below zero.

    Least squares; what is far from the line is left out, one round after the other.
    """
    for _ in range(3):
        once, each = 0.0, 0.0
        if np.ptp(reads) > 0:
            each, once = (float(value) for value in np.polyfit(reads, seconds, 1))
        if np.ptp(reads) == 0 or each < 0:
            once, each = float(np.mean(seconds)), 0.0
        elif once < 0:
            once, each = 0.0, float(reads @ seconds) / float(reads @ reads)
        away = np.abs(seconds - once - each * reads)
        near = away <= np.quantile(away, _KEPT)
        reads, seconds = reads[near], seconds[near]
    return max(once, 0.0), max(each, 0.0)


class _Run:
    """A model that decodes one token after the other."""

    def __init__(self, runner: ModelRunner, sweeper: _Sweeper) -> None:
        self._runner, self._sweeper = runner, sweeper

    def kernel_s(self, progress: Progress) -> float:
        """Seconds in kernels for a token."""
        progress("decoding: kernels in the caches")
        busy = kernel_seconds()
        for _ in range(TOKENS):
            self._runner.forward([0])
        return (kernel_seconds() - busy) / TOKENS

    def decode(self, ids: Sequence[int], progress: Progress, what: str) -> _Decoded:
        runner, sweeper = self._runner, self._sweeper
        tokens: list[float] = []
        layers: list[tuple[float, int]] = []
        for number, token in enumerate(ids):
            progress(f"decoding: {what}, {number} of {len(ids)} tokens")
            before = {layer: counters.copy() for layer, counters in runner.layer_counters(True).items()}
            sweeper.begin()
            start, busy = time.perf_counter(), kernel_seconds()
            runner.forward([token])
            seconds = time.perf_counter() - start - (kernel_seconds() - busy) - sweeper.swept_s
            counts = [c.since(before[layer]) for layer, c in runner.layer_counters(True).items()]
            reads = [c.reads for c in counts]
            if not any(reads):
                tokens.append(seconds)
            # From a layer's experts to those of the next: the last one has none behind it.
            between = np.diff(sweeper.marks) - [c.waited_s for c in counts[:-1]]
            layers += zip(between.tolist(), reads, strict=False)
        return _Decoded(np.array(tokens), np.array(layers, dtype=np.float64).reshape(-1, 2))


@contextmanager
def _decoding(store: Store, threads: int, arena: int, sweep: int) -> Iterator[_Run]:
    """Runs with so many bytes of experts in memory; the first tokens are decoded already."""
    context = 64 + (_PARTS + 2) * max(TOKENS, LARGE_TOKENS)
    config = EngineConfig(expert_budget=arena, ctx_size=context, threads=threads, prefetch="off", device="cpu")
    runner = ModelRunner(store, config, lambda text: None)
    try:
        runner.preload()
        for token in random.Random(1).choices(range(store.architecture.vocab_size), k=4):
            runner.forward([token])
        sweeper = _Sweeper(sweep)
        runner.draw(sweeper)
        yield _Run(runner, sweeper)
    finally:
        runner.close()
