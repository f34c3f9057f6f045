"""Plan what a store will hold, worked out from the headers of the source before anything is written."""

# B widths

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from moert import __version__
from moert.convert.partial import Finished
from moert.convert.source_model import SourceModel
from moert.errors import CheckpointError, UsageError
from moert.quant.allocate import Allocation, allocate
from moert.quant.format import GROUP_SIZES, LINEAR, ExpertLayout, check_widths
from moert.store.fileio import json_bytes, readable
from moert.store.layout import (
    CONFIG_FILE,
    DENSE_FILE,
    DENSE_WIDTHS,
    TOKENIZER_FILE,
    ExpertFile,
    build_header,
    experts_file,
    stored_dense,
)
from moert.store.meta import QUANTILES, CopiedFile, StoreMeta, WeightFile
from moert.text.tokenizer import TEMPLATE_FILES

COPIED_FILES = (
    CONFIG_FILE,
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
COPIED_PATTERNS = (TEMPLATE_FILES, "LICENSE*", "LICENCE*", "NOTICE*")
# Of the usage of an expert on the calibration text. On four other texts of a trained model its logarithm was 0.76 to
# 0.94 times as far from the mean as on that text, with correlations from 0.7 to 0.8; exponents from 0.5 to 0.75 led to
# allocations with the least errors on all of them.
USAGE_EXPONENT = 2 / 3
LEAST_USAGE = 1e-3  # of the layer's mean: a text that is not the user's may not use an expert at all
_LONGEST = 1.2345678901234567e-100  # no figure takes more characters
_LONGEST_WEIGHT = 0.123456  # nor any router weight
_LARGEST = (1 << 32) - 1  # checksum


def check_settings(widths: Sequence[int], group_size: int, dense_bits: int) -> tuple[int, ...]:
    """The widths, if a conversion can have these settings; UsageError where it cannot."""
    try:
        checked = check_widths(widths)
    except ValueError as error:
        raise UsageError(f"Cannot convert: {error}.") from error
    if group_size not in GROUP_SIZES:
        raise UsageError(f"Group size {group_size} is not one of {', '.join(map(str, GROUP_SIZES))}.")
    if dense_bits not in (*DENSE_WIDTHS, 16):
        choices = ", ".join(map(str, DENSE_WIDTHS))
        raise UsageError(f"Dense weights can be stored at {choices} or 16 bits, not {dense_bits}.")
    return checked


class ConversionPlan:
    """The content that the store will have.

    max_size: of the whole store in bytes, None without a limit. Where it holds less than all slices, `cut` is true:
    all are then written first, under other names, and `allocate` says how many are kept. auto: so they are, too, where
    some of the widths may be left out. Raises UsageError for a limit
    that even the smallest widths exceed, CheckpointError for a source that cannot be stored like this.
    """

    def __init__(
        self,
        source: SourceModel,
        widths: tuple[int, ...],
        group_size: int,
        dense_bits: int,
        quantiser: str,
        source_name: str,
        max_size: int | None = None,
        code: str = LINEAR,
        auto: bool = False,
    ) -> None:
        self.source, self.quantiser, self.source_name, self.auto = source, quantiser, source_name, auto
        self.group_size, self.dense_bits, self.max_size = group_size, dense_bits, max_size
        arch = source.architecture
        dtype = source.expert_dtype
        self.layout = ExpertLayout(
            arch.hidden_size, arch.expert_inner, group_size, widths, "bfloat16" if dtype == "mixed" else dtype, code
        )
        if self.layout.raw and dtype == "mixed":
            raise CheckpointError(
                f"The experts in {source.checkpoint.path} have several dtypes and cannot be kept as they are:"
                " choose widths from 2 to 8."
            )
        self.dense = stored_dense(arch.dense_tensors(), source.dense_dtype, group_size, dense_bits)
        self.experts = [ExpertFile(layer, arch.num_experts, self.layout) for layer in arch.moe_layers]
        self.cut = max_size is not None and self.fixed_bytes + sum(file.data_bytes for file in self.experts) > max_size
        if max_size is not None:
            least = self.fixed_bytes + len(self.experts) * arch.num_experts * self.layout.slice_sizes[0]
            if least > max_size:
                raise UsageError(
                    f"A store of {max_size} bytes ({readable(max_size)}) does not hold every expert at"
                    f" {widths[0]} bits; the least --max-size that does is {least} bytes ({readable(least)})."
                )

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of the file of the dense tensors."""
        return len(build_header(t.entry for t in self.dense)) + sum(t.nbytes for t in self.dense)

    def copied_files(self) -> Iterator[Path]:
        """The small files of the source that the store has too."""
        folder = self.source.checkpoint.path
        found = [folder / name for name in COPIED_FILES]
        found += [path for pattern in COPIED_PATTERNS for path in sorted(folder.glob(pattern))]
        return (path for path in found if path.is_file())

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes of a store without any slices: at most, for moert.json depends on what its figures will be.

        All that a quantiser measures has to be counted here, as `files` has it.
        """
        E, B = self.source.architecture.num_experts, self.layout.num_slices
        all_kept = {file.layer: (B,) * E for file in self.experts}
        files = {
            file.name: Finished(
                1 << 62,
                1 << 62,
                [_LARGEST] * E * B,
                sensitivity=[[_LONGEST] * B] * E,
                router_weights=[[_LONGEST_WEIGHT] * (2 + QUANTILES)] * E,
            )
            for file in self.experts
        }
        files[DENSE_FILE] = Finished(1 << 62, 1 << 62, [_LARGEST] * len(self.dense))
        copies = dict.fromkeys((CONFIG_FILE, TOKENIZER_FILE), CopiedFile(1 << 62, _LARGEST))
        meta = self.meta(files, copies, all_kept, [_LONGEST] * B)
        copied = sum(path.stat().st_size for path in self.copied_files())
        return len(json_bytes(meta.as_json())) + copied + self.dense_bytes + sum(len(f.header) for f in self.experts)

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights with all slices."""
        return self.dense_bytes + sum(file.size for file in self.experts)

    @property
    def staged(self) -> bool:
        """Whether it is decided only when all is written what is kept of it."""
        return self.cut or self.auto

    def first_name(self, file: ExpertFile) -> str:
        """Under which name the experts of a layer are written first, with all slices."""
        return "whole-" + file.name if self.staged else file.name

    def with_widths(self, widths: tuple[int, ...]) -> ConversionPlan:
        """Return the plan of a store with some of the widths."""
        code = self.layout.code
        return ConversionPlan(
            self.source, widths, self.group_size, self.dense_bits, self.quantiser, self.source_name, None, code
        )

    def settings(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with the one before; `version`: the codes may change."""
        return {
            "version": __version__,
            "widths": "auto" if self.auto else list(self.layout.widths),
            "code": self.layout.code,
            "group_size": self.group_size,
            "dense_bits": self.dense_bits,
            "quantiser": self.quantiser,
            "max_size": self.max_size,
        }

    def allocate(self, measured: Mapping[int, Finished]) -> tuple[dict[int, tuple[int, ...]], Allocation]:
        """Choose how many slices each expert keeps, by what was measured of each layer, and say how good that is.

        What an expert's width costs is its sensitivity times its usage: that is, as a share of the hidden state's
        energy, what it adds to the errors behind the layer. On a trained model these shares were 0.7 to 1.05 of the
        divergence that each layer's errors led to, so that layers are compared by them as they are.
        """
        assert self.max_size is not None
        errors: list[list[float]] = []
        for file in measured.values():
            assert file.sensitivity is not None
            assert file.usage is not None
            errors += [
                [usage * error for error in row]
                for usage, row in zip(_expected_usage(file.usage), file.sensitivity, strict=True)
            ]
        sizes = [list(accumulate(self.layout.slice_sizes))] * len(errors)
        allocation = allocate(errors, sizes, self.max_size - self.fixed_bytes)
        choices = iter(allocation.choices)
        E = self.source.architecture.num_experts
        return {layer: tuple(next(choices) + 1 for _ in range(E)) for layer in measured}, allocation

    def meta(
        self,
        files: Mapping[str, Finished],
        copies: Mapping[str, CopiedFile],
        kept: Mapping[int, Sequence[int]] | None,
        kl: Sequence[float] | None = None,
    ) -> StoreMeta:
        """Return what moert.json says when the files are written; `kept` where not all slices are; kl: at each width,
        where the whole model was measured.
        """
        arch = self.source.architecture
        layers = arch.moe_layers
        counts = kept or {file.layer: file.counts for file in self.experts}
        of_layer = {layer: files[experts_file(layer)] for layer in layers}
        sensitivity = {layer: file.sensitivity for layer, file in of_layer.items()}
        router_weights = {layer: file.router_weights for layer, file in of_layer.items()}
        return StoreMeta(
            created_by=f"moert {__version__}",
            source_name=self.source_name,
            model_type=arch.model_type,
            quantiser=self.quantiser,
            group_size=self.group_size,
            dense_bits=self.dense_bits,
            moe_layers=layers,
            num_experts=arch.num_experts,
            layout=self.layout,
            dense=tuple(self.dense),
            dense_checksums=tuple(files[DENSE_FILE].checksums),
            weights={
                name: WeightFile(files[name].size, files[name].data_start)
                for name in (DENSE_FILE, *map(experts_file, layers))
            },
            copies=copies,
            checksums={layer: _rows(files[experts_file(layer)].checksums, counts[layer]) for layer in layers},
            sensitivity=_all_known(sensitivity),
            router_weights=_all_known(router_weights),
            kept=kept,
            kl=None if kl is None else tuple(kl),
        )


def _expected_usage(usage: Sequence[float]) -> list[float]:
    """Estimate the usage on other texts, which use the experts of a layer somewhat differently: see USAGE_EXPONENT."""
    total = sum(usage)
    powers = [max(u, LEAST_USAGE * total / len(usage)) ** USAGE_EXPONENT for u in usage]
    return [total * p / sum(powers) if total else 0.0 for p in powers]


def _all_known(values: Mapping[int, list[list[float]] | None]) -> dict[int, list[list[float]]] | None:
    known = {layer: rows for layer, rows in values.items() if rows is not None}
    return known if known and len(known) == len(values) else None


def _rows(values: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    rest = iter(values)
    return [[next(rest) for _ in range(length)] for length in lengths]
