"""Twelve tasks on three workers, with one task broken in every way: what remains and is reported.

The workers are real (model, pipe, files); only the evaluation itself is a stand-in.
"""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kalm_min.evaluation.plan import Instruction, Plan, PlannedTask
from kalm_min.evaluation.report import markdown, score_rows
from kalm_min.evaluation.runner import Runner

pytestmark = pytest.mark.slow
FAULTY = (sys.executable, str(Path(__file__).with_name("faulty_worker.py")))
NAMES = ["broken", *(f"task{'x' * number}" for number in range(11))]


def make_plan(model, folder):
    """The twelve tasks."""
    tasks = [
        PlannedTask(name, "STS", "cosine_spearman", "1", 1000, Instruction()) for name in NAMES
    ]
    settings = {"dtype": "float32", "causal": None, "pooling": None, "max_length": None}
    return Plan(str(model), "c" * 64, ("32", "8"), settings, tuple(tasks), Path(folder) / "run")


def run(model, folder, fault="", devices=3, timeout=10.0):
    """What evaluate.py does with a plan: (plan, failures)."""
    plan = make_plan(model, folder)
    environment = dict(os.environ) | {"FAULT": fault}
    devices = ("cpu",) * devices
    logs, stream = Path(folder) / "logs", io.StringIO()
    options = {"environment": environment, "logs": logs, "timeout": timeout, "stream": stream}
    return plan, Runner(plan, devices=devices, command=FAULTY, **options).run()


def scores(plan):
    """The main score of every task that has a valid result."""
    results = {task.name: plan.result(task) for task in plan.tasks}
    return {
        name: result["kalm_min"]["dims"]["32"]["main_score"]
        for name, result in results.items()
        if result
    }


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("exception", "ValueError: no such column"),
        ("SIGKILL", "died (signal SIGKILL), 3 times"),
        ("SIGSEGV", "died (signal SIGSEGV), 3 times"),
        ("out of memory", "ran out of memory, 3 times"),
        ("hang", "made no progress for 10s, 3 times"),
        ("garbage on the pipe", "wrote b'Downloading: 45%' where a message belongs, 3 times"),
        ("torn result file", "said it was done and left no valid result file"),
        ("full disk", "OSError: [Errno 27] File too large"),
        ("killed between write and rename", "died (signal SIGKILL), 3 times"),
    ],
)
def test_a_fault_costs_its_own_task(tiny_model_dir, tmp_path, fault, reason):
    """Promise: other results are complete and right, the table names the task, a rerun succeeds."""
    plan, failures = run(tiny_model_dir, tmp_path, fault)
    assert list(failures) == ["broken"]
    assert reason in failures["broken"].reason
    right = {name: len(name) / 100 for name in NAMES}
    assert scores(plan) == {name: score for name, score in right.items() if name != "broken"}
    text = markdown(plan, score_rows(plan), failures)
    assert "**broken failed**: " in text
    assert "(1 task missing)" in text
    plan, failures = run(tiny_model_dir, tmp_path, devices=1)
    assert failures == {}
    assert scores(plan) == right
    assert not list(plan.results.glob(".*.tmp"))


def test_a_killed_parent_leaves_nothing_behind(tiny_model_dir, tmp_path):
    """Promise: its workers end by themselves, its results stay, and the same command does the rest."""
    here = Path(__file__).parent
    code = f"import sys; sys.path.insert(0, {str(here)!r}); import test_faults as t; t.run(*sys.argv[1:], timeout=600)"
    command = [sys.executable, "-c", code, str(tiny_model_dir), str(tmp_path), "hang"]
    parent = subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.DEVNULL)
    plan, end = make_plan(tiny_model_dir, tmp_path), time.monotonic() + 120
    while len(scores(plan)) < 11 and time.monotonic() < end:
        time.sleep(0.1)
    workers = children(parent.pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert len(workers) == 3
    assert set(scores(plan)) == set(NAMES[1:])
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    plan, failures = run(tiny_model_dir, tmp_path, devices=1)
    assert failures == {}
    assert len(scores(plan)) == 12


def children(pid):
    """The processes that a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
