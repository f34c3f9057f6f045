"""One setting out of those that are possible, and why."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from moert.config import format_bytes
from moert.errors import BudgetError
from moert.planning.model_shape import ModelShape
from moert.planning.predict import RECALLS, Prediction, policy_of, predict
from moert.planning.quality import Quality, quality_of
from moert.runtime.budget import Needs, split_budget
from moert.scheduler.profile import Profile
from moert.scheduler.trace import Trace

READING = 10.0  # tokens/s: people read some 4 words a second, of 1.3 tokens each, and skim faster
USABLE = 2.0  # tokens/s: below that few would wait for an answer
CLOSE = 0.9  # of the fastest: not worth less quality
LEAST_WIDTH = 2.5  # bits: small models hardly show what fewer cost, large ones do
CONTEXTS = (4096, 2048, 1024)  # what is worth taking from the experts
SMALL_CONTEXTS = (1024, 512, 256)  # where no more fits
_TOKENS = 48  # simulated: half of what a table gets, since a program waits for it before it starts
_KV_SHARE = 0.25  # of the memory that experts and context share


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting, what it is predicted to do, and one sentence that says why."""

    prediction: Prediction
    reason: str

    @property
    def precision(self) -> str:
        return self.prediction.precision

    @property
    def memory_budget(self) -> int:
        return self.prediction.budget_bytes

    @property
    def ctx_size(self) -> int:
        return self.prediction.ctx_size


def policies(shape: ModelShape) -> list[str]:
    """Precision policies that are worth comparing for a store in these widths, the best first.

    `routed` wants one that was calibrated.
    """
    widths = shape.widths
    names = [f"fixed:{width}" for width in widths]
    if len(widths) > 1 and widths[0] < 3 <= widths[-1]:
        names += ["elastic:3", "routed:3"] if shape.calibrated else ["elastic:3"]
    return sorted(names, key=lambda name: _rank(name, quality_of(name, shape.calibrated, shape.losses)))


def _rank(precision: str, quality: Quality | None) -> tuple[float, float, bool]:
    """Less is better: what was measured first, then bits; of equals what is reproducible."""
    bits = float(precision.partition(":")[2].partition(",")[0])
    kl = quality.kl_nats[1] if quality else 0.106 * 0.28 ** (bits - 2)
    return kl, -bits, precision.startswith("elastic")


def recommend(
    shape: ModelShape,
    profile: Profile,
    trace: Trace,
    available: int,
    ctx_size: int | None = None,
    *,
    memory_budget: int | None = None,
    recalls: tuple[float, ...] = RECALLS,
    kv_bits: int | None = None,
    precisions: Sequence[str] = (),
) -> Choice:
    """Budget, precision and context for a device on which `available` bytes can be had beyond the libraries.

    The budget, if none is given: all that the model can use, within 80% of what is available. The context, if none is
    given: the largest of CONTEXTS that leaves all experts in memory, or to them three quarters of the memory for
    experts and context; if none does, the largest of SMALL_CONTEXTS that fits. The precision, out of `precisions` or
    `policies`:

    1. Those below LEAST_WIDTH bits are left aside, unless no other decodes USABLE tokens/s.
    2. Of those that decode READING tokens/s or more, the one of the best quality, as `moert eval` measured it.
    3. If there is none, the one of the best quality among those within 10% of the fastest.

    They are tried in the order of their quality, so that most often one or two are simulated. Raises BudgetError, with
    the least that would do, where nothing fits, UsageError as `predict`.
    """
    names = policies(shape)
    if precisions:
        names = sorted(precisions, key=lambda name: _rank(name, quality_of(name, shape.calibrated, shape.losses)))
    tried: list[Prediction] = []
    least: BudgetError | None = None
    for name in names:
        try:
            slices = policy_of(name, trace, shape).slices(shape.widths)
            ctx = ctx_size or context_for(shape, profile, slices, memory_budget, available, kv_bits)
            found = predict(
                shape,
                profile,
                trace,
                name,
                memory_budget,
                ctx,
                available=available,
                recalls=recalls,
                kv_bits=kv_bits,
                most_tokens=_TOKENS,
            )
        except BudgetError as error:
            least = error if least is None or error.least_bytes < least.least_bytes else least
            continue
        tried.append(found)
        if found.decode_tokens_per_s >= READING and found.mean_width >= LEAST_WIDTH:
            break
    if least is not None and not tried:
        raise least
    return choose(tried)


def context_for(
    shape: ModelShape,
    profile: Profile,
    slices: int,
    memory_budget: int | None,
    available: int,
    kv_bits: int | None = None,
) -> int:
    """The context for experts of up to `slices` slices, where none is asked for: see `recommend`."""
    most = shape.max_position_embeddings

    def split(ctx_size: int) -> tuple[Needs, int]:
        needs = shape.needs(int(profile.library_bytes), ctx_size, slices, kv_bits)
        return needs, split_budget(needs, memory_budget, None, available).arena

    for ctx_size in (min(n, most) for n in CONTEXTS):
        with suppress(BudgetError):
            needs, arena = split(ctx_size)
            context = needs.kv_cache + needs.workspace
            if arena == needs.all_experts or context <= _KV_SHARE * (context + arena):
                return ctx_size
    for ctx_size in (min(n, most) for n in SMALL_CONTEXTS):
        with suppress(BudgetError):
            split(ctx_size)
            return ctx_size
    return min(SMALL_CONTEXTS[-1], most)


def choose(predictions: Sequence[Prediction]) -> Choice:
    """The rule of `recommend`; of several budgets at which that holds, the least."""
    wide = [p for p in predictions if p.mean_width >= LEAST_WIDTH]
    narrow = not any(p.decode_tokens_per_s >= USABLE for p in wide)
    allowed = list(predictions) if narrow else wide
    fastest = max(p.decode_tokens_per_s for p in allowed)
    floor = READING if fastest >= READING else CLOSE * fastest
    best = min(
        (p for p in allowed if p.decode_tokens_per_s >= floor),
        key=lambda p: (_rank(p.precision, p.quality), p.budget_bytes, -p.decode_tokens_per_s),
    )
    return Choice(best, _reason(best, fastest, narrow))


def _reason(best: Prediction, fastest: float, narrow: bool) -> str:
    speed = f"{best.decode_tokens_per_s:.{0 if best.decode_tokens_per_s >= 10 else 1}f} tokens/s"
    setting = f"{best.precision} at {format_bytes(best.budget_bytes)}, context {best.ctx_size}"
    if fastest >= READING:
        why = f"the best quality that answers faster than people read ({speed}, {READING:g} are wanted)"
    else:
        what = "none" if narrow else f"nothing of {LEAST_WIDTH:g} bits or more"
        why = f"the best quality among the fastest here ({speed}; {what} reaches the {READING:g} at which people read)"
    if narrow and best.mean_width < LEAST_WIDTH:
        why += (
            f", although below {LEAST_WIDTH:g} bits large models lose much: nothing wider reaches {USABLE:g} tokens/s"
        )
    return f"{setting}: {why}."
