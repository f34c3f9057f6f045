"""Models of families that moert cannot run, seen as it would store them: sizes from config.json and tensor headers.

Names and shapes decide wherever they can: routed experts are what `experts` in a tensor's name says, and what lies in a
layer beside them (attention, shared experts, whole layers without experts) is dense. Of config.json are taken the sizes
that shapes do not show. Rules: matrices are packed as ours are, but not routers; a bias of an expert lies in its first
slice; keys and values compressed together (MLA) are cached compressed; layers with a window still cache all positions.
"""

# L layers, E experts, D hidden, F expert inner size

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from moert.checkpoints.safetensors import TensorInfo
from moert.errors import CheckpointError, UnsupportedModelError
from moert.models.config_fields import ConfigFields
from moert.quant.format import SLICE_ALIGN, ExpertLayout, align
from moert.store.layout import EMBEDDING, HEAD, SAFETENSORS_DTYPES, TensorSpec

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.*)")
_EXPERT = re.compile(r"(?:^|\.)experts\.")
_ROUTER = re.compile(r"(?:^|\.)(?:gate|router(?:\.\w+)?|wg)\.weight$")
_MLP = re.compile(r"(?:^|\.)(?:mlp|feed_forward|ffn|block_sparse_moe)\.")
_OTHER_PARTS = re.compile(r"(?:^|\.)(?:visual|vision\w*|audio\w*|multi_modal\w*|mm_\w+)\.")
_SCALE = re.compile(r"_scales$|scale_inv$|\.(?:weight|input)_scale$|rotary_emb\.inv_freq$")
_ENDS = {
    EMBEDDING: ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight"),
    HEAD: ("lm_head.weight", "embed_out.weight"),
}
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k")
_READABLE = (None, "mxfp4", "fp8")  # quantised as these, names and shapes are still those of the weights


class UnsupportedModel:
    """The sizes of a model, under the names that `Architecture` has them.

    Raises UnsupportedModelError for one without experts or whose configuration lacks a size, CheckpointError for
    experts that are not three matrices of the same sizes.
    """

    def __init__(self, name: str, config: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> None:
        inner = config.get("text_config")
        text = inner if isinstance(inner, dict) and not any(key in config for key in _NUM_EXPERTS) else config
        self.name, self.model_type = name, str(config.get("model_type"))
        fields = self._fields = ConfigFields(text, self.model_type)
        method = (config.get("quantization_config") or {}).get("quant_method")
        if method not in _READABLE:
            raise CheckpointError(f"{name} is quantised ({method!s:.40}): name the checkpoint that it was made from.")
        self.num_layers = fields.integer("num_hidden_layers")
        self.hidden_size = fields.integer("hidden_size")
        self._dense: dict[str, TensorInfo] = {}
        experts: dict[int, list[TensorInfo]] = {}
        for info in tensors:
            self._sort(info, experts)
        if not experts:
            raise UnsupportedModelError(
                f"{name} ({self.model_type:.80}) has no routed experts in its layers: moert is for mixtures of experts."
            )
        self.moe_layers = tuple(sorted(experts))
        self.num_experts = fields.integer(self._present(_NUM_EXPERTS))
        self.top_k = fields.integer(self._present(_TOP_K))
        sizes = {self._expert_size(parts) for parts in experts.values()}
        weights, self.bias_elements = sizes.pop()
        self.expert_inner = weights // (3 * self.hidden_size)
        if sizes or not weights or weights % (3 * self.hidden_size) or self.top_k > self.num_experts:
            raise CheckpointError(
                f"The sizes of {name} are not understood: its experts are not {self.num_experts} times three matrices"
                f" of {self.hidden_size} columns in every layer."
            )
        self.num_heads = fields.integer("num_attention_heads")
        self.num_kv_heads = fields.optional_integer("num_key_value_heads", None) or self.num_heads
        self.vocab_size = fields.integer("vocab_size")
        self.max_position_embeddings = fields.integer("max_position_embeddings")
        self.tie_word_embeddings = HEAD not in self._dense
        self._attention()

    def _attention(self) -> None:
        fields, caching = self._fields, self.num_layers
        if kinds := fields.optional_list("layer_types", str):
            caching = sum("attention" in kind and "linear" not in kind for kind in kinds)
        if "kv_lora_rank" in fields:
            rope = fields.integer("qk_rope_head_dim")
            self.head_dim = fields.integer("qk_nope_head_dim") + rope
            self.kv_vectors, self.kv_vector_size = caching, fields.integer("kv_lora_rank") + rope
            return
        self.head_dim = fields.head_dim(self.num_heads, self.hidden_size)
        self.kv_vectors, self.kv_vector_size = 2 * caching * self.num_kv_heads, self.head_dim

    def _present(self, names: Iterable[str]) -> str:
        names = tuple(names)
        return next((name for name in names if name in self._fields), names[0])

    def _sort(self, info: TensorInfo, experts: dict[int, list[TensorInfo]]) -> None:
        if _SCALE.search(info.name) or _OTHER_PARTS.search(info.name):
            return
        if found := _LAYER.search(info.name):
            layer, rest = int(found[1]), found[2]
            if layer >= self.num_layers:  # those that predict further tokens are not needed
                return
            if _EXPERT.search(rest):
                experts.setdefault(layer, []).append(info)
            else:
                self._dense[f"model.layers.{layer}.{rest}"] = info
            return
        canonical = (canonical for canonical, ends in _ENDS.items() if info.name.endswith(ends))
        self._dense[next(canonical, info.name)] = info

    def _expert_size(self, parts: Iterable[TensorInfo]) -> tuple[int, int]:
        """Elements of the matrices of one expert, and of its biases; (0, 0) where they do not divide evenly."""
        totals = [0, 0]
        for info in parts:
            totals[info.name.endswith("bias")] += elements(info)
        if any(total % self.num_experts for total in totals):
            return 0, 0
        return totals[0] // self.num_experts, totals[1] // self.num_experts

    @cached_property
    def widest_inner(self) -> int:
        """The largest inner size of any expert or MLP."""
        shapes = (info.shape for name, info in self._dense.items() if _MLP.search(name) and not _ROUTER.search(name))
        inner = (sum(shape) - self.hidden_size for shape in shapes if len(shape) == 2 and self.hidden_size in shape)
        return max([self.expert_inner, *inner])

    def dense_tensors(self) -> dict[str, TensorSpec]:
        """Name -> spec of every tensor that is not a routed expert's."""
        ours = (EMBEDDING, HEAD)
        return {
            name: TensorSpec(info.shape, len(info.shape) == 2 and (name in ours or not _ROUTER.search(name)))
            for name, info in self._dense.items()
            if not (name == HEAD and self.tie_word_embeddings)
        }

    def dense_dtype(self, name: str) -> str:
        return SAFETENSORS_DTYPES.get(self._dense[name].dtype, "bfloat16")

    def slice_sizes(self, layout: ExpertLayout) -> tuple[int, ...]:
        """Bytes of each slice of an expert."""
        first = align(layout.offsets(0)[-1] + 2 * self.bias_elements, SLICE_ALIGN)
        return (first, *layout.slice_sizes[1:])


def elements(info: TensorInfo) -> int:
    """Weights in a tensor: blocks of MXFP4 hold two in a byte."""
    return math.prod(info.shape) * (2 if info.name.endswith("_blocks") and info.dtype == "U8" else 1)
