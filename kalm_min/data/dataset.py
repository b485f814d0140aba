"""Training data: files of records -> tasks of checked examples, under one global numbering.

    path (a file, or a folder of tasks) -> JsonlFile per file -> every line checked, once
         -> segments (task, file, rows), sorted by task -> data[i], an Example

Each file or sub-folder of a folder is a task. The "task" of a line takes precedence over the name
of its file, so a single file may hold many tasks. `<task>.toml` beside the data holds the settings
of a task. The outcome of the check is cached with the index: opening again reads no line.

Not here: the check (checking.py), and prompts and what is drawn (batches.py, labels.py).
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from kalm_min.data.checking import Counts, check_all, load_array, load_summary
from kalm_min.data.index import Ints, JsonlFile
from kalm_min.data.labels import LabelIndex
from kalm_min.data.records import SETTINGS, TaskSettings, read_settings
from kalm_min.files import did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One record, with the settings of its task applied."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    task: int
    """Position of the task in TrainingData.task_names."""
    index: int
    """Number of the example in TrainingData."""
    instruction: str | None = None
    """That of the line, else of the task, else the default."""
    group: str | None = None
    """Class label: examples of one task and group are not negatives of one another."""
    positive_scores: tuple[float, ...] | None = None
    """A teacher's, one per positive; likewise `negative_scores`."""
    negative_scores: tuple[float, ...] | None = None
    negative_groups: tuple[str, ...] | None = None
    """The group of each negative, in a label-based task."""
    symmetric: bool = False
    in_batch_negatives: bool = True


@dataclass(frozen=True, slots=True)
class _Segment:
    """Rows of one file that belong to one task."""

    task: str
    file: JsonlFile
    rows: Ints | range
    counts: Counts


class TrainingData:
    """All tasks of a run as one sequence of examples, task after task, tasks sorted by name.

    `task_names`, `task_sizes` and `settings` have one entry per task. Sending the data to another
    process sends the path: the other process opens the same cached index.

    Args:
        path: a JSONL(.gz) file or a folder of tasks. Lines that were not checked yet are checked.
        instruction: for examples whose line and task set none.
        cache_dir: see JsonlFile.
        progress: where a check that takes long is shown.

    Raises ValueError: for a folder, settings file or task that cannot be used, one sentence; for
    malformed lines, the first 20 as `file:line: expected ..., found ...` and their number.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        instruction: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: TextIO | None = None,
    ) -> None:
        path = Path(path)
        self._reopen = partial(type(self), path, instruction=instruction, cache_dir=cache_dir)
        self._instruction = instruction
        opened = [
            (task, JsonlFile(file, cache_dir))
            for task, files in _task_files(path).items()
            for file in files
        ]
        check_all(path, [file for _, file in opened], progress)
        segments = [segment for task, file in opened for segment in _segments(task, file)]
        self._segments = sorted(segments, key=lambda segment: segment.task)
        self._ends = list(accumulate(len(segment.rows) for segment in self._segments))
        tasks = {name: list(some) for name, some in groupby(self._segments, lambda one: one.task)}
        self.task_names = list(tasks)
        self.task_sizes = [sum(len(one.rows) for one in some) for some in tasks.values()]
        self._task_ends = list(accumulate(self.task_sizes))
        self.settings = _task_settings(path, self.task_names)
        self._labels = [self._label_index(task, tasks[name]) for task, name in enumerate(tasks)]

    def __reduce__(self) -> tuple[Callable[[], "TrainingData"], tuple[()]]:
        return self._reopen, ()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Example:
        """Example i, in a label-based task with 7 negatives and what epoch 0 of seed 0 draws."""
        return self.example(i, epoch=0, seed=0, num_negatives=7)

    def example(self, i: int, *, epoch: int, seed: int, num_negatives: int) -> Example:
        """Example i, numbered as TaskBatchSampler(task_sizes, ...) does.

        In a label-based task a positive and negatives are drawn from other lines: a pure function
        of (seed, epoch, i) and the data. Examples of other tasks have all texts of their line,
        whatever the epoch, seed and number.
        """
        i = range(len(self))[i]
        task, record = bisect_right(self._task_ends, i), self.record(i)
        negative_groups = None
        if labels := self._labels[task]:
            # The last number tells the generator from that of batches.py.
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch, i, 1)))
            first = self._task_ends[task] - self.task_sizes[task]
            positive, negatives = labels.draw(
                i - first, lambda row: self.record(first + row), num_negatives, rng
            )
            record |= {"pos": [positive["query"]], "neg": [other["query"] for other in negatives]}
            record |= {"pos_scores": None, "neg_scores": None}
            negative_groups = tuple(str(other["group"]) for other in negatives)
        settings, group = self.settings[task], record.get("group")
        instructions = (record.get("instruction"), settings.instruction, self._instruction)
        return Example(
            query=record["query"],
            positives=tuple(record.get("pos") or ()),
            negatives=tuple(record.get("neg") or ()),
            task=task,
            index=i,
            instruction=next((text for text in instructions if text is not None), None),
            group=None if group is None else str(group),
            positive_scores=_floats(record.get("pos_scores")),
            negative_scores=_floats(record.get("neg_scores")),
            negative_groups=negative_groups,
            symmetric=settings.symmetric,
            in_batch_negatives=settings.in_batch_negatives,
        )

    def record(self, i: int) -> dict[str, Any]:
        """The line of example i as it stands in the file."""
        file, row = self._locate(i)
        return file[row]

    def location(self, i: int) -> str:
        """`file:line` of example i."""
        file, row = self._locate(i)
        return file.location(row)

    def _locate(self, i: int) -> tuple[JsonlFile, int]:
        """File and row of example i."""
        i = range(len(self))[i]
        number = bisect_right(self._ends, i)
        segment = self._segments[number]
        return segment.file, int(segment.rows[i - self._ends[number]])

    def require_scores(self) -> None:
        """Raise ValueError at the first line without a teacher's scores of all its texts."""
        for task, settings in zip(self.task_names, self.settings, strict=True):
            if settings.label_based:
                raise ValueError(
                    f"{task}.toml: expected label_based = false to distil, found true: what is "
                    "drawn at load time has no teacher's scores"
                )
        _require("scores", self._segments, "expected pos_scores and neg_scores to distil")

    def _label_index(self, task: int, segments: list[_Segment]) -> LabelIndex | None:
        """The groups of a label-based task. Raises ValueError for rows that the task cannot use."""
        name = self.task_names[task]
        if not self.settings[task].label_based:
            expected = (
                "expected 'pos' to be a list of at least one non-empty string, or label_based = "
                f"true in {name}.toml to draw positives from the line's group"
            )
            _require("pos", segments, expected)
            return None
        _require("group", segments, "expected 'group' in every line of a label-based task")
        hashes = np.concatenate(
            [load_array(one.file, "groups")[np.asarray(one.rows)] for one in segments]
        )
        first = self._task_ends[task] - self.task_sizes[task]
        return LabelIndex(hashes, name, lambda row: self.location(first + row))


def _floats(scores: list[float] | None) -> tuple[float, ...] | None:
    return None if scores is None else tuple(map(float, scores))


def _require(what: str, segments: Sequence[_Segment], expected: str) -> None:
    """Raise ValueError at the first row that lacks "pos", "group" or "scores"."""
    for segment in segments:
        count, row = segment.counts.get(what, (0, 0))
        if count:
            raise ValueError(
                f"{segment.file.location(row)}: {expected}, found none in {count} "
                f"line{'s'[: count - 1]} of this file"
            )


def _segments(task: str, file: JsonlFile) -> list[_Segment]:
    """The rows of a checked file by task; those that name no task belong to `task`."""
    summary = load_summary(file)
    assert summary, "the file was checked"
    rows = load_array(file, "rows") if len(summary) > 1 else range(len(file))
    ends = list(accumulate(counts["rows"][0] for _, counts in summary))
    return [
        _Segment(name or task, file, rows[end - counts["rows"][0] : end], counts)
        for (name, counts), end in zip(summary, ends, strict=True)
    ]


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
    """The content of a folder, sorted; hidden entries, README and settings files are not data."""
    return sorted(
        entry
        for entry in folder.iterdir()
        if not entry.name.startswith((".", "README")) and entry.suffix != ".toml"
    )


def _task_name(path: Path) -> str:
    """The file's name without .jsonl or .jsonl.gz."""
    name = path.name.removesuffix(".gz")
    if path.is_file() and name.endswith(".jsonl"):
        return name.removesuffix(".jsonl")
    found = "a folder" if path.is_dir() else "another file" if path.exists() else "nothing there"
    raise ValueError(f"{path}: expected a .jsonl or .jsonl.gz file, found {found}")


def _task_settings(path: Path, tasks: list[str]) -> list[TaskSettings]:
    """The settings of each task; in a folder, every settings file must have its task."""
    found: dict[str, TaskSettings] = {}
    for file in sorted((path if path.is_dir() else path.parent).glob("[!.]*.toml")):
        if file.stem in tasks:
            found[file.stem] = TaskSettings(**read_settings(file, SETTINGS))
        elif path.is_dir():  # what else lies beside a single file may be anything
            raise ValueError(
                f"{file}: expected the settings of a task beside it, found none named "
                f"{file.stem!r}{did_you_mean(file.stem, tasks)}"
            )
    return [found.get(task, TaskSettings()) for task in tasks]
