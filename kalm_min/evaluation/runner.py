"""Run a plan: one worker process per device, whatever happens to them.

The parent owns the queue (longest task first) and hands out one task at a time. A worker that dies,
hangs, runs out of memory or writes something that is no message is killed with all its children and
replaced, and its task is tried again with half the batch; after three tries it is reported as
failed, with the tail of its log, and the others go on. A finished task is a file that no longer
needs anybody: whoever stops, the same command continues.

Not here: models, devices and scores (`worker`), what to run (`plan`).
"""

import json
import os
import platform
import selectors
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from kalm_min.evaluation.child import Child
from kalm_min.evaluation.plan import Plan, PlannedTask
from kalm_min.evaluation.watch import Activity, Display
from kalm_min.progress import duration

WORKER = (sys.executable, "-m", "kalm_min.evaluation.worker")
_TRIES = 3
_STARTS = 2  # times a device may fail to come up before it is given up


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a task has no result, and the last lines of its worker's log."""

    reason: str
    log: str


@dataclass(slots=True)
class _Slot:
    """A device, the worker on it, and the task that one is at."""

    name: str
    device: str
    log: Path
    child: Child | None = None
    is_ready: bool = False
    failed_starts: int = 0
    task: PlannedTask | None = None
    attempt: int = 0
    begun: float = 0.0
    texts: int = 0

    def activity(self) -> Activity:
        """What is shown of it."""
        if self.task is None:
            return Activity(self.name, "(idle)" if self.is_ready else "(starting)")
        return Activity(self.name, self.task.name, self.texts, time.monotonic() - self.begun)


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
        command: Sequence[str] = WORKER,
    ) -> None:
        """Prepare a run.

        Args:
            plan: what to run.
            devices: one worker each; no more are started than there are tasks.
            environment: of the workers; their share of the cores is added.
            logs: folder for one log file per worker, and timeline.jsonl: who was at what, when.
            timeout: seconds without a message after which a worker is replaced.
            stream: where progress is shown; a table drawn in place if it is a terminal.
            command: what starts a worker.
        """
        self.plan, self.timeout, self.command = plan, timeout, tuple(command)
        todo = [task for task in plan.tasks if plan.result(task) is None]
        self.queue = deque((task, 0) for task in todo)
        many = len(set(devices)) < len(devices)
        self.slots = [
            _Slot(f"{device}#{i}" if many else device, device, logs / f"worker{i}.log")
            for i, device in enumerate(devices[: len(todo)])
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
            while self.queue or any(slot.task for slot in self.slots):
                for slot in self.slots:
                    self._employ(slot)
                if not any(slot.child for slot in self.slots):
                    break
                for key, _ in self.selector.select(timeout=min(0.5, self.timeout)):
                    self._listen(key.data)
                for slot in self.slots:
                    self._check_silence(slot)
                self.display.status([slot.activity() for slot in self.slots if slot.child])
        finally:
            self.display.clear()
            for slot in self.slots:
                if slot.child:
                    slot.child.kill()
            self.selector.close()
        for task, _ in self.queue:
            self.failures[task.name] = self.start_failure
        return self.failures

    def _employ(self, slot: _Slot) -> None:
        """Give a free device a worker, and a free worker a task, while there is one."""
        if not self.queue or slot.task:
            return
        if slot.child is None and slot.failed_starts < _STARTS:
            slot.child = Child.start(self.command, self.environment, slot.log)
            self.selector.register(slot.child, selectors.EVENT_READ, slot)
            names = ("dtype", "causal", "pooling", "max_length")
            settings = {name: self.plan.settings[name] for name in names}
            settings |= {"model": self.plan.model, "dims": list(self.plan.dims)}
            slot.child.send(settings | {"device": slot.device})
        elif slot.child and slot.is_ready:
            self._hand_out(slot, slot.child, *self.queue.popleft())

    def _hand_out(self, slot: _Slot, child: Child, task: PlannedTask, attempt: int) -> None:
        slot.task, slot.attempt, slot.texts = task, attempt, 0
        slot.begun = child.heard = time.monotonic()
        child.mark_log()
        path = self.plan.result_path(task)
        for scrap in path.parent.glob(f".{path.name}.*.tmp"):  # of a worker killed while writing
            scrap.unlink(missing_ok=True)
        order = {
            "name": task.name,
            "type": task.type,
            "folder": str(task.folder) if task.folder else None,
            "mirror": str(task.mirror) if task.mirror else None,
            "key": self.plan.key(task),
            "attempt": attempt,
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
                case "progress":
                    slot.texts = message["texts"]
                case "unusable":
                    slot.failed_starts = _STARTS  # The next try would end the same way.
                    end = message["error"]
                case "done" | "failed" if not slot.task or message["task"] != slot.task.name:
                    end = f"speaks of {message['task']}, which it was not given"
                case "done" if slot.task:
                    self._finish(slot, slot.task)
                case "failed" if slot.task and message["memory"]:
                    end = "ran out of memory"
                case "failed" if slot.task:
                    self._fail(slot, slot.task, message["error"])
        if end:
            self._replace(slot, end)

    def _check_silence(self, slot: _Slot) -> None:
        waiting = slot.child and (slot.task or not slot.is_ready)
        if waiting and slot.child and time.monotonic() - slot.child.heard > self.timeout:
            self._replace(slot, f"gave no sign of progress for {duration(self.timeout)}")

    def _finish(self, slot: _Slot, task: PlannedTask) -> None:
        """Believe the file, not the message."""
        result = self.plan.result(task)
        if result is None:
            self._fail(slot, task, "said it was done and left no valid result file")
            return
        score = result["kalm_min"]["dims"][str(self.plan.dims[0])]["main_score"]
        self.display.done(task, f"{100 * score:.2f}", time.monotonic() - slot.begun, slot.name)
        self._release(slot, "done")

    def _fail(self, slot: _Slot, task: PlannedTask, reason: str) -> None:
        log = slot.child.tail() if slot.child else ""
        self.failures[task.name] = Failure(reason, log)
        self.display.done(task, "failed", time.monotonic() - slot.begun, slot.name)
        self.display.line(f"    {reason}")
        self._release(slot, "failed")

    def _release(self, slot: _Slot, outcome: str) -> None:
        """Take a slot's task away, and note where and when it was worked at."""
        assert slot.task is not None
        end = time.time()
        span = {
            "task": slot.task.name,
            "type": slot.task.type,
            "host": platform.node(),
            "device": slot.name,
            "start": round(end - (time.monotonic() - slot.begun), 3),
            "end": round(end, 3),
            "outcome": outcome,
        }
        slot.task = None
        with suppress(OSError), self.timeline.open("a", encoding="utf-8") as file:
            file.write(json.dumps(span) + "\n")  # of use, but no reason to stop a run

    def _replace(self, slot: _Slot, reason: str) -> None:
        """Kill a worker; its task goes back to the head of the queue, or is given up."""
        assert slot.child is not None
        self.selector.unregister(slot.child)
        slot.child.kill()
        if slot.task and slot.attempt + 1 < _TRIES:
            self.display.line(f"{slot.task.name}: worker {slot.name} {reason}; trying again")
            self.queue.appendleft((slot.task, slot.attempt + 1))
            self._release(slot, "again")
        elif slot.task:
            self._fail(slot, slot.task, f"worker {slot.name} {reason}, {_TRIES} times")
        elif not slot.is_ready:
            slot.failed_starts += 1
            self.start_failure = Failure(f"no worker could start: {reason}", slot.child.tail())
            self.display.line(f"worker {slot.name} did not start: {reason}")
        slot.child, slot.is_ready = None, False


def _environment(environment: Mapping[str, str], workers: int) -> dict[str, str]:
    """A worker's environment: its share of the cores, no progress bars, this package in reach."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    threads = str(max(1, cores // max(1, workers)))
    package = str(Path(__file__).parents[2])
    paths = [package, environment.get("PYTHONPATH", "")]
    return dict(environment) | {
        "OMP_NUM_THREADS": threads,
        "RAYON_NUM_THREADS": threads,
        "TQDM_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
