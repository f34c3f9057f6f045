"""Figures of an answer: times, bytes, hits; and whose the figures of a step that several share are."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from moert.runtime.budget import Budget
from moert.runtime.telemetry import Counters, peak_rss_bytes
from moert.scheduler.precision import Precision


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


class Measured(Protocol):
    """What a timer asks of the model that runs."""

    @property
    def counters(self) -> Counters: ...
    @property
    def budget(self) -> Budget: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def widths(self) -> tuple[int, ...]: ...


class RequestTimer:
    """Times and counts of one request: of the steps that it took part in, and its tokens' share of times and bytes.

    came: when it was made, by `time.perf_counter`.
    """

    def __init__(self, runner: Measured, seed: int, prompt_tokens: int, came: float) -> None:
        self._runner, self._seed, self._prompt_tokens = runner, seed, prompt_tokens
        self._came = came
        self._begun = self._first = time.perf_counter()
        self._cached = 0
        self._phases = (Counters(), Counters())  # prompt, decoding
        self._bytes = [0.0, 0.0]

    def begin(self, cached: int) -> None:
        """It leaves the queue; so many tokens of its prompt are in the KV cache."""
        self._begun = self._first = time.perf_counter()
        self._cached = cached

    def prefilled(self) -> None:
        """The first token can be drawn."""
        self._first = time.perf_counter()

    def add(self, step: Counters, share: float, decoding: bool) -> None:
        """Count steps that it took part in with this share of the tokens."""
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

    def stats(self, completion_tokens: int) -> GenerationStats:
        """The figures after so many tokens of the answer."""
        steps = max(completion_tokens - 1, 0)  # the first token comes out of the prompt's forward pass
        decoded = steps > 0
        phase = self._phases[decoded]
        prefill_s = self._first - self._begun
        return GenerationStats(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached,
            completion_tokens=completion_tokens,
            ttft_s=self._first - self._came,
            prefill_tokens_per_s=(self._prompt_tokens - self._cached) / prefill_s if prefill_s else None,
            decode_tokens_per_s=steps / (time.perf_counter() - self._first) if steps else None,
            hit_ratio=phase.hit_ratio,
            bytes_read=round(sum(self._bytes)),
            bytes_read_per_token=self._bytes[decoded] / max(steps, 1),
            peak_rss_bytes=peak_rss_bytes(),
            budget_bytes=self._runner.budget.total,
            precision=str(self._runner.precision),
            mean_width=phase.mean_width,
            seed=self._seed,
            **phase.per_token(steps, self._runner.widths),
        )


Share = tuple[RequestTimer, float, bool]  # of a step's tokens, and whether these are decoded


class StepLedger:
    """Divides what the runtime counts among the requests of each step.

    As long as the same requests take the same shares, counting is put off: copying counters takes time.
    """

    def __init__(self, counters: Callable[[], Counters]) -> None:
        self._counters = counters
        self._shares: list[Share] = []
        self._before = Counters()

    def begin(self, shares: list[Share]) -> None:
        """Count what comes from now on for these; for nobody, if there are none."""
        if shares == self._shares:
            return
        self.settle()
        if not self._shares and shares:
            self._before = self._counters().copy()
        self._shares = shares

    def settle(self) -> None:
        """Count what was put off."""
        if not self._shares:
            return
        now = self._counters().copy()
        counted, self._before = now.since(self._before), now
        for timer, share, decoding in self._shares:
            timer.add(counted, share, decoding)
