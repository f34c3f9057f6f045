"""A user meets something wrong: through the program itself, one sentence, the exit code, no traceback."""

import json
import re
import shutil

import pytest

from moert.cli.main import run
from moert.convert.convert import convert


@pytest.fixture(scope="module")
def good_store(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("refusals") / "store"
    convert(tiny_checkpoint("qwen3_moe"), out, group_size=32)
    return out


@pytest.fixture
def store(good_store, tmp_path):
    return shutil.copytree(good_store, tmp_path / "store")


@pytest.fixture
def program(capsys, monkeypatch, tmp_path):
    """Run a command line; returns its exit code and the error line, and checks that it is one sentence."""
    monkeypatch.setenv("MOERT_CACHE", str(tmp_path / "cache"))

    def call(*argv):
        with pytest.raises(SystemExit) as left:
            run([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        if left.value.code:
            *_, last = err.strip().splitlines()
            assert last.startswith("moert: ")
            assert last.endswith(".")
            return left.value.code, last
        return 0, out

    return call


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def generate(store):
    return ("generate", "-m", store, "-p", "Hello", "-n", "4", "--temp", "0", "--ignore-eos", "-q")


def test_a_whole_store_works(program, store):
    code, out = program(*generate(store))
    assert code == 0
    assert out


def test_an_expert_file_cut_short(program, store):
    file = store / "experts-00001.safetensors"
    with open(file, "r+b") as f:
        f.truncate(file.stat().st_size - 4096)
    code, line = program(*generate(store))
    assert code == 1
    assert "experts-00001.safetensors is cut short" in line


def test_a_flipped_byte_in_a_slice_is_never_wrong_text(program, store):
    for file in store.glob("experts-*"):
        data = bytearray(file.read_bytes())
        for at in range(4096 + 100, len(data), 1024):  # some byte of every slice
            data[at] ^= 0x10
        file.write_bytes(data)
    code, line = program(*generate(store))
    assert code == 1
    assert re.search(r"experts-\d+.safetensors: expert \d+ of layer \d+ is damaged", line)


@pytest.mark.parametrize("name", ["dense.safetensors", "experts-00000.safetensors", "config.json", "tokenizer.json"])
def test_a_missing_file(program, store, name):
    (store / name).unlink()
    code, line = program(*generate(store))
    assert code == 1
    assert f"{name} is missing" in line


def test_an_unknown_format_version(program, store):
    edit_json(store / "moert.json", format_version=99)
    code, line = program(*generate(store))
    assert code == 1
    assert "99" in line
    assert "version" in line


def test_a_chat_template_that_tries_to_leave_the_sandbox(program, store):
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    edit_json(store / "tokenizer_config.json", chat_template=template)
    code, line = program(*generate(store), "--chat")
    assert code == 1
    assert "chat template" in line


def test_damaged_tokenizer(program, store):
    (store / "tokenizer_config.json").write_text("{not json")
    code, line = program(*generate(store))
    assert (code, "tokenizer_config.json is not valid JSON" in line) == (1, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt_neox"}, ("gpt_neox", "qwen3_moe")),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ("longrope",)),
        ({"hidden_act": "relu6"}, ("relu6",)),
        ({"quantization_config": {"quant_method": "gptq"}}, ("gptq",)),
    ],
)
def test_models_and_variants_that_are_not_supported(program, checkpoint_copy, tmp_path, changes, words):
    source = checkpoint_copy("qwen3_moe")
    edit_json(source / "config.json", **changes)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    for argv in (("convert", source, tmp_path / "out"), generate(source)):
        code, line = program(*argv)
        assert code == 1
        assert all(word in line for word in words)
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    assert not (tmp_path / "out").exists()


def test_pickled_weights(program, checkpoint_copy, tmp_path):
    source = checkpoint_copy("mixtral")
    for shard in source.glob("*.safetensors*"):
        shard.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04}.")
    code, line = program("convert", source, tmp_path / "out")
    assert code == 1
    assert "safetensors" in line
    assert "code" in line


def test_an_index_that_points_outside_its_folder(program, checkpoint_copy, tmp_path):
    source = checkpoint_copy("mixtral", max_shard_size="50KB")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: "../" + file for name, file in index["weight_map"].items()}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    code, line = program("convert", source, tmp_path / "out")
    assert code == 1
    assert "model.safetensors.index.json" in line


def test_what_does_not_fit_leaves_with_2_and_the_least_that_would(program, store):
    code, line = program(*generate(store), "--memory-budget", "1MiB")
    assert code == 2
    assert re.search(r"need at least \d+ bytes", line)
    code, line = program(*generate(store), "--expert-budget", "100")
    assert code == 2
    assert re.search(r"least that would do is \d+ bytes", line)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--precision", "fixed:7", "does not hold"),
        ("--memory-budget", "plenty", "'plenty' is not a size"),
        ("--ctx-size", "-5", "ctx-size"),
        ("--threads", "0", "threads"),
        ("--temp", "-1", "temperature"),
        ("--top-p", "2", "top_p"),
    ],
)
def test_options_out_of_range(program, store, option, value, words):
    code, line = program(*generate(store), option, value)
    assert code == 2
    assert words in line


def test_an_output_that_exists_is_not_touched(program, tiny_checkpoint, store):
    before = {p.name: p.stat().st_mtime_ns for p in store.iterdir()}
    code, line = program("convert", tiny_checkpoint("qwen3_moe"), store)
    assert code == 1
    assert "exists already" in line
    assert {p.name: p.stat().st_mtime_ns for p in store.iterdir()} == before


def test_a_model_that_is_nowhere(program, tmp_path):
    code, line = program(*generate(tmp_path / "nothing"))
    assert code == 1
    assert "nothing" in line
