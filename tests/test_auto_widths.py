"""`--widths auto`: slices put together, divergences against transformers, what is kept, and every way to break off."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moert.convert import harm, settle
from moert.convert.calibration import Calibrated, CalibrationText
from moert.convert.convert import convert
from moert.convert.parallel import workers
from moert.convert.partial import Finished
from moert.convert.source_model import SourceModel
from moert.convert.widths import AUTO_WIDTHS, ENOUGH_KL, MOST_BASE_KL, chosen
from moert.errors import BudgetError, StoreError
from moert.models.stored_model import StoredModel
from moert.quant import nested
from moert.quant.format import ExpertLayout
from moert.quant.reference import pack

from .checkpoints import folder_bytes, stored_matrices

TEXT = CalibrationText(
    "text", tuple(torch.randint(3, 320, (1100,), generator=torch.Generator().manual_seed(0)).tolist())
)


@pytest.mark.parametrize(
    ("kl", "widths"),
    [
        ((0.6, 0.2, 0.06, 0.02), (2, 3, 4, 6)),
        ((MOST_BASE_KL, 0.2, ENOUGH_KL, 0.01), (2, 3, 4)),
        ((0.8, 0.2, 0.06, 0.02), (3, 4, 6)),
        ((9.0, 2.0, 0.01, 0.0), (3, 4)),
        ((9.0, 9.0, 8.0, 8.1), (3, 4)),
    ],
)
def test_the_base_can_be_computed_with_and_more_than_enough_is_left_out(kl, widths):
    assert chosen(kl) == widths


@given(
    st.lists(st.integers(2, 6), min_size=1, max_size=5, unique=True).map(sorted),
    st.sampled_from([("trellis", 32), ("trellis", 64)]),
    st.data(),
)
def test_slices_put_together_are_what_packing_gives(widths, kind, data):
    code, group = kind
    layout = ExpertLayout(40, 24, group, tuple(widths), code=code)
    some = sorted(data.draw(st.sets(st.sampled_from(widths), min_size=1)))
    to = ExpertLayout(40, 24, group, tuple(some), code=code)
    generator = torch.Generator().manual_seed(0)
    parts, wanted = [], []
    for matrix, target in zip(layout.matrices, to.matrices, strict=True):
        codes = torch.randint(0, 1 << widths[-1], (matrix.rows, matrix.groups * group), generator=generator).byte()
        scales = [torch.rand(matrix.rows, 1, generator=generator).half().float() for _ in widths]
        parts.append(pack(codes, scales, matrix))
        wanted.append(pack(codes >> (widths[-1] - some[-1]), [scales[widths.index(b)] for b in some], target))
    slices, planes = nested.join_parts(parts, layout), [layout.matrices[0].planes(i) for i in range(len(widths))]
    ends = [0, *(widths.index(b) + 1 for b in some)]
    joined = [sum(planes[start:end], ()) for start, end in pairwise(ends)]
    if joined != [to.matrices[0].planes(i) for i in range(len(some))]:
        with pytest.raises(ValueError, match="cannot be put together"):
            nested.regroup(slices, layout, to)
        return
    found = nested.regroup(slices, layout, to)
    for one, other in zip(found, nested.join_parts(wanted, to), strict=True):
        assert torch.equal(one, other)


@given(st.lists(st.floats(0, 10), min_size=3, max_size=3), st.integers(0, 2**32 - 1))
def test_sensitivities_add_up_to_what_the_model_loses(kl, seed):
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(2, 4, 3, generator=generator).double() + 0.01
    usage = torch.rand(2, 4, generator=generator).double() + 0.01
    files = {at: Finished(1, 1, [], errors[at].tolist(), usage[at].tolist(), None) for at in (0, 1)}
    rows = torch.stack([torch.tensor(file.sensitivity) for file in harm.in_nats(files, kl).values()])
    totals = (usage[..., None] * rows).sum((0, 1)).tolist()
    if kl[0] > kl[1] > kl[2] > 0:
        assert totals == pytest.approx(kl)
    elif kl[0] > 0 and not kl[0] > kl[1] > kl[2]:
        assert totals[0] == pytest.approx(kl[0])
        ratio = rows / errors  # one factor for all, so that an expert's widths compare as they were measured
        assert ratio.min() == pytest.approx(float(ratio.max()))


@pytest.fixture(scope="module")
def every(tiny_checkpoint, tmp_path_factory):
    """A store with all that auto may keep, and what was said."""
    said = []
    out = tmp_path_factory.mktemp("every") / "out"
    return convert(tiny_checkpoint("qwen3_moe"), out, widths=AUTO_WIDTHS, calibration=TEXT, on_status=said.append), said


def test_divergences_are_those_from_transformers(every, tiny_checkpoint, reference_logits):
    store, _ = every
    windows = [TEXT.tokens[:512], TEXT.tokens[512:1024]]
    truth = [(torch.tensor(ids), reference_logits(tiny_checkpoint("qwen3_moe"), list(ids))) for ids in windows]
    assert store.meta.kl is not None
    found = harm.divergences(store, truth, lambda stage: None)
    # The source's own logits, by the calibration, are those of transformers but for rounding.
    assert store.meta.kl == pytest.approx(found, rel=0.2)
    assert list(store.meta.kl) == sorted(store.meta.kl, reverse=True)


@pytest.mark.parametrize(
    ("family", "over"),
    [
        ("mixtral", {}),
        ("olmoe", {}),
        ("qwen2_moe", {}),
        ("qwen3_moe", {"mlp_only_layers": [1]}),
        ("qwen3_moe", {"tie_word_embeddings": True}),
    ],
)
def test_the_logits_of_the_source_are_those_of_transformers(family, over, tiny_checkpoint, reference_logits, tmp_path):
    path = tiny_checkpoint(family, **over)
    calibrated = Calibrated(SourceModel.open(path), TEXT)
    calibrated.begin(tmp_path)
    with workers(1 << 20) as pool:
        for ids, logits in calibrated.lossless(2, pool):
            assert len(ids) > 1
            torch.testing.assert_close(logits, reference_logits(path, ids.tolist()).float(), rtol=1e-3, atol=1e-3)


def test_the_divergence_is_that_of_torch():
    a, b = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(0)).double()
    p, q = b.softmax(-1), a.softmax(-1)
    true = float((p * (p.log() - q.log())).sum())
    assert harm._divergence(a.float(), b.float()) == pytest.approx(true, rel=1e-4)


@pytest.fixture
def losses(monkeypatch):
    """Say what the whole model is found to lose."""

    def say(*kl):
        monkeypatch.setattr(harm, "divergences", lambda *arguments: list(kl))

    return say


@pytest.mark.parametrize("kl", [(0.6, 0.2, 0.06, 0.02), (0.6, 0.2, 0.01, 0.005), (0.8, 0.2, 0.06, 0.02)])
def test_what_is_kept_has_the_same_weights(every, losses, kl, tiny_checkpoint, tmp_path):
    losses(*kl)
    said = []
    store = convert(tiny_checkpoint("qwen3_moe"), tmp_path / "out", calibration=TEXT, on_status=said.append)
    assert store.layout.widths == chosen(kl)
    assert store.meta.kl == tuple(x for x, b in zip(kl, AUTO_WIDTHS, strict=True) if b in chosen(kl))
    assert said[-2:] == [
        "KL from the source on the calibration text, nats per token: "
        + ", ".join(f"{b} bits {x:.3g}" for b, x in zip(AUTO_WIDTHS, kl, strict=True)) + ".",
        f"Widths kept: {', '.join(map(str, chosen(kl)))}.",
    ]  # fmt: skip
    store.verify()
    for layer in store.moe_layers:
        for e in range(store.num_experts):
            for i, width in enumerate(store.layout.widths):
                one = stored_matrices(store, layer, e, i + 1)
                other = stored_matrices(every[0], layer, e, AUTO_WIDTHS.index(width) + 1)
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(len(row) == len(store.layout.widths) for rows in store.meta.sensitivity.values() for row in rows)


@pytest.mark.parametrize("kl", [(0.6, 0.2, 0.06, 0.02), (0.8, 0.2, 0.01, 0.005)])
@pytest.mark.parametrize("stage", ["experts of layer 2", "dense", "kept of layer 1", "kept of layer 2"])
def test_broken_off_it_goes_on_to_the_same_bytes(losses, kl, stage, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("qwen3_moe")
    losses(*kl)
    convert(source, tmp_path / "whole", calibration=TEXT, source_name="x")

    def stop(progress):
        if stage in progress.stage:
            raise KeyboardInterrupt

    broken = False
    try:
        convert(source, tmp_path / "out", calibration=TEXT, source_name="x", progress=stop)
    except KeyboardInterrupt:
        broken = True
        convert(source, tmp_path / "out", calibration=TEXT, source_name="x", resume=True)
    assert broken or chosen(kl) == AUTO_WIDTHS
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def test_names_may_be_relative(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = Path(tiny_checkpoint("olmoe"))
    store = convert(source, Path("here/out"), calibration=TEXT)
    assert store.meta.kl is not None


def test_broken_off_while_the_model_is_run(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("olmoe")
    convert(source, tmp_path / "whole", calibration=TEXT, source_name="x")

    def stop(progress):
        if "comparing with the source at 4 bits" in progress.stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", calibration=TEXT, source_name="x", progress=stop)
    assert not (tmp_path / "out.partial" / "trial").exists()
    convert(source, tmp_path / "out", calibration=TEXT, source_name="x", resume=True)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_broken_off_between_names(losses, tiny_checkpoint, tmp_path, monkeypatch):
    source = tiny_checkpoint("qwen3_moe")
    losses(0.6, 0.2, 0.06, 0.02)
    rename, left = settle.Partial.rename, [1]

    def once(self, name, new):
        if not left.pop() if left else True:
            raise KeyboardInterrupt
        rename(self, name, new)

    monkeypatch.setattr(settle.Partial, "rename", once)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", calibration=TEXT, source_name="x")
    monkeypatch.setattr(settle.Partial, "rename", rename)
    resumed = convert(source, tmp_path / "out", calibration=TEXT, source_name="x", resume=True)
    resumed.verify()


def test_where_the_model_cannot_run_the_usual_widths_are_kept(tiny_checkpoint, tmp_path, monkeypatch):
    def too_large(*arguments):
        raise BudgetError("It does not fit.")

    monkeypatch.setattr(harm, "divergences", too_large)
    said = []
    store = convert(tiny_checkpoint("qwen3_moe"), tmp_path / "out", calibration=TEXT, on_status=said.append)
    assert (store.layout.widths, store.meta.kl) == ((2, 3, 4), None)
    assert said[1:] == [
        "What the whole model loses at each width was not measured: It does not fit.",
        "Widths kept: 2, 3, 4.",
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [([0.1], "kl is not a list of 4 numbers"), ([0.1, 0.1, 0.1, -1.0], "kl has a divergence that is not a number")],
)
def test_a_wrong_kl_is_damage(every, wrong, message, tmp_path):
    value = json.loads((every[0].path / "moert.json").read_text())
    value["kl"] = wrong
    for path in every[0].path.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "moert.json").unlink()
    (tmp_path / "moert.json").write_text(json.dumps(value))
    with pytest.raises(StoreError, match=message):
        StoredModel.open(tmp_path)
