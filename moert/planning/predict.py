"""Predict what a model would do on a device with a budget: the split of the memory, speeds, hits, bytes and quality."""

# T tokens, K experts per token, E experts, S slices

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from moert.config import PREFILL_CHUNK
from moert.errors import UsageError
from moert.planning.model_shape import ModelShape
from moert.planning.quality import Quality, quality_of
from moert.quant.format import KEY_BLOCK, align
from moert.runtime.budget import Budget, split_budget
from moert.scheduler.estimator import Estimate, estimate, touched, usage
from moert.scheduler.precision import BitRouter, Precision
from moert.scheduler.profile import Profile
from moert.scheduler.replay import read_precision
from moert.scheduler.simulation import Settings
from moert.scheduler.trace import Trace

PROMPT_TOKENS = 256  # of the first prompt, whose time to first token is predicted
RECALLS = (0.8,)  # of a router applied one layer early, where nothing is known of the model: FATE, arXiv 2502.12224
MOST_LAYERS, MOST_TOKENS = 16, 96  # simulated
# What is resident beside weights, keys, values and experts was measured on two models with prompts of 16 to 512 tokens:
# the libraries less what a budget adds for growth and rounding, and this share of the upper estimate of the workspace.
_LIBRARY_SLACK, _WORKSPACE_SHARE = 56 << 20, 0.6


@dataclass(frozen=True, slots=True)
class Prediction:
    """The prediction for one setting; names as in `generate --json`. Times in seconds, sizes in bytes.

    decode_tokens_per_s, hit_ratio, bytes_read_per_token, mean_width, width_histogram: of an answer behind a prompt of
    prompt_tokens. ttft_s: of that prompt, with nothing of the experts in memory before it. prefill_tokens_per_s: of a
    prompt of 512 tokens after that answer. budget: how memory is split; peak_rss_bytes: what of it would be touched by
    then, for the budget counts a full context and a little for growth. quality: None where it was not measured.
    """

    precision: str
    budget_bytes: int
    ctx_size: int
    prompt_tokens: int
    budget: Budget
    expert_budget_bytes: int
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    ttft_s: float
    hit_ratio: float
    bytes_read_per_token: float
    mean_width: float
    width_histogram: dict[int, float]
    peak_rss_bytes: int
    store_bytes: int
    quality: Quality | None

    def as_dict(self) -> dict[str, Any]:
        """Return the prediction as plain data for JSON."""
        return asdict(self)


def predict(
    shape: ModelShape,
    profile: Profile,
    trace: Trace,
    precision: str,
    memory_budget: int | None,
    ctx_size: int,
    *,
    available: int = 0,
    recalls: tuple[float, ...] = RECALLS,
    kv_bits: int | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
    most_tokens: int = MOST_TOKENS,
) -> Prediction:
    """Simulate decoding of `trace` at one setting, and work out the rest from the profile.

    memory_budget: bytes for everything; None: all that is of use, within 80% of what is `available` beyond libraries.
    trace: of this model, or drawn for it. recalls: what the next layers' routers know, one for each layer ahead.
    most_tokens: so many of the trace's answer are simulated.
    Raises BudgetError with the least that would do, UsageError for a precision that the model cannot have or a trace
    of another model.
    """
    prompt_tokens = min(prompt_tokens, ctx_size // 2)
    trace = fit(trace, shape, kv_bits, prompt_tokens)
    policy = policy_of(precision, trace, shape)
    slices = policy.slices(shape.widths)
    needs = shape.needs(int(profile.library_bytes), ctx_size, slices, kv_bits)
    budget = split_budget(needs, memory_budget, None, available)
    profile = profile.for_weights(needs.dense + budget.arena)
    settings = Settings(
        budget.arena, precision, shape.widths, recalls=recalls[:1], sizes=mean_sizes(shape), router=router_of(shape)
    )
    try:
        found = estimate(trace, profile, settings, most_layers=MOST_LAYERS, most_tokens=most_tokens)
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    decoding = found.decoding
    prompts = Prompts(shape, profile, trace, found)
    long = min(PREFILL_CHUNK, ctx_size)
    used = replace(
        needs,
        libraries=max(needs.libraries - _LIBRARY_SLACK, 0),
        kv_cache=align(prompt_tokens + MOST_TOKENS, KEY_BLOCK) * shape.kv_bytes_per_position(kv_bits),
        workspace=int(_WORKSPACE_SHARE * shape.workspace_bytes(prompt_tokens)),
    )
    return Prediction(
        precision=str(policy),
        budget_bytes=budget.total,
        ctx_size=ctx_size,
        prompt_tokens=prompt_tokens,
        budget=budget,
        expert_budget_bytes=budget.arena,
        decode_tokens_per_s=1 / (found.seconds + shape.head_bytes * profile.dense_s_per_byte),
        prefill_tokens_per_s=long / prompts.seconds(long, first=False),
        ttft_s=prompts.seconds(prompt_tokens, first=True),
        hit_ratio=decoding.hit_ratio,
        bytes_read_per_token=decoding.bytes_read_per_token,
        mean_width=decoding.mean_width,
        width_histogram=decoding.mass_at_width,
        peak_rss_bytes=min(budget.total, used.fixed + int(min(found.held_bytes, budget.arena))),
        store_bytes=shape.store_bytes,
        quality=quality_of(str(policy), shape.calibrated, shape.losses),
    )


def router_of(shape: ModelShape) -> BitRouter | None:
    """Return what the store measured of each expert, where all layers are simulated, so that they can be told apart."""
    return shape.router if len(shape.moe_layers) == shape.num_layers <= MOST_LAYERS else None


def policy_of(precision: str, trace: Trace, shape: ModelShape) -> Precision:
    """Raises UsageError for one that the model cannot have."""
    try:
        return read_precision(precision, trace, shape.widths, router_of(shape))
    except ValueError as error:
        raise UsageError(f"{error}.") from None


def fit(trace: Trace, shape: ModelShape, kv_bits: int | None, prompt_tokens: int) -> Trace:
    """Return the trace with the bytes of `shape`: a token reads keys and values as it reads dense weights.

    Raises UsageError where the trace is of a model with other layers or experts.
    """
    routed = {layer for step in trace.steps for layer in step.layers}
    if (trace.layers, trace.num_experts) != (shape.num_layers, shape.num_experts) or routed - set(shape.moe_layers):
        raise UsageError(
            f"The trace of {trace.model} has {trace.layers} layers of {trace.num_experts} experts, but {shape.name} "
            f"has {shape.num_layers} of {shape.num_experts}: record one with this model."
        )
    moe, whole = set(shape.moe_layers), sum(mean_sizes(shape))
    keys = (prompt_tokens + MOST_TOKENS // 2) * shape.kv_bytes_per_position(kv_bits) // shape.num_layers
    return replace(
        trace,
        expert_bytes=tuple(whole if layer in moe else 0 for layer in range(shape.num_layers)),
        dense_bytes=tuple(n + keys for n in shape.dense_bytes),
    )


def mean_sizes(shape: ModelShape) -> tuple[int, ...]:
    """Bytes of each slice of an expert, in the mean of all experts: a store that was cut to a size lacks some."""
    experts = len(shape.moe_layers) * shape.num_experts
    return tuple(size * n // experts for size, n in zip(shape.slice_bytes, shape.slice_counts, strict=True))


class Prompts:
    """The time that prompts take: a chunk of up to 512 tokens goes through layer after layer, its experts compute while
    those that are missing are read.
    """

    def __init__(self, shape: ModelShape, profile: Profile, trace: Trace, found: Estimate) -> None:
        self._shape, self._profile, self._usage, self._found = shape, profile, usage(trace), found
        self._bits = 16 if shape.dense_bits == 16 else shape.dense_bits + 16 / shape.group_size

    def seconds(self, tokens: int, first: bool) -> float:
        """Until the first token of the answer. first: nothing of the experts is in memory."""
        shape, profile = self._shape, self._profile
        total = profile.token_overhead_s + shape.head_bytes * profile.dense_s_per_byte
        for start in range(0, tokens, PREFILL_CHUNK):
            total += self._chunk(start, min(start + PREFILL_CHUNK, tokens), first and start == 0)
        return total

    def _chunk(self, start: int, end: int, first: bool) -> float:
        shape, profile = self._shape, self._profile
        dense = (end - start) * 8 * sum(shape.dense_bytes) / self._bits / profile.dense_prefill_macs_per_s
        seen = shape.num_heads * shape.head_dim * (end * (end + 1) - start * (start + 1))
        attention = shape.num_layers * seen / profile.attention_macs_per_s
        reads, nbytes = self._reads(end - start, first)
        disk = profile.disk_latency_s * bool(nbytes) + nbytes / profile.disk_bytes_per_s
        overheads = shape.num_layers * profile.layer_overhead_s + reads * profile.load_overhead_s
        return dense + attention + max(self._experts(end - start), disk) + overheads

    def _experts(self, tokens: int) -> float:
        """Computing them: products, and every expert that is used unpacked once."""
        shape, width = self._shape, self._found.decoding.mean_width
        layers = len(shape.moe_layers)
        macs = layers * tokens * shape.top_k * 3 * shape.hidden_size * shape.expert_inner
        used = layers * min(touched(self._usage, tokens), tokens * shape.top_k)
        nbytes = used * float(np.interp(width, shape.widths, np.cumsum(mean_sizes(shape))))
        return macs / self._profile.prefill_rate(round(width)) + nbytes * self._profile.expert_cost(round(width))

    def _reads(self, tokens: int, first: bool) -> tuple[float, float]:
        """Reads and bytes, from those of the chunk that was simulated."""
        known = self._found.first if first else self._found.later
        if known is None:  # the trace has no prompt: as if every expert that is used were missing, or its share
            whole = len(self._shape.moe_layers) * touched(self._usage, tokens)
            missing = 1.0 if first else 1 - min(1.0, self._found.held_bytes / self._shape.experts_bytes(99))
            return whole * missing, whole * missing * sum(mean_sizes(self._shape))
        more = touched(self._usage, tokens) / touched(self._usage, known.tokens)
        return known.reads * more, known.nbytes * more
