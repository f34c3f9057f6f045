"""Placement on a device: the bytes against what is allocated, the choice against plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moert.device.backend import EmulatedDevice
from moert.device.decoder import PlacedDecoder
from moert.device.dense_quant import load_dense
from moert.device.kv_memory import SplitKVMemory
from moert.device.matrix import DenseQuant
from moert.device.placement import DenseArena, Placement, make_dense, place, workspace_bytes
from moert.models.architecture import Architecture, kv_bytes
from moert.models.kv_cache import KVCache
from moert.models.moe import Experts
from moert.models.registry import architecture
from moert.models.stored_model import StoredModel
from moert.scheduler.profile import Profile, read_profile

from .checkpoints import make_config
from .test_project import loaded_after

CPU = torch.device("cpu")
PLENTY = 1 << 34
QUANTS: list[DenseQuant] = ["16", "int8", "nf4"]


def small(**over: Any) -> Architecture:
    return architecture(make_config("qwen2_moe", **over))


def laptop() -> Profile:
    return read_profile(Path(__file__).parents[1] / "device_profiles" / "laptop-rtx-4060-8gb.json")


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("tie", [False, True])
def test_bytes_are_those_that_are_allocated(quant: DenseQuant, tie: bool, store: Callable[..., Path]) -> None:
    """A device with not a byte more is enough, and full."""
    if quant != "16":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: it is in moert[cuda]")
    opened = StoredModel.open(store("qwen2_moe", tie=tie))
    arch = opened.architecture
    whole = place(arch, quant, PLENTY, 96, torch.int8, CPU)
    assert all(whole.layers)
    assert (whole.head, whole.embed, whole.kv_positions) == (True, tie, 96)
    assert whole.kv_bytes == KVCache.bytes_for(arch, 96, torch.int8)
    without_head = place(arch, quant, whole.device_bytes - whole.kv_bytes - 1, 96, torch.int8, CPU)
    for placement in (whole, without_head):
        capacity = placement.dense_bytes + placement.kv_bytes
        device = EmulatedDevice(capacity)
        dense = load_dense(opened, placement, device, quant)
        memory = SplitKVMemory(arch, 96, torch.int8, placement.layers, placement.kv_positions, device)
        assert device.available_bytes() == 0
        decoder = PlacedDecoder(arch, dense, NoExperts(), placement.layers, placement.head, device)
        decoder(torch.tensor([3, 4, 5]), KVCache(arch, 96, torch.int8, memory))
    assert not without_head.head


@pytest.mark.parametrize("quant", QUANTS)
def test_sizes_of_a_large_model(quant: DenseQuant) -> None:
    """Against the weights counted by hand: NF4 has 4.5 bits each, INT8 a float32 for each row."""
    D, H, J, d, E, V, L = 2048, 32, 4, 128, 128, 151936, 48
    config = {"hidden_size": D, "num_attention_heads": H, "num_key_value_heads": J, "head_dim": d, "num_experts": E}
    arch = architecture({"model_type": "qwen3_moe", "num_hidden_layers": L, "vocab_size": V, **config})
    outputs = [H * d, J * d, J * d, D]
    weights, rows = D * (H * d + 2 * J * d) + D * H * d, sum(outputs)
    per_layer = {"16": 2 * weights, "int8": weights + 4 * rows, "nf4": weights // 2 + weights // 64 * 4}[quant]
    per_layer += 4 * (2 * D + 2 * d + E * D)  # norms, and the router, in float32
    head = (2 * V * D if quant == "16" else V * D + 4 * V) + 4 * D
    placement = place(arch, quant, PLENTY, 4096, torch.float16, CPU)
    assert placement.dense_bytes == L * per_layer + head
    assert placement.kv_bytes == 4096 * L * 2 * J * d * 2
    fitting = place(arch, quant, placement.workspace_bytes + 10 * per_layer, 4096, torch.float16, CPU)
    assert sum(fitting.layers) == 10
    fitting = place(arch, quant, placement.workspace_bytes + 10 * per_layer - 1, 4096, torch.float16, CPU)
    assert sum(fitting.layers) == 9


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 400_000),
    st.sampled_from(QUANTS),
    st.sampled_from([(), (1,), (0, 2)]),
    st.booleans(),
    st.sampled_from([None, 0.0, 1e-9, 1.0]),
)
def test_layers_fill_the_room_in_their_order(
    free: int, quant: DenseQuant, dense_layers: tuple[int, ...], tie: bool, gain: float | None
) -> None:
    arch = small(num_hidden_layers=4, mlp_only_layers=list(dense_layers), tie_word_embeddings=tie)
    room = workspace_bytes(arch, quant, 64) + free
    profile = None if gain is None else laptop()
    placement = place(arch, quant, room, 64, torch.float16, CPU, profile=profile, byte_gain_s=gain)

    def size(*names: str) -> int:
        arena = DenseArena()
        make_dense(arch, [n for n in arch.dense_tensors() if n.startswith(names)], quant, torch.bfloat16, arena)
        return arena.used

    per_layer = placement.kv_positions * kv_bytes(2 * arch.num_kv_heads, arch.head_dim, 16)
    sizes = [size(f"model.layers.{layer}.") + per_layer for layer in range(4)]
    sizes.append(size("model.norm", "model.embed_tokens" if tie else "lm_head"))
    fitting = 0
    while fitting < 5 and sum(sizes[: fitting + 1]) <= free:
        fitting += 1
    if placement.any:
        assert placement.layers == tuple(layer < fitting for layer in range(4))
        assert placement.head == (fitting == 5)
        assert placement.dense_bytes + placement.kv_bytes == sum(sizes[:fitting])
        assert placement.device_bytes <= room
    else:
        assert placement == Placement((False,) * 4, False, False, 0, 0, 0, 0)
        assert free < size("model.layers.0.") or profile is not None or dense_layers


def test_experts_that_gain_more_take_the_caches_place() -> None:
    arch = small(num_hidden_layers=4, max_position_embeddings=4096)
    room, found = workspace_bytes(arch, "16", 4096) + 2_000_000, []
    for gain in (0.0, 1.0):
        placement = place(arch, "16", room, 4096, torch.float16, CPU, profile=laptop(), byte_gain_s=gain)
        assert all(placement.layers)
        found.append(placement.kv_positions)
    assert found[0] > found[1] == 0


def test_accelerate_is_loaded_when_something_is_placed() -> None:
    assert loaded_after("import moert.device.placement, moert.device.dense_quant", "accelerate", "bitsandbytes") == []


def test_what_it_says() -> None:
    arch = small(num_hidden_layers=4)
    placement = place(arch, "16", PLENTY, 64, torch.float16, CPU)
    line = placement.line(64)
    assert line.startswith("4 of 4 layers and the head (")
    assert ", all of 64 positions of their KV cache (" in line
    assert ", the first 32 of 64 positions" in replace(placement, kv_positions=32).line(64)
    nothing = place(arch, "16", 0, 64, torch.float16, CPU)
    assert (nothing.any, nothing.device_bytes) == (False, 0)


class NoExperts(Experts):
    def __call__(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return x

    def forward_token(self, layer: int, x: Tensor, experts: Any, weights: Any, out: Tensor) -> None:
        out += x


def test_the_workspace_is_enough() -> None:
    """For a whole chunk of a prompt behind another, whose scores are the most that there is; and not far too much."""
    kv_dtype = torch.int8
    sizes = {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 32}
    arch = small(num_hidden_layers=1, vocab_size=20_000, num_experts=64, max_position_embeddings=4096, **sizes)
    placement, device = place(arch, "16", PLENTY, 2048, kv_dtype, CPU, dtype=torch.float32), EmulatedDevice()
    dense = make_dense(
        arch, arch.dense_tensors(), "16", torch.float32, DenseArena(torch.zeros(1 << 26, dtype=torch.uint8))
    )
    embedding = {"model.embed_tokens.weight": torch.zeros(arch.vocab_size, 256)}
    decoder = PlacedDecoder(arch, {**dense, **embedding}, NoExperts(), placement.layers, True, device)
    cache = KVCache(arch, 2048, kv_dtype, SplitKVMemory(arch, 2048, kv_dtype, placement.layers, 2048, device))
    for _ in range(2):
        decoder(torch.zeros(512, dtype=torch.int64), cache)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        decoder(torch.zeros(512, dtype=torch.int64), cache)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    assert placement.workspace_bytes / 4 < max(live) <= placement.workspace_bytes
