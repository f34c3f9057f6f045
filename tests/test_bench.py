"""`moert bench`: what is measured, how it is counted, and how it is shown. No test asserts a speed."""

import csv
import io
import json
import math
import os

import pytest

from moert import LLM
from moert.errors import UsageError
from moert.measure import bench, bench_kernels
from moert.models import registry
from moert.quant import dispatch
from moert.quant.format import MatrixLayout
from moert.runtime.telemetry import Counters

from .program import Program

SMALL = ("-p", "8", "-n", "4", "-r", "2")
KEYS = {
    "model",
    "model_type",
    "size_bytes",
    "test",
    "n_prompt",
    "n_gen",
    "n_depth",
    "tokens",
    "threads",
    "kernel",
    "precision",
    "ctx_size",
    "kv_bytes_per_position",
    "repetitions",
    "avg_ts",
    "stddev_ts",
    "samples_ts",
    "bytes_touched_per_token",
    "bandwidth_share",
    "memory_bandwidth_bytes_per_s",
    "hit_ratio",
    "overhead_share",
    "bytes_read_per_token",
    "peak_rss_bytes",
    "budget_bytes",
    "load_average",
    "timestamp",
}
BANDWIDTH = 1e10


@pytest.fixture
def moert(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_kernels, "memory_bandwidth", lambda threads: BANDWIDTH)
    return Program(capsys, monkeypatch, tmp_path)


def measured(path, case, tokens=None, **options):
    """The row of one case."""
    with LLM(path, **options) as llm:
        tokens = tokens or bench.Tokens(llm.store.architecture.vocab_size)
        measurement = bench.Measurement(llm.store, llm.runner, case, tokens, BANDWIDTH)
        assert measurement.row() is None
        measurement.run(2, True, lambda text: None)
        return measurement.row()


# What is shown


def test_json_has_every_key_and_plausible_values(moert, store):
    result = moert("bench", "-m", str(store()), *SMALL, "-d", "0,20", "-o", "json", "-t", "1", "-v")
    assert result.code == 0
    rows = json.loads(result.out)
    assert [r["test"] for r in rows] == ["pp8", "tg4", "pp8 @ d20", "tg4 @ d20"]
    for row in rows:
        assert set(row) == KEYS
        assert (row["model"], row["model_type"], row["precision"]) == ("qwen3_moe-4", "qwen3_moe", "fixed:4")
        assert (row["threads"], row["tokens"], row["repetitions"]) == (1, "random", 2)
        assert row["kernel"] == dispatch.kernel_name()
        assert row["avg_ts"] == pytest.approx(sum(row["samples_ts"]) / 2)
        first, second = row["samples_ts"]
        assert row["stddev_ts"] == pytest.approx(abs(first - second) / math.sqrt(2))
        assert row["kv_bytes_per_position"] == 2 * 2 * 2 * 32 * 2  # 2 layers, 2 heads of 32, keys and values in fp16
        assert row["bandwidth_share"] == pytest.approx(row["bytes_touched_per_token"] * row["avg_ts"] / BANDWIDTH)
        assert row["memory_bandwidth_bytes_per_s"] == BANDWIDTH
        assert row["peak_rss_bytes"] > 10**6
        assert (row["overhead_share"] is None) == (row["n_prompt"] > 0 or row["kernel"] == "reference")
        assert row["n_prompt"] or row["kernel"] == "reference" or 0 < row["overhead_share"] < 1
        assert 0 < row["size_bytes"] < row["budget_bytes"]
        assert row["timestamp"].endswith("+00:00")
    assert (rows[0]["n_prompt"], rows[0]["n_gen"], rows[0]["n_depth"]) == (8, 0, 0)
    assert (rows[3]["n_prompt"], rows[3]["n_gen"], rows[3]["n_depth"]) == (0, 4, 20)
    assert rows[3]["bytes_touched_per_token"] > rows[1]["bytes_touched_per_token"] > rows[0]["bytes_touched_per_token"]
    assert "chosen: " in result.err


def test_csv_has_the_same_columns_as_json(moert, store):
    result = moert("bench", "-m", str(store()), *SMALL, "-o", "csv", "-q")
    rows = list(csv.DictReader(io.StringIO(result.out)))
    assert [r["test"] for r in rows] == ["pp8", "tg4"]
    assert set(rows[0]) == KEYS
    assert len([float(x) for x in rows[0]["samples_ts"].split()]) == 2
    assert result.err == ""


def test_the_table_is_markdown(moert, store):
    result = moert("bench", "-m", str(store()), *SMALL, "-q")
    table, about = result.out.split("\n\n")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    names = ["model", "size", "test", "tokens", "t/s ± sd", "MB/token", "of bandwidth", "overhead"]
    names += ["hits", "read/token", "peak"]
    assert lines[0] == names
    assert set("".join(lines[1])) == {"-", ":"}
    assert {len(line) for line in lines} == {len(names)}
    assert [line[2:4] for line in lines[2:]] == [["pp8", "random"], ["tg4", "random"]]
    assert lines[2][0] == "qwen3_moe-4 fixed:4"
    assert "threads, memory bandwidth 10.0 GB/s" in about


def test_one_repetition_has_no_deviation_and_zero_drops_a_row(moert, store):
    result = moert("bench", "-m", str(store()), "-p", "0", "-n", "4", "-r", "1", "--no-warmup", "-o", "json")
    (row,) = json.loads(result.out)
    assert (row["test"], row["stddev_ts"], len(row["samples_ts"])) == ("tg4", 0.0, 1)


# What is counted


@pytest.mark.parametrize("width", [2, 3, 4])
def test_bytes_touched_by_decoding_are_those_of_a_count_by_hand(store, width):
    row = measured(store(), bench.Case(0, 4, 20), precision=f"fixed:{width}")
    # Qwen3-MoE of conftest: D 64, 2 layers, 4 heads, 2 key/value heads of 32, F 48, top 3 of 8, V 320, groups of 32.
    D, L, H, J, d, F, K, E, V = 64, 2, 4, 2, 32, 48, 3, 8, 320

    def packed(rows, cols, bits):  # codes, and an fp16 scale for each group; columns padded to whole groups
        cols = -(-cols // 32) * 32
        return rows * cols * bits // 8 + rows * (cols // 32) * 2

    attention = packed(H * d, D, 8) + 2 * packed(J * d, D, 8) + packed(D, H * d, 8)
    norms = 2 * (2 * D + 2 * d)  # bf16: before attention and experts, and of the heads of q and k
    expert = 2 * packed(F, D, width) + packed(D, F, width)
    kv = J * d * 2 * 2 * (20 + (1 + 2 + 3 + 4) / 4)  # keys and values in fp16, at the mean depth
    layer = attention + norms + 2 * E * D + K * expert + kv
    assert row.bytes_touched_per_token == L * layer + 2 * D + packed(V, D, 8) + packed(1, D, 8)


def test_bytes_touched_by_a_lossless_model_with_shared_experts_and_tied_head(store):
    row = measured(store("qwen2_moe", (16,), 16, tie=True), bench.Case(0, 1, 0))
    D, L, F, S, K, E, V = 64, 2, 48, 80, 3, 8, 320  # heads: 4 of 16, 2 for keys and values
    layer = (64 + 32 + 32) * D + (64 + 32 + 32) + D * 64  # q, k, v with biases, o
    layer += 2 * D + E * D + K * 3 * D * F + 3 * D * S + D  # norms, router, experts, shared expert and its gate
    kv = L * 2 * 2 * 16 * 4  # of the token itself; float32 in a lossless store
    assert row.bytes_touched_per_token == 2 * (L * layer + D + V * D) + kv


def test_prefill_counts_each_pass_once_with_the_experts_that_were_used(store, monkeypatch):
    monkeypatch.setattr(bench, "PREFILL_CHUNK", 256)
    case = bench.Case(600, 0, 0)
    with LLM(store("olmoe"), ctx_size=600) as llm:
        every_pass, row = bench.dense_bytes(llm.store.meta.dense)
        got = bench.bytes_touched(llm.store, llm.runner, case, Counters(expert_uses=7, width_sum=2 + 3 + 5 * 4))
        used = [bench_kernels.expert_bytes(llm.store.layout, slices) for slices in (1, 2, 3, 3, 3, 3, 3)]
        assert len(set(used)) == 3
    assert case.steps() == [(0, 256), (256, 256), (512, 88)]
    kv = 2 * 2 * 2 * 16 * 2 * (256 + 512 + 600)  # 2 layers, 2 heads of 16, keys and values in fp16
    assert got * 600 == pytest.approx(3 * every_pass + 600 * row + sum(used) + kv)


def test_windows_limit_the_positions_that_are_read(tiny_checkpoint):
    config = json.loads((tiny_checkpoint("mixtral", sliding_window=10) / "config.json").read_text())
    arch = registry.architecture(config)
    assert set(arch.sliding_windows) == {10}
    decode = bench.Case(0, 30, 0).steps()
    want = sum(min(10, past + 1) for past in range(30)) * arch.num_layers
    assert bench.positions_read(arch, decode) == want
    assert bench.positions_read(arch, [(20, 5)]) == 14 * arch.num_layers  # the first of the five sees back to 11


def test_a_narrower_kv_cache_is_touched_less(store):
    wide, narrow = (measured(store(), bench.Case(0, 1, 99), kv_bits=bits) for bits in (16, 8))
    saved = 100 * (wide.kv_bytes_per_position - narrow.kv_bytes_per_position)
    assert wide.bytes_touched_per_token - narrow.bytes_touched_per_token == saved > 0


def test_speeds_are_those_of_the_clock(store, monkeypatch):
    seconds = iter((7.0, 0.5, 0.25))  # the warm-up, two repetitions
    monkeypatch.setattr(bench.Measurement, "_once", lambda self, ids: next(seconds))
    row = measured(store(), bench.Case(8, 0, 0))
    assert (row.samples_ts, row.avg_ts) == ([16.0, 32.0], 24.0)
    assert row.stddev_ts == pytest.approx(128**0.5)


def test_hits_and_reads_are_those_of_the_timed_repetitions(store):
    path = store()
    everything = measured(path, bench.Case(0, 40, 0))
    assert (everything.hit_ratio, everything.bytes_read_per_token) == (1.0, 0.0), "the warm-up does not count"
    with LLM(path) as llm:
        one = llm.store.layout.bytes_at(4)
    row = measured(path, bench.Case(0, 10, 0), expert_budget=one, prefetch="off")
    assert row.hit_ratio < 0.5
    assert row.bytes_read_per_token == pytest.approx((1 - row.hit_ratio) * 6 * one)
    assert row.size_bytes == everything.size_bytes


def test_an_embedding_row_is_a_share_of_the_padded_matrix(tiny_checkpoint):
    tensors = [
        bench.DenseTensor(bench.EMBEDDING, (50, 64), "uint8", MatrixLayout(50, 64, 32, (8,))),
        bench.DenseTensor(bench.HEAD, (50, 64), "bfloat16", None),
    ]
    assert bench.dense_bytes(tensors) == (50 * 64 * 2, 64 + 4)


# What is fed


def test_random_tokens_are_the_same_in_every_run_and_others_in_every_repetition():
    case = bench.Case(50, 0, 10)
    one, two = bench.Tokens(1000), bench.Tokens(1000)
    assert one.timed(case, 0) == two.timed(case, 0) != one.timed(case, 1)
    assert one.depth(20)[:10] == two.depth(10)
    assert all(0 <= t < 1000 for t in one.timed(case, 0))
    assert one.origin == "random"


def test_a_text_is_fed_as_it_stands_and_not_repeated():
    tokens = bench.Tokens(1000, range(100))
    case = bench.Case(0, 30, 20)
    assert tokens.depth(20) == list(range(20))
    assert tokens.timed(case, 0) == list(range(20, 50))
    assert tokens.timed(case, 1) == list(range(50, 80))
    assert len(tokens.timed(case, 2)) == 30
    tokens.check(100)
    with pytest.raises(UsageError, match="holds 100 tokens, but 101 are needed"):
        tokens.check(101)
    assert tokens.origin == "prompt"


def test_what_is_computed_is_what_the_case_says(store):
    with LLM(store()) as llm:
        calls = []
        forward = llm.runner.forward
        llm.runner.forward = lambda ids: calls.append((len(llm.runner.tokens), len(ids))) or forward(ids)
        tokens = bench.Tokens(320)
        for case in (bench.Case(8, 0, 5), bench.Case(0, 2, 5), bench.Case(0, 1, 7)):
            bench.Measurement(llm.store, llm.runner, case, tokens, 1.0).run(1, case.n_prompt > 0, lambda text: None)
    assert calls == [(0, 5), (5, 8), (5, 8), (5, 1), (6, 1), (5, 2), (7, 1)]


def test_a_prompt_file_is_used_and_said(moert, store, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A mixture of experts is a layer that holds many small networks.")
    result = moert("bench", "-m", str(store()), *SMALL, "--prompt-file", str(text), "-o", "json")
    assert {row["tokens"] for row in json.loads(result.out)} == {"prompt"}


# The context


def test_a_context_that_does_not_suffice_is_enlarged_and_said(moert, store):
    result = moert("bench", "-m", str(store()), "-p", "4", "-n", "2", "-r", "1", "-d", "510", "-o", "json")
    assert {row["ctx_size"] for row in json.loads(result.out)} == {514}
    assert "context 514: pp4 @ d510 needs a context of 514 tokens" in result.err
    assert "warning: the context of 514 exceeds the 512" in result.err
    result = moert("bench", "-m", str(store()), "-p", "2", "-n", "0", "-r", "1", "-o", "json")
    assert [row["ctx_size"] for row in json.loads(result.out)] == [512]


def test_a_long_context_is_chosen_before_loading(moert, store, monkeypatch):
    monkeypatch.setattr("moert.cli.bench.DEFAULT_CTX_SIZE", 10)
    result = moert("bench", "-m", str(store()), "-p", "12", "-n", "0", "-r", "1", "-o", "json")
    assert [row["ctx_size"] for row in json.loads(result.out)] == [12]
    assert result.err.count("needs a context of") == 1


# What goes wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-p", "0", "-n", "0"), "nothing to measure"),
        (("-r", "0"), "repetitions 0 must be at least 1"),
        (("-p", "-5"), "must not be negative"),
        (("-t", "0"), "threads 0 must be at least 1"),
        (("-c", "20", "-p", "8", "-n", "4", "-d", "16"), "pp8 @ d16 needs a context of 24 tokens, but --ctx-size is"),
        (
            (
                "-c",
                "-1",
            ),
            "ctx-size -1",
        ),
        (("--kernels", "--group-size", "48"), "group size 48 is not one of"),
        (("--kernels", "--size", "1"), "holds no expert"),
        (("--kernels", "--stats"), "leave them out with --kernels"),
        (("--kernels", "--size", "big"), "size 'big' is not a size"),
        (("--prompt-file", os.devnull), "holds 0 tokens, but 512 are needed"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(moert, store, options, message):
    result = moert("bench", "-m", str(store()), "-q", *options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_a_prompt_file_that_cannot_be_read(moert, store, tmp_path):
    assert moert("bench", "-m", str(store()), "--prompt-file", str(tmp_path / "none")).code == 1
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    result = moert("bench", "-m", str(store()), "--prompt-file", str(tmp_path / "binary"))
    assert result.code == 2
    assert "not UTF-8" in result.err
    assert moert("bench", "-p", "1,x").code == 2


@pytest.mark.parametrize("form", ["json", "md"])
def test_an_interruption_shows_what_had_ended(moert, store, monkeypatch, form):
    once, calls = bench.Measurement._once, iter(range(100))

    def interrupted(self, ids):
        if next(calls) == 5:  # two warm-ups, two repetitions of prefill, one of decode
            raise KeyboardInterrupt
        return once(self, ids)

    monkeypatch.setattr(bench.Measurement, "_once", interrupted)
    result = moert("bench", "-m", str(store()), *SMALL, "-o", form)
    assert result.code == 130
    assert "Interrupted" in result.err
    if form == "json":
        assert [(r["test"], r["repetitions"]) for r in json.loads(result.out)] == [("pp8", 2), ("tg4", 1)]
    else:
        assert result.out.count("| qwen3_moe") == 2
