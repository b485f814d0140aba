"""The check of every line of training data, once, before a run, on all cores.

Ranges of lines are summarised in this process or in child processes and joined in file order. What
was found in a file without malformed lines is cached. records.py defines what a line must hold;
dataset.py uses what was found.
"""

import io
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from itertools import groupby, starmap
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TextIO

import numpy as np

from kalm_min.console import Progress
from kalm_min.data.index import Ints, JsonlFile
from kalm_min.data.records import problem_with_line
from kalm_min.files import Object, parse_object, text_hash
from kalm_min.schema import LISTED, list_problems

_CHECKED = "checked"
_RANGE = 20_000  # lines summarised at a time
_SMALL = 100_000  # lines that are summarised before child processes would have started

# The number and the first of a task's rows ("rows") and of those without "pos", "group", "scores".
Counts = dict[str, list[int]]
Job = tuple[JsonlFile, int, int]  # a file, and its records from the first number to the second


class Summary(NamedTuple):
    """The content of a range of lines by task, in order of appearance (None: unnamed)."""

    tasks: dict[str | None, Counts]
    rows: dict[str | None, Ints | range]  # the numbers of the task's records
    groups: Ints  # (lines,) hash of the group; 0 for no group
    problems: list[str]  # `file:line: expected ..., found ...` of each malformed line


def summarise(file: JsonlFile, start: int, stop: int) -> Summary:
    """Check records `start` to `stop` (exclusive)."""
    tasks: dict[str | None, Counts] = {}
    rows: dict[str | None, list[int]] = {}
    groups, problems = np.zeros(stop - start, np.int64), list[str]()
    for i, line in enumerate(file.lines(start, stop), start):
        record: Object = {}
        try:
            record = parse_object(line, "")
            problem = problem_with_line(record)
        except ValueError as error:
            problem = str(error).removeprefix(": ")
        if problem:
            problems.append(f"{file.location(i)}: {problem}")
            continue
        task, group = record.get("task"), record.get("group")
        rows.setdefault(task, []).append(i)
        if group is not None:
            groups[i - start] = text_hash(json.dumps(group))
        counted = ["rows", *(key for key in ("pos", "group") if record.get(key) in (None, []))]
        if any(record.get(key) and record.get(f"{key}_scores") is None for key in ("pos", "neg")):
            counted.append("scores")
        counts = tasks.setdefault(task, {})
        for what in counted:
            counts.setdefault(what, [0, i])[0] += 1
    # Most files have one task, for which a range takes no memory.
    one = len(rows) == 1
    arrays = {task: range(start, stop) if one else np.array(some) for task, some in rows.items()}
    return Summary(tasks, arrays, groups, problems)


class Checked(NamedTuple):
    """What the lines of a file without malformed ones hold."""

    tasks: list[tuple[str | None, Counts]]  # in order of appearance (None: unnamed)
    rows: Ints | range  # (lines,) the numbers of the records, task by task
    groups: Ints  # (lines,) hash of the group, 0 for no group; (0,) if no line has one


def load_checked(file: JsonlFile) -> Checked | None:
    """What was found in a file; None if it has not been checked."""
    if (cache := file.load(_CHECKED)) is None:
        return None
    array, note = cache
    tasks = [(task, counts) for task, counts in note["tasks"]]
    several = len(file) * (len(tasks) > 1)
    return Checked(tasks, array[:several] if several else range(len(file)), array[several:])


def check_all(path: Path, files: Sequence[JsonlFile], progress: TextIO | None) -> list[Checked]:
    """What the lines of the `files` in `path` hold; those that have not been checked are checked.

    Raises ValueError with the first malformed lines, in the order of the files, and their number,
    or if a child process was killed.
    Reports on `progress` if it takes a while.
    """
    found = {file.path: load_checked(file) for file in files}
    new = [file for file in files if found[file.path] is None]
    jobs = [
        (file, start, min(start + _RANGE, len(file)))
        for file in new
        for start in range(0, len(file), _RANGE)
    ]
    total = sum(map(len, new))
    problems, malformed = list[str](), 0
    stream = progress if progress and total > _SMALL else io.StringIO()
    bar = Progress(total, "lines", stream, title="check")
    with closing(_summaries(jobs, total)) as summaries, bar:
        for file, parts in groupby(zip(jobs, summaries, strict=True), lambda part: part[0][0]):
            before = malformed
            tasks: dict[str | None, Counts] = {}
            rows: dict[str | None, list[Ints | range]] = {}
            groups = np.zeros(len(file), np.int64)  # takes no memory until it is written
            for (_, start, stop), part in parts:
                malformed += len(part.problems)
                problems += part.problems[: LISTED - len(problems)]
                for task, more in part.tasks.items():
                    rows.setdefault(task, []).append(part.rows[task])
                    counts = tasks.setdefault(task, {})
                    for what, (count, first) in more.items():
                        counts.setdefault(what, [0, first])[0] += count
                if part.groups.any():
                    groups[start:stop] = part.groups
                bar.update(stop - start)
            if malformed == before:
                arrays = [np.asarray(some) for one in rows.values() for some in one]
                arrays = [
                    *(arrays if len(tasks) > 1 else ()),
                    groups if groups.any() else groups[:0],
                ]
                file.save(_CHECKED, arrays, {"tasks": list(tasks.items())})
                found[file.path] = load_checked(file)
    if malformed:
        raise ValueError(f"{path}: {list_problems(malformed, 'malformed line', problems)}")
    return [one for one in found.values() if one is not None]


def _summaries(jobs: Sequence[Job], total: int) -> Generator[Summary]:
    """Yield the summary of each job in order, from child processes if that is faster.

    Children are spawned, since a fork of this process would copy threads and the state of a GPU.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cores or 1, len(jobs))
    if total <= _SMALL or workers < 2 or multiprocessing.current_process().daemon:
        yield from starmap(summarise, jobs)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent)
    try:
        # The children start with Ctrl-C blocked, which is meant for this process, and without a
        # main module, which they would import, loading torch or running a script again.
        with ExitStack() as stack:
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
            stack.callback(sys.modules.update, __main__=sys.modules["__main__"])
            sys.modules["__main__"] = ModuleType("__main__")
            results = pool.map(summarise, *zip(*jobs, strict=True))
        yield from results
    except BrokenProcessPool as error:
        killed = "a process that checked lines of this or a later file was killed (out of memory?)"
        raise ValueError(f"{jobs[0][0].path}: {killed}; run again") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this child process as soon as its parent ends, however that happens."""

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
