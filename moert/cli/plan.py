"""Predict what a memory budget buys: what of a model fits, how fast it would be and what that costs in quality, on this
machine or another one, worked out without running the model and without downloading its weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moert.cli import common
from moert.cli.options import Renamed
from moert.cli.progress import line_progress
from moert.cli.status import Status
from moert.config import format_bytes, parse_budget
from moert.errors import BudgetError, UsageError
from moert.hardware.devices import device_or_this, devices

if TYPE_CHECKING:
    from moert.planning import Choice, Prediction
    from moert.planning.model_shape import ModelShape
    from moert.planning.routing import RoutingSample
    from moert.scheduler.profile import Profile

SCHEMA_VERSION = 1
COLUMNS = (
    *("budget", "precision", "context", "decode", "prefill", "first token", "hits", "read/token", "mean width"),
    *("quality lost", "peak memory"),
)
_POINTS = 8  # budgets of a plot, where no sweep says which


def add_options(parser: argparse.ArgumentParser) -> None:
    common.add_model_option(parser)
    common.add_status_options(parser)
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="memory for everything, such as 6GiB (default: what each precision can use, up to 80%% of the memory)",
    )
    parser.add_argument(
        "--sweep",
        metavar="memory-budget=LOW:HIGH",
        help="budgets from LOW, each twice the one before, up to HIGH; or a list, such as 4GiB,6GiB,8GiB",
    )
    parser.add_argument(
        "--profile",
        metavar="NAME|FILE",
        help=f"profile of another device than this machine: {', '.join(sorted(devices()))}, or a file",
    )
    parser.add_argument("--device", action=Renamed, new="--profile")
    parser.add_argument(
        "--precision",
        metavar="POLICY",
        nargs="+",
        default=[],
        help="widths of the experts to compare: fixed:4, routed:3, elastic:3 (default: those that the store can have)",
    )
    parser.add_argument(
        "-c", "--ctx-size", type=int, metavar="N", help="context in tokens (default: what fits well, up to 4096)"
    )
    parser.add_argument("--kv-bits", type=int, choices=(8, 16), help="bits of cached keys and values (default 16)")
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        default=256,
        help="length of the prompt for the time to first token (default 256)",
    )
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="routing trace of this model (default: routes drawn from statistics)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw speed and quality against memory, as a PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_conversion_options(parser)


def main(args: argparse.Namespace) -> int:
    status = Status.of(args)
    _check(args)
    budgets = _budgets(args)
    profile, about = device_or_this(args.profile)
    shape = _shape(args, status)
    routes = _routes(args, shape)
    for line in _assumed(args, shape, profile, about, routes):
        status.say(line)
    from moert.planning.recommend import policies

    plan = _Plan(args, shape, profile, routes, args.precision or policies(shape))
    if args.plot is not None and args.sweep is None:
        budgets = plan.spread()
    for budget in budgets:
        if budget is not None and budget > profile.memory_bytes:
            status.show(f"The budget of {format_bytes(budget)} is more memory than {profile.name} has.")
    with line_progress(status) as progress:
        plan.run(budgets, progress)
    choice = plan.choice()
    if args.json:
        print(json.dumps(_as_dict(plan, about, choice), indent=1))
    else:
        _print(plan, choice)
    if args.plot is not None:
        plan.draw(args.plot)
        status.say(f"drawn: {args.plot}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse bad options before anything takes time."""
    for name in ("ctx_size", "prompt_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"{name.replace('_', '-')} {value} must be at least 1.")
    if args.plot is not None:
        from moert.measure import plot

        plot.check(args.plot)


def _budgets(args: argparse.Namespace) -> list[int | None]:
    if args.sweep is None:
        return [parse_budget(args.memory_budget)]
    if args.memory_budget is not None:
        raise UsageError("Give either --memory-budget or --sweep memory-budget=LOW:HIGH.")
    return [*common.parse_sweep(args.sweep, "memory-budget")]


def _shape(args: argparse.Namespace, status: Status) -> ModelShape:
    from moert.planning.model_shape import read_shape

    settings = common.conversion_of(args)
    return read_shape(args.model, settings, offline=args.offline, on_status=status.say)


def _routes(args: argparse.Namespace, shape: ModelShape) -> RoutingSample:
    from moert.planning.routing import drawn, recorded

    return drawn(shape, args.prompt_tokens) if args.trace is None else recorded(common.load_trace(args.trace), shape)


def _assumed(
    args: argparse.Namespace, shape: ModelShape, profile: Profile, about: str, routes: RoutingSample
) -> Iterator[str]:
    per_token = format_bytes(shape.top_k * len(shape.moe_layers) * shape.expert_bytes(99))
    yield (
        f"{_title(shape)} ({shape.model_type}, {shape.origin}): {shape.parameters / 1e9:.3g} G parameters,"
        f" {shape.active_parameters / 1e9:.3g} G of them for a token; {len(shape.moe_layers)} layers of"
        f" {shape.num_experts} experts, {shape.top_k} per token"
    )
    yield (
        f"on disk {format_bytes(shape.store_bytes)} with widths {' '.join(map(str, shape.widths))}; resident"
        f" {format_bytes(shape.resident_bytes)} at {shape.dense_bits} bits; {per_token} of experts per token"
    )
    if not shape.runnable:
        yield f"note: moert cannot run this model: {shape.why_not.rstrip('.')}; planned as if it could."
    yield (
        f"{profile.name}, {about}: memory {format_bytes(profile.memory_bytes)},"
        f" {profile.memory_bytes_per_s / 1e9:.3g} GB/s; disk {profile.disk_bytes_per_s / 1e9:.3g} GB/s"
    )
    if profile.gpu_memory_bytes is not None:
        yield "note: plans are for the CPU alone: the GPU of this device is not used."
    yield f"routing: {routes.about}"
    yield f"quality: {_quality_note(shape)}"
    if not shape.calibrated and shape.widths[-1] < 16:
        yield "note: the experts are rounded; calibrated ones, without --fast, are better at narrow widths."
    yield f"prompt: {args.prompt_tokens} tokens, starting with no expert in memory; prefill: 512 tokens once it is warm"


def _title(shape: ModelShape) -> str:
    """Return the name of the model, or the last part of its path."""
    return Path(shape.name).name if Path(shape.name).is_absolute() else shape.name


def _quality_note(shape: ModelShape) -> str:
    from moert.planning.quality import CONVERSION, SMALL_MODELS

    if shape.losses:
        return f"divergence from the lossless model (KL) in nats per token, {CONVERSION}"
    how = "calibrated" if shape.calibrated else "rounded"
    return f"perplexity lost against the lossless model, {how} experts, {SMALL_MODELS}"


class _Plan:
    """Predictions for all settings that were asked for; for those that do not fit, the least budget."""

    def __init__(
        self,
        args: argparse.Namespace,
        shape: ModelShape,
        profile: Profile,
        routes: RoutingSample,
        precisions: list[str],
    ) -> None:
        from moert.planning.predict import policy_of

        self._args, self.shape, self.profile, self.routes = args, shape, profile, routes
        self._slices = {name: policy_of(name, routes.trace, shape).slices(shape.widths) for name in precisions}
        self.rows: list[tuple[int | None, str, int, Prediction | BudgetError]] = []
        self._available = int(profile.memory_bytes - profile.library_bytes)
        if args.profile is None:
            from moert.hardware.memory import available_bytes

            self._available = min(self._available, available_bytes())

    def run(self, budgets: list[int | None], progress: Callable[[str], None]) -> None:
        from moert.planning import predict
        from moert.planning.recommend import context_for

        shape, profile, kv_bits = self.shape, self.profile, self._args.kv_bits
        for budget in budgets:
            for name, slices in self._slices.items():
                progress(f"{'all that is of use' if budget is None else format_bytes(budget)}, {name}")
                ctx_size = self._args.ctx_size or context_for(shape, profile, slices, budget, self._available, kv_bits)
                found: Prediction | BudgetError
                try:
                    found = predict(
                        shape,
                        profile,
                        self.routes.trace,
                        name,
                        budget,
                        ctx_size,
                        available=self._available,
                        recalls=self.routes.recalls,
                        kv_bits=kv_bits,
                        prompt_tokens=self._args.prompt_tokens,
                    )
                except BudgetError as error:
                    found = error
                self.rows.append((budget, name, ctx_size, found))

    def spread(self) -> list[int | None]:
        """Budgets from the least that would do to what is of use or there is, at even ratios."""
        least, most = 1 << 62, 0
        for slices in self._slices.values():
            needs = self.shape.needs(int(self.profile.library_bytes), self._args.ctx_size or 1024, slices)
            least, most = min(least, needs.least), max(most, needs.fixed + needs.all_experts)
        least = int(1.02 * least)
        most = max(int(min(1.2 * most, 2 * self.profile.memory_bytes)), 2 * least)
        return [round(least * (most / least) ** (i / (_POINTS - 1))) for i in range(_POINTS)]

    @property
    def predictions(self) -> list[Prediction]:
        return [found for *_, found in self.rows if not isinstance(found, BudgetError)]

    def choice(self) -> Choice | None:
        """The recommendation, of what the device has the memory for if any; None where nothing fits its budget."""
        from moert.planning.recommend import choose

        fitting = [p for p in self.predictions if p.budget_bytes <= self.profile.memory_bytes]
        every = fitting or self.predictions
        return choose(every) if every else None

    def least(self) -> str:
        """Say what would fit where nothing does."""
        shape, ctx_size = self.shape, self._args.ctx_size or min(256, self.shape.max_position_embeddings)
        name, slices = min(self._slices.items(), key=lambda item: item[1])
        least = shape.needs(int(self.profile.library_bytes), ctx_size, slices, self._args.kv_bits).least
        much = least > self.profile.memory_bytes
        there = f", more than the {format_bytes(self.profile.memory_bytes)} of {self.profile.name}" if much else ""
        what = f"{least} bytes ({format_bytes(least)}), for {name} and a context of {ctx_size}"
        return f"Nothing fits: the least budget is {what}{there}."

    def draw(self, path: Path) -> None:
        from moert.measure import plot

        curves = [
            plot.Curve(
                name,
                [(p.budget_bytes, p.decode_tokens_per_s) for p in mine],
                None if mine[0].quality is None else mine[0].quality.perplexity_ratio,
            )
            for name in self._slices
            if (mine := [found for _, n, _, found in self.rows if n == name and not isinstance(found, BudgetError)])
        ]
        plot.draw_plan(path, curves, self.profile.memory_bytes, self.profile.name, _title(self.shape))


def _as_dict(plan: _Plan, about: str, choice: Choice | None) -> dict[str, Any]:
    """Return the object that --json prints."""
    shape, profile = plan.shape, plan.profile
    names = ("name", "model_type", "origin", "runnable", "why_not", "parameters", "active_parameters", "widths")
    settings: list[dict[str, Any]] = []
    for budget, name, ctx_size, found in plan.rows:
        if isinstance(found, BudgetError):
            asked = {"precision": name, "budget_bytes": budget, "ctx_size": ctx_size}
            settings.append({"fits": False, **asked, "least_budget_bytes": found.least_bytes})
        else:
            settings.append({"fits": True, **found.as_dict()})
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {name: getattr(shape, name) for name in (*names, "dense_bits", "store_bytes")},
        "device": {"name": profile.name, "about": about, "memory_bytes": profile.memory_bytes, "date": profile.date},
        "routing": plan.routes.about,
        "settings": settings,
        "recommendation": None
        if choice is None
        else {
            "precision": choice.precision,
            "memory_budget_bytes": choice.memory_budget,
            "ctx_size": choice.ctx_size,
            "reason": choice.reason,
        },
        **({"nothing_fits": plan.least()} if choice is None else {}),
    }


def _print(plan: _Plan, choice: Choice | None) -> None:
    common.print_cells(COLUMNS)
    common.print_cells(["---" if i < 2 else "---:" for i in range(len(COLUMNS))])
    for budget, name, ctx_size, found in plan.rows:
        asked = "" if budget is None else format_bytes(budget)
        if isinstance(found, BudgetError):
            why = f"does not fit: needs {format_bytes(found.least_bytes)}"
            common.print_cells([asked or "-", name, str(ctx_size), why, *[""] * (len(COLUMNS) - 4)])
        else:
            common.print_cells(_cells(found))
    print()
    if choice is None:
        print(plan.least())
        return
    print(f"{choice.prediction.budget.line()}")
    print(f"Recommended: {choice.reason}")


def _speed(tokens_per_s: float) -> str:
    """Three digits at least, and no powers of ten."""
    return f"{tokens_per_s:.0f} tokens/s" if tokens_per_s >= 100 else f"{tokens_per_s:.3g} tokens/s"


def _cells(p: Prediction) -> list[str]:
    return [
        format_bytes(p.budget_bytes),
        p.precision,
        str(p.ctx_size),
        _speed(p.decode_tokens_per_s),
        _speed(p.prefill_tokens_per_s),
        f"{p.ttft_s:.3g} s",
        f"{p.hit_ratio:.0%}",
        format_bytes(p.bytes_read_per_token),
        f"{p.mean_width:.2f}",
        "not measured" if p.quality is None else p.quality.text,
        format_bytes(p.peak_rss_bytes),
    ]
