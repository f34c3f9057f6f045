"""Checkpoint to text: conversion, engine and Python interface together, against transformers."""

import json
import subprocess

import pytest
import torch

from moert import LLM, MoertError, SamplingParams
from moert.errors import BudgetError, UsageError

from .child import ENVIRONMENT, PYTHON

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def prompt_ids(length, vocab_size=320):
    return torch.randint(3, vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_stores_compute_what_transformers_computes(
    store, tiny_checkpoint, reference_logits, family, fused, dtype
):
    options = {"fused": fused, "dtype": dtype}
    with LLM(store(family, (16,), 16, **options)) as llm:
        for length in (1, 7, 300):
            ids = prompt_ids(length)
            want = reference_logits(tiny_checkpoint(family, **options), ids)
            got = llm.logits(ids)
            assert got.dtype == torch.float32
            assert got.shape == want.shape
            assert (got - want).abs().max() <= 1e-3 * want.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_one_token_at_a_time_equals_prefill(store, family):
    with LLM(store(family, (16,), 16)) as llm:
        ids = prompt_ids(40)
        want = llm.logits(ids)
        llm.runner.rewind(0)
        got = torch.stack([llm.runner.forward([token]) for token in ids])
        assert (got - want).abs().max() <= 1e-3 * want.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_transformers(store, tiny_checkpoint, reference_logits, family):
    ids = prompt_ids(9)
    with LLM(store(family, (16,), 16)) as llm:
        got = []
        for piece in llm.stream(ids, GREEDY):
            got += piece.token_ids
    want = reference_logits(tiny_checkpoint(family), ids + got)[len(ids) - 1 : -1]
    chosen = want.gather(1, torch.tensor(got)[:, None])[:, 0]
    # A tie within the tolerance of the arithmetic may fall either way.
    assert (want.max(dim=1).values - chosen <= 2e-3 * want.abs().max()).all()


def test_the_text_is_the_same_at_every_budget(store):
    path = store("qwen3_moe")
    texts, hits, reads, experts = [], [], [], 16
    with LLM(path) as llm:
        one = llm.store.layout.bytes_at(4)
    for count in (experts, experts // 2, experts // 4, 1):
        with LLM(path, expert_budget=count * one) as llm:
            done = llm.generate("Hello, who are", GREEDY)[0]
            texts.append(done.token_ids)
            hits.append(done.stats.hit_ratio)
            reads.append(done.stats.bytes_read)
            assert done.stats.completion_tokens == len(done.token_ids) == 24
            assert done.stats.mean_width == 4
            assert done.stats.precision == "fixed:4"
    assert all(t == texts[0] for t in texts)
    assert reads[0] <= experts * one, "where everything fits, nothing is read twice"
    assert reads == sorted(reads)
    assert hits == sorted(hits, reverse=True)
    with pytest.raises(BudgetError, match=f"least that would do is {one} bytes"):
        LLM(path, expert_budget=one - 1)


def test_every_width_gives_a_text_of_its_own_quality(store):
    ids = prompt_ids(60)
    with LLM(store("qwen3_moe", (16,), 16)) as llm:
        want = llm.logits(ids).log_softmax(-1)
    losses = []
    for width in (2, 3, 4):
        with LLM(store("qwen3_moe"), precision=f"fixed:{width}") as llm:
            got = llm.logits(ids).log_softmax(-1)
            losses.append(float((want.exp() * (want - got)).sum(-1).mean()))
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < losses[0] / 3


RUN = """
import json, sys
from moert import LLM, SamplingParams
llm = LLM(sys.argv[1], memory_budget=int(sys.argv[2]), ctx_size=512)
done = llm.generate("A mixture of experts is " * 20, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))[0]
print(json.dumps({"text": done.text, **done.stats.as_dict()}))
"""


def run_with_budget(path, budget):
    command = [*PYTHON, "-c", RUN, path, str(budget)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)


def test_peak_memory_stays_within_the_budget_and_less_than_the_least_is_refused(store):
    path = str(store("qwen3_moe"))
    refused = run_with_budget(path, 1 << 20)
    assert "BudgetError" in refused.stderr
    least = int(refused.stderr.split("need at least ")[1].split()[0])
    results = []
    for budget in (least, least + (64 << 20)):
        done = run_with_budget(path, budget)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
        assert results[-1]["peak_rss_bytes"] <= budget == results[-1]["budget_bytes"]
    assert results[0]["text"] == results[1]["text"]
    assert results[0]["bytes_read"] > results[1]["bytes_read"]


def test_a_budget_that_is_too_small_says_what_would_fit(store):
    path = store("qwen3_moe")
    with LLM(path, ctx_size=512) as small, pytest.raises(BudgetError, match=r"--ctx-size \d+ .*would fit"):
        LLM(path, ctx_size=65536, memory_budget=small.runner.budget.total + (32 << 20))


def test_the_kv_cache_is_reused_between_turns(store):
    messages = [{"role": "user", "content": "Hello"}]
    with LLM(store("olmoe")) as llm:
        first = llm.chat(messages, GREEDY)
        assert first.stats.cached_tokens == 0
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And?"}]
        second = llm.chat(messages, GREEDY)
        assert second.stats.cached_tokens > 0
    with LLM(store("olmoe")) as fresh:
        assert fresh.chat(messages, GREEDY).token_ids == second.token_ids


def test_streamed_pieces_join_to_the_completion(store):
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=40, ignore_eos=True)
    with LLM(store("mixtral")) as llm:
        pieces = list(llm.stream("Hello", params))
        whole = llm.generate(["Hello", "Hello"], params)
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "length"
    assert "".join(p.text for p in pieces) == whole[0].text == whole[1].text
    assert [token for p in pieces for token in p.token_ids] == whole[0].token_ids
    assert whole[0].stats.seed == 7


def test_stop_strings_end_an_answer(store):
    with LLM(store("mixtral")) as llm:
        full = llm.generate("Hello", GREEDY)[0].text
        stop = full[len(full) // 2 :][:3]
        done = llm.generate("Hello", GREEDY.replace(stop=(stop,)))[0]
    assert done.finish_reason == "stop"
    assert done.text == full[: full.index(stop)]


def test_an_end_token_ends_an_answer(store):
    with LLM(store("mixtral")) as llm:
        params = SamplingParams(temperature=5.0, top_p=1.0, seed=1, max_tokens=400)
        done = llm.generate("Hello", params)[0]
        assert done.finish_reason == "stop"
        assert done.token_ids[-1] in llm.tokenizer.eos_ids
        assert not llm.tokenizer.eos_ids & set(done.token_ids[:-1])


def test_a_full_context_ends_an_answer(store):
    with LLM(store("qwen3_moe"), ctx_size=20) as llm:
        done = llm.generate("Hello", GREEDY.replace(max_tokens=100))[0]
        assert done.finish_reason == "length"
        assert done.stats.prompt_tokens + done.stats.completion_tokens == 21  # the last one needs no place
        with pytest.raises(UsageError, match="does not fit the context of 20"):
            llm.stream(prompt_ids(20))
        assert llm.logits(prompt_ids(20)).shape == (20, 320)
        with pytest.raises(UsageError, match="does not fit the context of 20"):
            llm.logits(prompt_ids(21))


@pytest.mark.parametrize("token", [-1, 320])
def test_a_token_outside_the_vocabulary_is_named(store, token):
    with LLM(store("qwen3_moe")) as llm:
        want = llm.logits([1, 2, 3])
        llm.runner.rewind(2)
        with pytest.raises(UsageError, match=f"Token id {token} is outside the vocabulary: this model has 320"):
            llm.runner.forward([3, token])
        assert llm.runner.tokens == [1, 2]
        assert torch.allclose(llm.runner.forward([3]), want[-1], atol=1e-3)


def test_an_answer_that_is_left_ends_and_leaves_a_usable_model(store):
    with LLM(store("qwen3_moe"), expert_budget=10**6) as llm:
        want = llm.generate("Hello", GREEDY)[0].token_ids
        stream = llm.stream("Hello there", GREEDY.replace(max_tokens=400))
        for _ in range(3):
            next(stream)
        stream.close()
        assert llm.generate("Hello", GREEDY)[0].token_ids == want
        assert llm.call(lambda runner: len(runner.tokens)) == 0, "nothing runs, or the task would not"


def test_two_answers_at_a_time_are_not_mixed(store):
    with LLM(store("qwen3_moe"), batch_size=1) as llm:
        want = [llm.generate(prompt, GREEDY)[0].token_ids for prompt in ("Hello", "Other")]
        streams = [llm.stream(prompt, GREEDY) for prompt in ("Hello", "Other")]
        got = [[next(stream)] for stream in streams]
        for pieces, stream, ids in zip(got, streams, want, strict=True):
            pieces += stream
            assert [token for piece in pieces for token in piece.token_ids] == ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fixed:7"}, "does not hold"),
        ({"precision": "best"}, "not known"),
        ({"memory_budget": "lots"}, "memory-budget 'lots' is not a size"),
        ({"ctx_size": 0}, "ctx-size 0"),
        ({"threads": -1}, "threads -1"),
    ],
)
def test_wrong_settings_are_refused(store, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        LLM(store("qwen3_moe"), **options)
    assert caught.value.exit_code == 2


def test_a_kernel_that_this_machine_lacks_is_refused(store, monkeypatch):
    monkeypatch.setenv("MOERT_KERNEL", "sve")
    with pytest.raises(UsageError, match="'sve' is not available"):
        LLM(store("qwen3_moe"))


def test_wrong_prompts_are_refused(store):
    with LLM(store("qwen3_moe")) as llm:
        for prompt, message in (("", "empty"), ([], "empty"), ([0, 320], "outside the vocabulary"), ([-1], "outside")):
            with pytest.raises(MoertError, match=message):
                llm.stream(prompt)


def test_what_was_chosen_is_said(store):
    lines = []
    with LLM(store("qwen3_moe"), on_status=lines.append) as llm:
        assert lines == llm.description
    text = "\n".join(lines)
    for word in ("fixed:4", "context", "threads", "memory budget", "all 16 experts"):
        assert word in text
    with LLM(store("qwen3_moe"), expert_budget=100_000, ctx_size=1024) as llm:
        text = "\n".join(llm.description)
    assert "read from disk when needed" in text
    assert "exceeds the 512" in text
