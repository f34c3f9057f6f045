"""`moert train-scales` on a tiny model: what it learns, what it changes in a store and what it does not."""

import errno

import pytest
import torch

from moert import LLM
from moert.errors import StoreError, UsageError
from moert.models.stored_model import StoredModel
from moert.quant.matmul import PackedExpert
from moert.quant.reference import unpack_codes
from moert.scheduler.precision import RoutedPrecision
from moert.train import distil
from moert.train import rescale as rescaling
from moert.train import scales as train_scales
from moert.train.rescale import rescale
from moert.train.scales import Comparison, Trainer

from .program import Program

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWS = [torch.randint(3, 320, (32,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(16)]


@pytest.fixture
def moert(capsys, monkeypatch, tmp_path):
    return Program(capsys, monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def lossless(store):
    return StoredModel.open(store(widths=(16,), dense_bits=16))


def silent(text):
    pass


def matrices(store, layer, expert):
    """Slices of an expert by matrix, and the layouts of the matrices."""
    packed = PackedExpert.from_slices(store.read_expert(layer, expert), store.layout)
    return [(m.slices, m.layout) for m in (packed.gate, packed.up, packed.down)]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_lossless_model_is_that_of_transformers(calibrated, lossless, tiny_checkpoint, reference_logits):
    trainer = Trainer(StoredModel.open(calibrated), lossless, WINDOWS, seed=0)
    with distil.torch_alone(), torch.no_grad():
        got = distil.logits(trainer._lossless, [torch.tensor(WINDOWS[0])])
    assert torch.allclose(got, reference_logits(tiny_checkpoint("qwen3_moe"), WINDOWS[0]), atol=2e-3)


def test_the_nested_model_is_that_of_the_runtime(calibrated, lossless):
    store, ids = StoredModel.open(calibrated), [*WINDOWS[0], *WINDOWS[1]]
    trainer = Trainer(store, lossless, WINDOWS, seed=0)
    trainer._experts.learning = False
    trainer._experts.chooser = RoutedPrecision(2.6, store.bit_router())
    with distil.torch_alone(), torch.no_grad():
        got = distil.logits(trainer._model, [torch.tensor(ids)]).log_softmax(-1)
    with LLM(calibrated, precision="routed:2.6") as llm, LLM(calibrated, precision="routed:2.4") as other:
        near, far = ((llm.logits(ids).log_softmax(-1) - got).square().mean() for llm in (llm, other))
    assert near < far / 2, "inputs rounded to 8 bits are the only difference"


def test_the_divergence_on_the_text_falls_and_is_the_same_each_time(calibrated, lossless):
    store = StoredModel.open(calibrated)
    found = []
    for seed in (3, 3, 4):
        trainer = Trainer(store, lossless, WINDOWS, seed)
        assert trainer.train(5, 1e9, silent) == 5
        found.append([t.tolist() for row in trainer.result(1, 5) for t in row])
    assert found[0] == found[1] != found[2]
    trainer.train(10, 1e9, silent)
    trainer._checked = trainer._windows
    rows = trainer.compare(silent)
    assert [row.precision for row in rows] == ["fixed:4", "fixed:3", "fixed:2", "routed:2.5", "routed:3"]
    assert all(row.after < row.before for row in rows)


def test_the_store_has_what_was_learnt_and_the_codes_it_had(calibrated_copy, lossless, tmp_path):
    (calibrated_copy / "NOTICE.md").write_text("Whose it is.")
    store = StoredModel.open(calibrated_copy)
    trainer = Trainer(store, lossless, WINDOWS, seed=0)
    trainer.train(8, 1e9, silent)
    before = files(calibrated_copy)
    new = rescale(store, tmp_path / "new", trainer.result, None, "for a test", silent)
    new.verify()
    assert files(calibrated_copy) == before
    assert new.meta.quantiser == store.meta.quantiser + "; scales trained: for a test"
    after = files(new.path)
    assert before.keys() == after.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"moert.json", "experts-00000.safetensors", "experts-00001.safetensors"}
    for layer in (0, 1):
        for e in range(8):
            for n in range(3):
                want = trainer._experts.matrices(layer, e, n)
                got = PackedExpert.from_slices(new.read_expert(layer, e)[: n + 1], new.layout).floats()
                assert all(torch.allclose(g, w, rtol=1e-5, atol=0) for g, w in zip(got, want, strict=True))
            for (old, layout), (now, _) in zip(matrices(store, layer, e), matrices(new, layer, e), strict=True):
                assert torch.equal(unpack_codes(old, layout, 3), unpack_codes(now, layout, 3))
                ends = [layout.codes_bytes(n) for n in range(3)]
                assert all(torch.equal(a[:end], b[:end]) for a, b, end in zip(old, now, ends, strict=True))
                assert not any(torch.equal(a, b) for a, b in zip(old, now, strict=True))


def test_sensitivities_are_those_of_the_new_scales(calibrated, store, lossless):
    """Beside float64, where the experts see what transformers' model would show them."""
    nested = StoredModel.open(calibrated)
    trainer = Trainer(nested, lossless, WINDOWS, seed=0)
    trainer.train(4, 1e9, silent)
    seen = []
    trainer._right.watch = lambda layer, x, indices: seen.append((layer, x, indices))
    with distil.torch_alone(), torch.no_grad():
        distil.logits(trainer._lossless, trainer._checked)
    found = trainer.sensitivity(silent)

    def ffn(matrices, x):
        gate, up, down = (m.double() for m in matrices)
        return (torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T

    norm = "model.layers.{}.post_attention_layernorm.weight"
    dense = [s.load_dense() for s in (nested, lossless)]
    for layer, x, indices in seen:
        shift = dense[0][norm.format(layer)].float() / dense[1][norm.format(layer)].float()
        for e in range(8):
            mine = x[(indices == e).any(-1)]
            right = ffn(PackedExpert.from_slices(lossless.read_expert(layer, e), lossless.layout).floats(), mine)
            for n in range(3):
                old = PackedExpert.from_slices(nested.read_expert(layer, e)[: n + 1], nested.layout).floats()
                new = [w.detach() for w in trainer._experts.matrices(layer, e, n)]
                before, after = ((ffn(w, mine * shift) - right).square().sum() for w in (old, new))
                want = nested.meta.sensitivity[layer][e][n] * float(after / before)
                assert found[layer][e][n] == pytest.approx(want, rel=1e-3)


def test_experts_that_keep_fewer_slices_can_be_trained(tiny_checkpoint, calibrated, lossless, tmp_path):
    from moert.convert.calibration import CalibrationText
    from moert.convert.convert import convert

    whole = sum(f.stat().st_size for f in calibrated.iterdir())
    text = CalibrationText("random", tuple(token for window in WINDOWS * 3 for token in window))
    small = convert(
        tiny_checkpoint("qwen3_moe"), tmp_path / "s", group_size=32, calibration=text, max_size=whole - 30_000
    )
    assert min(map(min, small.kept.values())) < 3
    trainer = Trainer(small, lossless, WINDOWS, seed=0)
    trainer.train(4, 1e9, silent)
    new = rescale(small, tmp_path / "new", trainer.result, None, "for a test", silent)
    new.verify()
    assert new.kept == small.kept


def test_stores_of_one_width_and_rounded_ones_can_be_trained(store, lossless):
    for path in (store(widths=(3,)), store()):
        trainer = Trainer(StoredModel.open(path), lossless, WINDOWS, seed=0)
        assert bool(trainer._routed) == (len(trainer._store.meta.widths) > 1)
        assert trainer.train(50, 0.0, silent) == 1, "its time is over at once"
        assert all(torch.isfinite(t).all() for row in trainer.result(0, 0) for t in row)


def test_a_short_text_is_not_used_too_often(calibrated, lossless):
    trainer = Trainer(StoredModel.open(calibrated), lossless, WINDOWS[:4], seed=0)
    assert trainer.train(1000, 1e9, silent) == 4 * train_scales.PASSES * 3 // 4


# The command


@pytest.fixture
def options(calibrated, lossless, tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("The router scores the experts, and the token visits the best ones.\n" * 200, encoding="utf-8")
    out = tmp_path / "out" / "scaled"
    out.parent.mkdir()
    return ["-m", calibrated, "--against", lossless.path, "--text", path, "--out", out, "--steps", "1"]


def run(moert, options, *more):
    result = moert("train-scales", *map(str, options), *map(str, more))
    return result.code, result.out, result.err


def test_the_command_writes_what_is_better(moert, options, monkeypatch):
    rows = [Comparison("fixed:3", 0.2, 0.1), Comparison("routed:2.5", 0.1, 0.11)]
    monkeypatch.setattr(Trainer, "compare", lambda self, progress: rows)
    code, out, err = run(moert, options, "--seed", "7")
    assert code == 0
    assert "fixed:3: KL 0.10000 nats per token, 0.20000 with the scales of the store (text that was not" in out
    assert "step 1 of 1: KL" in err
    new = options[7]
    assert f"Stored in {new} after 1 steps" in err
    quantiser = StoredModel.open(new).meta.quantiser
    assert "scales trained: 1 steps on train.txt (" in quantiser
    assert quantiser.endswith("seed 7")
    assert "exists already" in run(moert, options)[2]


def test_what_is_no_better_is_not_written(moert, options, monkeypatch):
    rows = [Comparison("fixed:3", 0.2, 0.19), Comparison("fixed:2", 0.1, 0.11)]
    monkeypatch.setattr(Trainer, "compare", lambda self, progress: rows)
    code, _, err = run(moert, options)
    assert code == 1
    assert "no better, so no store is written" in err
    assert not list(options[7].parent.iterdir())


@pytest.mark.parametrize("moment", ["train", "compare", "result"])
def test_ctrl_c_leaves_nothing_behind(moert, calibrated, options, monkeypatch, moment):
    def interrupted(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_scales, "PASSES", 1)
    monkeypatch.setattr(Trainer, moment, interrupted)
    if moment == "result":
        monkeypatch.setattr(Trainer, "compare", lambda self, progress: [Comparison("fixed:3", 0.2, 0.1)])
    before = files(calibrated)
    assert run(moert, options)[0] == 130
    assert files(calibrated) == before
    assert not list(options[7].parent.iterdir())


def test_what_cannot_be_trained_or_written_is_said(moert, options, lossless, calibrated, tmp_path, monkeypatch):
    def refused(*more):
        code, out, err = run(moert, options, *more)
        assert out == ""
        assert not list(options[7].parent.iterdir())
        return code, err

    assert refused("-m", lossless.path)[0] == 2
    assert "keeps its experts as they are, without scales" in refused("-m", lossless.path)[1]
    assert "is not lossless, so --against cannot be it" in refused("--against", calibrated)[1]
    assert "is not a store: make one with moert convert" in refused("-m", tmp_path)[1]
    assert "--steps must be at least 1" in refused("--steps", "0")[1]
    assert "--minutes above 0" in refused("--minutes", "0")[1]
    assert "--threads 0 must be at least 1" in refused("-t", "0")[1]
    assert "Cannot read the calibration text" in refused("--text", "nowhere.txt")[1]
    assert "lies inside the store that is read" in refused("--out", calibrated / "new")[1]
    assert "to write the new store to with --out" in moert("train-scales", *map(str, options[:6])).err
    monkeypatch.setattr(distil, "available_bytes", lambda: 1 << 20)
    assert "1.0 MiB are available: train on a larger machine" in refused()[1]
    with pytest.raises(UsageError, match="at least two windows"):
        Trainer(StoredModel.open(calibrated), lossless, WINDOWS[:1], seed=0)


def test_a_folder_that_is_left_over_is_not_touched(calibrated, tmp_path):
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(StoreError, match="left from a run that was cut off: delete it"):
        rescale(StoredModel.open(calibrated), tmp_path / "new", lambda layer, e: [], None, "", silent)
    assert (tmp_path / "new.partial").is_dir()


def test_a_full_disk_leaves_nothing_behind(calibrated, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    store = StoredModel.open(calibrated)
    monkeypatch.setattr(rescaling, "write_json", full)
    old = train_scales._Scaled(store).scales
    with pytest.raises(StoreError, match=r"Cannot write .*new: No space left on device; .* is as it was"):
        rescale(store, tmp_path / "new", lambda layer, e: [old[layer, e, n] for n in range(3)], None, "", silent)
    assert not list(tmp_path.iterdir())
