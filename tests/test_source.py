"""Names that `-m` may have, and every way for one to be wrong. The hub and the conversion are stood in for."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from moert.convert import calibration_text
from moert.errors import CheckpointError, MoertError, StoreError, UnsupportedModelError, UsageError
from moert.hub import resolve as source


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Calls of a converter that only makes moert.json."""
    monkeypatch.setenv("MOERT_CACHE", str(tmp_path / "cache"))
    calls: list[dict[str, object]] = []

    def convert(src: Path, out: Path, **options: object) -> None:
        calls.append({"src": src, "out": out, **options})
        out.mkdir(parents=True)
        (out / "moert.json").write_text("{}")

    monkeypatch.setitem(sys.modules, "moert.convert.convert", SimpleNamespace(convert=convert))  # type: ignore[arg-type]
    monkeypatch.setattr(calibration_text, "by_default", lambda checkpoint, say: "the text that comes along")
    return calls


def make_checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "olmoe"}')
    (folder / "model.safetensors").write_bytes(b"x")
    return folder


def test_a_store_is_itself(tmp_path: Path, conversions: list[dict[str, object]]) -> None:
    (tmp_path / "moert.json").write_text("{}")
    assert source.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(UsageError, match="converted already"):
        source.resolve(str(tmp_path), widths=(2, 4))
    with pytest.raises(UsageError, match="--fast have no effect"):
        source.resolve(str(tmp_path), fast=True)
    with pytest.raises(UsageError, match="is a store already"):
        source.checkpoint(str(tmp_path))
    assert not conversions


def test_a_checkpoint_is_converted_once_for_its_settings(tmp_path: Path, conversions: list[dict[str, object]]) -> None:
    folder = make_checkpoint(tmp_path / "tiny")
    said: list[str] = []
    assert source.find(folder, source.Conversion()) is None
    first = source.resolve(str(folder), on_status=said.append)
    assert first.parent == tmp_path / "cache"
    assert first.name.startswith("tiny-wauto-")
    assert len(said) == 1
    assert "once" in said[0]
    assert f"{first}, calibrated on {calibration_text.DEFAULT_TOKENS} tokens of the text that comes along" in said[0]
    assert conversions[0]["calibration"] == "the text that comes along"
    assert conversions[0]["resume"] is True
    assert source.resolve(folder, on_status=said.append, offline=True) == first
    assert source.find(folder, source.Conversion()) == first
    assert len(conversions) == len(said) == 1
    assert source.resolve(folder, widths=(16,), dense_bits=16) != first
    assert (conversions[1]["widths"], conversions[1]["dense_bits"], conversions[1]["group_size"]) == ((16,), 16, 64)
    assert conversions[1]["calibration"] is None  # there is nothing to choose
    os.utime(folder / "model.safetensors", (1, 1))  # another file of the same size
    assert source.resolve(folder) != first


def test_rounded_and_calibrated_stores_are_not_mixed_up(
    tmp_path: Path, conversions: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "tiny")
    # The name that a rounded conversion had before there were others.
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir())
    text = json.dumps([[str(folder.resolve()), files], [[2, 3, 4], 64, 8]])
    old = tmp_path / "cache" / f"tiny-w2.3.4-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    old.mkdir(parents=True)
    (old / "moert.json").write_text("{}")
    said: list[str] = []
    assert source.resolve(folder, fast=True, on_status=said.append) == old
    assert not said
    calibrated = source.resolve(folder, on_status=said.append)
    assert calibrated != old
    assert [call["out"] for call in conversions] == [calibrated]
    monkeypatch.setattr(calibration_text, "DEFAULT_TOKENS", 8192)
    assert source.resolve(folder, on_status=said.append) not in (old, calibrated)
    assert "8192 tokens" in said[-1]
    other = source.resolve(folder, fast=True, widths=(2, 4), on_status=said.append)
    assert said[-1].endswith(f"{other}, rounded.")
    assert conversions[-1]["calibration"] is None
    lossless = [source.cached_store(folder, source.Conversion((16,), fast=fast)) for fast in (False, True)]
    assert lossless[0] == lossless[1]


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MOERT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/h")
    assert source.cache_folder() == Path("/h/.cache/moert")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert source.cache_folder() == Path("/x/moert")
    monkeypatch.setenv("MOERT_CACHE", "~/m")
    assert source.cache_folder() == Path("/h/m")


def test_the_shipped_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(source, "__file__", str(tmp_path / "hub" / "resolve.py"))
    with pytest.raises(StoreError, match="no model of its own; name one with -m"):
        source.resolve(None)
    (tmp_path / "demo_model").mkdir()
    (tmp_path / "demo_model" / "moert.json").write_text("{}")
    said: list[str] = []
    assert source.resolve(None, on_status=said.append) == tmp_path / "demo_model"
    assert "comes with moert" in said[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "neither a store"),
        ("file", "is a file"),
        ("missing", "not a hub id"),
        ("a/b/c", "not a hub id"),
        ("../x", "not a hub id"),
        ("/missing/folder", "not a hub id"),
    ],
)
def test_what_is_no_model(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=message):
        source.resolve(name or str(tmp_path))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub that holds one olmoe checkpoint; `fail` is raised instead."""
    folder = make_checkpoint(tmp_path / "snapshot")
    state = SimpleNamespace(fail=None, calls=[], folder=folder)

    def get(what: str) -> object:
        def download(repo: str, *args: object, **options: object) -> str:
            state.calls.append((what, repo, options))
            if state.fail:
                raise state.fail
            return str(folder / "config.json" if what == "file" else folder)

        return download

    def architecture(config: dict[str, object]) -> None:
        if config["model_type"] != "olmoe":
            raise UnsupportedModelError("no")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", get("file"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", get("all"))
    registry = SimpleNamespace(architecture=architecture)
    monkeypatch.setitem(sys.modules, "moert.models.registry", registry)  # type: ignore[arg-type]
    monkeypatch.setattr("moert.models.registry", registry, raising=False)
    return state


def test_a_hub_id_is_downloaded_and_converted_once(hub: SimpleNamespace, conversions: list[dict[str, object]]) -> None:
    said: list[str] = []
    store = source.resolve("Owner/tiny-moe", on_status=said.append)
    assert store.name.startswith("Owner--tiny-moe-wauto-")
    assert [call[0] for call in hub.calls] == ["file", "all"]
    assert "*.safetensors" in hub.calls[1][2]["allow_patterns"]
    assert not any("bin" in pattern for pattern in hub.calls[1][2]["allow_patterns"])
    assert conversions[0]["src"] == hub.folder
    assert conversions[0]["source_name"] == "Owner/tiny-moe"
    assert "Downloading Owner/tiny-moe" in said[0]
    assert source.resolve("Owner/tiny-moe", offline=True) == store
    assert len(hub.calls) == 2


def test_offline_reaches_the_hub_client(hub: SimpleNamespace, conversions: list[dict[str, object]]) -> None:
    source.resolve("Owner/tiny-moe", offline=True)
    assert all(options["local_files_only"] for _, _, options in hub.calls)


def test_an_unsupported_model_is_refused_before_its_weights_come(hub: SimpleNamespace) -> None:
    (hub.folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UnsupportedModelError):
        source.checkpoint("o/m")
    assert len(hub.calls) == 1


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("fail", "offline", "message"),
    [
        (errors.GatedRepoError("gated", response=RESPONSE), False, "gated: accept its terms .* set HF_TOKEN"),
        (errors.RepositoryNotFoundError("404\nlong", response=RESPONSE), False, "no such model, or it is private"),
        (errors.LocalEntryNotFoundError("x"), True, "--offline forbids"),
        (errors.LocalEntryNotFoundError("x"), False, "cannot be reached"),
        (errors.EntryNotFoundError("x"), False, r"it has no config\.json"),
        (errors.HFValidationError("bad name"), False, "bad name"),
        (json.JSONDecodeError("broken", "", 0), False, "not valid"),
        (ConnectionError("no route\nat all"), False, "no route"),
        (OSError(28, "No space left on device"), False, "No space left"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    hub: SimpleNamespace, fail: Exception, offline: bool, message: str
) -> None:
    hub.fail = fail
    with pytest.raises(MoertError, match=message) as caught:
        source.checkpoint("o/m", offline=offline)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("Cannot get o/m from the Hugging Face hub: ")


def test_every_file_that_a_store_copies_is_downloaded() -> None:
    from moert.convert.plan import COPIED_FILES

    files = [*COPIED_FILES, "additional_chat_templates/tool_use.jinja", "LICENSE.txt", "NOTICE"]
    assert list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=source._HUB_FILES)) == files


def test_another_chat_template_makes_another_store(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny")
    (folder / "additional_chat_templates").mkdir()
    before = source.cached_store(folder, source.Conversion())
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    assert source.cached_store(folder, source.Conversion()) != before
