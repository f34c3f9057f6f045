"""Checks prompts and sampling parameters as callers of the Python interface give them. Does not tokenize."""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypeGuard

from moert.engine.sampling import ResolvedParams, SamplingParams
from moert.errors import UsageError

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None


def as_model(model: Any) -> str | None:
    """Read the name of a model: None, or text or a path as text."""
    text = os.fspath(model) if isinstance(model, os.PathLike) else model
    if text is not None and not isinstance(text, str):
        raise UsageError(f"model is {_kind(model)}, but must be a folder or a hub id such as 'owner/name'.")
    return text


def as_prompts(prompts: Any) -> list[Prompt]:
    """List the prompts that a caller gave: text or token ids are one prompt, a sequence of such is several."""
    prompts = _as_list(prompts)
    if isinstance(prompts, str) or (prompts and _are_tokens(prompts)):
        return [as_prompt(prompts)]
    if not _is_sequence(prompts):
        raise UsageError(f"prompts is {_kind(prompts)}, but must be text, a list of token ids, or a list of these.")
    if len(prompts) == 1:
        return [as_prompt(prompts[0])]
    return [as_prompt(prompt, f"Prompt {i} of {len(prompts)}") for i, prompt in enumerate(prompts, 1)]


def as_prompt(prompt: Any, what: str = "The prompt") -> Prompt:
    """Read one prompt: text, or token ids as a list, an array or a tensor."""
    prompt = _as_list(prompt)
    if isinstance(prompt, str):
        return prompt
    if not _is_sequence(prompt):
        raise UsageError(f"{what} is {_kind(prompt)}, but must be text or a list of token ids.")
    if not _are_tokens(prompt):
        wrong = next(token for token in prompt if not _is_token(token))
        raise UsageError(f"{what} holds {_kind(wrong)} among its token ids, which must be whole numbers.")
    return [int(token) for token in prompt]


def as_params(params: Any, count: int, defaults: ResolvedParams) -> list[ResolvedParams]:
    """List the sampling parameters of `count` prompts, given for all of them or one for each."""
    if params is None or isinstance(params, SamplingParams):
        return [as_one_params(params, defaults)] * count
    if not _is_sequence(params):
        raise UsageError(f"params is {_kind(params)}, but must be SamplingParams, or a list with one for each prompt.")
    if len(params) != count:
        prompts = f"is {count} prompt" if count == 1 else f"are {count} prompts"
        raise UsageError(f"There {prompts}, but {len(params)} sampling parameters: give one for each.")
    return [as_one_params(each, defaults) for each in params]


def as_one_params(params: Any, defaults: ResolvedParams) -> ResolvedParams:
    """Read the sampling parameters of one prompt, and fill what is left open from `defaults`."""
    if params is None:
        return defaults
    if not isinstance(params, SamplingParams):
        raise UsageError(f"params is {_kind(params)}, but must be SamplingParams, as in SamplingParams(max_tokens=9).")
    return params.resolve(defaults)


def _as_list(value: Any) -> Any:
    """Turn arrays and tensors into lists."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value


def _is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _is_token(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _are_tokens(value: Any) -> bool:
    return _is_sequence(value) and all(map(_is_token, value))


def _kind(value: Any) -> str:
    """Name a wrong value: itself if it is short, else its type."""
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
