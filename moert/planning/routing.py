"""Choose the experts to which the tokens of a plan are routed: as recorded with the model, or drawn for it."""

from __future__ import annotations

from dataclasses import dataclass

from moert.errors import UsageError
from moert.planning.model_shape import ModelShape
from moert.planning.predict import MOST_TOKENS, fit
from moert.scheduler.statistics import draw, statistics_for
from moert.scheduler.trace import DECODE, Trace


@dataclass(frozen=True, slots=True)
class RoutingSample:
    """A trace with the layers of the model. recalls: what its routers know of the next layers. about: where all that is
    from, for people."""

    trace: Trace
    recalls: tuple[float, ...]
    about: str


def drawn(shape: ModelShape, prompt_tokens: int) -> RoutingSample:
    """Draw routes from what is published of the model's family."""
    statistics = statistics_for(shape.model_type, shape.name)
    trace = draw(shape, statistics, prompt=prompt_tokens, tokens=MOST_TOKENS)
    about = f"drawn from statistics ({statistics.source}; routers one layer early: {statistics.recall_source})"
    return RoutingSample(trace, statistics.recalls, about)


def recorded(trace: Trace, shape: ModelShape) -> RoutingSample:
    """UsageError where the trace is of another model, or decodes nothing."""
    fit(trace, shape, None, 1)
    tokens = sum(step.phase == DECODE for step in trace.steps)
    if not tokens:
        raise UsageError(f"The trace of {trace.model} decodes nothing: record one while answers are generated.")
    statistics = statistics_for(shape.model_type, shape.name)
    about = f"as recorded with {trace.model}, the first {min(tokens, MOST_TOKENS)} of {tokens} tokens decoded"
    return RoutingSample(trace, statistics.recalls, f"{about} (routers one layer early: {statistics.recall_source})")
