"""Two results folders side by side."""

import pytest

from kalm_min.evaluation.compare import comparison
from tests.evaluation.test_report import table_of

A = {"x": {32: 0.5, 8: 0.4}, "y": {32: 0.7, 8: 0.6}, "only": {32: 0.9, 8: 0.1}}
B = {"x": {32: 0.6, 8: 0.5}, "y": {32: 0.6, 8: 0.5}, "else": {32: 0.2, 8: 0.1}}
TYPES = {"y": "Retrieval", "else": "Retrieval"}


def test_differences_and_means_over_what_is_common(finished, tmp_path):
    """Promise: a task that one of them lacks is shown and in no mean."""
    finished("a", A, TYPES)
    finished("b", B, TYPES)
    text = comparison([tmp_path / "a", tmp_path / "b"])
    head, _, *table = table_of(text.splitlines())
    assert head == ["task", "type", "a (32)", "b (32)", "b (32) - a (32)"]
    assert table == [
        ["else", "Retrieval", "—", "20.00", "—"],
        ["y", "Retrieval", "70.00", "60.00", "-10.00"],
        ["only", "STS", "90.00", "—", "—"],
        ["x", "STS", "50.00", "60.00", "+10.00"],
        ["mean of 1 Retrieval", "", "70.00", "60.00", "-10.00"],
        ["mean of 1 STS", "", "50.00", "60.00", "+10.00"],
        ["mean of 2 tasks", "", "60.00", "60.00", "+0.00"],
        ["mean of 2 types", "", "60.00", "60.00", "+0.00"],
    ]
    assert "Means are over the tasks that all of them have" in text
    assert "- a (32): a/model. Checkpoint cccccccccccc; dtype auto" in text


def test_three_folders_at_one_dimension(finished, tmp_path):
    folders = [tmp_path / name / "same" for name in "abc"]
    for folder in folders:
        finished(folder.relative_to(tmp_path), A)
    text = comparison(folders, (8,))
    head = table_of(text.splitlines())[0]
    assert head[2:] == [
        *(f"{folder} (8)" for folder in folders),
        *(f"{folder} (8) - {folders[0]} (8)" for folder in folders[1:]),
    ]
    assert "| 40.00 | 40.00 | 40.00 | +0.00 | +0.00 |" in " ".join(text.split())


def test_other_data_under_the_same_name_is_left_out(finished, tmp_path):
    """Bug to avoid: a difference of data read as one of models."""
    finished("a", A)
    finished("b", B, revision="2")
    text = comparison([tmp_path / "a", tmp_path / "b"])
    assert "Left out, not the same data or score: x, y." in text
    assert "mean of" not in text


def test_what_cannot_be_compared_is_said(finished, tmp_path):
    finished("a", A)
    for folders, dims, reason in (
        (("a", "gone"), (), "gone: expected a folder that evaluate.py wrote"),
        (("a", "a"), (32, 8), "expected one of --dims, found 2"),
    ):
        with pytest.raises(ValueError, match=reason):
            comparison([tmp_path / name for name in folders], dims)
    plan = finished("c", A)
    finished("c", B, results=plan.results.with_name("other"), checkpoint="d" * 64)
    with pytest.raises(ValueError, match="expected one checkpoint with one set of settings, found"):
        comparison([tmp_path / "a", tmp_path / "c"])
