"""Predict decoding speed on a device from its profile and a routing trace, beside what no cache and no prefetch can
beat, and beside whole 4-bit experts in a least-recently-used cache. Prompts of the trace warm the cache; all figures
are of the tokens that it decodes. With --device-budget a GPU computes too, and beside it stand the GPU without the
CPU's help, the CPU alone, and all experts in the GPU's memory."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moert.cli import common
from moert.cli.options import Renamed, add_settings
from moert.cli.progress import line_progress
from moert.cli.status import Status
from moert.config import format_bytes, parse_bytes
from moert.errors import TraceError, UsageError
from moert.hardware.devices import device_or_this, devices

if TYPE_CHECKING:
    from moert.scheduler.profile import Profile
    from moert.scheduler.simulation import Result, Settings, Simulation, TieredSimulation
    from moert.scheduler.trace import Trace

TIERED_COLUMNS = (
    *("budget", "GPU's", "run", "tokens/s", "at once", "by CPU", "moved/token", "read/token", "stalled", "mean width"),
)
BOUNDS = ("belady", "perfect_prefetch", "lru")
BESIDE = ("device", "host", "resident")
COLUMNS = ("budget", "run", "tokens/s", "hits", "read/token", "stalled", "mean width", "router mass at each width")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, metavar="FILE", required=True, help="routing trace, .csv or .csv.gz")
    parser.add_argument("--expert-budget", metavar="SIZE", help="memory for experts, such as 2000MiB")
    parser.add_argument(
        "--device-budget",
        metavar="SIZE",
        help="memory of the GPU for experts: it computes too; where GPU and CPU share one memory (Jetson), this"
        " replaces --expert-budget",
    )
    parser.add_argument("--no-hybrid", action="store_true", help="with --device-budget: the GPU computes all experts")
    parser.add_argument(
        "--sweep",
        metavar="expert-budget=LOW:HIGH",
        help="budgets from LOW, each twice the one before, up to HIGH; or a list, such as 1GiB,1500MiB,2GiB",
    )
    parser.add_argument(
        "--profile",
        metavar="NAME|FILE",
        help=f"profile of the device to simulate: {', '.join(devices())}, or a file (default: this machine)",
    )
    parser.add_argument("--device", action=Renamed, new="--profile")
    parser.add_argument(
        "--disk", metavar="SIZE", help="bytes that the disk reads per second, such as 1200MB (default: the profile's)"
    )
    parser.add_argument(
        "--precision",
        metavar="POLICY",
        help="width of the experts: fixed:4, routed:3 for that mean width over the trace, elastic (default: widest)",
    )
    parser.add_argument(
        "--widths", type=common.parse_widths, metavar="LIST", default=(2, 3, 4), help="widths stored (default 2,3,4)"
    )
    add_settings(parser, ["cache_policy"], cache_policy="score")
    parser.add_argument("--policy", action=Renamed, new="--cache-policy")
    parser.add_argument(
        "--recall",
        metavar="SHARE[,SHARE...]",
        default="0.8",
        help="share of the next layer's experts that a predictor names; more: of those after it (default 0.8)",
    )
    parser.add_argument(
        "--prefetch", choices=("on", "off"), default="on", help="read predicted experts ahead (default on)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the predictor's mistakes")
    parser.add_argument("--json", action="store_true", help="print one JSON object, or a list of them with --sweep")
    common.add_status_options(parser)


def main(args: argparse.Namespace) -> int:
    from moert.scheduler.simulation import Simulation

    status = Status.of(args)
    profile, about = device_or_this(args.profile)
    every = [_settings(args, budget) for budget in _budgets(args, profile)]
    trace = common.load_trace(args.trace)
    if args.disk is not None:
        profile = dataclasses.replace(profile, disk_bytes_per_s=float(parse_bytes(args.disk, "disk")))
    status.say(
        f"{trace.model}: {trace.layers} layers, {trace.top_k} of {trace.num_experts} experts per token, together"
        f" {format_bytes(sum(trace.expert_bytes) * trace.num_experts)} at 4 bits"
    )
    status.say(
        f"{profile.name}: disk {profile.disk_bytes_per_s / 1e9:g} GB/s, memory"
        f" {profile.memory_bytes_per_s / 1e9:g} GB/s and {format_bytes(profile.memory_bytes)}; {about}"
    )
    recalls = " and ".join(f"{recall:g}" for recall in every[0].recalls) or "none"
    status.say(
        f"chosen: precision {every[0].precision}, widths {' '.join(map(str, args.widths))}, "
        f"cache policy {args.cache_policy}, recall {recalls}, seed {args.seed}"
    )
    rows = []
    for number, settings in enumerate(every):
        if settings.budget > profile.memory_bytes:
            status.show(f"The budget of {format_bytes(settings.budget)} is more memory than {profile.name} has.")
        if (settings.device_budget or 0) > (profile.gpu_memory_bytes or 0):
            status.show(f"The device budget of {args.device_budget} is more memory than the GPU of {profile.name} has.")
        simulation = _simulate(trace, profile, settings, status)
        if args.json:
            rows.append(as_dict(simulation))
        elif isinstance(simulation, Simulation):
            _print_rows(simulation, header=number == 0)
        else:
            _print_tiers(simulation, header=number == 0)
    if args.json:
        print(json.dumps(rows if args.sweep else rows[0], indent=1))
    return 0


def _simulate(trace: Trace, profile: Profile, settings: Settings, status: Status) -> Simulation | TieredSimulation:
    from moert.scheduler.simulator import Simulator
    from moert.scheduler.tiered_replay import TieredSimulator

    run: Callable[[Settings, Callable[[str], None]], Simulation | TieredSimulation]
    try:
        run = Simulator(trace, profile).run
        if settings.device_budget is not None:
            run = TieredSimulator(trace, profile).compare
    except ValueError as error:
        raise TraceError(f"{error}: record one while answers are generated.") from None
    try:
        with line_progress(status) as progress:
            return run(settings, lambda text: progress(f"{format_bytes(settings.budget)}, {text}"))
    except ValueError as error:
        raise UsageError(f"{error}.") from None


def _budgets(args: argparse.Namespace, profile: Profile) -> list[int]:
    if args.device_budget is None and args.no_hybrid:
        raise UsageError("--no-hybrid is for a GPU that computes: give --device-budget too.")
    if args.device_budget is not None:
        if profile.gpu_expert_s_per_byte is None:
            raise UsageError(f"The profile {profile.name} has no figures of a GPU: leave --device-budget out.")
        if profile.gpu_integrated:
            if args.expert_budget or args.sweep:
                raise UsageError(f"CPU and GPU of {profile.name} share one memory: give --device-budget alone.")
            return [parse_bytes(args.device_budget, "device-budget")]
    if (args.sweep is None) == (args.expert_budget is None):
        raise UsageError("Give either --expert-budget or --sweep expert-budget=LOW:HIGH.")
    if args.sweep is None:
        return [parse_bytes(args.expert_budget, "expert-budget")]
    return common.parse_sweep(args.sweep, "expert-budget")


def _settings(args: argparse.Namespace, budget: int) -> Settings:
    from moert.scheduler.simulation import Settings

    widths = args.widths
    if not widths or list(widths) != sorted(set(widths)) or not 1 <= widths[0] <= widths[-1] <= 16:
        raise UsageError(f"widths {','.join(map(str, widths))} should be ascending numbers of bits from 1 to 16.")
    try:
        recalls = tuple(float(text) for text in args.recall.split(","))
    except ValueError:
        recalls = (-1.0,)
    if not all(0 <= recall <= 1 for recall in recalls):
        raise UsageError(f"recall {args.recall!r} is not a share from 0 to 1, or a list of them such as 0.8,0.7.")
    return Settings(
        budget,
        args.precision or f"fixed:{widths[-1]}",
        widths,
        args.cache_policy,
        recalls if args.prefetch == "on" else (),
        seed=args.seed,
        device_budget=None if args.device_budget is None else parse_bytes(args.device_budget, "device-budget"),
        hybrid=not args.no_hybrid,
    )


def as_dict(simulation: Simulation | TieredSimulation) -> dict[str, Any]:
    """Return the object that --json prints."""
    settings = simulation.settings
    tiered = settings.device_budget is not None
    return {
        "expert_budget_bytes": settings.budget,
        **({"device_budget_bytes": settings.device_budget, "hybrid": settings.hybrid} if tiered else {}),
        "precision": settings.precision,
        "policy": settings.policy,
        **dataclasses.asdict(simulation.run),
        **{name: dataclasses.asdict(getattr(simulation, name)) for name in (BESIDE if tiered else BOUNDS)},
    }


def _print_rows(simulation: Simulation, header: bool) -> None:
    settings = simulation.settings
    if header:
        common.print_cells(COLUMNS)
        common.print_cells(["---" if i < 2 else "---:" for i in range(len(COLUMNS))])
    names = {
        f"{settings.precision}, {settings.policy}": simulation.run,
        "the same widths, Belady's optimum": simulation.belady,
        "the same reads, known ahead": simulation.perfect_prefetch,
        f"LRU of whole {settings.widths[-1]}-bit experts": simulation.lru,
    }
    for name, result in names.items():
        common.print_cells([format_bytes(settings.budget), name, *_cells(result)])


def _print_tiers(simulation: TieredSimulation, header: bool) -> None:
    settings = simulation.settings
    if header:
        common.print_cells(TIERED_COLUMNS)
        common.print_cells(["---" if i < 3 else "---:" for i in range(len(TIERED_COLUMNS))])
    names = {
        f"{settings.precision}, {'CPU and GPU' if settings.hybrid else 'GPU alone'}": simulation.run,
        "the GPU alone": simulation.device,
        "the CPU alone": simulation.host,
        "all experts in the GPU's memory": simulation.resident,
    }
    budgets = [format_bytes(settings.budget), format_bytes(settings.device_budget or 0)]
    for name, r in names.items():
        moved = format_bytes(r.bytes_moved_per_token)
        speed, hits, read, stalled, width, _ = _cells(r)
        common.print_cells([*budgets, name, speed, hits, f"{r.host_share:.1%}", moved, read, stalled, width])


def _cells(r: Result) -> list[str]:
    mass = ", ".join(f"{width}: {share:.1%}" for width, share in r.mass_at_width.items())
    return [
        f"{r.decode_tokens_per_s:.2f}",
        f"{r.hit_ratio:.1%}",
        format_bytes(r.bytes_read_per_token),
        f"{r.stall_share:.1%}",
        f"{r.mean_width:.2f}",
        mass,
    ]
