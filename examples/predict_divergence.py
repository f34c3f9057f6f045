"""How well the sensitivities of a store predict what mixed widths lose.

Draws widths for every expert of a store, 30 times, computes a text at them and with the lossless store, and prints the
divergence (KL, nats per token) that moert.json predicts beside the one measured, and the rank correlation of the two.
Half of the mixes have the same shares of widths in every layer, half have shares of their own in each.

    moert convert CHECKPOINT STORE
    moert convert CHECKPOINT LOSSLESS --widths 16 --dense-bits 16
    python examples/predict_divergence.py STORE LOSSLESS --text TEXT
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from moert.config import EngineConfig
from moert.engine.model_runner import ModelRunner, read_precision
from moert.models.stored_model import StoredModel
from moert.scheduler.precision import FixedPrecision
from moert.text.tokenizer import Tokenizer

WINDOW = 512


class Mixed(FixedPrecision):
    """Slices of its own for each expert: layer -> [E]."""

    def __init__(self, widest: int, counts: Mapping[int, NDArray[np.int64]]) -> None:
        super().__init__(widest)
        object.__setattr__(self, "counts", counts)

    def chooser(self, widths: Sequence[int], kept: Mapping[int, Sequence[int]]) -> Any:
        return self

    def one(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> list[int]:
        return [int(self.counts[layer][e]) for e in experts]

    def many(self, layer: int, experts: NDArray[np.int64], weights: NDArray[Any]) -> NDArray[np.int64]:
        found: NDArray[np.int64] = self.counts[layer][experts]
        return found

    counts: Mapping[int, NDArray[np.int64]]


def draw(store: StoredModel, generator: np.random.Generator, same: bool) -> dict[int, NDArray[np.int64]]:
    """Slices for each expert: layer -> [E]."""
    B, E = store.layout.num_slices, store.num_experts
    shares = generator.dirichlet([0.7] * B)
    return {
        layer: 1 + generator.choice(B, E, p=shares if same else generator.dirichlet([0.7] * B))
        for layer in store.moe_layers
    }


def predicted(store: StoredModel, counts: Mapping[int, NDArray[np.int64]]) -> float:
    """Nats per token, by the sensitivities of a store and by how its experts are used."""
    meta, total = store.meta, 0.0
    assert meta.sensitivity is not None
    assert meta.router_weights is not None
    for layer in store.moe_layers:
        table = np.array(meta.router_weights[layer])
        uses, squares = table[:, 0], (table[:, 1:] ** 2).mean(1)
        tokens = uses.sum() / store.architecture.top_k
        harm = np.array(meta.sensitivity[layer])[np.arange(store.num_experts), counts[layer] - 1]
        total += float((uses * squares * harm).sum() / tokens)
    return total


def ranks(values: Sequence[float]) -> NDArray[np.int64]:
    return np.argsort(np.argsort(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("lossless", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--mixes", type=int, default=30)
    args = parser.parse_args()
    store, lossless = StoredModel.open(args.store), StoredModel.open(args.lossless)
    ids = Tokenizer(store.path).encode(args.text.read_text())[: args.tokens]
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]

    def logits(runner: ModelRunner) -> list[torch.Tensor]:
        found = []
        for window in windows:
            runner.rewind(0)
            found.append(runner.forward(window, all_logits=True).log_softmax(-1))
        return found

    exact = ModelRunner(lossless, EngineConfig(ctx_size=WINDOW), lambda line: None)
    true = logits(exact)
    exact.close()
    widest = store.layout.widths[-1]
    runner = ModelRunner(store, EngineConfig(ctx_size=WINDOW, precision=f"fixed:{widest}"), lambda line: None)
    generator, rows = np.random.default_rng(0), []

    def measured() -> float:
        parts = zip(logits(runner), true, strict=True)
        return sum(float(functional.kl_div(a, b, reduction="sum", log_target=True)) for a, b in parts) / len(ids)

    for width in store.layout.widths:
        runner.use(read_precision(f"fixed:{width}", store))
        counts = dict.fromkeys(store.moe_layers, np.full(store.num_experts, store.layout.widths.index(width) + 1))
        print(f"fixed:{width}  predicted {predicted(store, counts):.4f}  measured {measured():.4f}", flush=True)
    for number in range(args.mixes):
        counts = draw(store, generator, same=number % 2 == 0)
        runner.use(Mixed(widest, counts))
        mean = np.mean([store.layout.widths[n - 1] for row in counts.values() for n in row])
        rows.append((mean, predicted(store, counts), measured()))
        print("mean width {:.2f}  predicted {:.4f}  measured {:.4f}".format(*rows[-1]), flush=True)
    runner.close()
    for name, at in (("prediction", 1), ("mean width alone", 0)):
        found = np.corrcoef(ranks([row[at] for row in rows]), ranks([row[2] for row in rows]))[0, 1]
        print(f"rank correlation with the divergence measured, {name}: {found:.3f}")


if __name__ == "__main__":
    main()
