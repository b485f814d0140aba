"""The check of every line on all cores: the same account, and the same complaints in order."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kalm_min.data import JsonlFile, TrainingData, checking
from kalm_min.data.checking import account, check_all, rows_of_groups, rows_of_tasks


@pytest.fixture
def many_ranges(monkeypatch):
    """Ranges of three lines, so that a small file has many."""
    monkeypatch.setattr(checking, "_RANGE", 3)


@pytest.fixture
def children(monkeypatch, many_ranges):
    """Two child processes, for any number of lines."""
    monkeypatch.setattr(checking, "_ALONE", 1)
    monkeypatch.setattr(checking, "_cores", lambda: 2)


def write(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def line(task=None, group=None, pos=("p",)) -> dict:
    record = {"query": "q", "pos": list(pos), "task": task, "group": group}
    return {key: value for key, value in record.items() if value is not None}


def checked(path: Path) -> JsonlFile:
    file = JsonlFile(path)
    check_all(path, [file], None)
    return file


lines = st.builds(line, st.sampled_from([None, "x", "y"]), st.sampled_from([None, 1, "1", "b"]))


@given(st.lists(lines, min_size=1, max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_account_is_that_of_the_lines(tmp_path_factory, many_ranges, records):
    """Tasks, rows, groups: whatever the order of lines and wherever a range ends."""
    file = checked(write(tmp_path_factory.mktemp("data") / "x.jsonl", records))
    tasks = list(dict.fromkeys(record.get("task") for record in records))
    rows = {task: [i for i, r in enumerate(records) if r.get("task") == task] for task in tasks}
    found = account(file)
    assert [(one.task, one.rows) for one in found] == [(task, len(rows[task])) for task in tasks]
    for one in found:
        without = [i for i in rows[one.task] if "group" not in records[i]]
        assert one.lacking.get("group") == ([len(without), without[0]] if without else None)
        assert one.lacking["scores"] == [one.rows, rows[one.task][0]]
        assert "pos" not in one.lacking
    if len(tasks) > 1:
        assert rows_of_tasks(file).tolist() == [i for task in tasks for i in rows[task]]
    if any("group" in record for record in records):
        order, table = rows_of_groups(file)
        groups = {(task, sorted_rows(order, start, end)) for task, _, start, end in table.tolist()}
        expected = {}
        for i, record in enumerate(records):
            if "group" in record:
                key = tasks.index(record.get("task")), str(record["group"])
                expected.setdefault(key, []).append(i)
        assert groups == {(task, tuple(members)) for (task, _), members in expected.items()}


def sorted_rows(order: np.ndarray, start: int, end: int) -> tuple:
    members = order[start:end].tolist()
    assert members == sorted(members)
    return tuple(members)


def test_children_find_what_one_process_finds(tmp_path, children, monkeypatch):
    """Every cached file is equal, byte for byte."""
    records = [line("xy"[i // 7 % 2], i % 3 or None) for i in range(40)]
    records[11] = line("x", 1, pos=())
    contents = []
    for cores in (2, 1):
        monkeypatch.setattr(checking, "_cores", lambda cores=cores: cores)
        path = write(tmp_path / str(cores) / "x.jsonl", records)
        os.utime(path, ns=(5, 5))
        checked(path)
        cache = sorted((path.parent / ".kalm_min").iterdir())
        contents.append([(entry.name, entry.read_bytes()) for entry in cache])
    assert contents[0] == contents[1]
    assert len(contents[0]) == 5


def test_malformed_lines_keep_the_order_of_the_files(tmp_path, children):
    """The first 20 over all files and ranges, whichever process was done first; and all counted."""
    good = line()
    one = write(tmp_path / "a.jsonl", [good, *[{}] * 15])
    two = write(tmp_path / "b.jsonl", [good] * 9)
    three = write(tmp_path / "c.jsonl", [good, *["\ud83d"] * 15])
    for _ in range(2):
        with pytest.raises(ValueError, match="30 malformed lines, the first 20:") as error:
            TrainingData.open(tmp_path)
        listed = [text.split(": ")[0] for text in str(error.value).split("\n  ")[1:]]
        expected = [f"{one}:{n}" for n in range(2, 17)] + [f"{three}:{n}" for n in range(2, 7)]
        assert listed == expected
    assert account(JsonlFile(two))
    assert account(JsonlFile(three)) is None


def test_progress_is_shown_where_it_is_asked_for(tmp_path, children, capfd):
    """Lines on the given stream, to the last one; nothing anywhere else, nothing the second time."""
    path = write(tmp_path / "x.jsonl", [line()] * 10)
    stream = io.StringIO()
    TrainingData.open(path, progress=stream)
    assert stream.getvalue().startswith("check 10/10 lines")
    shown = stream.tell()
    TrainingData.open(path, progress=stream)
    write(path, [line()] * 11)
    TrainingData.open(path)
    assert stream.tell() == shown
    assert capfd.readouterr() == ("", "")


def test_a_child_that_dies_is_told(tmp_path, children, monkeypatch):
    """A killed child ends the check with a sentence; nothing is cached, no process is left."""
    monkeypatch.setattr(checking, "_CHILD", "import sys; sys.exit(3)")
    file = JsonlFile(write(tmp_path / "x.jsonl", [line()] * 10))
    with pytest.raises(RuntimeError, match=r"x\.jsonl: the process .* ended with code 3"):
        check_all(tmp_path, [file], None)
    assert account(file) is None
