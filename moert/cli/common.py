"""Shared code of the commands: options, the status stream (stderr), loading a model, the line of speeds."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moert.cli.progress import conversion_progress
from moert.config import format_bytes, parse_bytes
from moert.errors import MoertError, UsageError
from moert.hub import resolve as source

if TYPE_CHECKING:
    from moert.api import LLM, GenerationStats
    from moert.engine.sampling import SamplingParams
    from moert.scheduler.trace import Trace

INTERRUPTED = 130  # exit code of a command that Ctrl-C ended
# option, name of the field of SamplingParams, type, help
SAMPLING = (
    ("--temp", "temperature", float, "0 always takes the likeliest token"),
    ("--top-k", "top_k", int, "draw from the N likeliest tokens (0: all)"),
    ("--top-p", "top_p", float, "draw from the likeliest tokens that make up X (1: all)"),
    ("--min-p", "min_p", float, "drop tokens less likely than X times the likeliest (0: none)"),
    ("--repeat-penalty", "repeat_penalty", float, "make tokens seen before less likely (1: off)"),
    ("--seed", "seed", int, "same seed, same text"),
)


class TraceError(MoertError):
    """A routing trace is malformed, or has nothing to decode."""


class Status:
    """Everything that is not data, on stderr. `quiet` silences all but answers to the user's commands."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    @property
    def live(self) -> bool:
        """Tell whether spinners and bars make sense."""
        return self.console.is_terminal and not self.quiet

    def say(self, text: str) -> None:
        if not self.quiet:
            self.show(text)

    def show(self, text: str, style: str = "dim") -> None:
        self.console.print(text, style=style, markup=False)

    def spinner(self, text: str) -> contextlib.AbstractContextManager[object]:
        return self.console.status(text) if self.live else contextlib.nullcontext()


def parse_widths(text: str) -> tuple[int, ...]:
    """ "2,3,4" -> (2, 3, 4)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 2,3,4") from None


def parse_sweep(text: str, name: str) -> list[int]:
    """Sizes: "NAME=1GiB:8GiB" is 1, 2, 4 and 8 GiB, the last one in any case; "NAME=1GiB,3GiB" is those.

    Raises UsageError for anything else.
    """
    found, _, values = text.partition("=")
    if found != name or not values:
        raise UsageError(f"sweep {text!r} is not known; write --sweep {name}=1GiB:8GiB.")
    if ":" not in values:
        return [parse_bytes(part, name) for part in values.split(",")]
    low, high = (parse_bytes(part, name) for part in values.split(":", 1))
    if low > high:
        raise UsageError(f"sweep {text!r} ends below its beginning.")
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
        help="bits per expert weight, ascending (default 2,3,4; 16: unchanged)",
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


def add_quiet_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="no status lines")


def add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", help="store, checkpoint folder or hub id (default: the small model that comes along)"
    )
    parser.add_argument("--offline", action="store_true", help="never use the network")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that run a model."""
    add_model_option(parser)
    parser.add_argument("-sys", "--system", metavar="TEXT", help="system prompt")
    add_quiet_option(parser)
    add_memory_options(parser)
    parser.add_argument(
        "--warm",
        action="store_true",
        help="begin with the experts in memory that were there at the end of the last run",
    )
    group = parser.add_argument_group("sampling (defaults: the model's generation_config.json)")
    group.add_argument("-n", "--max-tokens", "--n-predict", type=int, metavar="N", help="longest answer in tokens")
    for option, name, kind, text in SAMPLING:
        group.add_argument(option, dest=name, type=kind, metavar="X" if kind is float else "N", help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text (may be given again)")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on after the end of text")
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


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `open_llm` reads besides the model and its conversion."""
    group = parser.add_argument_group("memory and speed")
    group.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="all the memory to use, such as 2GiB; auto: as a plan for this machine says, as of precision and context",
    )
    group.add_argument("--expert-budget", metavar="SIZE", help="memory for experts alone (for experiments)")
    group.add_argument(
        "--precision",
        metavar="POLICY",
        help="width of the experts: fixed:4; routed:3 for a mean chosen by the router; elastic:3 for what is in "
        "memory, in sum no worse than 3 bits, not reproducible (default: the widest). Behind elastic:3 also ,skip=0.05 "
        "(leaves missing experts out that weigh less) and ,route=0.1 (favours experts in memory, beyond the bound)",
    )
    group.add_argument("-c", "--ctx-size", type=int, metavar="N", help="context length in tokens")
    group.add_argument("--kv-bits", type=int, choices=(8, 16), help="bits of cached keys and values (default 16)")
    group.add_argument("-t", "--threads", type=int, metavar="N", help="threads to compute with")
    group.add_argument(
        "--record-trace",
        type=Path,
        metavar="FILE",
        help="write which experts every token is routed to (FILE.gz: compressed)",
    )
    _add_streaming_options(parser)
    add_device_options(parser, "auto")


def add_device_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that `device_options` reads."""
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device",
        default=default,
        metavar="KIND",
        help=f"auto (a GPU that can be used), cpu, cuda; slow, for tests: emulated, interpreter (default {default})",
    )
    group.add_argument("--device-budget", metavar="SIZE", help="memory of the device to use, such as 4GiB")
    group.add_argument(
        "--no-hybrid",
        action="store_true",
        help="compute all experts on the device: slower, but the same text every time",
    )
    group.add_argument(
        "--dense-quant",
        default="16",
        metavar="KIND",
        help="everything but the experts on the device: 16 (bits, default), int8, nf4, or off to leave it on the host",
    )


def device_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `EngineConfig` that these options are."""
    budget = args.device_budget
    return {
        "device": args.device,
        "device_budget": None if budget is None else parse_bytes(budget, "device-budget"),
        "hybrid": not args.no_hybrid,
        "dense_quant": args.dense_quant,
    }


def _add_streaming_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("streaming of experts (for experiments)")
    group.add_argument("--cache-policy", default="score", metavar="NAME", help="score (default), lru or lfu")
    group.add_argument("--load-order", default="hottest", metavar="NAME", help="hottest (default) or number")
    group.add_argument(
        "--prefetch", default="auto", metavar="N", help="layers to look ahead: auto (default), off, 1, 2 or 3"
    )
    group.add_argument("--no-overlap", action="store_true", help="read first, compute then: a baseline")


def resolve_model(args: argparse.Namespace, status: Status) -> Path:
    """The store of the model that the options name, converting it first if it must be."""
    with conversion_progress(status) as progress:
        return source.resolve(
            args.model,
            offline=args.offline,
            widths=args.widths,
            group_size=args.group_size,
            dense_bits=args.dense_bits,
            on_status=status.say,
            progress=progress,
        )


def open_llm(args: argparse.Namespace, status: Status) -> LLM:
    """Load the model that the options name, converting it first if it must be."""
    trace: Path | None = args.record_trace
    if trace is not None and (trace.is_dir() or not trace.parent.is_dir()):
        wrong = "is a folder" if trace.is_dir() else f"is in the folder {trace.parent}, which does not exist"
        raise UsageError(f"--record-trace {trace} {wrong}: name a file that can be written.")
    path = resolve_model(args, status)
    with status.spinner(f"Loading {model_name(args)}"):
        from moert.api import LLM  # loads torch

        llm = LLM(
            path,
            memory_budget=args.memory_budget,
            expert_budget=args.expert_budget,
            precision=args.precision,
            ctx_size=args.ctx_size,
            threads=args.threads,
            kv_bits=args.kv_bits,
            cache_policy=args.cache_policy,
            load_order=args.load_order,
            prefetch=args.prefetch,
            overlap=not args.no_overlap,
            batch_size=vars(args).get("batch_size", 1),
            token_scheduler=vars(args).get("token_scheduler", "first-come"),
            **device_options(args),
            warm=vars(args).get("warm", False),
            offline=args.offline,
            on_status=status.say,
        )
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
    return Path(args.model).name if args.model else "the shipped model"


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


def sampling_params(args: argparse.Namespace, llm: LLM, status: Status) -> SamplingParams:
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
    status.say(
        "Sampling: " + ", ".join(f"{name} {value} ({origins.get(name, 'default')})" for name, value in values.items())
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
            status.say(warning)


def speeds(stats: GenerationStats) -> str:
    """One line: how long, how fast, what was read."""
    parts = [f"{stats.completion_tokens} tokens"]
    if stats.decode_tokens_per_s:
        parts.append(f"{stats.decode_tokens_per_s:.1f} tokens/s")
    parts.append(f"first after {stats.ttft_s:.2f} s")
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
