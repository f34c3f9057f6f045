"""Qwen2-MoE (model_type `qwen2_moe`): a gated shared expert, biases on q, k and v, some layers may be dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moert.models.architecture import Architecture
from moert.models.config_fields import ConfigFields


def canonical_name(name: str) -> str | None:
    """Canonical name of the checkpoint's tensor `name`, None if the tensor is not needed."""
    return None if name.endswith("rotary_emb.inv_freq") else name


def sparse_layers(f: ConfigFields, num_layers: int) -> tuple[bool, ...]:
    """Tell which layers have experts: every `decoder_sparse_step`-th, except those of `mlp_only_layers`."""
    step, dense = f.integer("decoder_sparse_step", 1), f.optional_list("mlp_only_layers", int) or []
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))


def _sliding_windows(f: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer: `layer_types`, by default every other layer below `max_window_layers`."""
    use_window = f.boolean("use_sliding_window", False)
    size = f.optional_integer("sliding_window", 4096, minimum=0)
    last = f.integer("max_window_layers", 28, minimum=0)
    types = f.optional_list("layer_types", str)
    if types is None:
        slides = [use_window and layer < last and layer % 2 == 0 for layer in range(num_layers)]
    else:
        if len(types) != num_layers or set(types) - {"full_attention", "sliding_attention"}:
            raise f.refusal("layer_types is not one of full_attention and sliding_attention for each layer")
        slides = [kind == "sliding_attention" for kind in types]
    if any(slides) and not (use_window and size):
        raise f.refusal("some layer_types are sliding_attention, but use_sliding_window or sliding_window is not set")
    return tuple(size if slide else None for slide in slides)


def parse_config(config: Mapping[str, Any]) -> Architecture:
    """Read a config.json. Raises UnsupportedModelError for a variant that is not supported."""
    f = ConfigFields(config, "qwen2_moe")
    f.check_unquantised()
    hidden_size = f.integer("hidden_size", 2048)
    num_layers = f.integer("num_hidden_layers", 24)
    num_heads = f.integer("num_attention_heads", 16)
    max_positions = f.integer("max_position_embeddings", 32768)
    return Architecture(
        model_type="qwen2_moe",
        vocab_size=f.integer("vocab_size", 151936),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=f.integer("num_key_value_heads", 16),
        head_dim=f.head_dim(num_heads, hidden_size),
        rms_norm_eps=f.number("rms_norm_eps", 1e-6),
        rope=f.rope(10_000.0, max_positions),
        max_position_embeddings=max_positions,
        tie_word_embeddings=f.boolean("tie_word_embeddings", False),
        qkv_bias=f.boolean("qkv_bias", True),
        o_bias=False,
        qk_norm="none",
        clip_qkv=None,
        sliding_windows=_sliding_windows(f, num_layers),
        is_moe_layer=sparse_layers(f, num_layers),
        num_experts=f.integer("num_experts", 60),
        top_k=f.integer("num_experts_per_tok", 4),
        norm_topk_prob=f.boolean("norm_topk_prob", False),
        expert_inner=f.integer("moe_intermediate_size", 1408),
        dense_inner=f.integer("intermediate_size", 5632),
        shared_inner=f.integer("shared_expert_intermediate_size", 5632),
        hidden_act=f.activation(),
    )
