"""`--memory-budget auto`: what is chosen, and whether it is said how that turned out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moert import LLM, SamplingParams
from moert.errors import BudgetError
from moert.hardware.devices import load_device
from moert.planning import automatic
from moert.planning.automatic import Automatic

from .program import Program

STEPS = 80


@pytest.fixture
def machine(monkeypatch):
    """Sets what is known of this machine: figures that are changed, and the memory that is available."""

    def known(available=1 << 30, **figures):
        profile = replace(load_device("server-2-core-amx"), **{"cached_bytes": None, **figures})
        monkeypatch.setattr(automatic, "this_machine", lambda: (profile, "figures of a test"))
        monkeypatch.setattr(automatic, "available_bytes", lambda: available)

    known()
    return known


@pytest.fixture
def moert(capsys, monkeypatch, tmp_path):
    return Program(capsys, monkeypatch, tmp_path)


def answer(llm):
    return llm.generate("import", SamplingParams(max_tokens=STEPS, temperature=0, ignore_eos=True))[0].stats


def test_precision_and_context_are_chosen_and_said(machine):
    """On a machine that computes 2 bits fast and anything wider slowly, nothing wide is worth its quality."""
    with LLM(memory_budget="auto") as llm:
        assert (llm.plan.prediction.precision, llm.ctx_size) == (str(llm.runner.precision), 2048)
        assert str(llm.runner.precision) == "fixed:4"
        assert any(line.startswith("plan: fixed:4, context 2048, ") for line in llm.description)
    machine(expert_s_per_byte={2: 1e-11, 3: 1e-4, 4: 1e-4})
    with LLM(memory_budget="auto") as llm:
        assert str(llm.runner.precision) == "fixed:2"


def test_what_is_asked_for_is_kept(machine):
    with LLM(memory_budget="auto", precision="fixed:3", ctx_size=512) as llm:
        assert (str(llm.runner.precision), llm.ctx_size, llm.plan.prediction.ctx_size) == ("fixed:3", 512, 512)
    with LLM(memory_budget="1GiB") as llm:
        assert llm.plan is None
    machine(available=1 << 20)
    with pytest.raises(BudgetError, match="at least"):
        LLM(memory_budget="auto")


def test_a_store_on_a_slow_disk_is_planned_with_that_disk(machine, monkeypatch):
    def opened(speed):
        monkeypatch.setattr(automatic, "store_speed", lambda store: speed)
        with LLM(memory_budget="auto", precision="fixed:4", ctx_size=2048) as llm:
            return llm.plan

    with LLM(ctx_size=2048) as llm:
        fixed = llm.runner.budget
    machine(available=int((fixed.total - fixed.libraries - fixed.arena // 2) / 0.8))
    fast, slow = opened(2e9), opened(4e6)
    assert "disk" not in fast.device
    assert slow.device.endswith("but the disk of this store reads 4 MB/s")
    assert slow.prediction.decode_tokens_per_s < 0.5 * fast.prediction.decode_tokens_per_s


def test_a_plan_that_is_off_says_so_once():
    class Answered:
        completion_tokens, decode_tokens_per_s, peak_rss_bytes = 1 + STEPS, 70.0, 3 << 20

    class Predicted:
        decode_tokens_per_s, peak_rss_bytes = 100.0, 2 << 20

    def warm():
        """The first answer says nothing: experts are read for the first time."""
        plan = Automatic(Predicted, "figures of a test")
        plan.add(type("", (Answered,), {"decode_tokens_per_s": 10.0}))
        assert plan.achieved is None
        return plan

    plan = warm()
    plan.add(Answered)
    assert plan.achieved == pytest.approx(70)
    assert plan.compare() == [
        "speed: 100.0 tokens/s predicted, 70.0 measured (-30%, 80 tokens)",
        "memory: 2.0 MiB predicted, 3.0 MiB at the peak",
    ]
    assert plan.warning() == "70.0 tokens/s were measured, but 100.0 planned (-30%), from figures of a test"
    assert plan.warning() is None
    close = warm()
    close.add(type("", (Answered,), {"decode_tokens_per_s": 80.0}))
    assert close.warning() is None
    short = warm()
    short.add(type("", (Answered,), {"completion_tokens": 20}))
    assert short.warning() is None


def test_achieved_is_what_the_answers_took(machine):
    with LLM(memory_budget="auto") as llm:
        stats = [answer(llm) for _ in range(3)]
        for one in stats:
            llm.plan.add(one)
        seconds = sum((STEPS - 1) / one.decode_tokens_per_s for one in stats[1:])
        assert llm.plan.achieved == pytest.approx(2 * (STEPS - 1) / seconds)


def test_chat_without_flags_goes_by_the_plan(machine, moert):
    result = moert("chat", "-v", "-n", "80", "--ignore-eos", "--seed", "1", stdin="import os\nimport re\n/stats\n")
    assert result.code == 0
    assert "plan: fixed:4, context 2048, " in result.err
    assert "figures of a test" in result.err
    assert "plan, speed: " in result.err
    assert "plan, memory: " in result.err
    assert "plan: " not in moert("chat", "--memory-budget", "1GiB", stdin="").err


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "-p", "import", "-n", "2"),
        ("bench", "-p", "8", "-n", "2", "-r", "1"),
        ("eval", "--tokens", "64", "--window", "32"),
        ("plan",),
    ],
    ids=lambda command: command[0],
)
def test_auto_is_a_budget_everywhere(machine, moert, command):
    result = moert(*command, "--memory-budget", "auto")
    assert result.code == 0, result.err
