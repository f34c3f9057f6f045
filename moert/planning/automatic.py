"""The plan of a run whose settings are left to it, and how it turns out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moert.config import EngineConfig, format_bytes
from moert.engine.statistics import GenerationStats
from moert.hardware.devices import this_machine
from moert.hardware.memory import available_bytes, library_bytes
from moert.models.stored_model import StoredModel
from moert.planning.model_shape import store_shape
from moert.planning.predict import PROMPT_TOKENS, Prediction
from moert.planning.recommend import Choice, recommend
from moert.planning.routing import drawn
from moert.runtime.disk_speed import store_speed

OFF = 0.25  # a speed that is so far from the predicted one is worth a word
_SLOW = 0.5  # of the disk that was measured: a difference that is no noise
_COLD = 64  # tokens that do not count: experts are still being read for the first time
_ENOUGH = 64  # tokens behind these, before that is judged


@dataclass
class Automatic:
    """The choice made for this machine, with what it is predicted to do and what it did so far.

    device: where the machine's figures are from. tokens, seconds: of answers, but for the first few tokens.
    """

    prediction: Prediction
    device: str
    tokens: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    _cold: int = _COLD
    _said: bool = False

    def line(self, budget_bytes: int) -> str:
        """Describe what was chosen, with the budget that came of it, and what for."""
        p = self.prediction
        return (
            f"plan: {p.precision}, context {p.ctx_size}, {format_bytes(budget_bytes)}: predicts "
            f"{p.decode_tokens_per_s:.1f} tokens/s and {p.hit_ratio:.0%} cache hits, from {self.device}"
        )

    def add(self, stats: GenerationStats) -> None:
        """An answer has ended."""
        self.peak_rss_bytes = stats.peak_rss_bytes
        steps = stats.completion_tokens - 1
        if stats.decode_tokens_per_s and self._cold <= 0:
            self.tokens += steps
            self.seconds += steps / stats.decode_tokens_per_s
        self._cold -= steps

    @property
    def achieved(self) -> float | None:
        """Tokens/s of the answers that count; None before there is one."""
        return self.tokens / self.seconds if self.seconds else None

    def compare(self) -> list[str]:
        """Predicted and achieved, a line each."""
        p, speed = self.prediction, self.achieved
        lines = [f"memory: {format_bytes(p.peak_rss_bytes)} predicted, {format_bytes(self.peak_rss_bytes)} at the peak"]
        achieved = "not measured yet"  # of the first answer experts are read for the first time
        if speed is not None:
            off = f"{speed / p.decode_tokens_per_s - 1:+.0%}, {self.tokens} tokens"
            achieved = f"{speed:.1f} measured ({off})"
        return [f"speed: {p.decode_tokens_per_s:.1f} tokens/s predicted, {achieved}", *lines]

    def warning(self) -> str | None:
        """Warn that the plan is off, once, when there were enough tokens to tell."""
        p, speed = self.prediction, self.achieved
        if self._said or speed is None or self.tokens < _ENOUGH or abs(speed / p.decode_tokens_per_s - 1) <= OFF:
            return None
        self._said = True
        return (
            f"{speed:.1f} tokens/s were measured, but {p.decode_tokens_per_s:.1f} planned "
            f"({speed / p.decode_tokens_per_s - 1:+.0%}), from {self.device}"
        )


def choose(store: StoredModel, config: EngineConfig) -> tuple[EngineConfig, Automatic]:
    """Precision and context for a store on this machine, so far as `config` leaves them open.

    The budget stays open: the engine takes what the plan goes by, all that the model can use within 80% of what is
    available. Where experts would have to be read, a few are: the store may lie on another disk than the one that was
    measured, and a disk of less than half the speed counts with its own. Raises BudgetError, with the least that would
    do, where nothing fits.
    """
    shape = store_shape(store.path)
    profile, device = this_machine()
    profile = replace(profile, library_bytes=float(library_bytes()))
    routes, available = drawn(shape, PROMPT_TOKENS), available_bytes()

    def choice() -> Choice:
        return recommend(
            shape,
            profile,
            routes.trace,
            available,
            config.ctx_size,
            recalls=routes.recalls,
            kv_bits=config.kv_bits,
            precisions=[config.precision] if config.precision else (),
        )

    found = choice()
    slices = len(shape.slice_bytes) if found.prediction.mean_width > shape.widths[0] else 1
    if found.prediction.expert_budget_bytes < shape.experts_bytes(slices):
        speed = store_speed(store)
        if speed < _SLOW * profile.disk_bytes_per_s:
            profile = replace(profile, disk_bytes_per_s=speed)
            device += f"; but the disk of this store reads {speed / 1e6:.0f} MB/s"
            found = choice()
    token = 1 / found.prediction.decode_tokens_per_s + (profile.answer_overhead_s or 0.0)
    plan = Automatic(replace(found.prediction, decode_tokens_per_s=1 / token), device)
    return replace(config, precision=found.precision, ctx_size=found.ctx_size), plan
