"""The token scheduler, against its promises and against brute force."""

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.scheduler.batching import POLICIES, Candidate, most_alive, most_overlap


def touched(candidates, chosen):
    return sum(any(candidates[i].routes >> bit & 1 for i in chosen) for bit in range(64))


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 4),
    most_delay=st.integers(0, 4),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_nobody_waits_longer_than_allowed_while_sequences_come_and_go(policy, count, most_delay, share, seed):
    rng, choose = random.Random(seed), POLICIES[policy]
    most = max(1, round(share * count * (most_delay + 1)))  # what can be served within the delay
    waited = {}
    for step in range(60):
        for name in [name for name in waited if rng.random() < 0.1]:
            del waited[name]
        for place in range(most):
            if len(waited) < most and rng.random() < 0.5:
                waited[step, place] = 0
        names = list(waited)
        candidates = [Candidate(waited[name], rng.getrandbits(12)) for name in names]
        chosen = choose(candidates, count, most_delay)
        assert chosen == sorted(set(chosen))
        assert len(chosen) == min(count, len(names))
        assert chosen == choose(candidates, count, most_delay), "deterministic"
        for i, name in enumerate(names):
            waited[name] = 0 if i in chosen else waited[name] + 1
            assert waited[name] <= most_delay


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(4, 12), st.integers(0, 2**32))
def test_more_sequences_than_can_be_served_in_time_wait_as_little_as_possible(count, sequences, seed):
    rng, waited = random.Random(seed), [0] * sequences
    for _ in range(40):
        candidates = [Candidate(w, rng.getrandbits(10)) for w in waited]
        chosen = most_overlap(candidates, count, 0)
        waited = [0 if i in chosen else w + 1 for i, w in enumerate(waited)]
        assert max(waited) <= -(-sequences // count) - 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**16 - 1), min_size=4, max_size=8))
def test_where_time_allows_two_of_many_are_the_pair_that_shares_most_with_the_first(routes):
    candidates = [Candidate(0, r) for r in routes]
    chosen = most_overlap(candidates, 2, 9)
    assert 0 in chosen
    best = min(touched(candidates, pair) for pair in combinations(range(len(routes)), 2) if 0 in pair)
    assert touched(candidates, chosen) == best


def test_sequences_with_the_same_routes_step_together_and_touch_fewer_experts():
    rng = random.Random(1)
    groups = [rng.sample(range(64), 12) for _ in range(2)]
    steps = {}
    for name, choose in POLICIES.items():
        rng, waited, total = random.Random(2), [0] * 8, 0
        before = [0] * 8
        for _ in range(200):
            # Each sequence keeps to the experts of its group, of which it uses half at a time.
            now = [sum(1 << e for e in rng.sample(groups[i % 2], 6)) for i in range(8)]
            chosen = choose([Candidate(w, b) for w, b in zip(waited, before, strict=True)], 4, 3)
            total += touched([Candidate(0, r) for r in now], chosen)
            waited = [0 if i in chosen else w + 1 for i, w in enumerate(waited)]
            before = [now[i] if i in chosen else before[i] for i in range(8)]
        steps[name] = total
    assert steps["most-overlap"] < 0.95 * steps["first-come"]


def test_only_a_policy_that_chooses_begins_more_sequences_than_take_a_step():
    assert [most_alive(8, name) for name in POLICIES] == [8, 16]
    assert [most_alive(1, name) for name in POLICIES] == [1, 1]
