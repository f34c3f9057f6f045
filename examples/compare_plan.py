"""Compare what `moert plan` predicts with what the engine does, for a store at several budgets and precisions.

    python examples/compare_plan.py q12.moert --budgets 1280MiB 2GiB --precision fixed:4 fixed:3 elastic:3

Every run is a process of its own, so that its peak memory is its own: it reads a prompt, decodes tokens that do not
count until prefetching has been tried out, then those that count. The tokens are random, or those of --text; settings
take turns, and figures are medians of the rounds. Routes are drawn from statistics, or those of --trace;
--record FILE writes such a trace first, with other tokens of the same kind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from moert.config import format_bytes, parse_bytes
from moert.hardware.devices import load_device, this_machine
from moert.hub.resolve import Conversion
from moert.planning import Prediction, predict
from moert.planning.model_shape import read_shape
from moert.planning.routing import RoutingSample, drawn, recorded
from moert.scheduler.trace import read_trace

FIGURES = (
    "decode_tokens_per_s",
    "hit_ratio",
    "bytes_read_per_token",
    "peak_rss_bytes",
    "ttft_s",
    "prefill_tokens_per_s",
    "mean_width",
)
GOALS = FIGURES[:4]  # of which the errors are summed up


def measure(args: argparse.Namespace, budget: int | None, precision: str, seed: int) -> dict[str, float]:
    """One run in this process."""
    from moert import LLM

    store = None if args.store == "-" else args.store
    llm = LLM(
        store, memory_budget=budget, precision=precision, ctx_size=args.ctx_size, threads=args.threads, batch_size=1
    )
    if args.probe:
        return {"library_bytes": llm.runner.budget.libraries}
    long = 512  # the prompt whose speed counts, at the end
    ids = _tokens(llm, args, args.prompt_tokens + args.warm_up + args.tokens + long, seed)
    if args.record:
        llm.call(lambda runner: runner.preload())
        llm.record_trace(args.record)
    try:
        return llm.call(lambda runner: _feed(runner, args, ids, long))
    finally:
        llm.close()


def _feed(runner: Any, args: argparse.Namespace, ids: list[int], long: int) -> dict[str, float]:
    """Feed these tokens to a model, the last `long` as a prompt, and return what it took."""
    from moert.runtime.telemetry import peak_rss_bytes

    at = args.prompt_tokens
    start = time.perf_counter()
    runner.forward(ids[:at])
    ttft = time.perf_counter() - start
    for token in ids[at : at + args.warm_up]:
        runner.forward([token])
    at += args.warm_up
    before, start = runner.counters.copy(), time.perf_counter()
    for token in ids[at : at + args.tokens]:
        runner.forward([token])
    seconds, counts = time.perf_counter() - start, runner.counters.since(before)
    peak = peak_rss_bytes()
    runner.rewind(0)
    start = time.perf_counter()
    runner.forward(ids[-long:])
    prefill = time.perf_counter() - start
    return {
        "decode_tokens_per_s": args.tokens / seconds,
        "hit_ratio": counts.hit_ratio or 0.0,
        "bytes_read_per_token": counts.bytes_read / args.tokens,
        "peak_rss_bytes": peak,
        "ttft_s": ttft,
        "prefill_tokens_per_s": long / prefill,
        "mean_width": counts.mean_width or 0.0,
    }


def _tokens(llm, args: argparse.Namespace, count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    if args.text is None:
        return [draw.randrange(llm.store.architecture.vocab_size) for _ in range(count)]
    text = args.text.read_text(encoding="utf-8")
    long = 8 * count  # characters, more than enough; encoding all of a long text would take memory of its own
    begin = draw.randrange(max(len(text) - long, 1))
    ids = llm.tokenizer.encode(text[begin : begin + long])
    if len(ids) < count:
        raise SystemExit(f"{args.text} is too short: {len(ids)} tokens, but {count} are needed")
    return ids[:count]


def child(args: argparse.Namespace, budget: int | None, precision: str, seed: int, *more: str) -> dict[str, float]:
    """One run in a process of its own."""
    options = ["--ctx-size", "--prompt-tokens", "--warm-up", "--tokens"]
    values = [args.ctx_size, args.prompt_tokens, args.warm_up, args.tokens]
    command = [sys.executable, __file__, str(args.store), "--precision", precision, "--child", str(seed)]
    command += [str(part) for pair in zip(options, values, strict=True) for part in pair]
    command += ["--budgets", str(budget)] if budget else []
    command += ["--text", str(args.text)] if args.text else []
    command += ["--threads", str(args.threads)] if args.threads else []
    result = subprocess.run([*command, *more], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


def routes_of(args: argparse.Namespace, shape) -> RoutingSample:
    if args.record:
        child(args, None, args.precision[0], 1000, "--record", str(args.record))
        args.trace = args.record
    return recorded(read_trace(args.trace), shape) if args.trace else drawn(shape, args.prompt_tokens)


def _show(figure: str, value: float) -> str:
    if "bytes" in figure:
        return format_bytes(value)
    return f"{value:.1%}" if figure == "hit_ratio" else f"{value:.3g}"


def error_of(figure: str, predicted: float, achieved: float, shape) -> float:
    """Relative to what was achieved; of bytes read at least to a fiftieth of what the experts of a token have, for next
    to nothing relative errors say nothing."""
    least = 1e-9
    if figure == "bytes_read_per_token":
        least = len(shape.moe_layers) * shape.top_k * shape.expert_bytes(99) / 50
    return abs(predicted - achieved) / max(achieved, least)


def report(rows: list[tuple[Prediction, list[dict[str, float]]]], shape) -> None:
    print("| budget | precision | figure | predicted | achieved | lowest to highest | error |")
    print("|---|---|---|---:|---:|---:|---:|")
    errors: dict[str, list[float]] = {figure: [] for figure in FIGURES}
    for prediction, runs in rows:
        for figure in FIGURES:
            values = [run[figure] for run in runs]
            predicted, achieved = float(getattr(prediction, figure)), statistics.median(values)
            error = error_of(figure, predicted, achieved, shape)
            errors[figure].append(error)
            print(
                f"| {format_bytes(prediction.budget_bytes)} | `{prediction.precision}` | {figure} |"
                f" {_show(figure, predicted)} | {_show(figure, achieved)} | {_show(figure, min(values))} to"
                f" {_show(figure, max(values))} | {error:.0%} |"
            )
    print()
    for figure in FIGURES:
        print(f"{figure}: median error {statistics.median(errors[figure]):.1%}, worst {max(errors[figure]):.1%}")
    together = [error for figure in GOALS for error in errors[figure]]
    print(f"{', '.join(GOALS)} together: median {statistics.median(together):.1%}, worst {max(together):.1%}")
    over = [p for p, runs in rows if max(run["peak_rss_bytes"] for run in runs) > p.budget.total]
    print(f"peak memory above the split: {len(over)} of {len(rows)} settings")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="-: the model that ships")
    parser.add_argument("--budgets", nargs="+", default=[], metavar="SIZE")
    parser.add_argument("--precision", nargs="+", default=["fixed:4", "fixed:3", "elastic:3"])
    parser.add_argument("--device", help="profile; default: this machine's")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--record", type=Path, metavar="FILE", help="write a trace with this model first, and use it")
    parser.add_argument("--text", type=Path, help="tokens of this file instead of random ones")
    parser.add_argument("--ctx-size", type=int, default=2048)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--warm-up", type=int, default=128, help="decoded tokens that do not count")
    parser.add_argument("--tokens", type=int, default=128, help="decoded tokens that count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", type=int, metavar="SEED", help=argparse.SUPPRESS)
    args = parser.parse_args()
    budgets = [parse_bytes(text, "--budgets") for text in args.budgets] or [None]
    if args.child is not None:
        print(json.dumps(measure(args, budgets[0], args.precision[0], args.child)))
        return
    shape = read_shape(None if args.store == "-" else args.store, Conversion())
    profile, about = this_machine() if args.device is None else (load_device(args.device), args.device)
    routes = routes_of(args, shape)
    args.record = None
    # What a budget counts for libraries is rounded up to 32 MiB, which can be more than all experts of a small model.
    profile = replace(profile, **child(args, None, args.precision[0], 0, "--probe"))
    print(f"{profile.name}, {about}; routing: {routes.about}", file=sys.stderr)
    rows: list[tuple[Prediction, list[dict[str, float]]]] = []
    for budget in budgets:
        for precision in args.precision:
            found = predict(
                shape,
                profile,
                routes.trace,
                precision,
                budget,
                args.ctx_size,
                available=int(profile.memory_bytes),
                recalls=routes.recalls,
                prompt_tokens=args.prompt_tokens,
            )
            rows.append((found, []))
    for turn in range(args.rounds):
        for prediction, runs in rows:
            runs.append(child(args, prediction.budget_bytes, prediction.precision, turn))
            speed = runs[-1]["decode_tokens_per_s"]
            what = f"{format_bytes(prediction.budget_bytes)}, {prediction.precision}"
            print(
                f"round {turn + 1}: {what}: {speed:.1f} tokens/s, {prediction.decode_tokens_per_s:.1f} predicted",
                file=sys.stderr,
            )
    report(rows, shape)
    print(f"medians of {args.rounds} rounds, load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
