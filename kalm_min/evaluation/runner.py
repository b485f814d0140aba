"""Run a plan: one worker process per device, whatever happens to them.

The parent owns the schedule and hands out one job at a time: a task, or a slice of its corpus. A
worker that dies, hangs, runs out of memory or writes something that is no message is killed with all
its children and replaced, and its job is tried again with half the batch; after three tries it is
reported as failed, with the tail of its log, and the others go on (a task whose slice failed encodes
it itself). A finished task is a file that no longer needs anybody: whoever stops, the same command
continues.

Not here: models, devices and scores (`worker`), what to run (`plan`).
"""

import json
import os
import platform
import selectors
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from kalm_min.console import format_duration
from kalm_min.evaluation.child import Child
from kalm_min.evaluation.plan import Plan
from kalm_min.evaluation.schedule import BLOCK, Job, Schedule, Work
from kalm_min.evaluation.watch import Activity, Display

WORKER = (sys.executable, "-m", "kalm_min.evaluation.worker")
_TRIES = 3
_STARTS = 2  # times a device may fail to come up before it is given up
_SILENCE = 300.0  # seconds without a heartbeat: library calls that let no thread run are shorter
_PATIENCE = 3.0  # times its estimate that a task may take without any progress


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a task has no result, and the last lines of its worker's log."""

    reason: str
    log: str


@dataclass(slots=True)
class _Slot:
    """A device, the worker on it, and the job that one is at."""

    name: str
    device: str
    log: Path
    child: Child | None = None
    is_ready: bool = False
    failed_starts: int = 0
    job: Job | None = None
    attempt: int = 0
    begun: float = 0.0
    moved: float = 0.0
    """When there was progress last (time.monotonic)."""
    texts: int = 0

    def activity(self, left: float | None) -> Activity:
        """What is shown of it."""
        if self.job is None:
            return Activity(self.name, "(idle)" if self.is_ready else "(starting)")
        age = time.monotonic() - self.begun
        return Activity(self.name, _title(self.job), self.texts, age, left)


class Runner:
    """Runs the tasks of a plan that have no valid result; `run` returns what failed."""

    def __init__(
        self,
        plan: Plan,
        *,
        devices: Sequence[str],
        environment: Mapping[str, str],
        logs: Path,
        timeout: float,
        stream: TextIO,
        store: Path | None = None,
        command: Sequence[str] = WORKER,
    ) -> None:
        """Prepare a run.

        Args:
            plan: what to run.
            devices: one worker each; no more are started than there are tasks.
            environment: of the workers; their share of the cores is added.
            logs: folder for one log file per worker, and timeline.jsonl: who was at what, when.
            timeout: seconds without progress after which a worker is replaced; a task whose estimate
                says so may take longer.
            stream: where progress is shown; a table drawn in place if it is a terminal.
            store: folder in which vectors are kept; without one those of cut corpora stand beside the
                logs until their tasks are done.
            command: what starts a worker.
        """
        self.plan, self.timeout, self.command = plan, timeout, tuple(command)
        todo = [
            task
            for task in plan.tasks
            if task.name not in plan.elsewhere and plan.result(task) is None
        ]
        self.tasks = {task.name: task for task in todo}
        works = [
            Work(t.name, t.characters, t.corpus_characters, t.documents // BLOCK) for t in todo
        ]
        self.schedule = Schedule(works, len(devices))
        self.attempts: dict[Job, int] = {}
        self.store, self.scratch = store, logs.parent / ".vectors"
        self.speed = _Speed()
        many = len(set(devices)) < len(devices)
        self.slots = [
            _Slot(f"{device}#{i}" if many else device, device, logs / f"worker{i}.log")
            for i, device in enumerate(devices[: self.schedule.jobs])
        ]
        self.environment = _environment(environment, len(self.slots))
        self.failures: dict[str, Failure] = {}
        self.start_failure = Failure("no worker could start", "")
        self.selector = selectors.DefaultSelector()
        self.display = Display(stream, todo)
        self.timeline = logs / "timeline.jsonl"

    def run(self) -> dict[str, Failure]:
        """Run everything and return the failures by task name. However it ends, no child is left."""
        try:
            while not self.schedule.is_empty() or any(slot.job for slot in self.slots):
                for slot in self.slots:
                    self._employ(slot)
                if not any(slot.child for slot in self.slots):
                    break
                for key, _ in self.selector.select(timeout=min(0.5, self.timeout)):
                    self._listen(key.data)
                for slot in self.slots:
                    self._check_life(slot)
                self._show()
        finally:
            self.display.clear()
            for slot in self.slots:
                if slot.child:
                    slot.child.kill()
            self.selector.close()
        for job in self.schedule.left():
            self.failures[job.task] = self.start_failure
        return self.failures

    def _show(self) -> None:
        """Redraw what goes on, and estimate how long it will go on."""
        pace = self.speed.pace(self._progress(slot) for slot in self.slots if slot.job)
        left = {slot.name: 0.0 for slot in self.slots if slot.child}
        for slot in self.slots:
            if slot.job:
                age, done, whole = self._progress(slot)
                left[slot.name] = age * (whole / done - 1) if done else whole * (pace or 0)
        waiting = self.schedule.seconds_left() * (pace or 0)
        total = max([*left.values(), (sum(left.values()) + waiting) / max(1, len(left))])
        self.display.status(
            [slot.activity(left[slot.name] if pace else None) for slot in self.slots if slot.child],
            total if pace else None,
        )

    def _progress(self, slot: _Slot) -> tuple[float, float, float]:
        """Seconds spent on a slot's job, and of the job's estimated seconds, those done and all."""
        assert slot.job is not None
        task, part = self.tasks[slot.job.task], slot.job.part
        texts = task.documents / part[1] if part else task.texts
        done = min(0.95, slot.texts / texts) if texts else 0.0
        return time.monotonic() - slot.begun, done * slot.job.seconds, slot.job.seconds

    def _employ(self, slot: _Slot) -> None:
        """Give a free device a worker, and a free worker a job, while there is one."""
        if self.schedule.is_empty() or slot.job:
            return
        if slot.child is None and slot.failed_starts < _STARTS:
            slot.child, slot.moved = self._start(slot), time.monotonic()
            self.selector.register(slot.child, selectors.EVENT_READ, slot)
        elif slot.child and slot.is_ready and (job := self.schedule.next()):
            self._hand_out(slot, slot.child, job)

    def _start(self, slot: _Slot) -> Child:
        child = Child.start(self.command, self.environment, slot.log)
        names = ("dtype", "causal", "pooling", "max_length")
        settings = {name: self.plan.settings[name] for name in names}
        settings |= {"model": self.plan.model, "dims": list(self.plan.dims)}
        child.send(settings | {"device": slot.device})
        return child

    def _hand_out(self, slot: _Slot, child: Child, job: Job) -> None:
        task = self.tasks[job.task]
        slot.job, slot.attempt, slot.texts = job, self.attempts.get(job, 0), 0
        slot.begun = slot.moved = child.heard = time.monotonic()
        child.mark_log()
        path = self.plan.result_path(task)
        for scrap in path.parent.glob(f".{path.name}.*.tmp"):  # of a worker killed while writing
            scrap.unlink(missing_ok=True)
        store = self.store
        if store is None and task.name in self.schedule.stored:
            store = self.scratch / self.schedule.stored[task.name]
        order = {
            "name": task.name,
            "type": task.type,
            "folder": str(task.folder) if task.folder else None,
            "mirror": str(task.mirror) if task.mirror else None,
            "key": self.plan.key(task),
            "attempt": slot.attempt,
            "slice": job.part,
            "store": str(store.absolute()) if store else None,
            "result": str(path.absolute()),
        }
        child.send(order)

    def _listen(self, slot: _Slot) -> None:
        assert slot.child is not None
        messages, end = slot.child.read()
        for message in messages:
            match message["event"]:
                case "ready":
                    slot.is_ready = True
                case "alive":
                    pass  # `heard` is all it says
                case "progress":
                    slot.texts, slot.moved = message["texts"], time.monotonic()
                case "unusable":
                    slot.failed_starts = _STARTS  # The next try would end the same way.
                    end = message["error"]
                case "done" | "failed" if not slot.job or message["task"] != slot.job.task:
                    end = f"speaks of {message['task']}, which it was not given"
                case "done" if slot.job:
                    self._finish(slot, slot.job)
                case "failed" if slot.job and message["memory"]:
                    end = "ran out of memory"
                case "failed" if slot.job:
                    self._fail(slot, slot.job, message["error"])
        if end:
            self._replace(slot, end)

    def _check_life(self, slot: _Slot) -> None:
        """Replace a worker without a heartbeat, or without progress for longer than its job may take."""
        if slot.child is None or (slot.job is None and slot.is_ready):
            return
        now = time.monotonic()
        allowed = _PATIENCE * self.speed.expect(slot.job) if slot.job else _SILENCE
        limit = max(self.timeout, allowed)
        if now - slot.moved > limit:
            self._replace(slot, f"made no progress for {format_duration(limit)}")
        elif now - slot.child.heard > max(_SILENCE, self.timeout):
            self._replace(
                slot, f"gave no sign of life for {format_duration(now - slot.child.heard)}"
            )

    def _finish(self, slot: _Slot, job: Job) -> None:
        """Believe the file, not the message."""
        seconds = time.monotonic() - slot.begun
        if job.part is None:
            result = self.plan.result(self.tasks[job.task])
            if result is None:
                self._fail(slot, job, "said it was done and left no valid result file")
                return
            score = result["kalm_min"]["dims"][str(self.plan.dims[0])]["main_score"]
            self.display.done(self.tasks[job.task], f"{100 * score:.2f}", seconds, slot.name)
        self.speed.add(job, seconds)
        self._release(slot, "done")
        self.schedule.done(job)
        if job.part is None:
            self._tidy(job)

    def _tidy(self, job: Job) -> None:
        """Delete vectors that no task needs any more."""
        folder = self.schedule.stored.pop(job.task, None)
        if folder and folder not in self.schedule.stored.values():
            shutil.rmtree(self.scratch / folder, ignore_errors=True)
            with suppress(OSError):
                self.scratch.rmdir()

    def _fail(self, slot: _Slot, job: Job, reason: str) -> None:
        """Report a task as failed; a slice is left to its task."""
        log = slot.child.tail() if slot.child else ""
        if job.part is None:
            self.failures[job.task] = Failure(reason, log)
            seconds = time.monotonic() - slot.begun
            self.display.done(self.tasks[job.task], "failed", seconds, slot.name)
        else:
            self.display.line(f"{_title(job)} failed")
        self.display.line(f"    {reason}")
        self._release(slot, "failed")
        self.schedule.done(job)

    def _release(self, slot: _Slot, outcome: str) -> None:
        """Take a slot's job away, and note where and when it was worked at."""
        assert slot.job is not None
        end = time.time()
        span = {
            "task": _title(slot.job),
            "type": self.tasks[slot.job.task].type,
            "host": platform.node(),
            "device": slot.name,
            "start": round(end - (time.monotonic() - slot.begun), 3),
            "end": round(end, 3),
            "outcome": outcome,
        }
        slot.job = None
        with suppress(OSError), self.timeline.open("a", encoding="utf-8") as file:
            file.write(json.dumps(span) + "\n")  # of use, but no reason to stop a run

    def _replace(self, slot: _Slot, reason: str) -> None:
        """Kill a worker; its job is the next one again, or is given up."""
        assert slot.child is not None
        self.selector.unregister(slot.child)
        slot.child.kill()
        if slot.job and slot.attempt + 1 < _TRIES:
            self.display.line(f"{_title(slot.job)}: worker {slot.name} {reason}; trying again")
            self.attempts[slot.job] = slot.attempt + 1
            self.schedule.again(slot.job)
            self._release(slot, "again")
        elif slot.job:
            self._fail(slot, slot.job, f"worker {slot.name} {reason}, {_TRIES} times")
        elif not slot.is_ready:
            slot.failed_starts += 1
            self.start_failure = Failure(f"no worker could start: {reason}", slot.child.tail())
            self.display.line(f"worker {slot.name} did not start: {reason}")
        slot.child, slot.is_ready = None, False


class _Speed:
    """How many seconds a second of the estimates takes here, measured as the run goes."""

    def __init__(self) -> None:
        self.taken = self.estimated = 0.0

    def add(self, job: Job, seconds: float) -> None:
        """A job took so many seconds."""
        self.taken += seconds
        self.estimated += job.seconds

    def pace(self, running: Iterable[tuple[float, float, float]]) -> float | None:
        """The same with the jobs that run counted in (`_progress`); None while nothing is known."""
        spent, done = self.taken, self.estimated
        for age, part, _ in running:
            spent, done = spent + age, done + part
        return spent / done if done else None

    def expect(self, job: Job) -> float:
        """Seconds; 0 while nothing is known."""
        return job.seconds * self.taken / self.estimated if self.estimated else 0.0


def _title(job: Job) -> str:
    return f"{job.task} {job.part[0] + 1}/{job.part[1]}" if job.part else job.task


def _environment(environment: Mapping[str, str], workers: int) -> dict[str, str]:
    """A worker's environment: its share of the cores unless told, no progress bars, this package."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    threads = str(max(1, cores // max(1, workers)))
    package = str(Path(__file__).parents[2])
    paths = [package, environment.get("PYTHONPATH", "")]
    chosen = {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads} | dict(environment)
    return chosen | {
        "TQDM_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
