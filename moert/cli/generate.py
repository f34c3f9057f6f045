"""Continue a prompt: the text goes to stdout as it is made, everything else to stderr."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from moert.cli import common
from moert.errors import UsageError


def add_options(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt (default: stdin)")
    prompt.add_argument("-f", "--file", type=Path, help="a file that holds the prompt")
    parser.add_argument("--chat", action="store_true", help="the prompt is a question: use the model's chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of text")
    common.add_run_options(parser)


def main(args: argparse.Namespace) -> int:
    if args.system is not None and not args.chat:
        raise UsageError("A system prompt (-sys) needs --chat: without it the prompt is continued as it is.")
    prompt = _prompt(args)
    status = common.Status(args.quiet)
    with common.open_llm(args, status) as llm:
        params = common.sampling_params(args, llm, status)
        messages = [{"role": "system", "content": args.system}] if args.system else []
        messages.append({"role": "user", "content": prompt})
        if args.chat and llm.tokenizer.chat_template is None:
            status.say("The model has no chat template: the texts follow one another.")
        if args.json:
            done = llm.chat(messages, params) if args.chat else llm.generate(prompt, params)[0]
            about = {"model": str(llm.store.path), "finish_reason": done.finish_reason}
            print(json.dumps({"text": done.text, "token_ids": done.token_ids, **about, **done.stats.as_dict()}))
            return 0
        stats = None
        try:
            for piece in llm.stream_chat(messages, params) if args.chat else llm.stream(prompt, params):
                common.write_text(piece.text)
                stats = piece.stats
        finally:
            print(flush=True)
        if stats:
            status.say(f"{common.speeds(stats)} · seed {stats.seed}")
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        text: str = args.prompt
    elif args.file is None and sys.stdin.isatty():
        raise UsageError("There is no prompt: give one with -p, -f or on stdin.")
    else:
        data = sys.stdin.buffer.read() if args.file is None else args.file.read_bytes()
        try:
            text = data.decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError:
            raise UsageError(f"The prompt in {args.file or 'stdin'} is not UTF-8 text.") from None
    if not text:
        raise UsageError("The prompt is empty.")
    return text
