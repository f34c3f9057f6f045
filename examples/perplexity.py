"""Perplexity of a model on a text, at one or several widths, through the Python interface.

    python examples/perplexity.py                                   # the shipped model on its held-out text
    python examples/perplexity.py --model STORE --text FILE --precision fixed:4 fixed:2

The text is cut into windows of --window tokens that do not overlap; the first token of each is not scored.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from moert import LLM
from moert.source import shipped_model


def perplexity(model: str | None, precision: str | None, text: str, window: int, limit: int) -> tuple[float, str]:
    """exp(mean negative log-likelihood) of the first `limit` tokens, and the precision used."""
    loss, count = 0.0, 0
    with LLM(model, precision=precision, ctx_size=window) as llm:
        ids = llm.tokenizer.encode(text)[:limit]
        for start in range(0, len(ids) - 1, window):
            part = ids[start : start + window]
            scores = llm.logits(part).log_softmax(-1)[:-1]
            loss -= scores.gather(1, torch.tensor(part[1:])[:, None]).double().sum().item()
            count += len(part) - 1
        return math.exp(loss / count), str(llm.engine.precision)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="store (default: the shipped model)")
    parser.add_argument("--text", type=Path, default=shipped_model() / "heldout.txt")
    parser.add_argument("--precision", nargs="+", default=[None])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=20480, help="how many to score at most")
    args = parser.parse_args()
    for wanted in args.precision:
        value, used = perplexity(args.model, wanted, args.text.read_text(), args.window, args.tokens)
        print(f"{used:9} {value:8.3f}")


if __name__ == "__main__":
    main()
