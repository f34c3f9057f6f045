"""Who takes part in a step, against the promises of the module."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from moert.scheduler.batching import PATIENCE, Candidate, admissions, choose

CANDIDATES = st.lists(st.tuples(st.booleans(), st.integers(0, 2 * PATIENCE), st.integers(0, 9)), max_size=12).map(
    lambda rows: [Candidate(kind, number, waited, left) for number, (kind, waited, left) in enumerate(rows)]
)


@settings(max_examples=200, deadline=None)
@given(CANDIDATES, st.integers(1, 4), st.integers(1, 12))
def test_a_step_takes_as_many_as_it_may_of_those_that_need_not_yield(running, most, room):
    chosen = choose(running, most, room)
    assert len(set(chosen)) == len(chosen)
    prompts = [i for i in chosen if running[i].prompt_tokens]
    decoding = [i for i in chosen if not running[i].prompt_tokens]
    assert chosen == prompts + decoding
    able = [i for i, c in enumerate(running) if c.interactive or c.waited >= PATIENCE] or [*range(len(running))]
    assert set(chosen) <= set(able)
    waiting = [i for i in able if not running[i].prompt_tokens]
    assert len(decoding) == min(most, len(waiting))
    left_out = set(waiting) - set(decoding)
    assert all(running[i].waited <= running[j].waited for i in left_out for j in decoding)
    sizes = [running[i].prompt_tokens for i in able if running[i].prompt_tokens]
    assert prompts == [i for i in able if running[i].prompt_tokens][: len(prompts)], "first come, first served"
    assert bool(prompts) == bool(sizes)
    assert len(prompts) <= 1 or sum(sizes[: len(prompts)]) <= room
    assert len(prompts) == len(sizes) or sum(sizes[: len(prompts) + 1]) > room


@settings(max_examples=200, deadline=None)
@given(CANDIDATES, CANDIDATES, st.integers(1, 4))
def test_requests_begin_in_their_order_and_batch_requests_wait_for_interactive_ones(waiting, running, most):
    order = list(admissions(waiting, running, most))
    begun = [waiting[i] for i in order]
    for kind in (True, False):
        own = [c for c in begun if c.interactive == kind]
        assert len(own) <= max(0, most - sum(c.interactive == kind for c in running))
    assert [c.arrival for c in begun if c.urgent] == sorted(c.arrival for c in begun if c.urgent)
    assert [c.urgent for c in begun] == sorted((c.urgent for c in begun), reverse=True)
    if any(c.interactive for c in [*running, *waiting]):
        assert all(c.urgent for c in begun)


def test_a_batch_request_progresses_whatever_interactive_ones_do():
    rng = random.Random(0)
    waited, steps = {"interactive": 0, "batch": 0}, []
    for _ in range(200):
        running = [
            Candidate(True, 0, waited["interactive"], rng.choice((0, 3))),
            Candidate(False, 1, waited["batch"], rng.choice((0, 3))),
        ]
        chosen = [("interactive", "batch")[i] for i in choose(running, 1, 3)]
        steps.append(chosen)
        waited = {name: 0 if name in chosen else waited[name] + 1 for name in waited}
        assert waited["interactive"] <= 1
        assert waited["batch"] <= PATIENCE + 1
    assert sum("batch" in chosen for chosen in steps) >= 200 // (PATIENCE + 2)
