"""Run a plan with one worker process per device, so that no failure affects another task.

The parent hands out one job at a time. A worker that dies, hangs, runs out of memory or writes what is
no message is killed with its children and replaced; its job is tried again with half the batch, and
after three attempts reported as failed with the tail of the log. A task is finished when its result
file is valid, so the same command continues an interrupted run. No torch is imported.
"""

import json
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

from kalm_min.console import Progress, format_duration
from kalm_min.evaluation.plan import Plan, PlannedTask
from kalm_min.files import digest, escape_name, parse_object

WORKER = (sys.executable, "-m", "kalm_min.evaluation.worker")
_ATTEMPTS = 3
_STARTS = 2  # times a worker may fail to start before its device is given up
_SILENCE = 300.0  # seconds without a heartbeat; library calls that hold the GIL take less
_SLICES = 10  # slices per device's fair share, so that all devices end at about the same time
_SLICE_DOCUMENTS = 50_000  # the minimum, because every slice opens the dataset again
_SCORING = 0.02  # share of a corpus's cost that remains once its vectors are stored
_MAX_LINE = 1 << 20  # bytes, more than any message has
_LOG_LINES = 15


class Failure(NamedTuple):
    """Why a task has no result, and the last lines of its worker's log."""

    reason: str
    log: str


@dataclass(slots=True, eq=False)
class Job:
    """Work for one device: a task, or the encoding of slice `part` (index, count) of its corpus."""

    task: PlannedTask
    characters: float
    part: tuple[int, int] | None = None
    attempt: int = 0

    def __str__(self) -> str:
        return self.task.name + (f" {self.part[0] + 1}/{self.part[1]}" if self.part else "")


def make_jobs(tasks: Iterable[PlannedTask], devices: int) -> list[Job]:
    """The jobs in starting order: the largest first, slices of a corpus before its task.

    A corpus larger than half a device's fair share is cut into slices of a tenth of that share.
    """
    tasks = sorted(tasks, key=lambda task: -task.characters)
    fair = max(1.0, sum(task.characters for task in tasks) / max(1, devices))
    jobs: list[tuple[float, Job]] = []
    for task in tasks:
        rank, size, corpus = float(task.characters), float(task.characters), task.corpus_characters
        count = min(task.documents // _SLICE_DOCUMENTS, round(corpus / fair * _SLICES))
        if devices > 1 and corpus > fair / 2 and count > 1:
            # Equal ranks, so that a corpus is complete before the slices of the next one begin.
            rank, size = fair / _SLICES, size - (1 - _SCORING) * corpus
            jobs += [(rank, Job(task, corpus / count, (i, count))) for i in range(count)]
        jobs.append((rank, Job(task, size)))
    return [job for _, job in sorted(jobs, key=lambda pair: -pair[0])]


def next_job(jobs: list[Job], running: Iterable[Job]) -> Job | None:
    """Remove and return the first job whose task waits for no slice; None while all wait."""
    sliced = {job.task.name for job in (*jobs, *running) if job.part}
    ready = (i for i, job in enumerate(jobs) if job.part or job.task.name not in sliced)
    return None if (i := next(ready, None)) is None else jobs.pop(i)


@dataclass(slots=True)
class _Slot:
    """A device, its worker process and that worker's job; times are from time.monotonic()."""

    name: str
    device: str
    log: Path
    process: subprocess.Popen[bytes] | None = None
    is_ready: bool = False
    failed_starts: int = 0
    job: Job | None = None
    started: float = 0.0
    last_progress: float = 0.0
    last_heartbeat: float = 0.0
    texts: int = 0
    characters: int = 0
    log_start: int = 0  # offset in the log at which the current job begins

    def send(self, **line: object) -> None:
        """Write a line to the worker's stdin: its settings at the start, then a job; paths as text."""
        assert self.process and self.process.stdin
        self.log_start = self.log.stat().st_size
        self.started = self.last_progress = self.last_heartbeat = time.monotonic()
        self.texts = self.characters = 0
        with suppress(BrokenPipeError):  # the end of its stdout will report its death
            self.process.stdin.write(json.dumps(line, default=str).encode() + b"\n")
            self.process.stdin.flush()

    def kill(self) -> None:
        """End the worker and every process it started."""
        if self.process:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            assert self.process.stdin
            with suppress(BrokenPipeError):  # unsent bytes
                self.process.stdin.close()
            self.process, self.is_ready = None, False

    def failure(self, reason: str) -> Failure:
        """The reason, with the last lines that were logged since the current job began."""
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
        return Failure(reason, "\n".join(lines[-_LOG_LINES:]))


@dataclass(eq=False)
class Runner:
    """Runs the tasks of a plan that have no valid result, on one worker per device."""

    plan: Plan
    _: KW_ONLY
    devices: Sequence[str]  # for example "cuda:0", "cuda:1"; "cpu" may be given several times
    environment: Mapping[str, str]  # of the workers, to which their share of the cores is added
    logs: Path  # folder for one log file per worker, and timeline.jsonl with every attempt
    timeout: float  # seconds without progress after which a worker is replaced
    stream: TextIO  # for progress
    store: Path | None = None  # folder that keeps vectors; if None, until their task is done
    command: Sequence[str] = WORKER

    def __post_init__(self) -> None:
        """Prepare a run with no more workers than jobs."""
        selected = [task for task in self.plan.tasks if task.name not in self.plan.elsewhere]
        self.tasks = [task for task in selected if self.plan.missing(task)]
        self.jobs = make_jobs(self.tasks, len(self.devices))
        self.slots: list[_Slot] = []
        for i, device in enumerate(self.devices[: len(self.jobs)]):
            name = f"{device}#{i}" if self.devices.count(device) > 1 else device
            self.slots.append(_Slot(name, device, self.logs / f"worker{i}.log"))
        self.environment = worker_environment(self.environment, len(self.slots))
        # Named by model and tasks: another run at the same time must not lose its vectors.
        run = f"{self.plan.results.name}-{digest(*sorted(task.name for task in selected))[:8]}"
        self.scratch = (self.logs.parent / f".vectors-{run}").absolute()
        self.failures: dict[str, Failure] = {}
        self.start_failure = Failure("no worker could start", "")
        self.lines: queue.Queue[tuple[_Slot, subprocess.Popen[bytes], bytes]] = queue.Queue()
        self.total = max(1, round(sum(job.characters for job in self.jobs)))
        self.done_characters, self.done_tasks = 0.0, 0

    def run(self) -> dict[str, Failure]:
        """Run everything and return the failures by task name; no child survives in any case."""
        if self.jobs:
            with Progress(self.total, "characters", self.stream, interval=60) as self.progress:
                try:
                    self._loop()
                finally:
                    for slot in self.slots:
                        slot.kill()
        self.failures |= {job.task.name: self.start_failure for job in self.jobs}
        with suppress(OSError):  # keep what failed tasks have encoded
            self.scratch.rmdir()
        return self.failures

    def _loop(self) -> None:
        """Run until every job has ended, or no device is left that can start a worker."""
        while self.jobs or any(slot.job for slot in self.slots):
            for slot in self.slots:
                if not slot.process and self.jobs and slot.failed_starts < _STARTS:
                    self._start(slot)
                elif slot.is_ready and not slot.job:
                    self._assign(slot)
            if not any(slot.process for slot in self.slots):
                return
            with suppress(queue.Empty):
                line = self.lines.get(timeout=min(0.5, self.timeout))
                while True:
                    self._handle(*line)
                    line = self.lines.get_nowait()
            for slot in self.slots:
                self._check_life(slot)
            self._show()

    def _start(self, slot: _Slot) -> None:
        """Start a worker and a thread that forwards its lines."""
        slot.log.parent.mkdir(parents=True, exist_ok=True)
        with slot.log.open("a", encoding="utf-8") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(self.command)}\n")
            log.flush()
            slot.process = process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.environment,
                start_new_session=True,  # its own process group, and no Ctrl-C from the terminal
            )

        def read() -> None:
            assert process.stdout
            with process.stdout as stdout:
                while line := stdout.readline(_MAX_LINE):
                    self.lines.put((slot, process, line))
            self.lines.put((slot, process, b""))

        threading.Thread(target=read, daemon=True).start()
        plan = self.plan
        slot.send(**plan.settings, model=plan.model, device=slot.device, dims=plan.dims)

    def _assign(self, slot: _Slot) -> None:
        """Send a free worker its next job, if there is one."""
        slot.job = job = next_job(self.jobs, [other.job for other in self.slots if other.job])
        if job is None:
            return
        task, path = job.task, self.plan.result_path(job.task).absolute()
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a worker killed while writing
            leftover.unlink(missing_ok=True)
        slot.send(
            name=task.name,
            type=task.type,
            key=self.plan.key(task),
            dims=self.plan.missing(task),
            attempt=job.attempt,
            slice=job.part,
            folder=task.folder,
            mirror=task.mirror,
            store=(self.store or self.scratch / escape_name(task.name)).absolute(),
            result=path,
            queries=self.plan.queries_path(task),
        )

    def _handle(self, slot: _Slot, process: subprocess.Popen[bytes], line: bytes) -> None:
        """Act on a line from a worker, or on the end of its output."""
        if slot.process is not process:  # it was killed in the meantime
            return
        slot.last_heartbeat = time.monotonic()
        job, message = slot.job, None
        with suppress(ValueError):
            message = parse_object(line, "")
        match message:
            case {"event": "ready"}:
                slot.is_ready = True
            case {"event": "alive"}:
                pass
            case {"event": "progress", "texts": int(texts), "characters": int(characters)}:
                slot.last_progress = time.monotonic()
                slot.texts, slot.characters = texts, characters
            case {"event": "unusable", "error": str(error)}:
                slot.failed_starts = _STARTS  # The next attempt would fail in the same way.
                self._replace(slot, error)
            case {"event": "done" | "failed", "task": name} if not job or name != job.task.name:
                self._replace(slot, f"reported on {name}, which it was not given")
            case {"event": "done", "task": _} if job:
                self._end(slot, job, "done")
            case {"event": "failed", "memory": True} if job:
                self._replace(slot, "ran out of memory")
            case {"event": "failed", "error": str(error)} if job:
                self._end(slot, job, "failed", error)
            case _ if line:
                self._replace(slot, f"wrote {line[:60].rstrip()!r} where a message belongs")
            case _:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5)
                code = process.returncode or 0
                names = {one.value: f"signal {one.name}" for one in signal.Signals}
                self._replace(slot, f"died ({names.get(-code, f'exit code {code}')})")

    def _check_life(self, slot: _Slot) -> None:
        """Replace a worker that makes no progress or sends no heartbeats."""
        if slot.process is None or (slot.job is None and slot.is_ready):
            return
        now = time.monotonic()
        limit = self.timeout if slot.job else max(self.timeout, _SILENCE)
        if now - slot.last_progress > limit:
            self._replace(slot, f"made no progress for {format_duration(limit)}")
        elif now - slot.last_heartbeat > _SILENCE:
            self._replace(slot, f"gave no sign of life for {format_duration(_SILENCE)}")

    def _replace(self, slot: _Slot, reason: str) -> None:
        """Kill a worker; put its job at the head of the list again, or give it up."""
        job, was_ready = slot.job, slot.is_ready
        slot.kill()
        if job:
            job.attempt += 1
            is_last = job.attempt == _ATTEMPTS
            reason = f"worker {slot.name} {reason}" + f", {_ATTEMPTS} times" * is_last
            self._end(slot, job, "failed" if is_last else "again", reason)
        elif not was_ready:
            slot.failed_starts += 1
            self.start_failure = slot.failure(f"no worker could start: {reason}")
            self.progress.line(f"worker {slot.name} did not start: {reason}")

    def _end(self, slot: _Slot, job: Job, outcome: str, reason: str = "") -> None:
        """End a worker's job, print its outcome and record the attempt in the timeline."""
        seconds, end, score, slot.job = time.monotonic() - slot.started, time.time(), "failed", None
        if outcome == "done" and not job.part:
            if result := self.plan.result(job.task):  # believe the file, not the message
                main_score = result["kalm_min"]["dims"][self.plan.dims[0]]["main_score"]
                score = f"{100 * main_score:.2f}"
                shutil.rmtree(self.scratch / escape_name(job.task.name), ignore_errors=True)
            else:
                outcome, reason = "failed", "said it was done and left no valid result file"
        if outcome == "again":
            self.jobs.insert(0, job)
            self.progress.line(f"{job}: {reason}; trying again")
        else:
            self.done_characters += job.characters
            self.done_tasks += not job.part
        if outcome == "failed" or (outcome == "done" and not job.part):
            number = f"[{self.done_tasks:{len(str(len(self.tasks)))}}/{len(self.tasks)}] {job}"
            parts = number, f"{job.task.main_score} {score}", format_duration(seconds), slot.name
            self.progress.line("  ".join(parts) + f"\n    {reason}" * (outcome == "failed"))
        if outcome == "failed" and not job.part:  # the task encodes what a slice lacks
            self.failures[job.task.name] = slot.failure(reason)
        span = {"task": str(job), "type": job.task.type, "host": platform.node()}
        span |= {"device": slot.name, "start": round(end - seconds, 3), "end": round(end, 3)}
        with suppress(OSError), (self.logs / "timeline.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(span | {"outcome": outcome}) + "\n")  # not a reason to stop a run

    def _show(self) -> None:
        """Show what is done, and what each worker is doing."""
        done = self.done_characters
        notes = [f"{self.done_tasks}/{len(self.tasks)} tasks"]
        for slot in self.slots:
            if slot.job:
                done += min(slot.characters, 0.95 * slot.job.characters)
                age = format_duration(time.monotonic() - slot.started)
                notes.append(f"{slot.name} {slot.job} {slot.texts} texts {age}")
        done = min(round(done), self.total - 1)
        self.progress.update(done - self.progress.done, " | ".join(notes))


def worker_environment(environment: Mapping[str, str], workers: int) -> dict[str, str]:
    """A worker's environment: its share of the cores unless the user set one, and this package."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    threads = str(max(1, cores // max(1, workers)))
    paths = filter(None, [str(Path(__file__).parents[2]), environment.get("PYTHONPATH")])
    fixed = {"TQDM_DISABLE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads} | dict(environment) | fixed
