"""A store together with the model that its config.json describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moert.models import registry
from moert.store.layout import CONFIG_FILE, META_FILE
from moert.store.meta import StoreMeta
from moert.store.reader import Store, changed


class StoredModel(Store):
    """A `Store` whose `architecture` is known and agrees with what the store says of its tensors.

    Opening raises UnsupportedModelError for a model that is not supported, beside what `Store.open` raises.
    """

    def __init__(self, path: Path, meta: StoreMeta, config: dict[str, Any]) -> None:
        super().__init__(path, meta, config)
        self.architecture = registry.architecture(config)

    def _check_layout(self) -> None:
        arch, meta = self.architecture, self.meta
        same = (arch.moe_layers, arch.num_experts, arch.hidden_size, arch.expert_inner, arch.model_type) == (
            meta.moe_layers,
            meta.num_experts,
            meta.layout.hidden,
            meta.layout.inner,
            meta.model_type,
        )
        shapes = {name: tuple(spec.shape) for name, spec in arch.dense_tensors().items()}
        if not same or shapes != {t.name: t.shape for t in meta.dense}:
            raise changed(self.path / META_FILE, f"does not describe the model of {CONFIG_FILE}")
        super()._check_layout()
