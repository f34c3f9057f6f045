"""Elastic precision: its bound and its choices against brute force, and what is computed against float64."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.api import LLM
from moert.runtime.executor import ExpertRunner
from moert.scheduler.cache import SliceCache
from moert.scheduler.elastic import ErrorBudget, _Expert, absence_sensitivity, generic_sensitivity
from moert.scheduler.planner import Scheduler
from moert.scheduler.precision import ElasticPrecision, parse_precision
from moert.scheduler.types import ExpertKey, Load, Prediction, RoutedExpert

from .test_runtime import EXPERTS, HIDDEN, LAYOUT, assert_close, expected, routing
from .test_runtime import store as one_layer  # noqa: F401

WIDTHS, SIZES = (2, 3, 4), (7, 4, 5)
CURVE = st.lists(st.floats(0, 0.2), min_size=1, max_size=3)


def ladder_of(curves, bound, skip=0.0, sizes=SIZES):
    """Make the error budget of one layer with these experts."""
    precision = ElasticPrecision(bound, skip=skip)
    error_budget = precision.error_budget(WIDTHS, {0: [len(curve) for curve in curves]}, sizes)
    generic = generic_sensitivity(WIDTHS)
    assert all(
        list(known) == generic[: len(curve)] for known, curve in zip(error_budget.sensitivity[0], curves, strict=True)
    )

    return ElasticPrecision(bound, SimpleNamespace(sensitivity={0: curves}), skip).error_budget(WIDTHS, {}, sizes)


@st.composite
def asked(draw, curves, slices=True):
    """Experts that some tokens are routed to, their squared weights, how many slices are there; and the tokens."""
    tokens = draw(st.sampled_from([1, 1, 1, 40]))
    experts = draw(st.lists(st.integers(0, len(curves) - 1), min_size=1, max_size=4, unique=True))
    weights = [[draw(st.floats(0, 0.5)) for _ in range(draw(st.integers(1, min(tokens, 3))))] for _ in experts]
    routed = [RoutedExpert(e, len(w), sum(w), len(curves[e])) for e, w in zip(experts, weights, strict=True)]
    have = [draw(st.integers(0, len(curves[e]))) for e in experts]
    return routed, [sum(x * x for x in w) for w in weights], have, tokens


@settings(max_examples=100, deadline=None)
@given(st.data(), st.lists(CURVE, min_size=4, max_size=6), st.floats(2, 4), st.sampled_from([0.0, 0.1, 1.0]))
def test_the_bound_holds_at_every_moment(data, curves, bound, skip):
    error_budget, used, allowed = ladder_of(curves, bound, skip), 0.0, 0.0
    for _ in range(data.draw(st.integers(1, 12))):
        routed, squares, have, tokens = data.draw(asked(curves))
        counts = error_budget.choose(0, routed, squares, have, tokens)
        for r, square, held, n in zip(routed, squares, have, counts, strict=True):
            curve = curves[r.expert]
            assert n <= r.slices
            if n == 0:
                assert held == 0, "only what is missing is left out"
                assert r.weight < skip * r.tokens, "only what weighs little is left out"
            assert n <= max(held, 1) or curve[n - 1] < curve[max(held, 1) - 1], "what is read does good"
            # The named width lies on a line between two whole widths; beyond what there is of an expert, its last.
            below = min(int(bound) - 2, len(curve) - 1)
            above = min(below + 1, len(curve) - 1)
            own = curve[below] + (bound - int(bound)) * (curve[above] - curve[below])
            allowed += square * own
            used += square * (curve[n - 1] if n else absence_sensitivity(curve, WIDTHS))
        assert used <= allowed * (1 + 1e-9) + 1e-12
    assert (error_budget.used, error_budget.allowed) == (
        pytest.approx(used, abs=1e-12),
        pytest.approx(allowed, abs=1e-12),
    )


@settings(max_examples=100, deadline=None)
@given(st.data(), st.lists(CURVE, min_size=4, max_size=4), st.floats(2, 4))
def test_what_is_read_is_at_most_one_step_more_than_the_cheapest_choice_within_the_bound(data, curves, bound):
    error_budget = ladder_of(curves, bound)
    routed, squares, have, tokens = data.draw(asked(curves))
    counts = error_budget.choose(0, routed, squares, have, tokens)

    def nbytes(choice):
        return sum(sum(SIZES[h:n]) for h, n in zip(have, choice, strict=True))

    def sensitivity(choice):
        return sum(s * curves[r.expert][n - 1] for r, s, n in zip(routed, squares, choice, strict=True))

    assert sensitivity(counts) <= error_budget.allowed * (1 + 1e-9) + 1e-12
    choices = itertools.product(*(range(1, r.slices + 1) for r in routed))
    least = min(nbytes(choice) for choice in choices if sensitivity(choice) <= error_budget.allowed)
    steps = [sum(SIZES[max(h, 1) : r.slices]) for r, h in zip(routed, have, strict=True)]
    assert nbytes(counts) <= least + max(steps)
    assert nbytes(counts) == least or nbytes(counts) > nbytes([max(h, 1) for h in have])


def test_what_a_prompt_did_too_well_is_not_lent_to_a_long_answer():
    curves = [[0.1, 0.03, 0.01]] * 4
    error_budget = ladder_of(curves, 3)
    error_budget.choose(0, [RoutedExpert(e, 500, 125.0, 3) for e in range(4)], [31.25] * 4, [3] * 4, 500)
    one = [RoutedExpert(e, 1, 0.25, 3) for e in range(4)]
    grant = 4 * 0.25**2 * 0.03
    before = error_budget.used
    widths = [error_budget.choose(0, one, [0.25**2] * 4, [1] * 4)[0] for _ in range(200)]
    assert error_budget.used - before <= (200 + 64) * grant * (1 + 1e-9)
    assert 1 in widths[:10]
    assert set(widths[100:]) != {1}


def test_without_measurements_an_expert_is_worth_all_of_its_output():
    assert absence_sensitivity(generic_sensitivity((2, 3, 4)), (2, 3, 4)) == pytest.approx(1)
    assert absence_sensitivity(generic_sensitivity((4, 8)), (4, 8)) == pytest.approx(1)
    assert absence_sensitivity(generic_sensitivity((16,)), (16,)) == 1
    assert absence_sensitivity([0.01], (2, 3)) == pytest.approx(0.01 / 0.106)


def test_a_refinement_on_its_way_is_not_waited_for():
    cache = SliceCache([4, 4, 4])
    scheduler = Scheduler(cache, error_budget=ladder_of([[0.1, 0.03, 0.01]] * 4, 2), ahead=10)
    asks = [RoutedExpert(0, 1, 0.5, 3)]
    assert scheduler.plan(0, asks, 1, [0.25]).slices == {0: 1}
    assert scheduler.prefetch([Prediction(0, 0, 0.9, 2)]).loads[0] == Load(0, 0, 1, 2)
    plan = scheduler.plan(0, asks, 1, [0.25])
    assert (plan.slices, plan.waves[0].resident, plan.waves[0].awaited, plan.waves[0].loads) == ({0: 1}, (0,), (), ())
    scheduler.arrived(Load(0, 0, 1, 2))
    assert scheduler.plan(0, asks, 1, [0.25]).slices == {0: 2}
    assert cache.resident_experts() == {ExpertKey(0, 0): 2}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("elastic:", "is not known"),
        ("elastic:x", "is not known"),
        ("fixed:4,skip=0.1", "is not known"),
        ("routed:3,route=0.1", "is not known"),
        ("elastic:1.9", "asks for a bound outside the widths of the store; it holds 2, 3, 4"),
        ("elastic:4.5", "asks for a bound outside the widths"),
        ("elastic:3,", "option ''"),
        ("elastic:3,skip", "option 'skip'"),
        ("elastic:3,skip=2", "option 'skip=2'"),
        ("elastic:3,skip=-1", "option 'skip=-1'"),
        ("elastic:3,rout=0.1", "option 'rout=0.1', which is not one of its two: skip=W leaves missing"),
        ("elastic:3,skip=0.1,skip=0.1", "option 'skip=0.1'"),
    ],
)
def test_what_elastic_cannot_be_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_precision(text, WIDTHS)


def test_elastic_names_itself():
    names = ["elastic:3", "elastic:2.5,skip=0.05", "elastic:3,route=0.1", "elastic:3,skip=0.05,route=0.1"]
    assert [str(parse_precision(name, WIDTHS)) for name in names] == names
    assert str(parse_precision("elastic,route=.2,skip=0", WIDTHS)) == "elastic:3,route=0.2"
    assert parse_precision("fixed:3", WIDTHS).route == 0


# With the runtime


@pytest.fixture
def make_elastic(one_layer):  # noqa: F811
    runners = []

    def make(capacity, bound=3.0, skip=0.0, route=0.0):
        precision = ElasticPrecision(bound, None, skip, route)
        runners.append(ExpertRunner(one_layer, capacity, precision, "silu"))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


def settled(runner, monkeypatch):
    """Note what the error budget decides from now on: a list of {expert: slices}."""
    found, choose = [], ErrorBudget.choose

    def noted(self, layer, routed, *others):
        counts = choose(self, layer, routed, *others)
        found.append({r.expert: n for r, n in zip(routed, counts, strict=True)})
        return counts

    monkeypatch.setattr(ErrorBudget, "choose", noted)
    return found


def expected_of(one_layer, counts, x, indices, weights):  # noqa: F811
    """The sum in float64 with so many slices of each expert."""
    parts = torch.zeros(x.shape, dtype=torch.float64)
    for e, n in counts.items():
        if n:
            parts += expected(
                one_layer, n, x, torch.full((len(x), 1), e), (weights * (indices == e)).sum(1, keepdim=True)
            )
    return parts


@pytest.mark.parametrize("capacity", [(2, 1, 1), (5, 3, 1), (EXPERTS,) * 3])
@pytest.mark.parametrize("skip", [0.0, 0.3, 1.0])
def test_what_is_computed_is_what_was_settled(one_layer, make_elastic, monkeypatch, capacity, skip):  # noqa: F811
    runner = make_elastic(capacity, 2.6, skip)
    found = settled(runner, monkeypatch)
    seen = set()
    for step, tokens in enumerate([1, 6, 1, 1, 1, 30, 1, 1, 1, 1]):
        x, indices, weights = routing(tokens, 3, step)
        weights = weights / weights.sum(1, keepdim=True)
        if tokens == 1:
            got = torch.zeros(1, HIDDEN)
            runner.forward_token(0, x, indices[0].tolist(), weights[0].tolist(), got)
        else:
            got = runner(0, x, indices, weights)
        seen |= set(found[-1].values())
        want = expected_of(one_layer, found[-1], x, indices, weights)
        assert ((got - want).norm(dim=1) <= 0.03 * want.norm(dim=1) + 1e-6).all()
    error_budget = runner.scheduler.error_budget
    assert 0 < error_budget.used <= error_budget.allowed * (1 + 1e-9)
    assert max(seen) <= 3
    assert len(seen) > 1
    assert runner.counters.token_uses.total() == 3 * (8 + 36)


def test_preloading_reads_everything_at_its_full_width(make_elastic):
    runner = make_elastic((EXPERTS,) * 3)
    runner.preload()
    assert runner.counters.bytes_read == EXPERTS * sum(LAYOUT.slice_sizes)
    assert runner.scheduler.error_budget.allowed == 0, "nothing was computed"


@pytest.mark.parametrize("at", range(6))
def test_ctrl_c_leaves_the_bound_and_the_runner_right(one_layer, make_elastic, monkeypatch, at):  # noqa: F811
    runner = make_elastic((3, 2, 1), 2.5, 0.2)
    found, start, calls = settled(runner, monkeypatch), runner.residency._begin, itertools.count()

    def interrupted(*args, **kwargs):
        if next(calls) == at:
            raise KeyboardInterrupt
        return start(*args, **kwargs)

    monkeypatch.setattr(runner.residency, "_begin", interrupted)
    broken = 0
    for step in range(8):
        x, indices, weights = routing(1 + 9 * (step % 2), 3, step)
        try:
            got = runner(0, x, indices, weights)
        except KeyboardInterrupt:
            broken += 1
            continue
        assert_close(got, expected_of(one_layer, found[-1], x, indices, weights))
    assert broken == 1
    error_budget = runner.scheduler.error_budget
    assert error_budget.used <= error_budget.allowed * (1 + 1e-9)


# Cache-conditional routing


def test_the_bonus_is_for_what_is_in_memory(make_elastic):
    runner = make_elastic((3, 3, 3), route=0.25)
    assert runner.routing_bias(0, 3).tolist() == [0.0] * EXPERTS
    for step in range(4):
        x, indices, weights = routing(2, 2, step)
        runner(0, x, indices, weights)
        held = runner.residency.table.held(0, list(range(EXPERTS)))
        assert runner.routing_bias(0, EXPERTS).tolist() == [0.25 * (n > 0) for n in held]
    assert runner.routing_bias(0, EXPERTS + 1) is None, "nearly all are needed anyway"
    runner.residency.update()
    assert runner.routing_bias(0, 1).tolist() == [
        0.25 * (n > 0) for n in runner.residency.table.held(0, list(range(EXPERTS)))
    ]
    assert make_elastic((3, 3, 3)).routing_bias(0, 1) is None


def test_with_everything_in_memory_routing_changes_nothing_and_with_little_the_favoured_are_chosen(store):
    ids = list(range(3, 60))

    def run(precision, **options):
        with LLM(store(), precision=precision, ctx_size=64, prefetch="off", **options) as llm:
            llm.runner.preload()
            before = llm.runner.counters.copy()
            logits = [llm.runner.forward([i]) for i in ids]
            return torch.stack(logits), llm.runner.counters.since(before)

    plain, _ = run("elastic:4")
    assert torch.equal(plain, run("elastic:4,route=1")[0])
    small, often = run("elastic:4", expert_budget="60KiB")
    assert torch.allclose(plain, small, atol=1e-3), "a bound of the widest width is that width"
    other, seldom = run("elastic:4,route=1", expert_budget="60KiB")
    assert not torch.allclose(plain, other, atol=1e-3)
    assert seldom.bytes_read < often.bytes_read
    # Each token still gets its best expert of each layer; nothing else is read but what fills the arena at first.
    misses = seldom.expert_uses - seldom.expert_hits
    assert misses <= 2 * len(ids) + 2 * 3 < often.expert_uses - often.expert_hits


def test_the_status_says_that_the_text_can_differ(store):
    said = []
    LLM(store(), precision="elastic:3", on_status=said.append).close()
    assert any("precision elastic:3 (depends on what is in memory: the same prompt" in line for line in said)


def test_a_plan_may_not_know_that_an_expert_has_fewer_slices():
    expert = _Expert([1.0, 0.5, 0.1], 0.2, [10, 10, 10])
    for held in (0, 1, 2):
        assert expert.begin(held, 3) == expert.begin(held, 2)
        assert expert.step(1, held, 3) == expert.step(1, held, 2)
