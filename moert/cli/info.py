"""Show the content of a store: the model, its sizes, the widths that it can be run at."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from moert.cli import common
from moert.cli.progress import line_progress
from moert.cli.status import Status
from moert.config import format_bytes
from moert.errors import UsageError
from moert.hub import resolve as source

if TYPE_CHECKING:
    from moert.models.stored_model import StoredModel


def add_options(parser: argparse.ArgumentParser) -> None:
    common.add_model_option(parser)
    parser.add_argument("--verify", action="store_true", help="read everything and compare the checksums")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_status_options(parser)
    common.add_conversion_options(parser)


def main(args: argparse.Namespace) -> int:
    status = Status.of(args)
    settings = common.conversion_of(args)
    store_path = source.find(args.model, settings)
    if store_path is None:
        source.checkpoint(args.model, offline=True)  # says what is wrong with the name, if anything is
        raise UsageError(f"{args.model} is not converted yet ({settings}): moert convert or moert chat does it.")
    from moert.models.stored_model import StoredModel

    with status.spinner("Reading"):
        store = StoredModel.open(store_path)
    facts = describe(store)
    if args.verify:
        with line_progress(status) as progress:
            store.verify(lambda done, total: progress(f"checked {format_bytes(done)} of {format_bytes(total)}"))
        facts["files"] = "every checksum is right"
    if args.json:
        print(json.dumps(facts))
        return 0
    for name, value in facts.items():
        if name == "widths":
            for width in value:
                bits, size = f"{width['bits_per_weight']:.2f} bits per weight", format_bytes(width["bytes_per_expert"])
                lost = "" if width["kl_nats"] is None else f", KL {width['kl_nats']:.2g} on the calibration text"
                print(f"{'width ' + str(width['width']):22}{bits}, {size} per expert, {width['precision']}{lost}")
        else:
            shown = (
                format_bytes(value) if name.endswith("_bytes") else f"{value:,}" if isinstance(value, int) else value
            )
            print(f"{name.removesuffix('_bytes').replace('_', ' '):22}{shown}")
    return 0


def _routed(store: StoredModel) -> str:
    """Describe what `--precision routed` goes by."""
    if store.meta.sensitivity is None or store.meta.router_weights is None:
        return "not possible: the store does not say how sensitive its experts are"
    return "thresholds on the router's weights"


def _elastic(store: StoredModel) -> str:
    """Describe what the bound of `--precision elastic` goes by."""
    if store.meta.sensitivity is None or store.meta.router_weights is None:
        return "by the error of each width on Gaussian weights: the store does not say how sensitive its experts are"
    if store.meta.quantiser.startswith("calibrated"):
        return "by the error that was measured for each expert"
    return "by the errors of each expert's weights"


def _foreseen(store: StoredModel) -> str:
    """Describe what predicts the next experts."""
    from moert.store.predictor import read_predictor

    found = read_predictor(store)
    return "the routers of the next layers" + ("" if found is None else f", and a trained predictor: {found.about}")


def describe(store: StoredModel) -> dict[str, Any]:
    """Facts of a store under stable names; sizes in bytes."""
    arch, layout = store.architecture, store.layout
    expert = sum(rows * cols for rows, cols in layout.shapes)
    dense = 0
    for spec in arch.dense_tensors().values():
        size = 1
        for n in spec.shape:
            size *= n
        dense += size
    layers = len(store.moe_layers)
    return {
        "path": str(store.path),
        "source": store.meta.source_name,
        "family": arch.model_type,
        "parameters": dense + layers * store.num_experts * expert,
        "active_parameters": dense + layers * arch.top_k * expert,
        "layers": arch.num_layers,
        "moe_layers": layers,
        "experts_per_layer": store.num_experts,
        "experts_per_token": arch.top_k,
        "context_length": arch.max_position_embeddings,
        "dense_bits": store.meta.dense_bits,
        "group_size": store.meta.group_size,
        "quantiser": store.meta.quantiser,
        "widths": [
            {
                "width": width,
                "bits_per_weight": 8 * layout.bytes_at(width) / expert,
                "bytes_per_expert": layout.bytes_at(width),
                "precision": f"fixed:{width}",
                "widest_of": store.widest.get(width, 0),
                "kl_nats": None if store.meta.kl is None else store.meta.kl[i],
            }
            for i, width in enumerate(layout.widths)
        ],
        "kept": "every width of every expert" if store.meta.kept is None else store.kept_widths(),
        "routed_precision": _routed(store),
        "elastic_precision": _elastic(store),
        "prefetching": _foreseen(store),
        "experts_bytes": store.experts_bytes(layout.num_slices),
        "dense_bytes": store.dense_bytes,
        "disk_bytes": sum(f.stat().st_size for f in store.path.iterdir()),
        "files": "present, with the right sizes",
    }
