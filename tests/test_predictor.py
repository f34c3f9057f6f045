"""Predictors against brute force over the whole history, and against what they were drawn from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.scheduler.predictor import (
    CONTEXT,
    MEAN_RATE,
    RATES,
    GateAhead,
    LastToken,
    Mixed,
    PathWeights,
    Popularity,
    PredictorStats,
    RoutingPath,
    likely,
)
from moert.scheduler.replay import ForetoldRouting

LAYERS, E, K, V, W, H, Q = (1, 4), 6, 2, 11, 3, 5, 4


def path_weights(seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    rows = len(LAYERS) * E
    return PathWeights(
        tokens=rng.integers(-127, 128, (V, W)).astype(np.int8),
        token_scales=np.abs(draw(V)) / 50,
        context=draw((CONTEXT + 1) * W, H),
        routes=draw(rows, Q),
        summary=draw(Q, H),
        hidden_bias=draw(H),
        out=draw(rows, H),
        out_bias=draw(rows),
        recent=draw(len(LAYERS), len(RATES)),
    )


def history(steps, seed=0):
    """Tokens and, for each, the experts of each layer."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, steps).tolist()
    return tokens, [[rng.choice(E, K, replace=False) for _ in LAYERS] for _ in tokens]


def feed(predictor, tokens, routes, passes):
    """In passes of so many tokens; the last is begun, but not yet used."""
    start = 0
    for count in passes:
        predictor.begin(tokens[start : start + count])
        for row, layer in enumerate(LAYERS):
            if start + count < len(tokens):
                predictor.used(layer, np.array([r[row] for r in routes[start : start + count]]))
        start += count


def shares(routes, row, rate):
    """Compute the context of all tokens before the last, in float64."""
    result = np.zeros(E)
    for age, experts in enumerate(reversed(routes[:-1])):
        result[experts[row]] += (1 - rate) * rate**age
    return result


@pytest.mark.parametrize("passes", [[1] * 9, [4, 1, 1, 2, 1], [8, 1]])
def test_routing_path_is_what_its_description_says(passes):
    w = path_weights()
    tokens, routes = history(sum(passes))
    predictor = RoutingPath(LAYERS, w)
    feed(predictor, tokens, routes, passes)
    vectors = (w.tokens.astype(float) * w.token_scales[:, None])[tokens]
    seen = [vectors[-1 - i] if i < len(tokens) else np.zeros(W) for i in range(CONTEXT)]
    mean = sum((1 - MEAN_RATE) * MEAN_RATE**age * v for age, v in enumerate(vectors[-2::-1]))
    summary = sum(w.routes[row * E + e] for row in range(2) for e in routes[-2][row])
    hidden = np.concatenate([*seen, mean]) @ w.context + summary @ w.summary + w.hidden_bias
    scores = (w.out @ np.maximum(hidden, 0) + w.out_bias).reshape(2, E)
    for row, layer in enumerate(LAYERS):
        for r, rate in enumerate(RATES):
            scores[row] += w.recent[row, r] * shares(routes, row, rate)
        np.testing.assert_allclose(predictor.probabilities(layer), 1 / (1 + np.exp(-scores[row])), rtol=1e-4)


def test_routing_path_says_nothing_of_a_prompt():
    predictor = RoutingPath(LAYERS, path_weights())
    assert predictor.probabilities(1) is None
    predictor.begin([1, 2])
    assert predictor.probabilities(1) is None
    predictor.begin([3])
    assert predictor.probabilities(1) is not None


@pytest.mark.parametrize("passes", [[1] * 9, [4, 1, 1, 2, 1]])
def test_baselines_are_what_they_say(passes):
    tokens, routes = history(sum(passes))
    popular, last = Popularity(LAYERS, E, decay=0.9), LastToken(LAYERS, E)
    feed(popular, tokens, routes, passes)
    feed(last, tokens, routes, passes)
    for row, layer in enumerate(LAYERS):
        np.testing.assert_allclose(popular.probabilities(layer), shares(routes, row, 0.9), rtol=1e-5)
        assert set(last.probabilities(layer).nonzero()[0]) == set(routes[-2][row])


def test_the_last_token_counts_as_much_as_it_is_worth():
    rng, predictor = np.random.default_rng(0), LastToken((0,), 100)
    experts = np.arange(4)
    for _ in range(600):
        again = experts[rng.random(4) < 0.7]
        fresh = rng.choice(np.setdiff1d(np.arange(100), experts), 4 - len(again), replace=False)
        predictor.used(0, (experts := np.concatenate([again, fresh]))[None])
    assert predictor.probabilities(0)[experts].tolist() == pytest.approx([0.7] * 4, abs=0.12)


def softmax(scores):
    e = np.exp(scores - scores.max())
    return e / e.sum()


def guess(rng, layer, scores, count=2 * K):
    p = softmax(scores)
    experts = np.argsort(-p)[:count]
    return ForetoldRouting(layer, experts.tolist(), p[experts].tolist())


def test_gate_ahead_learns_how_often_such_guesses_are_right():
    """Routers see true scores, guesses noisy ones, noisier further ahead: what is said is how often that is right."""
    rng, predictor = np.random.default_rng(1), GateAhead(range(3), 16, 4)
    said, right = {1: [], 2: []}, {1: [], 2: []}
    for step in range(1500):
        predictor.begin([0])
        true = rng.normal(size=(3, 16)) * 2
        used = np.argsort(-true, axis=1)[:, :4]
        noisy = [true + rng.normal(size=true.shape) * spread for spread in (0.4, 1.5)]
        predictor.used(0, used[0][None])
        predictor.on_router_prediction(0, [guess(rng, layer, noisy[layer - 1][layer], 8) for layer in (1, 2)])
        for layer in (1, 2):
            if step > 500:
                p = predictor.probabilities(layer)
                said[layer].append(p[p > 0])
                right[layer].append(np.isin(np.flatnonzero(p), used[layer]))
            predictor.used(layer, used[layer][None])
    for layer in (1, 2):
        p, y = np.concatenate(said[layer]), np.concatenate(right[layer])
        for low in (0.0, 0.25, 0.5, 0.75):
            near = (p >= low) & (p < low + 0.25)
            assert near.sum() < 100 or abs(p[near].mean() - y[near].mean()) < 0.05
    p = [np.concatenate(said[layer]) for layer in (1, 2)]
    assert (p[0] > 0.9).mean() > (p[1] > 0.9).mean()


def test_newer_guesses_replace_older_ones_and_a_new_pass_all():
    rng, predictor = np.random.default_rng(2), GateAhead(range(4), E, K)
    assert predictor.probabilities(3) is None
    predictor.on_router_prediction(0, [guess(rng, 1, np.arange(6.0)), guess(rng, 3, np.arange(6.0))])
    assert predictor.probabilities(3).argmax() == 5
    predictor.on_router_prediction(2, [guess(rng, 3, -np.arange(6.0))])
    assert predictor.probabilities(3).argmax() == 0
    predictor.begin([0])
    assert predictor.probabilities(3) is None


class Says:
    """A source that says what it is given."""

    name = "says"

    def __init__(self):
        self.now = None

    def begin(self, tokens):
        pass

    def on_router_prediction(self, layer, guesses):
        pass

    def used(self, layer, experts):
        pass

    def probabilities(self, layer):
        return self.now


def nats(p, used):
    y = np.zeros(len(p))
    y[used] = 1
    return -np.log(np.where(y > 0, p, 1 - p)).sum()


def test_a_mixture_is_no_worse_than_its_best_source_and_follows_it():
    rng = np.random.default_rng(3)
    good, bad = Says(), Says()
    mixed, lost = Mixed([bad, good]), {"good": 0.0, "bad": 0.0, "mixed": 0.0}
    for step in range(3000):
        if step == 1500:
            lost = dict.fromkeys(lost, 0.0)  # what it cost to find out which is which is not measured
        truth = softmax(rng.normal(size=16) * 2) * 0.9
        used = np.flatnonzero(rng.random(16) < truth)
        used = used if len(used) else np.array([int(truth.argmax())])
        good.now = truth.astype(np.float32).clip(0.01, 0.99)
        bad.now = rng.permutation(truth).astype(np.float32).clip(0.01, 0.99)
        mixed.begin([0])
        for name, p in (("good", good.now), ("bad", bad.now), ("mixed", mixed.probabilities(0))):
            lost[name] += nats(p, used)
        mixed.used(0, used[None])
    assert lost["mixed"] < lost["good"] * 1.02 < lost["bad"]


def test_a_mixture_leaves_out_who_cannot_say():
    silent, speaking = Says(), Says()
    mixed = Mixed([silent, speaking])
    mixed.begin([0])
    assert mixed.probabilities(0) is None
    speaking.now = np.array([0.2, 0.7], np.float32)
    np.testing.assert_allclose(mixed.probabilities(0), [0.2, 0.7], rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_whatever_happens_probabilities_are_probabilities(data):
    sources = [
        RoutingPath(LAYERS, path_weights()),
        GateAhead(LAYERS, E, K),
        Popularity(LAYERS, E),
        LastToken(LAYERS, E),
    ]
    predictor = Mixed(sources)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    for _ in range(data.draw(st.integers(1, 12))):
        count = data.draw(st.sampled_from([1, 1, 1, 70]))
        predictor.begin(rng.integers(0, V, count).tolist())
        if data.draw(st.booleans()):
            scores = rng.normal(size=E) * data.draw(st.sampled_from([0.0, 1.0, 200.0]))
            predictor.on_router_prediction(-1, [guess(rng, layer, scores) for layer in LAYERS])
        for layer in LAYERS:
            for source in [predictor, *sources]:
                p = source.probabilities(layer)
                assert p is None or (p.shape == (E,) and ((p >= 0) & (p <= 1)).all())
            if data.draw(st.integers(0, 9)):  # now and then a pass breaks off
                predictor.used(layer, np.stack([rng.choice(E, K, replace=False) for _ in range(count)]))


def test_likely_ones_come_first():
    p = np.array([0.1, 0.6, 0.3, 0.6, 0.9], np.float32)
    assert likely(p, 0.3) == [4, 1, 3, 2]
    assert likely(p, 0.95) == []


def test_worth_counts():
    stats = PredictorStats()
    assert stats.recall is None
    stats.count([1, 2, 3], [3, 4])
    stats.count([5], [5, 6])
    assert stats.recall == 2 / 4
