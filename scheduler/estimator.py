"""Estimate what a trace takes on a device, in a second: only the run asked for, of some of the layers, with their share
of room.

Layers with experts are alike but for how evenly they use them, which changes slowly with depth. A cache that is shared
by all of them gives each about its share, so that a few, spread evenly over the depth, with the proportionate budget
show what the whole model does: 16 of 48 came within 2% of its speed, 8 within 5%. A test compares the two.
"""

# L layers, E experts, S slices

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from moert.scheduler.profile import Profile
from moert.scheduler.simulation import Result, Settings
from moert.scheduler.simulator import Simulator, Totals
from moert.scheduler.trace import DECODE, PREFILL, Trace, TraceStep
from moert.scheduler.trial import MARGIN, pays


@dataclass(frozen=True, slots=True)
class PromptReads:
    """The reads of one chunk of a prompt, of all layers."""

    tokens: int
    reads: float
    nbytes: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimates for the whole model. seconds: of a decoded token. held_bytes: experts in memory at the end. first: the
    chunk of a prompt that found memory empty; later: the same again, after decoding; both None where the trace has no
    prompt.
    """

    seconds: float
    decoding: Result
    held_bytes: float
    first: PromptReads | None
    later: PromptReads | None


def estimate(
    trace: Trace, profile: Profile, settings: Settings, *, most_layers: int = 16, most_tokens: int = 96
) -> Estimate:
    """The faster of the run with prefetching as `settings` say and the run without, as the runtime finds out itself.

    At most so many of the layers with experts are simulated, and so many decoded tokens, of which the first third does
    not count: until then the memory still holds what the prompt left. Raises ValueError as
    `Simulator.run`.
    """
    layers, some = sample(trace, most_layers, most_tokens)
    share = sum(trace.expert_bytes[layer] for layer in layers) / sum(trace.expert_bytes)
    if settings.budget * share < 2 * trace.top_k * max(trace.expert_bytes):  # too little to be divided
        layers, some = sample(trace, trace.layers, most_tokens)
        share = 1.0
    own = replace(settings, budget=int(settings.budget * share))
    scale = sum(n > 0 for n in trace.expert_bytes) / len(layers)
    parts = round(scale)
    plain = _run(some, profile, replace(own, recalls=()), parts)
    best = plain
    if settings.recalls and plain[1].stall_share > MARGIN:
        ahead = _run(some, profile, own, parts)
        best = ahead if pays(ahead[0], plain[0]) else plain
    seconds, result, held, prompts = best
    # What is not simulated: layers without experts, whose time is known, and the others like those that were.
    dense = sum(trace.dense_bytes) - scale * sum(trace.dense_bytes[layer] for layer in layers)
    idle = sum(n == 0 for n in trace.expert_bytes)
    seconds = profile.token_overhead_s + (seconds - profile.token_overhead_s) * scale
    seconds += dense * profile.dense_s_per_byte + idle * profile.layer_overhead_s
    result = replace(
        result,
        decode_tokens_per_s=1 / seconds,
        bytes_read_per_token=result.bytes_read_per_token * scale,
        bytes_prefetched_per_token=result.bytes_prefetched_per_token * scale,
    )
    reads = [PromptReads(tokens, reads * scale, nbytes * scale) for tokens, reads, nbytes in prompts]
    first, later = (reads[0], reads[-1]) if reads else (None, None)
    return Estimate(seconds, result, held * scale, first, later)


def _run(
    trace: Trace, profile: Profile, settings: Settings, parts: int
) -> tuple[float, Result, int, list[tuple[int, int, int]]]:
    """Seconds per token, the result, bytes held at the end, and what chunks of prompts read."""
    replay = Simulator(trace, profile).prepare(settings)
    replay.parts = parts
    decoding = [at for at, step in enumerate(trace.steps) if step.phase == DECODE]
    begin = decoding[len(decoding) // 3]
    warm = replay.run(replace(trace, steps=trace.steps[:begin]))
    replay.totals = Totals()
    totals = replay.run(replace(trace, steps=trace.steps[begin:]))
    seconds = totals.computed_s + totals.stalled_s
    cache = replay.scheduler.cache
    held = sum(cache.capacity) - sum(cache.free)
    return seconds / totals.tokens, totals.result(settings.widths, seconds), held, warm.prompts + totals.prompts


def sample(trace: Trace, most_layers: int, most_tokens: int) -> tuple[list[int], Trace]:
    """Some of the layers of which the trace says something, evenly spaced over the depth, and a trace of these alone;
    its first prompt comes again at its end."""
    layers = _typical(trace, most_layers)
    steps: list[TraceStep] = []
    decoded = 0
    for step in trace.steps:
        if decoded == most_tokens:
            break
        decoded += step.phase == DECODE
        steps.append(_only(step, layers, step.turn))
    prompt = [step for step in steps if step.phase == PREFILL and step.turn == steps[0].turn]
    steps += [replace(step, turn=steps[-1].turn + 1) for step in prompt]
    return layers, replace(
        trace,
        layers=len(layers),
        expert_bytes=tuple(trace.expert_bytes[layer] for layer in layers),
        dense_bytes=tuple(trace.dense_bytes[layer] for layer in layers),
        steps=tuple(steps),
    )


def _typical(trace: Trace, most: int) -> list[int]:
    """Return of each of `most` equal stretches of the depth the layer that is most like its neighbours: in how many
    experts tokens have in common with the token before and with one 32 before, which is what a cache lives on.
    """
    used: dict[int, list[frozenset[int]]] = {}
    for step in trace.steps:
        for layer, routing in step.layers.items():
            used.setdefault(layer, []).append(frozenset(routing.experts))
    moe = sorted(used)
    shared = {layer: (_common(sets, 1), _common(sets, 32)) for layer, sets in used.items()}
    bounds = [i * len(moe) // min(most, len(moe)) for i in range(min(most, len(moe)) + 1)]
    layers = []
    for stretch in (moe[begin:end] for begin, end in pairwise(bounds)):
        means = [fmean(shared[layer][i] for layer in stretch) for i in range(2)]
        layers.append(min(stretch, key=lambda layer: sum(abs(shared[layer][i] - means[i]) for i in range(2))))
    return layers


def _common(sets: Sequence[frozenset[int]], lag: int) -> float:
    """Mean number of members that a set shares with the one `lag` before it."""
    return fmean([len(now & before) for before, now in zip(sets, sets[lag:], strict=False)] or [0.0])


def _only(step: TraceStep, layers: Sequence[int], turn: int) -> TraceStep:
    found = {row: step.layers[layer] for row, layer in enumerate(layers) if layer in step.layers}
    return TraceStep(step.phase, found, step.token, turn)


def usage(trace: Trace) -> NDArray[np.float64]:
    """Return, by layer of the trace and expert, the share of the tokens that use it: [L, E].

    One that the trace never uses counts as used half a time.
    """
    counts = np.zeros((trace.layers, trace.num_experts))
    seen = np.zeros(trace.layers)
    for step in trace.steps:
        for layer, routing in step.layers.items():
            counts[layer, list(routing.experts)] += 1
            seen[layer] += 1
    used = seen > 0
    return np.minimum(np.maximum(counts[used], 0.5) / seen[used, None], 1)


def touched(shares: NDArray[np.float64], tokens: int) -> float:
    """Return how many experts of a layer so many tokens are expected to use, in the mean of the layers."""
    return float((1 - (1 - shares) ** tokens).sum(1).mean())
