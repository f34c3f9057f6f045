"""Answers as they grow: tokens to text, and reasons to end. Does not run the model."""

# V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from moert.engine.sampling import ResolvedParams, Sampler, StopMatcher
from moert.engine.statistics import GenerationStats
from moert.errors import MoertError
from moert.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of an answer as it is made. finish_reason is None until the last piece: `stop` or `length`.

    Among several prompts it can be `error`: then `error` says why this one broke off.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    stats: GenerationStats
    error: MoertError | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. finish_reason: `stop` (end token or stop string) or `length` (max_tokens or context full).

    Among several prompts it can be `error`: then `error` says why this one broke off, and the rest is what there was.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: GenerationStats
    error: MoertError | None = None


class Answer:
    """What follows a prompt, token by token, until there is a reason to end."""

    def __init__(self, params: ResolvedParams, tokenizer: Tokenizer) -> None:
        self._params, self._sampler, self._eos_ids = params, Sampler(params), tokenizer.eos_ids
        self._detokenizer, self._matcher = tokenizer.detokenizer(), StopMatcher(params.stop)
        self._new: list[int] = []
        self.seed = self._sampler.seed
        self.count = 0
        self.latest = -1

    def take(self, logits: Tensor, history: Sequence[int], ctx_size: int) -> tuple[str, str | None]:
        """The next token from logits [V] behind `history`: text that is now certain, and the reason to end, if any."""
        token = self._sampler(logits, history)
        self.latest = token
        self.count += 1
        self._new.append(token)
        ended = token in self._eos_ids and not self._params.ignore_eos
        text = "" if ended else self._matcher.push(self._detokenizer.push(token))
        full = self.count >= self._params.max_tokens or len(history) + 1 > ctx_size
        stop = ended or self._matcher.stopped
        if not stop and not full:
            return text, None
        if not self._matcher.stopped:
            text += self._matcher.push(self._detokenizer.flush())
            text += self._matcher.flush()
            stop = stop or self._matcher.stopped
        return text, "stop" if stop else "length"

    def unsaid(self) -> list[int]:
        """The tokens since the last call."""
        new, self._new = self._new, []
        return new


def join(pieces: Iterator[Chunk]) -> Completion:
    """The whole answer."""
    text, ids = "", []
    for piece in pieces:
        text += piece.text
        ids += piece.token_ids
    assert piece.finish_reason is not None
    return Completion(text, ids, piece.finish_reason, piece.stats, piece.error)
