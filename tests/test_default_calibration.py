"""`moert convert SRC OUT` without further options calibrates, unless the text that comes along is of no use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from moert import LLM
from moert.cli import main
from moert.convert import calibration_text as calibration
from moert.convert.convert import ConvertProgress, convert
from moert.errors import UsageError
from moert.hub.resolve import resolve
from moert.models.stored_model import StoredModel
from moert.quant.format import MAX_TRELLIS_WIDTH
from moert.scheduler import capacity

from .checkpoints import folder_bytes, make_checkpoint

Checkpoint = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOERT_CACHE", str(tmp_path / "cache"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Status lines of `moert convert`."""
    assert main.main(["convert", *map(str, arguments)]) == 0
    return capsys.readouterr().err


def test_it_calibrates_by_itself(
    tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tiny_checkpoint("olmoe"), tmp_path / "out"
    said = run(capsys, source, out).splitlines()
    text = f"{calibration.DEFAULT_TOKENS} tokens of the text that comes along"
    assert said[0] == (
        f"Converting {source} (widths those of 2,3,4,6 that pay, groups of 64, dense 8 bits) into {out}, calibrated on"
        f" {text} (--fast: rounded, in a fraction of the time)."
    )
    store = StoredModel.open(out)
    assert store.layout.code == "trellis"
    assert store.meta.sensitivity is not None
    some = calibration.tokens("default", calibration.read("default"), source, calibration.DEFAULT_TOKENS)
    assert len(some.tokens) == calibration.DEFAULT_TOKENS
    convert(source, tmp_path / "again", calibration=some, source_name=str(source))
    assert folder_bytes(tmp_path / "again") == folder_bytes(out)
    # Used as a checkpoint it becomes the same store, here and from Python.
    cached = resolve(source)
    assert folder_bytes(cached) == folder_bytes(out)
    with LLM(source, precision="routed:3") as llm:
        assert llm.store.path == cached


def test_fast_rounds(tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tiny_checkpoint("olmoe"), tmp_path / "out"
    assert run(capsys, source, out, "--fast").splitlines()[0].endswith(f" into {out}, rounded.")
    convert(source, tmp_path / "again", source_name=str(source))
    assert folder_bytes(tmp_path / "again") == folder_bytes(out)
    assert folder_bytes(resolve(source, fast=True)) == folder_bytes(out)


def test_other_widths(tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_checkpoint("olmoe")
    said = run(capsys, source, tmp_path / "16", "--widths", "16", "--dense-bits", "16")
    assert said.splitlines()[0].endswith(f" into {tmp_path / '16'}.")
    assert StoredModel.open(tmp_path / "16").meta.quantiser == "round-to-nearest"
    assert run(capsys, source, tmp_path / "8", "--widths", "4,8")
    wide = StoredModel.open(tmp_path / "8")
    assert capacity.MAX_TRELLIS_WIDTH == MAX_TRELLIS_WIDTH  # what is simulated is what is made
    assert (wide.layout.code, wide.meta.quantiser.split(" (")[0]) == ("linear", "calibrated on default")


def copy_tokenizer(source: Path, target: Path) -> None:
    shutil.copy(source / "tokenizer.json", target)


def all_unknown(source: Path, target: Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"w": 0}, unk_token="w"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(target / "tokenizer.json"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (None, "for this model it has 1 of the 2048 tokens that are needed"),
        (copy_tokenizer, "it has tokens beyond the 64 that this model knows"),
        (all_unknown, "for this model most of it is one and the same token"),
    ],
)
def test_where_the_text_is_of_no_use_it_rounds_and_says_so(
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path, Path], None] | None,
    why: str,
) -> None:
    source, out = make_checkpoint(tmp_path / "tiny", vocab_size=64), tmp_path / "out"
    if change is not None:
        change(tiny_checkpoint("olmoe"), source)
    line = (
        f"The text that comes along cannot be used: {why}. The weights are rounded instead, as with --fast, to 2, 3 and"
        " 4 bits unless --widths names others."
    )
    assert line in run(capsys, source, out).splitlines()
    assert StoredModel.open(out).meta.quantiser == "round-to-nearest"
    said: list[str] = []
    assert StoredModel.open(resolve(source, on_status=said.append)).meta.quantiser == "round-to-nearest"
    assert said[-1] == line
    with pytest.raises(UsageError, match="which experts matter: give a text with --calibrate"):
        main.main(["convert", str(source), str(tmp_path / "cut"), "--max-size", "1MiB"])
    assert not (tmp_path / "cut").exists()


def test_a_text_that_was_named_is_not_replaced(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    text, source = tmp_path / "text.txt", make_checkpoint(tmp_path / "tiny", vocab_size=64)
    text.write_text("Too short.")
    for name in (str(text), "default"):
        with pytest.raises(UsageError, match="has 1 tokens, but at least 2048 are needed"):
            main.main(["convert", str(source), str(tmp_path / "out"), "--calibrate", name])
    copy_tokenizer(tiny_checkpoint("olmoe"), source)
    with pytest.raises(UsageError, match="has tokens beyond the 64 that the model knows: name another one"):
        main.main(["convert", str(source), str(tmp_path / "out"), "--calibrate", "default"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", [("--calibrate", "default"), ("--max-size", "9GiB")])
def test_fast_with_what_it_does_without_is_refused_before_anything_is_done(
    tmp_path: Path, other: tuple[str, str]
) -> None:
    with pytest.raises(UsageError) as caught:
        main.main(["convert", str(tmp_path / "missing"), str(tmp_path / "out"), "--fast", *other])
    what = {"--calibrate": "asks for", "--max-size": "goes by"}[other[0]]
    assert str(caught.value) == (
        f"--fast does without the calibration that {other[0]} {what}: leave one of the two out."
    )


def test_a_limit_of_the_size_goes_by_the_same_calibration(
    tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_checkpoint("olmoe")
    run(capsys, source, tmp_path / "whole")
    limit = sum(len(data) for data in folder_bytes(tmp_path / "whole").values()) - 20_000
    assert "Kept under the limit" in run(capsys, source, tmp_path / "cut", "--max-size", limit)
    whole, cut = StoredModel.open(tmp_path / "whole"), StoredModel.open(tmp_path / "cut")
    assert cut.meta.quantiser == whole.meta.quantiser
    assert sum(len(data) for data in folder_bytes(cut.path).values()) <= limit
    assert cut.experts_with(2) < whole.experts_with(2)


def test_the_progress_of_a_limited_conversion_ends_with_the_copies(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, seen = tiny_checkpoint("olmoe"), list[ConvertProgress]()
    text = calibration.by_default(source, print)
    whole = convert(source, tmp_path / "whole", calibration=text)
    limit = sum(len(data) for data in folder_bytes(whole.path).values()) - 20_000
    convert(source, tmp_path / "cut", calibration=text, max_size=limit, progress=seen.append)
    copies = [p for p in seen if "kept" in p.stage]
    assert [p.share for p in seen] == sorted(p.share for p in seen)
    assert all(p.share < 1 for p in seen[: seen.index(copies[0])])
    assert (copies[-1].share, copies[-1].seconds_left, copies[-1].done) == (1.0, 0.0, copies[-1].total)
