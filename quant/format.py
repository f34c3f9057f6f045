"""The nested-bit format: the single truth on widths, planes, tiles, groups and slices. Pure arithmetic.

A matrix [N, K] is used at a width of b bits per weight as

    w[n, k] = s_b[n, g] * (c_b[n, k] - (2**b - 1) / 2),    g = k // group_size

where the code c_b (unsigned, b bits) is the prefix of the code of every larger width, and the scale s_b (fp16) is
fitted for each width. That is the linear code. In the trellis code, that of calibrated experts,

    sum over k of w[n, k] x[k] = s_b[n] * sum over k of level_b[n, k] * (H x)[k]

with one scale for a row, levels that windows of codes stand for (`trellis.py`), and H a Hadamard transform of every
group of columns, which a product applies to its inputs. The slice that raises the width from a to b holds bits a..b of
the codes and the scales s_b, so slices 0..i together are the matrix at widths[i].

Slice of a matrix, in bytes (every part starts on 64 bytes)
    codes   [N/16 tiles][K/G groups][planes of the slice][16 rows x G columns, packed]
    scales  [N/16 tiles][K/G groups, or 1][16 rows] fp16, little endian
Planes hold 8, 4, 2 or 1 bits of every code; a slice has as few as its bits allow, most significant first (7 bits: 4,
2 and 1): each plane costs work to unpack, one of 8 bits none. Of the trellis code they hold 2 bits or 1.

64 bytes of a plane are 16 little-endian 32-bit words, one for each row of the tile. In a plane of p bits, byte j of a
word holds, at bit p * i, the bits of column 4 * i + j of the 32 / p columns that the 64 bytes cover: shifting by p * i
and masking leaves four consecutive columns of one row in each 32-bit lane, the operand of a 4-way dot product. Rows are
padded to 16 and columns to the group size with codes of 0 (padded inputs are 0).

Slice of an expert: the slices of gate [F, D], up [F, D] and down [D, F] one after the other, padded to 4096 bytes.

Width 16 stands for weights kept as they are: one slice, the three matrices row-major in the dtype of the source.
"""

# N rows (outputs), K columns (inputs), G group size, D hidden, F expert inner size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

TILE_ROWS = 16
PART_ALIGN = 64
SLICE_ALIGN = 4096
RAW_WIDTH = 16
MIN_WIDTH, MAX_WIDTH = 2, 8
GROUP_SIZES = (32, 64, 128)
KEY_BLOCK = 16  # positions of a KV cache whose keys lie side by side, so that a register holds a number of each
LINEAR, TRELLIS = CODES = "linear", "trellis"
MAX_TRELLIS_WIDTH = 6
RAW_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def align(n: int, to: int) -> int:
    """The least multiple of `to` that is not below `n`."""
    return -(-n // to) * to


def check_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """Return `widths` as a tuple, or raise ValueError with the reason why they are not a valid list of widths."""
    result = tuple(widths)
    if result == (RAW_WIDTH,):
        return result
    if not result:
        raise ValueError("the list of widths is empty")
    if any(b < MIN_WIDTH or b > MAX_WIDTH for b in result):
        raise ValueError(f"widths {list(result)} are not all from {MIN_WIDTH} to {MAX_WIDTH} (or {RAW_WIDTH} alone)")
    if list(result) != sorted(set(result)):
        raise ValueError(f"widths {list(result)} do not ascend")
    return result


def check_code(code: str, widths: Sequence[int]) -> None:
    """Raise ValueError, with the reason, where experts of these widths cannot have this code."""
    if code not in CODES:
        raise ValueError(f"the code {code!r} is not one of {', '.join(CODES)}")
    if code == TRELLIS and widths[-1] > MAX_TRELLIS_WIDTH:
        raise ValueError(f"width {widths[-1]} is more than the {MAX_TRELLIS_WIDTH} bits of the trellis code")


def calibrated_code(widths: Sequence[int]) -> str:
    """Return the code that a calibrated conversion gives experts of these widths: trellis up to MAX_TRELLIS_WIDTH."""
    return TRELLIS if widths[-1] <= MAX_TRELLIS_WIDTH else LINEAR


def slice_planes(widths: Sequence[int], index: int, code: str = LINEAR) -> tuple[int, ...]:
    """Bits of each plane of slice `index`, most significant plane first."""
    bits = widths[index] - (widths[index - 1] if index else 0)
    if code == TRELLIS:
        return (2,) * (bits // 2) + (1,) * (bits % 2)
    return tuple(p for p in (8, 4, 2, 1) if bits & p)


def midpoint(width: int) -> float:
    """The code value, halfway between two codes, that stands for a weight of 0."""
    return (2**width - 1) / 2


@dataclass(frozen=True)
class MatrixLayout:
    """Sizes of the slices of one [rows, cols] matrix."""

    rows: int
    cols: int
    group_size: int
    widths: tuple[int, ...]
    code: str = LINEAR

    def __post_init__(self) -> None:
        check_widths(self.widths)
        check_code(self.code, self.widths)
        if self.widths == (RAW_WIDTH,):
            raise ValueError("raw matrices have no nested layout")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group size {self.group_size} is not one of {', '.join(map(str, GROUP_SIZES))}")
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"a matrix of {self.rows} x {self.cols} has no elements")

    @cached_property
    def tiles(self) -> int:
        return align(self.rows, TILE_ROWS) // TILE_ROWS

    @cached_property
    def groups(self) -> int:
        return align(self.cols, self.group_size) // self.group_size

    @property
    def num_slices(self) -> int:
        return len(self.widths)

    @cached_property
    def scale_groups(self) -> int:
        """Scales of a row at each width."""
        return 1 if self.code == TRELLIS else self.groups

    def planes(self, index: int) -> tuple[int, ...]:
        """Bits of each plane of slice `index`."""
        return slice_planes(self.widths, index, self.code)

    def group_bytes(self, index: int) -> int:
        """Bytes of codes that slice `index` holds for one tile and one group."""
        return TILE_ROWS * self.group_size * sum(self.planes(index)) // 8

    def codes_bytes(self, index: int) -> int:
        """Bytes of all codes of slice `index`: also the offset of its scales. A multiple of 64."""
        return self.tiles * self.groups * self.group_bytes(index)

    def scales_bytes(self) -> int:
        """Bytes of the scales of any slice, unpadded."""
        return self.tiles * self.scale_groups * TILE_ROWS * 2

    def slice_bytes(self, index: int) -> int:
        """Bytes of slice `index`, padded to 64."""
        return self.codes_bytes(index) + align(self.scales_bytes(), PART_ALIGN)

    def bits_per_weight(self, index: int) -> float:
        """True bits per weight at widths[index]: codes and the scales of every slice up to it."""
        return 8 * sum(self.slice_bytes(i) for i in range(index + 1)) / (self.rows * self.cols)


@dataclass(frozen=True)
class ExpertLayout:
    """Sizes and offsets of the slices of one expert: gate [F, D], up [F, D], down [D, F].

    With widths (16,) there is one slice that holds the matrices as they are, in `raw_dtype`.
    """

    hidden: int
    inner: int
    group_size: int
    widths: tuple[int, ...]
    raw_dtype: str = "bfloat16"
    code: str = LINEAR

    def __post_init__(self) -> None:
        check_widths(self.widths)
        if not self.raw:
            check_code(self.code, self.widths)
        if self.raw_dtype not in RAW_DTYPE_BYTES:
            raise ValueError(f"dtype {self.raw_dtype} is not one of {', '.join(RAW_DTYPE_BYTES)}")
        if not self.raw:
            _ = self.matrices  # checks the shapes

    @property
    def raw(self) -> bool:
        return self.widths == (RAW_WIDTH,)

    @property
    def num_slices(self) -> int:
        return len(self.widths)

    @cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, cols) of gate, up and down."""
        return ((self.inner, self.hidden), (self.inner, self.hidden), (self.hidden, self.inner))

    @cached_property
    def matrices(self) -> tuple[MatrixLayout, ...]:
        """Layouts of gate, up and down (not for raw experts)."""
        return tuple(MatrixLayout(n, k, self.group_size, self.widths, self.code) for n, k in self.shapes)

    def offsets(self, index: int) -> tuple[int, ...]:
        """Offsets of gate, up and down in slice `index`, and the end of down."""
        result = [0]
        for m, (rows, cols) in enumerate(self.shapes):
            if self.raw:
                size = align(rows * cols * RAW_DTYPE_BYTES[self.raw_dtype], PART_ALIGN)
            else:
                size = self.matrices[m].slice_bytes(index)
            result.append(result[-1] + size)
        return tuple(result)

    @cached_property
    def slice_sizes(self) -> tuple[int, ...]:
        """Bytes of each slice, padded to 4096."""
        return tuple(align(self.offsets(i)[-1], SLICE_ALIGN) for i in range(self.num_slices))

    def bytes_at(self, width: int) -> int:
        """Bytes of all slices that an expert used at `width` needs. Raises ValueError for a width not stored."""
        return sum(self.slice_sizes[: self.slices_for(width)])

    def slices_for(self, width: int) -> int:
        """Return how many slices `width` needs. Raises ValueError for a width not stored."""
        if width not in self.widths:
            raise ValueError(f"width {width} is not stored (stored: {', '.join(map(str, self.widths))})")
        return self.widths.index(width) + 1
