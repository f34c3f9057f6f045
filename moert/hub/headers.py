"""Names, types and shapes of a checkpoint's tensors without its weights: from the hub, or of models known by name.

From the hub come config.json and, by range requests, the headers of the safetensors files. known_models.json has both
of a few public models: a line [dtype, name, sizes ...] stands for as many tensors as the braces in its name say,
{0-47} for numbers and {q|k} for alternatives. All errors are CheckpointError.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from moert.checkpoints.safetensors import Checkpoint, TensorInfo, read_json
from moert.errors import CheckpointError
from moert.hub.resolve import hub_error
from moert.store.layout import CONFIG_FILE, HEAD

_BRACES = re.compile(r"\{([^}]*)\}")
_KNOWN_PREFIX = "known:"


def from_hub(repo: str) -> Checkpoint:
    """A checkpoint on the hub of which only the headers are here: reading a tensor fails."""
    import huggingface_hub as hub

    try:
        config = read_json(Path(hub.hf_hub_download(repo, CONFIG_FILE)))
        found = hub.get_safetensors_metadata(repo)
    except CheckpointError:
        raise
    except Exception as error:  # the HTTP library's errors differ between versions of the hub client
        raise hub_error(repo, False, error) from error
    tensors = {}
    for file, metadata in found.files_metadata.items():
        for name, info in metadata.tensors.items():
            if found.weight_map.get(name) == file:  # the index decides: files may hold leftovers that it does not name
                begin, end = info.data_offsets
                tensors[name] = TensorInfo(name, Path(repo, file), info.dtype, tuple(info.shape), begin, end - begin)
    if config.get("tie_word_embeddings") is True:  # whether a head beside it is the same cannot be seen from here
        tensors.pop(HEAD, None)
    return Checkpoint(Path(repo), config, (), tensors)


def find_known(model: str) -> str | None:
    """The hub id of the known model that `model` names: `known:NAME`, NAME, or the id; case does not matter.

    None where it is none; CheckpointError for a `known:NAME` that is none.
    """
    wanted = model.removeprefix(_KNOWN_PREFIX).lower()
    found = next((name for name in _known() if wanted in (name.lower(), name.split("/")[1].lower())), None)
    if found is None and model.startswith(_KNOWN_PREFIX):
        names = ", ".join(name.split("/")[1] for name in _known())
        raise CheckpointError(f"There is no known model {model.removeprefix(_KNOWN_PREFIX)!r:.80}; there are {names}.")
    return found


def known_model(name: str) -> Checkpoint:
    """Return the headers of a known model; KeyError for another name."""
    model = _known()[name]
    tensors = {}
    for dtype, pattern, *shape in model["tensors"]:
        for tensor in _expand(pattern):
            tensors[tensor] = TensorInfo(tensor, Path(name), dtype, tuple(shape), 0, math.prod(shape))
    return Checkpoint(Path(name), model["config"], (), tensors)


@cache
def _known() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_name("known_models.json").read_bytes())
    return found


def _expand(pattern: str) -> Iterator[str]:
    """Every name that a pattern stands for."""
    parts = _BRACES.split(pattern)
    for choice in itertools.product(*map(_choices, parts[1::2])):
        yield "".join(itertools.chain.from_iterable(itertools.zip_longest(parts[::2], choice, fillvalue="")))


def _choices(text: str) -> list[str]:
    if "|" in text:
        return text.split("|")
    first, _, last = text.partition("-")
    return [str(n) for n in range(int(first), int(last) + 1)]
