"""How long a conversion will take: made-up times, against what they add up to."""

import itertools
import random
from dataclasses import dataclass

import pytest

from moert.convert.pace import Pace


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def run(layers, experts, pass_s, expert_s, dense_s, done_layers=0, noise=0.0, guess=1.0):
    """A conversion of so many layers, of which earlier runs did some: (layer, share, predicted, true seconds left)."""
    clock, chance = Clock(), random.Random(0)
    dense = 100
    total = {"pass": layers, "experts": layers * experts, "dense": dense}
    left = {"pass": layers - done_layers, "experts": (layers - done_layers) * experts, "dense": dense}
    pace = Pace(total, left, clock)
    pace.guess("dense", guess * dense_s / dense)
    steps = []
    for layer in range(done_layers, layers):
        steps += [(layer, "pass", pass_s / 10, 0.0)] * 9 + [(layer, "pass", pass_s / 10, 1.0)]
        steps += [(layer, "experts", expert_s, 1.0)] * experts
    steps += [(layers, "dense", dense_s / dense, 1.0)] * dense
    seen = []
    for layer, kind, seconds, units in steps:
        clock.now += seconds * (1 + noise * chance.uniform(-1, 1))
        pace.spend(kind, units)
        seen.append((layer, pace.share, pace.seconds_left, clock.now))
    return [(layer, share, predicted, clock.now - now) for layer, share, predicted, now in seen]


@pytest.mark.parametrize(
    "work",
    [
        {"layers": 30, "experts": 8, "pass_s": 1.2, "expert_s": 0.3, "dense_s": 4.5},
        {"layers": 24, "experts": 128, "pass_s": 60.0, "expert_s": 2.0, "dense_s": 300.0},
        {"layers": 6, "experts": 4, "pass_s": 50.0, "expert_s": 0.1, "dense_s": 1.0},
        {"layers": 12, "experts": 8, "pass_s": 0.0, "expert_s": 0.01, "dense_s": 10.0},  # rounded
        {"layers": 30, "experts": 8, "pass_s": 1.2, "expert_s": 0.3, "dense_s": 4.5, "done_layers": 20},
        {"layers": 30, "experts": 8, "pass_s": 1.2, "expert_s": 0.3, "dense_s": 4.5, "done_layers": 30},
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_from_the_second_layer_on_it_is_right(work, noise):
    seen = run(**work, noise=noise)
    second = work.get("done_layers", 0) + 1
    whole = sum(work[kind] * n for kind, n in (("pass_s", work["layers"]), ("dense_s", 1)))
    whole += work["expert_s"] * work["layers"] * work["experts"]
    for layer, share, predicted, true in seen:
        if layer >= second:
            assert predicted == pytest.approx(true, rel=0.2 if noise else 1e-6, abs=0.01 * whole)
            assert share == pytest.approx(1 - true / whole, abs=0.05 if noise else 1e-6)
    assert seen[-1][1:] == (1.0, 0.0, 0.0)


def test_nothing_is_said_before_there_is_anything_to_go_by():
    seen = run(layers=3, experts=2, pass_s=1.0, expert_s=1.0, dense_s=1.0)
    assert [predicted is None for _, _, predicted, _ in seen[:12]] == [True] * 10 + [False] * 2
    assert [share for _, share, _, _ in seen[:10]] == [0.0] * 10


def test_the_share_never_goes_back():
    seen = run(layers=3, experts=2, pass_s=1.0, expert_s=1.0, dense_s=100.0, guess=0.01)
    shares = [share for _, share, _, _ in seen]
    assert all(a <= b for a, b in itertools.pairwise(shares))
    assert max(shares[:36]) > 0.8  # it was thought so, until the dense weights began
    assert shares[-1] == 1.0


def test_time_that_counts_for_nothing_and_work_that_turns_out_to_be_more():
    clock = Clock()
    pace = Pace({"pass": 4}, {"pass": 3}, clock)
    clock.now += 50
    pace.skip()
    clock.now += 4
    pace.left["pass"] += 1  # a layer has to be passed through again
    pace.spend("pass", 2)
    assert pace.seconds_left == pytest.approx(4)
    clock.now += 1
    pace.spend("pass")
    assert pace.seconds_left == pytest.approx(3)
    clock.now += 60
    pace.spend("pass")
    assert pace.seconds_left == 0
    assert pace.share == 1.0


def test_nothing_to_do_is_all_done():
    pace = Pace({"dense": 5}, {"dense": 0}, Clock())
    assert (pace.share, pace.seconds_left) == (1.0, 0.0)
