"""`--widths auto`: which widths a store gets, by what the whole model was found to lose at each."""

from __future__ import annotations

from collections.abc import Sequence

DEFAULT_WIDTHS = (2, 3, 4)  # where nothing is measured
AUTO_WIDTHS = (2, 3, 4, 6)  # all that may pay: behind 4 bits one step of 2 loses less than two of 1
MOST_BASE_KL = 0.7  # nats per token: with more, what base slices alone compute is not the model any more
ENOUGH_KL = 0.02  # nats per token, 1 to 2% of perplexity: where 4 bits lose no more, 6 do not pay


def chosen(kl: Sequence[float]) -> tuple[int, ...]:
    """Choose from AUTO_WIDTHS, whose mean KL is `kl`, in nats per token."""
    first = 0 if kl[0] <= MOST_BASE_KL else 1
    last = 3 if kl[2] > ENOUGH_KL and kl[3] < kl[2] else 2
    return AUTO_WIDTHS[first : last + 1]
