"""Tables: what is in them, what is beside them, and no mean that says more than it is."""

import csv
import io

import pytest

from kalm_min.evaluation.report import (
    _published,
    comma_separated,
    markdown,
    plan_table,
    published_scores,
    score_rows,
)


def table_of(text):
    return [[c.strip() for c in line.strip("|").split(" | ")] for line in text if line[:1] == "|"]


def test_tables(finished):
    """Markdown lines up and is complete without scores; CSV holds the same rows."""
    plan = finished("r", {"ok-2": {}, "ok|1": {}}, dims=(32, 8))
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
    """Promise: each release's score and the difference, in Markdown and CSV; means over the same tasks."""
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
    assert [row[0] for row in table[4:]] == [
        *("mean of 1 Retrieval", "mean of 1 STS", "mean of 2 tasks", "mean of 2 types")
    ]
    assert table[6][2:6] == ["76.53", "77.12", "78.14", "77.50"]
    assert "embeddings-benchmark/results" in text
    found = list(csv.DictReader(io.StringIO(comma_separated(plan, rows))))
    (scifact,) = [row for row in found if row["name"] == "SciFact"]
    assert (scifact["v2"], scifact["ours - v2"]) == ("71.98", "3.02")
    (own,) = [row for row in found if row["name"] == "own"]
    assert (own["v2"], own["ours - v2"]) == ("", "")


def test_another_part_of_a_task_is_another_task(finished):
    """Bug to avoid: STS17 over all its languages, or one's own folder of the name, beside STS17 (en-en)."""
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
    """Every task of both benchmarks is there, with its own parts, and no number was mistyped."""
    tasks = mteb.get_benchmark(benchmark).tasks
    entries = {task.metadata.name: _published()["tasks"][task.metadata.name] for task in tasks}
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
