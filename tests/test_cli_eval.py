"""`moert eval` as a program: what it shows, and what it refuses. What it measures is tested in test_evaluate.py."""

import json
import sys

import pytest

from moert.convert.convert import convert
from moert.measure import evaluate

from .program import Program, evaluator

TEXT = "The router scores the experts, and the token visits the best ones.\n" * 6
WINDOW = 50
TOP_KEYS = {"text", "window", "complete", "kernel", "threads", "budget_bytes", "peak_rss_bytes", "rows"}
ROW_KEYS = {
    *("model", "precision", "lossless", "scored_tokens", "perplexity", "perplexity_ratio", "mean_kl", "top1_agreement"),
    *(
        "mean_width",
        "bits_per_weight",
        "expert_bytes_per_token",
        "bytes_touched_per_token",
        "bytes_read_per_token",
        "layer_errors",
    ),
}


@pytest.fixture
def moert(capsys, monkeypatch, tmp_path):
    return evaluator(Program(capsys, monkeypatch, tmp_path), tmp_path, TEXT, WINDOW)


# What is shown


def test_json_has_every_key(moert, store):
    result = moert("-m", store(), "--against", store(widths=(16,), dense_bits=16), "--json", "-t", "1", "-v")
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
        (("--window", "513"), "window of 513 tokens is more than the 512 that the model was trained for"),
        (("--tokens", "1"), "1 tokens score nothing"),
        (("--tokens", "-3"), "-3 tokens score nothing"),
        (("--precision", "fixed:5"), "a width that the store does not hold; it holds 2, 3, 4"),
        (("--precision", "fixed:4", "best"), "precision 'best' is not known"),
        (("--precision", "elastic:3", "elastic:3,skip=7"), "has the option 'skip=7', which is not one of its two"),
        (("--precision", "elastic:1"), "asks for a bound outside the widths of the store; it holds 2, 3, 4"),
        (("--expert-budget", "1KiB"), "holds no expert"),
        (("--memory-budget", "1MiB"), "too small"),
        (("--memory-budget", "much"), "is not a size"),
        (("-t", "0"), "threads 0 must be at least 1"),
        (("--plot", "no/such/folder/out.png"), "there is no folder"),
    ],
)
def test_bad_options_are_one_sentence_and_exit_code_2(moert, store, options, message):
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
