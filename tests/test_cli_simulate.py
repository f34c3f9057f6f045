"""`moert simulate`: what it prints, and what it refuses."""

import json

import pytest

from moert.cli.main import main
from moert.errors import MoertError, UsageError
from moert.scheduler.trace import draw_trace

from .traces import write_trace

KEYS = {"decode_tokens_per_s", "hit_ratio", "bytes_read_per_token", "stall_share", "mean_width", "mass_at_width"}


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "t.csv.gz"
    write_trace(path, draw_trace(tokens=12, expert_bytes=1 << 20))
    return str(path)


def test_json_has_the_run_and_the_bounds(trace, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MOERT_CACHE", str(tmp_path))  # where no profile of this machine is
    assert main(["simulate", "--trace", trace, "--expert-budget", "12MiB", "--precision", "routed:3", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["expert_budget_bytes"] == 12 << 20
    for part in (found, *(found[name] for name in ("belady", "perfect_prefetch", "lru"))):
        assert part.keys() >= KEYS
        assert 0 <= part["hit_ratio"] <= 1
        assert sum(part["mass_at_width"].values()) == pytest.approx(1)
    assert found["mean_width"] == pytest.approx(3, abs=0.1)
    assert found["lru"]["mean_width"] == 4
    assert "chosen: precision routed:3" in captured.err
    assert "default figures for " in captured.err


def test_a_sweep_prints_four_rows_a_budget(trace, capsys):
    sweep = "expert-budget=8MiB:24MiB"
    assert main(["simulate", "--trace", trace, "--sweep", sweep, "--profile", "jetson-orin-nano-8gb", "-q"]) == 0
    captured = capsys.readouterr()
    rows = [line.strip("| ").split(" | ") for line in captured.out.splitlines()]
    assert [row[0] for row in rows[2:]] == ["8.0 MiB"] * 4 + ["16.0 MiB"] * 4 + ["24.0 MiB"] * 4
    assert {len(row) for row in rows} == {8}
    assert [row[1] for row in rows[2:6]] == [
        "fixed:4, score",
        "the same widths, Belady's optimum",
        "the same reads, known ahead",
        "LRU of whole 4-bit experts",
    ]
    assert captured.err == ""


def test_a_sweep_in_json_is_a_list(trace, capsys):
    arguments = ["--sweep", "expert-budget=8MiB,9MiB", "--prefetch", "off", "--cache-policy", "lfu", "--json"]
    assert main(["simulate", "--trace", trace, *arguments]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [row["expert_budget_bytes"] for row in found] == [8 << 20, 9 << 20]
    assert found[0]["bytes_prefetched_per_token"] == 0
    assert "recall none" in captured.err


def test_a_faster_disk_is_faster_and_too_much_memory_is_said(trace, capsys):
    arguments = ["simulate", "--trace", trace, "--expert-budget", "40GiB", "--json", "--profile", "server-2-core-amx"]
    speeds = []
    for disk in ("100MB", "10GB"):
        assert main([*arguments, "--disk", disk]) == 0
        captured = capsys.readouterr()
        speeds.append(json.loads(captured.out)["lru"]["decode_tokens_per_s"])
        assert "more memory than server-2-core-amx has" in captured.err
    assert speeds[0] < speeds[1]


def test_a_gpu_beside_the_cpu_is_shown_with_what_each_does_alone(trace, capsys):
    arguments = ["--profile", "laptop-rtx-4060-8gb", "--expert-budget", "40GiB", "--device-budget", "30GiB", "--json"]
    assert main(["simulate", "--trace", trace, *arguments]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["expert_budget_bytes"], found["device_budget_bytes"], found["hybrid"]) == (40 << 30, 30 << 30, True)
    for part in (found, *(found[name] for name in ("device", "host", "resident"))):
        assert part.keys() >= KEYS | {"bytes_moved_per_token", "host_share"}
    assert found["device"]["host_share"] == 0
    assert found["host"]["host_share"] == 1
    assert "The device budget of 30GiB is more memory than the GPU of laptop-rtx-4060-8gb has" in captured.err
    jetson = ["--profile", "jetson-orin-nano-8gb", "--device-budget", "24MiB", "--no-hybrid", "-q"]
    assert main(["simulate", "--trace", trace, *jetson]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert {len(row) for row in rows} == {10}
    assert [row[:3] for row in rows[2:4]] == [
        ["24.0 MiB", "24.0 MiB", "fixed:4, GPU alone"],
        ["24.0 MiB", "24.0 MiB", "the GPU alone"],
    ]
    assert rows[2][3:] == rows[3][3:]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--expert-budget", "8MiB", "--no-hybrid"], "--no-hybrid is for a GPU that computes: give --device-budget"),
        (["--expert-budget", "8MiB", "--device-budget", "8MiB"], "has no figures of a GPU: leave --device-budget out"),
        (["--device-budget", "8MiB", "--profile", "laptop-rtx-4060-8gb"], "either --expert-budget or --sweep"),
        (
            ["--device-budget", "8MiB", "--expert-budget", "8MiB", "--profile", "jetson-orin-nano-8gb"],
            "CPU and GPU of jetson-orin-nano-8gb share one memory: give --device-budget alone",
        ),
        (
            ["--device-budget", "8KiB", "--expert-budget", "8MiB", "--profile", "laptop-rtx-4060-8gb"],
            "a device budget of 8192 bytes at fixed:4 holds not one expert",
        ),
        ([], "either --expert-budget or --sweep"),
        (["--expert-budget", "8MiB", "--sweep", "expert-budget=1GiB:2GiB"], "either --expert-budget or --sweep"),
        (["--expert-budget", "8 apples"], "is not a size"),
        (["--expert-budget", "1KiB"], "holds not one expert; 1048576 bytes would"),
        (["--expert-budget", "600KiB", "--precision", "fixed:2"], "holds no whole expert"),
        (["--sweep", "disk=1GB:2GB"], "is not of the form expert-budget=1GiB:8GiB"),
        (["--sweep", "expert-budget=8GiB:1GiB"], "the last size is below the first"),
        (
            ["--expert-budget", "8MiB", "--cache-policy", "best"],
            "-policy 'best' is not known; it can be score",
        ),
        (["--expert-budget", "8MiB", "--profile", "toaster"], "'toaster' is neither a file nor one of jetson-agx-orin"),
        (["--expert-budget", "8MiB", "--precision", "fixed:5"], "does not hold"),
        (["--expert-budget", "8MiB", "--precision", "routed:7"], "routed:7 asks for a mean width"),
        (["--expert-budget", "8MiB", "--widths", "4,2"], "widths 4,2 should be ascending"),
        (["--expert-budget", "8MiB", "--recall", "80"], "recall '80' is not a share"),
        (["--expert-budget", "8MiB", "--recall", "much"], "recall 'much' is not a share"),
        (["--expert-budget", "8MiB", "--disk", "fast"], "disk 'fast' is not a size"),
    ],
)
def test_wrong_options_are_one_sentence(trace, arguments, reason):
    with pytest.raises(UsageError) as error:
        main(["simulate", "--trace", trace, *arguments])
    assert reason in str(error.value)
    assert str(error.value).endswith(".")


def test_wrong_files_are_one_sentence(tmp_path, trace):
    bad = tmp_path / "bad.json"
    bad.write_text('{"schema_version": 2}')
    with pytest.raises(MoertError, match=r"bad\.json is not a device profile: the whole lacks name\."):
        main(["simulate", "--trace", trace, "--expert-budget", "8MiB", "--profile", str(bad)])
    bad.write_text("{")
    with pytest.raises(MoertError, match="it is not JSON"):
        main(["simulate", "--trace", trace, "--expert-budget", "8MiB", "--profile", str(bad)])
    with pytest.raises(MoertError, match="line 1: it should be"):
        main(["simulate", "--trace", str(bad), "--expert-budget", "8MiB"])
    with pytest.raises(FileNotFoundError):
        main(["simulate", "--trace", str(tmp_path / "none.csv"), "--expert-budget", "8MiB"])
    silent = tmp_path / "silent.csv"
    write_trace(silent, draw_trace(tokens=0))
    with pytest.raises(MoertError, match="no step of decoding: record one while answers are generated"):
        main(["simulate", "--trace", str(silent), "--expert-budget", "8MiB"])
