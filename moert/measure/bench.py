"""Measures a loaded model: prefill (`pp512`) and decode (`tg128`), in time and in bytes that had to be touched.

Prints nothing, and does not know how rows are shown.
"""

# T tokens, L layers, S positions seen

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from moert.config import PREFILL_CHUNK
from moert.engine.model_runner import ModelRunner
from moert.errors import UsageError
from moert.measure.bench_kernels import expert_bytes, load_average, matrix_bytes, timestamp
from moert.models.architecture import Architecture
from moert.models.stored_model import StoredModel as Store
from moert.quant.dispatch import Kernel, kernel_name, kernel_seconds
from moert.quant.format import TILE_ROWS, align
from moert.runtime.telemetry import Counters, peak_rss_bytes
from moert.store.layout import EMBEDDING, HEAD, DenseTensor

SEED = 1234


@dataclass(frozen=True, slots=True)
class Case:
    """The measurement that one row shows: `n_prompt` tokens in one call or `n_gen` one at a time (the other is 0),
    behind `n_depth` tokens that are there already.
    """

    n_prompt: int
    n_gen: int
    n_depth: int

    @property
    def name(self) -> str:
        """Return the name of the test as llama-bench writes it: `pp512`, `tg128 @ d4096`."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name

    @property
    def n_tokens(self) -> int:
        """Tokens that are timed."""
        return self.n_prompt + self.n_gen

    @property
    def needed(self) -> int:
        """Context that it needs."""
        return self.n_depth + self.n_tokens

    def steps(self) -> list[tuple[int, int]]:
        """The timed forward passes: (tokens before, tokens of the pass)."""
        end, step = self.needed, PREFILL_CHUNK if self.n_prompt else 1
        return [(past, min(step, end - past)) for past in range(self.n_depth, end, step)]


def make_cases(prompts: Sequence[int], gens: Sequence[int], depths: Sequence[int]) -> list[Case]:
    """Every combination, all rows of one depth together; a 0 drops its row. UsageError where nothing is left."""
    if any(n < 0 for n in (*prompts, *gens, *depths)):
        raise UsageError("The numbers of tokens (-p, -n) and depths (-d) must not be negative.")
    cases = [
        case
        for depth in depths
        for case in [*(Case(p, 0, depth) for p in prompts), *(Case(0, n, depth) for n in gens)]
        if case.n_tokens
    ]
    if not cases:
        raise UsageError("There is nothing to measure: give -p or -n a number of tokens above 0.")
    return list(dict.fromkeys(cases))


class Tokens:
    """The tokens that are fed: drawn at random from the whole vocabulary, or those of a real text.

    Decoding feeds them too, whatever the model would have said: routing is that of the text, and no end token ends it.
    """

    def __init__(self, vocab_size: int, text: Sequence[int] | None = None) -> None:
        self._vocab_size, self._text = vocab_size, text

    @property
    def origin(self) -> str:
        return "random" if self._text is None else "prompt"

    def check(self, needed: int) -> None:
        """UsageError for a text that is too short: repeating it would make its routing unreal."""
        if self._text is not None and len(self._text) < needed:
            raise UsageError(
                f"The prompt file holds {len(self._text)} tokens, but {needed} are needed: "
                "give a longer one, or smaller -p, -n and -d."
            )

    def depth(self, count: int) -> list[int]:
        """The `count` tokens that stand before what is timed."""
        return list(self._text[:count]) if self._text is not None else self._draw("depth", count)

    def timed(self, case: Case, repetition: int) -> list[int]:
        """The timed tokens, others in each repetition (so far as the text is long enough)."""
        if self._text is None:
            return self._draw(f"{case.name} {repetition}", case.n_tokens)
        start = case.n_depth + repetition * case.n_tokens % (len(self._text) - case.needed + 1)
        return list(self._text[start : start + case.n_tokens])

    def _draw(self, what: str, count: int) -> list[int]:
        return random.Random(f"{SEED} {what}").choices(range(self._vocab_size), k=count)


def _tensor_bytes(tensor: DenseTensor) -> int:
    return tensor.nbytes if tensor.packed is None else matrix_bytes(tensor.packed, len(tensor.packed.widths))


def dense_bytes(tensors: Iterable[DenseTensor]) -> tuple[int, int]:
    """(bytes that every forward pass reads of the dense weights, bytes of an embedding row that every token reads).

    Everything but the embedding is read once by a pass; where the head is tied, the embedding is the head.
    """
    by_name = {t.name: t for t in tensors}
    total = sum(_tensor_bytes(t) for t in by_name.values())
    if HEAD not in by_name:
        return total, 0
    embedding = by_name[EMBEDDING]
    rows = embedding.shape[0] if embedding.packed is None else align(embedding.shape[0], TILE_ROWS)
    return total - _tensor_bytes(embedding), _tensor_bytes(embedding) // rows


def positions_read(arch: Architecture, steps: Iterable[tuple[int, int]]) -> int:
    """Positions of the KV cache that attention reads, over all layers and passes; each once a pass."""
    total = 0
    for past, count in steps:
        for window in arch.sliding_windows:
            total += past + count - (0 if window is None else max(0, past - window + 1))
    return total


def bytes_touched(store: Store, runner: ModelRunner, case: Case, counts: Counters) -> float:
    """Bytes of weights and KV cache that the passes of a case must read from memory, divided by its tokens.

    Besides those of `bytes_without_experts` the experts that were in fact routed to, as `counts` has them over all
    layers and passes, each once a pass at the width it was computed at.
    """
    layout = store.layout
    first, last = expert_bytes(layout, 1), expert_bytes(layout, layout.num_slices)
    experts = counts.expert_uses * first
    if layout.num_slices > 1:  # every bit more is as many bytes more: the scales are those of one width
        more = counts.width_sum - counts.expert_uses * layout.widths[0]
        experts += more * (last - first) // (layout.widths[-1] - layout.widths[0])
    return bytes_without_experts(store, runner, case) + experts / case.n_tokens


def bytes_without_experts(store: Store, runner: ModelRunner, case: Case) -> float:
    """Bytes of dense weights and KV cache that the passes of a case must read from memory, divided by its tokens.

    Counted for each pass (decode: a token; prefill: a chunk): all dense weights with head, norms and routers but of the
    embedding only the rows, and the KV cache up to where the pass ends (in a window: the window). What is written, and
    activations, are not counted.
    """
    arch, steps = store.architecture, case.steps()
    every_pass, row = dense_bytes(store.meta.dense)
    per_position = runner.kv_bytes_per_position / arch.num_layers
    total = len(steps) * every_pass + case.n_tokens * row
    return (total + positions_read(arch, steps) * per_position) / case.n_tokens


def model_bytes(store: Store, runner: ModelRunner) -> int:
    """Bytes of the whole model at the width in use."""
    return store.dense_bytes + store.experts_bytes(runner.precision.slices(store.layout.widths))


@dataclass(frozen=True, slots=True)
class Row:
    """One row. Speeds in tokens/s, sizes in bytes; None where there was nothing to measure.

    size_bytes: the model at the width in use. kv_bytes_per_position: of the KV cache, over all layers. tokens: `random`
    or `prompt`. avg_ts and stddev_ts: mean and sample standard deviation of samples_ts. bytes_touched_per_token: see
    `bytes_touched`. bandwidth_share: of the measured memory bandwidth, that these bytes take at this speed.
    overhead_share: of the time of a decode step, what is spent neither in compiled kernels nor waiting for the disk.
    hit_ratio and bytes_read_per_token (from disk): over the timed repetitions. peak_rss_bytes: of the process so far.
    load_average: of the last minute, before the row.
    """

    model: str
    model_type: str
    size_bytes: int
    test: str
    n_prompt: int
    n_gen: int
    n_depth: int
    tokens: str
    threads: int
    kernel: str
    precision: str
    ctx_size: int
    kv_bytes_per_position: int
    repetitions: int
    avg_ts: float
    stddev_ts: float
    samples_ts: list[float]
    bytes_touched_per_token: float
    bandwidth_share: float
    memory_bandwidth_bytes_per_s: float
    overhead_share: float | None
    hit_ratio: float | None
    bytes_read_per_token: float
    peak_rss_bytes: int
    budget_bytes: int
    load_average: float | None
    timestamp: str


class Measurement:
    """Times one case on a model. `row()` is right after any repetition, so what is interrupted is not lost."""

    def __init__(self, store: Store, runner: ModelRunner, case: Case, tokens: Tokens, bandwidth: float) -> None:
        self._store, self._runner, self._case, self._tokens = store, runner, case, tokens
        self._bandwidth = bandwidth
        self._load, self._time = load_average(), timestamp()
        self._seconds: list[float] = []
        self._outside: list[float] = []  # of these seconds, neither in the kernels nor waiting for the disk
        self._counts: list[Counters] = []

    def run(self, repetitions: int, warmup: bool, on_progress: Callable[[str], None]) -> None:
        """Fill the depth, warm up with one repetition that does not count, and measure."""
        runner, case = self._runner, self._case
        depth = self._tokens.depth(case.n_depth)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(runner.tokens, depth, strict=False))
        there = sum(1 for _ in same)  # those of an earlier row
        if there < len(depth):
            on_progress(f"{case.name}: filling a depth of {case.n_depth} tokens")
            runner.rewind(there)
            runner.forward(depth[there:])
        if warmup:
            on_progress(f"{case.name}: warming up")
            runner.preload()
            self._once(self._tokens.timed(case, repetitions))
        for i in range(repetitions):
            so_far = f", {case.n_tokens / self._seconds[-1]:.1f} tokens/s" if self._seconds else ""
            on_progress(f"{case.name}: repetition {i + 1} of {repetitions}{so_far}")
            before, kernels = runner.counters.copy(), kernel_seconds()
            seconds = self._once(self._tokens.timed(case, i))
            kernels = kernel_seconds() - kernels
            counts = runner.counters.since(before)
            self._seconds.append(seconds)
            self._outside.append(seconds - kernels - counts.waited_s)
            self._counts.append(counts)

    def _once(self, ids: list[int]) -> float:
        runner = self._runner
        runner.rewind(self._case.n_depth)
        passes = [ids] if self._case.n_prompt else [[token] for token in ids]
        start = time.perf_counter()
        for part in passes:
            runner.forward(part)
        return time.perf_counter() - start

    def _overhead(self) -> float | None:
        if self._case.n_prompt or kernel_name() == Kernel.REFERENCE:  # torch computes: there is nothing to tell apart
            return None
        return sum(self._outside) / sum(self._seconds[: len(self._outside)])

    def row(self) -> Row | None:
        """Return the figures measured so far; None before the first repetition has ended."""
        counts, store, runner, case = self._counts, self._store, self._runner, self._case
        if not counts:
            return None
        # Ctrl-C may have fallen between the two lists.
        samples = [case.n_tokens / seconds for seconds in self._seconds[: len(counts)]]
        average = statistics.fmean(samples)
        uses = sum(c.expert_uses for c in counts)
        touched = statistics.fmean(bytes_touched(store, runner, case, c) for c in counts)
        return Row(
            model=store.path.name,
            model_type=store.meta.model_type,
            size_bytes=model_bytes(store, runner),
            test=case.name,
            n_prompt=case.n_prompt,
            n_gen=case.n_gen,
            n_depth=case.n_depth,
            tokens=self._tokens.origin,
            threads=runner.threads,
            kernel=kernel_name(),
            precision=str(runner.precision),
            ctx_size=runner.ctx_size,
            kv_bytes_per_position=runner.kv_bytes_per_position,
            repetitions=len(counts),
            avg_ts=average,
            stddev_ts=statistics.stdev(samples) if len(samples) > 1 else 0.0,
            samples_ts=samples,
            bytes_touched_per_token=touched,
            bandwidth_share=touched * average / self._bandwidth,
            memory_bandwidth_bytes_per_s=self._bandwidth,
            overhead_share=self._overhead(),
            hit_ratio=sum(c.expert_hits for c in counts) / uses if uses else None,
            bytes_read_per_token=sum(c.bytes_read for c in counts) / (len(counts) * case.n_tokens),
            peak_rss_bytes=peak_rss_bytes(),
            budget_bytes=runner.budget.total,
            load_average=self._load,
            timestamp=self._time,
        )
