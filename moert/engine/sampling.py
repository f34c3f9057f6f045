"""Choosing the next token, and knowing when to stop. Knows nothing of models or tokenizers.

Order and meaning of the steps are those of Hugging Face transformers: repeat penalty, temperature, top-k, top-p, min-p,
draw.
"""

# V vocabulary, C candidates left after top-k

from __future__ import annotations

import dataclasses
import math
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Self

import torch
from torch import Tensor

from moert.errors import MoertError, UsageError

_MAX_SEED = 2**63 - 1
_MAX_COUNT = 2**31 - 1
_COLD = 1e-5  # a temperature below always draws the likeliest token, and dividing by it would overflow


def _number(name: str, value: Any, low: float, high: float, want: str) -> float:
    if isinstance(value, Real) and not isinstance(value, bool):
        number = int(value) if isinstance(value, Integral) else float(value)
        if low <= number <= high:  # false for NaN
            return float(number)
    raise UsageError(f"{name} is {value!r}, but must be {want}.")


def _whole(name: str, value: Any, low: int, high: int, want: str) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high:
        return int(value)
    raise UsageError(f"{name} is {value!r}, but must be {want}.")


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(s, str) and s for s in value):
        return tuple(value)
    raise UsageError(f"{name} is {value!r}, but must be a list of strings that are not empty.")


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise UsageError(f"{name} is {value!r}, but must be True or False.")


_LEAST, _MOST = 5e-324, sys.float_info.max
_READ: dict[str, Callable[[str, Any], Any]] = {
    "temperature": lambda n, v: _number(n, v, 0, _MOST, "a number from 0"),
    "top_k": lambda n, v: _whole(n, v, 0, _MAX_COUNT, "a whole number from 0 (0: off)"),
    "top_p": lambda n, v: _number(n, v, _LEAST, 1, "a number above 0 and up to 1"),
    "min_p": lambda n, v: _number(n, v, 0, 1, "a number from 0 to 1"),
    "repeat_penalty": lambda n, v: _number(n, v, _LEAST, _MOST, "a number above 0"),
    "seed": lambda n, v: _whole(n, v, 0, _MAX_SEED, "a whole number from 0 to 2**63 - 1"),
    "max_tokens": lambda n, v: _whole(n, v, 1, _MAX_COUNT, "a whole number from 1"),
    "stop": _strings,
    "ignore_eos": _flag,
}


@dataclass(frozen=True, slots=True, repr=False)
class SamplingParams:
    """Settings of how tokens are drawn and when to stop; None leaves a field to the model, or else to moert.

    `temperature` 0 and `top_k` 1 are greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repeat_penalty` 1 are off. `seed`
    None draws a random one. Raises UsageError that names the field.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: Sequence[str] | None = None
    ignore_eos: bool | None = None

    def __post_init__(self) -> None:
        for name, read in _READ.items():
            value = getattr(self, name)
            if value is not None or (name != "seed" and isinstance(self, ResolvedParams)):
                object.__setattr__(self, name, read(name, value))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.given().items())})"

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> Self:
        """Read what a checkpoint's generation_config.json asks for; the rest is left open.

        So is a value that cannot be used: `usable_fields` says which ones.
        """
        return cls(**usable_fields(config)[0])

    def given(self) -> dict[str, Any]:
        """Return the fields that are set."""
        return {name: value for name in _READ if (value := getattr(self, name)) is not None}

    def replace(self, **changes: Any) -> Self:
        """Copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def resolve(self, defaults: ResolvedParams | None = None) -> ResolvedParams:
        """Fill what is left open from `defaults`, a model's own, or else from moert's."""
        if isinstance(self, ResolvedParams):
            return self
        return (defaults or ResolvedParams()).replace(**self.given())


@dataclass(frozen=True, slots=True, repr=False)
class ResolvedParams(SamplingParams):
    """Sampling parameters with every field set (but `seed`, where None is random); the defaults are moert's."""

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature < _COLD or self.top_k == 1


def usable_fields(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of SamplingParams that a generation_config.json gives, and a warning for each unusable one."""
    fields, warnings = {}, []
    for name, value in _generation_fields(config).items():
        try:
            SamplingParams(**{name: value})
        except (UsageError, TypeError) as error:
            reason = str(error) if isinstance(error, UsageError) else f"{name} is {value!r}."
            warnings.append(f"A default in generation_config.json cannot be used: {reason[:-1]}; moert's own is used.")
        else:
            fields[name] = value
    return fields, warnings


def _generation_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    names = {"repetition_penalty": "repeat_penalty", "max_new_tokens": "max_tokens", "stop_strings": "stop"}
    names |= {name: name for name in ("temperature", "top_k", "top_p", "min_p")}
    found = {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
    if found.get("top_k") == -1:  # other programs' way to say off, as 0 and null are transformers'
        found["top_k"] = 0
    if config.get("do_sample") is False:
        found["temperature"] = 0.0
    if isinstance(found.get("stop"), str):
        found["stop"] = (found["stop"],)
    return found


class Sampler:
    """Draws tokens with a generator of its own: the same `seed` and logits give the same tokens."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params = params.resolve()
        self.seed = secrets.randbits(32) if params.seed is None else params.seed
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, logits: Tensor, history: Sequence[int]) -> int:
        """The next token. `logits` [V] float32 stays as it is; `history` is all tokens so far, the prompt included."""
        p = self.params
        if p.repeat_penalty != 1 and len(history):
            logits = penalise(logits, history, p.repeat_penalty)
        if not math.isfinite(float(logits.max())):  # max propagates NaN
            raise MoertError("The model's output is not finite, so no token can be chosen; are its weights damaged?")
        if p.greedy:
            return int(logits.argmax())
        values, ids = candidates(logits / p.temperature, p)
        choice = torch.multinomial(values.softmax(0), 1, generator=self._generator)
        return int(choice if ids is None else ids[choice])


def penalise(logits: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """A copy of `logits` [V] with every token that `history` names made less likely by `penalty`."""
    ids = torch.tensor(list(set(history)), dtype=torch.int64)
    seen = logits[ids]
    return logits.index_put((ids,), torch.where(seen < 0, seen * penalty, seen / penalty))


def candidates(logits: Tensor, params: ResolvedParams) -> tuple[Tensor, Tensor | None]:
    """Return what top-k, top-p and min-p leave of `logits` [V]: values [C] and token ids [C] (None: all of them, in
    order).
    """
    ids: Tensor | None = None
    if 0 < params.top_k < len(logits):
        # Tokens as likely as the last of the k stay in. Done first, so that top-p sorts few values.
        ids = (logits >= logits.topk(params.top_k).values[-1]).nonzero()[:, 0]
        logits = logits[ids]
    if params.top_p < 1:
        ordered, order = logits.sort()
        keep = ordered.softmax(0).cumsum(0) > 1 - params.top_p
        keep[-1] = True
        logits, order = ordered[keep], order[keep]
        ids = order if ids is None else ids[order]
    if params.min_p > 0:
        probabilities = logits.softmax(0)
        keep = probabilities >= params.min_p * probabilities.max()
        ids = keep.nonzero()[:, 0] if ids is None else ids[keep]
        logits = logits[keep]
    return logits, ids


class StopMatcher:
    """Cuts streamed text before a stop string, however the text is divided into pieces.

    Text that could still become a stop string is held back. Of several stop strings the one that is complete first
    counts; of those that end together, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take the next piece; return what may be shown. After a match `stopped` is True and nothing more comes."""
        if self.stopped:
            return ""
        text = self._held + text
        matches = [(start + len(s), start) for s in self._stops if (start := text.find(s)) >= 0]
        if matches:
            self.stopped, self._held = True, ""
            return text[: min(matches)[1]]
        hold = max((_overlap(text, s) for s in self._stops), default=0)
        shown = len(text) - hold
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """The text still held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
