"""Text to tokens and back, over the `tokenizers` library, from the files of a store or checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from moert.errors import StoreError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEMPLATE_FILES = "additional_chat_templates/*.jinja"
_TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
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
        self._config = self._read_json("tokenizer_config.json")
        side = SideTokens(
            self.folder,
            self._inner,
            self._config,
            *map(self._read_json, ("special_tokens_map.json", "added_tokens.json")),
        )
        self._inner.add_tokens(side.missing())
        # Set by training scripts for batches; here a long prompt must not be cut short.
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = self._config.get("split_special_tokens") is True
        self.special_tokens = {name: str(token) for name, token in side.named.items()}

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

    @property
    def bos(self) -> str | None:
        """The token that begins a text, as a string."""
        return self.special_tokens.get("bos_token")

    @property
    def eos(self) -> str | None:
        """The token that ends a text, as a string."""
        return self.special_tokens.get("eos_token")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """The contents of generation_config.json; empty where there is none, or where it is in `warnings`."""
        return self._generation_config[0]

    @property
    def warnings(self) -> list[str]:
        """Sentences about files that cannot be used and that a model can do without."""
        return self._generation_config[1]

    @cached_property
    def _generation_config(self) -> tuple[dict[str, Any], list[str]]:
        try:
            return self._read_json("generation_config.json"), []
        except StoreError as error:
            return {}, [
                f"{str(error).removesuffix('.')}: its sampling defaults and end tokens are not used; correct it."
            ]

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
    def chat_templates(self) -> dict[str, str]:
        """Sources of all chat templates by their names; the files' replace those of tokenizer_config.json.

        chat_template.json, which older processors have, counts where there is nothing else, as for AutoTokenizer.
        """
        paths = {"default": self.folder / "chat_template.jinja"}
        paths |= {path.name.removesuffix(".jinja"): path for path in sorted(self.folder.glob(TEMPLATE_FILES))}
        if found := {name: _read_text(path) for name, path in paths.items() if path.is_file()}:
            return found
        for file in (self._config, self._read_json("chat_template.json")):
            value = file.get("chat_template")
            if isinstance(value, list):
                value = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
            value = value if isinstance(value, dict) else {"default": value}
            if found := {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, str)}:
                return found
        return {}

    @property
    def chat_template(self) -> str | None:
        """Source of the chat template: the default one, else the first; None where there is none."""
        templates = self.chat_templates
        return templates.get("default", next(iter(templates.values()), None))

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            value = json.loads(_read_text(path))
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{path} is not valid JSON: {error}.") from None
        if not isinstance(value, dict):
            raise StoreError(f"{path} does not hold a JSON object.")
        return value


class SideTokens:
    """Tokens that files beside tokenizer.json name, with the precedence of transformers' generic fast tokenizer.

    named: special tokens by the names that templates know them by. extra: special tokens without a name. added: by the
    ids that the files give, which only order them: a token that is new gets the next free id.
    """

    def __init__(
        self,
        folder: Path,
        inner: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        special_tokens_map: Mapping[str, Any],
        added_tokens: Mapping[str, Any],
    ) -> None:
        self._folder, self._inner = folder, inner
        self.named: dict[str, AddedToken | str] = {}
        self.extra: list[AddedToken | str] = []
        self.added: dict[int, AddedToken] = {}
        self._by_content: dict[str, AddedToken] = {}
        fields = dict(config)
        if "additional_special_tokens" in fields and not fields.get("extra_special_tokens"):
            fields["extra_special_tokens"] = fields.pop("additional_special_tokens")
        named = {
            name: fields.pop(name) for name in list(fields) if _is_own_name(name) and isinstance(fields[name], str)
        }
        if isinstance(fields.get("extra_special_tokens"), dict):
            named |= fields.pop("extra_special_tokens")
        if "added_tokens_decoder" in fields:  # then the older files do not count
            self._add_table(fields["added_tokens_decoder"])
        else:
            self._merge(fields, special_tokens_map)
            if isinstance(fields.get("extra_special_tokens"), dict):
                named |= fields.pop("extra_special_tokens")
            self._add_older(fields, added_tokens)
        if inner.padding is not None:
            fields.setdefault("pad_token", inner.padding["pad_token"])
        for name in NAMED_TOKENS:
            if isinstance(value := fields.get(name), (str, dict, AddedToken)):
                token = self._token(name, value)
                self.named[name] = self._by_content.get(str(token), token)
        extra = fields.get("extra_special_tokens", fields.get("additional_special_tokens"))
        if isinstance(extra, dict):
            named = extra | named
        elif extra is not None:
            self.extra = [self._token("extra_special_tokens", value) for value in self._list(extra)]
        named = {k: v for k, v in fields.items() if _is_own_name(k) and isinstance(v, (str, AddedToken))} | named
        self.named |= {name: self._token(name, value) for name, value in named.items()}

    def missing(self) -> list[AddedToken]:
        """Tokens to add to the tokenizer, in order."""
        have = self._inner.get_added_tokens_decoder().values()
        known, exact = {token.content for token in have}, {repr(token) for token in have}
        found: list[AddedToken | str] = [t for _, t in sorted(self.added.items()) if repr(t) not in exact]
        known |= {str(token) for token in found}
        for token in (*self.named.values(), *self.extra):
            if str(token) not in known:
                known.add(str(token))
                found.append(token)
        names = {str(token) for token in self.named.values()}
        result = [AddedToken(token, special=True) if isinstance(token, str) else token for token in found]
        for token in result:
            token.special = token.special or token.content in names
        return result

    def _add(self, index: int, token: AddedToken) -> None:
        self.added[index] = self._by_content[token.content] = token

    def _add_table(self, table: Any) -> None:
        if not isinstance(table, dict) or not all(k.isdecimal() and isinstance(v, dict) for k, v in table.items()):
            raise self._error("added_tokens_decoder", "is not an object of tokens by their ids")
        for index, value in table.items():
            token = self._token("added_tokens_decoder", value)
            assert isinstance(token, AddedToken)
            self._add(int(index), token)

    def _merge(self, fields: dict[str, Any], special_tokens_map: Mapping[str, Any]) -> None:
        """Let special_tokens_map.json replace `fields`; its extra special tokens come in addition."""
        for name, value in special_tokens_map.items():
            if name == "extra_special_tokens" and isinstance(value, list):
                tokens = list(fields.get(name) or [])
                for item in value:
                    token = self._token(name, {**item, "special": True} if isinstance(item, dict) else item)
                    tokens += [] if token in tokens else [token]
                value = tokens
            elif name != "extra_special_tokens" and isinstance(value, dict):
                value = self._token(name, {**value, "special": True})
            fields[name] = value

    def _add_older(self, fields: Mapping[str, Any], added_tokens: Mapping[str, Any]) -> None:
        """Take added_tokens.json, which says nothing but ids, and then tokenizer.json's own tokens."""
        special = {str(fields[name]) for name in NAMED_TOKENS if fields.get(name)}
        special |= {str(token) for token in fields.get("extra_special_tokens") or []}
        for content, index in added_tokens.items():
            if type(index) is not int:
                raise self._error(content, "has no number for its id", "added_tokens.json")
            self._add(index, AddedToken(content, normalized=content not in special, special=content in special))
        for index, token in self._inner.get_added_tokens_decoder().items():
            self._add(index, token)

    def _token(self, name: str, value: Any) -> AddedToken | str:
        if isinstance(value, (str, AddedToken)):
            return value
        fields = {key: value[key] for key in _TOKEN_FIELDS if key in value} if isinstance(value, dict) else {}
        flags_good = all(isinstance(flag, bool) for key, flag in fields.items() if key != "content")
        if not isinstance(fields.get("content"), str) or not flags_good:
            raise self._error(name, "has a token that is neither a string nor an object with `content` and flags")
        return AddedToken(**fields)

    def _list(self, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise self._error("extra_special_tokens", "is neither a list nor an object")
        return value

    def _error(
        self, name: str, what: str, file: str = "tokenizer_config.json or special_tokens_map.json"
    ) -> StoreError:
        return StoreError(f"{name} {what} in {file} of {self._folder}: correct it, or save the tokenizer again.")


def _is_own_name(name: str) -> bool:
    """Whether a field names a special token that only this model has, such as `image_token`."""
    return name.endswith("_token") and name not in NAMED_TOKENS


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
