"""Compare widths with other quantisers: the same checkpoint, text, windows and scoring for all.

    moert eval -m STORE --against STORE16 --json > ours.json
    python examples/compare_quantisers.py CHECKPOINT STORE [STORE ...] --ours ours.json [--others FILE] [--plot PNG]

Each of the others quantises the expert matrices one by one; what they stand for is put into transformers' model, which
computes in float32. All other weights are those of a STORE made without --calibrate (at 8 bits, if it has them so),
which has to be among them: a calibrated one has changed them to go with its own experts. Three kinds of rows:
what `moert eval` measured of our runtime (--ours, may be several files), which also rounds the experts' inputs to 8
bits; the weights of each STORE at each width in transformers, as those of the others; and the others.
Bits per weight are those stored, scales and zero points counted. HQQ's are counted as fp16 and its codes at their
nominal width, though it packs 3 bits into 3.2.

The others need `pip install bitsandbytes` and `pip install --no-deps hqq termcolor`; what is not installed is left out.
--others FILE keeps their measurements (JSON), and takes them from there if the file exists. For small models: two of
them are held in float32, and all logits of the lossless one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moert.convert.quantiser import RoundToNearest
from moert.hub.resolve import shipped_model
from moert.measure.evaluate import Sums, cut, stored_bytes
from moert.measure.plot import Point, draw
from moert.models.stored_model import StoredModel
from moert.quant.matmul import PackedExpert, floats
from moert.text.tokenizer import Tokenizer

GROUP = 64
MATRICES = ("gate", "up", "down")
# (layer, expert, name of the matrix, matrix [N, K]) -> (what its codes stand for [N, K], bits that store it)
Method = Callable[[int, int, str, Tensor], tuple[Tensor, float]]


def rounding(bits: int) -> Method:
    """Round to nearest between the least and the largest weight of a group: fp16 scale, zero point of `bits` bits."""

    def method(layer: int, expert: int, name: str, w: Tensor) -> tuple[Tensor, float]:
        groups, top = w.reshape(-1, GROUP), 2**bits - 1
        low, high = groups.amin(1, keepdim=True).clamp_max(0), groups.amax(1, keepdim=True).clamp_min(0)
        scale = ((high - low) / top).half().float().clamp_min(1e-7)
        zero = (-low / scale).round()
        codes = (groups / scale + zero).round().clamp(0, top)
        return ((codes - zero) * scale).view_as(w), w.numel() * (bits + (16 + bits) / GROUP)

    return method


def nf4(double: bool) -> Method:
    import bitsandbytes.functional as bnb

    def method(layer: int, expert: int, name: str, w: Tensor) -> tuple[Tensor, float]:
        codes, state = bnb.quantize_4bit(w, blocksize=GROUP, quant_type="nf4", compress_statistics=double)
        scales = 8 / GROUP + 32 / (256 * GROUP) if double else 32 / GROUP
        return bnb.dequantize_4bit(codes, state), w.numel() * (4 + scales)

    return method


def int8() -> Method:
    import bitsandbytes.functional as bnb

    def method(layer: int, expert: int, name: str, w: Tensor) -> tuple[Tensor, float]:
        codes, peaks, _ = bnb.int8_vectorwise_quant(w)
        return codes.float() * (peaks[:, None] / 127), w.numel() * 8 + 32.0 * len(w)

    return method


def hqq(bits: int, axis: int) -> Method:
    from hqq.core.quantize import BaseQuantizeConfig, Quantizer

    def method(layer: int, expert: int, name: str, w: Tensor) -> tuple[Tensor, float]:
        options = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=axis)["weight_quant_params"]
        codes, meta = Quantizer.quantize(w, device="cpu", compute_dtype=torch.float32, **options)
        for scale in ("scale", "zero"):
            meta[scale] = meta[scale].half().float()
        return Quantizer.dequantize(codes, meta), w.numel() * (bits + 32 / GROUP)

    return method


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


def methods(stores: list[StoredModel]) -> Iterator[tuple[str, str, StoredModel, Method]]:
    """Series, label, the store whose dense weights go with it, method."""
    for store in stores:
        for i, width in reversed(list(enumerate(store.layout.widths, 1))):
            yield f"{store.path.name}, weights alone", f"{width} bits", store, stored(store, i)
    rounded = next(store for store in stores if store.meta.quantiser == RoundToNearest.name)
    for series, label, method in others():
        yield series, label, rounded, method


def others() -> Iterator[tuple[str, str, Method]]:
    """Series, label, method."""
    for bits in (4, 3, 2):
        yield "rounding", f"{bits} bits", rounding(bits)
    try:
        yield "bitsandbytes", "INT8", int8()
        yield "bitsandbytes", "NF4", nf4(False)
        yield "bitsandbytes", "NF4 double", nf4(True)
    except ImportError:
        print("bitsandbytes is not installed: left out.", file=sys.stderr)
    try:
        for axis in (1, 0):
            for bits in (4, 3, 2):
                yield f"HQQ axis {axis}", f"{bits} bits", hqq(bits, axis)
    except ImportError:
        print("hqq is not installed: left out.", file=sys.stderr)


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
    bits = weights = 0.0
    for layer, (block, source) in enumerate(zip(model.model.layers, original.model.layers, strict=True)):
        if not hasattr(source.mlp, "experts"):
            continue
        # Fused: gate and up [E, 2 F, D], down [E, D, F].
        pairs = [(block.mlp.experts.gate_up_proj.data, source.mlp.experts.gate_up_proj.data)]
        pairs += [(block.mlp.experts.down_proj.data, source.mlp.experts.down_proj.data)]
        for expert in range(len(pairs[0][0])):
            into, out = ([*a[expert].chunk(2), b[expert]] for a, b in zip(*pairs, strict=True))
            for name, target, w in zip(MATRICES, into, out, strict=True):
                values, size = method(layer, expert, name, w.contiguous())
                target.copy_(values)
                bits, weights = bits + size, weights + w.numel()
    return bits / weights


@torch.inference_mode()
def logits_of(model: Any, windows: list[list[int]]) -> Iterator[Tensor]:
    for ids in windows:
        yield model(torch.tensor([ids])).logits[0, :-1]


def measure(args: argparse.Namespace, stores: list[StoredModel]) -> list[dict[str, Any]]:
    """A row for the lossless model in transformers, and one for each method; keys as `moert eval --json`."""
    text = args.text.read_text(encoding="utf-8")
    windows = cut(Tokenizer(args.checkpoint).encode(text), args.window, args.tokens)
    original, model = load(args.checkpoint), load(args.checkpoint)
    lossless, own = list(logits_of(original, windows)), Sums()
    for ids, logits in zip(windows, lossless, strict=True):
        own.score(logits, torch.tensor(ids[1:]), None)
    config, layout = stores[0].architecture, stores[0].layout
    used = sum(rows * cols for rows, cols in layout.shapes) * config.top_k * len(config.moe_layers)
    first = {"model": "transformers", "precision": "lossless", "lossless": True, "bits_per_weight": 16.0}
    rows = [{**first, "expert_bytes_per_token": 2.0 * used, "perplexity": math.exp(own.loss / own.scored)}]
    for series, label, store, method in methods(stores):
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
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=20480, help="at most; 0: all")
    args = parser.parse_args()
    if args.others and args.others.exists():
        measured = json.loads(args.others.read_text())
    else:
        stores = [StoredModel.open(path) for path in args.stores]
        if all(store.meta.quantiser != RoundToNearest.name for store in stores):
            parser.error("name a STORE made without --calibrate too: the others' experts go with its dense weights")
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
