"""What an answer took: times, bytes, hits."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from moert.engine.model_runner import Engine
from moert.runtime.telemetry import Counters, peak_rss_bytes


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """What one answer took. Times in seconds, sizes in bytes; None where there was nothing to measure.

    cached_tokens: prompt tokens found in the KV cache. ttft_s: from the call to the first token. hit_ratio (share of
    expert uses that were in memory), mean_width (bits per weight) and all that is per token are those of decoding, or
    of the whole prompt where nothing was decoded; bytes_read counts both. Where several prompts run together, they are
    those of the steps that this one took part in, and its tokens' share of times and bytes. waited: nothing computed,
    because slices were missing. computed: routed experts did. What is read is read on demand or prefetched; of the
    latter some is used, some wasted, and some may be used later. moved: from host to device memory. device_share: of
    expert uses, those that a device computed. width_histogram: share of expert uses at each number
    of bits (0: left out).
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_s: float
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    hit_ratio: float | None
    bytes_read: int
    bytes_read_per_token: float
    peak_rss_bytes: int
    budget_bytes: int
    precision: str
    mean_width: float | None
    seed: int
    waited_s_per_token: float
    computed_s_per_token: float
    bytes_on_demand_per_token: float
    bytes_prefetched_per_token: float
    bytes_prefetched_used_per_token: float
    bytes_prefetched_wasted_per_token: float
    bytes_moved_per_token: float
    device_share: float | None
    width_histogram: dict[int, float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class RequestTimer:
    """Times and counts of one answer that has the engine for itself."""

    def __init__(self, engine: Engine, seed: int, prompt_tokens: int) -> None:
        self._engine, self._seed, self._prompt_tokens = engine, seed, prompt_tokens
        self._start = self._begun = self._first = time.perf_counter()
        self._before = engine.counters.copy()
        self._cached = 0
        self._after_prefill: Counters = self._before

    def prefilled(self, cached: int) -> None:
        """The first token can be drawn; so many of the prompt were in the KV cache."""
        self._first = time.perf_counter()
        self._cached = cached
        self._after_prefill = self._engine.counters.copy()

    def _counted(self, decoded: bool) -> tuple[Counters, float, int]:
        """Of the phase that the figures are about: what was counted, and bytes read; and bytes read from the start."""
        counters = self._engine.counters
        phase = counters.since(self._after_prefill if decoded else self._before)
        return phase, phase.bytes_read, counters.bytes_read - self._before.bytes_read

    def stats(self, completion_tokens: int) -> GenerationStats:
        """After so many tokens of the answer."""
        steps = max(completion_tokens - 1, 0)  # the first token comes out of the prompt's forward pass
        phase, phase_bytes, bytes_read = self._counted(steps > 0)
        prefill_s = self._first - self._begun
        return GenerationStats(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached,
            completion_tokens=completion_tokens,
            ttft_s=self._first - self._start,
            prefill_tokens_per_s=(self._prompt_tokens - self._cached) / prefill_s if prefill_s else None,
            decode_tokens_per_s=steps / (time.perf_counter() - self._first) if steps else None,
            hit_ratio=phase.hit_ratio,
            bytes_read=bytes_read,
            bytes_read_per_token=phase_bytes / max(steps, 1),
            peak_rss_bytes=peak_rss_bytes(),
            budget_bytes=self._engine.budget.total,
            precision=str(self._engine.precision),
            mean_width=phase.mean_width,
            seed=self._seed,
            **phase.per_token(steps, self._engine.widths),
        )


class SharedRequestTimer(RequestTimer):
    """The same for an answer among several: counts of the steps that it was in, and its tokens' share of the bytes."""

    def __init__(self, engine: Engine, seed: int, prompt_tokens: int) -> None:
        super().__init__(engine, seed, prompt_tokens)
        self._phases = [Counters(), Counters()]  # prompt, decoding
        self._bytes = [0.0, 0.0]

    def begin(self) -> None:
        """It leaves the queue."""
        self._begun = self._first = time.perf_counter()

    def prefilled(self, cached: int = 0) -> None:
        self._first = time.perf_counter()

    def add(self, step: Counters, share: float, decoding: bool) -> None:
        """A step that it took part in with this share of the tokens."""
        phase = self._phases[decoding]
        phase.expert_uses += step.expert_uses
        phase.expert_hits += step.expert_hits
        phase.width_sum += step.width_sum
        phase.device_uses += step.device_uses
        phase.token_uses.update(step.token_uses)
        phase.waited_s += share * step.waited_s
        phase.computed_s += share * step.computed_s
        for name in ("bytes_read", "bytes_prefetched", "bytes_used", "bytes_wasted", "bytes_moved"):
            setattr(phase, name, getattr(phase, name) + round(share * getattr(step, name)))
        self._bytes[decoding] += share * step.bytes_read

    def _counted(self, decoded: bool) -> tuple[Counters, float, int]:
        return self._phases[decoded], self._bytes[decoded], round(sum(self._bytes))
