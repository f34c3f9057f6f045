"""Sampling against transformers' processors; stop strings against a search of the whole text."""

from __future__ import annotations

import dataclasses
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moert.engine.sampling import (
    ResolvedParams,
    Sampler,
    SamplingParams,
    StopMatcher,
    candidates,
    penalise,
    usable_fields,
)
from moert.errors import MoertError, UsageError


def logits_for(seed: int, size: int = 50) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def ours(logits: torch.Tensor, params: ResolvedParams) -> torch.Tensor:
    """Probabilities [V] of the candidates."""
    values, ids = candidates(logits, params)
    result = torch.zeros(len(logits))
    result[torch.arange(len(logits)) if ids is None else ids] = values.softmax(0)
    return result


OFF = ResolvedParams(temperature=1.0, top_p=1.0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("warper", "changes"),
    [
        (TopKLogitsWarper(7), {"top_k": 7}),
        (TopKLogitsWarper(1000), {"top_k": 1000}),
        (TopPLogitsWarper(0.9), {"top_p": 0.9}),
        (TopPLogitsWarper(1e-6), {"top_p": 1e-6}),
        (MinPLogitsWarper(0.05), {"min_p": 0.05}),
        (MinPLogitsWarper(1.0), {"min_p": 1.0}),
    ],
)
def test_each_filter_equals_transformers(seed: int, warper: object, changes: dict[str, float]) -> None:
    logits = logits_for(seed)
    expected = warper(None, logits[None].clone())[0].softmax(0)  # type: ignore[operator]
    torch.testing.assert_close(ours(logits, OFF.replace(**changes)), expected)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(0, 60),
    p=st.floats(0.05, 1.0),
    m=st.floats(0.0, 0.5),
    temperature=st.floats(0.2, 3.0),
    penalty=st.floats(0.5, 2.0),
    history=st.lists(st.integers(0, 49), max_size=20),
)
def test_the_whole_chain_equals_transformers(
    seed: int, k: int, p: float, m: float, temperature: float, penalty: float, history: list[int]
) -> None:
    logits = logits_for(seed)
    scores = logits[None].clone()
    ids = torch.tensor([history], dtype=torch.int64)
    scores = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores) if history else scores
    scores = TemperatureLogitsWarper(temperature)(ids, scores)
    for warper in (TopKLogitsWarper(k) if k else None, TopPLogitsWarper(p), MinPLogitsWarper(m)):
        scores = warper(ids, scores) if warper else scores
    penalised = penalise(logits, history, penalty) if history else logits
    mine = ours(penalised / temperature, OFF.replace(top_k=k, top_p=p, min_p=m))
    torch.testing.assert_close(mine, scores[0].softmax(0), atol=1e-6, rtol=1e-4)


def test_tokens_that_tie_with_the_last_of_the_top_k_stay() -> None:
    assert ours(torch.tensor([1.0, 2.0, 2.0, 2.0]), OFF.replace(top_k=2)).count_nonzero() == 3


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log()
    sampler = Sampler(OFF.replace(seed=3))
    counts = torch.bincount(torch.tensor([sampler(logits, ()) for _ in range(4000)]), minlength=3) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.2, 0.7]), atol=0.03, rtol=0)


def test_a_seed_reproduces_and_a_random_one_is_reported() -> None:
    logits = logits_for(1)
    first = Sampler(SamplingParams(temperature=1.5))
    drawn = [first(logits, ()) for _ in range(20)]
    again = Sampler(SamplingParams(temperature=1.5, seed=first.seed))
    assert [again(logits, ()) for _ in range(20)] == drawn
    other = Sampler(SamplingParams(temperature=1.5, seed=first.seed + 1))
    assert [other(logits, ()) for _ in range(20)] != drawn


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"top_k": 1, "temperature": 5.0}])
def test_greedy(changes: dict[str, float]) -> None:
    logits = logits_for(2)
    before = logits.clone()
    best = int(logits.argmax())
    assert Sampler(OFF.replace(**changes))(logits, ()) == best
    assert Sampler(OFF.replace(**changes, repeat_penalty=1000.0))(logits, [best]) != best
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_that_is_not_finite_is_an_error(bad: float, temperature: float) -> None:
    with pytest.raises(MoertError, match="not finite"):
        Sampler(OFF.replace(temperature=temperature))(torch.tensor([0.0, bad, 1.0]), ())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repeat_penalty", 0.0),
        ("max_tokens", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 0.5),
        ("temperature", 10**400),
        ("temperature", object()),
        ("top_k", "40"),
        ("max_tokens", 10**12),
        ("max_tokens", [5]),
        ("ignore_eos", 1),
        ("stop", "text"),
        ("stop", 5),
        ("stop", {"a": 1}),
        ("stop", ["a", None]),
        ("stop", ("",)),
    ],
)
def test_a_bad_value_names_its_field(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{field} is "):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_what_is_left_open_is_filled_from_defaults() -> None:
    params = SamplingParams(temperature=0, stop=["a"])
    assert repr(params) == "SamplingParams(temperature=0.0, stop=('a',))"
    assert repr(SamplingParams()) == "SamplingParams()"
    assert params.resolve() == ResolvedParams(temperature=0.0, stop=("a",))
    model = ResolvedParams(temperature=0.6, top_k=20, stop=("b",), seed=3)
    assert params.resolve(model) == model.replace(temperature=0.0, stop=("a",))
    assert SamplingParams(stop=()).resolve(model).stop == ()
    assert model.resolve(ResolvedParams(top_k=5)) is model
    assert [f.name for f in dataclasses.fields(SamplingParams)] == [f.name for f in dataclasses.fields(ResolvedParams)]
    assert all(f.default is None for f in dataclasses.fields(SamplingParams))
    with pytest.raises(UsageError, match="top_k is None"):
        model.replace(top_k=None)
    for each in (params, model):
        assert pickle.loads(pickle.dumps(each)) == each


def test_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint8(7))  # type: ignore[arg-type]
    assert (params.temperature, params.top_k, params.seed) == (0.5, 3, 7)
    assert (type(params.temperature), type(params.top_k)) == (float, int)


def test_defaults_of_a_checkpoint() -> None:
    config = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": None, "repetition_penalty": 1.05, "eos": 3}
    params = SamplingParams.from_generation_config(config)
    assert params == SamplingParams(temperature=0.6, top_k=20, repeat_penalty=1.05)
    assert SamplingParams.from_generation_config({}) == SamplingParams()
    assert SamplingParams.from_generation_config({"do_sample": False}).resolve().greedy
    assert SamplingParams.from_generation_config({"stop_strings": "END"}).stop == ("END",)


@pytest.mark.parametrize("value", [{"top_k": None}, {"top_k": 0}, {"top_k": -1}, {"temperature": None}])
def test_a_default_that_is_off(value: dict[str, object]) -> None:
    assert SamplingParams.from_generation_config(value).resolve() == ResolvedParams()
    assert usable_fields(value)[1] == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"top_p": 7}, "top_p is 7, but must be"),
        ({"top_k": -2}, "top_k is -2, but must be"),
        ({"temperature": "0.7"}, "temperature is '0.7', but must be"),
        ({"max_new_tokens": [5]}, r"max_tokens is \[5\], but must be"),
        ({"stop_strings": 5}, "stop is 5"),
    ],
)
def test_a_default_that_cannot_be_used_is_a_warning(value: dict[str, object], message: str) -> None:
    assert SamplingParams.from_generation_config({**value, "repetition_penalty": 1.5}).repeat_penalty == 1.5
    fields, warnings = usable_fields(value)
    assert fields == {}
    assert len(warnings) == 1
    assert re.search(message, warnings[0])


@settings(max_examples=300)
@given(
    text=st.text("ab", max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 12), max_size=6),
)
def test_stop_strings_do_not_depend_on_the_pieces(text: str, stops: list[str], cuts: list[int]) -> None:
    # Oracle: the first prefix of the text that ends in a stop string, cut before the longest of those.
    ends = (n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stops))
    end = next(ends, None)
    expected = text if end is None else min((text[:end].removesuffix(s) for s in stops), key=len)
    for bounds in ([0, *sorted(cuts), 12], range(13)):
        matcher = StopMatcher(stops)
        shown = ""
        pairs = list(zip(bounds, list(bounds)[1:], strict=False))
        for a, b in pairs:
            shown += matcher.push(text[a:b])
            assert expected.startswith(shown)
        assert matcher.stopped == (end is not None)
        assert shown + matcher.flush() == (expected if end is not None or bounds != range(13) else text)
