"""Routing statistics of model families, and traces drawn from them where none was recorded.

The statistics are overlaps: of the experts that a token uses in a layer, the share that another token uses too. They
say when an expert is wanted again, which is all that a cache lives on.

    next    the token right before it: what papers call the overlap of consecutive tokens
    near    tokens 2 or 3 apart
    soon    tokens 4 to 12 apart
    late    tokens 32 or more apart in an answer: the skew of popularity. Where expert e is used by the share u_e of
            the tokens, it is sum(u_e ** 2) / K; with no skew K / E
    prompt  a token of the prompt and one of the answer

A trace is drawn as a router makes it: a token uses the K experts of the largest logits. The logit of an expert is a
Gaussian process over the tokens, the sum of a part that stays (its popularity, of which prompt and answer share some),
one that drifts within some 16 tokens (what the text is about just now), one that lasts for a token or a few, and noise.
Their variances are those at which the K largest overlap as stated. Correlations of logits, unlike overlaps, hardly
depend on K: figures recorded at top-6 serve for top-8. Hit ratios of caches of any size are then within 3.5 points of
those on the recorded traces. A Zipf law with a share of the previous token's experts kept (`trace.draw_trace`), fitted
to the overlaps of 1 and 32 tokens, is up to 11 points off: it uses experts of the long tail that texts leave alone.

Not modelled: layers are drawn independently of each other, and drift has one rate.
"""

# L layers with experts, E experts, K experts per token, T tokens

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moert.scheduler.trace import DECODE, PREFILL, Routing, Trace, TraceStep

DEPTHS = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of the layers with experts: 0 first, 1 last
KINDS = ("next", "near", "soon", "late", "prompt")
_LAGS = {"next": (1, 1), "near": (2, 3), "soon": (4, 12), "late": (32, 1 << 30)}  # from, to
_DRIFT, _SOON, _NEAR = 16.0, 8.0, 2.5  # tokens: the slow part's time, and the middle of `soon` and `near`
_GRID = np.linspace(0.0, 0.98, 50)  # correlations
_PAIRS = 2000
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RoutingStatistics:
    """Statistics of one model with `num_experts` at top-`top_k`.

    next, near, soon, late, prompt: overlaps at DEPTHS. sharpness: standard deviation of the router's logits, on which
    depends how unlike the weights of a token's experts are. recalls: of the experts that a layer uses, the share that
    its router names when it is applied to the state of the layer before, or of the one before that. source,
    recall_source: where they are from, for people.
    """

    num_experts: int
    top_k: int
    next: tuple[float, ...]
    near: tuple[float, ...]
    soon: tuple[float, ...]
    late: tuple[float, ...]
    prompt: tuple[float, ...]
    source: str
    recalls: tuple[float, ...] = (0.83, 0.73)
    recall_source: str = "FATE, arXiv 2502.12224: 77 to 89% one layer ahead, 67 to 80% two layers ahead"
    sharpness: float = 0.9


_TRACE = "measured on a recorded answer of {} tokens (github.com/Helldez/BigMoeOnEdge, docs/bench-data, 2026-07-15)"
PUBLISHED = {
    "qwen3_moe": RoutingStatistics(
        128,
        6,
        next=(0.107, 0.231, 0.294, 0.418, 0.387, 0.415, 0.401, 0.328),
        near=(0.087, 0.126, 0.184, 0.336, 0.290, 0.334, 0.310, 0.253),
        soon=(0.083, 0.116, 0.141, 0.286, 0.236, 0.291, 0.275, 0.249),
        late=(0.088, 0.113, 0.139, 0.266, 0.209, 0.260, 0.245, 0.231),
        prompt=(0.082, 0.095, 0.106, 0.168, 0.119, 0.137, 0.126, 0.141),
        source="Qwen3-30B-A3B, " + _TRACE.format(128),
        recalls=(0.886,),
        recall_source="Qwen3-30B-A3B, docs/expert-prediction.md of the same repository",
    ),
    "gpt_oss": RoutingStatistics(
        128,
        2,
        next=(0.031, 0.030, 0.077, 0.115, 0.144, 0.148, 0.282, 0.226),
        near=(0.085, 0.137, 0.181, 0.183, 0.186, 0.202, 0.276, 0.237),
        soon=(0.047, 0.073, 0.110, 0.102, 0.098, 0.124, 0.193, 0.160),
        late=(0.018, 0.044, 0.053, 0.074, 0.091, 0.108, 0.164, 0.144),
        prompt=(0.027, 0.039, 0.060, 0.061, 0.066, 0.046, 0.050, 0.043),
        source="gpt-oss-120b, " + _TRACE.format(64),
    ),
    # The paper gives the share of consecutive tokens with any expert in common, over eight kinds of text on average
    # 48.0, 63.7 and 50.9% in layers 0, 15 and 31: as overlaps 0.262, 0.363 and 0.280.
    "mixtral": RoutingStatistics(
        8,
        2,
        next=(0.262, 0.268, 0.275, 0.287, 0.311, 0.360, 0.318, 0.280),
        near=(0.260, 0.265, 0.271, 0.281, 0.303, 0.346, 0.309, 0.275),
        soon=(0.258, 0.262, 0.267, 0.276, 0.297, 0.338, 0.301, 0.271),
        late=(0.257, 0.260, 0.265, 0.273, 0.294, 0.331, 0.297, 0.269),
        prompt=(0.250, 0.252, 0.255, 0.258, 0.269, 0.290, 0.271, 0.256),
        source="Mixtral-8x7B, arXiv 2401.04088, table 5, for consecutive tokens; for others that correlation times"
        " 0.9, 0.8, 0.75 and 0.43, as measured on average of Qwen3-30B-A3B and gpt-oss-120b",
    ),
    # Of one model alone, by its name: the one that ships.
    "examples/train_demo_model.py": RoutingStatistics(
        32,
        4,
        next=(0.176, 0.175, 0.174, 0.172, 0.169, 0.242, 0.311, 0.308),
        near=(0.179, 0.186, 0.192, 0.204, 0.219, 0.232, 0.292, 0.295),
        soon=(0.172, 0.178, 0.183, 0.193, 0.206, 0.200, 0.244, 0.243),
        late=(0.157, 0.162, 0.167, 0.177, 0.189, 0.154, 0.170, 0.168),
        prompt=(0.153, 0.158, 0.163, 0.173, 0.186, 0.144, 0.148, 0.154),
        source="the model that ships, measured on 640 tokens of its held-out text",
        recalls=(0.695,),
        recall_source="the same, moert generate --stats --prefetch 1",
        sharpness=2.5,
    ),
}
DEFAULT = RoutingStatistics(
    64,
    8,
    next=(0.192, 0.251, 0.341, 0.416, 0.427, 0.441, 0.507, 0.448),
    near=(0.233, 0.291, 0.350, 0.427, 0.410, 0.437, 0.462, 0.413),
    soon=(0.198, 0.244, 0.283, 0.352, 0.329, 0.371, 0.406, 0.374),
    late=(0.162, 0.212, 0.239, 0.324, 0.315, 0.344, 0.374, 0.355),
    prompt=(0.168, 0.194, 0.226, 0.265, 0.242, 0.231, 0.229, 0.226),
    source="none are published for this family: the mean of Qwen3-30B-A3B and gpt-oss-120b (their correlations)",
)


def statistics_for(model_type: str, name: str = "") -> RoutingStatistics:
    """Return the statistics of the model, of its family, or DEFAULT, which says so in its source."""
    return PUBLISHED.get(name) or PUBLISHED.get(model_type, DEFAULT)


class Sizes(Protocol):
    """The sizes of a model, as `ModelShape` has them. slice_bytes: of one expert. dense_bytes: by layer, of all else in
    it.
    """

    @property
    def name(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def moe_layers(self) -> Sequence[int]: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def slice_bytes(self) -> Sequence[int]: ...
    @property
    def dense_bytes(self) -> Sequence[int]: ...


def draw(sizes: Sizes, statistics: RoutingStatistics, *, prompt: int, tokens: int, seed: int = 0) -> Trace:
    """A trace of `prompt` prefill and `tokens` decode steps of a model; the same for the same arguments."""
    L, E, K = len(sizes.moe_layers), sizes.num_experts, sizes.top_k
    stays, shared, slow, fast, decay = (values[:, None] for values in _parts(statistics, L))
    noise = np.maximum(1 - stays - slow - fast, 0)
    rng = np.random.default_rng(seed)

    def fresh(variance: Floats) -> Floats:
        return np.sqrt(variance) * rng.standard_normal((L, E))

    common = fresh(shared)
    popularity = {phase: common + fresh(stays - shared) for phase in (PREFILL, DECODE)}
    drift, echo, keep = fresh(slow), fresh(fast), np.exp(-1 / _DRIFT)
    steps = []
    for n in range(prompt + tokens):
        phase = PREFILL if n < prompt else DECODE
        drift = keep * drift + fresh(slow * (1 - keep**2))
        echo = decay * echo + fresh(fast * (1 - decay**2))
        logits = popularity[phase] + drift + echo + fresh(noise)
        chosen = _largest(logits, K)
        values = np.take_along_axis(logits, chosen, 1)
        order = np.argsort(-values, 1)
        weights = np.exp(statistics.sharpness * (np.take_along_axis(values, order, 1) - values.max(1, keepdims=True)))
        weights /= weights.sum(1, keepdims=True)
        rows = zip(np.take_along_axis(chosen, order, 1).tolist(), weights.tolist(), strict=True)
        routed = {layer: Routing(tuple(e), tuple(w)) for layer, (e, w) in zip(sizes.moe_layers, rows, strict=True)}
        steps.append(TraceStep(phase, routed))
    expert_bytes = [0] * sizes.num_layers
    for layer in sizes.moe_layers:
        expert_bytes[layer] = sum(sizes.slice_bytes)
    return Trace(sizes.name, sizes.num_layers, E, K, tuple(expert_bytes), tuple(sizes.dense_bytes), tuple(steps))


def _parts(statistics: RoutingStatistics, L: int) -> Iterable[Floats]:
    """Shares of the logits' variance, by layer [L]: what stays, what of it prompt and answer share, what drifts, what
    lasts for a few tokens; and how much of the last a token passes on to the next."""
    depths = np.linspace(0, 1, L) if L > 1 else np.full(1, 0.5)
    overlap = _overlap(statistics.num_experts, statistics.top_k)
    r = {kind: np.interp(depths, DEPTHS, np.interp(getattr(statistics, kind), overlap, _GRID)) for kind in KINDS}
    stays = r["late"]
    slow = np.clip((r["soon"] - stays) * np.exp(_SOON / _DRIFT), 0, 0.9 * (1 - stays))
    next_, near = (
        np.maximum(r[kind] - stays - slow * np.exp(-lag / _DRIFT), 1e-3) for kind, lag in (("next", 1), ("near", _NEAR))
    )
    # Where a text takes up again rather the token before the last (lists, templates), what both lags have in common.
    next_ = np.where(near > next_, (next_ + 2 * near) / 3, next_)
    decay = np.clip((near / next_) ** (1 / (_NEAR - 1)), 0.2, 0.8)
    fast = np.minimum(next_ / decay, 1 - stays - slow)
    return stays, np.minimum(r["prompt"], stays), slow, fast, np.minimum(next_ / fast, 0.95)


@lru_cache
def _overlap(E: int, K: int) -> Floats:
    """Return how much the K largest of E overlap with those of other values, by the correlation of the two, as in
    _GRID.
    """
    first, second = np.random.default_rng(0).standard_normal((2, _PAIRS, E))
    used = np.zeros((_PAIRS, E), bool)
    np.put_along_axis(used, _largest(first, K), True, 1)
    mixes = (r * first + np.sqrt(1 - r * r) * second for r in _GRID)
    found = np.array([np.take_along_axis(used, _largest(mix, K), 1).mean() for mix in mixes])
    return np.maximum.accumulate(found)


def _largest(values: Floats, K: int) -> NDArray[Any]:
    """Indices [rows, K] of the K largest of each row."""
    return np.argpartition(-values, K - 1, 1)[:, :K]


def measure(trace: Trace, source: str) -> RoutingStatistics:
    """The statistics of a recorded trace of one turn; its recalls are those of the family's default.

    Raises ValueError, with a sentence, for fewer than 40 tokens of decoding.
    """
    layers = sorted({layer for step in trace.steps for layer in step.layers})
    used = {
        phase: np.array([_uses(step, layers, trace.num_experts) for step in trace.steps if step.phase == phase])
        for phase in (PREFILL, DECODE)
    }
    answer = used[DECODE]
    if len(answer) < 40:
        raise ValueError(f"the trace of {trace.model} has only {len(answer)} tokens of decoding; statistics need 40")
    far = max(32, len(answer) // 2)
    found = {
        kind: np.mean([_shared(answer[lag:], answer[:-lag]) for lag in range(first, min(last, far) + 1)], 0)
        for kind, (first, last) in _LAGS.items()
    }
    seen = used[PREFILL] if len(used[PREFILL]) else answer
    rates = seen.sum(0) / np.maximum(seen.sum((0, 2)), 1)[:, None]
    found["prompt"] = (answer.mean(0) * rates).sum(-1)
    curves = {kind: tuple(round(float(x), 3) for x in _at_depths(curve)) for kind, curve in found.items()}
    next_, near, soon, late, prompt = (curves[kind] for kind in KINDS)
    return RoutingStatistics(trace.num_experts, trace.top_k, next_, near, soon, late, prompt, source)


def _uses(step: TraceStep, layers: Sequence[int], E: int) -> NDArray[np.bool_]:
    """Return which experts a token uses, bool [L, E]."""
    row = np.zeros((len(layers), E), bool)
    for i, layer in enumerate(layers):
        if layer in step.layers:
            row[i, list(step.layers[layer].experts)] = True
    return row


def _shared(later: NDArray[np.bool_], earlier: NDArray[np.bool_]) -> Floats:
    """Return, by layer, the share of the uses in `later` [T, L, E] that `earlier` has too."""
    return (later & earlier).sum((0, 2)) / np.maximum(later.sum((0, 2)), 1)


def _at_depths(curve: Floats) -> Floats:
    """A curve over the layers at DEPTHS, each averaged with weights that fall to zero at the next of DEPTHS."""
    where = np.linspace(0, 1, len(curve)) if len(curve) > 1 else np.full(1, 0.5)
    result = []
    for i, depth in enumerate(DEPTHS):
        gap = min(abs(depth - other) for other in (*DEPTHS[:i], *DEPTHS[i + 1 :]))
        weights = np.maximum(0, 1 - np.abs(where - depth) / gap)
        total = weights.sum()
        result.append((weights * curve).sum() / total if total > 0.5 else np.interp(depth, where, curve))
    return np.array(result)
