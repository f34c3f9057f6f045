"""`--record-trace`: what is written of a run, against the routers of transformers."""

import pytest
import torch

from moert import LLM, SamplingParams
from moert.models.stored_model import StoredModel
from moert.scheduler.trace import DECODE, PREFILL, read_trace
from moert.train.recording import trace_shape

from .program import Program

PROMPT = [5, 77, 140, 9, 301, 18, 44, 230, 61, 12]


@pytest.fixture
def moert(capsys, monkeypatch, tmp_path):
    return Program(capsys, monkeypatch, tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_reads_all_layers_and_the_head(store, tied):
    found = StoredModel.open(store(tie_word_embeddings=tied))
    sizes = {tensor.name: tensor.nbytes for tensor in found.meta.dense}
    assert ("lm_head.weight" in sizes) != tied
    layers = trace_shape(found).dense_bytes
    assert sum(layers) == sum(sizes.values()) - (0 if tied else sizes["model.embed_tokens.weight"])
    assert layers[0] == sum(size for name, size in sizes.items() if ".layers.0." in name)


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_routes_and_tokens_are_those_of_transformers(store, tiny_checkpoint, reference_model, tmp_path, name):
    options = {"num_hidden_layers": 4, "mlp_only_layers": [1]}
    with LLM(store(widths=(16,), dense_bits=16, **options), ctx_size=64) as llm:
        llm.record_trace(tmp_path / name)
        done = llm.generate("ab", SamplingParams(max_tokens=3, ignore_eos=True, temperature=0))[0]
        llm.runner.rewind(0)
        llm.runner.forward(PROMPT)
        for token in (7, 8, 200):
            llm.runner.forward([token])
        first = llm.tokenizer.encode("ab")
    trace = read_trace(tmp_path / name)
    assert (trace.layers, trace.num_experts, trace.top_k) == (4, 8, 3)
    assert [bool(size) for size in trace.expert_bytes] == [True, False, True, True]
    assert all(trace.dense_bytes)
    tokens = [*first, *done.token_ids[:-1], *PROMPT, 7, 8, 200]
    assert [step.token for step in trace.steps] == tokens
    phases = [PREFILL] * len(first) + [DECODE] * 2 + [PREFILL] * len(PROMPT) + [DECODE] * 3
    assert [step.phase for step in trace.steps] == phases
    assert [step.turn for step in trace.steps] == [0] * (len(first) + 2) + [1] * (len(PROMPT) + 3)
    model = reference_model(tiny_checkpoint("qwen3_moe", **options))
    with torch.inference_mode():
        logits = model(torch.tensor([[*PROMPT, 7, 8, 200]]), output_router_logits=True).router_logits
    for layer, scores in zip((0, 2, 3), logits, strict=True):
        weights, experts = scores.softmax(-1).topk(3)
        weights = weights / weights.sum(-1, keepdim=True)
        for t, step in enumerate(trace.steps[len(first) + 2 :]):
            assert set(step.layers) == {0, 2, 3}
            assert step.layers[layer].experts == tuple(experts[t].tolist())
            assert step.layers[layer].weights == pytest.approx(weights[t].tolist(), abs=2e-3)


def test_a_pass_that_breaks_off_is_left_out(store, tmp_path, monkeypatch):
    with LLM(store(), ctx_size=64) as llm:
        llm.record_trace(tmp_path / "t.csv")
        llm.runner.forward(PROMPT)
        block = llm.runner.decoder.layers[1].mlp
        experts = block.experts

        def interrupted(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(experts, "forward_token", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.runner.forward([3])
        monkeypatch.undo()
        llm.runner.forward([4])
    assert [step.token for step in read_trace(tmp_path / "t.csv").steps] == [*PROMPT, 4]


def test_sequences_that_run_together_are_turns_of_their_own(store, tmp_path):
    params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0)
    with LLM(store(), ctx_size=64, batch_size=2) as llm:
        llm.record_trace(tmp_path / "a.csv")
        for prompt in ("ab", "The router"):
            llm.generate(prompt, params)
    with LLM(store(), ctx_size=64, batch_size=2) as llm:
        llm.record_trace(tmp_path / "both.csv")
        llm.generate(["ab", "The router"], params)
    alone, both = (
        {turn: [step for step in trace.steps if step.turn == turn] for turn in (0, 1)}
        for trace in (read_trace(tmp_path / "a.csv"), read_trace(tmp_path / "both.csv"))
    )
    assert [[(s.token, s.phase) for s in steps] for steps in both.values()] == [
        [(s.token, s.phase) for s in steps] for steps in alone.values()
    ]
    assert [[s.layers[1].experts for s in steps] for steps in both.values()] == [
        [s.layers[1].experts for s in steps] for steps in alone.values()
    ]


def test_being_recorded_changes_no_byte(store, tmp_path):
    with LLM(store(), ctx_size=64) as llm:
        plain = llm.logits(PROMPT)
        llm.record_trace(tmp_path / "t.csv")
        assert torch.equal(llm.logits(PROMPT), plain)


def test_commands_record(moert, store, tmp_path):
    options = ("-m", str(store()), "-c", "64", "-q")
    for name, *command in (
        ("a.csv", "generate", "-p", "ab", "-n", "3", "--ignore-eos"),
        ("b.csv.gz", "chat", "-n", "3", "--ignore-eos"),
        ("c.csv", "bench", "-p", "4", "-n", "2", "-r", "1", "--no-warmup"),
    ):
        result = moert(*command, *options, "--record-trace", str(tmp_path / name), stdin="ab\n")
        assert result.code == 0, result.err
        assert {step.phase for step in read_trace(tmp_path / name).steps} == {PREFILL, DECODE}


def test_a_trace_that_cannot_be_written_is_said_before_the_model_is_loaded(moert, tmp_path):
    result = moert("generate", "-m", "nowhere", "-p", "x", "--record-trace", str(tmp_path / "no" / "t.csv"))
    assert (result.code, result.out) == (2, "")
    assert "no, which does not exist." in result.err
    result = moert("bench", "-m", "nowhere", "--record-trace", str(tmp_path))
    assert result.code == 2
    assert "is a folder" in result.err
