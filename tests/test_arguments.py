"""Prompts and sampling parameters as callers give them, on the model that ships with the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moert import LLM, SamplingParams
from moert.engine.arguments import as_model, as_params, as_prompt, as_prompts
from moert.engine.sampling import ResolvedParams
from moert.errors import UsageError

ONE = SamplingParams(max_tokens=1, temperature=0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(ctx_size=64) as model:
        yield model


def test_prompts_in_all_their_forms() -> None:
    ids = [3, 1, 2]
    for one in (ids, tuple(ids), np.array(ids), torch.tensor(ids), [np.int64(i) for i in ids]):
        assert as_prompts(one) == [ids]
        assert as_prompt(one) == ids
        assert as_prompts([one, "text"]) == [ids, "text"]
    assert as_prompts(torch.tensor([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]
    assert as_prompts("text") == ["text"]
    assert as_prompts([]) == as_prompts(()) == []
    assert all(type(token) is int for token in as_prompts(np.array(ids))[0])


def test_a_flat_list_of_token_ids_is_one_prompt(llm: LLM) -> None:
    (done,) = llm.generate([67, 70], ONE)
    assert done == llm.generate([[67, 70]], ONE)[0] or done.token_ids == llm.generate([[67, 70]], ONE)[0].token_ids
    assert done.stats.prompt_tokens == 2
    assert llm.generate([]) == []
    assert list(llm.stream_many([])) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts is None, but must be text, a list of token ids, or a list of these."),
        (5, "prompts is 5, but must be text"),
        (b"text", "prompts is a bytes, but must be text"),
        ({"prompt": "x"}, "prompts is a dict, but must be text"),
        (["a", 3], "Prompt 2 of 2 is 3, but must be text or a list of token ids."),
        (["a", None], "Prompt 2 of 2 is None, but must be"),
        ([["a", 3]], "The prompt holds a str among its token ids, which must be whole numbers."),
        ([[1, 2], [1.5]], "Prompt 2 of 2 holds 1.5 among its token ids"),
        ([True], "The prompt is True, but must be text"),
        ([[]], "The prompt is empty; give at least one token."),
        ("", "The prompt is empty; give at least one token."),
        ([-1], "The prompt holds token ids outside the vocabulary of "),
        ([10**30], "The prompt holds token ids outside the vocabulary of "),
    ],
)
def test_prompts_of_wrong_types_say_what_was_expected(llm: LLM, prompts: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        llm.generate(prompts, ONE)
    assert str(caught.value).startswith(message)


def test_one_prompt_of_a_wrong_type_says_so_too(llm: LLM) -> None:
    for call in (llm.stream, llm.logits):
        with pytest.raises(UsageError, match="The prompt is None, but must be text or a list of token ids"):
            call(None)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="The prompt holds None among its token ids"):
            call([1, None])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 3}, "params is a dict, but must be SamplingParams, or a list with one for each prompt."),
        (3, "params is 3, but must be SamplingParams"),
        ("fast", "params is a str, but must be SamplingParams"),
        ([ONE], "There are 2 prompts, but 1 sampling parameters: give one for each."),
        ([ONE, 3], "params is 3, but must be SamplingParams, as in SamplingParams(max_tokens=9)."),
    ],
)
def test_wrong_sampling_parameters_say_what_was_expected(llm: LLM, params: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        llm.generate(["a", "b"], params)
    assert str(caught.value).startswith(message)
    with pytest.raises(UsageError, match="params is a dict"):
        llm.stream("a", {"max_tokens": 3})  # type: ignore[arg-type]


def test_what_is_not_given_is_the_models_default(llm: LLM) -> None:
    own = llm.default_params
    assert own != ResolvedParams(), "the shipped model has defaults of its own"
    (params,) = as_params(SamplingParams(max_tokens=5), 1, own)
    assert params == own.replace(max_tokens=5)
    assert as_params([None, SamplingParams(top_k=0)], 2, own) == [own, own.replace(top_k=0)]
    drawn = [llm.generate("import", SamplingParams(seed=4, max_tokens=12))[0].token_ids for _ in range(2)]
    whole = llm.generate("import", own.replace(seed=4, max_tokens=12))[0].token_ids
    moerts = llm.generate("import", ResolvedParams(seed=4, max_tokens=12, temperature=2.0))[0].token_ids
    assert drawn == [whole, whole]
    assert drawn[0] != moerts


def test_a_temperature_too_small_to_divide_by_is_greedy(llm: LLM) -> None:
    greedy = llm.generate("import", SamplingParams(temperature=0, max_tokens=8))[0].token_ids
    assert llm.generate("import", SamplingParams(temperature=1e-40, max_tokens=8))[0].token_ids == greedy


def test_models_are_named_by_text_or_path() -> None:
    assert (as_model(None), as_model("o/m"), as_model(Path("a/b"))) == (None, "o/m", str(Path("a/b")))
