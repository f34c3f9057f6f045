"""`moert train-router` on a tiny model: its forward pass against transformers and the runtime, and what it leaves."""

from dataclasses import replace

import pytest
import torch

from moert import LLM
from moert.errors import UsageError
from moert.models.stored_model import StoredModel
from moert.quant import dispatch
from moert.quant.matmul import PackedExpert
from moert.scheduler.precision import RoutedPrecision
from moert.store.bit_router import ROUTER_FILE, read_router
from moert.train import bit_router as train_router
from moert.train import distil
from moert.train.bit_router import Trainer

from .program import Program

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWS = [torch.randint(3, 320, (64,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(9)]


@pytest.fixture
def moert(capsys, monkeypatch, tmp_path):
    return Program(capsys, monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def stores(calibrated, store):
    return StoredModel.open(calibrated), StoredModel.open(store(widths=(16,), dense_bits=16))


def silent(text):
    pass


def test_its_lossless_model_is_that_of_transformers(stores, tiny_checkpoint, reference_logits):
    trainer = Trainer(*stores, WINDOWS, seed=0)
    with distil.torch_alone(), torch.no_grad():
        got = distil.logits(trainer._lossless, [torch.tensor(WINDOWS[0])])
    want = reference_logits(tiny_checkpoint("qwen3_moe"), WINDOWS[0])
    assert torch.allclose(got, want, atol=2e-3)


def test_its_nested_model_is_that_of_the_runtime(stores):
    trainer = Trainer(*stores, WINDOWS, seed=0)
    trainer._choose(trainer._before, 2.6)
    with distil.torch_alone(), torch.no_grad():
        got = distil.logits(trainer._model, [torch.tensor(WINDOWS[0])]).log_softmax(-1)
    with LLM(stores[0].path, precision="routed:2.6") as llm, LLM(stores[0].path, precision="routed:2.4") as other:
        near, far = ((llm.logits(WINDOWS[0]).log_softmax(-1) - got).square().mean() for llm in (llm, other))
    assert near < far / 2, "inputs rounded to 8 bits are the only difference"


def test_widths_are_computed_as_drawn_and_get_the_gradients_of_their_outputs(stores):
    store, _ = stores
    nested = Trainer(*stores, WINDOWS, seed=0)._experts
    g = torch.Generator().manual_seed(0)
    x, target = torch.randn(6, 64, generator=g), torch.randn(6, 64, generator=g)
    weights, indices = torch.rand(6, 8, generator=g).topk(3)
    chosen = torch.randint(3, (6, 3), generator=g)
    slopes = torch.zeros(6, 3, 3, requires_grad=True)
    with distil.torch_alone():
        got = nested.sum(1, x, indices, weights, chosen) + nested._slopes(1, x, indices, weights, slopes)
        (got * target).sum().backward()
    for t in range(6):
        want = torch.zeros(64, dtype=torch.float64)
        for k in range(3):
            slices = store.read_expert(1, int(indices[t, k]))
            for n in range(3):
                expert = PackedExpert.from_slices(slices[: n + 1], store.layout)
                gate, up, down = (m.rows(0, m.shape[0]).double() for m in (expert.gate, expert.up, expert.down))
                inner = gate @ x[t].double()
                y = weights[t, k] * (down @ (inner * torch.sigmoid(inner) * (up @ x[t].double())))
                assert float(slopes.grad[t, k, n]) == pytest.approx(float(y @ target[t].double()), rel=1e-3, abs=1e-5)
                want += y if n == chosen[t, k] else 0
        assert torch.allclose(got[t].detach().double(), want, atol=1e-5)


def test_it_gets_better_from_a_bad_start_and_the_same_each_time(stores, monkeypatch):
    monkeypatch.setattr(train_router, "_RATE", 0.3)
    store, lossless = stores
    short = [window[:32] for window in WINDOWS]
    found = []
    for _ in range(2):
        trainer = Trainer(store, lossless, short, seed=3)
        # As if the conversion had been wrong about layers and widths: that is what there is to learn.
        trainer._sensitivity._measured *= torch.tensor([[[1.0, 20.0, 1.0]], [[100.0, 100.0, 100.0]]])
        sensitivity = {layer: trainer._sensitivity.sensitivity()[layer].tolist() for layer in (0, 1)}
        trainer._before = replace(trainer._before, sensitivity=sensitivity)
        assert trainer.train(16, 1e9, silent) == 16
        result = trainer.result("about")
        found.append((result.sensitivity.tobytes(), result.exponents.tobytes(), trainer.compare(silent)))
    assert found[0] == found[1]
    assert all(row.after < row.before for row in found[0][2])
    other = Trainer(store, lossless, short, seed=4)
    other.train(2, 1e9, silent)
    assert other.result("").sensitivity.tobytes() != found[0][0]


def test_it_stops_when_its_time_is_over_and_leaves_the_kernel_as_it_was(stores):
    before = dispatch.kernel_name()
    trainer = Trainer(*stores, WINDOWS, seed=0)
    assert trainer.train(50, 0.0, silent) == 1
    assert dispatch.kernel_name() == before


def test_experts_that_keep_fewer_slices_can_be_trained(tiny_checkpoint, stores, tmp_path):
    from moert.convert.calibration import CalibrationText
    from moert.convert.convert import convert

    whole = sum(f.stat().st_size for f in stores[0].path.iterdir())
    text = CalibrationText("random", tuple(token for window in WINDOWS for token in window))
    small = convert(
        tiny_checkpoint("qwen3_moe"), tmp_path / "s", group_size=32, calibration=text, max_size=whole - 30_000
    )
    assert min(map(min, small.kept.values())) < 3
    trainer = Trainer(small, stores[1], WINDOWS, seed=0)
    trainer.train(2, 1e9, silent)
    result = trainer.result("")
    assert result.sensitivity.shape == (2, 8, 3)
    assert torch.isfinite(torch.from_numpy(result.sensitivity)).all()
    counts = RoutedPrecision(2.3, trainer._after())
    assert all(counts.one(0, [e], [1.0])[0] <= small.kept[0][e] for e in range(8))


# The command


def text_file(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("The router scores the experts, and the token visits the best ones.\n" * 200, encoding="utf-8")
    return path


def test_the_command_stores_what_is_better(moert, calibrated_copy, store, tmp_path, monkeypatch):
    options = ("-m", calibrated_copy, "--against", store(widths=(16,), dense_bits=16), "--text", text_file(tmp_path))
    rows = [train_router.Comparison(2.5, 0.2, 0.1), train_router.Comparison(3.0, 0.1, 0.09)]
    monkeypatch.setattr(Trainer, "compare", lambda self, progress: rows)
    result = moert("train-router", *map(str, options), "--steps", "2", "--seed", "7")
    assert result.code == 0
    assert "mean width 2.5: KL 0.10000 nats per token, 0.20000 with the thresholds" in result.out
    assert "--precision routed uses it from now on" in result.err
    assert "step 1 of 2: KL" in result.err
    found = read_router(calibrated_copy, (2, 8, 3))
    assert found.about.startswith("2 steps on train.txt (")
    assert found.about.endswith("seed 7")
    assert "bit router" in moert("info", "-m", str(calibrated_copy)).out
    # What is no better does not replace it.
    rows[:] = [train_router.Comparison(2.5, 0.1, 0.1), train_router.Comparison(3.0, 0.1, 0.11)]
    result = moert("train-router", *map(str, options), "--steps", "1")
    assert result.code == 1
    assert "the store stays as it was" in result.err
    assert read_router(calibrated_copy, (2, 8, 3)).about == found.about


@pytest.mark.parametrize("moment", ["train", "compare"])
def test_ctrl_c_leaves_the_store_as_it_was(moert, calibrated_copy, store, tmp_path, monkeypatch, moment):
    def interrupted(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, moment, interrupted)
    before = {path.name: path.read_bytes() for path in calibrated_copy.iterdir()}
    options = ("-m", calibrated_copy, "--against", store(widths=(16,), dense_bits=16), "--text", text_file(tmp_path))
    assert moert("train-router", *map(str, options), "--steps", "1").code == 130
    assert {path.name: path.read_bytes() for path in calibrated_copy.iterdir()} == before
    assert not (calibrated_copy / ROUTER_FILE).exists()


def test_what_cannot_be_trained_is_said(moert, calibrated, store, tmp_path, monkeypatch):
    lossless, text = store(widths=(16,), dense_bits=16), text_file(tmp_path)

    def train(model, against, *others):
        result = moert("train-router", "-m", str(model), "--against", str(against), "--text", str(text), *others)
        assert result.out == ""
        return result.code, result.err

    assert train(store(), lossless)[0] == 2
    assert "convert the checkpoint again, without --fast" in train(store(), lossless)[1]
    assert "is not lossless, so --against cannot be it" in train(calibrated, store())[1]
    assert "is not a store: make one with moert convert" in train(tmp_path, lossless)[1]
    assert "--steps must be at least 1" in train(calibrated, lossless, "--steps", "0")[1]
    assert "--minutes above 0" in train(calibrated, lossless, "--minutes", "0")[1]
    assert "--threads 0 must be at least 1" in train(calibrated, lossless, "-t", "0")[1]
    assert "Cannot read the calibration text" in train(calibrated, lossless, "--text", "nowhere.txt")[1]
    monkeypatch.setattr(distil, "available_bytes", lambda: 1 << 20)
    assert "1.0 MiB are available: train on a larger machine" in train(calibrated, lossless)[1]
    with pytest.raises(UsageError, match="at least two windows"):
        Trainer(StoredModel.open(calibrated), StoredModel.open(lossless), WINDOWS[:1], seed=0)
