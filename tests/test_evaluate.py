"""`moert eval`: against transformers' perplexity, and against brute force in float64 on tiny models."""

import json
import math
import subprocess

import pytest
import torch

from moert import LLM
from moert.config import EngineConfig
from moert.errors import BudgetError, UsageError
from moert.measure import evaluate
from moert.models.stored_model import StoredModel
from moert.quant import reference
from moert.scheduler.precision import FixedPrecision
from moert.text.tokenizer import Tokenizer

from .child import ENVIRONMENT, PYTHON
from .program import Program, evaluator

TEXT = "The router scores the experts, and the token visits the best ones: über 3 of 8 ☃.\n" * 6
WINDOW = 50


@pytest.fixture
def moert(capsys, monkeypatch, tmp_path):
    return evaluator(Program(capsys, monkeypatch, tmp_path), tmp_path, TEXT, WINDOW)


def windows_of(path):
    ids = Tokenizer(path).encode(TEXT)
    assert len(ids) % WINDOW > 1, "the last window is a short one"
    return [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]


def log_probabilities(logits):
    return (logits.double() - logits.double().logsumexp(-1, keepdim=True))[:-1]


# What is measured


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "olmoe", "mixtral"])
def test_perplexity_of_a_lossless_store_is_that_of_transformers(
    moert, store, tiny_checkpoint, reference_logits, family
):
    path = store(family, (16,), 16)
    loss, scored = 0.0, 0
    for ids in windows_of(path):
        scores = log_probabilities(reference_logits(tiny_checkpoint(family), ids))
        loss -= sum(float(scores[t, ids[t + 1]]) for t in range(len(ids) - 1))
        scored += len(ids) - 1
    report = json.loads(moert("-m", path, "--json").out)
    (row,) = report["rows"]
    assert row["perplexity"] == pytest.approx(math.exp(loss / scored), rel=1e-4)
    assert (row["scored_tokens"], row["lossless"], row["precision"]) == (scored, True, "fixed:16")
    assert (row["mean_kl"], row["top1_agreement"], row["layer_errors"]) == (None, None, [])


def test_divergence_and_agreement_are_those_of_a_count_in_float64(moert, store, tiny_checkpoint, reference_logits):
    path = store()
    result = moert("-m", path, "--against", store(widths=(16,), dense_bits=16), "--json", "--precision", "fixed:3")
    lossless, row = json.loads(result.out)["rows"]
    kl, loss, true_loss, same, scored = 0.0, 0.0, 0.0, 0, 0
    with LLM(path, precision="fixed:3") as llm:
        for ids in windows_of(path):
            p = log_probabilities(reference_logits(tiny_checkpoint("qwen3_moe"), ids))
            q = log_probabilities(llm.logits(ids))
            kl += float(sum((p[t].exp() * (p[t] - q[t])).sum() for t in range(len(p))))
            same += sum(int(p[t].argmax()) == int(q[t].argmax()) for t in range(len(p)))
            loss -= sum(float(q[t, ids[t + 1]]) for t in range(len(p)))
            true_loss -= sum(float(p[t, ids[t + 1]]) for t in range(len(p)))
            scored += len(p)
    assert row["mean_kl"] == pytest.approx(kl / scored, rel=1e-3)
    assert row["mean_kl"] > 0.01, "three bits must show"
    assert row["top1_agreement"] == pytest.approx(same / scored, abs=1.5 / scored)  # a tie may fall either way
    assert row["perplexity"] == pytest.approx(math.exp(loss / scored), rel=1e-5)
    assert row["perplexity_ratio"] == pytest.approx(math.exp((loss - true_loss) / scored), rel=1e-4)
    assert lossless["perplexity"] == pytest.approx(math.exp(true_loss / scored), rel=1e-4)


def test_a_lossless_store_does_not_differ_from_itself(moert, store):
    path = store("olmoe", (16,), 16)
    first, row = json.loads(moert("-m", path, "--against", path, "--json").out)["rows"]
    assert row["perplexity"] == first["perplexity"]
    assert (row["mean_kl"], row["top1_agreement"], row["perplexity_ratio"]) == (0, 1, 1)
    assert all(e["output_error"] == e["hidden_error"] == 0 for e in row["layer_errors"])


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])  # with a shared expert: its output counts
def test_errors_of_layers_are_those_of_transformers_with_rounded_experts(
    moert, store, tiny_checkpoint, reference_model, family
):
    path = store(family, (2, 3, 4), 16)
    result = moert("-m", path, "--against", store(family, (16,), 16), "--json", "--precision", "fixed:4", "fixed:2")
    _, *rows = json.loads(result.out)["rows"]
    model = reference_model(tiny_checkpoint(family))
    opened = StoredModel.open(path)
    seen, handles = {}, []

    def record(key):
        def hook(module, inputs, output):
            seen[key] = inputs[0], output

        return hook

    for n, layer in enumerate(model.model.layers):
        handles += [layer.mlp.register_forward_hook(record((n, "mlp"))), layer.register_forward_hook(record((n, "h")))]
    sums = torch.zeros(2, 2, 3, dtype=torch.float64)  # row, layer, squares of y' - y and y, those of y' - y over h's
    tokens = sum(map(len, windows_of(path)))
    with torch.inference_mode():
        for ids in windows_of(path):
            model(torch.tensor([ids]))
            lossless = dict(seen)
            for n, layer in enumerate(model.model.layers):
                (x, y), (_, h) = lossless[n, "mlp"], lossless[n, "h"]
                kept = {name: p.data.clone() for name, p in layer.mlp.experts.named_parameters()}
                for r, slices in enumerate((3, 1)):
                    round_experts(layer.mlp.experts, opened, n, slices)
                    wrong, right, whole = (t.double().square().sum(-1) for t in (layer.mlp(x) - y, y, h))
                    sums[r, n] += torch.stack([wrong.sum(), right.sum(), (wrong / whole).sum()])
                for name, p in layer.mlp.experts.named_parameters():
                    p.data.copy_(kept[name])
    for handle in handles:
        handle.remove()
    for r, row in enumerate(rows):
        for n, error in enumerate(row["layer_errors"]):
            d, y, share = sums[r, n].tolist()
            assert error["layer"] == n
            # Inputs rounded to 8 bits are the part that transformers does not have.
            assert error["output_error"] == pytest.approx(math.sqrt(d / y), rel=0.03)
            assert error["hidden_error"] == pytest.approx(math.sqrt(share / tokens), rel=0.03)


def round_experts(experts, opened, layer, slices):
    """Put what a store's experts stand for into transformers' fused parameters."""
    layout = opened.layout
    for e in range(opened.num_experts):
        file, offset = opened.location(layer, e)
        data = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
        matrices, start = [[], [], []], offset
        for i in range(slices):
            ends = layout.offsets(i)
            for m in range(3):
                size = layout.matrices[m].slice_bytes(i)
                matrices[m].append(data[start + ends[m] : start + ends[m] + size])
            start += layout.slice_sizes[i]
        gate, up, down = (
            reference.dequantise(parts, layout.matrices[m], slices)[: layout.shapes[m][0], : layout.shapes[m][1]]
            for m, parts in enumerate(matrices)
        )
        experts.gate_up_proj.data[e] = torch.cat([gate, up])
        experts.down_proj.data[e] = down


def test_bytes_and_widths_are_those_of_a_count_by_hand(moert, store):
    rows = json.loads(moert("-m", store(), "--json").out)["rows"]
    # Qwen3-MoE of conftest: D 64, 2 layers, 4 heads, 2 key/value heads of 32, F 48, top 3 of 8, V 320, groups of 32.
    D, L, H, J, d, F, K, E, V = 64, 2, 4, 2, 32, 48, 3, 8, 320

    def packed(rows, cols, bits, scales=1):  # columns padded to whole groups
        return rows * -(-cols // 32) * (32 * bits // 8 + 2 * scales)

    kv = J * d * 2 * 2 * (WINDOW + 1) / 2  # keys and values in fp16, at the mean depth of a window
    layer = packed(H * d, D, 8) + 2 * packed(J * d, D, 8) + packed(D, H * d, 8) + 2 * (2 * D + 2 * d) + 2 * E * D + kv
    others = L * layer + 2 * D + packed(V, D, 8) + packed(1, D, 8)
    assert [row["precision"] for row in rows] == ["fixed:4", "fixed:3", "fixed:2"]
    for row, width in zip(rows, (4, 3, 2), strict=True):
        shapes = ((F, D), (F, D), (D, F))
        expert = sum(packed(*shape, width, width - 1) for shape in shapes)  # scales of the widths from 2 on
        assert row["mean_width"] == width
        assert row["expert_bytes_per_token"] == pytest.approx(L * K * expert)
        assert row["bits_per_weight"] == pytest.approx(8 * expert / (3 * D * F))
        touched = sum(packed(*shape, width) for shape in shapes)
        assert row["bytes_touched_per_token"] == pytest.approx(others + L * K * touched)


def test_uses_are_counted_for_each_token_with_the_slices_in_use(store):
    with LLM(store()) as llm:
        for length in (1, 20):
            before = llm.runner.counters.copy()
            llm.runner.forward(list(range(length)))
            assert llm.runner.counters.since(before).token_uses == {3: 2 * 3 * length}  # layers, experts per token


def test_a_precision_can_be_changed_but_not_beyond_what_memory_was_split_for(store):
    ids = list(range(3, 40))
    with LLM(store(), precision="fixed:3") as changed, LLM(store(), precision="fixed:2") as narrow:
        wide = changed.logits(ids)
        changed.runner.use(FixedPrecision(2))
        assert torch.equal(changed.logits(ids), narrow.logits(ids))
        changed.runner.use(FixedPrecision(3))
        assert torch.equal(changed.logits(ids), wide)
        with pytest.raises(UsageError, match="fixed:4 needs more"):
            changed.runner.use(FixedPrecision(4))


def test_token_by_token_measures_the_same_and_what_is_read_fits_what_is_kept(moert, store):
    lossless = store(widths=(16,), dense_bits=16)
    options = ("-m", store(), "--against", lossless, "--precision", "fixed:3", "elastic:3,skip=0.3", "--json")
    _, chunk, _ = json.loads(moert(*options).out)["rows"]
    _, fixed, elastic = json.loads(moert(*options, "--one-by-one", "--expert-budget", "60KiB").out)["rows"]
    for name in ("perplexity", "perplexity_ratio", "mean_kl"):
        assert fixed[name] == pytest.approx(chunk[name], rel=1e-3)
    assert fixed["mean_width"] == 3
    assert 2 <= elastic["mean_width"] <= 4
    assert fixed["layer_errors"] == []
    # Six experts of a token, each of at most all its slices, padded to pages; some of them were there.
    most = 6 * sum(StoredModel.open(store()).layout.slice_sizes)
    assert 0 < elastic["bytes_read_per_token"] < most
    assert 0 < fixed["bytes_read_per_token"] < most


def test_windows_do_not_overlap_and_need_two_tokens():
    assert evaluate.cut(range(9), 4, 0) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert evaluate.cut(range(9), 4, 6) == [[0, 1, 2, 3], [4, 5]]
    assert evaluate.cut(range(2), 512, 20480) == [[0, 1]]


# Memory


def test_the_least_budget_measures_the_same(store):
    path, lossless = StoredModel.open(store()), StoredModel.open(store(widths=(16,), dense_bits=16))

    def rows(budget):
        config = EngineConfig(memory_budget=budget, threads=1)
        evaluation = evaluate.Evaluation(path, lossless, ["fixed:4", "fixed:2"], config, WINDOW, lambda line: None)
        evaluation.run(windows_of(path.path)[:2], lambda line: None)
        evaluation.close()
        return evaluation.rows()

    with pytest.raises(BudgetError, match="too small") as caught:
        rows(1 << 20)
    assert rows(caught.value.least_bytes + (40 << 20)) == rows(None)


def test_peak_memory_stays_below_the_budget(store, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    options = [
        "-m",
        store(),
        "--against",
        store(widths=(16,), dense_bits=16),
        "--text",
        tmp_path / "text.txt",
        "--json",
    ]
    command = [*PYTHON, "-m", "moert", "eval", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    report = json.loads(done.stdout)
    assert 0 < report["peak_rss_bytes"] <= report["budget_bytes"]
