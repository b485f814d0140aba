"""Training data: files of records -> tasks of checked examples, under one global numbering.

    path (a file, or a folder of tasks) -> JsonlFile per file -> every line checked, once
         -> segments (task, file, rows), sorted by task -> data[i], an Example

Each file or sub-folder of a folder is a task. A line's own "task" wins over the name of its file,
so a single file may hold many tasks. `<task>.toml` beside the data holds the settings of a task.
The outcome of the check is cached with the index of each file: opening again reads no line.

Not here: drawing positives and negatives, and prompts (batches.py).
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kalm_min.data.jsonl import JsonlFile
from kalm_min.data.schema import TaskSettings, nearest, problem_with, read_settings
from kalm_min.files import atomic_write, read_json, write_json

_CHECKED = "checked1.json"  # raised when the rules of schema.py change
_LISTED = 20  # malformed lines shown; the rest are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One record, with the settings of its task applied."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    task: int
    """Number of the task in TrainingData.task_names."""
    index: int
    """Number of the example in TrainingData."""
    instruction: str | None = None
    """The line's own, else the task's, else the default."""
    group: str | None = None
    """Class label: examples of one task and group are not negatives of one another."""
    positive_scores: tuple[float, ...] | None = None
    """Of a teacher, aligned with `positives`; likewise `negative_scores`."""
    negative_scores: tuple[float, ...] | None = None
    symmetric: bool = False
    in_batch_negatives: bool = True


@dataclass(frozen=True, slots=True)
class _Segment:
    """Rows of one file that belong to one task; rows None: all of them, in order."""

    task: str
    file: JsonlFile
    rows: npt.NDArray[np.int64] | None
    size: int


class TrainingData:
    """All tasks of a run as one sequence of examples, task after task, tasks sorted by name.

    `task_names`, `task_sizes` and `settings` run in parallel. Made by `TrainingData.open`.
    Sending it to another process sends the path: the other opens the same cached index.
    """

    def __init__(
        self,
        segments: Iterable[_Segment],
        settings: dict[str, TaskSettings],
        instruction: str | None,
        reopen: Callable[[], Self],
    ) -> None:
        self._segments = sorted(segments, key=lambda segment: segment.task)
        self._ends = list(accumulate(segment.size for segment in self._segments))
        self.task_names = sorted({segment.task for segment in self._segments})
        self.task_sizes = [
            sum(segment.size for segment in self._segments if segment.task == name)
            for name in self.task_names
        ]
        self._task_ends = list(accumulate(self.task_sizes))
        self.settings = [settings.get(name, TaskSettings()) for name in self.task_names]
        self._instruction = instruction
        self._reopen = reopen

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        instruction: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Open a JSONL(.gz) file or a folder of tasks; check every line that was not checked yet.

        Args:
            path: the file or folder.
            instruction: for examples whose line and task set none.
            cache_dir: see JsonlFile.

        Raises ValueError: for a folder or settings file that cannot be used, one sentence; for
        malformed lines, the first 20 as `file:line: expected ..., found ...` and their number.
        """
        path = Path(path)
        opened = [
            (task, JsonlFile(file, cache_dir))
            for task, files in _task_files(path).items()
            for file in files
        ]
        _check_all(path, [file for _, file in opened])
        segments = [segment for task, file in opened for segment in _segments(task, file)]
        settings = _all_settings(path, {segment.task for segment in segments})
        reopen = partial(cls.open, path, instruction=instruction, cache_dir=cache_dir)
        return cls(segments, settings, instruction, reopen)

    def __reduce__(self) -> tuple[Callable[[], Self], tuple[()]]:
        return self._reopen, ()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Example:
        """Example i, numbered as TaskBatchSampler(task_sizes, ...) does."""
        i = range(len(self))[i]
        file, row = self._locate(i)
        return self._example(file[row], i)

    def location(self, i: int) -> str:
        """`file:line` of example i."""
        file, row = self._locate(range(len(self))[i])
        return file.location(row)

    def _locate(self, i: int) -> tuple[JsonlFile, int]:
        number = bisect_right(self._ends, i)
        segment = self._segments[number]
        row = i - (self._ends[number] - segment.size)
        return segment.file, row if segment.rows is None else int(segment.rows[row])

    def _example(self, record: dict[str, Any], i: int) -> Example:
        task = bisect_right(self._task_ends, i)
        settings = self.settings[task]
        instructions = (record.get("instruction"), settings.instruction, self._instruction)
        group = record.get("group")
        return Example(
            query=record["query"],
            positives=tuple(record["pos"]),
            negatives=tuple(record.get("neg") or ()),
            task=task,
            index=i,
            instruction=next((text for text in instructions if text is not None), None),
            group=None if group is None else str(group),
            positive_scores=_scores(record.get("pos_scores")),
            negative_scores=_scores(record.get("neg_scores")),
            symmetric=settings.symmetric,
            in_batch_negatives=settings.in_batch_negatives,
        )


def _scores(values: list[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


# ---- files of a folder ---------------------------------------------------------------------------


def _task_files(path: Path) -> dict[str, list[Path]]:
    """The files of each task, in order of their names."""
    if not path.is_dir():
        return {_task_name(path): [path]}
    files: dict[str, list[Path]] = {}
    for entry in _entries(path):
        name = entry.name if entry.is_dir() else _task_name(entry)
        if name in files:
            raise ValueError(f"{entry}: expected one file or folder per task, found {name!r} twice")
        files[name] = _entries(entry) if entry.is_dir() else [entry]
        if not files[name]:
            raise ValueError(f"{entry}: expected JSONL files of task {name!r}, found none")
        if len({_task_name(part) for part in files[name]}) < len(files[name]):
            raise ValueError(f"{entry}: expected each file once, found one compressed and not")
    if not files:
        raise ValueError(f"{path}: expected a folder with a JSONL file per task, found none")
    return files


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted; hidden entries, README and settings files are not data."""
    return sorted(
        entry
        for entry in folder.iterdir()
        if not entry.name.startswith((".", "README")) and entry.suffix != ".toml"
    )


def _task_name(path: Path) -> str:
    """The file's name without .jsonl or .jsonl.gz."""
    for suffix in (".jsonl.gz", ".jsonl"):
        if path.name.endswith(suffix) and path.is_file():
            return path.name.removesuffix(suffix)
    found = "a folder" if path.is_dir() else "another file" if path.exists() else "nothing there"
    raise ValueError(f"{path}: expected a .jsonl or .jsonl.gz file, found {found}")


def _all_settings(path: Path, tasks: set[str]) -> dict[str, TaskSettings]:
    """The settings beside the data; those of a folder must all have their task."""
    files = sorted((path if path.is_dir() else path.parent).glob("[!.]*.toml"))
    if not path.is_dir():
        # What else lies beside a single file may be anything.
        files = [file for file in files if file.stem in tasks]
    for file in files:
        if file.stem not in tasks:
            raise ValueError(
                f"{file}: expected the settings of a task beside it, "
                f"found none of that name: {nearest(file.stem, tasks)}"
            )
    return {file.stem: read_settings(file) for file in files}


# ---- the check of every line ---------------------------------------------------------------------


def _check_all(path: Path, files: Iterable[JsonlFile]) -> None:
    """Check the lines of all files that were not checked before; raise for all of them at once."""
    problems: list[str] = []
    count = 0
    for file in files:
        if _tasks(file) is None:
            for problem in _check(file):
                count += 1
                problems += [problem][: _LISTED - len(problems)]
    if count:
        first = f", the first {_LISTED}" if count > _LISTED else ""
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{path}: {count} malformed line{'s'[: count - 1]}{first}:{lines}")


def _check(file: JsonlFile) -> Iterator[str]:
    """Yield `file:line: expected ..., found ...` for each malformed line; without any, cache so.

    The cache holds the tasks named in the file with their number of rows, in order of appearance
    (null: no name), and if there are several the rows, sorted by task.
    """
    numbers: dict[str | None, int] = {}
    task_of = np.zeros(len(file), np.int32)
    clean = True
    for row in range(len(file)):
        try:
            record = file[row]
        except ValueError as error:
            clean = False
            yield str(error)
            continue
        if problem := problem_with(record):
            clean = False
            yield f"{file.location(row)}: {problem}"
        elif number := numbers.setdefault(record.get("task"), len(numbers)):
            task_of[row] = number  # not for 0, so that the usual file of one task needs no memory
    if clean:
        sizes = [len(file)]
        if len(numbers) > 1:
            sizes = np.bincount(task_of).tolist()
            with atomic_write(file.sidecar("rows.npy")) as rows:
                np.save(rows, np.argsort(task_of, kind="stable"))
        write_json(file.sidecar(_CHECKED), list(zip(numbers, sizes, strict=True)))


def _tasks(file: JsonlFile) -> list[tuple[str | None, int]] | None:
    """The tasks in a checked file with their number of rows; None if it was not checked yet."""
    path = file.sidecar(_CHECKED)
    if not path.exists():
        return None
    return [(name, size) for name, size in read_json(path)]


def _segments(task: str, file: JsonlFile) -> Iterator[_Segment]:
    """The rows of a checked file by task; those that name none belong to `task`."""
    tasks = _tasks(file)
    assert tasks, "the file was checked"
    if len(tasks) == 1:
        yield _Segment(tasks[0][0] or task, file, None, tasks[0][1])
        return
    rows: npt.NDArray[np.int64] = np.asarray(np.load(file.sidecar("rows.npy"), mmap_mode="r"))
    end = 0
    for name, size in tasks:
        start, end = end, end + size
        yield _Segment(name or task, file, rows[start:end], size)
