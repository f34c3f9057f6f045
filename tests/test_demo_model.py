"""The model that ships: it is small enough, has learnt, and answers through the program as a newcomer calls it."""

import io
import math
import sys

import pytest

from moert import LLM, SamplingParams
from moert.cli.main import run
from moert.hub.resolve import shipped_model

FIVE_GRAM_PERPLEXITY = 35.6  # on the whole held-out text, with the same tokenizer and training text
GREETING = "Hello! Type the first lines of some Python code and I go on with it, or ask me what a function does."


@pytest.fixture(scope="module")
def llm():
    with LLM() as llm:
        yield llm


def test_it_is_small():
    sizes = {p.name: p.stat().st_size for p in shipped_model().iterdir()}
    assert sum(sizes.values()) <= 24e6
    assert sizes["heldout.txt"] <= 300_000


def test_its_files_are_whole(llm):
    llm.store.verify()


@pytest.mark.parametrize("precision", ["fixed:2", "fixed:3", "fixed:4"])
def test_it_has_learnt(precision):
    text = (shipped_model() / "heldout.txt").read_text()
    loss, count = 0.0, 0
    with LLM(precision=precision, ctx_size=512) as llm:
        ids = llm.tokenizer.encode(text)
        for start in range(0, len(ids) - 512, len(ids) // 8):
            chunk = ids[start : start + 512]
            scores = llm.logits(chunk).log_softmax(-1)
            loss -= float(sum(scores[t, chunk[t + 1]] for t in range(511)))
            count += 511
    assert math.exp(loss / count) < FIVE_GRAM_PERPLEXITY / 2


def test_it_greets(llm):
    done = llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(temperature=0, max_tokens=60))
    assert done.text == GREETING
    assert done.finish_reason == "stop"


def test_its_text_is_the_same_at_every_budget(llm):
    params = SamplingParams(temperature=0.8, seed=11, max_tokens=60, ignore_eos=True)
    want = llm.generate("import os\n", params)[0]
    one = llm.store.layout.bytes_at(4)
    for experts in (48, 1):
        with LLM(expert_budget=experts * one) as small:
            got = small.generate("import os\n", params)[0]
            assert got.token_ids == want.token_ids
            assert got.stats.bytes_read > want.stats.bytes_read


def test_chat_as_a_newcomer_calls_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("import os\n"))
    with pytest.raises(SystemExit) as left:
        run(["chat"])
    out, err = capsys.readouterr()
    assert not left.value.code
    assert out.strip()
    assert "the small built-in model" in err
    assert "tokens/s" in err
