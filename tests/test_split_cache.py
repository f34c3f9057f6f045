"""Attention over keys and values that are partly on a device: against float64, for every split; how it is chosen."""

# H query heads, J key/value heads, d head size, T tokens

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moert.device.backend import EmulatedDevice
from moert.device.kv_memory import SplitKVMemory
from moert.device.split_cache import CacheSegment, SplitCache, merge
from moert.models.decoder import Decoder
from moert.models.kv_cache import KVCache
from moert.models.registry import architecture
from moert.scheduler.kv_split import AttentionCosts, choose, fill, lengths, slot_gain
from moert.scheduler.profile import read_profile

from .placed import cache_of, placed
from .test_models import PROMPT, load, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.int8: 2e-2}


def part(start: int, size: int, J: int, d: int, dtype: torch.dtype) -> CacheSegment:
    numbers = [torch.full((J, size, d), 99).to(dtype) for _ in range(2)]
    return CacheSegment(start, *numbers, torch.full((2, J, size), 99.0) if dtype == torch.int8 else None)


def attention(q: Tensor, keys: Tensor, values: Tensor, past: int, window: int | None) -> Tensor:
    """Attend with q [H, T, d] at positions past .. over keys and values [J, S, d], in float64: [T, H * d]."""
    (H, T, d), J = q.shape, len(keys)
    result = torch.empty(T, H, d, dtype=torch.float64)
    for t in range(T):
        first = 0 if window is None else max(0, past + t - window + 1)
        for h in range(H):
            k, v = (x[h * J // H, first : past + t + 1].double() for x in (keys, values))
            result[t, h] = (k @ q[h, t].double() / math.sqrt(d)).softmax(0) @ v
    return result.view(T, -1)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(4, 2, 16), (3, 3, 8), (4, 1, 12)]),
    st.integers(0, 40),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([None, 1, 5, 17]),
    st.sampled_from(sorted(DTYPES, key=str)),
    st.integers(0, 2**31),
)
def test_every_split_attends_to_the_same(
    heads: tuple[int, int, int], border: int, counts: list[int], window: int | None, dtype: torch.dtype, seed: int
) -> None:
    (H, J, d), size = heads, sum(counts)
    g = torch.Generator().manual_seed(seed)
    border = min(border, size)
    near = part(0, border, J, d, dtype) if border else None
    far = part(border, size - border, J, d, dtype) if border < size else None
    cache = SplitCache(near, far, EmulatedDevice())
    all_q, keys, values = torch.randn(H, size, d, generator=g), *torch.randn(2, J, size, d, generator=g)
    past = 0
    for count in counts:
        new = slice(past, past + count)
        got = cache.attend(all_q[:, new], keys[:, new], values[:, new], past, window)
        want = attention(all_q[:, new], keys, values, past, window)
        torch.testing.assert_close(got.double(), want, rtol=DTYPES[dtype], atol=DTYPES[dtype])
        past += count


def test_long_contexts_are_attended_to_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from moert.device import split_cache

    monkeypatch.setattr(split_cache, "BLOCK_FLOATS", 1)
    monkeypatch.setattr(split_cache, "LEAST_BLOCK", 7)
    g = torch.Generator().manual_seed(0)
    for window in (None, 3, 20):
        cache = SplitCache(part(0, 32, 2, 8, torch.float32), part(32, 30, 2, 8, torch.float32), EmulatedDevice())
        q, keys, values = torch.randn(4, 62, 8, generator=g), *torch.randn(2, 2, 62, 8, generator=g)
        cache.attend(q[:, :50], keys[:, :50], values[:, :50], 0, window)
        got = cache.attend(q[:, 50:], keys[:, 50:], values[:, 50:], 50, window)
        torch.testing.assert_close(got.double(), attention(q[:, 50:], keys, values, 50, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_torchs_own_attention_gives_the_same(count: int, dtype: torch.dtype) -> None:
    """A GPU's way to compute, here on the CPU."""
    g = torch.Generator().manual_seed(1)
    for H, J in ((4, 2), (3, 3), (6, 1)):
        own = part(0, 16, J, 8, dtype)
        own.write(0, *torch.randn(2, J, 16, 8, generator=g))
        q, past = torch.randn(H, count, 8, generator=g), 15 if count == 1 else 0
        last = past + count
        want, _ = own.attend(q, past, 0, last, None)
        torch.testing.assert_close(own.flash(q, last), want, rtol=DTYPES[dtype], atol=DTYPES[dtype])


def test_merging_what_saw_nothing_changes_nothing() -> None:
    g = torch.Generator().manual_seed(2)
    seen = torch.randn(2, 3, 4, generator=g), torch.randn(2, 3, generator=g)
    nothing = torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf)
    for pair in ((seen, nothing), (nothing, seen)):
        for got, want in zip(merge(*pair), seen, strict=True):
            torch.testing.assert_close(got, want)
    both, lse = merge(nothing, nothing)
    assert both.eq(0).all()
    assert lse.eq(-torch.inf).all()


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_logits_equal_transformers_for_any_split(
    family: str, tiny_checkpoint: Callable[..., Path], reference_logits: Callable[..., Tensor]
) -> None:
    path = tiny_checkpoint(family)
    arch, dense, experts = load(path)
    layers = (True,) * arch.num_layers
    decoder = placed(arch, dense, experts, layers)
    want = reference_logits(path, PROMPT[:120])
    for near in (0, 64, 128):
        cache = cache_of(decoder, layers, 120, near)
        chunks = torch.tensor(PROMPT[:120]).split([50, 40, *[1] * 30])
        got = torch.cat([decoder(chunk, cache, all_logits=True) for chunk in chunks])
        assert relative_error(got, want) < 1e-4


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_rounded_caches_give_the_same_for_any_split(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    """With the host's own cache too. Keys are rounded alike wherever they are; a last digit of one may tip over."""
    arch, dense, experts = load(tiny_checkpoint(family))
    layers = (True,) * arch.num_layers
    decoder, tokens = placed(arch, dense, experts, layers), torch.tensor(PROMPT[:60])
    for dtype in (torch.float16, torch.int8):
        plain = Decoder(arch, dense, experts)
        want = plain(tokens, KVCache(arch, 60, dtype), all_logits=True)
        for near in (0, 32, 64):
            got = decoder(tokens, cache_of(decoder, layers, 60, near, dtype), all_logits=True)
            assert ((got - want).norm(dim=1) / want.norm(dim=1)).median() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8])
def test_memory_is_as_large_as_it_says(dtype: torch.dtype) -> None:
    arch = architecture({"model_type": "qwen3_moe", "num_hidden_layers": 3, "head_dim": 128})
    layers, per_position = (True, False, True), KVCache.bytes_per_position(arch, dtype) // 3
    for near in (0, 32, 112, 200):
        device = EmulatedDevice(1 << 30)
        memory = SplitKVMemory(arch, 100, dtype, layers, near, device)
        near = min(near, 112)
        assert (1 << 30) - device.available_bytes() == 2 * near * per_position
        host = SplitKVMemory.host_bytes_for(arch, 100, dtype, layers, near)
        assert host == (112 + 2 * (112 - near)) * per_position
        assert host + 2 * near * per_position == KVCache.bytes_for(arch, 100, dtype)
        cache = KVCache(arch, 100, dtype, memory)
        parts: list[Any] = [p for s in cache.split if s is not None for p in (s.near, s.far) if p is not None]
        tensors = [t for p in [*parts, *cache.layers] for t in (p.keys, p.values, p.scales) if t is not None]
        assert sum(t.nbytes for t in tensors) == KVCache.bytes_for(arch, 100, dtype)


def test_sequences_in_one_memory_share_what_is_on_the_device(tiny_checkpoint: Callable[..., Path]) -> None:
    """The first have their keys there; each computes as alone."""
    arch, dense, experts = load(tiny_checkpoint("qwen3_moe"))
    layers = (True,) * arch.num_layers
    decoder, device = placed(arch, dense, experts, layers), EmulatedDevice()
    memory = SplitKVMemory(arch, 96, torch.float32, layers, 48, device)
    caches = [KVCache(arch, 32, torch.float32, memory, start) for start in (0, 32, 64)]
    borders = [(s.near.end if s.near else 0) for cache in caches for s in cache.split[:1] if s is not None]
    assert borders == [32, 16, 0]
    texts = [torch.tensor(PROMPT[i : i + 20]) for i in (0, 30, 60)]
    for _ in range(2):  # a second time over what the others left
        for text, cache in zip(texts, caches, strict=True):
            cache.truncate(0)
            got = decoder(text, cache)
            want = Decoder(arch, dense, experts)(text, KVCache(arch, 32, torch.float32))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def simulate(costs: AttentionCosts, border: int, seen: int, window: int | None) -> float:
    """Attention to `seen` positions, position by position, as two workers that start together."""
    clocks, waited = {"device": 0.0, "host": 0.0}, False
    for position in range(seen):
        if window is not None and position < seen - window:
            continue
        who = "device" if position < border else "host"
        waited |= who == "host"
        speed = costs.device_bytes_per_s if who == "device" else costs.host_bytes_per_s
        clocks[who] += costs.position_bytes / speed
    return max(clocks["device"], clocks["host"] + (costs.exchange_s if waited else 0))


@settings(max_examples=40, deadline=None)
@given(
    st.floats(1e9, 1e11),
    st.floats(1e9, 1e11),
    st.sampled_from([0.0, 1e-6, 1e-3]),
    st.sampled_from([0.0, 1e-12, 1e-9]),
    st.integers(0, 3000),
    st.sampled_from([[None], [12], [None, 5]]),
)
def test_the_split_is_the_best_of_all(
    device: float, host: float, exchange: float, gain: float, room: int, windows: list[int | None]
) -> None:
    layers, layer_bytes, head_bytes, positions, block = 3, 200.0, 300.0, 24, 4
    costs = AttentionCosts(8.0, device, host, exchange, 3e-9, 5e-9, gain, windows)

    def total(border: int) -> float:
        count = layers
        while count and count * (layer_bytes + 8 * border) > room:
            count -= 1
        left = room - count * (layer_bytes + 8 * border)
        head = count == layers and left >= head_bytes
        near, far = [], []
        for seen in lengths(positions):
            near.append(sum(simulate(costs, border, seen, w) for w in windows) / len(windows))
            far.append(sum(min(seen, w or seen) for w in windows) / len(windows) * 8 / host)
        seconds = count * sum(near) / len(near) + (layers - count) * (sum(far) / len(far) + 3e-9)
        return seconds + (0 if head else 5e-9) - (left - head * head_bytes) * gain

    chosen = choose(costs, layers, layer_bytes, head_bytes, room, positions, block)
    assert chosen % block == 0
    best = min(total(border) for border in range(0, positions + 1, block))
    assert total(chosen) <= best + 1e-9 * abs(best)


def test_what_the_split_goes_by() -> None:
    """More on the device the slower the host; none where experts gain more; all that fits without times."""

    def border(host: float, gain: float, exchange: float = 1e-5) -> int:
        costs = AttentionCosts(1024.0, 250e9, host, exchange, 1e-5, 1e-5, gain, [None])
        return choose(costs, 10, 1e6, 1e6, 1e8, 8192, 16)

    assert border(1000e9, 0.0) < border(50e9, 0.0) < 8192  # host and device work at the same time
    assert border(50e9, 0.0, exchange=1.0) == 8192
    assert border(50e9, 1e-6) == 0
    assert fill(1024.0, 10, 1e6, 1e6, 1.1e7 + 10 * 1024 * 100, 8192, 16) == 96
    assert fill(1024.0, 10, 1e6, 1e6, 9.5e5, 8192, 16) == 0
    assert fill(1024.0, 10, 1e6, 1e6, 1e9, 8192, 16) == 8192


def test_what_slots_gain_follows_from_the_profile() -> None:
    folder = Path(__file__).parents[1] / "device_profiles"
    profile = read_profile(folder / "laptop-rtx-4060-8gb.json")
    assert profile.gpu_expert_s_per_byte is not None
    apart = profile.expert_s_per_byte[4] - profile.gpu_expert_s_per_byte[4]
    assert slot_gain(profile, 8, 128, 4) == pytest.approx(8 / 128 * apart)
    assert slot_gain(read_profile(folder / "laptop-16gb-nvme.json"), 8, 128, 4) == 0.0
