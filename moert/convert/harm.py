"""What the widths of a converted model cost, in nats: the measure by which widths are chosen.

While a layer is converted, the squared error of every expert's output at every width is taken relative to the hidden
state behind the layer, token by token, since the next norm divides by the size of that. The divergence (KL) that a
width of one layer's experts leads to is about twice the sum of these shares: on SmolLM2-135M 1.1 to 3.9 times, at 2, 3
and 4 bits alike (taken relative to the mean square of all states instead, 0.7 to 106 times: a few tokens have states a
hundred times as large as the others). Several layers' divergences nearly add up, but do grow faster at low widths:
by 0, 11 and 30% when all 30 layers are at 4, 3 or 2 bits. So the whole model is run at each width, and the shares of a
width are multiplied by the factor that makes their sum the divergence that was found.

A store that was only rounded has the shares of its weights' errors in place of those of the outputs.
"""

# B widths, T tokens of a window, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from moert.config import EngineConfig
from moert.convert.calibration_text import WINDOW
from moert.convert.partial import Finished
from moert.engine.model_runner import ModelRunner, read_precision
from moert.models.stored_model import StoredModel
from moert.store.fileio import write_json
from moert.store.layout import META_FILE
from moert.store.meta import StoreMeta

WINDOWS = 2  # of the calibration text, on which the whole model is run: the mean is right within 10%
_FLOATS = 1 << 20  # logits that are compared at a time


@contextmanager
def trial_store(folder: Path, files: Mapping[str, Path], meta: StoreMeta) -> Iterator[StoredModel]:
    """Open files that lie elsewhere, by the names that a store has for them, as the store that `meta` describes.

    `folder` is made for it and removed afterwards.
    """
    _remove(folder)
    folder.mkdir()
    try:
        write_json(folder / META_FILE, meta.as_json())
        for name, path in files.items():
            (folder / name).symlink_to(path.absolute())
        yield StoredModel.open(folder)
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def divergences(
    store: StoredModel, windows: Iterable[tuple[Tensor, Tensor]], report: Callable[[str], None]
) -> list[float]:
    """Return the mean KL in nats at each width of a store, of the distributions of its source against its own.

    windows: token ids [T], and the logits [T, V] of the source. Raises what `ModelRunner` raises.
    """
    widths = store.layout.widths
    runner = ModelRunner(store, EngineConfig(precision=f"fixed:{widths[-1]}", ctx_size=WINDOW), lambda line: None)
    try:
        sums, tokens = [0.0] * len(widths), 0
        for ids, lossless in windows:
            for i, width in enumerate(widths):
                report(f"comparing with the source at {width} bits")
                runner.use(read_precision(f"fixed:{width}", store))
                runner.rewind(0)
                sums[i] += _divergence(runner.forward(ids.tolist(), all_logits=True), lossless)
            tokens += len(ids)
    finally:
        runner.close()
    return [total / tokens for total in sums]


def _divergence(logits: Tensor, lossless: Tensor) -> float:
    """Sum over tokens, for logits [T, V] each."""
    step = max(1, _FLOATS // logits.shape[1])
    parts = zip(torch.split(logits, step), torch.split(lossless, step), strict=True)
    return sum(
        float(functional.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="sum", log_target=True))
        for a, b in parts
    )


def in_nats(measured: Mapping[int, Finished], kl: Sequence[float]) -> dict[int, Finished]:
    """Scale the sensitivities of all layers so that those of a width add up to what the whole model was found to lose.

    kl: [B]. Where a width was found to lose no more than a wider one, what all of them lose alike hides the experts'
    part (dense weights of few bits may): then all have the factor of the base.
    """
    total = [0.0] * len(kl)
    for file in measured.values():
        assert file.sensitivity is not None
        assert file.usage is not None
        for usage, row in zip(file.usage, file.sensitivity, strict=True):
            total = [sum_ + usage * error for sum_, error in zip(total, row, strict=True)]
    factors = [found / sum_ if sum_ > 0 and found > 0 else 1.0 for found, sum_ in zip(kl, total, strict=True)]
    if any(narrow <= wide for narrow, wide in pairwise(kl)):
        factors = factors[:1] * len(kl)
    return {
        layer: replace(file, sensitivity=[[f * x for f, x in zip(factors, row, strict=True)] for row in rows])
        for layer, file in measured.items()
        for rows in [file.sensitivity or []]
    }
