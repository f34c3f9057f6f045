"""Shared code of training against the logits of a lossless store: both models in float32, with gradients.

Everything is computed by torch, with all experts in memory, so that this is for small models.
"""

# T tokens of all windows, V vocabulary, D hidden, K experts per token

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from moert.config import format_bytes
from moert.errors import UsageError
from moert.hardware.memory import available_bytes
from moert.models.attention import span
from moert.models.decoder import Decoder, DecoderLayer
from moert.models.kv_cache import KVCache
from moert.models.moe import Experts
from moert.models.stored_model import StoredModel
from moert.quant import dispatch
from moert.quant.matmul import ACTIVATIONS, PackedExpert, floats, gather_rows
from moert.scheduler.precision import Chooser

WINDOW = 512
_MOST_CHECKED = 8  # windows that are kept from training, to compare with what there was before


class _Window(KVCache):
    """Keys and values of a window that begins with nothing: as they are, so that gradients pass."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self._both = keys, values

    def read(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        return self._both


class NestedExperts(Experts):
    """The experts of a store, at the widths that `chooser` chooses; those of a lossless store have a single one."""

    def __init__(self, store: StoredModel) -> None:
        self.activation, self.kept = store.architecture.hidden_act, store.kept
        self.chooser: Chooser | None = None  # None: always the widest
        self._weights: dict[tuple[int, int, int], Sequence[Tensor]] = {}
        for layer in store.moe_layers:
            for e, count in enumerate(store.kept[layer]):
                slices = store.read_expert(layer, e)
                for n in range(count):
                    self._weights[layer, e, n] = PackedExpert.from_slices(slices[: n + 1], store.layout).floats()

    def matrices(self, layer: int, expert: int, n: int) -> Sequence[Tensor]:
        """Gate, up and down with the first n + 1 slices."""
        return self._weights[layer, expert, n]

    def __call__(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        if self.chooser is None:
            chosen = torch.tensor(self.kept[layer])[indices] - 1
        else:
            chosen = torch.from_numpy(self.chooser.many(layer, indices.numpy(), weights.detach().numpy())) - 1
        return self.sum(layer, x, indices, weights, chosen)

    def sum(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Sum the experts as `__call__` does, at given widths. chosen: int64 [T, K], index of the width."""
        out = torch.zeros_like(x)
        for e in torch.unique(indices).tolist():
            for n in range(self.kept[layer][e]):
                tokens, places = ((indices == e) & (chosen == n)).nonzero(as_tuple=True)
                if len(tokens):
                    y = self.ffn(layer, e, n, x[tokens])
                    out = out.index_add(0, tokens, y * weights[tokens, places, None])
        return out

    def ffn(self, layer: int, expert: int, n: int, x: Tensor) -> Tensor:
        """Compute the output of an expert for x [T, D] with its first n + 1 slices."""
        gate, up, down = self.matrices(layer, expert, n)
        return (ACTIVATIONS[self.activation](x @ gate.T) * (x @ up.T)) @ down.T


def decoder(store: StoredModel, experts: Experts) -> Decoder:
    """The model of a store with dense weights in float32."""
    dense = {name: floats(w) for name, w in store.load_dense().items()}
    return Decoder(store.architecture, dense, experts)


def logits(model: Decoder, windows: Sequence[Tensor]) -> Tensor:
    """[T, V] of windows of token ids, one behind the other; `Decoder.forward` would keep no gradients."""
    sizes = [len(ids) for ids in windows]
    rotations = [model.rotation.cos_sin(0, size) for size in sizes]
    cache = _Window(model.arch, 0, torch.float32)
    x = gather_rows(model.embed_tokens.weight, torch.cat(list(windows)))
    for module, reach in zip(model.layers, model.arch.sliding_windows, strict=True):
        layer = cast(DecoderLayer, module)
        normed: Tensor = layer.input_layernorm(x)
        parts = zip(torch.split(normed, sizes), rotations, sizes, strict=True)
        seen = [layer.self_attn(part, *rotation, span(0, size, reach), cache) for part, rotation, size in parts]
        x = x + torch.cat(seen)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    result: Tensor = model.lm_head(model.norm(x))
    return result


def divergence(model: Decoder, lossless: Decoder, windows: Sequence[Tensor]) -> Tensor:
    """Mean KL over the tokens of windows, in nats, of the lossless model's distribution against the other's."""
    with torch.no_grad():
        true = logits(lossless, windows).log_softmax(-1)
    scores = logits(model, windows).log_softmax(-1)
    return functional.kl_div(scores, true, reduction="batchmean", log_target=True)


def set_apart(windows: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Windows to train on, and some, spread over the text, to check with. UsageError where there is only one."""
    if len(windows) < 2:
        raise UsageError("Training needs at least two windows of text: name a longer one.")
    ids = [torch.tensor(window) for window in windows]
    checked = max(1, min(_MOST_CHECKED, len(ids) // 8))
    at = [i * len(ids) // checked for i in range(checked)]
    return [window for i, window in enumerate(ids) if i not in at], [ids[i] for i in at]


def check_memory(store: StoredModel, lossless: StoredModel) -> None:
    """Raise UsageError where all experts in float32, the store's twice at each of its widths, do not fit in memory."""
    weights = sum(rows * cols for rows, cols in store.layout.shapes)
    experts = sum(2 * sum(counts) + len(counts) for counts in store.kept.values())
    needed = 4 * weights * experts + 3 * (store.dense_bytes + lossless.dense_bytes)
    available = available_bytes()
    if needed > available:
        raise UsageError(
            f"Training would need {format_bytes(needed)} of memory for the weights in float32, but"
            f" {format_bytes(available)} are available: train on a larger machine, or use the store as it is."
        )


@contextmanager
def torch_alone() -> Iterator[None]:
    """The compiled kernels keep no gradients."""
    kernel = dispatch.kernel_name()
    dispatch.set_kernel(dispatch.Kernel.REFERENCE)
    try:
        yield
    finally:
        dispatch.set_kernel(kernel)
