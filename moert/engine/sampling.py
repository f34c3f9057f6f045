"""Choosing the next token, and knowing when to stop. Knows nothing of models or tokenizers.

Order and meaning of the steps are those of Hugging Face transformers: repeat penalty, temperature, top-k, top-p, min-p,
draw.
"""

# V vocabulary, C candidates left after top-k

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moert.errors import MoertError, UsageError

_MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Settings of how tokens are drawn and when to stop.

    `temperature` 0 and `top_k` 1 are greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repeat_penalty` 1 are off. `seed`
    None draws a random one. Raises UsageError that names the field.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def check(name: str, kind: type, good: bool, want: str) -> None:
            value = getattr(self, name)
            kinds = (int, float) if kind is float else (kind,)
            number = isinstance(value, kinds) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not good:
                raise UsageError(f"{name} is {value!r}, but must be {want}.")

        def between(name: str, low: float, high: float) -> bool:
            value = getattr(self, name)
            return isinstance(value, (int, float)) and low <= value <= high

        check("temperature", float, between("temperature", 0, math.inf), "a number from 0")
        check("top_k", int, between("top_k", 0, math.inf), "a whole number from 0 (0: off)")
        check("top_p", float, between("top_p", 0, 1) and self.top_p > 0, "a number above 0 and up to 1")
        check("min_p", float, between("min_p", 0, 1), "a number from 0 to 1")
        check("repeat_penalty", float, between("repeat_penalty", 0, math.inf) and self.repeat_penalty > 0, "above 0")
        check("max_tokens", int, between("max_tokens", 1, math.inf), "a whole number from 1")
        if self.seed is not None:
            check("seed", int, between("seed", 0, _MAX_SEED), "a whole number from 0 to 2**63 - 1")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise UsageError(f"stop is {self.stop!r}, but must be a sequence of strings that are not empty.")
        object.__setattr__(self, "stop", tuple(self.stop))

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """The defaults that a checkpoint's generation_config.json asks for; what it leaves out keeps ours.

        A value that cannot be used keeps ours too: `usable_fields` says which ones.
        """
        return cls(**usable_fields(config)[0])

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


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
        self.params = params
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


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
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
