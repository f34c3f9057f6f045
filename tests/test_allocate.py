"""Which width each expert keeps: against all allocations that there are, on small instances."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.quant import allocate as module
from moert.quant.allocate import allocate

ERRORS = st.integers(0, 60).map(lambda n: n / 8)


@st.composite
def instances(draw):
    """errors, sizes, limit; sizes differ between items, errors need not fall."""
    width = draw(st.integers(1, 4))
    count = draw(st.integers(1, 6 if width < 4 else 4))
    errors = [[draw(ERRORS) for _ in range(width)] for _ in range(count)]
    steps = st.integers(1, draw(st.sampled_from([1, 4, 30])))
    sizes = [list(itertools.accumulate(draw(steps) for _ in range(width))) for _ in range(count)]
    least, most = sum(row[0] for row in sizes), sum(row[-1] for row in sizes)
    return errors, sizes, draw(st.integers(least, most + 2))


def best_of_all(errors, sizes, limit):
    return min(
        sum(row[b] for row, b in zip(errors, choices, strict=True))
        for choices in itertools.product(*(range(len(row)) for row in sizes))
        if sum(row[b] for row, b in zip(sizes, choices, strict=True)) <= limit
    )


@given(instances())
@settings(max_examples=150, deadline=None)
def test_nothing_is_better(instance):
    errors, sizes, limit = instance
    found = allocate(errors, sizes, limit)
    assert found.nbytes == sum(row[b] for row, b in zip(sizes, found.choices, strict=True)) <= limit
    assert found.error == pytest.approx(sum(row[b] for row, b in zip(errors, found.choices, strict=True)))
    assert found.error == pytest.approx(best_of_all(errors, sizes, limit), abs=1e-9)
    assert found.gap == 0


@given(instances())
@settings(max_examples=100, deadline=None)
def test_with_few_states_the_bound_holds(instance):
    errors, sizes, limit = instance
    before, module.MOST_STATES = module.MOST_STATES, 1
    try:
        found = allocate(errors, sizes, limit)
    finally:
        module.MOST_STATES = before
    best = best_of_all(errors, sizes, limit)
    assert found.nbytes <= limit
    assert found.bound <= best + 1e-9
    assert best <= found.error + 1e-9
    assert found.gap == 0 or found.error <= best * (1 + found.gap) + 1e-9 or not best


@given(instances(), st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_a_higher_limit_is_never_worse(instance, more):
    errors, sizes, limit = instance
    assert allocate(errors, sizes, limit + more).error <= allocate(errors, sizes, limit).error + 1e-9


def large(seed, experts):
    """Draw errors as a real model has them: over three orders of magnitude, a factor of about 4 per bit."""
    draw = random.Random(seed)
    errors = []
    for _ in range(experts):
        base = 10 ** draw.uniform(-3, 0)
        errors.append([base, base / draw.uniform(3, 5), base / draw.uniform(10, 20)])
    return errors, [[5 * 4096, 8 * 4096, 11 * 4096]] * experts


def test_thousands_of_experts_are_solved_to_the_end():
    errors, sizes = large(0, 6144)
    found = allocate(errors, sizes, 6144 * 8 * 4096)
    assert 6143 * 8 * 4096 < found.nbytes <= 6144 * 8 * 4096
    assert found.gap == 0
    assert found.error < 0.8 * sum(row[1] for row in errors)
    assert found == allocate(errors, sizes, 6144 * 8 * 4096)


def test_what_does_not_fit_is_refused_with_the_least_that_would():
    with pytest.raises(ValueError, match="add up to 30 bytes, more than the limit of 29"):
        allocate([[2.0, 1.0]] * 3, [[10, 20]] * 3, 29)
    assert allocate([[2.0, 1.0]] * 3, [[10, 20]] * 3, 30).choices == (0, 0, 0)
    with pytest.raises(ValueError, match="not of the same shape"):
        allocate([[2.0, 1.0]], [[10]], 29)
    assert allocate([], [], 0).choices == ()
