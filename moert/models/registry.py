"""The model families, by the `model_type` of config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moert.errors import UnsupportedModelError
from moert.models import mixtral, olmoe, qwen2_moe, qwen3_moe
from moert.models.architecture import Architecture


@dataclass(frozen=True)
class Family:
    """The way to read checkpoints of one `model_type`.

    `canonical_name` maps a tensor's name in the checkpoint to the canonical one, or to None if it is not needed; a
    name that it does not know comes back as it is.
    """

    model_type: str
    parse_config: Callable[[Mapping[str, Any]], Architecture]
    canonical_name: Callable[[str], str | None]


FAMILIES = {
    model_type: Family(model_type, module.parse_config, module.canonical_name)
    for model_type, module in (
        ("mixtral", mixtral),
        ("olmoe", olmoe),
        ("qwen2_moe", qwen2_moe),
        ("qwen3_moe", qwen3_moe),
    )
}


def family(model_type: object) -> Family:
    """The family of `model_type`. Raises UnsupportedModelError, which names the supported ones."""
    found = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        raise UnsupportedModelError(
            f"The model type {model_type!r:.80} is not supported; supported are {', '.join(FAMILIES)}."
        )
    return found


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json describes. Raises UnsupportedModelError."""
    return family(config.get("model_type")).parse_config(config)
