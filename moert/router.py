"""Read what a store knows of the harm that each width does, for precisions that go by it."""

from __future__ import annotations

from moert.scheduler.precision import BitRouter
from moert.store.reader import Store


def bit_router(store: Store, trained: bool = True) -> BitRouter | None:
    """Return what decides on routed widths: the trained router if the store has one and it is wanted, else the
    sensitivities.

    None where the conversion did not measure these. Raises StoreError where what was trained is damaged.
    """
    meta, kept, layers = store.meta, store.kept, store.moe_layers
    if meta.sensitivity is None or meta.router_weights is None:
        return None
    damage, exponents = meta.sensitivity, dict.fromkeys(layers, 2.0)  # errors add up squared
    found = store.trained_router() if trained else None
    if found is not None:
        damage = dict(zip(layers, found.damage.tolist(), strict=True))
        exponents = dict(zip(layers, found.exponents.tolist(), strict=True))
    curves = {layer: [row[:n] for row, n in zip(damage[layer], kept[layer], strict=True)] for layer in layers}
    return BitRouter(meta.widths, curves, exponents, meta.router_weights, found is not None)
