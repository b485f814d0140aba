"""Pictures: they are written for few tasks and many, and for none, and their labels do not collide."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_min.evaluation import plots
from kalm_min.evaluation.plots import _apart, _without_pauses, draw
from kalm_min.evaluation.report import Row

PNG = b"\x89PNG"


def rows(count, dims=(896, 64)):
    types = ["STS", "Retrieval", "Clustering", "Odd"]
    return [
        Row("task", f"t{i}", types[i % 4], "m", {dim: 40.0 + i + dim / 99 for dim in dims})
        for i in range(count)
    ]


def span(start, end, task="STS12", device="cpu", outcome="done"):
    more = {"type": "STS", "host": "here", "outcome": outcome}
    return {"task": task, "device": device, "start": start, "end": end} | more


def write(path, spans):
    path.write_text("".join(json.dumps(span) + "\n" for span in spans))
    return path


@pytest.fixture
def _matplotlib():
    pytest.importorskip("matplotlib")


@pytest.mark.usefixtures("_matplotlib")
@pytest.mark.parametrize("count", [1, 60])
def test_what_there_is_is_drawn(tmp_path, count):
    spans = [
        span(i, i + 0.9, f"t{i}", f"cpu#{i % 2}", "again" if i % 5 else "done")
        for i in range(count)
    ]
    written = draw(tmp_path, rows(count), write(tmp_path / "timeline.jsonl", spans))
    assert written == ["types.png", "dimensions.png", "timeline.png"]
    for name in written:
        assert (tmp_path / name).read_bytes().startswith(PNG)


@pytest.mark.usefixtures("_matplotlib")
def test_what_there_is_not_is_left_out(tmp_path):
    """No curve of one dimension, no timeline of no run; a torn line is not drawn."""
    torn = write(tmp_path / "timeline.jsonl", [span(0, 1)])
    torn.write_text('{"task"' + torn.read_text())
    assert draw(tmp_path, rows(3, dims=(896,)), torn) == ["types.png"]
    torn.write_text(torn.read_text() + json.dumps(span(0, 1)))
    assert draw(tmp_path, [], torn) == ["timeline.png"]
    assert draw(tmp_path, [], tmp_path / "absent") == []
    undone = [Row("task", "t", "STS", "m", {896: None})]
    assert draw(tmp_path, undone, tmp_path / "absent") == []


def test_without_matplotlib_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert draw(tmp_path, rows(3), tmp_path / "absent") == []
    assert list(tmp_path.iterdir()) == []


@given(st.dictionaries(st.text(), st.floats(0, 100), max_size=8))
def test_labels_keep_their_distance_and_order(places):
    moved = _apart(places, 4.0)
    order = sorted(places, key=lambda name: places[name])
    assert list(moved) == order
    steps = [moved[b] - moved[a] for a, b in pairwise(order)]
    assert all(step > 3.5 for step in steps)


def test_times_when_nothing_ran_are_cut_out():
    """A run continued a day later stands beside the first, not a day away."""
    spans = [span(1000, 1010), span(1005, 1030, device="b"), span(90_000, 90_020), span(1040, 1050)]
    clock, pauses = _without_pauses(spans)
    assert [clock(1000), clock(1050), clock(90_000), clock(90_020)] == [0, 50, 50, 70]
    assert pauses == [50]
