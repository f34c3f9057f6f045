"""Measure each part of the calibrated quantiser: output error of one layer's experts, at true bits per weight.

    python examples/nested_methods.py CHECKPOINT [--layer 2] [--experts 8]

For each method and width the share of the outputs' energy that is lost, gate and up, then down, mean over experts, on
inputs of a calibration text. `planes` is D2MoE's way (arXiv 2504.15299): a base of the least width, then a plane of
+-1 for each further bit with scales of its own, each fitted to what is left.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moert.convert import calibration_text as calibration
from moert.convert.calibration import Calibrated
from moert.convert.parallel import workers
from moert.convert.source_model import SourceModel
from moert.quant import calibrate, nested
from moert.quant.format import MatrixLayout
from moert.quant.reference import dequantise

WIDTHS = (2, 3, 4)


def rounding(w: Tensor, h: Tensor, layout: MatrixLayout) -> list[Tensor]:
    slices = nested.quantise(w, layout)
    return [dequantise(slices[: i + 1], layout, i + 1) for i in range(len(layout.widths))]


def planes(w: Tensor, h: Tensor, layout: MatrixLayout) -> list[Tensor]:
    base = MatrixLayout(layout.rows, layout.cols, layout.group_size, layout.widths[:1])
    found = rounding(w, h, base)
    weights = h.diagonal().view(1, -1, layout.group_size)
    for _ in layout.widths[1:]:
        rest = (w - found[-1]).view(layout.rows, -1, layout.group_size)
        scale = (rest.abs() * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
        found.append(found[-1] + (rest.sign() * scale).view_as(w))
    return found


def chosen(sweeps: int, correlated: bool = True) -> Callable[[Tensor, Tensor, MatrixLayout], list[Tensor]]:
    def method(w: Tensor, h: Tensor, layout: MatrixLayout) -> list[Tensor]:
        h = h if correlated else h.diagonal().diag()
        result = calibrate.choose(w, h, layout, sweeps=sweeps)
        scales = result.scales.repeat_interleave(layout.group_size, -1)
        top = layout.widths[-1]
        return [calibrate.levels(result.codes, b, top) * s for b, s in zip(layout.widths, scales, strict=True)]

    return method


METHODS = {
    "rounding, scale search": (rounding, False),
    "+-1 planes": (planes, False),
    "balanced, rounding": (rounding, True),
    "balanced, +-1 planes": (planes, True),
    "balanced, weighted scale search": (chosen(0, correlated=False), True),
    "balanced, compensation": (chosen(0), True),
    "balanced, compensation, 2 sweeps": (chosen(2), True),
}


def lost(w: Tensor, used: Tensor, h: Tensor) -> float:
    d = w - used
    return float(((d @ h) * d).sum() / ((w @ h) * w).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=64)
    args = parser.parse_args()
    source = SourceModel.open(args.checkpoint)
    text = calibration.tokens("default", calibration.read("default"), args.checkpoint)
    quantiser = Calibrated(source, text)
    with workers(1 << 20) as pool:
        inputs = quantiser.inputs(args.layer, range(args.experts), pool)
    print(f"{'':34}" + "".join(f"{b:>14} bits" for b in WIDTHS))
    for name, (method, balanced) in METHODS.items():
        sums = torch.zeros(2, len(WIDTHS))
        for expert, x, inner in inputs:
            gate, up, down = (w.float() for w in source.expert(args.layer, expert))
            for i, (w, seen) in enumerate(((torch.cat([gate, up]), x), (down, inner))):
                f = calibrate.balance(seen.square().mean(0).sqrt(), w.square().mean(0).sqrt()) if balanced else 1.0
                layout = MatrixLayout(*w.shape, args.group_size, WIDTHS)
                h = (seen / f).T @ (seen / f)
                sums[i] += torch.tensor([lost(w * f, used, h) for used in method(w * f, h, layout)])
        shares = (100 * sums / len(inputs)).T.tolist()
        print(f"{name:34}" + "".join(f"{a:9.3f}% {b:6.3f}%" for a, b in shares))
    layout = MatrixLayout(4096, 4096, args.group_size, WIDTHS)
    print(f"{'true bits per weight':34}" + "".join(f"{layout.bits_per_weight(i):19.2f}" for i in range(len(WIDTHS))))


if __name__ == "__main__":
    main()
