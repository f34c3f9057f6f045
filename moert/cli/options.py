"""Options of the command line: the parser that all commands use, and options made from the fields of `EngineConfig`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from moert.config import EngineConfig, did_you_mean

_PLAIN = (
    (r"argument ([^:]*): (.*)", r"\1: \2"),
    (r"invalid int value: (.*)", r"\1 is not a whole number"),
    (r"invalid float value: (.*)", r"\1 is not a number"),
    (r"invalid choice: (.*) \(choose from (.*)\)", r"\1 is not one of \2"),
    (r"the following arguments are required: (.*)", r"\1 is missing"),
)


class Parser(argparse.ArgumentParser):
    """Reports a wrong option in one sentence, an unknown one with the nearest that is known."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, allow_abbrev=False, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            name = next((text.partition("=")[0] for text in rest if text.startswith("-")), None)
            if name is None:
                self.error(f"{rest[0]!r} is one argument too many")
            known = (o for action in self._actions if action.help != argparse.SUPPRESS for o in action.option_strings)
            self._fail(f"there is no option {name}" + did_you_mean(name, known, self._more))
        return found

    def error(self, message: str) -> NoReturn:
        for pattern, plain in _PLAIN:
            message = re.sub(pattern, plain, message)
        self._fail(message + self._more)

    @property
    def _more(self) -> str:
        return f"; {self.prog} --help lists the options."

    def _fail(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


class Renamed(argparse.Action):
    """An option that has another name now, and says which."""

    def __init__(self, option_strings: Sequence[str], dest: str, new: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs="?", help=argparse.SUPPRESS)
        self._new = new

    def __call__(self, parser: argparse.ArgumentParser, *values: Any) -> NoReturn:
        parser.exit(2, f"{parser.prog}: {self.option_strings[0]} is called {self._new} here.\n")


def add_settings(parser: argparse.ArgumentParser, names: Iterable[str], **defaults: str) -> None:
    """Add the options of these fields of `EngineConfig`, or of all in these groups; what is not given stays None.

    defaults: values that the command itself takes where an option is not given.
    """
    wanted, groups = set(names), {g.title: g for g in parser._action_groups}
    for f in fields(EngineConfig):
        setting = f.metadata["setting"]
        if not {f.name, setting.group} & wanted:
            continue
        group = groups.get(setting.group)
        if group is None:
            group = groups[setting.group] = parser.add_argument_group(setting.group)
        option = f"--{f.name.replace('_', '-')}"
        flags = [option] if setting.short is None else [setting.short, option]
        default = defaults.get(f.name)
        shown = default or (f.default if isinstance(f.default, str) else None)
        text = setting.help.replace("%", "%%") + (f" (default {shown})" if shown else "")
        if isinstance(f.default, bool):
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, help=text)
        else:
            read = _reader(option, setting.read)
            group.add_argument(*flags, default=default, type=read, metavar=setting.metavar, help=text)


def _reader(option: str, read: Callable[[str, Any], Any]) -> Callable[[str], Any]:
    """Make a type for argparse that raises UsageError; what reads as None, such as `auto`, stays as it is."""

    def parse(text: str) -> Any:
        value = read(option, text)
        return text if value is None else value

    return parse


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that options gave, by name."""
    return {f.name: value for f in fields(EngineConfig) if (value := vars(args).get(f.name)) is not None}
