"""Typed reads of a config.json: a value of the wrong type or range is refused by name, never converted.

A default here is the one that transformers documents for the family; the families pass it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moert.errors import UnsupportedModelError
from moert.models.architecture import Rope

_REQUIRED = object()


class ConfigFields:
    """The fields of `config`, a family's config.json (or a mapping inside it, which `where` names)."""

    def __init__(self, config: Mapping[str, Any], model_type: str, where: str = "") -> None:
        self._config, self.model_type, self._where = config, model_type, where

    def refusal(self, reason: str) -> UnsupportedModelError:
        """The error to raise for a variant that is not supported."""
        return UnsupportedModelError(f"This {self.model_type} variant is not supported: {reason}.")

    def _read(self, name: str, default: Any) -> Any:
        value = self._config.get(name, default)
        if value is _REQUIRED:
            raise self.refusal(f"{self._where}{name} is missing from its configuration")
        return value

    def _wrong(self, name: str, value: Any, expected: str) -> UnsupportedModelError:
        return self.refusal(f"{self._where}{name} is {value!r:.80}, not {expected}")

    def __contains__(self, name: str) -> bool:
        return self._config.get(name) is not None

    def integer(self, name: str, default: Any = _REQUIRED, minimum: int = 1) -> int:
        value = self._read(name, default)
        if type(value) is not int or value < minimum:
            raise self._wrong(name, value, f"a whole number from {minimum}")
        return value

    def optional_integer(self, name: str, default: int | None, minimum: int = 1) -> int | None:
        return None if self._read(name, default) is None else self.integer(name, default, minimum)

    def number(self, name: str, default: Any = _REQUIRED, minimum: float = 0.0) -> float:
        """A finite number above `minimum`."""
        value = self._read(name, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= minimum:
            raise self._wrong(name, value, f"a number above {minimum:g}")
        return float(value)

    def optional_number(self, name: str, default: float | None = None) -> float | None:
        return None if self._read(name, default) is None else self.number(name, default)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._read(name, default)
        if type(value) is not bool:
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self._read(name, default)
        if type(value) is not str:
            raise self._wrong(name, value, "a text")
        return value

    def optional_list(self, name: str, of: type) -> list[Any] | None:
        value = self._read(name, None)
        if value is not None and not (type(value) is list and all(type(item) is of for item in value)):
            raise self._wrong(name, value, f"a list of {of.__name__}")
        return value  # type: ignore[no-any-return]

    def mapping(self, name: str) -> dict[str, Any]:
        """The mapping `name`; empty where it is missing or null."""
        value = self._read(name, None)
        if value is not None and type(value) is not dict:
            raise self._wrong(name, value, "a mapping")
        return value or {}

    def head_dim(self, num_heads: int, hidden_size: int) -> int:
        if "head_dim" in self:
            return self.integer("head_dim")
        if hidden_size % num_heads:
            raise self.refusal(f"hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({num_heads})")
        return hidden_size // num_heads

    def num_experts(self, name: str, alias: str, default: int) -> int:
        """transformers has renamed this field: accept both names, but not two numbers."""
        if alias not in self:
            return self.integer(name, default)
        count = self.integer(alias)
        if self.integer(name, count) != count:
            raise self.refusal(f"{name} and {alias} differ")
        return count

    def activation(self) -> str:
        """hidden_act; `swish` is another name of `silu`."""
        name = self.text("hidden_act", "silu")
        return "silu" if name == "swish" else name

    def check_layer_types(self, windows: tuple[int | None, ...]) -> None:
        """Refuse a layer_types that says something else than the windows that the family derives."""
        expected = ["full_attention" if window is None else "sliding_attention" for window in windows]
        if self.optional_list("layer_types", str) not in (None, expected):
            raise self.refusal("its layer_types do not agree with its sliding window")

    def check_unquantised(self) -> None:
        """Refuse checkpoints whose weights are already quantised."""
        for name in ("quantization_config", "compression_config"):
            if name in self:
                method = self.mapping(name).get("quant_method", "an unnamed method")
                raise self.refusal(
                    f"its weights are already quantised ({name}: {method}), so convert the original checkpoint instead"
                )

    def rope(self, default_theta: float, max_positions: int) -> Rope:
        """Both spellings: `rope_scaling` with `rope_theta` beside it, and `rope_parameters` with everything inside."""
        where = "rope_scaling" if self.mapping("rope_scaling") else "rope_parameters"
        inner = self.mapping(where)
        if any(type(value) is dict for value in inner.values()):
            raise self.refusal(f"{where} differ from layer type to layer type")
        values: dict[str, Any] = {
            "rope_theta": self._config.get("rope_theta", default_theta),
            "partial_rotary_factor": self._config.get("partial_rotary_factor"),
            "rope_type": inner.get("type", "default"),
            **inner,
        }
        if "original_max_position_embeddings" in self:
            values["original_max_position_embeddings"] = self._config["original_max_position_embeddings"]
        fields = ConfigFields(values, self.model_type, f"{where}." if inner else "")
        if fields.optional_number("partial_rotary_factor") not in (None, 1.0):
            raise self.refusal(f"partial_rotary_factor is {values['partial_rotary_factor']!r}, not 1")
        return fields._rope(max_positions)

    def _rope(self, max_positions: int) -> Rope:
        kind, theta = self.text("rope_type", "default"), self.number("rope_theta", minimum=1.0)
        if kind == "default":
            return Rope("default", theta)
        if kind not in ("linear", "dynamic", "yarn", "llama3"):
            raise self.refusal(f"{self._where}rope_type is {kind!r}, not default, linear, dynamic, yarn or llama3")
        original = self.integer("original_max_position_embeddings", max_positions)
        if kind == "yarn" and "factor" not in self:
            factor = max_positions / original
        else:
            factor = self.number("factor")
        if factor < 1:
            raise self._wrong("factor", factor, "a number from 1")
        if kind == "linear":
            return Rope("linear", theta, factor)
        if kind == "dynamic":
            return Rope("dynamic", theta, factor, original_max_positions=max_positions)
        if kind == "llama3":
            low, high = self.number("low_freq_factor"), self.number("high_freq_factor")
            if high <= low:
                raise self._wrong("high_freq_factor", high, f"above low_freq_factor ({low})")
            return Rope(
                "llama3", theta, factor, original_max_positions=original, low_freq_factor=low, high_freq_factor=high
            )
        return Rope(
            "yarn",
            theta,
            factor,
            attention_factor=self._yarn_attention_factor(factor),
            original_max_positions=original,
            beta_fast=self.optional_number("beta_fast") or 32.0,
            beta_slow=self.optional_number("beta_slow") or 1.0,
            truncate=self.boolean("truncate", True),
        )

    def _yarn_attention_factor(self, factor: float) -> float:
        """The factor on cos and sin that the YaRN paper recommends, unless the configuration gives its own."""
        given = self.optional_number("attention_factor")
        if given is not None:
            return given
        log = math.log(factor)
        mscale = self.number("mscale", minimum=-1.0) if "mscale" in self else 0.0
        mscale_all_dim = self.number("mscale_all_dim", minimum=-1.0) if "mscale_all_dim" in self else 0.0
        if mscale and mscale_all_dim:
            return (0.1 * mscale * log + 1.0) / (0.1 * mscale_all_dim * log + 1.0)
        return 0.1 * log + 1.0
