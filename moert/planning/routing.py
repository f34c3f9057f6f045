"""Which experts the tokens of a plan are routed to: as recorded with the model, or drawn for it."""

# L layers, E experts

from __future__ import annotations

from dataclasses import dataclass, replace

from moert.errors import UsageError
from moert.planning.predict import MOST_LAYERS, MOST_TOKENS, RECALLS, fit
from moert.scheduler.trace import DECODE, Trace, TraceStep, draw_trace
from moert.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Routes:
    """A trace with the layers of the model. recalls: what is predicted of the next layers. about: where all that is
    from, for people."""

    trace: Trace
    recalls: tuple[float, ...]
    about: str


def drawn(shape: ModelShape, prompt_tokens: int) -> Routes:
    """Of as many layers as are simulated, evenly spaced; what is drawn of a layer depends on its relative depth."""
    moe = shape.moe_layers
    count = min(MOST_LAYERS, len(moe))
    layers = [moe[int((i + 0.5) * len(moe) / count)] for i in range(count)]
    trace = draw_trace(
        layers=count, num_experts=shape.num_experts, top_k=shape.top_k, prompt=prompt_tokens, tokens=MOST_TOKENS
    )
    steps = [
        TraceStep(step.phase, {layers[row]: routing for row, routing in step.layers.items()}) for step in trace.steps
    ]
    sizes = (1,) * shape.num_layers
    whole = replace(trace, layers=shape.num_layers, expert_bytes=sizes, dense_bytes=sizes, steps=tuple(steps))
    return Routes(whole, RECALLS, "drawn from statistics")


def recorded(trace: Trace, shape: ModelShape) -> Routes:
    """UsageError where the trace is of another model, or decodes nothing."""
    fit(trace, shape, None, 1)
    tokens = sum(step.phase == DECODE for step in trace.steps)
    if not tokens:
        raise UsageError(f"The trace of {trace.model} decodes nothing: record one of a run that answers.")
    return Routes(
        trace, RECALLS, f"as recorded with {trace.model}: {tokens} tokens decoded; the first {MOST_TOKENS} count"
    )
