"""Experts in an arena, and pairs of tokens and experts in the order in which the kernels take them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.quant import placed
from moert.quant.format import ExpertLayout

from .test_triton_kernels import LAYOUT, make_experts, routing


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_items_hold_every_pair_once(tokens, num_experts, seed, sums):
    experts, _ = make_experts(LAYOUT, [1] * num_experts, device="cpu")
    tokens_of, weights = routing(tokens, num_experts, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placed, "RANGE_TOKENS", 16)
        work = placed.plan_work(experts, tokens_of, weights if sums else None, tokens)
    size = 3 + LAYOUT.num_slices
    parts = work.num_pairs, work.num_pairs, size * work.num_items, work.num_ranges + 1
    order, weight, items, starts = (part.tolist() for part in work.numbers.split(parts))
    expert_at = {offsets[0] // 64: e for e, offsets in enumerate(experts.offsets)}
    items = [items[i : i + size] for i in range(0, len(items), size)]
    assert all(item[0] == 1 for item in items)
    items = [(expert_at[at], first, count) for _, first, count, at, *_ in items]
    got = [(e, order[p], p) for e, first, count in items for p in range(first, first + count)]
    want = [(e, t) for e, of in enumerate(tokens_of) for t in of.tolist()]
    assert [p for *_, p in got] == list(range(len(want)))
    assert all(1 <= count <= work.block for *_, count in items)
    if not sums:
        assert [pair[:2] for pair in got] == want
        return
    assert sorted(pair[:2] for pair in got) == sorted(want)
    known = {(e, t): w for e, of in enumerate(tokens_of) for t, w in zip(of.tolist(), weights[e].tolist(), strict=True)}
    assert [known[e, t] for e, t, _ in got] == torch.tensor(weight, dtype=torch.int32).view(torch.float32).tolist()
    span = 1 if work.block == 1 else 16
    for r in range(work.num_ranges):
        for _, first, count in items[starts[r] : starts[r + 1]]:
            assert {order[p] // span for p in range(first, first + count)} == {r}
    assert starts[0] == 0
    assert starts[work.num_ranges] == len(items)


def test_experts_and_tokens_that_do_not_fit_are_refused():
    arena = torch.zeros(1 << 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="raw experts have no planes"):
        placed.PlacedExperts(ExpertLayout(64, 32, 32, (16,)), arena, [])
    for wrong in (arena[:100], arena.view(-1, 2)[:, 0], arena.view(torch.int8), arena[1:65]):
        with pytest.raises(ValueError, match="the arena is not"):
            placed.PlacedExperts(LAYOUT, wrong, [])
    for offsets in ([], [0, 4096, 8192, 12288]):
        with pytest.raises(ValueError, match=f"expert 1 has {len(offsets)} slices, not 1 to 3"):
            placed.PlacedExperts(LAYOUT, arena, [[0], offsets])
    last = len(arena) - LAYOUT.offsets(0)[-1]
    placed.PlacedExperts(LAYOUT, arena, [[last]])
    for at in (-64, 32, last + 64):
        with pytest.raises(ValueError, match=f"slice 0 of expert 0 does not lie in the arena at offset {at}"):
            placed.PlacedExperts(LAYOUT, arena, [[at]])
    experts = placed.PlacedExperts(LAYOUT, arena, [[0]])
    for tokens_of, weights, message in (
        ([], [], "tokens for 0 experts, and 1"),
        ([torch.tensor([0, 1])], [torch.ones(1)], "not one weight for each token"),
        ([torch.tensor([2])], [torch.ones(1)], "not one of the 2 inputs"),
        ([torch.tensor([-1])], [torch.ones(1)], "not one of the 2 inputs"),
        ([torch.tensor([1, 1])], [torch.ones(2)], "the same token twice"),
    ):
        with pytest.raises(ValueError, match=message):
            placed.plan_work(experts, tokens_of, weights, 2)
