"""Traces drawn from routing statistics: they have these, and caches find in them what they find in recorded ones."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moert.scheduler.profile import read_profile
from moert.scheduler.simulator import Settings, Simulator
from moert.scheduler.statistics import DEFAULT, DEPTHS, KINDS, PUBLISHED, draw, measure, statistics_for
from moert.scheduler.trace import DECODE, PREFILL, Trace, read_trace

TRACES = Path(__file__).parents[2] / "shared" / "traces"
DEVICE = Path(__file__).parents[1] / "device_profiles" / "jetson-orin-nano-8gb.json"


def sizes(layers: int = 12, num_experts: int = 128, top_k: int = 8) -> SimpleNamespace:
    moe = tuple(range(1, layers))  # the first is dense
    return SimpleNamespace(
        name="a model",
        num_layers=layers,
        moe_layers=moe,
        num_experts=num_experts,
        top_k=top_k,
        slice_bytes=(3 << 10, 1 << 10, 1 << 10),
        dense_bytes=(7,) * layers,
    )


@pytest.mark.parametrize("family", [*PUBLISHED, "unknown"])
def test_published_statistics_make_sense(family: str) -> None:
    found = statistics_for(family)
    assert (found is DEFAULT) == (family == "unknown")
    assert found.source
    assert found.recall_source
    assert all(0 < recall < 1 for recall in found.recalls)
    for kind in KINDS:
        curve = getattr(found, kind)
        assert len(curve) == len(DEPTHS)
        # Chance is K / E; a few figures of a short recording lie just below.
        assert all(0.9 * found.top_k / found.num_experts < x < 0.6 for x in curve)
    assert "none are published" in DEFAULT.source


def test_a_drawn_trace_has_the_form_of_the_model_and_is_the_same_for_a_seed() -> None:
    shape = sizes()
    trace = draw(shape, DEFAULT, prompt=5, tokens=3, seed=1)
    assert trace == draw(shape, DEFAULT, prompt=5, tokens=3, seed=1) != draw(shape, DEFAULT, prompt=5, tokens=3)
    assert (trace.model, trace.layers, trace.num_experts, trace.top_k) == ("a model", 12, 128, 8)
    assert trace.expert_bytes == (0, *[5 << 10] * 11)
    assert trace.dense_bytes == shape.dense_bytes
    assert [step.phase for step in trace.steps] == [PREFILL] * 5 + [DECODE] * 3
    for step in trace.steps:
        assert tuple(step.layers) == shape.moe_layers
        for routing in step.layers.values():
            assert len(set(routing.experts)) == 8
            assert list(routing.weights) == sorted(routing.weights, reverse=True)
            assert math.isclose(sum(routing.weights), 1)


@pytest.mark.parametrize(("family", "num_experts", "top_k"), [("qwen3_moe", 128, 6), ("mixtral", 8, 2), ("x", 64, 8)])
def test_a_drawn_trace_has_the_statistics(family: str, num_experts: int, top_k: int) -> None:
    """Counted here over pairs of tokens, one expert after the other."""
    expected = statistics_for(family)
    trace = draw(sizes(49, num_experts, top_k), expected, prompt=60, tokens=400, seed=3)
    sets = {layer: [set(step.layers[layer].experts) for step in trace.steps] for layer in range(1, 49)}

    def overlap(pairs: list[tuple[int, int]]) -> float:
        return float(np.mean([len(s[a] & s[b]) / top_k for s in sets.values() for a, b in pairs]))

    answer = range(60, 460)
    for kind, lags in (("next", [1]), ("near", [2, 3]), ("soon", [4, 8, 12]), ("late", [64, 128])):
        found = overlap([(n, n - lag) for lag in lags for n in answer if n - lag >= 60])
        stated = np.interp(np.linspace(0, 1, 48), DEPTHS, getattr(expected, kind)).mean()
        assert abs(found - stated) < 0.02, kind
    stated = np.interp(np.linspace(0, 1, 48), DEPTHS, expected.prompt).mean()
    assert abs(overlap([(a, b) for a in range(0, 60, 4) for b in answer[::9]]) - stated) < 0.02


def test_measuring_a_drawn_trace_gives_what_it_was_drawn_from() -> None:
    flat = {kind: (value,) * len(DEPTHS) for kind, value in zip(KINDS, (0.5, 0.42, 0.36, 0.3, 0.2), strict=True)}
    expected = replace(DEFAULT, num_experts=128, top_k=8, **flat)
    found = measure(draw(sizes(30), expected, prompt=200, tokens=600, seed=2), "drawn")
    assert (found.num_experts, found.top_k, found.source) == (128, 8, "drawn")
    for kind in KINDS:
        assert abs(np.mean(getattr(found, kind)) - getattr(expected, kind)[0]) < 0.03, kind
    short = draw(sizes(), DEFAULT, prompt=1, tokens=39)
    with pytest.raises(ValueError, match="only 39 tokens"):
        measure(short, "")


def test_few_layers_and_experts_will_do() -> None:
    trace = draw(sizes(2, 2, 2), DEFAULT, prompt=0, tokens=60)
    assert all(set(step.layers[1].experts) == {0, 1} for step in trace.steps)
    assert set(measure(trace, "").next) == {1.0}


@pytest.mark.skipif(not TRACES.is_dir(), reason="the recorded traces are not in ../shared/traces")
@pytest.mark.parametrize(
    ("file", "family", "budgets"),
    [
        ("qwen3-30b-a3b.csv.gz", "qwen3_moe", (1000, 4000)),
        ("gpt-oss-120b.csv.gz", "gpt_oss", (2000, 16000)),
    ],
)
def test_caches_find_in_a_drawn_trace_what_they_find_in_the_recorded_one(
    file: str, family: str, budgets: tuple[int, ...]
) -> None:
    real = read_trace(TRACES / file)
    measured, stated = measure(real, ""), statistics_for(family)
    for kind in KINDS:  # what the table says is what is measured
        assert np.allclose(getattr(measured, kind), getattr(stated, kind), atol=0.0011), kind
    shape = sizes(real.layers, real.num_experts, real.top_k)
    shape.moe_layers, shape.dense_bytes = tuple(range(real.layers)), real.dense_bytes
    prompt = sum(step.phase == PREFILL for step in real.steps)
    drawn = draw(shape, stated, prompt=prompt, tokens=len(real.steps) - prompt, seed=1)
    drawn = replace(drawn, expert_bytes=real.expert_bytes)

    def hits(trace: Trace, mib: int) -> tuple[float, float]:
        found = Simulator(trace, read_profile(DEVICE)).run(Settings(mib << 20, "fixed:4", recalls=()))
        return found.run.hit_ratio, found.lru.hit_ratio

    for mib in budgets:
        assert np.allclose(hits(drawn, mib), hits(real, mib), atol=0.045), mib
