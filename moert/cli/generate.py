"""Continue a prompt, or several together: the text goes to stdout as it is made, everything else to stderr."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moert.cli import common
from moert.cli.figures import add_options as add_figures_options
from moert.cli.figures import figures
from moert.cli.options import add_settings
from moert.cli.progress import line_progress
from moert.cli.status import Status
from moert.config import PROMPTS
from moert.errors import UsageError

if TYPE_CHECKING:
    from moert.api import LLM, Chunk
    from moert.engine.sampling import ResolvedParams

_TITLE = 60  # characters of a prompt that stand above its text


def add_options(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "-p", "--prompt", metavar="TEXT", action="append", help="the prompt (default: stdin; may be given again)"
    )
    prompt.add_argument("-f", "--file", type=Path, help="a file that holds the prompt")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="more prompts: one per line, or JSON lines if it ends in .jsonl"
    )
    parser.add_argument("--chat", action="store_true", help="the prompt is a question: use the model's chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each prompt instead of text")
    common.add_run_options(parser)
    common.add_template_options(parser)
    add_settings(parser, [PROMPTS])
    add_figures_options(parser)


def main(args: argparse.Namespace) -> int:
    if args.system is not None and not args.chat:
        raise UsageError("A system prompt (-sys) needs --chat, since without it the prompt is continued as it is.")
    template_args = common.template_args(args)
    if template_args and not args.chat:
        raise UsageError("--template-arg and --no-think need --chat, since without it no chat template is used.")
    prompts = _prompts(args)
    if len(prompts) == 1:
        args.batch_size = 1
    status = Status.of(args)
    with figures(args, status) as taken, common.open_llm(args, status) as llm:
        taken.of(llm)
        status.say(common.headline(args, llm))
        params = common.sampling_params(args, llm, status)
        if args.chat and llm.tokenizer.chat_template is None:
            status.warn("the model has no chat template, so it continues the text instead of answering it")
        if len(prompts) > 1:
            return _several(args, llm, prompts, params, status, template_args)
        messages = _messages(args, prompts[0])
        if args.json:
            done = (
                llm.chat(messages, params, template_args=template_args)
                if args.chat
                else llm.generate(prompts[0], params)[0]
            )
            print(_json(llm, done.text, done.token_ids, done))
            return 0
        stats = None
        try:
            if args.chat:
                pieces = llm.stream_chat(messages, params, template_args=template_args)
            else:
                pieces = llm.stream(prompts[0], params)
            for piece in pieces:
                common.write_text(piece.text)
                stats = piece.stats
        finally:
            print(flush=True)
        if stats:
            common.conclude(llm, stats, status, f" · seed {stats.seed}")
    return 0


def _messages(args: argparse.Namespace, prompt: str) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": args.system}] if args.system else []
    return [*messages, {"role": "user", "content": prompt}]


def _json(llm: LLM, text: str, token_ids: list[int], last: Any) -> str:
    """`last`: what has the finish reason and the figures of the whole answer."""
    about = {"model": str(llm.store.path), "finish_reason": last.finish_reason}
    if last.finish_reason == "error":
        about["error"] = str(last.error)
    return json.dumps({"text": text, "token_ids": token_ids, **about, **last.stats.as_dict()})


def _several(
    args: argparse.Namespace,
    llm: LLM,
    prompts: list[str],
    params: ResolvedParams,
    status: Status,
    template_args: dict[str, Any],
) -> int:
    inputs: Sequence[str | list[int]] = prompts
    if args.chat:
        inputs = [llm.encode_chat(_messages(args, p), template_args=template_args) for p in prompts]
    output = _Output(llm, prompts, args.json)
    start, tokens = time.perf_counter(), 0
    # A text that is made on the terminal shows the progress itself, and a spinner would be drawn over it.
    shown = not args.json and sys.stdout.isatty()
    with contextlib.nullcontext(lambda text: None) if shown else line_progress(status) as progress:
        try:
            for index, piece in llm.stream_many(inputs, params):
                output.add(index, piece)
                tokens += len(piece.token_ids)
                if (seconds := time.perf_counter() - start) > 2:
                    speed = f"{tokens / seconds:.1f} tokens/s"
                    progress(f"{output.ended} of {len(prompts)} prompts done, {tokens} tokens, {speed}")
        finally:
            output.close()
    seconds = time.perf_counter() - start
    status.say(f"{len(prompts)} prompts · {tokens} tokens in {seconds:.1f} s · {tokens / seconds:.1f} tokens/s")
    for number, pieces in enumerate(output.pieces, 1):
        if pieces[-1].error is not None:
            status.show(f"moert: Prompt {number} of {len(prompts)}: {pieces[-1].error}", style="")
    return 1 if any(pieces[-1].error for pieces in output.pieces) else 0


class _Output:
    """Prints answers in the order of their prompts: of the first that has not ended what there is, later ones then."""

    def __init__(self, llm: LLM, prompts: list[str], as_json: bool) -> None:
        self._llm, self._prompts, self._as_json = llm, prompts, as_json
        self.pieces: list[list[Chunk]] = [[] for _ in prompts]
        self.ended = 0
        self._next = 0  # the first prompt whose answer is not printed to its end
        self._printed = 0  # pieces of it

    def add(self, index: int, piece: Chunk) -> None:
        self.pieces[index].append(piece)
        self.ended += piece.finish_reason is not None
        while self._next < len(self.pieces) and self._print():
            self._next, self._printed = self._next + 1, 0

    def close(self) -> None:
        """Print what else has ended; after Ctrl-C that may be answers behind one that has not."""
        if self._printed:
            print(flush=True)
        behind = range(self._next + (self._printed > 0), len(self.pieces))
        self._printed = 0
        for self._next in (i for i in behind if self._ended(i)):
            self._print()
            self._printed = 0

    def _ended(self, index: int) -> bool:
        return bool(self.pieces[index]) and self.pieces[index][-1].finish_reason is not None

    def _print(self) -> bool:
        """Print what is new of the next answer; returns whether it is whole. JSON comes when it is."""
        pieces, whole = self.pieces[self._next], self._ended(self._next)
        if self._as_json:
            if whole:
                text, ids = "".join(p.text for p in pieces), [i for p in pieces for i in p.token_ids]
                print(_json(self._llm, text, ids, pieces[-1]), flush=True)
            return whole
        if pieces and not self._printed:
            title = " ".join(self._prompts[self._next].split())
            title = title if len(title) <= _TITLE else title[: _TITLE - 3] + "..."
            print("\n" * (self._next > 0) + f"==> {self._next + 1}: ", end="")
            common.write_text(title)
            print(" <==")
        for piece in pieces[self._printed :]:
            common.write_text(piece.text)
        self._printed = len(pieces)
        if whole:
            print(flush=True)
        return whole


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts: list[str] = list(args.prompt or [])
    if args.file is not None or (not prompts and args.prompts is None):
        if args.file is None and sys.stdin.isatty():
            raise UsageError("There is no prompt: give one with -p, -f, --prompts or on stdin.")
        data = sys.stdin.buffer.read() if args.file is None else args.file.read_bytes()
        try:
            prompts.append(data.decode("utf-8").removesuffix("\n"))
        except UnicodeDecodeError:
            raise UsageError(f"The prompt in {args.file or 'stdin'} is not UTF-8 text.") from None
    if not all(prompts):
        number = f" {prompts.index('') + 1} of {len(prompts)}" if len(prompts) > 1 else ""
        raise UsageError(f"The prompt{number} is empty.")
    return prompts + (_read_prompts(args.prompts) if args.prompts is not None else [])


def _read_prompts(path: Path) -> list[str]:
    """The lines of a file, empty ones left out; of a .jsonl file a string each, or an object with a `prompt`."""
    lines = common.read_text(path, "A prompt").split("\n")
    found = []
    for number, line in enumerate((line.removesuffix("\r") for line in lines), 1):
        if not line.strip():
            continue
        found.append(_from_json(line, f"Line {number} of {path}") if path.suffix == ".jsonl" else line)
    if not found:
        raise UsageError(f"{path} holds no prompt.")
    return found


def _from_json(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        raise UsageError(f"{where} is not JSON.") from None
    prompt = value["prompt"] if isinstance(value, dict) and value.keys() == {"prompt"} else value
    if not isinstance(prompt, str) or not prompt:
        raise UsageError(f'{where} is neither a string nor an object with a "prompt" and nothing else.')
    return prompt
