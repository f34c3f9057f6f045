"""Layers on a device, here one in host memory: against transformers, the host's kernels, and bitsandbytes itself."""

# T tokens, N rows, K columns

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moert.device import dense_quant
from moert.device import matrix as device_matrix
from moert.device.backend import EmulatedDevice
from moert.device.bitsandbytes import bitsandbytes
from moert.device.matrix import KINDS, Matrix16, MatrixInt8, MatrixNF4, dtype_of
from moert.device.placement import Placement, place
from moert.errors import DeviceError, UsageError
from moert.models import attention, layers
from moert.models.decoder import Decoder
from moert.models.kv_cache import KVCache
from moert.models.moe import Experts
from moert.models.router_prediction import RouterPrediction
from moert.models.stored_model import StoredModel
from moert.quant.matmul import PackedMatrix

from .placed import CountingDevice, cache_of, placed
from .test_models import PROMPT, VARIANTS, load, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
MakeCheckpoint = Callable[..., Path]


def empty(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def with_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: it is in moert[cuda]")


@pytest.mark.parametrize(
    "variant", ["mixtral-window", "olmoe-clipped", "qwen2-dense-layers", "qwen2-tied", "qwen3-gelu"]
)
def test_logits_equal_transformers_wherever_layers_are(
    variant: str, tiny_checkpoint: MakeCheckpoint, reference_logits: Callable[..., Tensor]
) -> None:
    name, overrides = VARIANTS[variant]
    path = tiny_checkpoint(name, **overrides)
    arch, dense, experts = load(path)
    want = reference_logits(path, PROMPT[:70])
    n = arch.num_layers
    for on, head in (((True,) * n, True), ((True,) + (False,) * (n - 1), False), ((False,) * (n - 1) + (True,), True)):
        decoder = placed(arch, dense, experts, on, head)
        for chunks in ([70], [40] + [1] * 30):
            cache = cache_of(decoder, on, 70, 48)
            pieces = torch.tensor(PROMPT[:70]).split(chunks)
            got = torch.cat([decoder(piece, cache, all_logits=True) for piece in pieces])
            assert relative_error(got, want) < 1e-4


def test_16_bits_cost_little(tiny_checkpoint: MakeCheckpoint, reference_logits: Callable[..., Tensor]) -> None:
    """The checkpoint's weights are bfloat16, so inputs alone are rounded."""
    path = tiny_checkpoint("qwen2_moe")
    arch, dense, experts = load(path)
    on, want = (True,) * arch.num_layers, reference_logits(path, PROMPT[:60])
    assert dtype_of(torch.device("cpu")) == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float16):
        decoder = placed(arch, dense, experts, on, dtype=dtype)
        got = decoder(torch.tensor(PROMPT[:60]), cache_of(decoder, on, 60, 64), all_logits=True)
        assert ((got - want).norm(dim=1) / want.norm(dim=1)).median() < (0.02 if dtype == torch.bfloat16 else 0.003)


def test_a_device_layer_uses_no_kernel_of_the_host(
    tiny_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would read device memory by its address."""
    arch, dense, experts = load(tiny_checkpoint("qwen3_moe"))
    on = (True,) * arch.num_layers
    decoder = placed(arch, dense, experts, on)

    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("a kernel of the host")

    monkeypatch.setattr(layers.elementwise, "rms_norm", refuse)
    monkeypatch.setattr(attention, "rotate", refuse)
    monkeypatch.setattr(layers, "linear", refuse)
    monkeypatch.setattr(layers.matmul, "linear_many", refuse)
    cache = cache_of(decoder, on, 32, 16)
    for piece in (PROMPT[:10], PROMPT[10:11]):
        assert decoder(torch.tensor(piece), cache).isfinite().all()


def test_what_moves_between_host_and_device(tiny_checkpoint: MakeCheckpoint) -> None:
    """The hidden state at the borders, once, and for each layer with experts its choice."""
    arch, dense, experts = load(tiny_checkpoint("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[2]))
    device, K, D = CountingDevice(), arch.top_k, arch.hidden_size
    on = (False, True, True, False)
    decoder = placed(arch, dense, experts, on, False, device)
    cache = cache_of(decoder, on, 32, 32)
    decoder(torch.tensor(PROMPT[:5]), cache)
    rotation = (2, 5, arch.head_dim // 2)
    assert sorted(device.sent) == sorted([rotation, (5, D)])
    assert device.fetched == [(5, 2 * K), (5, D)]
    device = CountingDevice()
    decoder = placed(arch, dense, experts, (True,) * 4, True, device)
    logits = decoder(torch.tensor(PROMPT[:5]), cache_of(decoder, (True,) * 4, 32, 32))
    assert device.fetched == [(5, 2 * K)] * 3 + [(1, len(logits))]


class Watching:
    horizon = 2

    def __init__(self) -> None:
        self.told: list[tuple[int, list[tuple[int, list[int]]]]] = []

    def on_router_prediction(self, layer: int, guesses: Sequence[RouterPrediction]) -> None:
        self.told.append((layer, [(guess.layer, list(guess.experts)) for guess in guesses]))


@pytest.mark.parametrize("head", [False, True])
def test_foresight_is_the_same_wherever_layers_are(head: bool, tiny_checkpoint: MakeCheckpoint) -> None:
    arch, dense, experts = load(tiny_checkpoint("qwen2_moe", num_hidden_layers=4, mlp_only_layers=[1], tie=True))
    found = []
    for on in ((False,) * 4, (True,) * 4, (False, True, True, False)):
        decoder, watcher = placed(arch, dense, experts, on, head), Watching()
        decoder.watch(watcher)
        cache = cache_of(decoder, on, 32, 16)
        decoder(torch.tensor(PROMPT[:9]), cache)
        assert not watcher.told
        decoder(torch.tensor(PROMPT[9:10]), cache)
        found.append(watcher.told)
    assert found[0] == found[1] == found[2]
    assert [layer for layer, _ in found[0]] == [-1, 0, 1, 2]
    plain, watcher = Decoder(arch, dense, experts), Watching()
    plain.watch(watcher)
    cache = KVCache(arch, 32, torch.float32)
    for piece in (PROMPT[:9], PROMPT[9:10]):
        plain(torch.tensor(piece), cache)
    assert not cache.steppable or watcher.told == found[0]


def test_several_sequences_together(tiny_checkpoint: MakeCheckpoint) -> None:
    arch, dense, experts = load(tiny_checkpoint("qwen3_moe", num_hidden_layers=3))
    texts = [PROMPT[:12], PROMPT[40:47], PROMPT[60:61]]
    for on, head in (((True,) * 3, True), ((True, False, True), False)):
        decoder = placed(arch, dense, experts, on, head)
        want, alone = [], []
        for text in texts:
            cache = cache_of(decoder, on, 32, 16)
            want.append(decoder(torch.tensor(text), cache))
            alone.append(decoder(torch.tensor([5]), cache))
        caches = [cache_of(decoder, on, 32, 16) for _ in texts]
        logits = decoder.together([(torch.tensor(t), c) for t, c in zip(texts, caches, strict=True)])
        torch.testing.assert_close(logits, torch.stack(want), rtol=1e-4, atol=1e-4)
        logits = decoder.together([(torch.tensor([5]), cache) for cache in caches])
        torch.testing.assert_close(logits, torch.stack(alone), rtol=1e-4, atol=1e-4)
        assert [cache.length for cache in caches] == [13, 8, 2]


def test_an_interrupted_pass_leaves_the_split_cache(tiny_checkpoint: MakeCheckpoint) -> None:
    arch, dense, experts = load(tiny_checkpoint("qwen3_moe"))
    interrupt = False

    class Interruptible(Experts):
        def __call__(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
            if interrupt and layer == 1:
                raise KeyboardInterrupt
            return experts(layer, x, indices, weights)

    on = (True,) * arch.num_layers
    decoder = placed(arch, dense, Interruptible(), on)
    cache = cache_of(decoder, on, 48, 16)
    decoder(torch.tensor(PROMPT[:20]), cache)
    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        decoder(torch.tensor(PROMPT[100:110]), cache)
    interrupt = False
    got = decoder(torch.tensor(PROMPT[20:30]), cache)
    want = placed(arch, dense, experts, on)(torch.tensor(PROMPT[:30]), cache_of(decoder, on, 48, 48))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_products_against_float64(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    w, x = torch.randn(70, 40, generator=g), torch.randn(5, 40, generator=g)
    matrix = Matrix16((70, 40), dtype, empty)
    matrix.fill(0, w[:64])
    matrix.fill(64, w[64:])
    want = x.to(dtype).double() @ w.to(dtype).double().T
    torch.testing.assert_close(matrix(x).double(), want, rtol=1e-5, atol=1e-5)
    assert matrix(x).dtype == torch.float32
    torch.testing.assert_close(matrix.rows(torch.tensor([65, 2])), w[[65, 2]].to(dtype).float())


def test_inputs_beyond_float16_stay_finite() -> None:
    x, w = torch.tensor([[1e6, -1e6, 1.0]]), torch.ones(2, 3, dtype=torch.float16)
    assert device_matrix.product(x, w).tolist() == [[1.0, 1.0]]


def test_int8_is_what_bitsandbytes_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    with_bitsandbytes()
    monkeypatch.setattr(device_matrix, "BLOCK_WEIGHTS", 400)  # a few outliers at a time
    import bitsandbytes as library

    g = torch.Generator().manual_seed(4)
    w = torch.randn(130, 48, generator=g)
    matrix = MatrixInt8((130, 48), torch.bfloat16, empty)
    for first in (0, 64, 128):
        matrix.fill(first, w[first : first + 64])
    layer = library.nn.Linear8bitLt(48, 130, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = library.nn.Int8Params(w.half(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu").eval()
    for scale in (1.0, 4.0):  # the second has inputs above the threshold
        x = torch.randn(7, 48, generator=g) * scale
        with torch.inference_mode():
            want = layer(x.half()).float()
        assert (matrix(x) - want).norm() / want.norm() < 2e-3
        exact = x.double() @ w.double().T
        assert (matrix(x) - exact).norm() / exact.norm() < 0.02
    rows = matrix.rows(torch.tensor([129, 3]))
    torch.testing.assert_close(rows, w[[129, 3]], rtol=0, atol=(w.abs().amax(1) / 200).max().item())


@pytest.mark.parametrize("shape", [(130, 64), (7, 192)])
def test_nf4_is_what_bitsandbytes_computes(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with_bitsandbytes()
    import bitsandbytes as library

    g = torch.Generator().manual_seed(5)
    w, x = torch.randn(*shape, generator=g), torch.randn(6, shape[1], generator=g)
    codes, state = library.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    want = x.double() @ library.functional.dequantize_4bit(codes, state).double().T
    matrix = MatrixNF4(shape, torch.float32, empty)
    for first in range(0, shape[0], 64):
        matrix.fill(first, w[first : first + 64])
    assert matrix.codes.view(-1).equal(codes.view(-1))
    torch.testing.assert_close(matrix(x).double(), want, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(device_matrix, "BLOCK_WEIGHTS", 4 * shape[1])  # a few rows at a time
    torch.testing.assert_close(matrix(x).double(), want, rtol=1e-5, atol=1e-5)
    rows = matrix.rows(torch.tensor([5, 0]))
    torch.testing.assert_close(rows, library.functional.dequantize_4bit(codes, state)[[5, 0]])


def test_bitsandbytes_without_its_part_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    part = SimpleNamespace(lib=SimpleNamespace(compiled_with_cuda=False))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(cextension=part))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match=r"cannot be loaded .it has no part for this GPU's CUDA"):
        bitsandbytes.__wrapped__()


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    try:
        dense_quant.check_quant("16")
        for quant in ("int8", "nf4"):
            with pytest.raises(
                UsageError, match=r"^--dense-quant int8 and nf4 need bitsandbytes.*moert\[cuda\]"
            ) as caught:
                dense_quant.check_quant(quant)
            assert caught.value.exit_code == 2
            assert str(caught.value).endswith("use --dense-quant 16.")
    finally:
        bitsandbytes.cache_clear()


@pytest.mark.parametrize("quant", ["16", "int8", "nf4"])
@pytest.mark.parametrize("dense_bits", [8, 16])
def test_a_stores_dense_part_on_the_device(
    quant: device_matrix.DenseQuant, dense_bits: int, store: Callable[..., Path]
) -> None:
    """Each weight is that of the store, as far as the width goes; what stays on the host is as it was."""
    if quant != "16":
        with_bitsandbytes()
    opened = StoredModel.open(store("qwen2_moe", dense_bits=dense_bits, tie=True, num_hidden_layers=3))
    arch, plain = opened.architecture, opened.load_dense()
    everything = place(arch, quant, 1 << 30, 64, torch.float16, torch.device("cpu"))
    for placement in (everything, Placement((True, False, True), False, False, 1 << 20, 0, 0, 0)):
        dense = dense_quant.load_dense(opened, placement, EmulatedDevice(), quant)
        assert dense.keys() == plain.keys()
        for name, found in dense.items():
            there, want = name in placement.names(arch), plain[name]
            assert isinstance(found, PackedMatrix) == (isinstance(want, PackedMatrix) and not there)
            weights = want.rows(0, want.shape[0]) if isinstance(want, PackedMatrix) else want.float()
            if isinstance(found, PackedMatrix):
                assert isinstance(want, PackedMatrix)
                assert found.slices[0].equal(want.slices[0])
            elif isinstance(found, Tensor):
                assert found.float().equal(weights)
            else:
                int8 = quant == "nf4" and ("embed" in name or found.shape[1] % 64)
                assert type(found) is (MatrixInt8 if int8 else KINDS[quant])
                read = found(torch.eye(found.shape[1])).T  # a product with each unit vector
                limit = {Matrix16: 0.004, MatrixInt8: 0.02, MatrixNF4: 0.12}[type(found)]
                assert (read - weights).norm() / weights.norm() < limit
        assert dense_quant.host_dense_bytes(opened, placement) == sum(
            t.nbytes for t in opened.meta.dense if t.name not in placement.names(arch)
        )


def test_a_device_that_is_too_small(store: Callable[..., Path]) -> None:
    opened = StoredModel.open(store("qwen3_moe"))
    placement = place(opened.architecture, "16", 1 << 30, 64, torch.float16, torch.device("cpu"))
    with pytest.raises(DeviceError, match="Out of memory"):
        dense_quant.load_dense(opened, placement, EmulatedDevice(placement.dense_bytes - 1), "16")


def test_loading_holds_one_tensor_at_a_time(store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside those that stay on the host."""
    opened = StoredModel.open(store("qwen3_moe"))
    placement = place(opened.architecture, "16", 1 << 30, 64, torch.float16, torch.device("cpu"))
    live = peak = 0
    real = opened.read_dense

    def counted(*arguments: object) -> object:
        nonlocal live, peak
        for name, tensor in real(*arguments):  # type: ignore[arg-type]
            live += 1
            peak = max(peak, live)
            yield name, tensor
            live -= 1

    monkeypatch.setattr(opened, "read_dense", counted)
    dense_quant.load_dense(opened, placement, EmulatedDevice(), "16")
    assert peak == 1
