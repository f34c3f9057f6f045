"""Text to tokens and back, over the `tokenizers` library, from the files of a store or checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from moert.errors import StoreError

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # how a decoder shows a character whose bytes are not all there yet


class Tokenizer:
    """The tokenizer of a model, its special tokens and its chat template.

    Raises StoreError if tokenizer.json is missing or any of the files that it reads is not valid.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise StoreError(f"{self.folder} has no tokenizer.json; save the model's fast tokenizer there.")
        try:
            self._inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise StoreError(f"{path} is not a valid tokenizer: {error}.") from None
        # Set by training scripts for batches; here a long prompt must not be cut short.
        self._inner.no_truncation()
        self._inner.no_padding()
        self._config = self._read_json("tokenizer_config.json")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; lone surrogates (undecodable bytes of a command line) become question marks."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        return list(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids beyond the vocabulary (padding rows of the output matrix) give nothing."""
        return str(self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """An incremental decoder for one stream of tokens."""
        return Detokenizer(self, skip_special_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's output may have more rows."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token with its id, added ones included."""
        return dict(self._inner.get_vocab(with_added_tokens=True))

    @cached_property
    def bos(self) -> str | None:
        """The token that begins a text, as a string, for templates."""
        return self._special("bos_token")

    @cached_property
    def eos(self) -> str | None:
        """The token that ends a text, as a string, for templates."""
        return self._special("eos_token")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json; empty where there is none."""
        return self._read_json("generation_config.json")

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends an answer: those that any of the model's files name."""
        found: set[int] = set()
        for config in (self.generation_config, self._read_json("config.json")):
            value = config.get("eos_token_id")
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, int) and not isinstance(item, bool):
                    found.add(item)
        token = self._inner.token_to_id(self.eos) if self.eos else None
        return frozenset(found if token is None else found | {token})

    @cached_property
    def chat_template(self) -> str | None:
        """Source of the chat template, or None: chat_template.jinja, else tokenizer_config.json (its default one)."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return _read_text(path)
        value = self._config.get("chat_template")
        if isinstance(value, list):
            named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
            value = named.get("default", next(iter(named.values()), None))
        return value if isinstance(value, str) else None

    def _special(self, name: str) -> str | None:
        value = self._config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            value = json.loads(_read_text(path))
        except ValueError as error:
            raise StoreError(f"{path} is not valid JSON: {error}.") from None
        if not isinstance(value, dict):
            raise StoreError(f"{path} does not hold a JSON object.")
        return value


class Detokenizer:
    """Text of a stream of tokens, piece by piece; never part of a character.

    A token's text depends on its neighbours (a leading space, bytes of one character in several tokens), so tokens are
    decoded together with those of the piece before them, and a piece is held back while it ends inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []  # the tokens of the last piece, and their text
        self._shown = ""
        self._new: list[int] = []

    def push(self, token: int) -> str:
        """Take one token; return the text that is now certain, often none."""
        self._new.append(token)
        text = self._pending()
        return "" if text.endswith(_BROKEN) else self._advance(text)

    def flush(self) -> str:
        """The rest, at the end of the stream; bytes that make no character show as U+FFFD."""
        return self._advance(self._pending())

    def _pending(self) -> str:
        text = self._tokenizer.decode(self._context + self._new, self._skip)
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        # A byte-fallback decoder gives up on a whole run of bytes when one of them is wrong; what was shown stays.
        return self._tokenizer.decode(self._new, self._skip)

    def _advance(self, text: str) -> str:
        if text:
            self._context, self._new = self._new, []
            self._shown = self._tokenizer.decode(self._context, self._skip)
        return text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise StoreError(f"{path} is not UTF-8 text.") from None
