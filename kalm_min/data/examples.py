"""Training data: files of records -> tasks of checked examples, under one global numbering.

    path (a file, or a folder of tasks) -> JsonlFile per file -> every line checked, once
         -> segments (task, file, rows), sorted by task -> data[i], an Example

Each file or sub-folder of a folder is a task. A line's own "task" wins over the name of its file,
so a single file may hold many tasks. `<task>.toml` beside the data holds the settings of a task.
The outcome of the check is cached with the index of each file: opening again reads no line.

Not here: the check itself (checking.py), drawing positives and negatives (batches.py, labels.py),
and prompts (batches.py).
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np
import numpy.typing as npt

from kalm_min.data.checking import TaskAccount, account, check_all, rows_of_tasks
from kalm_min.data.jsonl import JsonlFile
from kalm_min.data.labels import LabelIndex
from kalm_min.data.records import SETTINGS, TaskSettings, read_settings
from kalm_min.files import did_you_mean

_LABEL_DRAW = 1  # the purpose of a generator, beside those of batches.py
_NEGATIVES = 7  # of an example of a label-based task that is read without saying how many


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
    negative_groups: tuple[str, ...] | None = None
    """Of a label-based task: the group of each negative."""
    symmetric: bool = False
    in_batch_negatives: bool = True


@dataclass(frozen=True, slots=True)
class _Segment:
    """Rows of one file that belong to one task; rows None: all of them, in order."""

    task: str
    file: JsonlFile
    number: int
    """Of the task in the file's account."""
    rows: npt.NDArray[np.int64] | None
    account: TaskAccount


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
        self._ends = list(accumulate(segment.account.rows for segment in self._segments))
        tasks = {name: list(own) for name, own in groupby(self._segments, lambda one: one.task)}
        self.task_names = list(tasks)
        self.task_sizes = [sum(one.account.rows for one in own) for own in tasks.values()]
        self._task_ends = list(accumulate(self.task_sizes))
        self.settings = [settings.get(name, TaskSettings()) for name in tasks]
        self._first_segments = [0, *accumulate(len(own) for own in tasks.values())]
        self._labels = [
            _label_index(own) if task.label_based else _refuse_unpaired(own)
            for own, task in zip(tasks.values(), self.settings, strict=True)
        ]
        self._instruction = instruction
        self._reopen = reopen

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        instruction: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: TextIO | None = None,
    ) -> Self:
        """Open a JSONL(.gz) file or a folder of tasks; check every line that was not checked yet.

        Args:
            path: the file or folder.
            instruction: for examples whose line and task set none.
            cache_dir: see JsonlFile.
            progress: where a check that takes long is shown.

        Raises ValueError: for a folder, settings file or task that cannot be used, one sentence; for
        malformed lines, the first 20 as `file:line: expected ..., found ...` and their number.
        """
        path = Path(path)
        opened = [
            (task, JsonlFile(file, cache_dir))
            for task, files in _task_files(path).items()
            for file in files
        ]
        check_all(path, [file for _, file in opened], progress)
        segments = [segment for task, file in opened for segment in _segments(task, file)]
        settings = _all_settings(path, {segment.task for segment in segments})
        reopen = partial(cls.open, path, instruction=instruction, cache_dir=cache_dir)
        return cls(segments, settings, instruction, reopen)

    def __reduce__(self) -> tuple[Callable[[], Self], tuple[()]]:
        return self._reopen, ()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Example:
        """Example i, numbered as TaskBatchSampler(task_sizes, ...) does.

        Of a label-based task, with what epoch 0 of seed 0 draws.
        """
        return self.example(i, epoch=0, seed=0, num_negatives=_NEGATIVES)

    def example(self, i: int, *, epoch: int, seed: int, num_negatives: int) -> Example:
        """Example i with, in a label-based task, a positive and negatives drawn from other lines.

        The draw is a pure function of (seed, epoch, i) and the data. Other tasks bring what their
        lines hold, whatever the epoch, seed and number.
        """
        i = range(len(self))[i]
        number, row = self._locate(i)
        record = self._segments[number].file[row]
        example = self._example(record, i)
        labels = self._labels[example.task]
        if labels is None:
            return example
        key = np.random.SeedSequence(seed, spawn_key=(epoch, i, _LABEL_DRAW))
        part = number - self._first_segments[example.task]
        drawn = labels.draw(part, row, record, num_negatives, np.random.default_rng(key))
        return replace(
            example,
            positives=(drawn.positive,),
            negatives=drawn.negatives,
            negative_groups=drawn.groups,
            positive_scores=None,
            negative_scores=None,
        )

    def record(self, i: int) -> dict[str, Any]:
        """The line of example i as it stands in the file."""
        number, row = self._locate(range(len(self))[i])
        return self._segments[number].file[row]

    def refuse_unscored(self) -> None:
        """Raise ValueError at the first line without a teacher's scores of all its texts."""
        for task, labels in zip(self.task_names, self._labels, strict=True):
            if labels is not None:
                raise ValueError(
                    f"{task}.toml: expected label_based = false to distil, found true: what is "
                    "drawn at load time has no teacher's scores"
                )
        _refuse_without("scores", self._segments, "expected pos_scores and neg_scores to distil")

    def location(self, i: int) -> str:
        """`file:line` of example i."""
        number, row = self._locate(range(len(self))[i])
        return self._segments[number].file.location(row)

    def _locate(self, i: int) -> tuple[int, int]:
        """Number of the segment, and row in its file."""
        number = bisect_right(self._ends, i)
        segment = self._segments[number]
        row = i - (self._ends[number] - segment.account.rows)
        return number, row if segment.rows is None else int(segment.rows[row])

    def _example(self, record: dict[str, Any], i: int) -> Example:
        task = bisect_right(self._task_ends, i)
        settings = self.settings[task]
        instructions = (record.get("instruction"), settings.instruction, self._instruction)
        group = record.get("group")
        return Example(
            query=record["query"],
            positives=tuple(record.get("pos") or ()),
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
                f"found none named {file.stem!r}{did_you_mean(file.stem, tasks)}"
            )
    return {file.stem: TaskSettings(**read_settings(file, SETTINGS)) for file in files}


# ---- tasks of checked files ----------------------------------------------------------------------


def _segments(task: str, file: JsonlFile) -> Iterator[_Segment]:
    """The rows of a checked file by task; those that name none belong to `task`."""
    accounts = account(file)
    assert accounts, "the file was checked"
    rows = rows_of_tasks(file) if len(accounts) > 1 else None
    end = 0
    for number, one in enumerate(accounts):
        start, end = end, end + one.rows
        part = None if rows is None else rows[start:end]
        yield _Segment(one.task or task, file, number, part, one)


def _label_index(segments: list[_Segment]) -> LabelIndex:
    """The groups of a label-based task. Raises ValueError where a row has none."""
    _refuse_without("group", segments, "expected 'group' in every line of a label-based task")
    return LabelIndex(segments[0].task, [(segment.file, segment.number) for segment in segments])


def _refuse_unpaired(segments: list[_Segment]) -> None:
    """Raise ValueError where a task that is not label-based has rows without positives."""
    _refuse_without(
        "pos",
        segments,
        "expected 'pos' to be a list of at least one non-empty string, or label_based = true in "
        f"{segments[0].task}.toml to draw positives from the line's group",
    )


def _refuse_without(what: str, segments: Iterable[_Segment], expected: str) -> None:
    """Raise ValueError at the first row that lacks something."""
    for segment in segments:
        count, row = segment.account.lacking.get(what, (0, 0))
        if count:
            raise ValueError(
                f"{segment.file.location(row)}: {expected}, found none in {count} "
                f"line{'s'[: count - 1]} of this file"
            )
