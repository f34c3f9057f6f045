"""The token scheduler: which of the sequences that are being decoded take the next step together.

A step reads every expert that any of its tokens is routed to, once. So tokens with similar routes should step together,
as in ExpertFlow (arXiv 2410.17954, token scheduling), which divides the tokens of two batches by K-means on the Hamming
distance of their predicted routes. Here the prediction is a sequence's own recent past, and a greedy choice takes the
place of K-means: it needs no iterations, and it knows how long each sequence has waited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """A sequence that could take the next step.

    waited: steps that went by without it since its last. routes: the experts that it is expected to be routed to, bit
    `layer * experts per layer + expert` for each; 0 where nothing is known.
    """

    waited: int
    routes: int


# A choice needs more sequences than take a step: so many times as many are begun, where the KV cache has room.
_ALIVE = {"first-come": 1, "most-overlap": 2}


def most_alive(batch_size: int, policy: str) -> int:
    """Return how many sequences are begun at most, of which `batch_size` take a step together."""
    return batch_size if batch_size == 1 else batch_size * _ALIVE[policy]


Policy = Callable[[Sequence[Candidate], int, int], list[int]]


def first_come(candidates: Sequence[Candidate], count: int, most_delay: int) -> list[int]:
    """The baseline: those that have waited longest, of equals the first. Returns `count` indices, ascending."""
    order = sorted(range(len(candidates)), key=lambda i: (-candidates[i].waited, i))
    return sorted(order[:count])


def most_overlap(candidates: Sequence[Candidate], count: int, most_delay: int) -> list[int]:
    """Begins with the one that has waited longest, and adds the one that brings the fewest new experts.

    Nobody waits for more than `most_delay` steps where so many sequences can be served within that: as soon as the
    places left are just enough for those whose time is running out, these get them. With more sequences than that, the
    longest wait is the least possible. Returns `count` indices, ascending; deterministic.
    """
    most_delay = max(most_delay, -(-len(candidates) // count) - 1)
    left = dict(enumerate(most_delay - c.waited for c in candidates))  # steps that each can still be left out
    chosen: list[int] = []
    touched = 0
    while left and len(chosen) < count:
        places = count - len(chosen)
        allowed = list(left)
        if not chosen:
            allowed = [min(left, key=lambda i: (left[i], i))]
        else:
            for slack in range(most_delay + 1):
                # `slack` further steps have room for count * slack of them.
                urgent = [i for i in left if left[i] <= slack]
                if len(urgent) - count * slack >= places:
                    allowed = urgent
                    break
        best = min(allowed, key=lambda i: ((touched | candidates[i].routes).bit_count(), left[i], i))
        touched |= candidates[best].routes
        chosen.append(best)
        del left[best]
    return sorted(chosen)


POLICIES: dict[str, Policy] = {"first-come": first_come, "most-overlap": most_overlap}
