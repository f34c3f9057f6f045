"""Tokenizers against the library's own decoding of the whole text; every way for their files to be wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from moert.errors import StoreError
from moert.text.chat import render
from moert.text.tokenizer import NAMED_TOKENS, Detokenizer, Tokenizer

SAMPLE = ["the quick brown fox", "naïve café 日本語 🙂👩‍👩‍👧", "import os\n\n    return x"] * 3


@cache
def byte_level() -> Tokenizer:
    """A byte-level BPE, as Qwen and OLMoE have."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    inner.train_from_iterator(SAMPLE, trainer)
    return saved(inner, {})


@cache
def byte_fallback() -> Tokenizer:
    """A sentencepiece-like BPE with <0xXX> tokens and a stripped leading space, as Mixtral has."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁theabcé", "▁t", "he", "▁the"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return saved(inner, {})


def saved(inner: tokenizers.Tokenizer, files: dict[str, object], folder: Path | None = None) -> Tokenizer:
    folder = folder or Path(mkdtemp())
    inner.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return Tokenizer(folder)


def pieces(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 330), max_size=40), skip=st.booleans())
def test_byte_level_pieces_are_the_whole_text_for_any_ids(ids: list[int], skip: bool) -> None:
    assert "".join(pieces(byte_level().detokenizer(skip), ids)) == byte_level().decode(ids, skip)


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.sampled_from("the abcé 日🙂\n") | st.characters(codec="utf-8"), max_size=30))
@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_pieces_of_a_text_are_whole_characters(make: object, text: str) -> None:
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    ids = tokenizer.encode(text)
    got = pieces(tokenizer.detokenizer(), ids)
    assert "".join(got) == tokenizer.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in got)


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 2) | st.integers(131, 280), max_size=30))  # no byte that is a letter by itself
def test_byte_fallback_pieces_of_any_ids(ids: list[int]) -> None:
    """The library turns a run of bytes with a wrong one wholly into U+FFFD; what was shown before that stays shown."""
    tokenizer = byte_fallback()
    got, whole = "".join(pieces(tokenizer.detokenizer(), ids)), tokenizer.decode(ids)
    if "\ufffd" not in whole:
        assert got == whole
    assert [c for c in got if c.isascii()] == [c for c in whole if c.isascii()]


def test_a_character_in_several_tokens_comes_in_one_piece() -> None:
    for tokenizer in (byte_level(), byte_fallback()):
        ids = tokenizer.encode("a𝄞b")
        assert len(ids) >= 6
        got = [p for p in pieces(tokenizer.detokenizer(), ids) if p]
        assert got == ["a", "𝄞", "b"]


def test_an_unfinished_character_is_flushed() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a𝄞")[:-1]
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push(i) for i in ids] == ["a", *[""] * (len(ids) - 1)]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_leading_spaces_survive_in_pieces() -> None:
    tokenizer = byte_fallback()
    ids = tokenizer.encode("the the")
    assert pieces(tokenizer.detokenizer(), [1, *ids]) == ["", "the", " the", ""]


def test_special_tokens_and_unknown_ids() -> None:
    tokenizer = byte_level()
    assert tokenizer.decode([0, *tokenizer.encode("hi"), 1, 9999]) == "hi"
    assert tokenizer.decode([0, *tokenizer.encode("hi")], skip_special_tokens=False) == "<s>hi"
    assert tokenizer.vocab_size == 320
    assert tokenizer.encode("\udcff") == tokenizer.encode("?")


def fresh() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<end>": 2, "w": 3}, unk_token="w"))


def test_every_file_may_name_an_end(tmp_path: Path) -> None:
    files = {
        "generation_config.json": {"eos_token_id": [7, 2]},
        "config.json": {"eos_token_id": 5},
        "tokenizer_config.json": {"eos_token": {"content": "</s>"}, "bos_token": "<s>"},
    }
    tokenizer = saved(fresh(), files, tmp_path)
    assert tokenizer.generation_config == {"eos_token_id": [7, 2]}
    assert tokenizer.eos_ids == {7, 2, 5, 1}
    assert (tokenizer.bos, tokenizer.eos) == ("<s>", "</s>")
    bare = tmp_path / "bare"
    bare.mkdir()
    tokenizer = saved(
        fresh(), {"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": None}}, bare
    )
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eos_ids, tokenizer.chat_template) == (None, None, frozenset(), None)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"chat_template": "A"}}, "A"),
        ({"tokenizer_config.json": {"chat_template": "A"}, "chat_template.jinja": "B"}, "B"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
                }
            },
            "D",
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "R"}]}}, "R"),
        ({"tokenizer_config.json": {"chat_template": []}}, None),
    ],
)
def test_where_the_chat_template_is_found(tmp_path: Path, files: dict[str, object], expected: str | None) -> None:
    assert saved(fresh(), files, tmp_path).chat_template == expected


def special(content: str, **flags: bool) -> dict[str, object]:
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, **flags}


def with_lowercase() -> tokenizers.Tokenizer:
    """A tokenizer whose normalizer shows which added tokens are matched in normalised text."""
    inner = fresh()
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([tokenizers.AddedToken("<s>", rstrip=True)])
    inner.add_tokens([tokenizers.AddedToken("<T>", normalized=False)])
    return inner


CONFIG = "tokenizer_config.json"
SIDE_FILES: dict[str, dict[str, object]] = {
    "decoder": {
        CONFIG: {
            "eos_token": "<|fin|>",
            "added_tokens_decoder": {
                "6": special("<|fin|>", special=True),
                "5": special("<|turn|>", special=True, lstrip=True, rstrip=True),
                "7": special("<Word>", special=False, single_word=True, normalized=True),
            },
        }
    },
    "decoder and older files": {
        CONFIG: {"added_tokens_decoder": {"5": special("<|turn|>", special=True)}, "pad_token": "<|fin|>"},
        "added_tokens.json": {"<Word>": 9},
        "special_tokens_map.json": {"eos_token": "<|turn|>"},
    },
    "added_tokens.json": {
        CONFIG: {"eos_token": "<|fin|>"},
        "added_tokens.json": {"<|fin|>": 6, "<|turn|>": 5, "<Word>": 8},
    },
    "an id of another token": {"added_tokens.json": {"<|turn|>": 0, "<Word>": 4}},
    "special_tokens_map.json": {
        CONFIG: {"eos_token": "</s>", "unk_token": "w"},
        "special_tokens_map.json": {
            "eos_token": special("<|fin|>", lstrip=True),
            "bos_token": "<s>",
            "pad_token": special("<end>"),
            "image_token": "<Word>",
        },
        "added_tokens.json": {"<|fin|>": 5},
    },
    "other flags than tokenizer.json": {
        CONFIG: {
            "bos_token": "<s>",
            "added_tokens_decoder": {"0": special("<s>", special=True), "4": special("<T>", special=True, lstrip=True)},
        }
    },
    "additional special tokens": {CONFIG: {"additional_special_tokens": ["<|turn|>", "<|fin|>"]}},
    "extra special tokens": {
        CONFIG: {"extra_special_tokens": ["<|turn|>"], "additional_special_tokens": ["<Word>"]},
        "special_tokens_map.json": {"extra_special_tokens": [special("<|fin|>"), "<|turn|>"]},
        "added_tokens.json": {"<|turn|>": 5},
    },
    "extra special tokens by name": {
        CONFIG: {"extra_special_tokens": {"image_token": "<|turn|>", "video_token": "<Word>"}, "audio_token": "<|fin|>"}
    },
    "tokens with their type": {
        CONFIG: {
            "eos_token": {"__type": "AddedToken", **special("<|fin|>", special=True, normalized=True)},
            "additional_special_tokens": [{"__type": "AddedToken", **special("<|turn|>", special=True, rstrip=True)}],
        }
    },
    "special only by name": {
        CONFIG: {"eos_token": "<|fin|>", "added_tokens_decoder": {"5": special("<|fin|>", special=False)}}
    },
    "special tokens in texts": {CONFIG: {"eos_token": "</s>", "split_special_tokens": True}},
    "all names": {
        CONFIG: {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "sep_token": "<sep>",
            "cls_token": "<cls>",
            "mask_token": "<mask>",
        }
    },
}


@pytest.mark.parametrize("files", SIDE_FILES.values(), ids=SIDE_FILES.keys())
def test_tokens_of_side_files_are_those_of_transformers(tmp_path: Path, files: dict[str, object]) -> None:
    from transformers import AutoTokenizer

    config = {"tokenizer_class": "PreTrainedTokenizerFast", **files.get(CONFIG, {})}  # type: ignore[dict-item]
    tokenizer = saved(with_lowercase(), {**files, CONFIG: config}, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    reference = AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        "<|turn|>user W w<|fin|>",
        "w <|turn|> w  <|fin|> w<s>  w",
        "<T> <t> <Word> <word> a<Word>b W <Word>",
        "<WORD>  <|TURN|><end></s><pad><unk><sep><cls><mask>",
    ):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text, add_special_tokens=False), text
        for skip in (False, True):
            assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip), text
    assert tokenizer.vocabulary == reference.get_vocab()
    assert tokenizer.special_tokens == reference.special_tokens_map
    assert tokenizer.eos_ids == ({reference.eos_token_id} if reference.eos_token is not None else set())
    template = "{% for name in names %}{{ name }}{% endfor %}" + "".join(
        f"[{name}: {{{{ {name} }}}}]" for name in (*NAMED_TOKENS, "image_token", "video_token", "audio_token")
    )
    messages = [{"role": "user", "content": "w"}]
    expected = reference.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert render(messages, template, special_tokens=tokenizer.special_tokens) == expected


def test_padding_of_tokenizer_json_names_the_pad_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    inner = fresh()
    inner.enable_padding(pad_token="<end>", pad_id=2)
    tokenizer = saved(inner, {CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast"}}, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.special_tokens == reference.special_tokens_map == {"pad_token": "<end>"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (CONFIG, {"added_tokens_decoder": []}, "added_tokens_decoder is not an object"),
        (CONFIG, {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder is not an object"),
        (CONFIG, {"added_tokens_decoder": {"5": {}}}, "added_tokens_decoder has a token that is neither"),
        (CONFIG, {"eos_token": {"content": "x", "lstrip": 3}}, "eos_token has a token that is neither"),
        (CONFIG, {"extra_special_tokens": "x"}, "extra_special_tokens is neither a list nor"),
        (CONFIG, {"extra_special_tokens": [5]}, "extra_special_tokens has a token that is neither"),
        ("added_tokens.json", {"x": "5"}, r"x has no number for its id in added_tokens\.json"),
    ],
)
def test_broken_tokens_are_one_sentence(tmp_path: Path, name: str, value: object, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        saved(fresh(), {name: value}, tmp_path)


def test_a_broken_generation_config_is_a_warning(tmp_path: Path) -> None:
    tokenizer = saved(fresh(), {"generation_config.json": '{"top_k": 5,}'}, tmp_path)
    assert tokenizer.generation_config == {}
    assert len(tokenizer.warnings) == 1
    assert "generation_config.json is not valid JSON" in tokenizer.warnings[0]
    assert saved(fresh(), {"generation_config.json": "{}"}, tmp_path).warnings == []


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": "J", CONFIG: {"chat_template": "C"}},
        {"additional_chat_templates/tool_use.jinja": "T", "chat_template.jinja": "J", CONFIG: {"chat_template": "C"}},
        {CONFIG: {"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]}},
        {CONFIG: {"chat_template": "C"}, "chat_template.json": {"chat_template": "P"}},
    ],
)
def test_templates_are_found_where_transformers_finds_them(tmp_path: Path, files: dict[str, object]) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "additional_chat_templates").mkdir()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **files[CONFIG]}  # type: ignore[dict-item]
    tokenizer = saved(fresh(), {**files, CONFIG: config}, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == reference.get_chat_template()
    templates = reference.chat_template
    assert tokenizer.chat_templates == (templates if isinstance(templates, dict) else {"default": templates})


def test_the_template_of_older_processors(tmp_path: Path) -> None:
    assert saved(fresh(), {"chat_template.json": {"chat_template": "P"}}, tmp_path).chat_template == "P"


def test_a_prompt_is_never_cut_short(tmp_path: Path) -> None:
    inner = fresh()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.enable_truncation(2)
    inner.enable_padding(length=8)
    assert saved(inner, {}, tmp_path).encode("w w w w") == [3, 3, 3, 3]


def test_a_missing_or_broken_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"has no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{]")
    with pytest.raises(StoreError, match=r"tokenizer\.json is not a valid tokenizer"):
        Tokenizer(tmp_path)
    with pytest.raises(StoreError, match=r"tokenizer_config\.json is not valid JSON"):
        saved(fresh(), {"tokenizer_config.json": "{]"}, tmp_path)
    with pytest.raises(StoreError, match="does not hold a JSON object"):
        saved(fresh(), {"tokenizer_config.json": "[]"}, tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match="not UTF-8"):
        Tokenizer(tmp_path)
