"""Routing traces: what is written is read back, and what is wrong is named with its line."""

import gzip
import itertools

import numpy as np
import pytest

from moert.scheduler.trace import DECODE, PREFILL, Routing, Trace, TraceStep, draw_trace, read_trace

from .traces import write_trace

HEAD = """# route_trace v1
# model=/data/a model.gguf arch=x n_layer=2 n_expert=8 n_expert_used=2
# layer=0 expert_bytes=1000 dense_bytes=70
# layer=1 expert_bytes=2000
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
"""
ROWS = """0,0,0,0,0,5,0.75,0,1000
0,0,0,0,1,2,0.25,1,0
0,1,3,0,0,2,0.5,1,0
0,1,3,0,1,1,0.5,0,1000
0,1,3,1,0,7,1,0,2000
"""


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_a_recorded_trace_is_read(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress((HEAD + ROWS).encode()) if name.endswith(".gz") else (HEAD + ROWS).encode())
    assert read_trace(path) == Trace(
        "a model.gguf",
        2,
        8,
        2,
        (1000, 2000),
        (70, 0),
        (
            TraceStep(PREFILL, {0: Routing((5, 2), (0.75, 0.25))}),
            TraceStep(DECODE, {0: Routing((2, 1), (0.5, 0.5)), 1: Routing((7,), (1.0,))}),
        ),
    )


def test_rows_may_come_layer_by_layer(tmp_path):
    by_layer = sorted(ROWS.splitlines(True), key=lambda row: int(row.split(",")[3]))
    (tmp_path / "a.csv").write_text(HEAD + ROWS)
    (tmp_path / "b.csv").write_text(HEAD + "".join(by_layer))
    assert read_trace(tmp_path / "a.csv") == read_trace(tmp_path / "b.csv")


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_what_is_written_is_read_back(tmp_path, name):
    steps = (
        TraceStep(PREFILL, {0: Routing((5, 2), (0.75, 0.25)), 1: Routing((3, 0), (0.5, 0.5))}, 17, 0),
        TraceStep(DECODE, {1: Routing((1, 0), (0.875, 0.125))}, 0, 1),
    )
    trace = Trace("m", 2, 8, 2, (4096, 8192), (5, 6), steps)
    write_trace(tmp_path / name, trace)
    assert read_trace(tmp_path / name) == trace


def test_drawn_traces_are_alike_for_one_seed_and_differ_for_two():
    assert draw_trace(seed=1) == draw_trace(seed=1) != draw_trace(seed=2)


def test_drawn_popularity_is_skewed_and_consecutive_tokens_overlap():
    def shared(trace):
        sets = [set(step.layers[0].experts) for step in trace.steps]
        return np.mean([len(a & b) for a, b in itertools.pairwise(sets)]) / trace.top_k

    flat, skewed = (draw_trace(layers=1, tokens=400, skew=skew, overlap=0) for skew in (0, 1.5))
    top = [max(np.bincount([e for s in t.steps for e in s.layers[0].experts])) for t in (flat, skewed)]
    assert top[1] > 2 * top[0]
    assert shared(flat) < 0.25 < 0.6 < shared(draw_trace(layers=1, tokens=400, skew=0, overlap=0.7))
    for step in skewed.steps:
        experts, weights = step.layers[0]
        assert len(set(experts)) == 2
        assert sum(weights) == pytest.approx(1)
        assert weights[0] >= weights[1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "line 0: it should be '# route_trace v1'"),
        ("# route_trace v2\n", "line 1: it should be"),
        (HEAD, "line 5: no token is recorded"),
        (HEAD.replace("n_expert=8", "n_expert=x"), "line 5: n_expert should be a whole number, not 'x'"),
        (HEAD.replace(" n_expert=8", ""), "line 5: no n_expert"),
        (HEAD.replace("n_expert_used=2", "n_expert_used=9"), "make no model"),
        (HEAD.replace("expert_bytes=2000", ""), "line 4: no expert_bytes"),
        (HEAD.replace("# layer=1 expert_bytes=2000\n", ""), "each of the 2 layers needs one line"),
        (HEAD.replace("weight,", ""), "line 5: no column 'weight'"),
        (HEAD + "0,1,0,0,0\n", "line 6: no expert"),
        (HEAD + "0,1,0,0,0,8,0.5,0,0\n", "line 6: expert 8 of layer 0, but there are 8 of 2"),
        (HEAD + "0,1,0,2,0,0,0.5,0,0\n", "line 6: expert 0 of layer 2"),
        (HEAD + "0,2,0,0,0,0,0.5,0,0\n", "line 6: phase 2"),
        (HEAD + "0,1,0,0,1,0,0.5,0,0\n", "line 6: expert 0 as slot 1 of layer 0, after 0 others"),
        (HEAD + "0,1,0,0,0,0,nan,0,0\n", "line 6: weight nan"),
        (HEAD + "0,1,0,0,0,0,x,0,0\n", "line 6: could not convert"),
        (HEAD + ROWS + "0,1,3,0,0,0,1,0,0\n", "line 11: expert 0 as slot 0 of layer 0, after 2 others"),
        (HEAD + ROWS + "0,1,0,1,0,0,1,0,0\n", "line 11: step 0 has another phase"),
        (HEAD.replace("=1000", "=0") + ROWS, "line 6: layer 0 has no bytes of experts"),
    ],
)
def test_a_malformed_trace_is_refused_with_its_line(tmp_path, text, reason):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a routing trace") as error:
        read_trace(path)
    assert reason in str(error.value)
    assert str(path) in str(error.value)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "t.csv.gz"
    path.write_text(HEAD)
    with pytest.raises(ValueError, match="is damaged"):
        read_trace(path)
    path.write_bytes(gzip.compress((HEAD + ROWS).encode())[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        read_trace(path)
    plain = tmp_path / "t.csv"
    plain.write_bytes(b"# route_trace v1\n\xff\n")
    with pytest.raises(ValueError, match="not text"):
        read_trace(plain)
