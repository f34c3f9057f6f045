"""Print what `moert plan` recommends for public models on the devices that come along, as a table.

    python examples/plan_table.py Qwen/Qwen3-30B-A3B allenai/OLMoE-1B-7B-0924

Computed from the sizes of the models alone, nothing is downloaded or run; see `moert plan` for what is assumed.
"""

from __future__ import annotations

import argparse

from moert.errors import BudgetError
from moert.hardware.devices import devices, load_device
from moert.hub.resolve import Conversion
from moert.planning import recommend
from moert.planning.model_shape import ModelShape, read_shape
from moert.planning.predict import PROMPT_TOKENS
from moert.planning.routing import drawn


def cell(shape: ModelShape, device: str) -> str:
    """Precision, speed, and the memory that it takes; or the least that would do."""
    profile, routes = load_device(device), drawn(shape, PROMPT_TOKENS)
    available = int(profile.memory_bytes - profile.library_bytes)
    try:
        found = recommend(shape, profile, routes.trace, available, recalls=routes.recalls).prediction
    except BudgetError as error:
        return f"needs {error.least_bytes / 2**30:.1f} GiB"
    return f"{found.precision}, {found.decode_tokens_per_s:.2g} tokens/s, {found.budget_bytes / 2**30:.1f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--device", nargs="+", default=list(devices()), metavar="NAME")
    args = parser.parse_args()
    print("| model | on disk | " + " | ".join(f"`{name}`" for name in args.device) + " |")
    print("|---|---:" + "|---" * len(args.device) + "|")
    for model in args.models:
        shape = read_shape(model, Conversion(), offline=True)
        cells = [cell(shape, device) for device in args.device]
        name = shape.name.rpartition("/")[2] + ("" if shape.runnable else " (1)")
        print(f"| {name} | {shape.store_bytes / 1e9:.1f} GB | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
