"""`moert eval`: against transformers' perplexity, and against brute force in float64 on tiny models."""

import json
import math
import subprocess
import sys

import pytest
import torch

from moert import LLM, evaluate
from moert.config import EngineConfig
from moert.errors import BudgetError, UsageError
from moert.quant import reference
from moert.scheduler.precision import FixedPrecision
from moert.store.convert import convert
from moert.store.reader import Store
from moert.tokenizer import Tokenizer

from .child import ENVIRONMENT, PYTHON
from .program import Program

TEXT = "The router scores the experts, and the token visits the best ones: über 3 of 8 ☃.\n" * 6
WINDOW = 50
TOP_KEYS = {"text", "window", "complete", "kernel", "threads", "budget_bytes", "peak_rss_bytes", "rows"}
ROW_KEYS = {
    "model",
    "precision",
    "lossless",
    "scored_tokens",
    "perplexity",
    "perplexity_ratio",
    "mean_kl",
    "top1_agreement",
    "mean_width",
    "bits_per_weight",
    "expert_bytes_per_token",
    "bytes_touched_per_token",
    "layer_errors",
}


@pytest.fixture(scope="module")
def store(tiny_checkpoint, tmp_path_factory):
    """store(family, widths, dense_bits) -> folder of a converted tiny checkpoint."""
    made = {}

    def make(family="qwen3_moe", widths=(2, 3, 4), dense_bits=8):
        key = (family, widths, dense_bits)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("stores") / f"{family}-{widths[-1]}"
            convert(tiny_checkpoint(family), made[key], widths=widths, dense_bits=dense_bits, group_size=32)
        return made[key]

    return make


@pytest.fixture
def moert(capsys, monkeypatch, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    program = Program(capsys, monkeypatch, tmp_path)

    def run(*argv, text=tmp_path / "text.txt"):
        return program("eval", "--text", str(text), "--window", str(WINDOW), *(str(part) for part in argv))

    return run


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
    opened = Store.open(path)
    seen, handles = {}, []

    def record(key):
        def hook(module, inputs, output):
            seen[key] = inputs[0], output

        return hook

    for n, layer in enumerate(model.model.layers):
        handles += [layer.mlp.register_forward_hook(record((n, "mlp"))), layer.register_forward_hook(record((n, "h")))]
    sums = torch.zeros(2, 2, 3, dtype=torch.float64)  # row, layer, squares of y' - y, y, h
    with torch.inference_mode():
        for ids in windows_of(path):
            model(torch.tensor([ids]))
            lossless = dict(seen)
            for n, layer in enumerate(model.model.layers):
                (x, y), (_, h) = lossless[n, "mlp"], lossless[n, "h"]
                kept = {name: p.data.clone() for name, p in layer.mlp.experts.named_parameters()}
                for r, slices in enumerate((3, 1)):
                    round_experts(layer.mlp.experts, opened, n, slices)
                    sums[r, n] += torch.stack([t.double().square().sum() for t in (layer.mlp(x) - y, y, h)])
                for name, p in layer.mlp.experts.named_parameters():
                    p.data.copy_(kept[name])
    for handle in handles:
        handle.remove()
    for r, row in enumerate(rows):
        for n, error in enumerate(row["layer_errors"]):
            d, y, h = sums[r, n].tolist()
            assert error["layer"] == n
            # Inputs rounded to 8 bits are the part that transformers does not have.
            assert error["output_error"] == pytest.approx(math.sqrt(d / y), rel=0.03)
            assert error["hidden_error"] == pytest.approx(math.sqrt(d / h), rel=0.03)


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

    def codes(rows, cols, bits):  # columns padded to whole groups
        return rows * -(-cols // 32) * 32 * bits // 8

    def scales(rows, cols):
        return rows * -(-cols // 32) * 2

    def packed(rows, cols, bits):
        return codes(rows, cols, bits) + scales(rows, cols)

    kv = J * d * 2 * 2 * (WINDOW + 1) / 2  # keys and values in fp16, at the mean depth of a window
    layer = packed(H * d, D, 8) + 2 * packed(J * d, D, 8) + packed(D, H * d, 8) + 2 * (2 * D + 2 * d) + 2 * E * D + kv
    others = L * layer + 2 * D + packed(V, D, 8) + packed(1, D, 8)
    assert [row["precision"] for row in rows] == ["fixed:4", "fixed:3", "fixed:2"]
    for row, width in zip(rows, (4, 3, 2), strict=True):
        shapes = ((F, D), (F, D), (D, F))
        expert = sum(codes(*shape, width) + (width - 1) * scales(*shape) for shape in shapes)  # scales of 2 to width
        assert row["mean_width"] == width
        assert row["expert_bytes_per_token"] == pytest.approx(L * K * expert)
        assert row["bits_per_weight"] == pytest.approx(8 * expert / (3 * D * F))
        touched = sum(packed(*shape, width) for shape in shapes)
        assert row["bytes_touched_per_token"] == pytest.approx(others + L * K * touched)


def test_uses_are_counted_for_each_token_with_the_slices_in_use(store):
    with LLM(store()) as llm:
        for length in (1, 20):
            before = llm.engine.counters.copy()
            llm.engine.forward(list(range(length)))
            assert llm.engine.counters.since(before).token_uses == {3: 2 * 3 * length}  # layers, experts per token


def test_a_precision_can_be_changed_but_not_beyond_what_memory_was_split_for(store):
    ids = list(range(3, 40))
    with LLM(store(), precision="fixed:3") as changed, LLM(store(), precision="fixed:2") as narrow:
        wide = changed.logits(ids)
        changed.engine.use(FixedPrecision(2))
        assert torch.equal(changed.logits(ids), narrow.logits(ids))
        changed.engine.use(FixedPrecision(3))
        assert torch.equal(changed.logits(ids), wide)
        with pytest.raises(UsageError, match="fixed:4 needs more"):
            changed.engine.use(FixedPrecision(4))


def test_windows_do_not_overlap_and_need_two_tokens():
    assert evaluate.cut(range(9), 4, 0) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert evaluate.cut(range(9), 4, 6) == [[0, 1, 2, 3], [4, 5]]
    assert evaluate.cut(range(2), 512, 20480) == [[0, 1]]


# Memory


def test_the_least_budget_measures_the_same(store):
    path, lossless = Store.open(store()), Store.open(store(widths=(16,), dense_bits=16))

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


# What is shown


def test_json_has_every_key(moert, store):
    result = moert("-m", store(), "--against", store(widths=(16,), dense_bits=16), "--json", "-t", "1")
    report = json.loads(result.out)
    assert report.keys() == TOP_KEYS
    assert (report["window"], report["complete"], report["threads"]) == (WINDOW, True, 1)
    assert [row["precision"] for row in report["rows"]] == ["fixed:16", "fixed:4", "fixed:3", "fixed:2"]
    for row in report["rows"]:
        assert row.keys() == ROW_KEYS
        for error in row["layer_errors"]:
            assert error.keys() == {"layer", "output_error", "hidden_error"}
    assert "memory budget" in result.err
    assert "window 1 of" in result.err


def test_the_table_is_aligned_markdown(moert, store):
    lossless = store(widths=(16,), dense_bits=16)
    result = moert("-m", store(), "--against", lossless, "--precision", "fixed:4", "fixed:2", "fixed:4", "-q")
    assert (result.code, result.err) == (0, "")
    main, layers, about = result.out.split("\n\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in main.splitlines()]
    assert cells[0][:5] == ["model", "perplexity", "ratio", "KL, nats", "same top token"]
    assert [line[0] for line in cells[2:]] == ["qwen3_moe-16 lossless", "qwen3_moe-4 fixed:4", "qwen3_moe-4 fixed:2"]
    assert len({len(line) for line in main.splitlines()}) == 1
    assert "| 1     |" in layers
    assert "tokens scored in windows of 50 of text.txt" in about


def test_an_interruption_shows_the_windows_that_had_ended(moert, store, monkeypatch):
    logits, calls = evaluate.Evaluation._logits, iter(range(100))

    def interrupted(engine, ids, sums):
        if next(calls) == 8:  # three of each window: lossless, 4 bits, 2 bits
            raise KeyboardInterrupt
        return logits(engine, ids, sums)

    monkeypatch.setattr(evaluate.Evaluation, "_logits", staticmethod(interrupted))
    lossless = store(widths=(16,), dense_bits=16)
    result = moert("-m", store(), "--against", lossless, "--precision", "fixed:4", "fixed:2", "--json")
    assert result.code == 130
    assert "Interrupted" in result.err
    report = json.loads(result.out)
    assert [row["scored_tokens"] for row in report["rows"]] == [2 * (WINDOW - 1)] * 3
    assert report["complete"] is False


def test_an_interruption_before_the_first_window_shows_no_row(moert, store, monkeypatch):
    def interrupted(engine, ids, sums):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate.Evaluation, "_logits", staticmethod(interrupted))
    result = moert("-m", store())
    assert (result.code, result.out) == (130, "")


def test_a_plot_is_a_png(moert, store, tmp_path):
    pytest.importorskip("matplotlib")
    result = moert("-m", store(), "--against", store(widths=(16,), dense_bits=16), "--plot", tmp_path / "out.png")
    assert result.code == 0
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_checkpoint_is_converted_to_be_compared_with(moert, store, tiny_checkpoint, tmp_path):
    result = moert("-m", store(), "--against", tiny_checkpoint("qwen3_moe"), "--json", "--precision", "fixed:4")
    assert [row["lossless"] for row in json.loads(result.out)["rows"]] == [True, False]
    assert len(list((tmp_path / "cache").iterdir())) == 1


# What goes wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--window", "1"), "window of 1 tokens scores nothing"),
        (("--window", "513"), "window of 513 tokens is more than the 512 that the model was made for"),
        (("--tokens", "1"), "1 tokens score nothing"),
        (("--tokens", "-3"), "-3 tokens score nothing"),
        (("--precision", "fixed:5"), "a width that the store does not hold; it holds 2, 3, 4"),
        (("--precision", "fixed:4", "best"), "precision 'best' is not known"),
        (("--memory-budget", "1MiB"), "too small"),
        (("--memory-budget", "much"), "is not a size"),
        (("-t", "0"), "threads 0 must be at least 1"),
        (("--plot", "no/such/folder/out.png"), "there is no folder"),
    ],
)
def test_bad_options_are_one_sentence_and_exit_code_2(moert, store, options, message):
    if "--plot" in options:
        pytest.importorskip("matplotlib")
    result = moert("-m", store(), "-q", *options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no text"),
        (b"", "The text has 0 tokens, but at least 2 are needed"),
        (b"a", "The text has 1 tokens, but at least 2 are needed"),
        (b"\xff\xfe\xfa", "is not UTF-8 text"),
    ],
)
def test_bad_texts_are_one_sentence_and_exit_code_2(moert, store, tmp_path, content, message):
    if content is not None:
        (tmp_path / "bad.txt").write_bytes(content)
    result = moert("-m", store(), "-q", text=tmp_path / "bad.txt")
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(moert, store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = moert("-m", tmp_path / "no store", "--plot", tmp_path / "out.png")
    assert (result.code, result.out) == (2, "")
    assert result.err == "moert: Drawing needs matplotlib, which is not installed: pip install 'moert[plot]'.\n"


def test_what_it_is_compared_with_must_be_lossless_and_the_same_model(moert, store, checkpoint_copy, tmp_path):
    result = moert("-m", store(), "-q", "--against", store())
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "is not lossless, so --against cannot be it: name the lossless store" in result.err
    result = moert("-m", store(), "-q", "--against", store("olmoe", (16,), 16))
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "are not the same model" in result.err
    assert moert("-m", store(), "-q", "--against", tmp_path / "nothing").code != 0

    other = checkpoint_copy("qwen3_moe")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["X"], vocabulary["Y"] = vocabulary["Y"], vocabulary["X"]  # which the text does not hold
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    convert(other, tmp_path / "other", widths=(16,), dense_bits=16)
    result = moert("-m", store(), "-q", "--against", tmp_path / "other")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "do not have the same vocabulary" in result.err
