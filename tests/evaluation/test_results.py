"""A results folder read back: the plan it came from, without model, datasets or mteb."""

from dataclasses import replace

import pytest

from kalm_min.evaluation.report import comma_separated, markdown, score_rows
from kalm_min.evaluation.results import asked_for, read_plans

SCORES = {"a": {32: 0.5, 8: 0.4}, "b": {32: 0.7, 8: 0.6}}


def test_the_report_of_a_folder_is_that_of_the_run(finished, tmp_path):
    """Promise: the same tables, whatever the order in which tasks were run."""
    plan = finished("r", SCORES, {"b": "Retrieval"})
    (found,) = read_plans(tmp_path / "r")
    assert (found.model, found.checkpoint, found.dims) == (plan.model, plan.checkpoint, plan.dims)
    assert markdown(found, score_rows(found), {}) == markdown(plan, score_rows(plan), {})
    assert comma_separated(found, score_rows(found)) == comma_separated(plan, score_rows(plan))
    (same,) = read_plans(plan.results)
    assert same == found


def test_every_checkpoint_is_a_plan_of_its_own(finished, tmp_path):
    plan = finished("r", SCORES)
    finished("r", SCORES, results=plan.results.with_name("other"), checkpoint="d" * 64)
    assert [found.checkpoint[0] for found in read_plans(tmp_path / "r")] == ["c", "d"]


def test_dimensions_are_those_in_common(finished, tmp_path):
    """Those asked for, where some are; a task without them is missing and not averaged as nothing."""
    plan = finished("r", {"a": {32: 0.5}})
    finished("r", {"b": {32: 0.7, 8: 0.6}})
    assert read_plans(tmp_path / "r")[0].dims == (32,)
    (found,) = read_plans(tmp_path / "r", (8,))
    assert [found.result(task) is not None for task in found.tasks] == [False, True]
    assert [row.name for row in score_rows(found)][2:] == [
        *("mean of 1 STS (1 task missing)",),
        *("mean of 1 tasks (1 task missing)", "mean of 1 types (1 task missing)"),
    ]
    finished("r", {"c": {16: 0.7}})
    with pytest.raises(ValueError, match="no dimension in common, choose with --dims"):
        read_plans(plan.results)


def test_files_that_are_no_results_are_passed_over(finished, tmp_path):
    """Torn files, mteb's own notes and results of other programs."""
    plan = finished("r", SCORES)
    (plan.results / "model_meta.json").write_text("{}")
    (plan.results / "torn.json").write_text('{"kalm_min": {"key"')
    (plan.results / "list.json").write_text("[]")
    assert len(read_plans(tmp_path / "r")[0].tasks) == 2
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        with pytest.raises(ValueError, match=f"{folder}: expected a folder that evaluate.py wrote"):
            read_plans(tmp_path / folder)


def test_what_was_asked_for_and_is_not_there_is_shown(finished, tmp_path):
    plan = finished("r", SCORES)
    (found,) = read_plans(tmp_path / "r")
    more = asked_for(found, [*plan.tasks, replace(plan.tasks[0], name="c")], {}, {})
    assert [(row.name, row.scores[32]) for row in score_rows(more)][:3] == [
        *(("a", 50.0), ("b", 70.0), ("c", None))
    ]
