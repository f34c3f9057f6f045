"""Layout and files of a store, against the safetensors library and brute force."""

from __future__ import annotations

import io
import json
import time
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moert.checkpoints.safetensors import Checkpoint, read_header
from moert.convert.convert import convert
from moert.errors import CheckpointError, StoreError
from moert.models.stored_model import StoredModel
from moert.quant.format import GROUP_SIZES, ExpertLayout, MatrixLayout
from moert.store.layout import DenseTensor, Entry, ExpertFile, build_header, dense_order, experts_file, slice_name
from moert.store.meta import CopiedFile, StoreMeta, WeightFile, parse, read_meta
from moert.store.writer import TensorWriter

from .checkpoints import make_checkpoint

width_lists = st.one_of(
    st.just((16,)), st.sets(st.integers(2, 8), min_size=1, max_size=4).map(lambda s: tuple(sorted(s)))
)


@given(
    hidden=st.integers(1, 150),
    inner=st.integers(1, 150),
    group_size=st.sampled_from(GROUP_SIZES),
    widths=width_lists,
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    experts=st.integers(1, 5),
    layer=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_slices_are_aligned_adjacent_and_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory,
    hidden: int,
    inner: int,
    group_size: int,
    widths: tuple[int, ...],
    dtype: str,
    experts: int,
    layer: int,
) -> None:
    plan = ExpertFile(layer, experts, ExpertLayout(hidden, inner, group_size, widths, dtype))
    path = tmp_path_factory.getbasetemp() / "property.safetensors"
    generator = torch.Generator().manual_seed(hidden)
    slices = [torch.randint(0, 256, entry.shape, dtype=torch.uint8, generator=generator) for entry in plan.entries()]
    with open(path, "wb") as file:
        writer = TensorWriter(file, list(plan.entries()))
        checksums = [writer.write(piece.split(1000)) for piece in slices]
        writer.finish()
    data = path.read_bytes()
    assert (len(data), writer.size, writer.data_start) == (plan.size, plan.size, len(plan.header))
    end = writer.data_start
    for n, (piece, crc) in enumerate(zip(slices, checksums, strict=True)):
        e, i = divmod(n, len(widths))
        start = plan.offset(e, i)
        assert start == end
        assert start % 4096 == 0
        end = start + plan.layout.slice_sizes[i]
        assert data[start:end] == piece.numpy().tobytes()
        assert crc == zlib.crc32(data[start:end])
    assert end == len(data)
    assert end % 4096 == 0
    loaded = load_file(path)
    assert len(loaded) == len(slices)
    for n, piece in enumerate(slices):
        assert torch.equal(loaded[slice_name(layer, *divmod(n, len(widths)))], piece)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from("pbhf")), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_dense_file_is_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int, str]]
) -> None:
    kinds = {"p": "float16", "b": "bfloat16", "h": "float16", "f": "float32"}
    plan = dense_order(
        DenseTensor(f"t{i}", (n, k), kinds[kind], MatrixLayout(n, k, 32, (8,)) if kind == "p" else None)
        for i, (n, k, kind) in enumerate(shapes)
    )
    data = io.BytesIO()
    writer = TensorWriter(data, [t.entry for t in plan])
    contents = [
        torch.zeros(t.nbytes, dtype=torch.uint8) if t.packed else torch.randn(t.shape).to(getattr(torch, t.dtype))
        for t in plan
    ]
    offsets = []
    for tensor, content in zip(plan, contents, strict=True):
        offsets.append(writer.size)
        writer.write([content])
        assert offsets[-1] % (64 if tensor.packed else content.element_size()) == 0
    writer.finish()
    path = tmp_path_factory.getbasetemp() / "dense.safetensors"
    path.write_bytes(data.getvalue())
    loaded = load_file(path)
    for tensor, content in zip(plan, contents, strict=True):
        assert torch.equal(loaded[tensor.entry.name], content)
    assert [(i.name, i.offset) for i in read_header(path)] == [
        (t.entry.name, offset) for t, offset in zip(plan, offsets, strict=True)
    ]


def test_writer_refuses_what_the_header_does_not_say() -> None:
    entries = [Entry("a", "U8", (4,), 4), Entry("b", "U8", (4,), 4)]
    writer = TensorWriter(io.BytesIO(), entries)
    with pytest.raises(ValueError, match="a has 3 bytes where 4 were planned"):
        writer.write([torch.zeros(3, dtype=torch.uint8)])
    writer.write([torch.zeros(4, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="1 tensors were not written"):
        writer.finish()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StoredModel:
    folder = tmp_path_factory.mktemp("store")
    return convert(make_checkpoint(folder / "src"), folder / "out")


def test_locations_and_checksums_agree_with_the_safetensors_library(store: StoredModel) -> None:
    for layer in store.moe_layers:
        with safe_open(store.path / experts_file(layer), "pt") as file:
            assert len(file.keys()) == store.num_experts * store.layout.num_slices
            for e in range(store.num_experts):
                path, offset = store.location(layer, e)
                assert offset % 4096 == 0
                data = path.read_bytes()
                for i, size in enumerate(store.layout.slice_sizes):
                    piece = data[offset : offset + size]
                    assert file.get_tensor(slice_name(layer, e, i)).numpy().tobytes() == piece
                    assert store.checksum(layer, e, i) == zlib.crc32(piece)
                    offset += size
    with pytest.raises(IndexError):
        store.location(0, store.num_experts)


def test_reopened_store_is_the_same_and_verifies(store: StoredModel) -> None:
    again = StoredModel.open(str(store.path))
    assert again.meta == store.meta
    assert again.config["model_type"] == again.architecture.model_type == "qwen3_moe"
    seen: list[tuple[int, int]] = []
    again.verify(lambda done, total: seen.append((done, total)))
    total = sum(file.stat().st_size for file in store.path.glob("*.safetensors"))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)


def test_meta_survives_a_round_trip(store: StoredModel) -> None:
    value = json.loads((store.path / "moert.json").read_bytes())
    assert value["format_version"] == 2
    assert value == store.meta.as_json()
    assert parse(value, Path("moert.json")) == store.meta


def test_stores_of_version_1_are_read_as_linear(store: StoredModel) -> None:
    value = json.loads((store.path / "moert.json").read_bytes())
    older = {name: part for name, part in value.items() if name != "code"} | {"format_version": 1}
    assert parse(older, Path("moert.json")) == parse(value | {"code": "linear"}, Path("moert.json"))


def leaves(value: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(value, dict):
        return [path]
    return [path, *(leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key)))]


def test_every_missing_or_wrongly_typed_field_is_named(store: StoredModel) -> None:
    text = (store.path / "moert.json").read_text()
    measured = ("sensitivity", "router_weights")  # may be missing; test_sensitivity.py
    paths = [path for path in leaves(json.loads(text)) if path and path[0] not in measured]
    assert len(paths) > 60
    for path in paths:
        for wrong in (None, "absent", [], -1, True, 1.5, {"a": 1}, [[[-1]]]):
            value = json.loads(text)
            parent = value
            for key in path[:-1]:
                parent = parent[key]
            if wrong == "absent":
                del parent[path[-1]]
            else:
                parent[path[-1]] = wrong
            if path[0] == "dense" and len(path) == 2 and wrong == "absent":
                continue  # a tensor less is found where the store is opened, against the architecture
            if path == ("experts", "layers") and wrong == []:
                continue
            field = path[-1] if path[-1] not in ("width", "dtype") else path[-2]
            if path in (("widths",), ("group_size",), ("experts", "hidden"), ("experts", "inner")):
                field = path[-1] if "experts" not in path else "experts"
            if (path[-1], wrong) == ("shape", []):
                field = ""  # a scalar where no matrix is needed
                if "dtype" in parent:
                    continue
            with pytest.raises(StoreError) as caught:
                parse(value, Path("moert.json"))
            assert "moert.json" in str(caught.value)
            assert field in str(caught.value), (path, wrong)


def test_opening_a_large_model_is_fast(tmp_path: Path) -> None:
    layout = ExpertLayout(2048, 768, 64, (2, 3, 4))
    layers = tuple(range(48))
    meta = StoreMeta(
        created_by="test",
        source_name="large",
        model_type="qwen3_moe",
        quantiser="none",
        group_size=64,
        dense_bits=8,
        moe_layers=layers,
        num_experts=128,
        layout=layout,
        dense=(),
        dense_checksums=(),
        weights={name: WeightFile(1 << 20, 4096) for name in ("dense.safetensors", *map(experts_file, layers))},
        copies={name: CopiedFile(1, 2) for name in ("config.json", "tokenizer.json")},
        checksums={layer: [[4_000_000_000] * 3] * 128 for layer in layers},
    )
    path = tmp_path / "moert.json"
    path.write_text(json.dumps(meta.as_json()))
    start = time.process_time()
    assert read_meta(path) == meta
    assert time.process_time() - start < 0.5


def test_rows_of_a_tensor_are_read_alone(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "src")
    weights = {"a": torch.randn(7, 3, 2), "b": torch.randn(5).half(), "c": torch.randn(0, 4), "d": torch.tensor(2.5)}
    save_file(weights, source / "model.safetensors")
    checkpoint = Checkpoint.open(source)
    for name, tensor in weights.items():
        assert torch.equal(checkpoint.read(checkpoint.tensors[name]), tensor)
    assert torch.equal(checkpoint.read(checkpoint.tensors["a"], 2, 5), weights["a"][2:5])


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_either_read_as_the_library_does_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    check_against_library(tmp_path_factory.getbasetemp() / "any.safetensors", data)


offsets = st.integers(-1, 40)
headers = st.dictionaries(
    st.sampled_from("abc"),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["U8", "F32", "BF16", "NEW"]),
            "shape": st.lists(st.integers(0, 5), max_size=2),
            "data_offsets": st.lists(offsets, min_size=2, max_size=2),
        }
    ),
)


@given(headers, st.integers(0, 40))
@settings(max_examples=300, deadline=None)
def test_any_header_is_either_read_as_the_library_does_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, object], length: int
) -> None:
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(length)
    check_against_library(tmp_path_factory.getbasetemp() / "header.safetensors", data)


def check_against_library(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        infos = read_header(path)
    except CheckpointError:
        return
    if any(info.dtype == "NEW" for info in infos):
        return
    with safe_open(path, "np") as file:
        assert set(file.keys()) == {info.name for info in infos}


def test_header_is_padded_with_spaces() -> None:
    header = build_header([Entry("x", "U8", (4096,), 4096)])
    assert len(header) == 4096
    assert header[8:].rstrip(b" ").endswith(b"}")
    assert len(build_header([])) == 4096
