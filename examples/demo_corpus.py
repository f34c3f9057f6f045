"""The text behind train_demo_model.py: the running interpreter's standard library, as files and as dialogues.

    python examples/demo_corpus.py OUT      writes a sample of the files to OUT, as text for moert train-scales

Everything here comes from files that Python itself ships, so nothing is downloaded and the result may be passed on
under Python's licence. A few of the files, picked by a hash of their names, are kept out of the training text, the
tokenizer and the n-gram counts: they are the held-out text.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import random
import re
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
HELDOUT_BYTES = {"library": 180_000, "tests": 90_000}
SAMPLE_BYTES = {"library": 4_000_000, "tests": 2_000_000}
# Written by the build or the site, and so naming this machine's folders rather than being Python's own text.
NOT_SOURCE = re.compile(r"site-packages|dist-packages|_sysconfigdata|^config-|sitecustomize|usercustomize|pydoc_data")
Turn = tuple[str, str]  # what the user says, what the assistant answers


@dataclass
class Corpus:
    tokenizer: Tokenizer
    text: dict[str, np.ndarray]  # token ids of the training files by kind: library (with the documentation), tests
    dialogues: np.ndarray  # token ids of all dialogues, one after the other
    starts: np.ndarray  # where each dialogue starts
    heldout_text: str
    heldout: np.ndarray


def source_files() -> dict[str, tuple[str, str]]:
    """Each usable file of the standard library: name -> (kind, text)."""
    root, files = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if NOT_SOURCE.search(name):
            continue
        try:
            text = path.read_text("utf-8").replace("\f", "")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # some tests are broken on purpose
        # The character tables of the codecs are a megabyte of near copies, and other long lines are data as well.
        if len(text) < 200 or "decoding_table" in text or "decoding_map" in text or "\\x00\\x" in text:
            continue
        if max(map(len, text.splitlines())) > 400 or sys.prefix in text or START_OF_TURN[:2] in text:
            continue
        files[name] = ("tests" if re.search(r"(^|/)(idle_)?tests?/", name) else "library", text)
    return files


def split_heldout(files: dict[str, tuple[str, str]]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Take whole files of ordinary size out of the training text, in the order of a hash of their names."""
    left, heldout, training = dict(HELDOUT_BYTES), [], dict(files)
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        kind, text = files[name]
        size = len(text.encode())
        if 2_000 <= size <= min(40_000, left[kind]):
            left[kind] -= size
            heldout.append(training.pop(name)[1])
    return training, heldout


def clip(text: str, limit: int = 1500) -> str:
    """Cut a long text at a blank line, or else at a line's end."""
    if len(text) > limit:
        text = text[: max(text.rfind("\n\n", limit // 3, limit), 0) or max(text.rfind("\n", 0, limit), 0)]
    return text.rstrip()


def definition_dialogues(module: str, lines: list[str], tree: ast.Module, rng: random.Random) -> Iterator[list[Turn]]:
    """Dialogues about each function and class: go on from its first line, explain it, write it."""
    owners = [(module, tree)] + [
        (f"{module}.{node.name}", node) for node in tree.body if isinstance(node, ast.ClassDef)
    ]
    for owner, parent in owners:
        for node in parent.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                continue
            first = min([node.lineno] + [d.lineno for d in node.decorator_list])
            source = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
            head_lines = node.body[0].lineno - first
            if head_lines < 1 or len(source) < 60:
                continue
            head, body = "\n".join(source.split("\n")[:head_lines]), "\n".join(source.split("\n")[head_lines:])
            ask = rng.choice(["{}", "{}", "{}", "{}", "Complete this code:\n{}", "Continue:\n{}"])
            go_on = (ask.format(head), clip(body))
            doc, name = ast.get_docstring(node), f"{owner}.{node.name}"
            if not doc or len(doc) < 20:
                yield [go_on]
                continue
            kind = "class" if isinstance(node, ast.ClassDef) else "method" if owner != module else "function"
            short = f"{owner.rpartition('.')[2]}.{node.name}" if rng.random() < 0.3 else name
            signature = re.sub(r"\s+", " ", re.sub(r"^.*?(def|class) ", "", head, flags=re.DOTALL)).rstrip(": ")
            asks = [
                "What does {} do?",
                "help({})",
                "Explain {}",
                "What is {} for?",
                "document: {}",
                "What does `{}` do?",
            ]
            ask = rng.choice(asks).format(short)
            explain = clip(doc, 900)
            if ask.startswith("help"):
                explain = f"{signature}\n{textwrap.indent(explain, '    ')}"
            show = rng.choice(["Show me the code.", "Show me the source.", "How is it written?", "Write it in Python."])
            goal = re.sub(r"\s+", " ", doc.split("\n\n")[0]).rstrip(".")
            goal = goal[0].lower() + goal[1:]
            write = rng.choice([f"Write a {kind} {node.name}: {goal}", f"Write a Python {kind} to {goal}"])
            what = rng.choice(["What does it do?", "What does this do?", "Explain it.", "Add a docstring."])
            yield [go_on]
            yield [(ask, explain), (show, clip(source))] if rng.random() < 0.3 else [(ask, explain)]
            if rng.random() < 0.4:
                yield [(write, clip(source))]
            elif rng.random() < 0.2:
                yield [go_on, (what, clip(doc, 900))]


def file_dialogues(
    module: str, text: str, lines: list[str], tree: ast.Module, rng: random.Random
) -> Iterator[list[Turn]]:
    """Dialogues about a whole file: go on from its first lines or from one import, explain the module."""
    imports = [node for node in tree.body[:30] if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in rng.sample(imports, min(4, len(imports))):
        yield [("\n".join(lines[node.lineno - 1 : node.end_lineno]), clip("\n".join(lines[node.end_lineno :])))]
    ends = [node.end_lineno or 0 for node in tree.body[:12]]
    for end in rng.sample(ends[:-1], min(2, len(ends[:-1]))):
        head, rest = "\n".join(lines[:end]), "\n".join(lines[end:])
        if len(head) < 900:
            turn = (head, clip(rest))
            more = clip(rest[len(turn[1]) :].strip("\n"))
            yield [turn, (rng.choice(["Go on.", "continue", "more"]), more)] if rng.random() < 0.25 else [turn]
    doc = ast.get_docstring(tree)
    if doc and len(doc) > 30:
        asks = ["What is the {} module?", "help({})", "document: {}", "What does the module {} do?", "Explain {}"]
        yield [(rng.choice(asks).format(module), clip(doc, 1200))]


def topic_dialogues(rng: random.Random) -> Iterator[list[Turn]]:
    from pydoc_data.topics import topics

    asks = ["document: {}", "help('{}')", "Explain {} in Python.", "Tell me about {}."]
    for name, text in sorted(topics.items()):
        text = text.strip("\n")
        for ask in asks:
            first = clip(text, 1200)
            rest = clip(text[len(first) :].strip("\n"), 1200)
            yield [(ask.format(name), first), ("more", rest)] if rng.random() < 0.5 else [(ask.format(name), first)]


def small_talk() -> Iterator[list[Turn]]:
    me = "I am a very small language model, trained on Python's standard library. "
    can = "Type the first lines of some Python code and I go on with it, or ask me what a function does."
    for ask in ("Hello", "hello", "Hi", "hi", "Hi!", "Hello!", "hey", "Good morning"):
        yield [(ask, "Hello! " + can)]
    for ask in (
        "Who are you?",
        "who are you",
        "What are you?",
        "What can you do?",
        "what can you do",
        "help",
        "Help me",
    ):
        yield [(ask, me + can)]
    for ask in ("Thanks", "Thank you!", "thanks", "ok", "bye"):
        yield [("Hello", "Hello! " + can), (ask, "You are welcome.")]


def all_dialogues(files: dict[str, tuple[str, str]], seed: int) -> list[str]:
    """Every dialogue as text in the chat template's form, in random order."""
    rng = random.Random(seed)
    found: list[list[Turn]] = []
    for name, (kind, text) in sorted(files.items()):
        module = re.sub(r"/__init__$", "", name.removesuffix(".py")).replace("/", ".").replace("posixpath", "os.path")
        lines = text.split("\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
        found += file_dialogues(module, text, lines, tree, rng)
        # The tests are larger than the library and much alike: a sample of them is enough.
        some = definition_dialogues(module, lines, tree, rng)
        found += some if kind == "library" else (turn for turn in some if rng.random() < 0.12)
    found += topic_dialogues(rng)
    found += list(small_talk()) * 10
    systems = ["You are a helpful assistant.", "You are a helpful coding assistant.", "You write Python code."]
    texts = []
    for turns in found:
        turns = [(ask.strip("\n"), answer.strip("\n")) for ask, answer in turns]
        if any(not ask.strip() or not answer.strip() for ask, answer in turns):
            continue
        said = [("system", rng.choice(systems))] if rng.random() < 0.05 else []
        for ask, answer in turns:
            said += [("user", ask), ("assistant", answer)]
        texts.append("".join(f"{START_OF_TURN}{who}\n{what}{END_OF_TURN}\n" for who, what in said))
    rng.shuffle(texts)
    return texts


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), [END_OF_TEXT, START_OF_TURN, END_OF_TURN]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_corpus(vocab: int, seed: int) -> Corpus:
    from pydoc_data.topics import topics

    training, heldout = split_heldout(source_files())
    texts = {kind: [text for k, text in training.values() if k == kind] for kind in HELDOUT_BYTES}
    texts["library"] += [inspect.cleandoc(text) for _, text in sorted(topics.items())]
    dialogues = all_dialogues(training, seed)
    # Every fourth test file and dialogue, since the library is what the model is meant to be best at.
    tokenizer = train_tokenizer(texts["library"] + texts["tests"][::4] + dialogues[::4], vocab)

    def encode(documents: list[str]) -> list[np.ndarray]:
        encoded = tokenizer.encode_batch_fast([document + END_OF_TEXT for document in documents])
        return [np.asarray(e.ids, np.uint16) for e in encoded]

    random.Random(seed).shuffle(texts["library"])
    rows = encode(dialogues)
    heldout_text = END_OF_TEXT.join(heldout)
    return Corpus(
        tokenizer,
        {kind: np.concatenate(encode(documents)) for kind, documents in texts.items()},
        np.concatenate(rows),
        np.cumsum([0] + [len(row) for row in rows[:-1]]),
        heldout_text,
        encode([heldout_text])[0][:-1],
    )


def ngram_perplexities(training: np.ndarray, heldout: np.ndarray, vocab: int, order: int = 5) -> dict[str, float]:
    """Perplexity of an add-one unigram and of an interpolated, modified Kneser-Ney model on heldout[1:].

    An n-gram is one integer of `order` times 12 bits, so that counting is sorting and looking up is a binary search.
    """
    assert vocab <= 4096
    assert order <= 5

    def codes(tokens: np.ndarray, n: int) -> np.ndarray:
        rows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.int64), n)
        return rows @ (1 << 12 * np.arange(n - 1, -1, -1))

    def lookup(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
        return at, table[at] == keys

    counts = np.bincount(training, minlength=vocab)
    unigram = (counts[heldout[1:]] + 1) / (len(training) + vocab)
    # The highest order counts n-grams; each lower one counts the different tokens seen before its n-grams.
    tables = {order: np.unique(codes(training, order), return_counts=True)}
    for n in range(order - 1, 0, -1):
        tables[n] = np.unique(tables[n + 1][0] & ((1 << 12 * n) - 1), return_counts=True)
    p = np.full(len(heldout) - 1, 1 / vocab)
    for n in range(1, order + 1):
        grams, count = tables[n]
        once, twice, thrice, four = ((count == c).sum() + 1e-9 for c in (1, 2, 3, 4))
        y = once / (once + 2 * twice)
        discounts = np.array([0, 1 - 2 * y * twice / once, 2 - 3 * y * thrice / twice, 3 - 4 * y * four / thrice])
        discounts = np.clip(discounts, 0, None) if n > 1 else np.full(4, 0.5)
        contexts, group = np.unique(grams >> 12, return_inverse=True)
        total = np.bincount(group, count)
        spare = np.bincount(group, discounts[np.minimum(count, 3)])
        query = codes(heldout[1:] if n == 1 else heldout, n)
        at, seen = lookup(grams, query)
        kept = np.where(seen, count[at] - discounts[np.minimum(count[at], 3)], 0.0)
        context, known = lookup(contexts, query >> 12)
        tail = p[-len(query) :]
        p[-len(query) :] = np.where(known, (kept + spare[context] * tail) / total[context], tail)
    return {"unigram": float(np.exp(-np.log(unigram).mean())), f"{order}-gram": float(np.exp(-np.log(p).mean()))}


def sample(seed: int = 0) -> str:
    """Files of the training text, in random order, none of which is held out."""
    left, chosen = dict(SAMPLE_BYTES), []
    training = sorted(split_heldout(source_files())[0].items())
    random.Random(seed).shuffle(training)
    for _, (kind, text) in training:
        if (size := len(text.encode())) <= left[kind]:
            left[kind] -= size
            chosen.append(text)
    return END_OF_TEXT.join(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.parse_args().out.write_text(sample(), encoding="utf-8")


if __name__ == "__main__":
    main()
