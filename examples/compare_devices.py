"""A model on a GPU that cannot hold it: moert beside transformers with accelerate's offload, at the same device memory.

    python examples/compare_devices.py CHECKPOINT STORE --device-budget 2GiB --precision routed:3

One after the other, since each takes the device: transformers with what does not fit in host memory, then on disk;
moert with every expert computed on the device, and with the host's cores beside it; moert with all of it on the device.
Random tokens are fed: decoding of 1 and of 8 sequences, and prompts of 512 tokens, after a warm-up, medians of rounds.
Without a GPU `--device emulated` goes through the same steps on the CPU, which says nothing about speed.
"""

# T tokens, R sequences

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from moert import LLM
from moert.config import parse_bytes
from moert.engine.model_runner import ModelRunner
from moert.engine.sequence_cache import SequenceCache, StepInput

Decode = Callable[[int], None]  # a step of so many sequences
PROMPT = 512


def median_rate(call: Callable[[], int], rounds: int, wait: Callable[[], object]) -> float:
    """Tokens per second; call: does some and says how many tokens they were."""
    call()
    rates = []
    for _ in range(rounds):
        wait()
        began = time.perf_counter()
        count = call()
        wait()
        rates.append(count / (time.perf_counter() - began))
    return statistics.median(rates)


@contextlib.contextmanager
def transformers_model(checkpoint: str, device: str, budget: int, on_disk: bool) -> Iterator[Any]:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        more: dict[str, Any] = {}
        if device == "cuda":
            memory = {0: budget, "cpu": 0 if on_disk else "1000GiB"}
            more = {"device_map": "auto", "max_memory": memory, "offload_folder": folder}
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, **more).eval()
        if device != "cuda" and on_disk:
            from accelerate import disk_offload

            disk_offload(model, folder, execution_device=torch.device("cpu"))
        yield model


@torch.inference_mode()
def of_transformers(
    model: Any, draw: random.Random, tokens: int, rounds: int, wait: Callable[[], object]
) -> list[float]:
    V, device = model.config.vocab_size, next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device

    def ids(R: int, T: int) -> torch.Tensor:
        return torch.tensor([[draw.randrange(V) for _ in range(T)] for _ in range(R)], device=device)

    def decode(R: int) -> Callable[[], int]:
        cache = model(ids(R, 8), use_cache=True).past_key_values

        def some() -> int:
            for _ in range(tokens):
                model(ids(R, 1), past_key_values=cache, use_cache=True)
            return R * tokens

        return some

    def prompt() -> int:
        model(ids(1, PROMPT), use_cache=False)
        return PROMPT

    return [median_rate(call, rounds, wait) for call in (decode(1), decode(8), prompt)]


def of_moert(
    runner: ModelRunner, draw: random.Random, tokens: int, rounds: int, wait: Callable[[], object]
) -> list[float]:
    V = runner.decoder.arch.vocab_size
    runner.preload()

    def ids(T: int) -> list[int]:
        return [draw.randrange(V) for _ in range(T)]

    def decode(R: int) -> Callable[[], int]:
        for old in open_ones:
            runner.caches.close(old)
        room = [runner.caches.open([], 8 + (rounds + 1) * tokens) for _ in range(R)]
        open_ones[:] = [cache for cache in room if cache is not None]
        runner.step([StepInput(cache, ids(8)) for cache in open_ones], False)

        def some() -> int:
            for _ in range(tokens):
                runner.step([StepInput(cache, ids(1)) for cache in open_ones], True)
            return len(open_ones) * tokens

        return some

    def prompt() -> int:
        runner.rewind(0)
        runner.forward(ids(PROMPT))
        return PROMPT

    open_ones: list[SequenceCache] = []
    rates = [median_rate(decode(R), rounds, wait) for R in (1, 8)]
    for old in open_ones:
        runner.caches.close(old)
    return [*rates, median_rate(prompt, rounds, wait)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("store", help="the same model, converted by moert")
    parser.add_argument("--device-budget", required=True, help="of all but the last row")
    parser.add_argument("--device", default="cuda", choices=("cuda", "emulated"))
    parser.add_argument("--precision", default="routed:3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="of a round of decoding")
    args = parser.parse_args()
    budget = parse_bytes(args.device_budget, "--device-budget")
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    rows: dict[str, list[float]] = {}
    for name, on_disk in (("transformers, host offload", False), ("transformers, disk offload", True)):
        with transformers_model(args.checkpoint, args.device, budget, on_disk) as model:
            rows[name] = of_transformers(model, random.Random(1), args.tokens, args.rounds, wait)
        del model
        gc.collect()
    room = max(PROMPT, 8 * (8 + (args.rounds + 1) * args.tokens) + 128)
    for name, options in (
        ("moert, device alone", {"device_budget": budget, "hybrid": False}),
        ("moert, hybrid", {"device_budget": budget}),
        ("moert, all on the device", {}),
    ):
        with LLM(
            args.store, device=args.device, precision=args.precision, ctx_size=room, on_status=print, **options
        ) as llm:
            rows[name] = llm.call(lambda runner: of_moert(runner, random.Random(1), args.tokens, args.rounds, wait))
    whole = rows["moert, all on the device"]
    print("| tokens/s (share of all on the device) | batch 1 | batch 8 | prompt 512 |\n|---|---:|---:|---:|")
    for name, found in rows.items():
        cells = (f"{rate:.1f} ({rate / most:.2f})" for rate, most in zip(found, whole, strict=True))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
