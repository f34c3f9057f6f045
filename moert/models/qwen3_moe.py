"""Qwen3-MoE (model_type `qwen3_moe`): q/k norms per head, no shared expert, some layers may be dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moert.models.architecture import Architecture
from moert.models.config_fields import ConfigFields
from moert.models.qwen2_moe import sparse_layers


def canonical_name(name: str) -> str | None:
    """Canonical name of the checkpoint's tensor `name`, None if the tensor is not needed."""
    return None if name.endswith("rotary_emb.inv_freq") else name


def parse_config(config: Mapping[str, Any]) -> Architecture:
    """Read a config.json. Raises UnsupportedModelError for a variant that is not supported."""
    f = ConfigFields(config, "qwen3_moe")
    f.check_unquantised()
    hidden_size = f.integer("hidden_size", 2048)
    num_layers = f.integer("num_hidden_layers", 24)
    num_heads = f.integer("num_attention_heads", 32)
    max_positions = f.integer("max_position_embeddings", 32768)
    # Unlike Qwen2-MoE, a window that is in use holds for every layer.
    window = f.optional_integer("sliding_window", 4096) if f.boolean("use_sliding_window", False) else None
    windows = (window,) * num_layers
    f.check_layer_types(windows)
    bias = f.boolean("attention_bias", False)
    return Architecture(
        model_type="qwen3_moe",
        vocab_size=f.integer("vocab_size", 151936),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=f.integer("num_key_value_heads", 4),
        head_dim=f.head_dim(num_heads, hidden_size),
        rms_norm_eps=f.number("rms_norm_eps", 1e-6),
        rope=f.rope(10_000.0, max_positions),
        max_position_embeddings=max_positions,
        tie_word_embeddings=f.boolean("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        clip_qkv=None,
        sliding_windows=windows,
        is_moe_layer=sparse_layers(f, num_layers),
        num_experts=f.num_experts("num_experts", "num_local_experts", 128),
        top_k=f.integer("num_experts_per_tok", 8),
        norm_topk_prob=f.boolean("norm_topk_prob", False),
        expert_inner=f.integer("moe_intermediate_size", 768),
        dense_inner=f.integer("intermediate_size", 6144),
        shared_inner=0,
        hidden_act=f.activation(),
    )
