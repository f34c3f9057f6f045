"""Find the model that `-m` names, a store, a checkpoint folder or a hub id, and make it into a store folder.

Checkpoints are converted once, into the cache folder; the name there follows from the model and the settings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from moert.config import cache_folder
from moert.convert import calibration_text
from moert.convert.widths import AUTO_WIDTHS, DEFAULT_WIDTHS
from moert.errors import CheckpointError, MoertError, StoreError, UsageError

if TYPE_CHECKING:
    from moert.convert.convert import ConvertProgress

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",  # in folders too: a star of the hub client's patterns matches slashes
    "*.model",
    "merges.txt",
    "vocab.txt",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
]
_META_FILE, _CONFIG_FILE = "moert.json", "config.json"
_RAW_WIDTH = 16

Status = Callable[[str], None]


@dataclass(frozen=True)
class Conversion:
    """Settings of a conversion. fast: experts are rounded, where a text would otherwise choose their codes.

    widths: None if they are chosen from AUTO_WIDTHS by what the whole model loses at each.
    """

    widths: tuple[int, ...] | None = None
    group_size: int = 64
    dense_bits: int = 8
    fast: bool = False

    @classmethod
    def of(
        cls, widths: Sequence[int] | None, group_size: int | None, dense_bits: int | None, fast: bool = False
    ) -> Conversion:
        """The settings given, and the defaults for those that are None."""
        default = cls()
        return cls(
            (DEFAULT_WIDTHS if fast else None) if widths is None else tuple(widths),
            default.group_size if group_size is None else group_size,
            default.dense_bits if dense_bits is None else dense_bits,
            fast,
        )

    @property
    def most_widths(self) -> tuple[int, ...]:
        """The widths that the store may get."""
        return self.widths or AUTO_WIDTHS

    @property
    def calibrated(self) -> bool:
        """Whether the experts are calibrated if no text is named: those of 16 bits stay as they are."""
        return not self.fast and self.widths != (_RAW_WIDTH,)

    def how(self, text: str | None = None) -> str:
        """Say what the experts' codes are chosen by, as the end of a sentence; text: the file that was named."""
        if text is not None:
            return f", calibrated on {text}"
        if self.calibrated:
            tokens = f"{calibration_text.DEFAULT_TOKENS} tokens of the text that comes along"
            return f", calibrated on {tokens} (--fast: rounded, in a fraction of the time)"
        return ", rounded" if self.fast and self.widths != (_RAW_WIDTH,) else ""

    def __str__(self) -> str:
        widths = f"those of {_listed(AUTO_WIDTHS)} that pay" if self.widths is None else _listed(self.widths)
        return f"widths {widths}, groups of {self.group_size}, dense {self.dense_bits} bits"


def _listed(widths: Sequence[int]) -> str:
    return ",".join(map(str, widths))


def shipped_model() -> Path:
    """The store of the small model that comes with the package. Raises StoreError if this build has none."""
    path = Path(__file__).parents[1] / "demo_model"
    if not (path / _META_FILE).is_file():
        raise StoreError("This installation of moert has no model of its own; name one with -m.")
    return path


def is_store(path: Path) -> bool:
    return (path / _META_FILE).is_file()


def resolve(
    model: str | Path | None,
    *,
    offline: bool = False,
    widths: Sequence[int] | None = None,
    group_size: int | None = None,
    dense_bits: int | None = None,
    fast: bool = False,
    on_status: Status | None = None,
    progress: Callable[[ConvertProgress], None] | None = None,
) -> Path:
    """The store folder of `model`; None is the shipped model. Converts a checkpoint into the cache if it must.

    The settings are those of a conversion, and refused for a store. `on_status` is told before anything long begins.
    Raises UsageError, StoreError, CheckpointError, UnsupportedModelError.
    """
    say = on_status or (lambda text: None)
    if model is None:
        say("No model is named with -m: using the small one that comes with moert.")
    folder = shipped_model() if model is None else Path(model).expanduser()
    if is_store(folder):
        if fast or any(setting is not None for setting in (widths, group_size, dense_bits)):
            raise UsageError(
                f"{folder} is converted already: --widths, --group-size, --dense-bits and --fast have no effect on it."
            )
        return folder
    assert model is not None
    settings = Conversion.of(widths, group_size, dense_bits, fast)
    if found := find(model, settings):
        return found
    store = cached_store(model, settings)
    source = checkpoint(model, offline=offline, on_status=say)
    say(f"Converting {model} once ({settings}) into {store}{settings.how()}.")
    from moert.convert.convert import convert

    convert(
        source,
        store,
        widths=settings.widths,
        group_size=settings.group_size,
        dense_bits=settings.dense_bits,
        resume=True,
        progress=progress,
        calibration=calibration_text.by_default(source, say) if settings.calibrated else None,
        source_name=str(model),
    )
    return store


def find(model: str | Path | None, settings: Conversion) -> Path | None:
    """The store of `model` if there is one already: itself, or in the cache."""
    folder = shipped_model() if model is None else Path(model).expanduser()
    candidates = [folder] if model is None else [folder, cached_store(model, settings)]
    return next((path for path in candidates if is_store(path)), None)


def cached_store(model: str | Path, settings: Conversion) -> Path:
    """Return where the cache keeps `model` converted with `settings`, whether it is there or not."""
    folder = Path(model).expanduser()
    identity: list[Any] = [str(model)]
    if folder.is_dir():
        files = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".json", ".jinja")]
        files = sorted([*files, *folder.glob("additional_chat_templates/*.jinja")])
        identity = [str(folder.resolve()), [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]]
    # As it was before anything was calibrated by default, for stores that are rounded: they are found again.
    how = ["calibrated", calibration_text.DEFAULT_TOKENS] if settings.calibrated else []
    text = json.dumps([identity, [*astuple(settings)[:3], *how]])
    name = folder.resolve().name if folder.is_dir() else str(model).replace("/", "--")
    widths = ".".join(map(str, settings.widths or ["auto"]))
    return cache_folder() / f"{name}-w{widths}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def warm_file(store: Path, precision: str) -> Path:
    """Return where the cache keeps which experts of a store were in memory at the end of a run, for each precision."""
    identity = json.dumps([str(store.resolve()), precision])
    return cache_folder() / "warm" / f"{store.resolve().name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.json"


def is_hub_id(model: str | Path) -> TypeGuard[str]:
    """Tell whether `model` has the form owner/name."""
    return isinstance(model, str) and _HUB_ID.fullmatch(model) is not None


def checkpoint(model: str | Path, *, offline: bool = False, on_status: Status | None = None) -> Path:
    """The checkpoint folder that `model` names, downloaded from the hub if it is an id and not here yet."""
    folder = Path(model).expanduser()
    if is_store(folder):
        raise UsageError(f"{folder} is a store already: name the checkpoint that it was made from.")
    if (folder / _CONFIG_FILE).is_file():
        return folder
    if folder.is_dir():
        raise CheckpointError(f"{folder} is neither a store (no {_META_FILE}) nor a checkpoint (no {_CONFIG_FILE}).")
    if folder.exists():
        raise CheckpointError(f"{folder} is a file, but a model is a folder: a store or a Hugging Face checkpoint.")
    if not is_hub_id(model):
        raise CheckpointError(f"There is no folder {folder}, and it is not a hub id (owner/name) either.")
    return _download(model, offline, on_status or (lambda text: None))


def _download(repo: str, offline: bool, say: Status) -> Path:
    import huggingface_hub as hub

    from moert.models import registry

    if not offline:
        say(f"Downloading {repo} from the Hugging Face hub (files that are here already are kept).")
    try:
        # The small file first: a model that cannot be used is refused before its gigabytes come.
        config = Path(hub.hf_hub_download(repo, _CONFIG_FILE, local_files_only=offline))
        registry.architecture(json.loads(config.read_text(encoding="utf-8")))
        return Path(hub.snapshot_download(repo, allow_patterns=_HUB_FILES, local_files_only=offline))
    except MoertError:
        raise
    except Exception as error:  # the HTTP library's errors differ between versions of the hub client
        raise hub_error(repo, offline, error) from error


def downloaded(repo: str) -> Path:
    """The checkpoint folder of a hub id, if it was downloaded before; no network is used. Raises CheckpointError."""
    import huggingface_hub as hub

    try:
        return Path(hub.snapshot_download(repo, allow_patterns=_HUB_FILES, local_files_only=True))
    except Exception as error:
        raise hub_error(repo, True, error) from error


def hub_error(repo: str, offline: bool, error: Exception) -> CheckpointError:
    """Make the error that a user is shown where the hub client raised `error` for `repo`."""
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            reason = f"it is gated: accept its terms at https://huggingface.co/{repo} and set HF_TOKEN"
        case errors.RepositoryNotFoundError():
            reason = "the hub has no such model, or it is private and HF_TOKEN is not set to a token that may read it"
        case errors.LocalEntryNotFoundError():
            reason = "it is not in the local cache, and "
            reason += (
                "--offline forbids to download it" if offline else "the hub cannot be reached (is there a network?)"
            )
        case errors.EntryNotFoundError():
            reason = f"it has no {_CONFIG_FILE}, so it is not a Hugging Face checkpoint"
        case errors.NotASafetensorsRepoError():
            reason = "it has no weights in safetensors files (model.safetensors, or several with an index)"
        case errors.SafetensorsParsingError():
            reason = f"the header of one of its safetensors files is malformed ({_first_line(error)})"
        case _ if re.search("Connect|Network|Timeout", type(error).__name__):  # of whichever HTTP library it uses
            reason = f"the hub cannot be reached ({_first_line(error)})"
        case ValueError():
            reason = f"its name or its {_CONFIG_FILE} is not valid ({_first_line(error)})"
        case _:
            reason = _first_line(error)
    return CheckpointError(f"Cannot get {repo} from the Hugging Face hub: {reason}.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
