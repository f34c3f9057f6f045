"""The cost of a precision in quality: what the store's conversion measured, else what was measured on small models.

`moert eval` on the model that ships (Qwen3-MoE, 21 M parameters) and on one of OLMoE's shape (14 M), 20,440 held-out
tokens, against the same model lossless; `elastic` on the first alone, out of a quarter of the memory. The order of the
policies carries over to large models, the figures do not: those lose more, at 2 bits far more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

CONVERSION = "measured on the text that the store was calibrated on"
SMALL_MODELS = (
    "measured on two small models, 21 and 14 million parameters; others lose more: SmolLM2-135M, converted by default,"
    " 8% at 4 bits and 24% at 3"
)


@dataclass(frozen=True, slots=True)
class Quality:
    """Against the lossless model, lowest and highest of the models measured.

    perplexity_ratio: 1 is lossless; None where it was not measured. kl_nats: mean divergence of the
    distributions of the next token. source: of what.
    """

    perplexity_ratio: tuple[float, float] | None
    kl_nats: tuple[float, float]
    source: str = SMALL_MODELS

    @property
    def text(self) -> str:
        """Describe the quality for people, in percent of perplexity lost, or in nats."""
        if self.perplexity_ratio is None:
            return f"KL {self.kl_nats[1]:.2g}"
        low, high = (f"{100 * (ratio - 1):.1f}" for ratio in self.perplexity_ratio)
        return f"+{low}%" if low == high else f"+{low} to {high}%"


# Calibrated conversion with trained scales: moert/docs/quality.md, "Beside other quantisers" and "Elastic precision".
_CALIBRATED = {
    "fixed:4": Quality((1.0009, 1.0035), (0.0058, 0.0063)),
    "routed:3": Quality((1.0024, 1.0048), (0.0074, 0.0082)),
    "routed:2.5": Quality((1.0043, 1.0126), (0.0153, 0.0155)),
    "fixed:3": Quality((1.0050, 1.0084), (0.0159, 0.0167)),
    "elastic:3": Quality((1.0038, 1.0038), (0.0160, 0.0160)),
    "elastic:2.5": Quality((1.0212, 1.0212), (0.0418, 0.0418)),
    "fixed:2": Quality((1.0291, 1.0413), (0.0629, 0.0646)),
}
# What a conversion with --fast gives.
_ROUNDED = {
    "fixed:4": Quality((1.0017, 1.0079), (0.0089, 0.0097)),
    "fixed:3": Quality((1.0164, 1.0275), (0.0338, 0.0396)),
    "fixed:2": Quality((1.1198, 1.2056), (0.1827, 0.2253)),
}
_LOSSLESS = Quality((1.0, 1.0), (0.0, 0.0), "weights of 16 bits are not rounded")


def quality_of(precision: str, calibrated: bool, losses: Mapping[int, float] | None = None) -> Quality | None:
    """Return the quality of a policy as `--precision` names it; None where it was not measured.

    calibrated: whether the store is, or would be, calibrated. Rounded experts under `elastic:B` are in sum
    no worse than at B bits, which is what is said of them. losses: width -> nats that the store's conversion measured;
    between two widths their logarithms lie on a line, and of `routed:B` it is said that it is no worse.
    """
    if precision == "fixed:16":
        return _LOSSLESS
    policy = precision.partition(",")[0]
    if losses:
        widths = sorted(losses)
        logarithms = [math.log(max(losses[width], 1e-9)) for width in widths]
        nats = math.exp(np.interp(float(policy.partition(":")[2]), widths, logarithms))
        return Quality(None, (nats, nats), CONVERSION)
    if calibrated or policy.startswith("routed"):
        return _CALIBRATED.get(policy)
    return _ROUNDED.get(policy.replace("elastic", "fixed"))
