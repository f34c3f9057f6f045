"""Compare widths with other quantisers: the same checkpoint, text, windows and scoring for all.

    moert eval -m STORE --against STORE16 --json > ours.json
    python examples/compare_quantisers.py CHECKPOINT STORE [STORE ...] --ours ours.json [--calibrate TEXT]
        [--others FILE] [--plot PNG]

The others (other_quantisers.py) are rounding, HQQ, bitsandbytes, the formats of llama.cpp and llm-compressor's GPTQ.
Each quantises the expert matrices one by one; what they stand for is put into transformers' model, which computes in
float32. All other weights are those of a STORE made with --fast (at 8 bits, if it has them so), which has to be
among them: a calibrated one has changed them to go with its own experts. Three kinds of rows: what `moert eval`
measured of our runtime (--ours, may be several files), which also rounds the experts' inputs to 8 bits; the weights of
each STORE at each width in transformers, as those of the others; and the others.
Bits per weight are those stored, scales and zero points counted. HQQ's are counted as fp16 and its and GPTQ's codes at
their nominal width, though HQQ packs 3 bits into 3.2.

llama.cpp's formats have blocks of 32 or 256 columns. Where 256 do not divide a matrix's columns it gets the format that
llama.cpp takes instead, which the label says; a format that no matrix can have is left out. GPTQ and llama.cpp's
importance matrix need --calibrate: they learn from the inputs that the experts of the lossless model have on that text.
AWQ is not among them. On a CPU llm-compressor 0.14 stops in it ("Cannot access accelerator device": it pins memory
without asking whether there is a GPU), and GPTQModel 7.7 asks for a newer torch than constraints.txt has.

A checkpoint whose weights were quantised once (that of real_chat.py: Q4_1) is nearly lossless in the very format that
it came from, which says nothing. --shuffle SEED gives the others the columns of all matrices in another order, the same
in the whole model, as a model of the same function might have them; that takes this away.

What is not installed is named and left out: `pip install bitsandbytes gguf llama-cpp-python` (the last is compiled, for
10 minutes), `pip install --no-deps hqq termcolor`, and for GPTQ, which has other pins but runs with these, `pip install
datasets loguru; pip install --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.19.0 auto-round nvidia-ml-py`.
--others FILE keeps the others' measurements (JSON), and takes them from there if the file exists. For small models: two
of them are held in float32, all logits of the lossless one, and with --calibrate products of all experts' inputs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from other_quantisers import MATRICES, Method, Moments, others, shuffled
from torch import Tensor

from moert.convert import calibration_text
from moert.convert.parallel import workers
from moert.convert.quantiser import RoundToNearest
from moert.hub.resolve import shipped_model
from moert.measure.evaluate import Sums, cut, stored_bytes
from moert.measure.plot import Point, draw
from moert.models.stored_model import StoredModel
from moert.quant.matmul import PackedExpert, floats
from moert.text.tokenizer import Tokenizer


def stored(store: StoredModel, slices: int) -> Method:
    """The weights that a store holds, at the width of its first slices."""

    def method(layer: int, expert: int, name: str, w: Tensor) -> tuple[Tensor, float]:
        file, offset = store.location(layer, expert)
        sizes = store.layout.slice_sizes[:slices]
        with file.open("rb") as source:
            source.seek(offset)
            parts = [torch.frombuffer(bytearray(source.read(size)), dtype=torch.uint8) for size in sizes]
        matrix = getattr(PackedExpert.from_slices(parts, store.layout), name)
        weights = sum(rows * cols for rows, cols in store.layout.shapes)
        return matrix.rows(0, w.shape[0]), 8 * stored_bytes(store.layout, slices) * w.numel() / weights

    return method


def methods(
    stores: list[StoredModel], moments: Moments | None, orders: dict[int, Tensor] | None
) -> Iterator[tuple[str, str, StoredModel, Method]]:
    """Series, label, the store whose dense weights go with it, method."""
    for store in stores:
        for i, width in reversed(list(enumerate(store.layout.widths, 1))):
            yield f"{store.path.name}, weights alone", f"{width} bits", store, stored(store, i)
    rounded = next(store for store in stores if store.meta.quantiser == RoundToNearest.name)
    columns = {name: cols for name, (_, cols) in zip(MATRICES, rounded.layout.shapes, strict=True)}
    for series, label, method in others(columns, moments):
        yield series, label, rounded, shuffled(method, orders) if orders else method


def load(checkpoint: Path) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def take_dense(model: Any, store: StoredModel) -> None:
    """Give the model all weights but the experts' from a store."""
    parameters = dict(model.named_parameters())
    for name, value in store.load_dense().items():
        parameters[name].data.copy_(floats(value))


def take_experts(model: Any, original: Any, method: Method) -> float:
    """Give the model the original's experts as the method leaves them; returns bits per weight."""
    layers = [i for i, block in enumerate(original.model.layers) if hasattr(block.mlp, "experts")]

    def take(item: tuple[int, int]) -> tuple[float, float]:
        layer, expert = item
        into, out = (matrices(m.model.layers[layer].mlp.experts, expert) for m in (model, original))
        bits = weights = 0.0
        for name, target, w in zip(MATRICES, into, out, strict=True):
            values, size = method(layer, expert, name, w.contiguous())
            target.copy_(values)
            bits, weights = bits + size, weights + w.numel()
        return bits, weights

    experts = [(layer, e) for layer in layers for e in range(len(original.model.layers[layer].mlp.experts.down_proj))]
    with workers(1 << 20) as pool:
        bits, weights = map(sum, zip(*pool.map(take, experts), strict=True))
    return bits / weights


def matrices(experts: Any, expert: int) -> list[Tensor]:
    """Return gate [F, D], up [F, D] and down [D, F] of an expert: fused in the model are gate and up [E, 2 F, D]."""
    return [*experts.gate_up_proj.data[expert].chunk(2), experts.down_proj.data[expert]]


def logits_of(model: Any, windows: list[list[int]]) -> Iterator[Tensor]:
    @torch.inference_mode()
    def logits(ids: list[int]) -> Tensor:
        return model(torch.tensor([ids]), use_cache=False).logits[0, :-1]

    with workers(1 << 20) as pool:
        yield from pool.map(logits, windows)


def moments_of(model: Any, windows: list[list[int]], orders: dict[int, Tensor] | None) -> Moments:
    """Return the mean of x xᵀ over the inputs x of each expert's matrices, their columns in the order of `orders`."""
    sums: dict[tuple[int, int], tuple[Tensor, Tensor, int]] = {}
    lock = Lock()

    def see(layer: int, experts: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:
        inputs, routed, _ = args  # [T, D], the experts of each token [T, K]
        for expert in routed.unique().tolist():
            x = inputs[(routed == expert).any(-1)]
            gate, up = torch.nn.functional.linear(x, experts.gate_up_proj[expert]).chunk(2, -1)
            inner = experts.act_fn(gate) * up
            if orders:
                x, inner = (v[:, orders[v.shape[1]]] for v in (x, inner))
            new = x.T @ x, inner.T @ inner, len(x)
            with lock:
                old = sums.get((layer, expert), (0, 0, 0))
                sums[layer, expert] = old[0] + new[0], old[1] + new[1], old[2] + new[2]

    layers = [(i, block.mlp) for i, block in enumerate(model.model.layers) if hasattr(block.mlp, "experts")]
    hooks = [mlp.experts.register_forward_pre_hook(partial(see, i)) for i, mlp in layers]
    for _ in logits_of(model, windows):
        pass
    for hook in hooks:
        hook.remove()
    return {key: (a / n, b / n) for key, (a, b, n) in sums.items()}


def measure(args: argparse.Namespace, stores: list[StoredModel]) -> list[dict[str, Any]]:
    """A row for the lossless model in transformers, and one for each method; keys as `moert eval --json`."""
    text = args.text.read_text(encoding="utf-8")
    windows = cut(Tokenizer(args.checkpoint).encode(text), args.window, args.tokens)
    original, model = load(args.checkpoint), load(args.checkpoint)
    orders = moments = None
    if args.shuffle is not None:
        generator = torch.Generator().manual_seed(args.shuffle)
        orders = {K: torch.randperm(K, generator=generator) for K in {cols for _, cols in stores[0].layout.shapes}}
    if args.calibrate is not None:
        content = calibration_text.read(args.calibrate)
        seen = calibration_text.tokens(args.calibrate, content, args.checkpoint, args.calibration_tokens).tokens
        moments = moments_of(original, cut(seen, calibration_text.WINDOW, 0), orders)
        print(f"Inputs of the experts seen on {len(seen)} tokens of {args.calibrate}.", file=sys.stderr)
    lossless, own = list(logits_of(original, windows)), Sums()
    for ids, logits in zip(windows, lossless, strict=True):
        own.score(logits, torch.tensor(ids[1:]), None)
    config, layout = stores[0].architecture, stores[0].layout
    used = sum(rows * cols for rows, cols in layout.shapes) * config.top_k * len(config.moe_layers)
    first = {"model": "transformers", "precision": "lossless", "lossless": True, "bits_per_weight": 16.0}
    rows = [{**first, "expert_bytes_per_token": 2.0 * used, "perplexity": math.exp(own.loss / own.scored)}]
    for series, label, store, method in methods(stores, moments, orders):
        take_dense(model, store)
        bits = take_experts(model, original, method)
        sums = Sums()
        for ids, logits, true in zip(windows, logits_of(model, windows), lossless, strict=True):
            sums.score(logits, torch.tensor(ids[1:]), true)
        rows.append(
            {
                "model": series,
                "precision": label,
                "lossless": False,
                "scored_tokens": sums.scored,
                "perplexity": math.exp(sums.loss / sums.scored),
                "perplexity_ratio": math.exp((sums.loss - own.loss) / own.scored),
                "mean_kl": sums.kl / sums.scored,
                "top1_agreement": sums.same / sums.scored,
                "bits_per_weight": bits,
                "expert_bytes_per_token": bits / 8 * used,
            }
        )
        print(f"{series} {label}: {bits:.3f} bits, {rows[-1]['perplexity_ratio']:.4f}", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("stores", type=Path, nargs="+", metavar="STORE")
    parser.add_argument("--ours", type=Path, nargs="+", default=[], metavar="FILE", help="from moert eval --json")
    parser.add_argument("--others", type=Path, metavar="FILE", help="where the others' measurements are kept")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--text", type=Path, default=shipped_model() / "heldout.txt")
    parser.add_argument("--calibrate", metavar="TEXT", help="a file for those that need one, or `default`: moert's own")
    parser.add_argument("--calibration-tokens", type=int, default=16384, metavar="N", help="at most (%(default)s)")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="order of the columns that the others are given")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=20480, help="at most; 0: all")
    args = parser.parse_args()
    if args.others and args.others.exists():
        measured = json.loads(args.others.read_text())
    else:
        stores = [StoredModel.open(path) for path in args.stores]
        if all(store.meta.quantiser != RoundToNearest.name for store in stores):
            parser.error("name a STORE made with --fast too: the others' experts go with its dense weights")
        measured = measure(args, stores)
        if args.others:
            args.others.write_text(json.dumps(measured, indent=1) + "\n")
    ours = [row for file in args.ours for row in json.loads(file.read_text())["rows"] if not row["lossless"]]
    rows = sorted([*ours, *measured], key=lambda row: -row["bits_per_weight"])
    print("| | bits per weight | expert MB/token | perplexity | relative | KL, nats | same top token |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for r in rows:
        figures = [f"{r['bits_per_weight']:.3f}", f"{r['expert_bytes_per_token'] / 1e6:.4g}", f"{r['perplexity']:.3f}"]
        if not r["lossless"]:
            figures += [f"{r['perplexity_ratio']:.4f}", f"{r['mean_kl']:.5f}", f"{r['top1_agreement']:.2%}"]
        print(f"| {r['model']} {r['precision']} | {' | '.join(figures + ['-'] * (6 - len(figures)))} |")
    if args.plot:
        points = [
            Point(r["precision"], r["model"], r["expert_bytes_per_token"], r["perplexity"])
            for r in rows
            if not r["lossless"] and "weights alone" not in r["model"]
        ]
        lossless = next(row["perplexity"] for row in measured if row["lossless"])
        draw(args.plot, points, lossless, f"{args.checkpoint.name} on {args.text.name}")


if __name__ == "__main__":
    main()
