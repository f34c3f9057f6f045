"""A decoder of which some layers, and perhaps the head, are on a device.

The residual stream moves where two neighbours are apart. Layers that stay on the host run as in `Decoder`.
"""

# T tokens, V vocabulary, D hidden, R sequences

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from moert.device.layer import DeviceLayer, DeviceLinear, DeviceNorm, OneToken, SequenceRun
from moert.device.link import DeviceBackend
from moert.device.matrix import DeviceMatrix
from moert.device.split_cache import SplitCache
from moert.kernels.layer_step import Place
from moert.models.architecture import Architecture
from moert.models.attention import Span, span
from moert.models.decoder import Decoder, DecoderLayer
from moert.models.kv_cache import KVCache
from moert.models.layers import DenseTensors, Linear, RMSNorm
from moert.models.moe import Experts
from moert.quant.matmul import gather_rows

HEAD_TOKENS = 32  # whose logits are made at a time


class PlacedDecoder(Decoder):
    """`Decoder` with the layers that are `on_device` there, and the head, with the last norm, where `head` is.

    `dense` has matrices in device memory for these, as `moert.device.dense_quant` loads them. An embedding on the
    device is a tied head. `together` equals `forward` to rounding only: torch's sums depend on how many tokens it gets.
    """

    def __init__(
        self,
        arch: Architecture,
        dense: DenseTensors,
        experts: Experts,
        on_device: Sequence[bool],
        head: bool,
        device: DeviceBackend,
    ) -> None:
        self._on_device, self._head_there, self._link = tuple(on_device), head, device
        self._one: OneToken | None = None
        super().__init__(arch, dense, experts)

    def _make(self, arch: Architecture, dense: DenseTensors, experts: Experts) -> None:
        there = self._head_there
        tied = there and arch.tie_word_embeddings
        self.embed_tokens = (DeviceLinear if tied else Linear)(dense, "model.embed_tokens")
        kinds = [DeviceLayer if there else DecoderLayer for there in self._on_device]
        self.layers = nn.ModuleList(kind(arch, dense, layer, experts) for layer, kind in enumerate(kinds))
        self.norm = (DeviceNorm if there else RMSNorm)(dense, "model.norm", arch.rms_norm_eps)
        if arch.tie_word_embeddings:
            self.lm_head = self.embed_tokens
        else:
            self.lm_head = (DeviceLinear if there else Linear)(dense, "lm_head")

    @torch.inference_mode()
    def forward(self, tokens: Tensor, cache: KVCache, all_logits: bool = False) -> Tensor:
        if not len(tokens):
            raise ValueError("a forward pass needs at least one token")
        x, there = self._run([(tokens, cache)])
        logits = self._logits(x if all_logits else x[-1:], there)
        return logits if all_logits else logits[0]

    @torch.inference_mode()
    def _joint(self, runs: Sequence[tuple[Tensor, KVCache]]) -> Tensor:
        x, there = self._run(runs)
        last = torch.tensor([len(tokens) for tokens, _ in runs]).cumsum(0) - 1
        return self._logits(x[last.to(x.device)], there)

    def _run(self, runs: Sequence[tuple[Tensor, KVCache]]) -> tuple[Tensor, bool]:
        """The hidden states [T, D] of some tokens of each sequence, and whether they are on the device.

        Other than for one sequence, host layers must be able to run by `LayerStep`.
        """
        windows, places, cosines, sines = self.arch.sliding_windows, [], [], []
        for tokens, cache in runs:
            cache.check_room(len(tokens))
            cos, sin = self.rotation.cos_sin(cache.length, len(tokens))
            places.append({window: Place((cos, sin), cache.length, window) for window in set(windows)})
            cosines.append(cos)
            sines.append(sin)
        for told in self.on_pass:
            told(runs)
        ids = torch.cat([tokens for tokens, _ in runs])
        x, there = self._embed(ids)
        compiled = runs[0][1].steppable and len(ids) <= self._most_tokens
        rotation = torch.stack((torch.cat(cosines), torch.cat(sines)))
        one = self._place_of_one() if len(ids) == 1 and any(self._on_device) else None
        if one is not None:
            one.rotation[0].copy_(self._link.send(rotation[0]))
            one.rotation[1].copy_(self._link.send(rotation[1]))
        else:
            cos, sin = self._link.send(rotation)
        spans: dict[int | None, Span] = {}
        for i, (layer, window, wanted) in enumerate(zip(self.layers, windows, self._on_device, strict=True)):
            if wanted is not there:
                x, there = (self._link.send if wanted else self._link.fetch)(x), wanted
            if isinstance(layer, DeviceLayer):
                own = [
                    SequenceRun(cast(SplitCache, cache.split[i]), cache.length, len(tokens)) for tokens, cache in runs
                ]
                if one is None:
                    layer.run(x, (cos, sin), own, self._link)
                else:
                    if x is not one.x:
                        x = one.x.copy_(x)
                    layer.one(one, own[0], self._link)
            elif compiled and len(ids) == 1:
                cast(DecoderLayer, layer).decode(x, runs[0][1].layers[i], places[0][window])
            elif compiled:
                parts = [(cache.layers[i], at[window]) for (_, cache), at in zip(runs, places, strict=True)]
                cast(DecoderLayer, layer).together(x, parts)
            else:
                cache = runs[0][1]
                if window not in spans:
                    spans[window] = span(cache.length, len(ids), window)
                x = layer(x, places[0][window], spans[window], cache)
        for tokens, cache in runs:
            cache.advance(len(tokens))
        return x, there

    @torch.inference_mode()
    def prepare(self) -> None:
        """Record what a single token needs, before anybody waits for it."""
        if any(self._on_device):
            self._place_of_one()

    def _place_of_one(self) -> OneToken:
        """Make the place of a single token on the device, and record the layers for it."""
        if self._one is None:
            arch, link = self.arch, self._link
            halves = [arch.hidden_size, arch.head_dim // 2, arch.head_dim // 2, arch.num_heads * arch.head_dim]
            x, cos, sin, attended = (link.send(torch.zeros(1, size)) for size in halves)
            self._one = OneToken(x, (cos, sin), attended)
            for layer in self.layers:
                if isinstance(layer, DeviceLayer):
                    layer.record(self._one, link)
        return self._one

    def _embed(self, ids: Tensor) -> tuple[Tensor, bool]:
        """Rows of the embedding, float32 [T, D], and whether they are on the device."""
        weight = self.embed_tokens.weight
        there = isinstance(weight, DeviceMatrix)
        x = weight.rows(self._link.send(ids)) if isinstance(weight, DeviceMatrix) else gather_rows(weight, ids)
        if len(ids) == 1 and self._watched is not None and self._watched[0].horizon:
            self._watched[1].on_router_prediction(self._link.fetch(x) if there else x, self._watched[0])
        return x, there

    def _logits(self, x: Tensor, there: bool) -> Tensor:
        """Float32 [T, V] on the host, for hidden states [T, D]."""
        if there is not self._head_there:
            x = (self._link.fetch if there else self._link.send)(x)
        if not self._head_there:
            return cast(Tensor, self.lm_head(self.norm(x)))
        pieces = [self._link.fetch(self.lm_head(self.norm(piece))) for piece in torch.split(x, HEAD_TOKENS)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
