"""Writes the routes of a running model into a trace, as `moert.scheduler.trace` describes it."""

# T tokens, K experts per token

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from moert.models.decoder import Decoder
from moert.models.kv_cache import KVCache
from moert.models.moe import Experts
from moert.models.stored_model import StoredModel
from moert.quant.format import ExpertLayout
from moert.scheduler.trace import DECODE, PREFILL, Routing, Trace, TraceStep, writer
from moert.store.layout import EMBEDDING, HEAD


def trace_shape(store: StoredModel) -> Trace:
    """A trace of this model without steps. An expert's bytes at 4 bits are those of widths 2, 3 and 4.

    The head, which every token reads, counts to the last layer; of an embedding beside it a token reads but a row.
    """
    arch, layout = store.architecture, store.layout
    expert = ExpertLayout(layout.hidden, layout.inner, 64, (2, 3, 4)).bytes_at(4)
    dense = [0] * arch.num_layers
    tied = all(tensor.name != HEAD for tensor in store.meta.dense)
    for tensor in store.meta.dense:
        place = tensor.name.split(".")
        if tied or tensor.name != EMBEDDING:
            dense[int(place[2]) if place[1] == "layers" else -1] += tensor.nbytes
    experts = tuple(expert if moe else 0 for moe in arch.is_moe_layer)
    name = Path(store.meta.source_name).name
    return Trace(name, arch.num_layers, store.num_experts, arch.top_k, experts, tuple(dense), ())


class Recorder:
    """Writes every pass of `decoder` into `path`, gzipped where its name ends in .gz, until it is closed.

    A pass that an error or Ctrl-C breaks off is left out. OSError where the file cannot be written.
    """

    def __init__(self, store: StoredModel, decoder: Decoder, path: Path) -> None:
        self._layers = len(store.moe_layers)
        open_file = gzip.open if path.suffix == ".gz" else open
        self._file = open_file(path, "wt", encoding="utf-8")
        self._write = writer(self._file, trace_shape(store))
        self._tokens: list[tuple[int, int, int]] = []  # of the pass that runs: turn, phase and token
        self._routes: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, [T, K] each, of the pass that runs
        self._turns: dict[int, tuple[int, int]] = {}  # by sequence, turn and phase
        self._next_turn = 0
        decoder.on_pass.append(self._begin)
        decoder.wrap_experts(lambda experts: _Tapped(experts, self._routes))

    def _begin(self, runs: Sequence[tuple[Tensor, KVCache]]) -> None:
        self._end()
        self._tokens = []
        for tokens, cache in runs:
            phase = DECODE if len(tokens) == 1 and cache.length else PREFILL
            turn, before = self._turns.get(id(cache), (0, DECODE))
            if phase == PREFILL and (before == DECODE or not cache.length):
                turn, self._next_turn = self._next_turn, self._next_turn + 1
            self._turns[id(cache)] = turn, phase
            self._tokens += ((turn, phase, token) for token in tokens.tolist())

    def _end(self) -> None:
        """Write the pass before, if it is whole."""
        if len(self._routes) == self._layers:
            rows = [
                (layer, indices.tolist(), (weights / weights.sum(-1, keepdim=True)).tolist())
                for layer, (indices, weights) in sorted(self._routes.items())
            ]
            for t, (turn, phase, token) in enumerate(self._tokens):
                routes = {layer: Routing(tuple(experts[t]), tuple(weights[t])) for layer, experts, weights in rows}
                self._write(TraceStep(phase, routes, token, turn))
        self._routes.clear()

    def close(self) -> None:
        self._end()
        self._file.close()


class _Tapped(Experts):
    """Notes what is asked of `experts`."""

    def __init__(self, experts: Experts, routes: dict[int, tuple[Tensor, Tensor]]) -> None:
        self._experts, self._routes = experts, routes

    def __call__(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        result = self._experts(layer, x, indices, weights)
        self._routes[layer] = indices, weights
        return result

    def forward_token(
        self, layer: int, x: Tensor, experts: Sequence[int], weights: Sequence[float], out: Tensor
    ) -> None:
        self._experts.forward_token(layer, x, experts, weights, out)
        self._routes[layer] = Tensor([experts]).long(), Tensor([weights])
