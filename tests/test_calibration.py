"""`moert convert --calibrate`: the pass through the source, what it changes, resuming, and its errors."""

from __future__ import annotations

import signal
import subprocess
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moert import LLM
from moert.cli import main
from moert.convert import calibration_text as calibration
from moert.convert.calibration import FEW_TOKENS, STATE_FILE, CalibrationText
from moert.convert.convert import ConvertProgress, convert
from moert.convert.parallel import num_workers
from moert.convert.source_model import SourceModel
from moert.errors import StoreError, UsageError

from .checkpoints import folder_bytes
from .child import ENVIRONMENT, PYTHON

TOKENS = tuple(torch.randint(3, 320, (1500,), generator=torch.Generator().manual_seed(0)).tolist())
TEXT = CalibrationText("test text", TOKENS)
NORM = "post_attention_layernorm.weight"


def spread_channels(path: Path) -> None:
    """Give the channels before the experts very different sizes, without changing the function."""
    file = path / "model.safetensors"
    tensors, generator = load_file(file), torch.Generator().manual_seed(5)
    for name in [n for n in tensors if n.endswith(NORM)]:
        factors = 2.0 ** torch.randint(-3, 4, tensors[name].shape, generator=generator)
        layer = name.removesuffix(NORM) + "mlp."
        tensors[name] = (tensors[name].float() * factors).to(tensors[name].dtype)
        for other in [n for n in tensors if n.startswith(layer)]:
            if any(part in other for part in ("gate.weight", "gate_proj", "up_proj", "shared_expert_gate")):
                tensors[other] = (tensors[other].float() / factors).to(tensors[other].dtype)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "olmoe"])
def test_the_function_is_kept_and_spread_channels_are_balanced(
    family: str, checkpoint_copy: Callable[..., Path], reference_logits: Callable[..., Any], tmp_path: Path
) -> None:
    source = checkpoint_copy(family)
    spread_channels(source)
    said: list[str] = []
    store = convert(source, tmp_path / "out", widths=(8,), dense_bits=16, calibration=TEXT, on_status=said.append)
    assert store.meta.quantiser == "calibrated on test text"
    assert said[0].startswith("Calibrated on 1500 tokens; ")
    dense, before = store.load_dense(), load_file(source / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        norm, router = dense[prefix + NORM], dense[prefix + "mlp.gate.weight"]
        assert isinstance(norm, torch.Tensor)
        assert isinstance(router, torch.Tensor)
        old = before[prefix + NORM]
        assert norm.dtype == old.dtype
        assert float(norm.float().log2().std()) < float(old.float().log2().std()) / 2
        product = router.double() * norm.double()
        assert torch.equal(product, before[prefix + "mlp.gate.weight"].double() * old.double())
    ids = list(TOKENS[:100])
    with LLM(store.path, ctx_size=128) as llm:
        logits = llm.logits(ids)
    exact = reference_logits(source, ids)
    assert float((logits - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize(
    ("family", "options"),
    [("qwen2_moe", {"num_hidden_layers": 4, "mlp_only_layers": [0, 2]}), ("mixtral", {"dtype": "float16"})],
    ids=["layers without experts", "float16"],
)
def test_other_models_keep_their_function(
    family: str,
    options: dict[str, Any],
    tiny_checkpoint: Callable[..., Path],
    reference_logits: Callable[..., Any],
    tmp_path: Path,
) -> None:
    source = tiny_checkpoint(family, **options)
    store = convert(source, tmp_path / "out", widths=(2, 8), dense_bits=16, calibration=TEXT)
    assert store.meta.sensitivity is not None
    assert store.meta.sensitivity.keys() == set(store.moe_layers)
    ids = list(TOKENS[:100])
    exact = reference_logits(source, ids)
    for precision in ("fixed:8", "routed:7.9"):
        with LLM(store.path, ctx_size=128, precision=precision) as llm:
            assert float((llm.logits(ids) - exact).norm() / exact.norm()) < 0.1


def test_experts_that_see_little_borrow_and_say_so(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    said: list[str] = []
    few = CalibrationText("few", TOKENS[:100])
    convert(tiny_checkpoint("qwen3_moe"), tmp_path / "out", calibration=few, on_status=said.append)
    line, _, _ = said
    assert line.startswith(
        f"Calibrated on 100 tokens; 16 of 16 experts saw fewer than {FEW_TOKENS} of them and borrowed"
    )


CHILD = """
import sys, time
from pathlib import Path
from moert.convert.calibration import CalibrationText
from moert.convert.convert import convert

def hang(progress):
    if sys.argv[3] in progress.stage:
        print("here", flush=True)
        time.sleep(600)

text = CalibrationText("test text", tuple(map(int, sys.argv[4].split(","))))
convert(Path(sys.argv[1]), Path(sys.argv[2]), calibration=text, progress=hang)
"""


@pytest.mark.parametrize("where", ["experts of layer 2", "dense weights"])
def test_kill_nine_and_resume_give_the_same_bytes(
    where: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = tiny_checkpoint("qwen3_moe"), tmp_path / "out"
    convert(source, tmp_path / "reference", calibration=TEXT)
    command = [*PYTHON, "-c", CHILD, str(source), str(out), where, ",".join(map(str, TOKENS))]
    child = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    with pytest.raises(StoreError, match=r"other settings \(widths, code, quantiser\)"):
        convert(source, out, resume=True)
    seen: list[ConvertProgress] = []
    convert(source, out, calibration=TEXT, resume=True, progress=seen.append)
    assert not any(stage in p.stage for p in seen for stage in ("calibration, layer 1", "experts of layer 1"))
    assert folder_bytes(out) == folder_bytes(tmp_path / "reference")
    assert not (tmp_path / "out.partial").exists()


def test_without_its_saved_states_a_conversion_resumes_to_the_same_bytes(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = tiny_checkpoint("qwen3_moe"), tmp_path / "out"
    convert(source, tmp_path / "reference", calibration=TEXT)
    state = tmp_path / "out.partial" / STATE_FILE

    def stop(progress: ConvertProgress) -> None:
        if "experts of layer 2" in progress.stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, calibration=TEXT, progress=stop)
    whole = state.read_bytes()
    state.write_bytes(whole[:-9])
    with pytest.raises(StoreError, match=r"calibration\.safetensors is damaged: delete"):
        convert(source, out, calibration=TEXT, resume=True)
    state.unlink()
    convert(source, out, calibration=TEXT, resume=True)
    assert folder_bytes(out) == folder_bytes(tmp_path / "reference")


def test_one_layer_is_in_memory_at_a_time(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint("qwen3_moe", num_experts=24)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    load = SourceModel.expert

    def counted(self: SourceModel, layer: int, e: int) -> Any:
        nonlocal most
        weights = load(self, layer, e)
        alive.extend(map(weakref.ref, weights))
        most = max(most, sum(ref() is not None for ref in alive))
        return weights

    monkeypatch.setattr(SourceModel, "expert", counted)
    convert(source, tmp_path / "out", calibration=TEXT)
    assert len(alive) == 3 * 24 * 2 * 2  # once for the balance of the channels, once to be quantised
    assert most <= 3 * (num_workers(1) + 1)


def test_texts_that_cannot_serve_are_refused(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen3_moe")
    text = tmp_path / "text.txt"
    for content, message in (
        (None, r"Cannot read the calibration text .*text\.txt: No such file"),
        (b"", r"text\.txt has 0 tokens, but at least 2048 are needed: name a longer one, or use --calibrate default\."),
        (b"Too short.", r"has \d+ tokens, but at least 2048 are needed"),
        (b"\xff\xfe" * 9000, r"text\.txt is not UTF-8"),
    ):
        if content is not None:
            text.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            calibration.tokens(str(text), calibration.read(str(text)), source)
    with pytest.raises(UsageError, match="no effect on experts that are kept as they are"):
        convert(source, tmp_path / "out", widths=(16,), calibration=TEXT)


def test_long_texts_are_sampled_evenly_and_named_by_their_tokens(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, path = tiny_checkpoint("qwen3_moe"), tmp_path / "long.txt"
    path.write_text("".join(f"{i} " for i in range(60_000)))
    long = calibration.tokens(str(path), calibration.read(str(path)), source)
    assert len(long.tokens) == calibration.MOST_TOKENS
    # Three of eight experts a token: each sees in the mean as many as are worth it.
    assert calibration.worth_while(source) == calibration.MOST_OF_EXPERT * 8 // 3
    assert len(calibration.tokens(str(path), path.read_text(), source, 4096).tokens) == 4096
    path.write_text(path.read_text().replace("1", "2", 1))
    assert calibration.tokens(str(path), calibration.read(str(path)), source).name != long.name
    default = calibration.tokens("default", calibration.read("default"), source)
    assert default.name.startswith("default (")
    assert len(default.tokens) >= calibration.LEAST_TOKENS


def test_the_command_converts_and_reports(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "prose.txt"
    text.write_text("The router scores the experts, the token visits the best ones. " * 200)
    arguments = ["convert", str(tiny_checkpoint("olmoe")), str(tmp_path / "out"), "--calibrate"]
    with pytest.raises(UsageError, match="Cannot read the calibration text"):
        main.main([*arguments, str(tmp_path / "absent.txt")])
    assert main.main([*arguments, str(text)]) == 0
    assert "experts saw fewer than 256" in capsys.readouterr().err
    assert '"quantiser":"calibrated on prose.txt (' in (tmp_path / "out" / "moert.json").read_text()
