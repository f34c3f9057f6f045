"""Who takes part in the next step: first come, first served within two priorities, and nobody waits for ever.

A step takes one token of each of some sequences whose prompts are read, and chunks of prompts beside them: weights are
read once for all. A prompt has a chunk in a step at most, so a long one delays nobody's next token by more than that.

Interactive requests go before batch requests. A batch request yields its turn, not its cache: it neither begins nor
takes part while an interactive one can use the step. When it was left out of PATIENCE steps in a row its turn has come:
until it takes part again it is treated as an interactive one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

PATIENCE = 8  # steps in a row that a batch request is left out of at most, where there is room for it


class Candidate(NamedTuple):
    """A request that could begin, or take part in a step.

    arrival: a number that grows from one request to the next. waited: steps without it since it came or took part.
    prompt_tokens: those of its prompt that it would compute next; 0: its prompt is read.
    """

    interactive: bool
    arrival: int
    waited: int
    prompt_tokens: int

    @property
    def urgent(self) -> bool:
        """Whether it goes before those that yield."""
        return self.interactive or self.waited >= PATIENCE


def admissions(waiting: Sequence[Candidate], running: Sequence[Candidate], max_running: int) -> Iterator[int]:
    """The order in which waiting requests are to begin, as indices, up to the first for which there is no room.

    At most `max_running` of each priority run at a time; more batch requests than that would wait all the same, but an
    interactive one need not wait for those that yield to it.
    """
    room = {kind: max_running - sum(c.interactive == kind for c in running) for kind in (True, False)}
    yielding = any(c.interactive for c in [*running, *waiting])
    for index in sorted(range(len(waiting)), key=lambda i: (not waiting[i].urgent, waiting[i].arrival)):
        candidate = waiting[index]
        if room[candidate.interactive] > 0 and (candidate.urgent or not yielding):
            room[candidate.interactive] -= 1
            yield index


def choose(running: Sequence[Candidate], max_decoding: int, max_prompt_tokens: int) -> list[int]:
    """Which of those that run take the next step, as indices: chunks of prompts, then those that are decoded.

    Up to `max_decoding` of the latter, those first that have waited longest; and as many chunks, in the order of
    arrival, as have `max_prompt_tokens` together, but at least one.
    """
    able = [i for i, c in enumerate(running) if c.urgent] or range(len(running))
    decoding = sorted((i for i in able if not running[i].prompt_tokens), key=lambda i: -running[i].waited)
    prompts: list[int] = []
    for i in sorted((i for i in able if running[i].prompt_tokens), key=lambda i: running[i].arrival):
        max_prompt_tokens -= running[i].prompt_tokens
        if prompts and max_prompt_tokens < 0:
            break
        prompts.append(i)
    return [*prompts, *sorted(decoding[:max_decoding])]
