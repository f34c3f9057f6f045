"""Routing traces: which experts the tokens of a run were routed to, layer by layer.

A CSV file, gzipped where its name ends in .gz; lines that begin with # stand at its top:

    # route_trace v1
    # model=NAME arch=FAMILY n_layer=L n_expert=E n_expert_used=K
    # layer=0 expert_bytes=N dense_bytes=N        one for each layer; expert_bytes: of one expert at 4 bits
    turn,phase,step,layer,slot,expert,weight,residency,expert_bytes[,token]

phase: 0 prefill, 1 decode. step: number of the token within the turn. slot: rank in the top-k. weight: router weight,
normalised over the top-k. token: id of the token that went in. residency and expert_bytes tell what the recording
engine's cache did; they are not read, and written as 0. The rows of a token may lie apart, and some layers may lack: an
engine that needs no output of a prompt token skips its last ones.
"""

# L layers, E experts, K experts per token

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

VERSION = "# route_trace v1"
COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert", "weight", "residency", "expert_bytes")
PREFILL, DECODE = 0, 1


class Routing(NamedTuple):
    """The routing that the router of one layer said to one token: K experts, the heaviest first, and their weights."""

    experts: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TraceStep:
    """One token. layers: by layer, ascending; some may lack. token: its id, None where the trace does not say."""

    phase: int
    layers: Mapping[int, Routing]
    token: int | None = None
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """expert_bytes: for each of `layers` layers, of one expert at 4 bits. dense_bytes: of everything else in it.

    Raises ValueError, with a sentence, where these disagree.
    """

    model: str
    layers: int
    num_experts: int
    top_k: int
    expert_bytes: tuple[int, ...]
    dense_bytes: tuple[int, ...]
    steps: tuple[TraceStep, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts or self.layers < 1:
            raise ValueError(
                f"{self.layers} layers of {self.num_experts} experts, {self.top_k} per token, make no model"
            )
        if len(self.expert_bytes) != self.layers or len(self.dense_bytes) != self.layers:
            raise ValueError(f"the bytes of all {self.layers} layers are needed, and of no others")
        if min(self.dense_bytes) < 0 or min(self.expert_bytes) < 0:
            raise ValueError("negative bytes of a layer")


def read_trace(path: Path) -> Trace:
    """Raises ValueError with one sentence that names the file and the line, and OSError where it cannot be read."""
    at = 0

    def counted(lines: Iterable[str]) -> Iterator[str]:
        nonlocal at
        for line in lines:
            at += 1
            yield line

    try:
        with _open(path) as file:
            return _parse(counted(file))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a routing trace: it is not text") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not a routing trace: line {at}: {error}") from None


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _parse(lines: Iterator[str]) -> Trace:
    if next(lines, "").strip() != VERSION:
        raise ValueError(f"it should be {VERSION!r}")
    head: dict[str, str] = {}
    sizes: dict[int, tuple[int, int]] = {}
    names: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            names = next(csv.reader([line]))
            break
        fields = dict(re.findall(r"(\w+)=(.*?)(?=\s+\w+=|\s*$)", line))
        if "layer" in fields:
            sizes[_whole(fields, "layer")] = _whole(fields, "expert_bytes"), _whole(fields, "dense_bytes", 0)
        else:
            head |= fields
    missing = [name for name in COLUMNS[:7] if name not in names]
    if missing:
        raise ValueError(f"no column {missing[0]!r}")
    layers, experts, top_k = (_whole(head, name) for name in ("n_layer", "n_expert", "n_expert_used"))
    if sorted(sizes) != list(range(layers)):
        raise ValueError(f"above it, each of the {layers} layers needs one line with its expert_bytes")
    model = head.get("model", "unknown").replace("\\", "/").rsplit("/", 1)[-1]
    expert_bytes, dense_bytes = zip(*(sizes[layer] for layer in range(layers)), strict=True)
    shape = Trace(model, layers, experts, top_k, expert_bytes, dense_bytes, ())
    return Trace(model, layers, experts, top_k, expert_bytes, dense_bytes, tuple(_steps(shape, names, lines)))


def _whole(fields: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = fields.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\d{1,18}", text):
        raise ValueError(f"{name} should be a whole number, not {text!r}" if text else f"no {name}")
    return int(text)


def _steps(shape: Trace, names: list[str], lines: Iterator[str]) -> list[TraceStep]:
    """Gather the rows of each token, in whatever order they come: an engine records a prompt layer by layer."""
    found: dict[tuple[int, int], tuple[int, int | None, dict[int, tuple[list[int], list[float]]]]] = {}
    for row in csv.reader(lines):
        fields = dict(zip(names, row, strict=False))
        turn, step, phase, layer, slot, expert = (
            _whole(fields, name) for name in ("turn", "step", "phase", "layer", "slot", "expert")
        )
        token = _whole(fields, "token") if fields.get("token") else None
        if phase not in (PREFILL, DECODE):
            raise ValueError(f"phase {phase} is neither 0 nor 1")
        if layer >= shape.layers or expert >= shape.num_experts:
            raise ValueError(f"expert {expert} of layer {layer}, but there are {shape.num_experts} of {shape.layers}")
        if not shape.expert_bytes[layer]:
            raise ValueError(f"layer {layer} has no bytes of experts, but one of its experts is used")
        known = found.setdefault((turn, step), (phase, token, {}))
        if known[:2] != (phase, token):
            raise ValueError(f"step {step} has another phase or token above")
        experts, weights = known[2].setdefault(layer, ([], []))
        if slot != len(experts) or slot >= shape.top_k or expert in experts:
            raise ValueError(f"expert {expert} as slot {slot} of layer {layer}, after {len(experts)} others")
        weight = float(fields.get("weight", ""))
        if not 0 <= weight <= 1 + 1e-3:
            raise ValueError(f"weight {weight:g} of expert {expert} is not between 0 and 1")
        experts.append(expert)
        weights.append(weight)
    if not found:
        raise ValueError("no token is recorded")
    return [
        TraceStep(phase, {at: Routing(tuple(e), tuple(w)) for at, (e, w) in sorted(layers.items())}, token, turn)
        for (turn, _), (phase, token, layers) in sorted(found.items())
    ]


def writer(file: IO[str], shape: Trace) -> Callable[[TraceStep], None]:
    """Write the top of a trace, with the sizes of `shape`; returns what writes one more step behind it."""
    print(VERSION, file=file)
    sizes = f"n_layer={shape.layers} n_expert={shape.num_experts} n_expert_used={shape.top_k}"
    print(f"# model={shape.model} {sizes}", file=file)
    for layer, (expert, dense) in enumerate(zip(shape.expert_bytes, shape.dense_bytes, strict=True)):
        print(f"# layer={layer} expert_bytes={expert} dense_bytes={dense}", file=file)
    print(",".join((*COLUMNS, "token")), file=file)
    count = 0

    def write(step: TraceStep) -> None:
        nonlocal count
        token = "" if step.token is None else step.token
        for layer, routing in step.layers.items():
            for slot, (expert, weight) in enumerate(zip(*routing, strict=True)):
                print(
                    f"{step.turn},{step.phase},{count},{layer},{slot},{expert},{weight:.6g},0,0,{token}",
                    file=file,
                )
        count += 1

    return write


def draw_trace(
    *,
    layers: int = 4,
    num_experts: int = 16,
    top_k: int = 2,
    prompt: int = 8,
    tokens: int = 64,
    skew: float = 0.8,
    overlap: float = 0.3,
    expert_bytes: int = 1 << 20,
    dense_bytes: int = 1 << 20,
    seed: int = 0,
) -> Trace:
    """A synthetic trace of `prompt` prefill and `tokens` decode steps; the same for the same arguments.

    skew: the popularity of the experts of a layer falls as rank ** -skew (Zipf), in an order of its own for each layer.
    overlap: the probability that an expert of the token before is used again.
    """
    rng = np.random.default_rng(seed)
    popularity = np.arange(1, num_experts + 1) ** -skew
    by_layer = np.stack([rng.permutation(popularity / popularity.sum()) for _ in range(layers)])
    before: list[list[int]] = [[] for _ in range(layers)]
    steps = []
    for n in range(prompt + tokens):
        routed: dict[int, Routing] = {}
        for layer in range(layers):
            kept = [e for e in before[layer] if rng.random() < overlap]
            # The largest of log(p) + Gumbel noise are draws without replacement.
            keys = np.log(by_layer[layer]) + rng.gumbel(size=num_experts)
            keys[kept] = np.inf
            before[layer] = np.argsort(-keys, kind="stable")[:top_k].tolist()
            weights = np.sort(rng.dirichlet(np.full(top_k, 2.0)))[::-1]
            experts = rng.permutation(before[layer]).tolist()
            routed[layer] = Routing(tuple(experts), tuple(weights.tolist()))
        steps.append(TraceStep(PREFILL if n < prompt else DECODE, routed))
    sizes = (expert_bytes,) * layers, (dense_bytes,) * layers
    return Trace("synthetic", layers, num_experts, top_k, *sizes, tuple(steps))
