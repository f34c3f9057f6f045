"""The decoder: embedding, layers, head. One sequence in chunks of any length, or several together, over KV caches."""

# T tokens, V vocabulary, D hidden, R sequences

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from moert.kernels.layer_step import LayerCache, LayerStep, Place, Projection, Router
from moert.models.architecture import Architecture
from moert.models.attention import Attention, Span, span
from moert.models.kv_cache import KVCache
from moert.models.layers import DenseTensors, GatedMLP, Linear, RMSNorm, check_tensors
from moert.models.moe import Experts, MoEBlock
from moert.models.rope import Rotation
from moert.models.router_prediction import Gate, GateAhead, PredictionListener
from moert.quant.matmul import gather_rows


class DecoderLayer(nn.Module):
    """Attention, then experts or a dense MLP, each behind a norm and beside a residual: [T, D] -> [T, D]."""

    def __init__(self, arch: Architecture, dense: DenseTensors, layer: int, experts: Experts) -> None:
        super().__init__()
        name = f"model.layers.{layer}"
        self.input_layernorm = RMSNorm(dense, f"{name}.input_layernorm", arch.rms_norm_eps)
        self.self_attn = Attention(arch, dense, layer)
        self.post_attention_layernorm = RMSNorm(dense, f"{name}.post_attention_layernorm", arch.rms_norm_eps)
        # Methods are kept, because a module looks its parts up slowly and decoding would wait for it.
        self.routing_bias: Callable[[int], Tensor | None] = lambda tokens: None
        if arch.is_moe_layer[layer]:
            self.mlp: nn.Module = (block := MoEBlock(arch, dense, layer, experts))
            self._forward_token, self.routing_bias = block.forward_token, block.routing_bias
        else:
            self.mlp, self._forward_token = GatedMLP(dense, f"{name}.mlp", arch.hidden_act), self._add_mlp
        self.step = self._step(arch)
        self.watcher: PredictionListener | None = None
        self.foresight: GateAhead | None = None

    def _step(self, arch: Architecture) -> LayerStep:
        attn, norms = self.self_attn, (self.input_layernorm.weight, self.post_attention_layernorm.weight)
        q, k, v, o = (Projection(p.weight, p.bias) for p in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj))
        qk_norm = None if arch.qk_norm == "none" else (arch.qk_norm, attn.q_norm.weight, attn.k_norm.weight)
        router = None
        if isinstance(self.mlp, MoEBlock):
            router = Router(self.mlp.gate.weight, arch.top_k, arch.norm_topk_prob)
        return LayerStep(norms, arch.rms_norm_eps, arch.head_dim, (q, k, v, o), qk_norm, arch.clip_qkv, router)

    def decode(self, x: Tensor, cache: LayerCache, place: Place) -> None:
        """Run the layer on one token x [1, D], in place, where `step` can do it."""
        normed, experts, weights = self.step(x, cache, place, self.routing_bias(1))
        if self.watcher is not None and self.watcher.horizon and self.foresight is not None:
            self.foresight.on_router_prediction(x, self.watcher)
        self._forward_token(normed, experts, weights, x)

    def _add_mlp(self, x: Tensor, experts: Sequence[int], weights: Sequence[float], out: Tensor) -> None:
        out += self.mlp(x)

    def forward(self, x: Tensor, place: Place, seen: Span | None, cache: KVCache) -> Tensor:
        """Tokens x [T, D] at their place; where `seen` is None, `step` does what it can, and x is overwritten."""
        if seen is None:
            self.together(x, [(cache.layers[self.self_attn.layer], place)])
            return x
        x = x + self.self_attn(self.input_layernorm(x), *place.rotation, seen, cache)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result

    def together(self, x: Tensor, runs: Sequence[tuple[LayerCache, Place]]) -> None:
        """Tokens x [T, D] of several sequences in place, as `LayerStep.many` takes them."""
        normed, indices, weights = self.step.many(x, runs, self.routing_bias(len(x)))
        x += self.mlp(normed, (indices, weights)) if self.step.router else self.mlp(normed)


class Decoder(nn.Module):
    """The model without its routed experts, which `experts` computes.

    `dense` holds exactly the tensors of `arch.dense_tensors()`; CheckpointError names one that is missing, unknown or
    of another shape.
    """

    def __init__(self, arch: Architecture, dense: DenseTensors, experts: Experts) -> None:
        super().__init__()
        check_tensors(arch, dense)
        self.arch = arch
        self.rotation = Rotation(arch.rope, arch.head_dim)
        self._make(arch, dense, experts)
        self._layers = [cast(DecoderLayer, layer) for layer in self.layers]
        steppers = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
        self._steps = [layer.decode for layer in steppers]
        self._most_tokens = min((layer.step.most_tokens for layer in steppers), default=math.inf)
        # Called before a pass with each sequence in it: its tokens int64 [T] and the cache that they come behind.
        self.on_pass: list[Callable[[Sequence[tuple[Tensor, KVCache]]], object]] = []
        self._watched: tuple[PredictionListener, GateAhead] | None = None

    def _make(self, arch: Architecture, dense: DenseTensors, experts: Experts) -> None:
        self.embed_tokens = Linear(dense, "model.embed_tokens")  # its rows are gathered; as a product it is a tied head
        self.layers = nn.ModuleList(DecoderLayer(arch, dense, layer, experts) for layer in range(arch.num_layers))
        self.norm = RMSNorm(dense, "model.norm", arch.rms_norm_eps)
        self.lm_head = self.embed_tokens if arch.tie_word_embeddings else Linear(dense, "lm_head")

    def wrap_experts(self, wrapper: Callable[[Experts], Experts]) -> None:
        """Put what `wrapper` makes of the experts in their place."""
        for layer in self.layers:
            if isinstance(layer.mlp, MoEBlock):
                layer.mlp.experts = wrapper(layer.mlp.experts)

    def watch(self, watcher: PredictionListener | None) -> None:
        """Tell `watcher` from now on what the next layers will probably ask for, whenever a single token is computed.

        Only where the compiled module does a layer's step: without it decoding is slow in any case.
        """
        arch, gates = self.arch, list[Gate]()
        for index, layer in reversed(list(enumerate(self._layers))):
            layer.watcher = watcher
            layer.foresight = GateAhead(index, gates, arch.rms_norm_eps, arch.top_k, arch.num_experts)
            if isinstance(layer.mlp, MoEBlock):
                gates = [Gate(index, layer.post_attention_layernorm, layer.mlp), *gates]
        first = GateAhead(-1, gates, arch.rms_norm_eps, arch.top_k, arch.num_experts)
        self._watched = None if watcher is None else (watcher, first)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, cache: KVCache, all_logits: bool = False) -> Tensor:
        """Run tokens int64 [T] behind those in `cache`, which then holds them too.

        Returns float32 logits: [V] for the last token, or [T, V]. UsageError if the tokens do not fit the cache;
        ValueError if there are none.
        """
        past, count = cache.length, tokens.shape[0]
        if count == 0:
            raise ValueError("a forward pass needs at least one token")
        cache.check_room(count)
        rotation, windows = self.rotation.cos_sin(past, count), self.arch.sliding_windows
        places = {window: Place(rotation, past, window) for window in set(windows)}
        compiled = cache.steppable and count <= self._most_tokens
        for told in self.on_pass:
            told([(tokens, cache)])
        x = gather_rows(self.embed_tokens.weight, tokens)
        if compiled and count == 1:
            if self._watched is not None and self._watched[0].horizon:
                self._watched[1].on_router_prediction(x, self._watched[0])
            for step, kept, window in zip(self._steps, cache.layers, windows, strict=True):
                step(x, kept, places[window])
        else:
            spans = {window: None if compiled else span(past, count, window) for window in places}
            for layer, window in zip(self.layers, windows, strict=True):
                x = layer(x, places[window], spans[window], cache)
        cache.advance(count)
        logits: Tensor = self.lm_head(self.norm(x if all_logits else x[-1:]))
        return logits if all_logits else logits[0]

    def together(self, runs: Sequence[tuple[Tensor, KVCache]], most_tokens: float = math.inf) -> Tensor:
        """`forward` of several sequences, to the byte: tokens int64 [T] each behind those in a cache of its own.

        Returns float32 logits [R, V], of the last token of each.
        Weights are read once for all tokens where these are at most `most_tokens` and the compiled module can do it;
        else for groups of sequences, or for each alone. An error leaves the tokens of whole groups in the caches.
        """
        logits: list[Tensor] = []
        group: list[tuple[Tensor, KVCache]] = []
        most, size = min(most_tokens, self._most_tokens if runs[0][1].steppable else 0), 0
        for run in [*runs, None]:
            count = len(run[0]) if run else 0
            if group and (run is None or size + count > most):
                logits.append(self._joint(group) if len(group) > 1 else self(*group[0])[None])
                group, size = [], 0
            if run:
                group.append(run)
                size += count
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    @torch.inference_mode()
    def _joint(self, runs: Sequence[tuple[Tensor, KVCache]]) -> Tensor:
        windows, places = self.arch.sliding_windows, []
        for tokens, cache in runs:
            cache.check_room(len(tokens))
            rotation = self.rotation.cos_sin(cache.length, len(tokens))
            places.append({window: Place(rotation, cache.length, window) for window in set(windows)})
        for told in self.on_pass:
            told(runs)
        x = gather_rows(self.embed_tokens.weight, torch.cat([tokens for tokens, _ in runs]))
        for i, (layer, window) in enumerate(zip(self._layers, windows, strict=True)):
            parts = [(cache.layers[i], at[window]) for (_, cache), at in zip(runs, places, strict=True)]
            layer.together(x, parts)
        for tokens, cache in runs:
            cache.advance(len(tokens))
        last = torch.tensor([len(tokens) for tokens, _ in runs]).cumsum(0) - 1
        result: Tensor = self.lm_head(self.norm(x[last]))
        return result
