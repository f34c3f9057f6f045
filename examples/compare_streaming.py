"""Decoding out of a small expert arena beside decoding with all experts in memory, on one machine, in one process.

All settings are open at the same time and take turns, a few tokens each, so that a machine that slows down slows all of
them. Random tokens are fed, whatever the model would say: its routing is that of no text in particular.

    python examples/compare_streaming.py q12.moert --expert-budget 1026MiB fixed:4 fixed:4,prefetch=off elastic:3

A setting is a precision and options of `moert.LLM`. The first line of the table has all experts in memory at the widest
precision, the last is a plain streaming engine: whole experts, least recently used goes first, nothing predicted, and
nothing computed while it reads.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from typing import Any

from moert import LLM
from moert.config import parse_bytes
from moert.engine.model_runner import ModelRunner
from moert.quant.dispatch import kernel_seconds
from moert.runtime.telemetry import Counters

PLAIN = {"cache_policy": "lru", "load_order": "number", "prefetch": "off", "overlap": False}


def read_setting(text: str) -> dict[str, Any]:
    """`elastic:3,skip=0.1,prefetch=off`: what `LLM` does not know belongs to the precision."""
    precision, *options = text.split(",")
    known = dict(option.split("=") for option in options if option.split("=")[0] in PLAIN)
    rest = [option for option in options if option.split("=")[0] not in PLAIN]
    return {"precision": ",".join([precision, *rest]), **known}


def run(llm: LLM, tokens: int, seed: int) -> tuple[float, float, Counters]:
    """Seconds, seconds in kernels, and counters of `tokens` random tokens behind one that is not timed."""
    draw = random.Random(seed)
    ids = [draw.randrange(llm.store.architecture.vocab_size) for _ in range(tokens + 1)]

    def feed(runner: ModelRunner) -> tuple[float, float, Counters]:
        runner.forward(ids[:1])
        counters, kernels, start = runner.counters.copy(), kernel_seconds(), time.perf_counter()
        for token in ids[1:]:
            runner.forward([token])
        seconds = time.perf_counter() - start
        return seconds, kernel_seconds() - kernels, runner.counters.since(counters)

    return llm.call(feed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("settings", nargs="+", metavar="SETTING")
    parser.add_argument("--expert-budget", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32, help="of a round")
    parser.add_argument("--warm-up", type=int, default=112, help="tokens that fill the arena")
    args = parser.parse_args()

    budget = parse_bytes(args.expert_budget, "--expert-budget")
    settings: dict[str, dict[str, Any]] = {"all in memory": {}}
    settings |= {text: {"expert_budget": budget, **read_setting(text)} for text in args.settings}
    settings["plain streaming"] = {"expert_budget": budget, **PLAIN}
    open_ones = {name: LLM(args.store, ctx_size=4096, **options) for name, options in settings.items()}
    open_ones["all in memory"].call(lambda runner: runner.preload())
    for llm in open_ones.values():
        run(llm, args.warm_up, 0)
    results: dict[str, list[list[float]]] = {name: [] for name in settings}
    for turn in range(1, args.rounds + 1):
        for name, llm in open_ones.items():
            seconds, kernels, counts = run(llm, args.tokens, turn)
            rest = seconds - kernels - counts.waited_s
            row = [args.tokens / seconds, *(1000 * s / args.tokens for s in (kernels, counts.waited_s, rest))]
            read = counts.bytes_read / args.tokens / 2**20
            results[name].append([*row, 100 * (counts.hit_ratio or 0), read, counts.mean_width or 0])
    print("| | tokens/s | ratio | kernels, ms | waiting, ms | rest, ms | hits | MiB read/token | mean width |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    reference = results["all in memory"]
    for name, rows in results.items():
        speed, kernels, waited, rest, hits, read, width = map(statistics.median, zip(*rows, strict=True))
        ratio = statistics.median(mine[0] / its[0] for mine, its in zip(rows, reference, strict=True))
        print(
            f"| `{name}` | {speed:.1f} | {ratio:.2f} | {kernels:.1f} | {waited:.1f} | {rest:.1f} | {hits:.1f}% "
            f"| {read:.1f} | {width:.2f} |"
        )
    print(f"\nmedians of {args.rounds} rounds of {args.tokens} tokens, load average {os.getloadavg()[0]:.1f}")
    for llm in open_ones.values():
        llm.close()


if __name__ == "__main__":
    main()
