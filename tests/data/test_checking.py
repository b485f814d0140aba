"""The check of every line on all cores: the same summary, and the same errors in the same order."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kalm_min.data import JsonlFile, TrainingData, checking
from kalm_min.data.checking import check_all, load_checked
from kalm_min.files import text_hash


@pytest.fixture
def many_ranges(monkeypatch):
    """Ranges of three lines, so that a small file has many."""
    monkeypatch.setattr(checking, "_RANGE", 3)


@pytest.fixture
def children(monkeypatch, many_ranges):
    """Two child processes, for any number of lines."""
    monkeypatch.setattr(checking, "_SMALL", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


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
def test_the_summary_is_that_of_the_lines(tmp_path_factory, many_ranges, records):
    """Tasks, rows and groups, for any order of lines and any end of a range."""
    file = checked(write(tmp_path_factory.mktemp("data") / "x.jsonl", records))
    tasks = list(dict.fromkeys(record.get("task") for record in records))
    expected = []
    for task in tasks:
        rows = [i for i, record in enumerate(records) if record.get("task") == task]
        without = [i for i in rows if "group" not in records[i]]
        counts = {"rows": [len(rows), rows[0]], "scores": [len(rows), rows[0]]}
        if without:
            counts["group"] = [len(without), without[0]]
        expected.append((task, counts))
    found = load_checked(file)
    assert [(one.task, one.counts) for one in found] == expected
    order = sorted(range(len(records)), key=lambda i: tasks.index(records[i].get("task")))
    assert [row for one in found for row in one.rows] == order
    groups = [json.dumps(record["group"]) if "group" in record else "" for record in records]
    hashes = [text_hash(group) if group else 0 for group in groups]
    assert found[0].groups.tolist() == (hashes if any(hashes) else [])


def test_children_find_what_one_process_finds(tmp_path, children, monkeypatch):
    """Every cached file is equal, byte for byte."""
    records = [line("xy"[i // 7 % 2], i % 3 or None) for i in range(40)]
    records[11] = line("x", 1, pos=())
    contents = []
    for cores in (2, 1):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        path = write(tmp_path / str(cores) / "x.jsonl", records)
        os.utime(path, ns=(5, 5))
        checked(path)
        cache = sorted((path.parent / ".kalm_min").iterdir())
        contents.append([(entry.suffix, entry.read_bytes()) for entry in cache])
    assert contents[0] == contents[1]
    assert len(contents[0]) == 2


def test_malformed_lines_keep_the_order_of_the_files(tmp_path, children):
    """The first 20 over all files and ranges, whichever process was done first; and all counted."""
    good = line()
    one = write(tmp_path / "a.jsonl", [good, *[{}] * 15])
    two = write(tmp_path / "b.jsonl", [good] * 9)
    three = write(tmp_path / "c.jsonl", [good, *["\ud83d"] * 15])
    for _ in range(2):
        with pytest.raises(ValueError, match="30 malformed lines, the first 20:") as error:
            TrainingData(tmp_path)
        listed = [text.split(": ")[0] for text in str(error.value).split("\n  ")[1:]]
        expected = [f"{one}:{n}" for n in range(2, 17)] + [f"{three}:{n}" for n in range(2, 7)]
        assert listed == expected
    assert load_checked(JsonlFile(two))
    assert load_checked(JsonlFile(three)) is None


def test_progress_is_shown_where_it_is_requested(tmp_path, children, capfd):
    """Lines on the given stream, to the last one; nothing anywhere else, nothing the second time."""
    path = write(tmp_path / "x.jsonl", [line()] * 10)
    stream = io.StringIO()
    TrainingData(path, progress=stream)
    assert stream.getvalue().startswith("check 10/10 lines")
    shown = stream.tell()
    TrainingData(path, progress=stream)
    write(path, [line()] * 11)
    TrainingData(path)
    assert stream.tell() == shown
    assert capfd.readouterr() == ("", "")


def test_a_child_that_is_killed(tmp_path, children, monkeypatch):
    """It ends the check with a sentence; nothing is cached, no process is left."""
    monkeypatch.setattr(checking, "_end_with_parent", os.abort)
    file = JsonlFile(write(tmp_path / "x.jsonl", [line()] * 10))
    with pytest.raises(ValueError, match=r"x\.jsonl: a process that checked lines .* was killed"):
        check_all(tmp_path, [file], None)
    assert load_checked(file) is None
    assert multiprocessing.active_children() == []


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
print("main module runs", flush=True)
import torch
from pathlib import Path
from kalm_min.data import TrainingData, checking
checking._SMALL, checking._RANGE = 1, int(sys.argv[2])
TrainingData(sys.argv[1])
print("checked", flush=True)
"""


@pytest.fixture
def script(tmp_path):
    """A user's program without a guard that opens data which is new and large."""
    (tmp_path / "main.py").write_text(SCRIPT)
    write(tmp_path / "x.jsonl", [line()] * 100_000)
    return [sys.executable, str(tmp_path / "main.py"), str(tmp_path / "x.jsonl")]


def test_children_do_not_run_the_main_module(script):
    """A script without a guard is not run again, so torch is not imported in the children either."""
    done = subprocess.run([*script, "20000"], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("main module runs\nchecked\n", "")


def processes_of(path: Path) -> list[int]:
    """Child processes of multiprocessing that were started from this folder's script."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = ((entry / name).read_bytes() for name in ("cmdline", "environ"))
            if b"multiprocessing" in command and f"KALM_TEST={path}".encode() in environment:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_an_interrupted_check_leaves_nothing(script, tmp_path, number):
    """No process survives, and no summary is stored; after Ctrl-C only the parent complains."""
    environment = {**os.environ, "KALM_TEST": str(tmp_path)}
    program = subprocess.Popen(
        [*script, "20"], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: len(processes_of(tmp_path)) >= 3)  # with multiprocessing's own tracker
    time.sleep(0.5)  # the children have begun
    if number == signal.SIGINT:
        os.killpg(program.pid, number)  # as a terminal does
    else:
        program.send_signal(number)
    _, errors = program.communicate(timeout=60)
    assert program.returncode != 0
    wait_until(lambda: not processes_of(tmp_path))
    assert not list(tmp_path.rglob("*.checked"))
    if number == signal.SIGINT:
        assert errors.count("KeyboardInterrupt\n") == 1


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
