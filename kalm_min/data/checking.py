"""The check of every line of training data, once, before a run, on all cores.

    files -> ranges of lines -> summarise, in this or in child processes -> in file order
         -> the malformed lines, or a cached summary of each file: its tasks, what their rows lack,
            the rows of each task, and the group of each row

Only a file without malformed lines is cached. Not here: what a line must hold (records.py), and
what is done with the summary (dataset.py).
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from types import ModuleType
from typing import TextIO

import numpy as np
import numpy.typing as npt

from kalm_min.console import Progress
from kalm_min.data.index import Ints, JsonlFile
from kalm_min.data.records import LISTED, list_problems, problem_with_line
from kalm_min.files import atomic_write, parse_object, read_json, text_hash, write_json

_SUMMARY = "summary1.json"  # raised when the rules of records.py or the summary change
_RANGE = 20_000  # lines summarised at a time
_SMALL = 100_000  # lines that are summarised before child processes would have started

Counts = dict[str, tuple[int, int]]
"""Rows of a task ("rows"), and of those without "pos", "group" or "scores": how many, the first."""


@dataclass(slots=True)
class Summary:
    """What a range of lines holds."""

    tasks: dict[str | None, Counts]
    """By name as the lines give it, in order of appearance; None: they give none."""
    task_of: npt.NDArray[np.int32]
    """(lines,) position in `tasks`."""
    groups: Ints
    """(lines,) hash of the group; 0 is no group."""
    problems: list[str]
    """`file:line: expected ..., found ...` of malformed lines, at most LISTED of them."""
    malformed: int = 0


def summarise(file: JsonlFile, start: int, stop: int) -> Summary:
    """Check records `start` to `stop` (exclusive)."""
    lines = stop - start
    summary = Summary({}, np.zeros(lines, np.int32), np.zeros(lines, np.int64), [])
    numbers: dict[str | None, int] = {}
    hashes: dict[object, int] = {}
    for i, line in enumerate(file.lines(start, stop)):
        try:
            record = parse_object(line, "")
            problem = problem_with_line(record)
        except ValueError as error:
            record, problem = {}, str(error).removeprefix(": ")
        if problem:
            summary.malformed += 1
            if summary.malformed <= LISTED:
                summary.problems.append(f"{file.location(start + i)}: {problem}")
            continue
        task, group = record.get("task"), record.get("group")
        if number := numbers.setdefault(task, len(numbers)):
            summary.task_of[i] = number
        if group is not None:
            if group not in hashes:
                hashes[group] = text_hash(str(group))
            summary.groups[i] = hashes[group]
        counted = ["rows", *(key for key in ("pos", "group") if record.get(key) in (None, []))]
        if any(record.get(key) and record.get(f"{key}_scores") is None for key in ("pos", "neg")):
            counted.append("scores")
        counts = summary.tasks.setdefault(task, {})
        for what in counted:
            _add(counts, what, 1, start + i)
    return summary


def _add(counts: Counts, what: str, count: int, first: int) -> None:
    before, first = counts.get(what, (0, first))
    counts[what] = before + count, first


def load_summary(file: JsonlFile) -> list[tuple[str | None, Counts]] | None:
    """The tasks of a checked file in order of appearance; None if it was not checked yet."""
    path = file.sidecar(_SUMMARY)
    return [(task, counts) for task, counts in read_json(path)] if path.exists() else None


def load_array(file: JsonlFile, name: str) -> Ints:
    """An array of the summary of a checked file, memory-mapped: (rows,).

    "rows" has the row numbers sorted by task, if there are several tasks; "groups" the hash of the
    group of each row, if a row has one.
    """
    return np.asarray(np.load(file.sidecar(f"{name}.npy"), mmap_mode="r"))


def check_all(path: Path, files: Sequence[JsonlFile], progress: TextIO | None) -> None:
    """Check and summarise all files that were not checked before.

    Args:
        path: what the user opened.
        files: all of its files.
        progress: where to show how far it is, if it takes a while.

    Raises ValueError with the first malformed lines, in the order of the files, and their number.
    """
    files = [file for file in files if load_summary(file) is None]
    jobs = [
        (file, start, min(start + _RANGE, len(file)))
        for file in files
        for start in range(0, len(file), _RANGE)
    ]
    total = sum(map(len, files))
    problems, malformed = list[str](), 0
    with ExitStack() as stack:
        summaries = zip(jobs, stack.enter_context(closing(_summaries(jobs, total))), strict=True)
        bar = None
        if progress is not None and total > _SMALL:
            bar = stack.enter_context(Progress(total, "lines", progress, title="check"))
        for file in files:
            before = malformed
            tasks: dict[str | None, Counts] = {}
            # Untouched pages of zeros cost nothing: the usual file of one task needs no memory.
            task_of, groups = np.zeros(len(file), np.int32), np.zeros(len(file), np.int64)
            for (_, start, stop), summary in summaries:
                problems += summary.problems[: LISTED - len(problems)]
                malformed += summary.malformed
                for task, counts in summary.tasks.items():
                    total_counts = tasks.setdefault(task, {})
                    for what, (count, first) in counts.items():
                        _add(total_counts, what, count, first)
                number_of = {task: number for number, task in enumerate(tasks)}
                numbers = np.array([number_of[task] for task in summary.tasks], np.int32)
                if numbers.any():
                    task_of[start:stop] = numbers[summary.task_of]
                if summary.groups.any():
                    groups[start:stop] = summary.groups
                if bar is not None:
                    bar.update(stop - start)
                if stop == len(file):
                    break
            if malformed == before:  # the summary last, so that it never comes without the arrays
                if len(tasks) > 1:
                    _save(file, "rows", np.argsort(task_of, kind="stable"))
                if groups.any():
                    _save(file, "groups", groups)
                write_json(file.sidecar(_SUMMARY), list(tasks.items()))
    if malformed:
        raise ValueError(f"{path}: {list_problems(malformed, 'malformed line', problems)}")


def _save(file: JsonlFile, name: str, array: Ints) -> None:
    with atomic_write(file.sidecar(f"{name}.npy")) as sidecar:
        np.save(sidecar, array)


def _summaries(jobs: Sequence[tuple[JsonlFile, int, int]], total: int) -> Generator[Summary]:
    """Yield the summary of each job in order, from child processes where that is faster.

    Children are spawned: a fork of this process would copy threads and the state of a GPU.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cores or 1, len(jobs))
    if total <= _SMALL or workers < 2 or multiprocessing.current_process().daemon:
        yield from starmap(summarise, jobs)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _end_with_parent)
    main, mask = sys.modules["__main__"], signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        # The children start here, with Ctrl-C blocked: it is for this process. And without a main
        # module: they would import it, which would load torch or run a script again.
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            results = pool.map(summarise, *zip(*jobs, strict=True))
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield from results
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"{jobs[0][0].path}: a process that checked lines of this or a later file was killed "
            "(is there enough memory?); run again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this child process as soon as its parent ends, however that happens."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
