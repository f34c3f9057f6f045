"""One model and many callers: threads, tasks, and those that leave, close, fork, drop it, or end the program."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moert import LLM, AsyncLLM, MoertError, SamplingParams
from moert.errors import ClosedError, UsageError

from .child import ENVIRONMENT, PYTHON

PROMPTS = [
    "def f(x):\n",
    "import os\n",
    "class A:\n",
    "for i in range(10):\n    ",
    "# A list\n",
    "def f(x):\n    return",
]
GREEDY = SamplingParams(temperature=0, max_tokens=12)
LONG = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)


def params_for(i):
    return SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=4 + 3 * (i % 4))


@pytest.fixture(scope="module")
def alone():
    """What each prompt gets with parameters of each kind, on a model of its own that has room for all experts."""
    with LLM() as llm:
        return {(p, i): llm.generate(p, params_for(i))[0].token_ids for p in PROMPTS for i in range(8)}


@pytest.fixture(scope="module")
def quarter():
    """Bytes of a quarter of the experts."""
    with LLM() as llm:
        return llm.store.experts_bytes(llm.store.layout.num_slices) // 4


def test_eight_threads_get_the_texts_that_each_prompt_gets_alone(alone, quarter):
    with LLM(expert_budget=quarter) as llm:

        def work(thread):
            rng, wrong = random.Random(thread), []
            for _ in range(25):
                prompt, i = rng.choice(PROMPTS), rng.randrange(8)
                way = rng.randrange(3)
                if way == 0:
                    got = llm.generate(prompt, params_for(i))[0].token_ids
                elif way == 1:
                    got = [token for chunk in llm.stream(prompt, params_for(i)) for token in chunk.token_ids]
                else:
                    stream = llm.stream(prompt, params_for(i), priority="batch")
                    got = [token for chunk, _ in zip(stream, range(2), strict=False) for token in chunk.token_ids]
                if got != alone[prompt, i][: len(got)] or (way < 2 and len(got) != len(alone[prompt, i])):
                    wrong.append((prompt, i, way, got))
            return wrong

        with ThreadPoolExecutor(8) as pool:
            assert [*pool.map(work, range(8))] == [[]] * 8


def test_tasks_that_are_cancelled_at_random_disturb_no_other(alone, quarter):
    async def work(llm, number):
        rng = random.Random(number)
        prompt, i = rng.choice(PROMPTS), rng.randrange(8)
        got = []
        if number % 3:
            async for chunk in llm.stream(prompt, params_for(i)):
                got += chunk.token_ids
                assert got == alone[prompt, i][: len(got)]
        else:
            got = (await llm.generate(prompt, params_for(i)))[0].token_ids
        assert got == alone[prompt, i]
        return number

    async def main():
        rng = random.Random(0)
        async with await AsyncLLM.load(expert_budget=quarter) as llm:
            ticks = 0

            async def tick():
                nonlocal ticks
                while True:
                    await asyncio.sleep(0.002)
                    ticks += 1

            ticking = asyncio.create_task(tick())
            tasks = [asyncio.create_task(work(llm, number)) for number in range(32)]
            cancelled = set(rng.sample(range(32), 12))
            for number in cancelled:
                await asyncio.sleep(rng.random() / 50)
                tasks[number].cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            ticking.cancel()
            for number, result in enumerate(results):
                assert result == number or (number in cancelled and isinstance(result, asyncio.CancelledError))
            assert ticks > 5, "the loop goes on meanwhile"
            assert await asyncio.to_thread(llm.llm.call, lambda runner: runner.batch_size), "nothing runs any more"
            assert (await llm.chat("Hello", GREEDY)).token_ids == llm.llm.chat("Hello", GREEDY).token_ids
            pieces = [chunk async for chunk in llm.stream_chat("Hello", GREEDY)]
            assert pieces[-1].finish_reason is not None
            with pytest.raises(UsageError, match="The prompt is empty"):
                await llm.generate([[]])
        with pytest.raises(ClosedError):
            await llm.generate("def")

    asyncio.run(main())


def test_a_closed_model_says_so_at_once():
    with LLM() as llm:
        left = llm.stream("def", GREEDY)
        llm.generate("def", GREEDY)
    for use in (
        lambda: llm.generate("def", GREEDY),
        lambda: llm.stream("def", GREEDY),
        lambda: llm.chat("Hello", GREEDY),
        lambda: llm.logits([1, 2]),
        lambda: next(left),
    ):
        with pytest.raises(ClosedError, match="This model is closed: load it again"):
            use()
    llm.close()
    assert llm.budget > 0


def test_everybody_who_waits_learns_that_another_thread_closed_the_model():
    llm, errors = LLM(), []

    def generate():
        try:
            while True:
                llm.generate(PROMPTS, LONG)
        except MoertError as error:
            errors.append((type(error), time.monotonic()))

    def call():
        try:
            llm.call(lambda runner: [(runner.rewind(0), runner.forward([1])) for _ in range(10**9)])
        except MoertError as error:
            errors.append((type(error), time.monotonic()))

    threads = [threading.Thread(target=work) for work in (generate, generate, generate, call)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    closed = time.monotonic()
    closers = [threading.Thread(target=llm.close) for _ in range(2)]
    for closer in closers:
        closer.start()
    for thread in [*closers, *threads]:
        thread.join(5)
        assert not thread.is_alive()
    assert [kind for kind, _ in errors] == [ClosedError] * 4
    assert all(moment - closed < 5 for _, moment in errors)  # a second, on a machine that does nothing else


def files():
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd))


def _is_open(fd):
    return os.path.exists(f"/proc/self/fd/{fd}")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_model_that_is_dropped_leaves_no_file_and_no_thread(quarter, streaming):
    gc.collect()
    before, threads = files(), set(threading.enumerate())
    llm = LLM(expert_budget=quarter)
    stream = llm.stream("def", LONG)
    if streaming:
        next(stream)
    else:
        llm.generate("def", GREEDY)
    assert set(threading.enumerate()) - threads
    del llm
    gc.collect()
    if streaming:
        assert next(stream), "who streams needs it"
    del stream
    gc.collect()
    assert not set(threading.enumerate()) - threads
    assert files() == before


def test_a_mistake_in_a_task_is_its_callers_and_tasks_cannot_wait_for_the_same_model():
    with LLM() as llm:
        with pytest.raises(ZeroDivisionError):
            llm.call(lambda runner: 1 // 0)
        with pytest.raises(UsageError, match="cannot wait for answers of the same model"):
            llm.call(lambda runner: llm.generate("def", GREEDY))
        assert llm.call(lambda runner: llm.logits([1, 2]).shape[0]) == 2
        with pytest.raises(MoertError, match="deadline"):
            llm.generate("def", LONG, timeout=0.05)
        assert llm.generate("def", GREEDY)[0].error is None


def child(code, *arguments, timeout=60):
    command = [*PYTHON, "-X", "faulthandler", "-c", f"{PREAMBLE}{code}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=timeout)


PREAMBLE = """
import os, signal, sys, threading, time
from moert import LLM, SamplingParams
GREEDY = SamplingParams(temperature=0, max_tokens=8)
LONG = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
"""
FORK = """
llm = LLM(**eval(sys.argv[1]))
want = llm.generate("def f", GREEDY)[0].text
begun = llm.stream("import", LONG)
next(begun)
pid = os.fork()
if pid == 0:
    start = time.monotonic()
    for use in (lambda: llm.generate("def f", GREEDY), lambda: next(begun), lambda: llm.logits([1])):
        try:
            use()
        except Exception as error:
            print(type(error).__name__, flush=True)
    print("in time" if time.monotonic() - start < 1 else "late", flush=True)
    llm.close()
    sys.exit(7)
deadline = time.monotonic() + 20
while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
    if time.monotonic() > deadline:
        os.kill(pid, signal.SIGKILL)
        print("the child hangs")
        break
    time.sleep(0.01)
same = llm.generate("def f", GREEDY)[0].text == want
print("status", os.waitstatus_to_exitcode(done[1]), same, next(begun) is not None)
"""


@pytest.mark.parametrize("settings", ["{}", "{'expert_budget': '2MiB'}"])
def test_a_child_gets_an_error_and_ends_and_the_parent_goes_on(settings):
    done = child(FORK, settings)
    assert done.stdout.split("\n")[:-1] == [*["ClosedError"] * 3, "in time", "status 7 True True"], done.stderr
    assert done.returncode == 0


EXIT = """
llm = LLM(expert_budget="2MiB")
def work():
    while True:
        llm.generate(["def f", "import"], LONG)
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
print("end", flush=True)
"""


def test_a_program_ends_while_daemon_threads_generate():
    done = child(EXIT)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
    assert "terminate" not in done.stderr


INTERRUPT = """
llm = LLM()
want = llm.generate("def f", GREEDY)[0].text
for wait in (
    lambda: llm.generate("import", LONG.replace(max_tokens=1900)),
    lambda: llm.call(lambda runner: [(runner.rewind(0), runner.forward([1])) for _ in range(10**9)]),
):
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    try:
        while True:
            wait()
    except KeyboardInterrupt:
        print("interrupted", time.monotonic() - start < 5, llm.generate("def f", GREEDY)[0].text == want)
"""


def test_ctrl_c_ends_what_is_waited_for_and_leaves_a_model_that_can_be_used():
    done = child(INTERRUPT)
    assert done.stdout == "interrupted True True\n" * 2, done.stderr
    assert done.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads by /proc")
def test_a_program_that_ends_without_closing_ends_cleanly():
    done = child('llm = LLM(); print(llm.generate("def f", GREEDY)[0].finish_reason)')
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_cancelled_computes_no_further():
    with LLM() as llm:
        asked = []

        def cancelled_in_between(runner):
            runner.cancelled = lambda: len(asked.append(1) or asked) > 2
            try:
                runner.preload()
            finally:
                runner.cancelled = lambda: False

        with pytest.raises(ClosedError):
            llm.call(cancelled_in_between)
        assert len(asked) == 3
        assert llm.generate("def", GREEDY)[0].error is None
