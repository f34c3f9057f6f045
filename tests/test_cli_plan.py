"""`moert plan`: what it prints, and what it refuses."""

import dataclasses
import json

import pytest

from moert.cli import plan
from moert.cli.main import main
from moert.errors import MoertError, UsageError
from moert.hardware import devices
from moert.planning.predict import fit
from moert.scheduler.trace import draw_trace

from .test_planning import DEVICE, shape_of
from .traces import write_trace

# Names that `generate --json` has too, with the same meaning.
SHARED = {
    *("precision", "budget_bytes", "decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s", "hit_ratio"),
    *("bytes_read_per_token", "mean_width", "peak_rss_bytes", "prompt_tokens", "width_histogram"),
}


@pytest.fixture
def model(monkeypatch):
    """Stands for whatever -m names; a test may change it."""
    found = [shape_of()]
    monkeypatch.setattr("moert.planning.model_shape.read_shape", lambda *args, **kwargs: found[0])
    return found


@pytest.fixture
def board(monkeypatch):
    monkeypatch.setattr(devices, "load_device", lambda name: DEVICE)


@pytest.fixture
def trace(tmp_path):
    """Recorded with the toy model, whose first layer has no experts."""
    path = tmp_path / "toy.csv.gz"
    found = draw_trace(layers=3, num_experts=8, top_k=2, prompt=4, tokens=12)
    steps = tuple(dataclasses.replace(s, layers={n: r for n, r in s.layers.items() if n}) for s in found.steps)
    write_trace(path, fit(dataclasses.replace(found, steps=steps), shape_of(), None, 1))
    return str(path)


def run(*arguments):
    assert main(["plan", "-m", "toy", "--profile", "board", *arguments]) == 0


def test_a_table_with_what_is_assumed_and_one_recommendation(model, board, trace, capsys):
    run("--trace", trace, "--memory-budget", "300MiB", "--precision", "fixed:4", "fixed:2", "-c", "512")
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0] == list(plan.COLUMNS)
    assert [row[:3] for row in rows[2:]] == [["300.0 MiB", "fixed:4", "512"], ["300.0 MiB", "fixed:2", "512"]]
    assert rows[2][3].endswith("tokens/s")
    assert rows[2][9] == "+0.1 to 0.4%"
    assert lines[-2].startswith("memory budget 300.0 MiB: libraries 100.0 MiB, dense 17.0 MiB, kv cache 1.5 MiB")
    assert lines[-1].startswith("Recommended: fixed:4 at 300.0 MiB, context 512: the best quality that answers")
    for said in (
        "toy (qwen3_moe, store): 0.1 G parameters",
        "on disk 1.00 GiB with widths 2 3 4; resident 17.0 MiB at 8 bits",
        "board, figures of 2026-11-22: memory 4.00 GiB, 17.2 GB/s; disk 1.07 GB/s",
        "routing: as recorded with synthetic, the first 12 of 12 tokens decoded",
        "measured on two small models",
        "prompt: 256 tokens, starting with no expert in memory",
    ):
        assert said in captured.err


def test_json_has_the_names_of_generate(model, board, capsys):
    run("--json", "--sweep", "memory-budget=100MiB:400MiB", "--prompt-tokens", "32")
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["schema_version"] == plan.SCHEMA_VERSION == 1
    assert found["model"]["name"] == "toy"
    assert found["model"]["runnable"] is True
    assert found["device"]["name"] == "board"
    assert "drawn from statistics" in found["routing"]
    fits = [row for row in found["settings"] if row["fits"]]
    too_large = [row for row in found["settings"] if not row["fits"]]
    assert {row["budget_bytes"] for row in fits} == {200 << 20, 400 << 20}
    assert {row["budget_bytes"] for row in too_large} == {100 << 20}
    assert all(row.keys() >= SHARED for row in fits)
    assert all(row["least_budget_bytes"] > 100 << 20 for row in too_large)
    assert all(set(row["quality"]) == {"perplexity_ratio", "kl_nats", "source"} for row in fits)
    split = fits[0]["budget"]
    assert sum(split[name] for name in ("libraries", "dense", "kv_cache", "workspace", "arena")) <= split["total"]
    best = found["recommendation"]
    assert (best["precision"], best["ctx_size"]) in {(row["precision"], row["ctx_size"]) for row in fits}
    assert best["reason"].endswith(".")


def test_without_a_budget_each_precision_gets_what_it_can_use(model, board, trace, capsys):
    run("--trace", trace, "--json", "-q")
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    budgets = {row["precision"]: row["expert_budget_bytes"] for row in found["settings"]}
    assert budgets["fixed:2"] == 16 * 9 * (1 << 18)  # all 16 experts with a slice of 2.25 MiB
    assert budgets["fixed:4"] == 16 * 19 * (1 << 18)
    assert captured.err == ""


def test_where_nothing_fits_the_least_is_said(model, board, monkeypatch, trace, capsys):
    run("--trace", trace, "--memory-budget", "120MiB")
    captured = capsys.readouterr()
    least = shape_of().needs(100 << 20, 256, 1).least
    assert captured.out.splitlines()[-1] == (
        f"Nothing fits: the least budget is {least} bytes ({least / 2**20:.1f} MiB), for fixed:2 and a context of 256."
    )
    assert captured.out.count("does not fit: needs") == 5
    small = dataclasses.replace(DEVICE, memory_bytes=130.0 * 2**20)
    monkeypatch.setattr(devices, "load_device", lambda name: small)
    run("--trace", trace, "--json")
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["recommendation"] is None
    assert "more than the 130.0 MiB of board" in found["nothing_fits"]


def test_what_is_not_as_a_user_may_think_is_said(model, monkeypatch, trace, capsys):
    model[0] = shape_of(why_not="moert has no gpt_oss", calibrated=False)
    gpu = {"gpu_memory_bytes": 2.0**33, "gpu_memory_bytes_per_s": 2.0**36, "gpu_integrated": False}
    monkeypatch.setattr(devices, "load_device", lambda name: dataclasses.replace(DEVICE, **gpu))
    run("--trace", trace, "--memory-budget", "8GiB", "--precision", "fixed:3")
    captured = capsys.readouterr()
    assert "note: moert cannot run this model: moert has no gpt_oss; planned as if it could." in captured.err
    assert "the GPU of this device is not used" in captured.err
    assert "without --fast, are better at narrow widths" in captured.err
    assert "The budget of 8.00 GiB is more memory than board has." in captured.err
    assert captured.out.splitlines()[-1].startswith("Recommended: fixed:3 at 8.00 GiB")


@pytest.mark.parametrize("arguments", [[], ["--sweep", "memory-budget=160MiB,250MiB"]])
def test_a_plot_is_a_picture(model, board, trace, tmp_path, capsys, arguments):
    path = tmp_path / "plan.png"
    run("--trace", trace, "--plot", str(path), "-q", "--precision", "fixed:4", "elastic:3", *arguments)
    assert path.read_bytes().startswith(b"\x89PNG")
    budgets = {line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:] if line.startswith("|")}
    assert len(budgets) == (2 if arguments else 8)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--memory-budget", "8 apples"], "memory-budget '8 apples' is not a size"),
        (["--memory-budget", "8GiB", "--sweep", "memory-budget=1GiB:2GiB"], "either --memory-budget or --sweep"),
        (["--sweep", "expert-budget=1GiB:2GiB"], "is not of the form memory-budget=1GiB:8GiB"),
        (["--sweep", "memory-budget=2GiB:1GiB"], "the last size is below the first"),
        (["--sweep", "memory-budget=2GiB,much"], "memory-budget 'much' is not a size"),
        (["--precision", "fixed:9"], "a width that the store does not hold"),
        (["--precision", "best"], "precision 'best' is not known"),
        (["-c", "0"], "ctx-size 0 must be at least 1"),
        (["--prompt-tokens", "-4"], "prompt-tokens -4 must be at least 1"),
        (["--plot", "/no/such/folder/x.png"], "there is no folder /no/such/folder"),
    ],
)
def test_wrong_options_are_one_sentence(model, board, arguments, reason):
    with pytest.raises(UsageError) as error:
        run(*arguments)
    assert reason in str(error.value)
    assert str(error.value).endswith(".")


def test_unknown_devices_and_traces_of_others_are_one_sentence(model, tmp_path):
    with pytest.raises(UsageError, match="device profile 'toaster' is neither a file nor one of jetson"):
        main(["plan", "--profile", "toaster"])
    path = tmp_path / "other.csv"
    write_trace(path, draw_trace(layers=2, tokens=1))
    with pytest.raises(UsageError, match="2 layers of 16 experts, but toy has 3 of 8"):
        main(["plan", "--profile", "jetson-orin-nano-8gb", "--trace", str(path)])
    path.write_text("nonsense")
    with pytest.raises(MoertError, match=r"other\.csv is not a routing trace"):
        main(["plan", "--profile", "jetson-orin-nano-8gb", "--trace", str(path)])


def test_the_shipped_model_on_this_machine(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MOERT_CACHE", str(tmp_path))
    assert main(["plan", "--precision", "fixed:4", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["model"]["model_type"] == "qwen3_moe"
    assert "moert profile measures this machine" in found["device"]["about"]
    assert found["recommendation"]["precision"] == "fixed:4"
    assert "are better at narrow widths" not in captured.err  # it is calibrated
