"""Predictions and recommendations, against what is worked out by hand or by trying everything."""

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.errors import BudgetError, UsageError
from moert.hardware.devices import load_device
from moert.planning import predict, recommend
from moert.planning.model_shape import ModelShape
from moert.planning.predict import Prediction
from moert.planning.quality import quality_of
from moert.planning.recommend import CLOSE, LEAST_WIDTH, READING, USABLE, choose, context_for, policies
from moert.planning.routing import drawn, recorded
from moert.runtime.budget import Budget
from moert.scheduler.estimator import estimate, sample, touched, usage
from moert.scheduler.profile import Profile
from moert.scheduler.simulation import Settings
from moert.scheduler.simulator import Simulator
from moert.scheduler.statistics import draw, statistics_for
from moert.scheduler.trace import DECODE, PREFILL, Routing, Trace, TraceStep, draw_trace

MIB = 1 << 20
# Every figure another power of two, so that none can stand in for another unnoticed.
DEVICE = Profile(
    name="board",
    description="none",
    date="2026-11-22",
    disk_bytes_per_s=2.0**30,
    disk_latency_s=2.0**-10,
    disk_chunk_bytes=2.0**20,
    disk_direct=True,
    memory_bytes=2.0**32,
    memory_bytes_per_s=2.0**34,
    library_bytes=100 * MIB,
    expert_s_per_byte={2: 2.0**-31, 3: 2.0**-32, 4: 2.0**-33},
    dense_s_per_byte=2.0**-34,
    prefill_macs_per_s={2: 2.0**35, 3: 2.0**36, 4: 2.0**37},
    dense_prefill_macs_per_s=2.0**38,
    attention_macs_per_s=2.0**39,
    token_overhead_s=2.0**-11,
    layer_overhead_s=2.0**-12,
    miss_overhead_s=2.0**-13,
    load_overhead_s=2.0**-14,
)


def shape_of(layers=3, experts=8, top_k=2, dense_layers=1, **changes):
    """A model whose first layers have no experts; an expert has 2.25, 1.25 and 1.25 MiB."""
    moe = tuple(range(dense_layers, layers))
    known = ModelShape(
        name="toy",
        model_type="qwen3_moe",
        origin="store",
        num_layers=layers,
        moe_layers=moe,
        num_experts=experts,
        top_k=top_k,
        hidden_size=1024,
        expert_inner=1024,
        widest_inner=1024,
        vocab_size=1000,
        max_position_embeddings=8192,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        kv_vectors=2 * 4 * layers,
        kv_vector_size=64,
        widths=(2, 3, 4),
        group_size=64,
        slice_bytes=(9 * MIB // 4, 5 * MIB // 4, 5 * MIB // 4),
        slice_counts=(len(moe) * experts,) * 3,
        dense_bits=8,
        dense_bytes=(4 * MIB,) * layers,
        head_bytes=3 * MIB,
        embedding_bytes=2 * MIB,
        store_bytes=1 << 30,
        parameters=10**8,
        calibrated=True,
    )
    return dataclasses.replace(known, **changes)


def trace_of(shape, choices, prompt=0):
    """A token for each of `choices`: experts, the same in every layer; before them a prompt of such tokens."""
    every = [*itertools.islice(itertools.cycle(choices), prompt), *choices]
    steps = tuple(
        TraceStep(
            PREFILL if at < prompt else DECODE,
            {layer: Routing(tuple(experts), (1 / len(experts),) * len(experts)) for layer in shape.moe_layers},
        )
        for at, experts in enumerate(every)
    )
    sizes = (1,) * shape.num_layers
    return Trace("toy", shape.num_layers, shape.num_experts, shape.top_k, sizes, sizes, steps)


def kv_seconds(shape, tokens):
    """Keys and values of a token in the middle of what is decoded: 2 bytes each, read as dense weights are."""
    per_layer = tokens * 2 * shape.num_kv_heads * shape.head_dim * 2
    return shape.num_layers * per_layer * DEVICE.dense_s_per_byte


@pytest.mark.parametrize(("precision", "mib", "cost"), [("fixed:4", 4.75, 2.0**-33), ("fixed:2", 2.25, 2.0**-31)])
def test_all_in_memory_is_overheads_and_bytes(precision, mib, cost):
    shape = shape_of()
    found = predict(shape, DEVICE, trace_of(shape, [(0, 1)] * 12), precision, 1 << 30, 4096)
    weights = (3 * 4 + 3) * MIB * 2.0**-34 + 2 * 2 * mib * MIB * cost
    seconds = 2.0**-11 + 3 * 2.0**-12 + weights + kv_seconds(shape, 256 + 48)
    assert found.decode_tokens_per_s == pytest.approx(1 / seconds, rel=1e-6)
    assert (found.hit_ratio, found.bytes_read_per_token) == (1, 0)
    assert found.mean_width == int(precision[-1])
    assert found.budget_bytes == found.budget.total == 1 << 30


def test_nothing_in_memory_is_read_every_time():
    """Room for one expert of 4.75 MiB, and two layers that use one each: read whole, then computed."""
    shape = shape_of(top_k=1)
    trace = trace_of(shape, [(0,), (1,)] * 6)
    needs = shape.needs(100 * MIB, 4096, 3)
    found = predict(shape, DEVICE, trace, "fixed:4", needs.least, 4096, recalls=())
    read = 4.75 * MIB
    layer = 2.0**-13 + 2.0**-14 + 2.0**-10 + read * 2.0**-30 + read * 2.0**-33
    seconds = 2.0**-11 + 3 * 2.0**-12 + 15 * MIB * 2.0**-34 + kv_seconds(shape, 304) + 2 * layer
    assert found.decode_tokens_per_s == pytest.approx(1 / seconds, rel=1e-6)
    assert found.hit_ratio == 0
    assert found.bytes_read_per_token == 2 * read
    assert found.expert_budget_bytes == needs.one_expert


def test_a_prompt_is_computed_while_its_experts_are_read():
    """Prompts of 64 tokens that use both experts of two layers: with a slow disk and a fast one."""
    shape = shape_of(experts=2)
    trace = trace_of(shape, [(0, 1)] * 12, prompt=64)
    macs = 2 * 64 * 2 * 3 * 1024 * 1024
    seen = 3 * 8 * 64 * 64 * 65
    dense = 64 * 3 * 4 * MIB * 8 / 8.25
    unpacked = 2 * 2 * 4.75 * MIB * 2.0**-33
    computing = macs / 2.0**37 + unpacked
    rest = dense / 2.0**38 + seen / 2.0**39 + 2.0**-11 + 3 * MIB * 2.0**-34 + 3 * 2.0**-12 + 4 * 2.0**-14
    for disk, first in ((2.0**26, 2.0**-10 + 4 * 4.75 * MIB / 2.0**26), (2.0**33, None)):
        device = dataclasses.replace(DEVICE, disk_bytes_per_s=disk)
        found = predict(shape, device, trace, "fixed:4", 1 << 30, 4096, prompt_tokens=64)
        assert found.ttft_s == pytest.approx(rest + max(first or 0, computing))


def test_memory_that_is_touched_is_within_the_split():
    shape = shape_of()
    found = predict(shape, DEVICE, trace_of(shape, [(0, 1)] * 12), "fixed:4", 1 << 30, 4096)
    budget = found.budget
    assert isinstance(budget, Budget)
    parts = (budget.libraries, budget.dense, budget.kv_cache, budget.workspace, budget.arena)
    assert sum(parts) <= budget.total == 1 << 30
    assert budget.dense == (12 + 3 + 2) * MIB
    assert budget.kv_cache == 4096 * 3 * 2 * 4 * 64 * 2
    held = 2 * 2 * 4.75 * MIB  # two experts of two layers
    assert held + budget.dense < found.peak_rss_bytes < sum(parts) - budget.arena + held


def test_what_does_not_fit_says_the_least_that_would():
    shape = shape_of()
    trace = trace_of(shape, [(0, 1)] * 3)
    with pytest.raises(BudgetError) as caught:
        predict(shape, DEVICE, trace, "fixed:4", 90 * MIB, 4096)
    least = caught.value.least_bytes
    assert least == shape.needs(100 * MIB, 4096, 3).least
    assert predict(shape, DEVICE, trace, "fixed:4", least, 4096).budget_bytes == least
    with pytest.raises(BudgetError):
        predict(shape, DEVICE, trace, "fixed:4", least - 1, 4096)


@pytest.mark.parametrize(
    ("precision", "reason"),
    [("fixed:5", "width that the store does not hold"), ("best", "is not known"), ("routed:9", "mean width")],
)
def test_precisions_that_the_model_cannot_have_are_one_sentence(precision, reason):
    shape = shape_of()
    with pytest.raises(UsageError, match=reason) as caught:
        predict(shape, DEVICE, trace_of(shape, [(0, 1)] * 3), precision, 1 << 30, 4096)
    assert str(caught.value).endswith(".")


def test_a_trace_of_another_model_is_refused():
    with pytest.raises(UsageError, match="has 4 layers of 8 experts, but toy has 3 of 8: record one with this model"):
        recorded(trace_of(shape_of(layers=4), [(0, 1)]), shape_of())
    with pytest.raises(UsageError, match="3 layers of 8 experts, but toy has 3 of 8"):  # experts in another layer
        recorded(trace_of(shape_of(dense_layers=0), [(0, 1)]), shape_of())
    silent = dataclasses.replace(trace_of(shape_of(), [(0, 1)], prompt=2), steps=())
    with pytest.raises(UsageError, match="decodes nothing"):
        recorded(silent, shape_of())


@pytest.mark.parametrize(("precision", "recalls"), [("fixed:4", (0.8,)), ("fixed:4", ()), ("elastic:3", ())])
def test_some_layers_show_what_all_do(precision, recalls):
    """With 8 of 24 layers and a third of the room: within a few percent of what all of them do."""
    shape = shape_of(layers=24, dense_layers=0, experts=64, top_k=4)
    trace = draw(shape, statistics_for("qwen3_moe"), prompt=32, tokens=36)
    every = Settings(64 * sum(trace.expert_bytes) // 3, precision, recalls=recalls)
    device = load_device("server-2-core-amx")
    few, all_of_them = (estimate(trace, device, every, most_layers=n) for n in (8, 24))
    for name, close in (("decode_tokens_per_s", 0.06), ("hit_ratio", 0.02), ("bytes_read_per_token", 0.1)):
        assert getattr(few.decoding, name) == pytest.approx(getattr(all_of_them.decoding, name), rel=close)
    assert few.held_bytes == pytest.approx(all_of_them.held_bytes, rel=0.05)
    assert few.first.nbytes == pytest.approx(all_of_them.first.nbytes, rel=0.1)


def test_an_estimate_of_all_layers_is_the_simulators_run():
    """Without a prompt and with nothing left out, the tokens behind the first third."""
    trace = draw_trace(layers=3, num_experts=8, top_k=2, prompt=0, tokens=9, expert_bytes=4750, dense_bytes=100)
    chosen = Settings(10 * 4750, "fixed:4", recalls=())
    simulator = Simulator(trace, DEVICE)
    whole = simulator.prepare(chosen)
    whole.run(trace)
    part = simulator.prepare(chosen)
    part.run(dataclasses.replace(trace, steps=trace.steps[:3]))
    behind = whole.totals.computed_s + whole.totals.stalled_s - part.totals.computed_s - part.totals.stalled_s
    found = estimate(trace, DEVICE, chosen)
    assert found.seconds == pytest.approx(behind / 6)
    assert found.decoding.bytes_read_per_token == pytest.approx((whole.totals.nbytes - part.totals.nbytes) / 6)


def test_layers_are_taken_evenly_and_the_prompt_comes_again():
    shape = shape_of(layers=10, dense_layers=2)
    layers, some = sample(trace_of(shape, [(0, 1)] * 5, prompt=3), 4, 2)
    assert layers == [2, 4, 6, 8]  # of alike ones the first
    assert [step.phase for step in some.steps] == [PREFILL] * 3 + [DECODE] * 2 + [PREFILL] * 3
    assert some.layers == len(some.expert_bytes) == 4
    assert set(some.steps[0].layers) == {0, 1, 2, 3}


def test_how_many_experts_tokens_touch():
    """By the definition: one minus the probability that none of the tokens uses it."""
    shape = shape_of(layers=2, dense_layers=1, experts=4)
    shares = usage(trace_of(shape, [(0, 1), (0, 2)]))
    assert shares.tolist() == [[1.0, 0.5, 0.5, 0.25]]
    assert touched(shares, 1) == pytest.approx(2.25)
    assert touched(shares, 3) == pytest.approx(1 + 2 * (1 - 0.5**3) + 1 - 0.75**3)


def test_drawn_routes_fit_the_model_and_say_where_they_are_from():
    shape = shape_of(layers=6, dense_layers=2, experts=8)
    routes = drawn(shape, 6)
    assert {layer for step in routes.trace.steps for layer in step.layers} == set(shape.moe_layers)
    assert sum(step.phase == PREFILL for step in routes.trace.steps) == 6
    assert "drawn from statistics (Qwen3-30B-A3B" in routes.about
    found = recorded(routes.trace, shape)
    assert found.trace is routes.trace
    assert found.recalls == routes.recalls
    assert "as recorded with toy, the first 96 of 96 tokens decoded" in found.about


def prediction(precision, speed, width, budget=1 << 30):
    split = Budget(budget, 1, 1, 1, 1, 1, False)
    figures = {"prefill_tokens_per_s": 1.0, "ttft_s": 1.0, "hit_ratio": 1.0, "bytes_read_per_token": 0.0}
    return Prediction(
        precision=precision,
        budget_bytes=budget,
        ctx_size=512,
        prompt_tokens=256,
        budget=split,
        expert_budget_bytes=1,
        decode_tokens_per_s=speed,
        mean_width=width,
        width_histogram={},
        peak_rss_bytes=1,
        store_bytes=1,
        quality=quality_of(precision, True),
        **figures,
    )


ORDER = ["fixed:4", "routed:3", "elastic:3", "fixed:3", "fixed:2"]  # by the KL of the tables in moert/docs/quality.md
WIDTHS = {"fixed:4": 4.0, "routed:3": 2.96, "elastic:3": 2.8, "fixed:3": 3.0, "fixed:2": 2.0}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ORDER), st.floats(0.05, 60), st.integers(1, 4)), min_size=1, max_size=8))
def test_the_choice_is_the_best_of_all_by_the_rule(drawn_settings):
    every = [prediction(name, speed, WIDTHS[name], budget << 30) for name, speed, budget in drawn_settings]
    chosen = choose(every).prediction

    def allowed(p):
        wide = [q for q in every if q.mean_width >= LEAST_WIDTH]
        return p.mean_width >= LEAST_WIDTH or all(q.decode_tokens_per_s < USABLE for q in wide)

    def fast_enough(p):
        speeds = [q.decode_tokens_per_s for q in every if allowed(q)]
        return p.decode_tokens_per_s >= (READING if any(s >= READING for s in speeds) else CLOSE * max(speeds))

    assert allowed(chosen)
    assert fast_enough(chosen)
    for other in every:
        if allowed(other) and fast_enough(other):
            assert ORDER.index(chosen.precision) <= ORDER.index(other.precision)
            assert other.precision != chosen.precision or chosen.budget_bytes <= other.budget_bytes


def test_the_reason_is_one_sentence_that_says_what_was_chosen():
    fast = choose([prediction("fixed:4", 6, 4.0), prediction("fixed:3", 12, 3.0)])
    assert fast.reason == (
        "fixed:3 at 1.00 GiB, context 512: the best quality that answers faster than people read (12 tokens/s, 10 are"
        " wanted)."
    )
    slow = choose([prediction("fixed:4", 3.5, 4.0), prediction("fixed:3", 3.6, 3.0)])
    assert slow.precision == "fixed:4"
    assert "nothing of 2.5 bits or more reaches the 10" in slow.reason
    narrow = choose([prediction("fixed:4", 0.5, 4.0), prediction("fixed:2", 4, 2.0)])
    assert narrow.precision == "fixed:2"
    assert "below 2.5 bits large models lose much" in narrow.reason
    assert (fast.memory_budget, fast.ctx_size) == (1 << 30, 512)


@pytest.mark.parametrize(("disk", "memory"), [(2.0**25, 220), (2.0**27, 220)])
def test_the_recommendation_is_the_choice_among_all_policies(disk, memory):
    """`recommend` stops at the first policy that is fast enough; trying all of them comes to the same."""
    shape = shape_of(experts=16)
    trace = drawn(shape, 16).trace
    device = dataclasses.replace(DEVICE, disk_bytes_per_s=disk)
    found = recommend(shape, device, trace, 1 << 30, 512, memory_budget=memory * MIB)
    every = [predict(shape, device, trace, name, memory * MIB, 512, most_tokens=48) for name in policies(shape)]
    assert found == choose(every)


def test_a_recommendation_stays_within_what_is_available():
    shape = shape_of()
    trace = trace_of(shape, [(0, 1)] * 6)
    found = recommend(shape, DEVICE, trace, 120 * MIB)
    assert found.memory_budget <= 100 * MIB + 0.8 * 120 * MIB
    plenty = recommend(shape, DEVICE, trace, 8 << 30)
    needs = shape.needs(100 * MIB, 4096, 3)
    assert plenty.memory_budget == needs.fixed + needs.all_experts
    assert (plenty.precision, plenty.ctx_size) == ("fixed:4", 4096)
    with pytest.raises(BudgetError) as caught:
        recommend(shape, DEVICE, trace, MIB)
    assert caught.value.least_bytes == shape.needs(100 * MIB, 256, 1).least


def test_the_context_leaves_the_experts_their_share():
    """By the rule: the largest that takes a quarter at most of what experts and context share."""
    shape = shape_of(experts=400)
    for memory in range(110, 1200, 60):
        found = context_for(shape, DEVICE, 3, memory * MIB, 0)
        parts = {}
        for ctx_size in (4096, 2048, 1024, 512, 256):
            needs = shape.needs(100 * MIB, ctx_size, 3)
            if needs.least <= memory * MIB:
                context = needs.kv_cache + needs.workspace
                parts[ctx_size] = context / (memory * MIB - needs.libraries - needs.dense)
        good = [ctx for ctx, part in parts.items() if part <= 0.25 and ctx >= 1024]
        expected = good[0] if good else next((ctx for ctx in parts if ctx <= 1024), 256)
        assert found == expected
    assert context_for(shape_of(max_position_embeddings=300), DEVICE, 3, 1 << 30, 0) == 300


def test_policies_are_those_that_the_store_can_have():
    assert policies(shape_of()) == ORDER
    assert policies(shape_of(calibrated=False)) == ["fixed:4", "fixed:3", "elastic:3", "fixed:2"]
    lossless = shape_of(widths=(16,), slice_bytes=(MIB,), slice_counts=(16,), calibrated=False)
    assert policies(lossless) == ["fixed:16"]
    assert policies(shape_of(widths=(4, 8), slice_bytes=(MIB, MIB), slice_counts=(16, 16))) == ["fixed:8", "fixed:4"]


def test_quality_is_what_the_conversion_measured():
    losses = {2: 0.64, 4: 0.04}
    found = {name: quality_of(name, True, losses) for name in ("fixed:4", "fixed:2", "routed:3", "elastic:3,skip=0.1")}
    assert [found[name].kl_nats[0] for name in found] == pytest.approx([0.04, 0.64, 0.16, 0.16])
    assert all(quality.perplexity_ratio is None for quality in found.values())
    assert found["fixed:2"].text == "KL 0.64"
    assert quality_of("fixed:16", True, losses).kl_nats == (0, 0)


def test_quality_is_what_the_documentation_says():
    """`| fixed:4 | 4.75 | 1.0007 (0.0063) | hardened | 1.0035 (0.0058) | ...`; rounded: the table of conversions."""
    text = (Path(__file__).parents[1] / "moert/docs/quality.md").read_text()
    beside = text.split("\n## Beside other quantisers\n")[1].split("\n## ")[0]
    for name in ("fixed:4", "fixed:3", "fixed:2", "routed:3", "routed:2.5"):
        row = re.search(rf"^\| `{name}` \| [\d.]+ \|(.*)\|$", beside, re.MULTILINE)
        cells = [re.findall(r"[\d.]+", cell) for cell in row[1].split("|")]
        trained = [cells[0], cells[2]]
        quality = quality_of(name, True)
        assert quality.perplexity_ratio == tuple(sorted(float(ratio) for ratio, _ in trained))
        assert quality.kl_nats == tuple(sorted(float(kl) for _, kl in trained))
    rounded = re.search(r"^\| rounding \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    for name, ratio in zip(("fixed:4", "fixed:3", "fixed:2"), rounded.groups(), strict=True):
        assert quality_of(name, False).perplexity_ratio[0] == pytest.approx(float(ratio), abs=0.0006)
    assert quality_of("fixed:16", False).kl_nats == (0, 0)
    assert quality_of("fixed:8", True) is None
    assert quality_of("elastic:3,skip=0.1", True) == quality_of("elastic:3", True)
    assert [quality_of(name, True).text for name in ("fixed:4", "elastic:3")] == ["+0.1 to 0.4%", "+0.4%"]
