"""What a line of training data must hold, and the check of every line, once, on all cores.

Ranges of lines are summarised in this process or in child processes and joined in file order. What
was found in a file without malformed lines is cached.
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
from itertools import accumulate, groupby, starmap
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TextIO

import numpy as np

from kalm_min.console import Progress
from kalm_min.data.index import Ints, JsonlFile
from kalm_min.files import Object, parse_object, text_hash
from kalm_min.schema import (
    LISTED,
    Field,
    describe,
    is_label,
    is_number,
    is_string,
    is_text,
    list_problems,
    problem_with,
)

LINE = {  # the keys of a line of training data, in the usual order
    "query": Field("a non-empty string", is_text, required=True),
    "pos": Field("a list of at least one non-empty string", is_text, items=0),
    "neg": Field("a list of non-empty strings", is_text, items=0),
    "task": Field("a non-empty string", is_text),
    "instruction": Field("a string", is_string),
    "group": Field("a non-empty string or a whole number", is_label),
    "pos_scores": Field("a list of numbers", is_number, items=0),
    "neg_scores": Field("a list of numbers", is_number, items=0),
    "relevance": Field("a number", is_number),
}
_CHECKED = "checked"
_RANGE = 20_000  # lines summarised at a time
_SMALL = 100_000  # lines that are summarised before child processes would have started

# The number and the first of a task's rows ("rows") and of those without "pos", "group", "scores".
Counts = dict[str, list[int]]
Job = tuple[JsonlFile, int, int]  # a file, and its records from the first number to the second


class Segment(NamedTuple):
    """The rows of one file that belong to one task."""

    file: JsonlFile
    task: str | None  # as the lines name it
    counts: Counts
    rows: Ints | range  # numbers of records of the file
    groups: Ints  # (lines of the file,) hash of the group, 0 for no group; (0,) if no line has one


class Summary(NamedTuple):
    """The content of a range of lines."""

    tasks: dict[str | None, Counts]  # in order of appearance (None: unnamed)
    firsts: Ints  # (lines,) the number of the first record in the range that has the line's task
    groups: Ints  # (lines,) hash of the group; 0 for no group
    problems: list[str]  # `file:line: expected ..., found ...` of each malformed line


def problem_with_line(record: Object) -> str | None:
    """What is wrong with a line of training data, or None.

    A line with a group may have no positives: a label-based task draws them from the group.
    """
    if problem := problem_with(record, LINE):
        return problem
    if not record.get("pos") and record.get("group") is None:
        return f"expected 'pos' to be {LINE['pos'].expected}, found {describe(record.get('pos'))}"
    for key in ("pos", "neg"):
        scores, texts = record.get(f"{key}_scores"), record.get(key) or ()
        if scores is not None and len(scores) != len(texts):
            wanted = f"one number per {key!r}, {len(texts)}"
            return f"expected '{key}_scores' to hold {wanted}, found {len(scores)}"
    return None


def summarise(file: JsonlFile, start: int, stop: int) -> Summary:
    """Check records `start` to `stop` (exclusive)."""
    tasks, problems = dict[str | None, Counts](), list[str]()
    firsts, groups = np.zeros((2, stop - start), np.int64)
    for i, line in enumerate(file.lines(start, stop)):
        record: Object = {}
        try:
            record = parse_object(line, "")
            problem = problem_with_line(record)
        except ValueError as error:
            problem = str(error).removeprefix(": ")
        if problem:
            problems.append(f"{file.location(start + i)}: {problem}")
            continue
        if (group := record.get("group")) is not None:
            groups[i] = text_hash(json.dumps(group))
        counted = ["rows", *(key for key in ("pos", "group") if record.get(key) in (None, []))]
        if any(record.get(key) and record.get(f"{key}_scores") is None for key in ("pos", "neg")):
            counted.append("scores")
        counts = tasks.setdefault(record.get("task"), {})
        for what in counted:
            counts.setdefault(what, [0, start + i])[0] += 1
        firsts[i] = counts["rows"][1]
    return Summary(tasks, firsts, groups, problems)


def load_checked(file: JsonlFile) -> list[Segment] | None:
    """What was found in a file, task by task in order of appearance; None if it was not checked."""
    if (cache := file.load(_CHECKED)) is None:
        return None
    (array, note), total = cache, len(file)
    several = len(note["tasks"]) > 1
    rows, groups = array[:total] if several else range(total), array[several * total :]
    ends = accumulate(counts["rows"][0] for _, counts in note["tasks"])
    return [
        Segment(file, task, counts, rows[end - counts["rows"][0] : end], groups)
        for (task, counts), end in zip(note["tasks"], ends, strict=True)
    ]


def check_all(
    path: Path, files: Sequence[JsonlFile], progress: TextIO | None
) -> list[list[Segment]]:
    """The tasks of each of the `files` in `path`; those that have not been checked are checked.

    Raises ValueError with the first malformed lines, in the order of the files, and their number,
    or if a child process was killed. Reports on `progress` if it takes a while.
    """
    found = {file.path: load_checked(file) for file in files}
    new = [file for file in files if found[file.path] is None]
    jobs = [
        (file, start, min(start + _RANGE, len(file)))
        for file in new
        for start in range(0, len(file), _RANGE)
    ]
    problems, malformed, total = list[str](), 0, sum(map(len, new))
    stream = progress if progress and total > _SMALL else io.StringIO()
    bar = Progress(total, "lines", stream, title="check")
    with closing(_summaries(jobs, total)) as summaries, bar:
        for file, parts in groupby(zip(jobs, summaries, strict=True), lambda part: part[0][0]):
            before, tasks = malformed, dict[str | None, Counts]()
            # These take no memory until they are written; most files have one task and no groups.
            firsts, groups = np.zeros((2, len(file)), np.int64)
            for (_, start, stop), part in parts:
                malformed += len(part.problems)
                problems += part.problems[: LISTED - len(problems)]
                for task, more in part.tasks.items():
                    counts = tasks.setdefault(task, {})
                    for what, (count, first) in more.items():
                        counts.setdefault(what, [0, first])[0] += count
                if len(tasks) > 1:  # else 0 is right
                    of = {
                        one["rows"][1]: tasks[task]["rows"][1] for task, one in part.tasks.items()
                    }
                    firsts[start:stop] = [of.get(first, 0) for first in part.firsts.tolist()]
                if part.groups.any():
                    groups[start:stop] = part.groups
                bar.update(stop - start)
            if malformed == before:
                arrays = [np.argsort(firsts, kind="stable")] if len(tasks) > 1 else []
                arrays.append(groups if groups.any() else groups[:0])
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
