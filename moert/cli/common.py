"""Options, loading of a model, and the lines about an answer, for all commands."""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moert import __version__
from moert.cli.options import add_settings, settings_of
from moert.cli.progress import conversion_progress
from moert.cli.status import Status
from moert.config import DEVICE, MEMORY, STREAMING, format_bytes, parse_bytes
from moert.errors import TraceError, UsageError
from moert.hub import resolve as source

if TYPE_CHECKING:
    from moert.api import LLM, GenerationStats
    from moert.engine.sampling import ResolvedParams
    from moert.scheduler.trace import Trace

INTERRUPTED = 130  # exit code of a command that Ctrl-C ended
# option, name of the field of ResolvedParams, type, help
SAMPLING = (
    ("--temp", "temperature", float, "temperature; 0 always takes the likeliest token"),
    ("--top-k", "top_k", int, "choose among the N likeliest tokens (0: all)"),
    ("--top-p", "top_p", float, "choose among the likeliest tokens that together have probability X (1: all)"),
    ("--min-p", "min_p", float, "drop tokens less likely than X times the likeliest (0: none)"),
    ("--repeat-penalty", "repeat_penalty", float, "make tokens seen before less likely (1: off)"),
    ("--seed", "seed", int, "the same seed gives the same text"),
)


def parse_widths(text: str) -> tuple[int, ...] | None:
    """ "2,3,4" -> (2, 3, 4); "auto" -> None."""
    if text == "auto":
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a list of whole numbers such as 2,3,4 nor auto"
        ) from None


def parse_sweep(text: str, name: str) -> list[int]:
    """Sizes: "NAME=1GiB:8GiB" is 1, 2, 4 and 8 GiB, the last one in any case; "NAME=1GiB,3GiB" is those.

    Raises UsageError for anything else.
    """
    found, _, values = text.partition("=")
    if found != name or not values:
        raise UsageError(f"--sweep {text} is not of the form {name}=1GiB:8GiB.")
    if ":" not in values:
        return [parse_bytes(part, name) for part in values.split(",")]
    low, high = (parse_bytes(part, name) for part in values.split(":", 1))
    if low > high:
        raise UsageError(f"--sweep {text}: the last size is below the first.")
    sizes = [low]
    while sizes[-1] * 2 <= high:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == high else [*sizes, high]


def add_conversion_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("conversion")
    group.add_argument(
        "--widths",
        type=parse_widths,
        metavar="LIST",
        help="bits per expert weight, ascending, such as 2,3,4 (16: unchanged); auto, the default: of 2,3,4,6 those"
        " that pay, by what the model loses at each (with --fast 2,3,4)",
    )
    group.add_argument(
        "--group-size", type=int, metavar="N", help="weights that share a scale: 32, 64 or 128 (default 64)"
    )
    group.add_argument(
        "--dense-bits",
        type=int,
        choices=(4, 6, 8, 16),
        help="bits of all other large matrices (default 8; with 4, embedding and head keep 6)",
    )
    group.add_argument(
        "--fast",
        action="store_true",
        help="round the experts instead of calibrating them on a text: for a first try, in a fraction of the time; much"
        " worse at low widths",
    )


def conversion_of(args: argparse.Namespace) -> source.Conversion:
    """Read what `add_conversion_options` added."""
    return source.Conversion.of(args.widths, args.group_size, args.dense_bits, args.fast)


def add_status_options(parser: argparse.ArgumentParser, details: bool = False) -> None:
    """Add -q, and -v for the commands that have details to tell."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-q", "--quiet", action="store_true", help="no status lines")
    if details:
        group.add_argument("-v", "--verbose", action="store_true", help="say what was chosen, and how memory is split")


def add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", help="store, checkpoint folder or hub id (default: the small built-in model)")
    parser.add_argument("--offline", action="store_true", help="never use the network")


def add_run_options(parser: argparse.ArgumentParser, memory_budget: str | None = None) -> None:
    """Add the options of the commands that run a model. memory_budget: the default."""
    add_model_option(parser)
    parser.add_argument("-sys", "--system", metavar="TEXT", help="system prompt")
    add_status_options(parser, details=True)
    add_memory_options(parser, memory_budget)
    parser.add_argument(
        "--warm",
        action="store_true",
        help="start with the experts in memory that were in memory at the end of the last run",
    )
    group = parser.add_argument_group("sampling (defaults: the model's generation_config.json)")
    group.add_argument(
        "-n", "--max-tokens", "--n-predict", type=int, metavar="N", help="length of the answer in tokens at most"
    )
    for option, name, kind, text in SAMPLING:
        group.add_argument(option, dest=name, type=kind, metavar="X" if kind is float else "N", help=text)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before this text (may be given again)"
    )
    group.add_argument("--ignore-eos", action="store_true", default=None, help="do not stop at the end-of-text token")
    add_conversion_options(parser)


def add_template_options(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that use a chat template; `template_args` reads them."""
    group = parser.add_argument_group("chat template")
    group.add_argument(
        "--template-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a variable for the chat template; VALUE is JSON, or else text (may be given again)",
    )
    group.add_argument(
        "--no-think", action="store_true", help="answer without thinking first: --template-arg enable_thinking=false"
    )


def template_args(args: argparse.Namespace) -> dict[str, Any]:
    """Read the variables that the options give the chat template. Raises UsageError."""
    from moert.text.chat import check_template_args  # loads jinja2

    found: dict[str, Any] = {"enable_thinking": False} if args.no_think else {}
    for text in args.template_arg:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--template-arg {text} is not of the form KEY=VALUE, such as enable_thinking=false.")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    check_template_args(found)
    return found


def add_memory_options(parser: argparse.ArgumentParser, memory_budget: str | None = None) -> None:
    """Add what `open_llm` wants to know besides the model and its conversion. memory_budget: the default."""
    defaults = {} if memory_budget is None else {"memory_budget": memory_budget}
    add_settings(parser, (MEMORY, STREAMING, DEVICE), **defaults)
    parser.add_argument(
        "--record-trace",
        type=Path,
        metavar="FILE",
        help="write which experts each token is routed to (compressed if FILE ends in .gz)",
    )


def resolve_model(args: argparse.Namespace, status: Status) -> Path:
    """The store of the model that the options name, converting it first if it must be."""
    with conversion_progress(status) as progress:
        return source.resolve(
            args.model,
            offline=args.offline,
            widths=args.widths,
            group_size=args.group_size,
            dense_bits=args.dense_bits,
            fast=args.fast,
            on_status=status.say if args.model else status.detail,
            progress=progress,
        )


def open_llm(args: argparse.Namespace, status: Status) -> LLM:
    """Load the model that the options name, converting it first if it must be."""
    trace: Path | None = args.record_trace
    if trace is not None and (trace.is_dir() or not trace.parent.is_dir()):
        wrong = "is a folder" if trace.is_dir() else f"is in the folder {trace.parent}, which does not exist"
        raise UsageError(f"--record-trace: {trace} {wrong}.")
    path = resolve_model(args, status)
    with status.spinner("Loading the model"):
        from moert.api import LLM  # loads torch

        # One prompt at a time, where nothing says otherwise, needs the least memory.
        settings = {"batch_size": vars(args).get("batch_size", 1), **settings_of(args)}
        warm = vars(args).get("warm", False)
        llm = LLM(path, warm=warm, offline=args.offline, on_status=status.report, **settings)
    if trace is not None:
        try:
            llm.record_trace(trace)
        except BaseException:
            llm.close()
            raise
    return llm


def check_kernel() -> None:
    """Raise UsageError where MOERT_KERNEL names a kernel that this machine lacks."""
    from moert.quant.dispatch import choose_kernel  # loads torch

    try:
        choose_kernel()
    except ValueError as error:
        raise UsageError(f"{error}.") from None


def model_name(args: argparse.Namespace) -> str:
    return Path(args.model).name if args.model else "the small built-in model"


def headline(args: argparse.Namespace, llm: LLM) -> str:
    """Say in one line what runs: model, precision, context, budget, and how much of the model is in memory."""
    share = llm.resident_share
    parts = [
        f"moert {__version__}",
        model_name(args),
        llm.precision,
        f"context {llm.ctx_size}",
        f"budget {format_bytes(llm.budget)}",
        "all experts in memory" if share >= 1 else f"{share:.0%} of experts in memory",
    ]
    return " · ".join(parts if llm.device is None else [*parts, llm.device])


def read_text(path: Path, what: str) -> str:
    """A file of text; UsageError, beginning with `what`, where it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{what} in {path} is not UTF-8 text.") from None


def load_trace(path: Path) -> Trace:
    """Raises TraceError where it is malformed, OSError."""
    from moert.scheduler.trace import read_trace

    try:
        return read_trace(path)
    except ValueError as error:
        raise TraceError(f"{error}.") from None


def print_cells(cells: Sequence[str]) -> None:
    """One line of a Markdown table on stdout."""
    print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")


def sampling_params(args: argparse.Namespace, llm: LLM, status: Status) -> ResolvedParams:
    """The model's defaults, changed by the options; says what came from where."""
    from moert.engine.sampling import usable_fields

    names = [*(name for _, name, _, _ in SAMPLING), "max_tokens", "stop", "ignore_eos"]
    given: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    params = llm.default_params.replace(**given)
    origins = dict.fromkeys(usable_fields(llm.tokenizer.generation_config)[0], "model") | dict.fromkeys(given, "option")
    values = {name: getattr(params, name) for name in names}
    values["seed"] = "random" if params.seed is None else params.seed
    if not params.ignore_eos:
        del values["ignore_eos"]
    if not params.stop:
        del values["stop"]
    status.detail(
        "sampling: " + ", ".join(f"{name} {value} ({origins.get(name, 'default')})" for name, value in values.items())
    )
    return params


def write_text(text: str) -> None:
    """Print a piece of an answer. On a terminal without control characters: a model must not be able to steer it."""
    if sys.stdout.isatty():
        text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
    print(text, end="", flush=True)


def conclude(llm: LLM, stats: GenerationStats, status: Status, more: str = "") -> None:
    """Say what an answer took, and that the plan was wrong if it was."""
    status.say(speeds(stats) + more)
    if llm.plan is not None:
        llm.plan.add(stats)
        if warning := llm.plan.warning():
            slow = (llm.plan.achieved or 0) < llm.plan.prediction.decode_tokens_per_s
            (status.warn if slow else status.detail)(warning)


def speeds(stats: GenerationStats) -> str:
    """One line: how long, how fast, what was read."""
    parts = [f"{stats.completion_tokens} tokens"]
    if stats.decode_tokens_per_s:
        parts.append(f"{stats.decode_tokens_per_s:.1f} tokens/s")
    parts.append(f"TTFT {stats.ttft_s:.2f} s")
    if stats.prefill_tokens_per_s:
        cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
        parts.append(f"prompt {stats.prompt_tokens}{cached} at {stats.prefill_tokens_per_s:.0f} tokens/s")
    if stats.hit_ratio is not None:
        parts.append(f"cache hits {stats.hit_ratio:.0%}")
    parts.append(f"read {format_bytes(round(stats.bytes_read_per_token or 0))}/token")
    if stats.device_share:
        moved = format_bytes(round(stats.bytes_moved_per_token))
        parts.append(f"device computed {stats.device_share:.0%}, moved {moved}/token")
    parts.append(f"peak memory {format_bytes(stats.peak_rss_bytes)}")
    return " · ".join(parts)
