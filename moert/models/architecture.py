"""Description of a model, independent of its family's spelling: sizes, variants, and the canonical names of its dense
tensors.

Canonical names are those of Qwen2-MoE and Qwen3-MoE checkpoints with one tensor per expert matrix. Knows nothing of
configuration files, checkpoints or torch.
"""

# L layers, V vocabulary, D hidden, H query heads, J key/value heads, d head size, E experts, F expert inner size

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from moert.errors import UnsupportedModelError
from moert.store.layout import TensorSpec

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3"]
QKNorm = Literal["none", "head", "full"]
# Those of moert.quant.matmul, which computes the experts (a test compares them): importing it here would load torch.
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


def kv_bytes(vectors: int, size: int, bits: int) -> int:
    """Bytes of so many vectors of `size` numbers in a KV cache; at 8 bits each has a float32 scale beside it."""
    return vectors * (size * bits // 8 + (4 if bits == 8 else 0))


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. Fields that the type does not use keep their defaults.

    `attention_factor` multiplies cos and sin; `original_max_positions` is the context that the model was trained with
    before scaling (yarn, llama3) or beyond which scaling begins (dynamic).
    """

    type: RopeType
    theta: float
    factor: float = 1.0
    attention_factor: float = 1.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True)
class Architecture:
    """A decoder-only model with mixture-of-experts layers.

    Raises UnsupportedModelError, naming the fields of config.json, when the sizes do not fit each other.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: QKNorm
    clip_qkv: float | None
    sliding_windows: tuple[int | None, ...]  # per layer: how many positions a query sees, itself included
    is_moe_layer: tuple[bool, ...]
    num_experts: int
    top_k: int
    norm_topk_prob: bool
    expert_inner: int
    dense_inner: int  # inner size of the layers without experts
    shared_inner: int  # inner size of the shared expert, 0 if there is none
    hidden_act: str

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        problems = {
            f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})": heads % kv_heads,
            f"head_dim ({self.head_dim}) is not an even number from 4": self.head_dim % 2 or self.head_dim < 4,
            f"num_experts_per_tok ({self.top_k}) exceeds the number of experts ({self.num_experts})": (
                self.top_k > self.num_experts
            ),
            f"hidden_act {self.hidden_act!r:.80} is not one of {', '.join(ACTIVATIONS)}": self.hidden_act
            not in ACTIVATIONS,
            "no layer has experts": not any(self.is_moe_layer),
        }
        for problem, found in problems.items():
            if found:
                raise UnsupportedModelError(f"This {self.model_type} variant is not supported: {problem}.")

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        return tuple(layer for layer, is_moe in enumerate(self.is_moe_layer) if is_moe)

    @property
    def widest_inner(self) -> int:
        """The largest inner size of any expert or MLP."""
        return max(self.expert_inner, 0 if all(self.is_moe_layer) else self.dense_inner, self.shared_inner)

    @property
    def kv_vectors(self) -> int:
        """Return the number of vectors of `kv_vector_size` numbers that a position takes in the KV cache, over all
        layers.
        """
        return 2 * self.num_layers * self.num_kv_heads

    @property
    def kv_vector_size(self) -> int:
        return self.head_dim

    def dense_tensors(self) -> dict[str, TensorSpec]:
        """Canonical name -> spec of every tensor that is not an expert's; no lm_head where embeddings are tied."""
        D = self.hidden_size
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        result: dict[str, TensorSpec] = {}

        def add(name: str, *shape: int, quantise: bool = False) -> None:
            result[name] = TensorSpec(shape, quantise)

        def add_mlp(prefix: str, inner: int) -> None:
            add(f"{prefix}.gate_proj.weight", inner, D, quantise=True)
            add(f"{prefix}.up_proj.weight", inner, D, quantise=True)
            add(f"{prefix}.down_proj.weight", D, inner, quantise=True)

        add("model.embed_tokens.weight", self.vocab_size, D, quantise=True)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            add(f"{prefix}.input_layernorm.weight", D)
            for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
                add(f"{prefix}.self_attn.{name}_proj.weight", size, D, quantise=True)
                if self.qkv_bias:
                    add(f"{prefix}.self_attn.{name}_proj.bias", size)
            add(f"{prefix}.self_attn.o_proj.weight", D, q_size, quantise=True)
            if self.o_bias:
                add(f"{prefix}.self_attn.o_proj.bias", D)
            if self.qk_norm != "none":
                add(f"{prefix}.self_attn.q_norm.weight", self.head_dim if self.qk_norm == "head" else q_size)
                add(f"{prefix}.self_attn.k_norm.weight", self.head_dim if self.qk_norm == "head" else kv_size)
            add(f"{prefix}.post_attention_layernorm.weight", D)
            if not self.is_moe_layer[layer]:
                add_mlp(f"{prefix}.mlp", self.dense_inner)
                continue
            add(f"{prefix}.mlp.gate.weight", self.num_experts, D)
            if self.shared_inner:
                add_mlp(f"{prefix}.mlp.shared_expert", self.shared_inner)
                add(f"{prefix}.mlp.shared_expert_gate.weight", 1, D)
        add("model.norm.weight", D)
        if not self.tie_word_embeddings:
            add("lm_head.weight", self.vocab_size, D, quantise=True)
        return result
