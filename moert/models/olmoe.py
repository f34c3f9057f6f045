"""OLMoE (model_type `olmoe`): q/k norms over the whole projection, optional clipping of q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moert.models.architecture import Architecture
from moert.models.config_fields import ConfigFields


def canonical_name(name: str) -> str | None:
    """Canonical name of the checkpoint's tensor `name`, None if the tensor is not needed."""
    return None if name.endswith("rotary_emb.inv_freq") else name


def parse_config(config: Mapping[str, Any]) -> Architecture:
    """Read a config.json. Raises UnsupportedModelError for a variant that is not supported."""
    f = ConfigFields(config, "olmoe")
    f.check_unquantised()
    hidden_size = f.integer("hidden_size", 2048)
    num_layers = f.integer("num_hidden_layers", 16)
    num_heads = f.integer("num_attention_heads", 16)
    max_positions = f.integer("max_position_embeddings", 4096)
    head_dim = f.head_dim(num_heads, hidden_size)
    if head_dim * num_heads != hidden_size:
        raise f.refusal(f"head_dim ({head_dim}) is not hidden_size / num_attention_heads")
    if "sliding_window" in f:
        raise f.refusal("it asks for a sliding window, which this family does not have")
    windows = (None,) * num_layers
    f.check_layer_types(windows)
    bias = f.boolean("attention_bias", False)
    inner = f.integer("intermediate_size", 2048)
    return Architecture(
        model_type="olmoe",
        vocab_size=f.integer("vocab_size", 50304),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=f.optional_integer("num_key_value_heads", None) or num_heads,
        head_dim=head_dim,
        rms_norm_eps=f.number("rms_norm_eps", 1e-5),
        rope=f.rope(10_000.0, max_positions),
        max_position_embeddings=max_positions,
        tie_word_embeddings=f.boolean("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="full",
        clip_qkv=f.optional_number("clip_qkv"),
        sliding_windows=windows,
        is_moe_layer=(True,) * num_layers,
        num_experts=f.num_experts("num_experts", "num_local_experts", 64),
        top_k=f.integer("num_experts_per_tok", 8),
        norm_topk_prob=f.boolean("norm_topk_prob", False),
        expert_inner=inner,
        dense_inner=inner,
        shared_inner=0,
        hidden_act=f.activation(),
    )
