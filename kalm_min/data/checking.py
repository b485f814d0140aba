"""The check of every line of training data, once, before a run: on all cores, in order.

    files -> ranges of lines -> examine, here or in child processes -> merged in order of the files
         -> what is malformed, or a cached account of each file: its tasks, which rows have no
            positives, group or scores, and the rows of each group

The children are plain subprocesses that speak over their pipes: no fork of a process that may hold
threads or a GPU, and no second run of the user's main module. Only a clean file is cached.

Not here: what a line must hold (records.py), and what is done with the account (examples.py).
"""

import json
import os
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, TextIO

import numpy as np
import numpy.typing as npt

from kalm_min.console import Progress
from kalm_min.data.jsonl import JsonlFile
from kalm_min.data.records import problem_with_line
from kalm_min.files import atomic_write, parse_object, read_json, text_hash, write_json

LISTED = 20  # malformed lines shown; the rest are counted

_CHECKED = "checked3.json"  # raised when the rules of records.py or the account change
_RANGE = 20_000  # lines examined at a time
_ALONE = 100_000  # lines that are examined before children would have started

_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.stdin.buffer.readline())
from kalm_min.data.checking import serve
serve(sys.stdin.buffer, sys.stdout.buffer)
"""

Ints = npt.NDArray[np.int64]
Job = tuple[JsonlFile, int, int]


@dataclass(slots=True)
class TaskAccount:
    """What a file holds of one task."""

    task: str | None
    """As its lines name it; None: they name none."""
    rows: int = 0
    lacking: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """How many rows have no "pos", "group" or "scores", and which is the first of them."""

    def add(self, row: int, lacks: Iterable[str]) -> None:
        """Count one row."""
        self.rows += 1
        for what in lacks:
            count, first = self.lacking.get(what, (0, row))
            self.lacking[what] = count + 1, first

    def join(self, later: "TaskAccount") -> None:
        """Add what was counted of later rows."""
        self.rows += later.rows
        for what, (more, row) in later.lacking.items():
            count, first = self.lacking.get(what, (0, row))
            self.lacking[what] = count + more, first


def account(file: JsonlFile) -> list[TaskAccount] | None:
    """The tasks in a checked file in order of appearance; None if it was not checked yet."""
    path = file.sidecar(_CHECKED)
    return [TaskAccount(**entry) for entry in read_json(path)] if path.exists() else None


def rows_of_tasks(file: JsonlFile) -> Ints:
    """(rows,) of a checked file with several tasks, sorted by task, mapped."""
    return np.asarray(np.load(file.sidecar("rows.npy"), mmap_mode="r"))


def rows_of_groups(file: JsonlFile) -> tuple[Ints, Ints]:
    """The rows of a checked file sorted by task and group, and a table of where each group lies.

    Returns:
        (rows,) and (groups, 4): number of the task, hash of the group, start and end. Mapped.
    """
    order, table = (
        np.asarray(np.load(file.sidecar(name), mmap_mode="r"))
        for name in ("grouped.npy", "groups.npy")
    )
    return order, table


def check_all(path: Path, files: Iterable[JsonlFile], progress: TextIO | None) -> None:
    """Check the lines of all files that were not checked before; raise for all of them at once.

    Args:
        path: what the user opened.
        files: all of it.
        progress: where to show how far it is, if it takes a while.
    """
    files = [file for file in files if account(file) is None]
    total = sum(map(len, files))
    problems: list[str] = []
    count = 0
    jobs = [
        (file, start, min(start + _RANGE, len(file)))
        for file in files
        for start in range(0, len(file), _RANGE)
    ]
    with ExitStack() as stack:
        found = stack.enter_context(_examined(jobs, total))
        bar = None
        if progress is not None and total > _ALONE:
            bar = stack.enter_context(Progress(total, "lines", progress, title="check"))
        results = zip(jobs, found, strict=True)
        for _, part in groupby(results, key=lambda result: id(result[0][0])):
            tally: _Tally | None = None
            for (file, start, stop), one in part:
                tally = tally or _Tally(file)
                tally.add(start, one)
                count += one.malformed
                problems += one.problems[: LISTED - len(problems)]
                if bar is not None:
                    bar.update(stop - start)
            if tally and tally.clean:
                tally.save()
    if count:
        first = f", the first {LISTED}" if count > LISTED else ""
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{path}: {count} malformed line{'s'[: count - 1]}{first}:{lines}")


# ---- lines -> what was found ---------------------------------------------------------------------


@dataclass(slots=True)
class Found:
    """What a range of lines holds."""

    malformed: int = 0
    problems: list[str] = field(default_factory=list[str])
    """`file:line: expected ..., found ...`, at most LISTED of them."""
    tasks: list[TaskAccount] = field(default_factory=list[TaskAccount])
    task_of: npt.NDArray[np.int32] | None = None
    """(lines,) number among `tasks`, where there are several."""
    groups: Ints | None = None
    """(lines,) hash of the group, 0 for none, where there is one at all."""


def examine(file: JsonlFile, start: int, stop: int) -> Found:
    """Check a range of lines."""
    found = Found()
    numbers: dict[str | None, int] = {}
    hashes: dict[str | None, int] = {None: 0}
    task_of, groups = np.zeros(stop - start, np.int32), np.zeros(stop - start, np.int64)
    for place, line in enumerate(file.lines(start, stop)):
        record, problem = _parse(line)
        if problem:
            found.malformed += 1
            if found.malformed <= LISTED:
                found.problems.append(f"{file.location(start + place)}: {problem}")
            continue
        name = record.get("task")
        number = numbers.setdefault(name, len(numbers))
        if number == len(found.tasks):
            found.tasks.append(TaskAccount(name))
        group = None if record.get("group") is None else str(record["group"])
        if group not in hashes:
            hashes[group] = text_hash(group or "")
        task_of[place], groups[place] = number, hashes[group]
        found.tasks[number].add(start + place, _lacks(record))
    found.task_of = task_of if len(numbers) > 1 else None
    found.groups = groups if len(hashes) > 1 else None
    return found


def _lacks(record: dict[str, Any]) -> Iterator[str]:
    """What a good record may have and this one has not: "pos", "group", "scores" (of all texts)."""
    yield from (key for key in ("pos", "group") if record.get(key) in (None, []))
    if any(record.get(key) and record.get(f"{key}_scores") is None for key in ("pos", "neg")):
        yield "scores"


def _parse(line: bytes) -> tuple[dict[str, Any], str | None]:
    """A record and what is wrong with it."""
    try:
        record = parse_object(line, "")
    except ValueError as error:
        return {}, str(error).removeprefix(": ")
    return record, problem_with_line(record)


class _Tally:
    """The account of one file, growing from start to end."""

    def __init__(self, file: JsonlFile) -> None:
        self.file, self.clean = file, True
        self.tasks: dict[str | None, TaskAccount] = {}
        # Untouched pages of zeros cost nothing: the usual file of one task needs no memory.
        self.task_of = np.zeros(len(file), np.int32)
        self.groups = np.zeros(len(file), np.int64)

    def add(self, start: int, found: Found) -> None:
        """Add what the lines from `start` on hold."""
        self.clean = self.clean and not found.malformed
        for task in found.tasks:
            self.tasks.setdefault(task.task, TaskAccount(task.task)).join(task)
        number_of = {name: number for number, name in enumerate(self.tasks)}
        numbers = np.array([number_of[task.task] for task in found.tasks], np.int32)
        if found.task_of is not None:
            part = numbers[found.task_of]
            self.task_of[start : start + len(part)] = part
        elif numbers.any():
            rows = found.tasks[0].rows
            self.task_of[start : start + rows] = numbers[0]
        if found.groups is not None:
            self.groups[start : start + len(found.groups)] = found.groups

    def save(self) -> None:
        """Cache the account; what it points to first, so that it is never believed too early."""
        if len(self.tasks) > 1:
            self._write("rows.npy", np.argsort(self.task_of, kind="stable"))
        if any(task.lacking.get("group", (0,))[0] < task.rows for task in self.tasks.values()):
            order = np.lexsort((self.groups, self.task_of))
            keys = np.stack([self.task_of[order], self.groups[order]], 1)  # (rows, 2)
            new = np.flatnonzero(np.any(keys[1:] != keys[:-1], 1)) + 1
            starts = np.concatenate([[0], new])
            ends = np.append(new, len(order))
            table = np.column_stack([keys[starts], starts, ends])  # (groups, 4)
            self._write("grouped.npy", order)
            self._write("groups.npy", table[table[:, 1] != 0])
        write_json(self.file.sidecar(_CHECKED), [asdict(task) for task in self.tasks.values()])

    def _write(self, name: str, array: Ints) -> None:
        with atomic_write(self.file.sidecar(name)) as file:
            np.save(file, array)


# ---- on all cores --------------------------------------------------------------------------------


@contextmanager
def _examined(jobs: Sequence[Job], total: int) -> Generator[Iterator[Found]]:
    """The results of all jobs in order, from children where that pays."""
    children = min(_cores(), len(jobs))
    if total <= _ALONE or children < 2:
        yield (examine(*job) for job in jobs)
        return
    with ExitStack() as stack:
        idle: SimpleQueue[_Child] = SimpleQueue()
        for _ in range(children):
            idle.put(stack.enter_context(_Child()))

        def work(job: Job) -> Found:
            child = idle.get()
            try:
                return child.examine(*job)
            finally:
                idle.put(child)

        threads = ThreadPoolExecutor(children)
        try:
            yield threads.map(work, jobs)
        finally:
            threads.shutdown(cancel_futures=True)


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Child:
    """A process that examines ranges of lines, one at a time."""

    def __enter__(self) -> "_Child":
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the parent's; the end of the pipe ends the child
        )
        self._send(sys.path)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def examine(self, file: JsonlFile, start: int, stop: int) -> Found:
        """What `examine` finds. Raises RuntimeError when the process is gone."""
        assert self._process.stdout is not None
        try:
            self._send([str(file.path), file.cache_dir and str(file.cache_dir), start, stop])
            return _receive(self._process.stdout)
        except (BrokenPipeError, EOFError) as error:
            code = self._process.wait()
            raise RuntimeError(
                f"{file.path}: the process that checked its lines ended with code {code}"
            ) from error


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """The child's side: until `requests` ends, examine what it asks for."""
    opened = lru_cache(4)(JsonlFile)
    for request in requests:
        path, cache_dir, start, stop = json.loads(request)
        found = examine(opened(path, cache_dir), start, stop)
        arrays = [found.task_of, found.groups]
        head = {
            "malformed": found.malformed,
            "problems": found.problems,
            "tasks": [asdict(task) for task in found.tasks],
            "arrays": [array is not None and array.nbytes for array in arrays],
        }
        replies.write(json.dumps(head).encode() + b"\n")
        for array in arrays:
            if array is not None:
                replies.write(array.tobytes())
        replies.flush()


def _receive(replies: IO[bytes]) -> Found:
    """Read one reply of `serve`. Raises EOFError where it ends early."""
    line = replies.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    head = json.loads(line)
    blobs = [replies.read(size) if size else None for size in head["arrays"]]
    if any(
        blob is not None and len(blob) < size
        for blob, size in zip(blobs, head["arrays"], strict=True)
    ):
        raise EOFError
    task_of, groups = blobs
    return Found(
        head["malformed"],
        head["problems"],
        [TaskAccount(**task) for task in head["tasks"]],
        None if task_of is None else np.frombuffer(task_of, np.int32),
        None if groups is None else np.frombuffer(groups, np.int64),
    )
