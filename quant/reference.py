"""Packing, unpacking and dequantising nested planes in torch: what every kernel is tested against."""

# N rows, K columns, G group size; padded: N to 16 as [tiles, 16], K to G as [groups, G]

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moert.quant import trellis
from moert.quant.format import PART_ALIGN, TILE_ROWS, TRELLIS, MatrixLayout, align, midpoint


def _columns_per_chunk(bits: int) -> int:
    return 32 // bits  # one 32-bit word of a row holds this many codes of `bits` bits


def _pack_plane(values: Tensor, bits: int) -> Tensor:
    """[tiles, groups, 16, G] uint8 values of `bits` bits -> [tiles, groups, bytes] uint8."""
    tiles, groups, rows, cols = values.shape
    span = _columns_per_chunk(bits)
    v = values.reshape(tiles, groups, rows, cols // span, 8 // bits, 4).permute(0, 1, 3, 2, 5, 4)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (v << shifts).sum(dim=-1, dtype=torch.uint8).reshape(tiles, groups, -1)


def _unpack_plane(data: Tensor, bits: int, cols: int) -> Tensor:
    """[tiles, groups, bytes] uint8 -> [tiles, groups, 16, cols] uint8: the inverse of `_pack_plane`."""
    tiles, groups, _ = data.shape
    chunks = cols // _columns_per_chunk(bits)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    v = data.reshape(tiles, groups, chunks, TILE_ROWS, 4, 1) >> shifts & (2**bits - 1)
    return v.permute(0, 1, 3, 2, 5, 4).reshape(tiles, groups, TILE_ROWS, cols)


def pack(codes: Tensor, scales: Sequence[Tensor], layout: MatrixLayout) -> list[Tensor]:
    """Pack codes of the largest width into slices.

    codes: uint8 [N, K], values below 2**widths[-1]; of the trellis code with the padded columns, which count there.
    scales: for each width, float [N, scale_groups].
    Returns one uint8 tensor [layout.slice_bytes(i)] per slice.
    """
    tiles, groups, G = layout.tiles, layout.groups, layout.group_size
    padded = codes.new_zeros(tiles * TILE_ROWS, groups * G)
    padded[: layout.rows, : codes.shape[1]] = codes
    tiled = padded.reshape(tiles, TILE_ROWS, groups, G).transpose(1, 2)
    remaining = layout.widths[-1]
    slices = []
    for index, width in enumerate(layout.widths):
        parts = []
        for bits in layout.planes(index):
            remaining -= bits
            parts.append(_pack_plane(tiled >> remaining & (2**bits - 1), bits))
        assert remaining == layout.widths[-1] - width
        out = torch.zeros(layout.slice_bytes(index), dtype=torch.uint8)
        out[: layout.codes_bytes(index)] = torch.cat(parts, dim=-1).reshape(-1)
        put_scales(out, layout, index, scales[index])
        slices.append(out)
    return slices


def put_scales(piece: Tensor, layout: MatrixLayout, index: int, scales: Tensor) -> None:
    """Write scales, float [N, scale_groups], into slice `index`, whose bytes are `piece`."""
    scale = torch.zeros(layout.tiles * TILE_ROWS, layout.scale_groups, dtype=torch.float16)
    scale[: layout.rows] = scales
    start = layout.codes_bytes(index)
    scale_bytes = (
        scale.reshape(layout.tiles, TILE_ROWS, layout.scale_groups).transpose(1, 2).contiguous().view(torch.uint8)
    )
    piece[start : start + layout.scales_bytes()] = scale_bytes.reshape(-1)


def unpack_codes(slices: Sequence[Tensor], layout: MatrixLayout, num_slices: int) -> Tensor:
    """Codes at widths[num_slices - 1]: uint8 [N, K]."""
    return _padded_codes(slices, layout, num_slices)[:, : layout.cols].contiguous()


def _padded_codes(slices: Sequence[Tensor], layout: MatrixLayout, num_slices: int) -> Tensor:
    G = layout.group_size
    codes = torch.zeros(layout.tiles, layout.groups, TILE_ROWS, G, dtype=torch.uint8)
    for index in range(num_slices):
        data = slices[index][: layout.codes_bytes(index)].reshape(layout.tiles, layout.groups, -1)
        start = 0
        for bits in layout.planes(index):
            end = start + TILE_ROWS * G * bits // 8
            codes = codes << bits | _unpack_plane(data[..., start:end], bits, G)
            start = end
    matrix = codes.transpose(1, 2).reshape(layout.tiles * TILE_ROWS, layout.groups * G)
    return matrix[: layout.rows]


def unpack_scales(piece: Tensor, layout: MatrixLayout, index: int) -> Tensor:
    """Scales of slice `index`, whose bytes are `piece`: float32 [N, scale_groups]."""
    start = layout.codes_bytes(index)
    assert start % PART_ALIGN == 0
    raw = piece[start : start + layout.scales_bytes()].clone().view(torch.float16)
    scales = raw.reshape(layout.tiles, layout.scale_groups, TILE_ROWS).transpose(1, 2)
    return scales.reshape(layout.tiles * TILE_ROWS, layout.scale_groups)[: layout.rows].float()


def dequantise(slices: Sequence[Tensor], layout: MatrixLayout, num_slices: int) -> Tensor:
    """The matrix at widths[num_slices - 1] from its first `num_slices` slices (1-D uint8): float32 [N, K]."""
    matrix = rotated(slices, layout, num_slices)
    if layout.code == TRELLIS:
        matrix = trellis.rotate(matrix, layout.group_size)
    return matrix[:, : layout.cols].contiguous()


def rotated(slices: Sequence[Tensor], layout: MatrixLayout, num_slices: int) -> Tensor:
    """Return the matrix, float32 [N, K padded], for inputs as `rotated_inputs` has them."""
    last = num_slices - 1
    codes = _padded_codes(slices, layout, num_slices)
    scales = unpack_scales(slices[last], layout, last)
    if layout.code == TRELLIS:
        return trellis.levels(codes, layout, num_slices).float() * scales
    return (codes.float() - midpoint(layout.widths[last])).mul_(scales.repeat_interleave(layout.group_size, dim=1))


def rotated_inputs(x: Tensor, layout: MatrixLayout) -> Tensor:
    """Return the inputs [T, K] of a product as its code wants them, in float32 [T, K padded]."""
    padded = functional.pad(x.float(), (0, padded_columns(layout) - layout.cols))
    return trellis.rotate(padded, layout.group_size) if layout.code == TRELLIS else padded


def padded_columns(layout: MatrixLayout) -> int:
    """Columns with padding: the length that inputs of a kernel have."""
    return align(layout.cols, layout.group_size)
