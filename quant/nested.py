"""Quantisers: choose the codes and the scales of nested slices.

Round to nearest with one clipping range per group, searched so that the errors of all widths together are least, and
scales refitted for each width by least squares. The search is
compiled; its torch version says what it does. Refitting per width is what makes prefixes usable: Any-Precision LLM
(arXiv 2402.10517), AnyBCQ (arXiv 2510.10467).
"""

# N rows, K columns, G group size

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moert.quant.dispatch import compiled
from moert.quant.format import PART_ALIGN, SLICE_ALIGN, ExpertLayout, MatrixLayout, align, midpoint
from moert.quant.reference import dequantise, pack, padded_columns

__all__ = ["dequantise", "pack_expert", "quantise"]

# Clipping ranges tried, as shares of a group's largest magnitude.
CLIPS = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58)
_BLOCK_WEIGHTS = 1 << 20  # weights searched at a time: bounds the temporary memory and stays in the cache
_FP16_MAX = 65504.0


def _fit(w: Tensor, codes: Tensor, width: int, top: int) -> tuple[Tensor, Tensor]:
    """Least-squares fp16-rounded scale of the prefix of `width` bits, and the squared error left.

    w, codes: float32 [groups, G]; codes of `top` bits. Returns two [groups] tensors.
    """
    if width == top:
        levels = codes - midpoint(top)
    else:
        levels = torch.floor(codes * 2.0 ** (width - top)) - midpoint(width)
    scale = ((w * levels).sum(-1) / levels.square().sum(-1)).to(torch.float16).float()
    return scale, torch.addcmul(w, levels, scale[:, None], value=-1).square().sum(-1)


def _search(w: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Codes (uint8 [groups, G]) and scales (fp16 [widths, groups]) of groups w [groups, G]."""
    top = widths[-1]
    peak = w.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    best_cost = w.new_full((len(w),), float("inf"))
    best_codes = torch.zeros_like(w)
    best_scales = w.new_zeros(len(widths), len(w))
    for clip in CLIPS:
        codes = torch.floor(w * (2 ** (top - 1) / (peak * clip)) + 2 ** (top - 1)).clamp_(0, 2**top - 1)
        fits = [_fit(w, codes, width, top) for width in widths]
        # Relative to what rounding costs at that width (a factor of 4 per bit), so that no width is drowned.
        cost = sum(error * 4.0**width for width, (_, error) in zip(widths, fits, strict=True))
        better = cost < best_cost
        best_cost = torch.where(better, cost, best_cost)
        best_codes = torch.where(better[:, None], codes, best_codes)
        best_scales = torch.where(better, torch.stack([scale for scale, _ in fits]), best_scales)
    return best_codes.to(torch.uint8), best_scales.to(torch.float16)


def quantise(w: Tensor, layout: MatrixLayout) -> list[Tensor]:
    """Quantise a matrix by rounding to nearest with a search of the clipping range.

    w: float [N, K]. Returns one packed uint8 tensor [layout.slice_bytes(i)] per slice. Raises ValueError for
    weights that are not finite or too large for fp16 scales.
    """
    if tuple(w.shape) != (layout.rows, layout.cols):
        raise ValueError(f"shape {tuple(w.shape)} is not {layout.rows} x {layout.cols}")
    w = w.float()
    if not float(w.abs().max()) < _FP16_MAX:  # also true for NaN
        raise ValueError("the weights hold values that are not finite or above 65504")
    if padded_columns(layout) != layout.cols:
        w = torch.nn.functional.pad(w, (0, padded_columns(layout) - layout.cols))
    groups = w.contiguous().view(-1, layout.group_size)
    codes = torch.empty(groups.shape, dtype=torch.uint8)
    scales = torch.empty(len(layout.widths), len(groups), dtype=torch.float16)
    module = compiled()
    if module is not None:
        pointers = (codes.data_ptr(), scales.data_ptr())
        module.search_codes(groups.data_ptr(), len(groups), layout.group_size, layout.widths, CLIPS, *pointers)
    else:
        step = _BLOCK_WEIGHTS // layout.group_size
        for start in range(0, len(groups), step):
            block = slice(start, start + step)
            codes[block], scales[:, block] = _search(groups[block], layout.widths)
    codes = codes.view(layout.rows, -1)[:, : layout.cols]
    return pack(codes, list(scales.view(-1, layout.rows, layout.groups)), layout)


def pack_expert(gate: Tensor, up: Tensor, down: Tensor, layout: ExpertLayout) -> list[Tensor]:
    """Slices of one expert, each uint8 [layout.slice_sizes[i]], padded with zeros.

    gate, up: float [F, D]; down: float [D, F]. For a raw layout the bytes are kept as they are (the dtype must be
    the layout's). Raises ValueError for wrong shapes, dtypes, or weights that are not finite.
    """
    parts: list[list[Tensor]] = []
    for m, (w, shape) in enumerate(zip((gate, up, down), layout.shapes, strict=True)):
        if tuple(w.shape) != shape:
            raise ValueError(f"shape {tuple(w.shape)} is not {shape[0]} x {shape[1]}")
        if not layout.raw:
            parts.append(quantise(w, layout.matrices[m]))
            continue
        if str(w.dtype) != f"torch.{layout.raw_dtype}":
            raise ValueError(f"dtype {w.dtype} is not {layout.raw_dtype}")
        raw = w.contiguous().view(-1).view(torch.uint8)
        parts.append([torch.nn.functional.pad(raw, (0, align(raw.numel(), PART_ALIGN) - raw.numel()))])
    return join_parts(parts, layout)


def join_parts(parts: Sequence[Sequence[Tensor]], layout: ExpertLayout) -> list[Tensor]:
    """Slices of one expert, padded with zeros, from those of gate, up and down."""
    slices = []
    for index, size in enumerate(layout.slice_sizes):
        assert size % SLICE_ALIGN == 0
        out = torch.zeros(size, dtype=torch.uint8)
        content = torch.cat([p[index] for p in parts])
        out[: content.numel()] = content
        slices.append(out)
    return slices


def regroup(slices: Sequence[Tensor], layout: ExpertLayout, to: ExpertLayout) -> list[Tensor]:
    """Slices of an expert for a layout with some of the widths: what lies between two of them becomes one slice.

    Codes stay as they are, so that each width that is left has the same weights. ValueError where a slice of several
    cannot be put together, since its planes would be others.
    """
    parts: list[list[Tensor]] = []
    for m, (matrix, target) in enumerate(zip(layout.matrices, to.matrices, strict=True)):
        starts = [layout.offsets(i)[m] for i in range(len(slices))]
        pieces = [
            piece[at : at + matrix.slice_bytes(i)] for i, (piece, at) in enumerate(zip(slices, starts, strict=True))
        ]
        found, start = [], 0
        for index, width in enumerate(to.widths):
            end = layout.slices_for(width)
            if sum((matrix.planes(i) for i in range(start, end)), ()) != target.planes(index):
                raise ValueError(f"the slices up to width {width} cannot be put together")
            tiles = [pieces[i][: matrix.codes_bytes(i)].view(-1, matrix.group_bytes(i)) for i in range(start, end)]
            found.append(torch.cat([torch.cat(tiles, 1).flatten(), pieces[end - 1][matrix.codes_bytes(end - 1) :]]))
            start = end
        parts.append(found)
    return join_parts(parts, to)
