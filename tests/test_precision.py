"""Routed precision: the choice of widths against brute force, and the price against counting."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.scheduler.capacity import slots_for
from moert.scheduler.precision import BitRouter, FixedPrecision, RoutedPrecision, parse_precision

LAYERS, EXPERTS, TOKENS, TOP_K = 2, 8, 4000, 3


def quantiles(weights):
    weights = np.sort(weights)
    if not len(weights):
        return [0.0] * 18
    return [float(len(weights)), *weights[np.linspace(0, len(weights) - 1, 17).round().astype(int)].tolist()]


class Text:
    """Draw a router's output on a text: experts and weights [LAYERS, TOKENS, TOP_K]; some experts are rare."""

    def __init__(self, seed=0):
        g = np.random.default_rng(seed)
        scores = g.normal(size=(LAYERS, TOKENS, EXPERTS)) * 2 + np.linspace(0, 2, EXPERTS)
        self.experts = np.argsort(-scores)[..., :TOP_K]
        chosen = np.exp(np.take_along_axis(scores, self.experts, -1))
        self.weights = (chosen / chosen.sum(-1, keepdims=True)).astype(np.float32)
        self.usage = {
            layer: [quantiles(self.weights[layer][self.experts[layer] == e]) for e in range(EXPERTS)]
            for layer in range(LAYERS)
        }


TEXT = Text()


def router(widths=(2, 3, 4), kept=None, seed=1):
    g = np.random.default_rng(seed)
    scale = g.lognormal(size=(LAYERS, EXPERTS, 1))
    sensitivity = scale * 4.0 ** -np.array(widths) * g.uniform(0.7, 1.4, size=(LAYERS, EXPERTS, len(widths)))
    curves = {
        layer: [row[: kept[e] if kept else len(widths)].tolist() for e, row in enumerate(sensitivity[layer])]
        for layer in range(LAYERS)
    }
    return BitRouter(tuple(widths), curves, TEXT.usage)


def chosen(precision):
    return np.stack([precision.many(layer, TEXT.experts[layer], TEXT.weights[layer]) for layer in range(LAYERS)])


curves = st.lists(st.floats(0, 1), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(2, 8), min_size=5, max_size=5, unique=True).map(sorted),
    curves,
    st.floats(1e-6, 10),
    st.floats(1e-4, 1),
)
def test_the_choice_costs_as_little_as_the_best_of_all(widths, sensitivity, price, weight):
    one = BitRouter(tuple(widths), {0: [sensitivity]}, {0: [quantiles(np.ones(1))]})
    count = 1 + int((one.thresholds(price)[0] <= weight).sum())
    assert 1 <= count <= len(sensitivity), "an expert has only so many slices"
    costs = [weight**2 * d + price * b for d, b in zip(sensitivity, widths, strict=False)]
    assert costs[count - 1] <= min(costs) * (1 + 1e-9)


@pytest.mark.parametrize("widths", [(2, 3, 4), (2, 4, 6), (3, 8)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_one_price_gives_the_text_its_mean_width(widths, share):
    mean = widths[0] + share * (widths[-1] - widths[0])
    counts = chosen(RoutedPrecision(mean, router(widths)))
    assert np.array(widths)[counts - 1].mean() == pytest.approx(mean, abs=0.02)


def test_more_of_the_same_bits_go_where_they_help_more_than_anywhere_else():
    """No exchange of a bit between two uses, at the same mean width, lowers the sum of errors."""
    counts = chosen(RoutedPrecision(3.0, routed := router()))
    sensitivity = np.array([routed.sensitivity[layer] for layer in range(LAYERS)])
    cost = TEXT.weights[..., None].astype(np.float64) ** 2 * sensitivity[np.arange(LAYERS)[:, None, None], TEXT.experts]
    now = np.take_along_axis(cost, counts[..., None] - 1, -1)[..., 0]
    up = np.where(counts < 3, now - np.take_along_axis(cost, np.minimum(counts, 2)[..., None], -1)[..., 0], -np.inf)
    down = np.where(
        counts > 1, np.take_along_axis(cost, np.maximum(counts - 2, 0)[..., None], -1)[..., 0] - now, np.inf
    )
    assert up.max() <= down.min() * (1 + 1e-6)


def test_a_chunk_gets_the_widths_of_its_tokens_one_by_one():
    precision = RoutedPrecision(2.7, router())
    for layer, t in itertools.product(range(LAYERS), range(0, TOKENS, 97)):
        experts, weights = TEXT.experts[layer, t], TEXT.weights[layer, t]
        one = precision.one(layer, experts.tolist(), weights.tolist())
        assert one == precision.many(layer, experts[None], weights[None])[0].tolist()
    # And at the thresholds themselves, to the last digit of a float32.
    edges = np.unique(np.concatenate([np.float32(t).ravel() for t in precision._table.values()]))
    around = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(1))])
    experts = np.zeros((len(around), 1), dtype=np.int64)
    many = precision.many(0, experts, around[:, None])[:, 0].tolist()
    assert many == [precision.one(0, [0], [w])[0] for w in around.tolist()]


def test_slices_that_the_text_never_asked_for_have_a_place():
    """The calibration text had weights of a half alone; another text may have more, so every slice gets a slot."""
    usage = {0: [[1.0, *[0.5] * 17]]}
    precision = RoutedPrecision(3, BitRouter((2, 3, 4), {0: [[0.1, 0.03, 0.01]]}, usage))
    assert precision.one(0, [0], [1.0]) == [3]
    shares = precision.shares((2, 3, 4))
    assert len(shares) == 3
    assert min(slots_for(500, (50, 50, 50), (20, 20, 20), shares)) >= 1


def test_shares_are_those_of_the_text():
    precision = RoutedPrecision(2.8, router())
    counts = chosen(precision)
    assert precision.slices((2, 3, 4)) == 3
    assert precision.shares((2, 3, 4)) == pytest.approx([(counts > i).mean() for i in range(3)], abs=0.01)
    assert RoutedPrecision(2.0, router()).slices((2, 3, 4)) == 1
    assert FixedPrecision(3).shares((2, 3, 4)) == [1.0, 1.0]


def test_experts_that_keep_fewer_slices_are_never_asked_for_more():
    kept = [1, 2, 3, 1, 2, 3, 1, 2]
    precision = RoutedPrecision(2.3, router(kept=kept))
    counts = chosen(precision)
    assert all(counts[TEXT.experts == e].max() == n for e, n in enumerate(kept))
    assert (counts + 1).mean() == pytest.approx(2.3, abs=0.02)
    with pytest.raises(ValueError, match="can have 2 to 2"):
        RoutedPrecision(3.5, router(kept=kept))


def test_what_is_asked_for_is_read():
    names = {text: str(parse_precision(text, (2, 3, 4), router())) for text in ("routed", "routed:2.50", "routed:3")}
    assert names == {"routed": "routed:3", "routed:2.50": "routed:2.5", "routed:3": "routed:3"}
    assert str(parse_precision("routed", (2, 3, 4, 6), router((2, 3, 4, 6)))) == "routed:3.75"


@pytest.mark.parametrize(
    ("text", "routed", "reason"),
    [
        (
            "routed",
            None,
            "which this store does not say; convert the checkpoint again, without --fast, or use fixed",
        ),
        ("routed:4.1", router(), "precision routed:4.1 asks for a mean width .* it can have 2 to 4$"),
        ("routed:1.9", router(), "it can have 2 to 4$"),
        ("routed:x", router(), "not known"),
        ("routed:-3", router(), "not known"),
    ],
)
def test_what_cannot_be_is_refused(text, routed, reason):
    with pytest.raises(ValueError, match=reason):
        parse_precision(text, (2, 3, 4), routed)
