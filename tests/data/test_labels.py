"""Label-based tasks: positives from the same group, negatives from others, drawn on reading."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kalm_min.data import TrainingData, collate
from kalm_min.files import text_hash

PLAN = {"epoch": 0, "seed": 0, "num_negatives": 3}


def write(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def label_based(folder: Path, files: dict[str, list], task="t") -> TrainingData:
    for name, records in files.items():
        write(folder / name, records)
    (folder / f"{task}.toml").write_text("label_based = true\n")
    return TrainingData(folder)


def row(number: int, group, **more) -> dict:
    return {"query": f"{number}:{group}", "group": group, **more}


def group_of(text: str) -> str:
    return text.partition(":")[2]


@st.composite
def folders(draw):
    """Rows of a task "t" with two groups or more, each of two rows or more, over several files."""
    sizes = draw(st.lists(st.integers(2, 6), min_size=2, max_size=4))
    groups = draw(st.permutations([g for g, size in enumerate(sizes) for _ in range(size)]))
    files = {}
    for number, group in enumerate(groups):
        name = draw(st.sampled_from(["t.jsonl", "mixed.jsonl"]))
        task = "t" if name == "mixed.jsonl" else draw(st.sampled_from([None, "t"]))
        more = {} if task is None else {"task": task}
        files.setdefault(name, []).append(row(number, group, **more))
    if "mixed.jsonl" in files:
        files["mixed.jsonl"].insert(0, {"query": "q", "pos": ["p"], "group": 0})
    return files


@given(folders(), st.integers(0, 9), st.integers(0, 9), st.integers(0, 30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_drawn(tmp_path_factory, files, epoch, seed, count):
    """Another text of the group, `count` distinct texts of others with their groups; of this task."""
    data = label_based(tmp_path_factory.mktemp("data"), files)
    task = data.task_names.index("t")
    first = sum(data.task_sizes[:task])
    texts = [data.record(i)["query"] for i in range(first, first + data.task_sizes[task])]
    for i in range(first, first + len(texts)):
        example = data.example(i, epoch=epoch, seed=seed, num_negatives=count)
        (positive,) = example.positives
        assert positive in texts
        assert positive != example.query
        assert group_of(positive) == group_of(example.query) == str(example.group)
        others = [text for text in texts if group_of(text) != str(example.group)]
        assert set(example.negatives) <= set(others)
        assert len(set(example.negatives)) == len(example.negatives) == min(count, len(others))
        assert [int(group_of(text)) for text in example.negatives] == list(example.negative_groups)


def test_every_text_gets_its_turn(tmp_path):
    """Uniform over the other texts of the group, and over the texts of all other groups."""
    data = label_based(tmp_path, {"t.jsonl": [row(i, "aabab"[i % 5]) for i in range(10)]})
    positives, negatives = Counter(), Counter()
    for epoch in range(2000):
        example = data.example(2, epoch=epoch, seed=0, num_negatives=2)
        positives.update(example.positives)
        negatives.update(example.negatives)
    assert group_of(data[2].query) == "b"
    assert len(positives) == 3
    assert len(negatives) == 6
    assert all(abs(n - 2000 / 3) < 5 * (2000 * 2 / 9) ** 0.5 for n in [*positives.values(), *negatives.values()])  # fmt: skip


def test_the_draw_is_a_function_of_seed_epoch_and_example(tmp_path):
    """It does not depend on earlier reads; another seed or epoch draws anew."""
    files = {"t.jsonl": [row(i, i % 4) for i in range(200)]}
    data, again = label_based(tmp_path, files), TrainingData(tmp_path)
    wanted = [data.example(i, **PLAN) for i in range(200)]
    assert [again.example(i, **PLAN) for i in reversed(range(200))] == wanted[::-1]
    for change in ({"epoch": 1}, {"seed": 1}):
        other = [data.example(i, **{**PLAN, **change}) for i in range(200)]
        assert sum(a.positives == b.positives for a, b in zip(wanted, other, strict=True)) < 40
        assert sum(a.negatives == b.negatives for a, b in zip(wanted, other, strict=True)) < 10
    assert data[5] == data.example(5, epoch=0, seed=0, num_negatives=7)


def test_the_texts_of_a_line_are_not_trained_on(tmp_path):
    """The report trains on examples, not on the name of the class that "pos" often is."""
    extra = {"pos": ["name of the class"], "neg": ["another"], "pos_scores": [1], "neg_scores": [0]}
    data = label_based(tmp_path, {"t.jsonl": [row(i, i % 2, **extra) for i in range(8)]})
    for example in data:
        assert not {"name of the class", "another"} & {*example.positives, *example.negatives}
        assert (example.positive_scores, example.negative_scores) == (None, None)


def test_duplicates_of_the_query(tmp_path):
    """A copy of the query teaches nothing: it is the positive only if there is no other text."""
    records = [{"query": "same", "group": "a"}] * 3 + [{"query": "other", "group": "a"}]
    data = label_based(tmp_path, {"t.jsonl": [*records, *[{"query": "b", "group": "b"}] * 2]})
    drawn = [data.example(0, **{**PLAN, "epoch": epoch}).positives[0] for epoch in range(50)]
    assert drawn.count("other") >= 45  # 8 tries miss it with probability (2/3)^8
    assert data[4].positives == ("b",)


def test_groups_of_negatives_reach_the_batch(tmp_path):
    """A negative of one query must not count against another query of its class."""
    data = label_based(tmp_path, {"t.jsonl": [row(i, "ab"[i % 2]) for i in range(6)]})
    batch = collate([data[0], data[1]], num_negatives=2, template="{instruction}", epoch=0, seed=0)
    hashes = [text_hash(json.dumps([0, group_of(text)])) for text in batch.documents]
    assert batch.document_groups.tolist() == hashes
    assert batch.query_groups.tolist() == [text_hash('[0, "a"]'), text_hash('[0, "b"]')]


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        (
            [row(0, "a"), row(1, "b"), {"query": "q", "pos": ["p"]}],
            "3: expected 'group' in every line of a label-based task, found none in 1 line of",
        ),
        (
            [{"query": "q", "pos": ["p"]}] * 2,
            "1: expected 'group' in every line of a label-based task, found none in 2 lines of",
        ),
        (
            [row(0, "a"), row(1, "a")],
            " expected texts of at least two groups in {task}, found one group",
        ),
        (
            [row(0, "a"), row(1, "b"), row(2, "a")],
            "2: expected every group of {task} to have two rows or more, found 1 group of a single",
        ),
        (
            [row(0, "a"), row(1, "b"), row(2, "c"), row(3, "c")],
            ": expected every group of {task} to have two rows or more, found 2 groups of a single",
        ),
    ],
)
def test_a_task_that_cannot_be_label_based(tmp_path, records, problem):
    """Reported in one sentence on opening."""
    with pytest.raises(ValueError, match="expected") as error:
        label_based(tmp_path, {"t.jsonl": records})
    assert problem.format(task="the label-based task 't'") in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 't.jsonl'}:")
    assert "\n" not in str(error.value)


def test_lines_without_positives_need_a_label_based_task(tmp_path):
    """A row of text and group is not a pair; the error names the setting that makes it one."""
    path = write(tmp_path / "t.jsonl", [row(0, "a", pos=["p"]), row(1, "a"), row(2, "b", pos=[])])
    for _ in range(2):
        with pytest.raises(ValueError, match="expected 'pos'") as error:
            TrainingData(path)
        assert str(error.value) == (
            f"{path}:2: expected 'pos' to be a list of at least one non-empty string, or "
            "label_based = true in t.toml to draw positives from the line's group, found none in "
            "2 lines of this file"
        )
