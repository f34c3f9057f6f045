"""`moert convert --max-size`: what is kept, how it goes on after any break, and how such a store is run."""

import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moert import LLM
from moert.cli import main
from moert.config import EngineConfig
from moert.convert import convert as conversion
from moert.convert.calibration import Calibrated, CalibrationText
from moert.convert.partial import Partial
from moert.convert.plan import ConversionPlan
from moert.convert.source_model import SourceModel
from moert.errors import StoreError, UsageError
from moert.measure import evaluate
from moert.models.stored_model import StoredModel
from moert.quant.dispatch import compiled
from moert.runtime.executor import ExpertRunner
from moert.store.layout import slice_name

from .checkpoints import folder_bytes, stored_matrices

TOKENS = torch.randint(3, 320, (700,), generator=torch.Generator().manual_seed(0)).tolist()
TEXT = CalibrationText("text", tuple(TOKENS))
convert = partial(conversion.convert, widths=(2, 3, 4))


def size_of(path: Path) -> int:
    return sum(len(data) for data in folder_bytes(path).values())


@pytest.fixture(scope="module")
def source(tiny_checkpoint, tmp_path_factory):
    """A model with experts that say much and others that say little."""
    path = Path(shutil.copytree(tiny_checkpoint("qwen3_moe"), tmp_path_factory.mktemp("source") / "model"))
    tensors = load_file(path / "model.safetensors")
    for name in tensors:
        if ".down_proj." in name:
            tensors[name] = tensors[name] * 4.0 ** (int(name.split(".")[5]) % 3 - 1)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def measured():
    """Layer -> what the calibration says, of the conversion that `whole` is."""
    return {}


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory, measured):
    finish = Calibrated.finish

    def noted(self, layer):
        measured[layer] = finish(self, layer)
        return measured[layer]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Calibrated, "finish", noted)
        return convert(source, tmp_path_factory.mktemp("w") / "whole", calibration=TEXT, dense_bits=16)


@pytest.fixture(scope="module")
def limit(whole):
    """The size of 3 bits and some room, as moert.json is estimated from above."""
    return size_of(whole.path) - 8 * 2 * whole.layout.slice_sizes[2] + 4096


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def cut(source, tmp_path_factory, limit, said):
    out = tmp_path_factory.mktemp("c") / "cut"
    return convert(source, out, calibration=TEXT, dense_bits=16, max_size=limit, on_status=said.append)


# What is kept


def test_the_store_is_within_its_limit_and_as_large_as_it_can_be(cut, limit, whole):
    assert limit - 4 * 4096 < size_of(cut.path) <= limit
    counts = Counter(count for counts in cut.kept.values() for count in counts)
    assert counts.keys() == {1, 2, 3}
    assert cut.meta.kept == {layer: tuple(counts) for layer, counts in cut.kept.items()}
    assert (whole.meta.kept, set(whole.kept[0] + whole.kept[1])) == (None, {3})
    assert not list(cut.path.glob("whole*"))


def test_what_is_kept_is_what_the_whole_store_has(cut, whole):
    again = StoredModel.open(cut.path)
    again.verify()
    for layer in (0, 1):
        before = load_file(whole.location(layer, 0).file)
        with safe_open(cut.location(layer, 0).file, "pt") as file:
            names = {slice_name(layer, e, i) for e, count in enumerate(cut.kept[layer]) for i in range(count)}
            assert set(file.keys()) == names
            for e, count in enumerate(cut.kept[layer]):
                path, offset = again.location(layer, e)
                for i in range(count):
                    piece = file.get_tensor(slice_name(layer, e, i))
                    assert torch.equal(piece, before[slice_name(layer, e, i)])
                    assert path.read_bytes()[offset : offset + len(piece)] == piece.numpy().tobytes()
                    offset += len(piece)
    assert cut.meta.sensitivity == whole.meta.sensitivity
    others = [{n: d for n, d in folder_bytes(s.path).items() if "experts" not in n} for s in (cut, whole)]
    assert {**others[0], "moert.json": b""} == {**others[1], "moert.json": b""}


def test_no_exchange_of_slices_would_lower_the_error(cut, measured):
    weights = {layer: [u ** (2 / 3) for u in m.usage] for layer, m in measured.items()}
    weights = {layer: [w * sum(measured[layer].usage) / sum(row) for w in row] for layer, row in weights.items()}
    errors = {
        (layer, e): [weights[layer][e] * v for v in m.sensitivity[e]] for layer, m in measured.items() for e in range(8)
    }
    kept = {(layer, e): count - 1 for layer, counts in cut.kept.items() for e, count in enumerate(counts)}
    assert sum(errors[at][b] for at, b in kept.items()) < sum(row[1] for row in errors.values())
    for one, b in kept.items():
        for other, c in kept.items():
            if one != other and b < 2 and c > 0:  # all slices but the first are alike in size
                gained, lost = errors[one][b] - errors[one][b + 1], errors[other][c - 1] - errors[other][c]
                assert gained <= lost


def test_usage_is_the_mean_squared_router_weight(source, whole, measured, reference_model):
    inputs, gate = [], load_file(source / "model.safetensors")["model.layers.0.mlp.gate.weight"].double()
    model = reference_model(source)
    hook = model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: inputs.append(args[0][0]))
    with torch.inference_mode():
        for start in (0, 512):
            model(torch.tensor([TOKENS[start : start + 512]]))
    hook.remove()
    best, chosen = (torch.cat(inputs).double() @ gate.T).topk(3)
    squares = best.softmax(-1).square()  # weights of the chosen ones add up to 1
    true = [float(squares[chosen == e].sum()) / len(TOKENS) for e in range(8)]
    assert measured[0].usage == pytest.approx(true, rel=1e-3)


def test_it_is_said(said, cut, capsys):
    line = said[-1]
    assert (
        line == f"Kept under the limit: {cut.kept_widths()}. The error that is expected of this is the least possible."
    )
    mean = sum(count + 1 for counts in cut.kept.values() for count in counts) / 16
    assert f"{mean:.2f} bits on average (" in line
    assert main.main(["info", "-m", str(cut.path), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert f"kept                  {cut.kept_widths()}" in shown
    assert "every checksum is right" in shown
    assert main.main(["info", "-m", str(cut.path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    counts = Counter(count for counts in cut.kept.values() for count in counts)
    assert [w["widest_of"] for w in facts["widths"]] == [counts[1], counts[2], counts[3]]
    assert facts["experts_bytes"] == sum(sum(cut.layout.slice_sizes[:n]) * m for n, m in counts.items())
    assert facts["disk_bytes"] == size_of(cut.path)


# Limits


def test_the_size_of_everything_else_is_estimated_from_above(source, whole):
    """Whatever a calibration records in moert.json must be counted, or a store could exceed its limit."""
    plan = ConversionPlan(
        SourceModel.open(source), (2, 3, 4), 64, 16, whole.meta.quantiser, whole.meta.source_name, 10**9
    )
    others = size_of(whole.path) - whole.experts_bytes(3)
    assert others <= plan.fixed_bytes < 1.05 * others


def test_a_limit_that_nothing_exceeds_changes_nothing(source, whole, tmp_path):
    said = []
    limit = size_of(whole.path) + 50_000  # moert.json is estimated from above
    store = convert(source, tmp_path / "out", calibration=TEXT, dense_bits=16, max_size=limit, on_status=said.append)
    assert folder_bytes(store.path) == folder_bytes(whole.path)
    assert said[-1] == "Kept under the limit: 4.00 bits on average (16 experts at 4)."


def test_a_limit_that_nothing_fits_is_refused_with_the_least(source, tmp_path):
    options = {"calibration": TEXT, "dense_bits": 16}
    with pytest.raises(UsageError, match=r"does not hold every expert at 2 bits; the least --max-size") as caught:
        convert(source, tmp_path / "out", max_size=1000, **options)
    assert not list(tmp_path.iterdir())
    least = int(str(caught.value).split("does is ")[1].split()[0])
    with pytest.raises(UsageError):
        convert(source, tmp_path / "out", max_size=least - 1, **options)
    store = convert(source, tmp_path / "out", max_size=least, **options)
    assert store.kept == dict.fromkeys((0, 1), (1,) * 8)
    assert size_of(store.path) <= least


def test_a_limit_needs_a_calibration(source, tmp_path):
    with pytest.raises(UsageError, match="--fast does without the calibration that --max-size goes by"):
        main.main(["convert", str(source), str(tmp_path / "out"), "--max-size", "1MiB", "--fast"])
    with pytest.raises(UsageError, match="of 16 bits there is one only"):
        main.main(["convert", str(source), str(tmp_path / "out"), "--max-size", "1MiB", "--widths", "16"])
    with pytest.raises(UsageError, match="max-size 'much' is not a size"):
        main.main(["convert", str(source), str(tmp_path / "out"), "--max-size", "much"])
    with pytest.raises(UsageError, match="which experts matter"):
        convert(source, tmp_path / "out", max_size=10**6)
    assert not list(tmp_path.iterdir())


def test_room_for_all_slices_is_asked_for(source, whole, limit, tmp_path, monkeypatch):
    files = {path.name: path.stat().st_size for path in whole.path.glob("*.safetensors")}
    enough = sum(files.values()) + max(size for name, size in files.items() if "experts" in name)
    for free in (enough - 1, enough):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        arguments = {"calibration": TEXT, "dense_bits": 16, "max_size": limit}
        if free < enough:
            with pytest.raises(StoreError, match=r"needs .* before the store is cut down to what is kept, but only"):
                convert(source, tmp_path / "out", **arguments)
            assert not list(tmp_path.iterdir())
        else:
            convert(source, tmp_path / "out", **arguments)


# Resuming


@pytest.fixture(scope="module")
def about_to_cut(source, limit, tmp_path_factory):
    """OUT.partial of a conversion whose layers are all quantised."""
    out = tmp_path_factory.mktemp("p") / "out"

    def stop(progress):
        if "kept of layer 1" in progress.stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, calibration=TEXT, dense_bits=16, max_size=limit, progress=stop)
    return out.with_name("out.partial")


def resumed(source, tmp_path, about_to_cut, limit, **more):
    if not (tmp_path / "out.partial").exists():
        shutil.copytree(about_to_cut, tmp_path / "out.partial")
    options = {"calibration": TEXT, "dense_bits": 16, "max_size": limit, "resume": True}
    return convert(source, tmp_path / "out", **{**options, **more})


@pytest.mark.parametrize("call", range(5))
@pytest.mark.parametrize("where", ["finish", "drop"])
def test_broken_off_at_any_moment_it_gives_the_same_bytes(
    source, tmp_path, about_to_cut, limit, cut, where, call, monkeypatch
):
    calls, original = iter(range(100)), getattr(Partial, where)
    before = call % 2 == 0

    def breaking(self, *args):
        here = next(calls) == call // 2
        if here and before:
            raise KeyboardInterrupt
        original(self, *args)
        if here:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Partial, where, breaking)
        if call < 4:  # there are two layers
            with pytest.raises(KeyboardInterrupt):
                resumed(source, tmp_path, about_to_cut, limit)
            assert not (tmp_path / "out").exists()
    resumed(source, tmp_path, about_to_cut, limit)
    assert folder_bytes(tmp_path / "out") == folder_bytes(cut.path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_limit_is_not_resumed(source, tmp_path, about_to_cut, limit):
    with pytest.raises(StoreError, match=r"other settings \(max_size\)"):
        resumed(source, tmp_path, about_to_cut, limit + 1)
    with pytest.raises(StoreError, match=r"other settings \(max_size\)"):
        resumed(source, tmp_path, about_to_cut, None)


def test_damage_before_the_copy_is_found(source, tmp_path, about_to_cut, limit):
    shutil.copytree(about_to_cut, tmp_path / "out.partial")
    file = tmp_path / "out.partial" / "store" / "whole-experts-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-50_000] ^= 1
    data[20_000] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"whole-experts-00001.* is damaged at expert \d+: delete"):
        resumed(source, tmp_path, about_to_cut, limit)


# Running


@pytest.mark.parametrize("width", [2, 3, 4])
def test_an_expert_is_computed_at_the_widest_it_has(cut, width):
    with LLM(cut.path, ctx_size=64, precision=f"fixed:{width}") as llm:
        runner = llm.runner._experts
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
        for layer in (0, 1):
            for e in range(8):
                count = min(width - 1, cut.kept[layer][e])
                gate, up, down = stored_matrices(cut, layer, e, count)
                inner = torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
                true = inner @ down.T
                for rows in (5, 1):
                    found = runner(layer, x[:rows], torch.full((rows, 1), e), torch.ones(rows, 1))
                    assert float((found - true[:rows]).norm() / true[:rows].norm()) < 0.03
                out = torch.zeros(1, 64)
                runner.forward_token(layer, x[:1], [e], [1.0], out)
                assert float((out - true[:1]).norm() / true[:1].norm()) < 0.03
                assert bool(runner._computed) == (compiled() is not None)  # computed at once
                runner.forward_token(layer, x[:1], [e], [-1.0], out)
                assert not out.any()


def test_the_result_does_not_depend_on_the_budget(cut):
    logits = []
    sizes = cut.layout.slice_sizes
    everything = sum(sum(sizes[:n]) for counts in cut.kept.values() for n in counts)
    for budget in (sum(sizes), everything // 2, everything):
        said = []
        with LLM(cut.path, ctx_size=64, expert_budget=budget, on_status=said.append) as llm:
            logits.append(llm.logits(TOKENS[:40]))
            for token in TOKENS[40:48]:
                logits[-1] = torch.cat([logits[-1], llm.runner.forward([token])[None]])
            assert llm.runner._experts.residency.arena.total_bytes <= budget
            assert llm.runner.budget.arena <= budget
            read = llm.runner.counters.bytes_read
        assert f"the store was made with --max-size: its experts have {cut.kept_widths()}" in said
        assert ("expert arena holds all 16 experts" in said) == (budget == everything)
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    assert read <= everything


def test_what_is_counted_is_what_was_used(cut, monkeypatch):
    used = []
    call = ExpertRunner.__call__

    def noted(self, layer, x, indices, weights):
        used.extend(cut.kept[layer][e] for e in indices.flatten().tolist())
        return call(self, layer, x, indices, weights)

    monkeypatch.setattr(ExpertRunner, "__call__", noted)
    said = []
    evaluation = evaluate.Evaluation(cut, None, ["fixed:4", "fixed:2"], EngineConfig(threads=1), 50, said.append)
    try:
        evaluation.run([TOKENS[:50]], lambda line: None)
    finally:
        evaluation.close()
    assert f"the store was made with --max-size: its experts have {cut.kept_widths()}" in said
    wide, narrow = evaluation.rows()
    used = used[: len(used) // 2]
    assert len(used) == 50 * 2 * 3
    assert wide.mean_width == pytest.approx(sum(n + 1 for n in used) / len(used))
    weights = 3 * 64 * 48
    bits = [sum(8 * cut.layout.offsets(i)[-1] for i in range(n)) / weights for n in used]
    assert wide.bits_per_weight == pytest.approx(sum(bits) / len(bits))
    assert (narrow.mean_width, wide.expert_bytes_per_token > narrow.expert_bytes_per_token) == (2, True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "kept is not an object"),
        ({"0": [3] * 8}, r"kept\.1 is missing"),
        ({"0": [3] * 8, "1": [3] * 7}, r"kept\.1 is not a list of 8 numbers of slices from 1 to 3"),
        ({"0": [3] * 8, "1": [3] * 7 + [0]}, r"kept\.1 is not a list of 8 numbers of slices from 1 to 3"),
        ({"0": [3] * 8, "1": [3] * 7 + [4]}, r"kept\.1 is not a list of 8 numbers of slices from 1 to 3"),
        ({"0": [3] * 8, "1": [3] * 7 + [2.0]}, r"kept\.1 is not a list of whole numbers"),
        ({"0": [3] * 8, "1": [3] * 8}, r"checksums\.0 does not have 3 checksums"),
        ("absent", r"checksums\.0 does not have 3 checksums"),
    ],
)
def test_a_damaged_list_of_what_is_kept_is_named(cut, tmp_path, wrong, message):
    shutil.copytree(cut.path, tmp_path / "store")
    file = tmp_path / "store" / "moert.json"
    value = json.loads(file.read_text())
    value["kept"] = wrong
    if wrong == "absent":
        del value["kept"]
    file.write_text(json.dumps(value))
    with pytest.raises(StoreError, match=message):
        StoredModel.open(tmp_path / "store")
