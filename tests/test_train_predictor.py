"""`moert train-predictor`: its network against the predictor that runs, what it finds in routes made up, its files."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moert.errors import StoreError, UsageError
from moert.models.stored_model import StoredModel
from moert.scheduler.predictor import RATES, LastToken, PathWeights, RoutingPath, make_predictor
from moert.scheduler.trace import Routing, TraceStep
from moert.store.predictor import PREDICTOR_FILE, TrainedPredictor, read_predictor, write_predictor
from moert.train import predictor as train_predictor
from moert.train.predictor import Trainer, Window, measure, read_windows
from moert.train.recording import trace_shape

from .program import Program
from .traces import write_trace

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def moert(capsys, monkeypatch, tmp_path):
    return Program(capsys, monkeypatch, tmp_path)


@pytest.fixture
def model(store, tmp_path):
    """A copy of its own: 2 layers, 8 experts, 3 of them for each token."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in store().iterdir():
        (folder / path.name).symlink_to(path)
    return StoredModel.open(folder)


def silent(text):
    pass


def made_up(windows=8, size=64, seed=0):
    """Routes that follow the token in the first layer, and the token before it in the second."""
    rng = np.random.default_rng(seed)
    by_token = np.stack([[rng.choice(8, 3, replace=False) for _ in range(40)] for _ in range(2)])
    result = []
    for _ in range(windows):
        tokens = rng.integers(0, 40, size)
        before = np.concatenate([[0], tokens[:-1]])
        experts = np.stack([by_token[0][tokens], by_token[1][before]], 1)
        result.append(Window(torch.from_numpy(tokens), torch.from_numpy(experts)))
    return result


def record(path, store, windows, **changes):
    steps = [
        TraceStep(0, {i: Routing(tuple(e), (0.5, 0.3, 0.2)) for i, e in enumerate(experts)}, token, turn)
        for turn, window in enumerate(windows)
        for token, experts in zip(window.tokens.tolist(), window.experts.tolist(), strict=True)
    ]
    write_trace(path, replace(trace_shape(store), steps=tuple(steps), **changes))
    return path


def traces(*paths):
    return [word for path in paths for word in ("--trace", str(path))]


def test_the_network_is_the_predictor_that_runs(model):
    windows = made_up(3, 30)
    trainer = Trainer(model, windows, seed=1)
    trainer.train(1, 1e9, silent)
    predictor, window = RoutingPath((0, 1), trainer.result()), windows[0]
    with torch.no_grad():
        want = trainer._model(window, trainer._embedded[trainer._place[window.tokens]]).sigmoid()
    for t, token in enumerate(window.tokens.tolist()):
        predictor.begin([token])
        for layer in (0, 1):
            # Vectors of tokens are rounded to 8 bits.
            np.testing.assert_allclose(predictor.probabilities(layer), want[t, layer], atol=0.02)
            predictor.used(layer, window.experts[t : t + 1, layer].numpy())


def test_recent_shares_are_what_they_are_called():
    g = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(10, generator=g)[:4] for _ in range(12)])
    got = train_predictor.recent_shares(rows, torch.empty(12, 2, 5)).flatten(2).double()
    for r, rate in enumerate(RATES):
        want = torch.zeros(10, dtype=torch.float64)
        for t in range(12):
            assert torch.allclose(got[r, t], want, atol=1e-6)
            want = rate * want
            want[rows[t]] += 1 - rate


def test_it_finds_what_routes_follow(model):
    trainer = Trainer(model, made_up(16), seed=0)
    first = trainer.compare(silent)
    trainer.train(18, 1e9, silent)
    path, popularity, last = trainer.compare(silent)
    assert (path.name, popularity.name, last.name) == ("routing-path", "popularity", "last-token")
    assert min(path.layers) > 0.9
    assert popularity.mean < 0.6
    assert last.mean < 0.6
    assert first[0].mean < 0.7
    assert first[1:] == [popularity, last]


def test_the_same_seed_gives_the_same_predictor(model):
    found = []
    for seed in (3, 3, 4):
        trainer = Trainer(model, made_up(4, 20), seed)
        assert trainer.train(2, 1e9, silent) == 6
        found.append([tensor.tobytes() for tensor in trainer.result().tensors().values()])
    assert found[0] == found[1] != found[2]


def test_training_stops_when_its_time_is_over(model):
    assert Trainer(model, made_up(4, 20), 0).train(100, 1e-9, silent) == 1


def test_recall_is_measured_as_it_is_defined():
    window = Window(torch.arange(4), torch.tensor([[[0, 1]], [[1, 2]], [[1, 2]], [[5, 6]]]))
    row = measure(LastToken((7,), 8), [], [window], (7,), silent)
    # The first token has nothing before it: which two are named is chance.
    assert row.layers == (row.mean,)
    assert row.mean * 4 - (0.5 + 1.0 + 0.0) in (0.0, 0.5, 1.0)


def test_traces_become_windows(model, tmp_path):
    windows = made_up(2, 700)
    path = record(tmp_path / "t.csv", model, windows)
    found = read_windows(model, [path, path])
    assert [len(w.tokens) for w in found] == [512, 188] * 4
    assert torch.equal(torch.cat([w.tokens for w in found[:2]]), windows[0].tokens)
    assert torch.equal(torch.cat([w.experts for w in found[2:4]]), windows[1].experts)


# The command


def test_the_command_stores_what_it_learnt(moert, model, tmp_path):
    path = record(tmp_path / "t.csv.gz", model, made_up(8))
    result = moert("train-predictor", "-m", str(model.path), *traces(path), "-t", "1", "--epochs", "8", "--seed", "7")
    assert result.code == 0, result.err
    assert "| recall | all layers | layer 0 | layer 1 |" in result.out
    assert "| routing-path |" in result.out
    assert "epoch 1 of 8, step 1 of 56: loss" in result.err
    found = read_predictor(model)
    assert found.about == "56 steps on 512 tokens of t.csv.gz, seed 7"
    assert f"({found.nbytes / 1024:.1f} KiB)" in result.err
    assert found.about in moert("info", "-m", str(model.path)).out
    predictor = make_predictor("mixed", (0, 1), 8, 3, PathWeights(**found.tensors))
    predictor.begin([5])
    assert predictor.probabilities(1).shape == (8,)
    # What is no better than the baselines does not replace it.
    noise = made_up(8)
    for window in noise:
        window.experts[:] = torch.stack([torch.randperm(8)[:3] for _ in range(128)]).view(64, 2, 3) * 0 + torch.arange(
            3
        )
    path = record(tmp_path / "noise.csv", model, noise)
    result = moert("train-predictor", "-m", str(model.path), *traces(path), "-t", "1", "--epochs", "1")
    assert (result.code, "the store stays as it was" in result.err) == (1, True)
    assert read_predictor(model).about == found.about


def test_ctrl_c_leaves_the_store_as_it_was(moert, model, tmp_path, monkeypatch):
    def interrupted(self, *args):
        raise KeyboardInterrupt

    path = record(tmp_path / "t.csv", model, made_up(3, 20))
    for moment in ("train", "compare"):
        monkeypatch.setattr(Trainer, moment, interrupted)
        before = sorted(p.name for p in model.path.iterdir())
        assert moert("train-predictor", "-m", str(model.path), *traces(path), "-t", "1", "--epochs", "1").code == 130
        assert sorted(p.name for p in model.path.iterdir()) == before
        monkeypatch.undo()


def test_what_cannot_be_trained_is_said(moert, model, tmp_path):
    def train(*argv):
        result = moert("train-predictor", "-m", str(model.path), *map(str, argv))
        assert result.out == ""
        return result.code, result.err

    good = record(tmp_path / "good.csv", model, made_up(3, 20))
    assert train("--trace", good, "--epochs", "0") == (2, train("--trace", good, "--minutes", "0")[1])
    assert "--epochs must be at least 1" in train("--trace", good, "--epochs", "0")[1]
    assert "--threads 0 must be at least 1" in train("--trace", good, "-t", "0")[1]
    assert "--trace FILE is missing: moert generate --record-trace FILE records one" in train()[1]
    assert "nowhere.csv" in train("--trace", tmp_path / "nowhere.csv")[1]
    (tmp_path / "text.csv").write_text("Once upon a time\n")
    assert train("--trace", tmp_path / "text.csv")[0] == 2
    assert "text.csv is not a routing trace" in train("--trace", tmp_path / "text.csv")[1]
    other = record(tmp_path / "other.csv", model, made_up(1, 9), model="other-model")
    assert (
        f"other.csv is a trace of other-model, not of {model.meta.source_name.split('/')[-1]}"
        in train("--trace", other)[1]
    )
    assert "more than one text" in train("--trace", record(tmp_path / "short.csv", model, made_up(1, 9)))[1]
    steps = [TraceStep(0, {0: Routing((0, 1, 2), (0.4, 0.3, 0.3))}, 3), TraceStep(0, {}, 3)]
    for name, step, message in (
        ("lacking.csv", steps[0], "lacks layers of some tokens"),
        ("tokens.csv", replace(steps[0], token=None), "does not say which tokens went in"),
        ("large.csv", replace(steps[0], token=99999), "does not say which tokens went in"),
    ):
        write_trace(tmp_path / name, replace(trace_shape(model), steps=(step,)))
        assert f"{name} {message}" in train("--trace", tmp_path / name)[1]
    with pytest.raises(UsageError, match="more than one text"):
        Trainer(model, made_up(1), 0)


# Its file


def test_a_predictor_of_another_model_or_a_damaged_one_is_refused(model, store, tiny_checkpoint, tmp_path):
    assert read_predictor(model) is None
    trained = TrainedPredictor(Trainer(model, made_up(2, 9), 0).result().tensors(), "about")
    write_predictor(model, trained)
    found = read_predictor(model)
    assert found.about == "about"
    assert all(np.array_equal(found.tensors[name], tensor) for name, tensor in trained.tensors.items())
    path = model.path / PREDICTOR_FILE
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(StoreError, match=r"predictor\.safetensors is damaged: delete it"):
        read_predictor(model)
    path.write_bytes(data[:-4] + b"\0\0\0\1")
    with pytest.raises(StoreError, match="is damaged"):
        read_predictor(model)
    path.write_bytes(data.replace(b'"format_version":"1"', b'"format_version":"9"'))
    with pytest.raises(StoreError, match="has a format that this moert does not read"):
        read_predictor(model)
    for name, wrong in (("out", trained.tensors["out"][:-1]), ("recent", trained.tensors["recent"] * np.nan)):
        write_predictor(model, TrainedPredictor({**trained.tensors, name: wrong}, "about"))
        with pytest.raises(StoreError, match="is damaged"):
            read_predictor(model)
    write_predictor(model, TrainedPredictor({"tokens": trained.tensors["tokens"]}, "about"))
    with pytest.raises(StoreError, match="is damaged"):
        read_predictor(model)
    path.unlink()
    wider = store(num_hidden_layers=3)
    other = tmp_path / "other"
    other.mkdir()
    for file in wider.iterdir():
        (other / file.name).symlink_to(file)
    path.write_bytes(data)
    (other / PREDICTOR_FILE).write_bytes(data)
    names = [StoredModel.open(folder).meta.source_name for folder in (model.path, other)]
    with pytest.raises(StoreError, match=f"was trained for {names[0]}, not for {names[1]}"):
        read_predictor(StoredModel.open(other))


def test_predictors_are_chosen_by_name():
    for name in ("popularity", "last-token", "gate-ahead", "mixed"):
        assert make_predictor(name, (0, 1), 8, 3, None).name == name
    for name in ("routing-path", "oracle"):
        with pytest.raises(
            ValueError, match=f"no predictor '{name}'.*there are: popularity, last-token, gate-ahead, mixed"
        ):
            make_predictor(name, (0, 1), 8, 3, None)
