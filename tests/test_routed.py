"""Routed precision from the router's weights to the text: on tiny stores, and on the runner alone."""

import json
import zlib
from types import SimpleNamespace

import pytest
import torch

from moert import LLM, SamplingParams
from moert.errors import UsageError
from moert.models.stored_model import StoredModel
from moert.quant import nested
from moert.quant.format import ExpertLayout
from moert.quant.matmul import PackedExpert
from moert.runtime.executor import ExpertRunner
from moert.scheduler.precision import BitRouter, RoutedPrecision

from .program import Program, evaluator

PROMPT = "A mixture of experts is routed. " * 6
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


# The runner alone


EXPERTS, HIDDEN, INNER = 8, 64, 32
LAYOUT = ExpertLayout(HIDDEN, INNER, 32, (2, 3, 4))


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Experts of one layer in a file, without the rest of a store."""
    g = torch.Generator().manual_seed(0)
    pieces = [
        nested.pack_expert(*(torch.randn(*shape, generator=g) for shape in LAYOUT.shapes), LAYOUT)
        for _ in range(EXPERTS)
    ]
    file = tmp_path_factory.mktemp("experts") / "experts.bin"
    file.write_bytes(b"".join(p.numpy().tobytes() for slices in pieces for p in slices))
    size = sum(LAYOUT.slice_sizes)
    return SimpleNamespace(
        layout=LAYOUT,
        pieces=pieces,
        moe_layers=(0,),
        num_experts=EXPERTS,
        kept={0: (3,) * EXPERTS},
        location=lambda layer, expert: SimpleNamespace(file=file, offset=expert * size),
        checksum=lambda layer, expert, index: zlib.crc32(pieces[expert][index].numpy()),
    )


def precision():
    """Thresholds that give every expert all three widths."""
    sensitivity = {0: [[0.1 * (1 + e), 0.03 * (1 + e), 0.01 * (1 + e)] for e in range(EXPERTS)]}
    usage = {0: [[100.0, *(i / 16 for i in range(17))]] * EXPERTS}
    return RoutedPrecision(3.0, BitRouter(LAYOUT.widths, sensitivity, usage))


@pytest.mark.parametrize("slots", [(1, 1, 1), (3, 2, 1), (EXPERTS,) * 3])
@pytest.mark.parametrize("tokens", [1, 40])
def test_every_token_gets_its_experts_at_its_widths(experts, slots, tokens):
    policy = precision()
    runner = ExpertRunner(experts, slots, policy, "silu")
    uses = dict.fromkeys((1, 2, 3), 0)
    for seed in range(4 if tokens > 1 else 30):
        g = torch.Generator().manual_seed(seed)
        weights, indices = torch.rand(tokens, EXPERTS, generator=g).topk(3)
        x, want = torch.randn(tokens, HIDDEN, generator=g), torch.zeros(tokens, HIDDEN, dtype=torch.float64)
        for t in range(tokens):
            counts = policy.one(0, indices[t].tolist(), weights[t].tolist())
            for e, w, n in zip(indices[t].tolist(), weights[t].tolist(), counts, strict=True):
                expert = PackedExpert.from_slices(experts.pieces[e][:n], LAYOUT)
                gate, up, down = (m.rows(0, m.shape[0]).double() for m in (expert.gate, expert.up, expert.down))
                h = gate @ x[t].double()
                want[t] += w * (down @ (h * torch.sigmoid(h) * (up @ x[t].double())))
                uses[n] += 1
        if tokens == 1:
            got = torch.zeros(1, HIDDEN)
            runner.forward_token(0, x, indices[0].tolist(), weights[0].tolist(), got)
        else:
            got = runner(0, x, indices, weights)
        assert ((got - want).norm(dim=1) <= 0.03 * want.norm(dim=1)).all()
    assert runner.counters.token_uses == uses
    assert all(uses.values())
    runner.close()


# Whole models


def test_the_text_is_the_same_at_every_budget(calibrated):
    """Widths are a function of the router's output: not of what is in memory, nor of when it arrives."""
    layout = StoredModel.open(calibrated).layout
    one = sum(layout.slice_sizes)
    answers = []
    for budget in (one, 5 * one, None):
        with LLM(calibrated, precision="routed:2.7", expert_budget=budget) as llm:
            answers.append(llm.generate(PROMPT, GREEDY)[0])
    assert answers[0].token_ids == answers[1].token_ids == answers[2].token_ids
    assert answers[0].stats.bytes_read > 2 * answers[2].stats.bytes_read
    assert answers[0].stats.hit_ratio < answers[1].stats.hit_ratio < answers[2].stats.hit_ratio
    assert [a.stats.precision for a in answers] == ["routed:2.7"] * 3
    assert 2.2 < answers[0].stats.mean_width < 3.2


def test_eval_counts_the_widths_in_use(calibrated, store, capsys, monkeypatch, tmp_path):
    moert = evaluator(Program(capsys, monkeypatch, tmp_path), tmp_path, PROMPT * 8, 100)
    names = ("routed:2.0", "routed:2.5", "routed", "routed:4", "fixed:4", "fixed:2")
    result = moert("-m", calibrated, "--against", store(widths=(16,), dense_bits=16), "--json", "--precision", *names)
    rows = {row["precision"]: row for row in json.loads(result.out)["rows"][1:]}
    assert list(rows) == ["routed:2", "routed:2.5", "routed:3", "routed:4", "fixed:4", "fixed:2"]
    for figure in ("perplexity", "mean_kl", "mean_width", "bits_per_weight", "expert_bytes_per_token"):
        assert rows["routed:2"][figure] == rows["fixed:2"][figure]
        assert rows["routed:4"][figure] == rows["fixed:4"][figure]
    widths = [rows[name]["mean_width"] for name in ("routed:2", "routed:2.5", "routed:3", "routed:4")]
    assert widths == sorted(set(widths))
    low, high = rows["fixed:2"], rows["fixed:4"]
    for row in rows.values():  # bytes grow with every bit alike
        part = (row["mean_width"] - 2) / 2
        between = low["expert_bytes_per_token"] * (1 - part) + high["expert_bytes_per_token"] * part
        assert row["expert_bytes_per_token"] == pytest.approx(between)
    assert rows["routed:3"]["mean_kl"] < rows["fixed:2"]["mean_kl"]


def test_a_chunk_uses_the_widths_that_its_router_weights_ask_for(calibrated):
    with LLM(calibrated, precision="routed:2.7") as llm:
        runner, seen = llm.runner._experts, {1: 0, 2: 0, 3: 0}
        chooser = runner.chooser

        def many(layer, indices, weights):
            for e, w in zip(indices, weights, strict=True):
                for n in chooser.one(layer, e.tolist(), w.tolist()):
                    seen[n] += 1
            return chooser.many(layer, indices, weights)

        runner.chooser = SimpleNamespace(many=many)
        llm.runner.forward(list(range(3, 60)))
        assert llm.runner.counters.token_uses == {n: count for n, count in seen.items() if count}


def test_what_is_used_is_said(calibrated):
    with LLM(calibrated, precision="routed") as llm:
        assert "precision routed:3 (thresholds on the router's weights)" in llm.description[0]


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({"widths": (16,), "dense_bits": 16}, "routed:3", "which this store does not say"),
    ],
)
def test_a_store_that_knows_nothing_of_its_experts_refuses(store, options, text, message):
    with pytest.raises(UsageError, match=message):
        LLM(store(**options), precision=text)


def test_a_mean_width_that_cannot_be_is_refused(calibrated):
    with pytest.raises(
        UsageError, match=r"routed:4.5 asks for a mean width that this store cannot have; it can have 2"
    ):
        LLM(calibrated, precision="routed:4.5")


def test_a_router_that_was_trained_once_is_not_used_any_more(calibrated, calibrated_copy):
    (calibrated_copy / "bit_router.safetensors").write_bytes(b"of an older version")
    StoredModel.open(calibrated_copy).verify()
    answers = []
    for path in (calibrated, calibrated_copy):
        with LLM(path, precision="routed:2.9") as llm:
            answers.append(llm.generate(PROMPT, GREEDY)[0].token_ids)
    assert answers[0] == answers[1]
