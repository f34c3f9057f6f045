"""Fixtures that several test files use: tiny checkpoints written by transformers, and transformers' logits for them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# A worker of pytest-xdist has a core to itself: threads of several workers that wait for each other on the same cores
# take many times as long. Done before torch is loaded, which counts the cores that it may use.
if (worker := os.environ.get("PYTEST_XDIST_WORKER", "")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import torch
from torch import Tensor


def pytest_configure() -> None:
    """Test what is installed.

    `python -m pytest` puts the source tree first on the path, whose compiled modules are elsewhere unless they were
    built in place.
    """
    root = Path(__file__).parents[1]
    if not any((root / "quant").glob("_native*.so")):
        sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != root]
    if importlib.util.find_spec("moert") is None:
        pytest.exit('moert is not installed: run  pip install -c constraints.txt ".[test]"  first.', returncode=2)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite with a worker per core, if pytest-xdist is there, and files that are named in this process.

    `-n` decides it by hand. Not in pytest's addopts, where `-n` is an error without pytest-xdist.
    """
    if worker or not config.pluginmanager.hasplugin("xdist") or config.args_source is pytest.Config.ArgsSource.ARGS:
        return
    if config.option.numprocesses is None and not config.option.usepdb:
        config.option.numprocesses = (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        )
        config.option.dist = "worksteal" if config.option.dist == "no" else config.option.dist


SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 320
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOKENIZER_TEXT = """\
A mixture of experts is a layer that holds many small networks and a router that sends every token to a few of them.
The router scores the experts, the token visits the best ones, and their outputs are added, weighted by the scores.
When the experts do not fit in memory, they are read from the disk as they are needed, and the best of them are kept.
user assistant system Hello, who are you? I am a tiny model, and nothing that I say makes any sense.
"""
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 96, "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {"intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3},
    "qwen2_moe": {
        "intermediate_size": 112,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "qwen3_moe": {
        "intermediate_size": 112,
        "moe_intermediate_size": 48,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
}


@cache
def _transformers() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _write_tokenizer(path: Path) -> None:
    """A byte-level BPE of exactly VOCAB_SIZE tokens, the special ones first, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TOKENIZER_TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "model_max_length": COMMON["max_position_embeddings"],
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    generation = {"eos_token_id": [2, 0], "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8}
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2))


def _fill(model: torch.nn.Module) -> None:
    """Weights at which every part of the model matters: unit variance through each product, norms away from 1."""
    generator = torch.Generator().manual_seed(20240229)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            value = 1 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif name.endswith("embed_tokens.weight"):
            value = noise
        else:
            value = noise * (1.5 if name.endswith("gate.weight") else 1.0) / parameter.shape[-1] ** 0.5
        parameter.data.copy_(value)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_checkpoint(family, *, dtype="bfloat16", fused=False, tie=False, max_shard_size="5GB", **overrides) -> Path.

    A checkpoint folder of a random model with fixed weights: safetensors with one tensor per expert matrix as
    save_pretrained writes them, or with the experts of a layer fused, in one file; config.json, a byte-level BPE
    tokenizer with a ChatML template, generation_config.json. `overrides` are fields of config.json. Shared by all tests
    that ask for the same: copy it before changing it.
    """
    root = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Path] = {}

    def make(
        family: str,
        *,
        dtype: str = "bfloat16",
        fused: bool = False,
        tie: bool = False,
        max_shard_size: str = "5GB",
        **overrides: Any,
    ) -> Path:
        key = json.dumps([family, dtype, fused, tie, max_shard_size, overrides], sort_keys=True)
        if key in made:
            return made[key]
        transformers = _transformers()
        values = {**COMMON, **FAMILY_CONFIGS[family], "tie_word_embeddings": tie, **json.loads(json.dumps(overrides))}
        config = transformers.AutoConfig.for_model(family, **values)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        _fill(model)
        path = root / f"{family}-{len(made)}"
        model.save_pretrained(path, max_shard_size=max_shard_size)
        if fused:
            from safetensors.torch import save_file

            for shard in path.glob("model*"):
                shard.unlink()
            tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
            if tie:
                del tensors["lm_head.weight"]
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        _write_tokenizer(path)
        made[key] = path
        return path

    return make


@pytest.fixture(scope="session")
def reference_model() -> Callable[[Path], Any]:
    """reference_model(checkpoint) -> transformers' model of the checkpoint in float32, its weights upcast exactly."""

    @cache
    def load(path: Path) -> Any:
        return _transformers().AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    return load


@pytest.fixture(scope="session")
def reference_logits(reference_model: Callable[[Path], Any]) -> Callable[[Path, list[int]], Tensor]:
    """reference_logits(checkpoint, token_ids) -> transformers' logits of one forward pass, float32 [T, V]."""

    def logits(path: Path, token_ids: list[int]) -> Tensor:
        with torch.inference_mode():
            result: Tensor = reference_model(path)(torch.tensor([token_ids])).logits[0]
        return result

    return logits


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Like tiny_checkpoint, but a copy of its own that the test may damage."""

    def copy(family: str, **options: Any) -> Path:
        return Path(shutil.copytree(tiny_checkpoint(family, **options), tmp_path / f"{family}-copy"))

    return copy


@pytest.fixture(scope="session")
def store(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """store(family, widths, dense_bits, **checkpoint options) -> folder of a converted tiny checkpoint, made once."""
    from moert.convert.convert import convert

    made: dict[str, Path] = {}

    def make(family: str = "qwen3_moe", widths: Sequence[int] = (2, 3, 4), dense_bits: int = 8, **options: Any) -> Path:
        key = repr((family, widths, dense_bits, options))
        if key not in made:
            out = tmp_path_factory.mktemp("stores") / f"{family}-{widths[-1]}"
            convert(tiny_checkpoint(family, **options), out, widths=widths, dense_bits=dense_bits, group_size=32)
            made[key] = out
        return made[key]

    return make


@pytest.fixture(scope="session")
def calibrated(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny checkpoint converted by calibration, on random tokens."""
    from moert.convert.calibration import CalibrationText
    from moert.convert.convert import convert

    tokens = torch.randint(3, VOCAB_SIZE, (1500,), generator=torch.Generator().manual_seed(0)).tolist()
    out = tmp_path_factory.mktemp("calibrated") / "store"
    convert(tiny_checkpoint("qwen3_moe"), out, group_size=32, calibration=CalibrationText("random", tuple(tokens)))
    return out


@pytest.fixture
def calibrated_copy(calibrated: Path, tmp_path: Path) -> Path:
    """A copy of its own that the test may change."""
    return Path(shutil.copytree(calibrated, tmp_path / "calibrated"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For such small products more are slower, and far slower where others compute too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
