"""Other quantisers, matrix by matrix: the weights that their codes stand for, and the bits that store them.

Rounding and what HQQ, bitsandbytes, ggml (llama.cpp) and llm-compressor's GPTQ do, by those packages themselves; what
is not installed is named and left out. `pip install gguf` brings a part of ggml's formats, llama-cpp-python the rest.
Used by compare_quantisers.py.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# D hidden, F expert inner, N rows, K columns, T tokens
GROUP = 64
MATRICES = ("gate", "up", "down")
# (layer, expert, name of the matrix, matrix [N, K]) -> (what its codes stand for [N, K], bits that store it)
Method = Callable[[int, int, str, Tensor], tuple[Tensor, float]]
# (layer, expert) -> mean of x xᵀ over the inputs x of gate and up [D, D], of down [F, F]
Moments = Mapping[tuple[int, int], tuple[Tensor, Tensor]]

GGML = ("Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q5_K", "Q4_1", "Q4_0", "IQ4_NL", "Q4_K", "Q3_K", "Q2_K")
# What llama.cpp takes where the columns of a matrix are no multiple of a format's blocks.
INSTEAD = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def rounding(bits: int) -> Method:
    """Round to nearest between the least and the largest weight of a group: fp16 scale, zero point of `bits` bits."""

    def method(layer: int, expert: int, name: str, w: Tensor) -> tuple[Tensor, float]:
        groups, top = w.reshape(-1, GROUP), 2**bits - 1
        low, high = groups.amin(1, keepdim=True).clamp_max(0), groups.amax(1, keepdim=True).clamp_min(0)
        scale = ((high - low) / top).half().float().clamp_min(1e-7)
        zero = (-low / scale).round()
        codes = (groups / scale + zero).round().clamp(0, top)
        return ((codes - zero) * scale).view_as(w), w.numel() * (bits + (16 + bits) / GROUP)

    return method


def nf4(double: bool) -> Method:
    import bitsandbytes.functional as bnb

    def method(layer: int, expert: int, name: str, w: Tensor) -> tuple[Tensor, float]:
        codes, state = bnb.quantize_4bit(w, blocksize=GROUP, quant_type="nf4", compress_statistics=double)
        scales = 8 / GROUP + 32 / (256 * GROUP) if double else 32 / GROUP
        return bnb.dequantize_4bit(codes, state), w.numel() * (4 + scales)

    return method


def int8() -> Method:
    import bitsandbytes.functional as bnb

    def method(layer: int, expert: int, name: str, w: Tensor) -> tuple[Tensor, float]:
        codes, peaks, _ = bnb.int8_vectorwise_quant(w)
        return codes.float() * (peaks[:, None] / 127), w.numel() * 8 + 32.0 * len(w)

    return method


def hqq(bits: int, axis: int) -> Method:
    from hqq.core.quantize import BaseQuantizeConfig, Quantizer

    def method(layer: int, expert: int, name: str, w: Tensor) -> tuple[Tensor, float]:
        options = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=axis)["weight_quant_params"]
        codes, meta = Quantizer.quantize(w, device="cpu", compute_dtype=torch.float32, **options)
        for scale in ("scale", "zero"):
            meta[scale] = meta[scale].half().float()
        return Quantizer.dequantize(codes, meta), w.numel() * (bits + 32 / GROUP)

    return method


def moment(moments: Moments, layer: int, expert: int, name: str, w: Tensor) -> Tensor:
    """Return the mean of x xᵀ over the inputs x of a matrix [K, K]: the identity where the text had none."""
    pair = moments.get((layer, expert))
    return torch.eye(w.shape[1]) if pair is None else pair[name == "down"]


def gptq(bits: int, moments: Moments) -> Method:
    """GPTQ with groups of columns, the columns in order of activation: fp16 scale, zero point of `bits` bits."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    with redirect_stdout(sys.stderr):  # it begins a log on stdout, where the table goes
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    options = QuantizationArgs(
        num_bits=bits, type="int", strategy="group", group_size=GROUP, symmetric=False, actorder="static"
    )

    def method(layer: int, expert: int, name: str, w: Tensor) -> tuple[Tensor, float]:
        groups = w.reshape(len(w), -1, GROUP)
        scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), options)
        scale, h = scale.half().float(), moment(moments, layer, expert, name, w)
        # It works in place, and on a batch: here of one.
        values, _, _ = quantize_weight(w[None].clone(), h[None].clone(), scale[None], zero[None], None, options)
        return values[0], w.numel() * (bits + (16 + bits) / GROUP)

    return method


def ggml_library() -> ctypes.CDLL | None:
    """Load llama.cpp's ggml from the package llama-cpp-python. None where that is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    folder = Path(spec.origin).parent / "lib" if spec is not None and spec.origin is not None else Path()
    file = next(folder.glob("libggml-base.*"), None)
    if spec is None or file is None:
        return None
    library = ctypes.CDLL(str(file))
    floats, size = ctypes.POINTER(ctypes.c_float), ctypes.c_int64
    # type, weights, codes, first weight, rows, columns, importance of columns
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, size, size, size, floats]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def ggml_codes(library: ctypes.CDLL, w: np.ndarray, kind: Any, importance: np.ndarray | None) -> np.ndarray:
    """Return the bytes [N, B] of a matrix, with those columns exact that have much importance [K]."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    codes = np.empty((len(w), w.shape[1] // block * size), np.uint8)
    floats = ctypes.POINTER(ctypes.c_float)
    weigh = None if importance is None else importance.ctypes.data_as(floats)
    written = library.ggml_quantize_chunk(kind, w.ctypes.data_as(floats), codes.ctypes.data, 0, *w.shape, weigh)
    assert written == codes.nbytes, f"{kind.name}: ggml wrote {written} bytes where {codes.nbytes} were expected"
    return codes


def ggml(kinds: Mapping[str, str], library: ctypes.CDLL | None, moments: Moments | None = None) -> Method:
    """Quantise to one of ggml's formats, `kinds` by the name of the matrix.

    By the package gguf where that knows how, else by llama.cpp's own code. With `moments` each weight counts as much as
    its input is large (llama.cpp's importance matrix).
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    def method(layer: int, expert: int, name: str, w: Tensor) -> tuple[Tensor, float]:
        kind, values = GGMLQuantizationType[kinds[name]], np.ascontiguousarray(w.numpy())
        if moments is None and in_python(kinds[name]):
            codes = quantize(values, kind)
        else:
            assert library is not None
            importance = None if moments is None else moment(moments, layer, expert, name, w).diagonal()
            codes = ggml_codes(library, values, kind, None if importance is None else importance.contiguous().numpy())
        return torch.from_numpy(dequantize(codes, kind)), 8.0 * codes.nbytes

    return method


def in_python(kind: str) -> bool:
    """Tell whether the package gguf quantises to a format itself; it reads far more of them."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    try:
        quantize(np.zeros((1, 256), np.float32), GGMLQuantizationType[kind])
    except NotImplementedError:
        return False
    return True


def ggml_formats(columns: Mapping[str, int], library: ctypes.CDLL | None) -> Iterator[tuple[str, dict[str, str]]]:
    """Each format that matrices of so many columns can have: label, format by the name of the matrix."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    without_code, without_blocks = [], []
    for label in GGML:
        block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[label]]
        kinds = {name: label if K % block == 0 else INSTEAD.get(label, "") for name, K in columns.items()}
        if label not in kinds.values() or "" in kinds.values():
            without_blocks.append(f"{label} ({block})")
        elif library is None and not all(map(in_python, kinds.values())):
            without_code.append(label)
        else:
            others = [f"{name} {kind}" for name, kind in kinds.items() if kind != label]
            yield ", ".join([label, *others]), kinds
    if without_code:
        print(f"llama-cpp-python is not installed: {', '.join(without_code)} left out.", file=sys.stderr)
    if without_blocks:
        sizes = ", ".join(str(K) for K in sorted(set(columns.values())))
        print(f"Blocks that {sizes} columns cannot be cut into: {', '.join(without_blocks)} left out.", file=sys.stderr)


def others(columns: Mapping[str, int], moments: Moments | None) -> Iterator[tuple[str, str, Method]]:
    """Series, label, method; `columns` by the name of the matrix. Without `moments` none that needs a text."""
    for bits in (4, 3, 2):
        yield "rounding", f"{bits} bits", rounding(bits)
    try:
        yield "bitsandbytes", "INT8", int8()
        yield "bitsandbytes", "NF4", nf4(False)
        yield "bitsandbytes", "NF4 double", nf4(True)
    except ImportError:
        print("bitsandbytes is not installed: left out.", file=sys.stderr)
    try:
        for axis in (1, 0):
            for bits in (4, 3, 2):
                yield f"HQQ axis {axis}", f"{bits} bits", hqq(bits, axis)
    except ImportError:
        print("hqq is not installed: left out.", file=sys.stderr)
    library = ggml_library()
    try:
        for label, kinds in ggml_formats(columns, library):
            yield "llama.cpp", label, ggml(kinds, library)
            # Blocks of 8 bits are rounded, whatever their inputs.
            if moments is not None and library is not None and label != "Q8_0":
                yield "llama.cpp with imatrix", label, ggml(kinds, library, moments)
    except ImportError:
        print("gguf is not installed: the formats of llama.cpp are left out.", file=sys.stderr)
    if moments is None:
        print("Without --calibrate: GPTQ and llama.cpp's importance matrix are left out.", file=sys.stderr)
        return
    if library is None:
        print("llama-cpp-python is not installed: its importance matrix is left out.", file=sys.stderr)
    if any(K % GROUP for K in columns.values()):
        print(f"GPTQ is left out: {GROUP} does not divide the columns of every matrix.", file=sys.stderr)
        return
    try:
        for bits in (4, 3, 2):
            yield "GPTQ", f"{bits} bits", gptq(bits, moments)
    except ImportError as error:
        print(f"llm-compressor is not installed ({error}): GPTQ is left out.", file=sys.stderr)


def shuffled(method: Method, orders: Mapping[int, Tensor]) -> Method:
    """Make a method work on matrices whose K columns stand in the order `orders[K]`."""

    def on_shuffled(layer: int, expert: int, name: str, w: Tensor) -> tuple[Tensor, float]:
        order = orders[w.shape[1]]
        values, bits = method(layer, expert, name, w[:, order].contiguous())
        return values[:, order.argsort()], bits

    return on_shuffled
