"""Jobs in order, and workers that die, hang and lie: no other result is lost, failures are named."""

import heapq
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_min.console import Progress
from kalm_min.evaluation.plan import (
    EvaluationConfig,
    Instruction,
    Plan,
    PlannedTask,
    find_tasks,
)
from kalm_min.evaluation.report import markdown, score_rows
from kalm_min.evaluation.runner import WORKER, Runner, make_jobs, next_job, worker_environment
from kalm_min.files import read_jsonl

FAKE = (sys.executable, "-S", str(Path(__file__).with_name("fake_worker.py")))


@pytest.fixture
def plan(tmp_path):
    """plan("ok-1", "crash-2", ...): tasks called after what the fake worker does with them."""

    def make(*names, **changes):
        tasks = tuple(
            PlannedTask(name, "STS", "cosine_spearman", "1", 1000, Instruction()) for name in names
        )
        (tmp_path / "run").mkdir(exist_ok=True)
        settings = {"dtype": "auto", "causal": None, "pooling": None, "max_length": None}
        options = {
            "model": "a/model",
            "checkpoint": "c" * 64,
            "dims": ("32", "8"),
            "settings": settings,
            "tasks": tasks,
            "results": tmp_path / "run",
        }
        return Plan(**options | changes)

    return make


def runner(plan, tmp_path, devices=("cpu", "cpu"), timeout=30.0, stream=None):
    return Runner(
        plan,
        devices=devices,
        environment={"PATH": os.environ["PATH"]},
        logs=tmp_path / "logs",
        timeout=timeout,
        stream=stream or io.StringIO(),
        command=FAKE,
    )


def are_gone(pids):
    """Whether the processes end within seconds (a grandchild's end is not waited for)."""
    end = time.monotonic() + 5
    while any(is_alive(int(pid)) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]


def test_all_go_well(plan, tmp_path):
    stream = io.StringIO()
    every = plan(*(f"ok-{i}" for i in range(6)))
    assert runner(every, tmp_path, stream=stream).run() == {}
    assert all(every.result(task) for task in every.tasks)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6
    assert re.fullmatch(r"\[6/6\] ok-\d  cosine_spearman 50.00  0s  cpu#[01]", lines[-1])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("crash", r"died (signal SIGSEGV), 3 times"),
        ("exit", "died (exit code 3), 3 times"),
        ("garbage", "wrote b'Downloading: 45%' where a message belongs, 3 times"),
        ("half", "where a message belongs"),
        ("imposter", "reported on somebody else's, which it was not given"),
        ("memory", "ran out of memory, 3 times"),
        ("error", "ValueError: no"),
        ("liar", "said it was done and left no valid result file"),
        ("torn", "said it was done and left no valid result file"),
    ],
)
def test_a_broken_task_stops_no_other(plan, tmp_path, name, reason):
    """Promise: a failing task is reported with its reason and log; the others have their results."""
    every = plan("ok-1", f"{name}-2", "ok-3", "ok-4")
    failures = runner(every, tmp_path).run()
    assert list(failures) == [f"{name}-2"]
    assert reason in failures[f"{name}-2"].reason
    tries = 3 if "3 times" in failures[f"{name}-2"].reason else 1
    assert failures[f"{name}-2"].log.splitlines()[0].endswith(f"attempt {tries - 1}") or tries == 1
    assert [bool(every.result(task)) for task in every.tasks] == [True, False, True, True]
    text = markdown(every, score_rows(every), failures)
    assert f"**{name}-2 failed**: " in text
    assert "| mean of 3 tasks (1 task missing) |" in text


def test_a_crash_is_tried_again_with_less(plan, tmp_path):
    """The second attempt says so to the worker (half the batch) and may succeed."""
    stream = io.StringIO()
    every = plan("once-1", "ok-2")
    assert runner(every, tmp_path, stream=stream).run() == {}
    assert every.result(every.tasks[0])
    assert re.search(r"once-1: worker cpu#\d died \(signal SIGSEGV\); trying", stream.getvalue())


def test_a_hanging_worker_is_killed_with_its_children(plan, tmp_path):
    """Promise: a worker without progress for the timeout ends, with all processes it started."""
    every = plan("hang-1", "ok-2", "slow-3")
    failures = runner(every, tmp_path, timeout=0.5).run()
    assert list(failures) == ["hang-1"]
    assert "made no progress for " in failures["hang-1"].reason
    pids = (tmp_path / "run" / "hang-1.json.pids").read_text().split()
    assert len(pids) == 6
    assert are_gone(pids)


def test_ctrl_c_ends_the_children_and_keeps_results(plan, tmp_path):
    """Promise: an interrupted run leaves no process, and the same command finishes the rest."""
    # A shell that starts the tests in the background has them ignore the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    every = plan("ok-1", "hang-2")
    marker = tmp_path / "run" / "hang-2.json.pids"

    def interrupt():
        while not (marker.exists() and every.result(every.tasks[0])):
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        runner(every, tmp_path).run()
    thread.join()
    assert are_gone(marker.read_text().split())
    again = runner(every, tmp_path)
    assert [task.name for task in again.tasks] == ["hang-2"]


def test_what_is_done_is_not_done_again(plan, tmp_path):
    """A second run starts no worker; a torn file is written again."""
    every = plan("ok-1", "ok-2")
    runner(every, tmp_path).run()
    before = [every.result_path(task).stat().st_mtime_ns for task in every.tasks]
    second = runner(every, tmp_path)
    assert second.slots == []
    assert second.run() == {}
    assert [every.result_path(task).stat().st_mtime_ns for task in every.tasks] == before
    every.result_path(every.tasks[1]).write_text('{"kalm_min"')
    (tmp_path / "run" / ".ok-2.json.abc.tmp").write_text("of a worker that was killed")
    assert runner(every, tmp_path).run() == {}
    assert every.result(every.tasks[1])
    assert not list((tmp_path / "run").glob(".*.tmp"))


@pytest.mark.parametrize(
    ("devices", "failed"),
    [
        (("cuda:7", "cpu"), []),
        (("cuda:7",), ["ok-1", "ok-2"]),
        (("cuda:8", "cuda:7"), ["ok-1", "ok-2"]),
    ],
)
def test_a_device_that_does_not_come_up(plan, tmp_path, devices, failed):
    """The others do its work; with none left every task is failed, and nothing waits for ever."""
    failures = runner(plan("ok-1", "ok-2"), tmp_path, devices=devices).run()
    assert list(failures) == failed
    for failure in failures.values():
        assert failure.reason.startswith("no worker could start: ")


@pytest.fixture
def wide(plan):
    """wide("cut-1", ...): a plan whose first task has a corpus large enough for slices."""

    def make(*names):
        every = plan(*names)
        size = {"characters": 10**9, "corpus_characters": 10**9, "documents": 10**6}
        first = replace(every.tasks[0], type="Retrieval", **size)
        return replace(every, tasks=(first, *every.tasks[1:]))

    return make


def test_a_large_corpus_is_encoded_by_all_before_it_is_scored(wide, tmp_path):
    """Promise: slices first, then the task that finds them."""
    every, stream = wide("cut-1", "ok-2", "ok-3"), io.StringIO()
    assert runner(every, tmp_path, stream=stream).run() == {}
    result = json.loads(every.result_path(every.tasks[0]).read_text())
    # The score is the number of slices: all before the task itself.
    assert result["kalm_min"]["dims"]["32"]["main_score"] == 20
    assert len(stream.getvalue().splitlines()) == 3  # slices print no lines


def test_vectors_are_deleted_when_their_task_is_done(wide, tmp_path):
    """Promise: a finished task leaves nothing, a failed one what its next attempt can use."""
    every = wide("cut-1", "error-2")
    run = runner(every, tmp_path)
    (run.scratch / "error-2").mkdir(parents=True)
    assert list(run.run()) == ["error-2"]
    assert [entry.name for entry in run.scratch.iterdir()] == ["error-2"]
    finished = replace(every, tasks=every.tasks[:1])
    again = runner(finished, tmp_path)
    assert again.run() == {}
    assert not again.scratch.exists()


def test_another_machines_tasks_are_left_to_it(plan, tmp_path):
    every = replace(plan("ok-1", "ok-2"), elsewhere=frozenset({"ok-2"}))
    assert runner(every, tmp_path).run() == {}
    assert [bool(every.result(task)) for task in every.tasks] == [True, False]


def test_workers_share_the_cores(plan, tmp_path):
    """Bug to avoid: eight workers with a thread for every core each."""
    every = runner(plan("ok-1", "ok-2", "ok-3"), tmp_path, devices=("cpu",) * 2)
    cores = len(os.sched_getaffinity(0))
    assert every.environment["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert len(runner(plan("ok-1"), tmp_path, devices=("cpu",) * 9).slots) == 1


def test_progress_is_shown(plan, tmp_path):
    """Without a terminal, lines show the share of characters done and every worker's job."""
    stream = io.StringIO()
    run = runner(plan("ok-1", "ok-2"), tmp_path, devices=("cpu",), stream=stream)
    (slot,) = run.slots
    slot.job, slot.started = next_job(run.jobs, []), time.monotonic()
    slot.texts, slot.characters = 5, 500
    run.progress = Progress(run.total, "characters", stream, interval=0)
    run._show()
    line = "500/2000 characters | 0/2 tasks | cpu ok-1 5 texts 0s | 0s elapsed, 0s left\n"
    assert stream.getvalue() == line


def test_the_timeline_lists_every_attempt(plan, tmp_path):
    """Every attempt with its device and times, failures included, in the order of their ends."""
    runner(plan("once-1", "error-2"), tmp_path, devices=("cpu",)).run()
    spans = [span for _, span in read_jsonl(tmp_path / "logs" / "timeline.jsonl")]
    listed = [(span["task"], span["type"], span["device"], span["outcome"]) for span in spans]
    assert listed == [
        ("once-1", "STS", "cpu", "again"),
        ("once-1", "STS", "cpu", "done"),
        ("error-2", "STS", "cpu", "failed"),
    ]
    assert time.time() - 60 < spans[0]["start"] <= spans[0]["end"] <= spans[1]["start"] + 0.01


@pytest.fixture
def real_worker(tmp_path, tiny_model_dir):
    """A real worker process that has read its settings and opened its model."""
    settings = {"model": str(tiny_model_dir), "device": "cpu", "dtype": "float32", "dims": [32]}
    settings |= {"causal": None, "pooling": None, "max_length": None}
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": os.environ["PATH"]}
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(WORKER, env=environment | {"OMP_NUM_THREADS": "1"}, **options) as process:
        process.stdin.write(json.dumps(settings) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["event"] == "ready"
        yield process
        process.kill()


def test_an_orphan_ends(real_worker):
    """Bug to avoid: a killed parent leaves workers that hold the GPU."""
    real_worker.stdin.close()
    assert real_worker.wait(timeout=20) == 0


def test_noise_on_stdout_goes_to_the_log(tmp_path):
    """Promise: what a library prints cannot be taken for a message."""
    code = (
        "import os; from kalm_min.evaluation.worker import Pipe;"
        "pipe = Pipe().stream; print('noise', flush=True); os.write(1, b'more'); pipe.write('message')"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "message"
    assert "noise" in done.stderr
    assert "more" in done.stderr


def test_a_worker_takes_the_threads_it_is_given():
    """OMP_NUM_THREADS of the user's shell applies to workers; otherwise they share the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert worker_environment({"OMP_NUM_THREADS": "3"}, 1)["OMP_NUM_THREADS"] == "3"
    assert worker_environment({}, 1)["OMP_NUM_THREADS"] == str(cores)
    assert worker_environment({}, 10 * cores)["RAYON_NUM_THREADS"] == "1"


def simulate(tasks, devices):
    """Run the jobs by a clock, a character per second: (makespan, jobs in the order they ended)."""
    jobs, clock, free = make_jobs(tasks, devices), 0.0, list(range(devices))
    busy, ended = [], []
    while jobs or busy:
        while free and (job := next_job(jobs, [job for *_, job in busy])):
            heapq.heappush(busy, (clock + job.characters, free.pop(), job))
        clock, device, job = heapq.heappop(busy)
        free.append(device)
        ended.append(job)
    return clock, ended


def sized(name, characters, share=0.0, documents=0):
    sizes = {"corpus_characters": round(share * characters), "documents": documents}
    return PlannedTask(name, "Retrieval", "ndcg", "1", characters, Instruction(), **sizes)


@st.composite
def some_tasks(draw):
    share, documents = st.sampled_from([0.0, 0.5, 0.99]), st.integers(0, 10**7)
    return [
        sized(f"t{number}", draw(st.integers(0, 10**6)), draw(share), draw(documents))
        for number in range(draw(st.integers(1, 12)))
    ]


@given(tasks=some_tasks(), devices=st.integers(1, 9))
def test_every_task_is_run_once_after_its_slices(tasks, devices):
    _, ended = simulate(tasks, devices)
    names = [job.task.name for job in ended if job.part is None]
    assert sorted(names) == sorted(task.name for task in tasks)
    for name in names:
        jobs = [job for job in ended if job.task.name == name]
        assert jobs[-1].part is None
        slices = sorted(job.part for job in jobs[:-1])
        assert slices == [(number, len(slices)) for number in range(len(slices))]


def test_the_largest_task_does_not_decide():
    """Promise: one corpus larger than all the rest is spread over the devices."""
    tasks = [sized("wide", 1000, 0.99, 10**7), *(sized(f"t{i}", 10) for i in range(40))]
    assert simulate(tasks, 4)[0] < 1.1 * 1400 / 4
    assert simulate([sized("wide", 1000), *tasks[1:]], 4)[0] == 1000


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("devices", [4, 8])
def test_mteb_in_english_takes_its_share(mteb, devices):
    """Promise: within 5 % of the work divided by the devices, slices of MSMARCO and its like included."""
    tasks = find_tasks(EvaluationConfig(model=("none",), benchmark=("MTEB(eng, v1)",)))
    needed = sum(task.characters for task in tasks)
    assert simulate(tasks, devices)[0] < 1.05 * needed / devices
