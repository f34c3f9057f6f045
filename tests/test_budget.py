"""Sizes as people write them, and the split of a memory budget."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.config import EngineConfig, format_bytes, parse_bytes
from moert.errors import BudgetError, UsageError
from moert.hardware.memory import available_bytes, library_bytes
from moert.runtime.budget import Needs, split_budget

MIB, GIB = 1 << 20, 1 << 30
NEEDS = Needs(
    libraries=256 * MIB, dense=100 * MIB, kv_cache=50 * MIB, workspace=30 * MIB, one_expert=MIB, all_experts=999 * MIB
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * GIB),
        ("1500MB", 1_500_000_000),
        ("800m", 800_000_000),
        ("1.5 gib", 3 * GIB // 2),
        ("4096", 4096),
        (7, 7),
        ("3KiB", 3072),
        ("1T", 10**12),
        ("12b", 12),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2 GiB extra", "-1", "two", "1e9", "0", 0, -5, "2PiB"])
def test_wrong_sizes_are_refused_with_the_option(text):
    with pytest.raises(UsageError, match="memory-budget"):
        parse_bytes(text, "memory-budget")


def test_sizes_for_people():
    sizes = {0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 5 * MIB: "5.0 MiB", 3 * GIB: "3.00 GiB"}
    assert {n: format_bytes(n) for n in sizes} == sizes


@pytest.mark.parametrize("name", ["memory_budget", "expert_budget", "ctx_size", "threads"])
def test_settings_below_one_are_refused(name):
    with pytest.raises(UsageError, match=name.replace("_", "-")):
        EngineConfig(**{name: 0})


@settings(max_examples=200)
@given(st.integers(1, 4 * GIB))
def test_a_split_never_exceeds_the_budget_and_the_least_is_exact(total):
    if total < NEEDS.least:
        with pytest.raises(BudgetError) as caught:
            split_budget(NEEDS, total, None, 8 * GIB)
        assert caught.value.least_bytes == NEEDS.least
    else:
        split = split_budget(NEEDS, total, None, 8 * GIB)
        used = split.libraries + split.dense + split.kv_cache + split.workspace + split.arena
        assert NEEDS.least <= total == split.total
        assert used <= total
        assert split.arena == min(total - NEEDS.fixed, NEEDS.all_experts)


def test_the_least_does_and_one_byte_less_does_not():
    assert split_budget(NEEDS, NEEDS.least, None, 8 * GIB).arena == NEEDS.one_expert
    with pytest.raises(BudgetError, match=f"at least {NEEDS.least} bytes") as caught:
        split_budget(NEEDS, NEEDS.least - 1, None, 8 * GIB)
    assert caught.value.exit_code == 2
    assert caught.value.least_bytes == NEEDS.least


def test_the_least_expert_budget_does_and_one_byte_less_does_not():
    split = split_budget(NEEDS, None, NEEDS.one_expert, 8 * GIB)
    assert split.arena == NEEDS.one_expert
    assert split.total == NEEDS.least
    with pytest.raises(BudgetError, match=f"least that would do is {NEEDS.one_expert} bytes"):
        split_budget(NEEDS, None, NEEDS.one_expert - 1, 8 * GIB)


def test_both_budgets_must_hold():
    with pytest.raises(BudgetError, match="too small"):
        split_budget(NEEDS, NEEDS.least, 500 * MIB, 8 * GIB)
    assert split_budget(NEEDS, 2 * GIB, 500 * MIB, 8 * GIB).arena == 500 * MIB


def test_without_a_budget_it_is_what_is_available_or_what_the_model_can_use():
    assert split_budget(NEEDS, None, None, 100 * GIB).arena == NEEDS.all_experts
    small = split_budget(NEEDS, None, None, GIB)
    assert small.automatic
    assert small.total <= NEEDS.libraries + 0.8 * GIB
    assert "80% of the available memory" in small.line()
    with pytest.raises(BudgetError, match="available"):
        split_budget(NEEDS, None, None, 10 * MIB)


def test_measured_figures_are_sensible():
    assert library_bytes() > 50 * MIB
    assert 0 < available_bytes() < 1 << 50
