"""Tables and pictures: scores, means that name their tasks, published scores, folders compared."""

import csv
import io
import json
import re
from dataclasses import replace
from math import nan

import pytest

from kalm_min.evaluation import report
from kalm_min.evaluation.plan import Instruction
from kalm_min.evaluation.report import (
    PUBLISHED,
    Row,
    comma_separated,
    compare,
    draw,
    draw_types,
    markdown,
    plan_table,
    published_scores,
    read_plans,
    score_rows,
)
from kalm_min.evaluation.runner import Failure


def comparison(folders, dims=()):
    """The text of `compare`, as evaluate.py --compare calls it."""
    return compare([(one, plan) for one in folders for plan in read_plans(one, dims)])[0]


def table_of(text):
    return [[c.strip() for c in line.strip("|").split(" | ")] for line in text if line[:1] == "|"]


def test_tables(finished):
    """Markdown lines up and is complete without scores; CSV holds the same rows."""
    plan = finished("r", {"ok-2": {}, "ok|1": {}}, dims=("32", "8"))
    assert "to do" in plan_table(plan)
    rows = score_rows(plan)
    assert [row.kind for row in rows] == ["task", "task"]
    lines = markdown(plan, rows, {}).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    assert "ok\\|1" in table[3]
    assert comma_separated(plan, rows).splitlines() == [
        "kind,name,type,score,32,8,seconds",
        "task,ok-2,STS,cosine_spearman,,,",
        "task,ok|1,STS,cosine_spearman,,,",
    ]


def test_what_was_published_stands_beside(finished):
    """Promise: each release's score and the difference in both formats; means over equal tasks."""
    scores = {"STS12": {32: 0.8, 8: 0.7}, "SciFact": {32: 0.75, 8: 0.5}, "own": {32: 0.9, 8: 0.9}}
    plan = finished("r", scores, {"SciFact": "Retrieval"})
    rows = score_rows(plan)
    text = markdown(plan, rows, {})
    below = text[text.index("## Beside") :].splitlines()
    table = table_of(below)
    assert table[0] == [
        *("task", "type", "v1.5", "v2", "v2.5", "ours (32)"),
        *("ours (32) - v1.5", "ours (32) - v2", "ours (32) - v2.5"),
    ]
    assert table[2][:6] == ["SciFact", "Retrieval", "72.89", "71.98", "74.38", "75.00"]
    assert table[2][6:] == ["+2.11", "+3.02", "+0.62"]
    assert table[3][0] == "STS12"
    assert [row[0] for row in table[4:]] == ["mean of 2 tasks"]
    assert table[4][2:6] == ["76.53", "77.12", "78.14", "77.50"]
    assert "embeddings-benchmark/results" in text
    found = list(csv.DictReader(io.StringIO(comma_separated(plan, rows))))
    (scifact,) = [row for row in found if row["name"] == "SciFact"]
    assert (scifact["v2"], scifact["ours - v2"]) == ("71.98", "3.02")
    (own,) = [row for row in found if row["name"] == "own"]
    assert (own["v2"], own["ours - v2"]) == ("", "")


def test_another_part_of_a_task_is_another_task(finished):
    """Bug to avoid: comparing STS17 over all languages, or a local STS17, with STS17 (en-en)."""
    plan = finished("r", {"STS17": {32: 0.8}})
    assert published_scores(plan.tasks[0])["v2"] == 86.16
    for changes in ({"subsets": ("en-en", "ko-ko")}, {"subsets": ()}, {"splits": ("dev",)}):
        fields = {name: getattr(plan.tasks[0], name) for name in plan.tasks[0].__slots__}
        assert published_scores(type(plan.tasks[0])(**fields | changes)) == {}


@pytest.mark.parametrize(
    ("benchmark", "means"),
    [
        ("MTEB(eng, v1)", {"v1.5": (64.95, 61.50), "v2": (67.47, 64.15), "v2.5": (69.33, 65.84)}),
        ("MTEB(cmn, v1)", {"v1.5": (63.74, 64.52), "v2": (68.13, 69.28), "v2.5": (70.91, 72.45)}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_published_scores_give_the_published_means(mteb, benchmark, means):
    """Every task of both benchmarks is present with its parts, and no number is mistyped."""
    tasks = mteb.get_benchmark(benchmark).tasks
    entries = {task.metadata.name: PUBLISHED["tasks"][task.metadata.name] for task in tasks}
    for version, (over_tasks, over_types) in means.items():
        types = {}
        for task in tasks:
            entry = entries[task.metadata.name]
            assert entry["subsets"] == list(task.hf_subsets)
            assert entry["splits"] == list(task.eval_splits)
            types.setdefault(task.metadata.type, []).append(entry[version])
        every = [score for group in types.values() for score in group]
        assert sum(every) / len(every) == pytest.approx(over_tasks, abs=0.006)
        over = sum(sum(group) / len(group) for group in types.values()) / len(types)
        assert over == pytest.approx(over_types, abs=0.006)


SCORES = {"a": {32: 0.5, 8: 0.4}, "b": {32: 0.7, 8: 0.6}}


def test_the_report_of_a_folder_is_that_of_the_run(finished, tmp_path):
    """Promise: the same tables, whatever the order in which tasks were run."""
    plan = finished("r", SCORES, {"b": "Retrieval"})
    (found,) = read_plans(tmp_path / "r")
    assert (found.name, found.checkpoint, found.dims) == (plan.name, plan.checkpoint, plan.dims)
    assert markdown(found, score_rows(found), {}) == markdown(plan, score_rows(plan), {})
    assert comma_separated(found, score_rows(found)) == comma_separated(plan, score_rows(plan))
    (same,) = read_plans(plan.results)
    assert same == found


def test_every_checkpoint_is_a_plan_of_its_own(finished, tmp_path):
    plan = finished("r", SCORES)
    finished("r", SCORES, results=plan.results.with_name("other"), checkpoint="d" * 64)
    assert [found.checkpoint[0] for found in read_plans(tmp_path / "r")] == ["c", "d"]


def test_dimensions_are_those_in_common(finished, tmp_path):
    """Requested dimensions, if any; a task without them is missing and not averaged as zero."""
    plan = finished("r", {"a": {32: 0.5}})
    finished("r", {"b": {32: 0.7, 8: 0.6}})
    assert read_plans(tmp_path / "r")[0].dims == ("32",)
    (found,) = read_plans(tmp_path / "r", (8,))
    assert [found.result(task) is not None for task in found.tasks] == [False, True]
    assert [row.name for row in score_rows(found)] == ["a", "b"]  # no mean of one task
    finished("r", {"c": {16: 0.7}})
    with pytest.raises(ValueError, match="no dimension in common, choose with --dims"):
        read_plans(plan.results)


def test_files_that_are_no_results_are_passed_over(finished, tmp_path):
    """Torn files, files of mteb and results of other programs are skipped."""
    plan = finished("r", SCORES)
    (plan.results / "model_meta.json").write_text("{}")
    (plan.results / "torn.json").write_text('{"kalm_min": {"key"')
    (plan.results / "list.json").write_text("[]")
    assert len(read_plans(tmp_path / "r")[0].tasks) == 2
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        with pytest.raises(ValueError, match=f"{folder}: expected a folder that evaluate.py wrote"):
            read_plans(tmp_path / folder)


@pytest.mark.parametrize(
    "change",
    [
        *({"key": one} for one in ([], "x", {}, {"splits": "test"}, {"subsets": [1]})),
        *({"dims": one} for one in ([], {"32": {}}, {"x": {"main_score": 0.5}}, {"32": 0.5})),
        *({"used": one} for one in (None, 3, [])),
        *({"seconds": one} for one in (float("nan"), float("inf"), "1", True)),
        {"type": ["STS"]},
    ],
)
def test_one_bad_result_file_stops_no_report(finished, tmp_path, change):
    """Promise: a file of the wrong shape is like one that is not there, for reports as well."""
    plan = finished("r", SCORES)
    path = plan.result_path(plan.tasks[0])
    result = json.loads(path.read_text())
    result["kalm_min"] |= change
    path.write_text(json.dumps(result))
    (found,) = read_plans(tmp_path / "r")
    assert [task.name for task in found.tasks] == ["b"]
    assert "| b " in markdown(found, score_rows(found), {})
    path.write_text("[" * 100_000)
    assert [task.name for task in read_plans(tmp_path / "r")[0].tasks] == ["b"]


def test_foreign_names_are_no_html_and_no_formulas(finished, tmp_path):
    """Bug to avoid: a results folder of another person that runs something where it is read."""
    name = '=1+1 <img src=x onerror="alert(1)"> ![a](http://b) \x1b]0;x\x07'
    plan = finished("r", {name: {32: 0.5}, "-b": {32: 0.5}}, {name: "<b>"})
    rows = score_rows(plan)
    text = markdown(plan, rows, {name: Failure("<script>", "```\n<script>")})
    assert not re.search(r"(?<!\\)<(?!script>$)", text, re.MULTILINE)
    assert "\n    <script>" in text  # in a block of code
    assert "\\![a]" in text
    cells = [row[1] for row in csv.reader(io.StringIO(comma_separated(plan, rows)))]
    assert {cell[0] for cell in cells[1:3]} == {"'"}
    for one in (text, comma_separated(plan, rows), plan_table(plan)):
        assert one.replace("\n", "").isprintable()


def test_the_plan_fits_a_terminal(finished):
    """Promise: 80 columns, also with long instructions; each with the style that it is from."""
    plan = finished("r", {"a" * 30: {32: 0.5}, "b": {}}, {"b": "PairClassification"})
    one = Instruction("Classify the sentiment " * 20 + "\n", "d: ", "prompts query", "prompt")
    plan = replace(plan, tasks=(plan.tasks[0], replace(plan.tasks[1], instruction=one)))
    shown = plan_table(plan, speed=1.0)
    assert max(map(len, shown.splitlines()[:-1])) <= 80  # the last one is the path of the results
    assert "2 tasks (1 done)" in shown
    assert "~16m40s" in shown
    assert "(v2, prompts query): b" in " ".join(shown.split())


def test_what_quantisation_costs_is_a_table(finished):
    """Every precision beside float32, at each dimension, with its bytes."""
    scores = {"32": 0.5, "8": 0.4, "32 int8": 0.49, "8 int8": 0.39, "32 binary": 0.3}
    plan = finished("r", {"a": scores | {"8 binary": 0.2}})
    text = markdown(plan, score_rows(plan), {})
    table = table_of(text[text.index("## What a smaller") :].splitlines())
    assert table[0] == ["dimensions", "float32", "binary", "int8"]
    assert table[2] == ["32", "50.00 (128 B)", "30.00 (4 B)", "49.00 (32 B)"]
    assert table[3] == ["8", "40.00 (32 B)", "20.00 (1 B)", "39.00 (8 B)"]


def test_requested_tasks_without_a_result_are_shown(finished, tmp_path):
    plan = finished("r", SCORES)
    requested = [*plan.tasks, replace(plan.tasks[0], name="c")]
    (found,) = read_plans(tmp_path / "r", requested=requested)
    rows = score_rows(found)[:3]
    assert [row.name for row in rows] == ["a", "b", "c"]
    assert [row.scores["32"] for row in rows] == pytest.approx([50, 70, nan], nan_ok=True)


A = {"x": {32: 0.5, 8: 0.4}, "y": {32: 0.7, 8: 0.6}, "only": {32: 0.9, 8: 0.1}}
B = {"x": {32: 0.6, 8: 0.5}, "y": {32: 0.6, 8: 0.5}, "else": {32: 0.2, 8: 0.1}}
TYPES = {"y": "Retrieval", "else": "Retrieval"}


def test_differences_and_means_over_what_is_common(finished, tmp_path):
    """Promise: a task that one folder lacks is shown but is in no mean."""
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
        ["mean of 2 tasks", "", "60.00", "60.00", "+0.00"],
    ]
    assert "Means are over the tasks that all models have" in text
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
    """Bug to avoid: taking a difference in data for one between models."""
    finished("a", A)
    finished("b", B, revision="2")
    text = comparison([tmp_path / "a", tmp_path / "b"])
    assert "Left out, not the same data or score: x, y." in text
    assert "mean of" not in text


def test_what_cannot_be_compared_is_said(finished, tmp_path):
    finished("a", A)
    for folders, dims, reason in (
        (("a", "gone"), (), "gone: expected a folder that evaluate.py wrote"),
        (("a",), (), "--compare: expected two folders or more"),
    ):
        with pytest.raises(ValueError, match=reason):
            comparison([tmp_path / name for name in folders], dims)


def test_models_in_one_folder_are_compared_with_one_another(finished, tmp_path):
    """Promise: every model has a column of its own, under a name that tells it apart."""
    plan = finished("c", A)
    other = plan.results.parents[1] / "other__model" / plan.results.name
    finished("c", B, results=other, checkpoint="d" * 64)
    head = table_of(comparison([tmp_path / "c"]).splitlines())[0]
    assert head[2:4] == ["a/model (32)", "other/model (32)"]
    finished("c", B, results=plan.results.with_name("third"), checkpoint="e" * 64)
    assert len(set(table_of(comparison([tmp_path / "c"]).splitlines())[0])) == 7


def picture_rows(count, dims=("896", "64")):
    types = ["STS", "Retrieval", "Clustering", "Odd"]
    return [
        Row("task", f"t{i}", types[i % 4], "m", {dim: 40.0 + i + int(dim) / 99 for dim in dims})
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [1, 60])
def test_what_there_is_is_drawn(tmp_path, count):
    """No curve for one dimension, and no plot without a complete task."""
    pytest.importorskip("matplotlib")
    assert draw(tmp_path, picture_rows(count)) == ["types.png", "dimensions.png"]
    for name in ("types.png", "dimensions.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert draw(tmp_path, picture_rows(count, dims=("896",))) == ["types.png"]
    assert draw(tmp_path, [Row("task", "t", "STS", "m", {"896": nan})]) == []
    types, columns = (
        {"a": "STS", "b": "Odd"},
        {"m": {"a": -0.5, "b": 3.0}, "n": {"a": 2.0, "b": 1.0}},
    )
    assert draw_types(tmp_path / "comparison.png", types, columns) == ["comparison.png"]
    assert draw_types(tmp_path / "x.png", types, columns | {"o": {}}) == []  # no task in common


def test_without_matplotlib_there_are_no_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert draw(tmp_path, picture_rows(3)) == []
    assert list(tmp_path.iterdir()) == []
