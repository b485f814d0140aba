"""Training data: from files of records to tasks of checked examples under one global numbering.

Each file or sub-folder of a folder is a task. The "task" of a line takes precedence over the name
of its file, so a single file may hold many tasks. `<task>.toml` beside the data holds the settings
of a task. Every line is checked once; the outcome is cached with the index of its file, so opening
again reads no line. The check is in checking.py, prompts and batches are in batches.py.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated, TextIO, get_type_hints

import numpy as np

from kalm_min.console import count
from kalm_min.data.checking import LINE, Segment, check_all
from kalm_min.data.index import Ints, JsonlFile
from kalm_min.files import Object, did_you_mean, digest, escape_name, text_hash
from kalm_min.schema import Field, is_flag, is_number, is_string, is_whole, read_settings

_TRIES = 8  # draws of a positive before one with the text of the query is accepted
_FLAG = Field("true or false", is_flag)
_WEIGHT = Field("a number from 0 to 1000", lambda value: is_number(value, 0, 1000))
_COUNT = Field("a whole number, 1 or more", lambda value: is_whole(value, least=1))


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """What `<task>.toml` beside the data may set."""

    # For lines without an instruction. "" means none, even if the run has a default.
    instruction: Annotated[str | None, LINE["instruction"]] = None
    # Queries and documents are of one kind (similarity, duplicates): both get the instruction.
    symmetric: Annotated[bool, _FLAG] = False
    # False: the candidates of a query are only the documents of its line.
    in_batch_negatives: Annotated[bool, _FLAG] = True
    # Positives are other texts of the line's group, negatives texts of other groups;
    # what the lines hold as "pos" and "neg" is not trained on, and "pos" may be absent.
    label_based: Annotated[bool, _FLAG] = False
    # How often an epoch takes each example; 0.5 is half of them, a new half in each epoch.
    weight: Annotated[float, _WEIGHT] = 1.0
    # The maximum number of examples per epoch, a new subset in each epoch.
    max_examples: Annotated[int | None, _COUNT] = None


_SETTINGS: dict[str, Field] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(TaskSettings, include_extras=True).items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One record, with the settings of its task applied."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    task: int  # position of the task in TrainingData.task_names
    index: int  # number of the example in TrainingData
    instruction: str | None = None  # the line's, else the task's, else the default
    # The class: examples of one task and group are not each other's negatives. 1 and "1" are two.
    group: str | int | None = None
    positive_scores: tuple[float, ...] | None = None  # a teacher's, one per positive
    negative_scores: tuple[float, ...] | None = None  # a teacher's, one per negative
    negative_groups: tuple[str | int, ...] | None = None  # in a label-based task, one per negative
    symmetric: bool = False
    in_batch_negatives: bool = True


class TrainingData:
    """All tasks of a run as one sequence of examples, task after task, tasks sorted by name.

    `task_names`, `task_sizes` and `settings` have one entry per task. `fingerprint` is a digest of
    every line, in order, and of everything in the settings: a run can go on only on data with the
    same one. Sending the data to another process sends the path: the other process opens the same
    cached index.

    Args:
        path: a JSONL(.gz) file or a folder of tasks. Lines that have not been checked are checked.
        instruction: for examples whose line and task set none.
        cache_dir: see JsonlFile.
        progress: the stream on which a long check reports.

    Raises ValueError: one sentence for a folder, settings file or task that cannot be used; for
    malformed lines, their number and the first 20 as `file:line: expected ..., found ...`.
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
        self.instruction = instruction
        files = [(name, JsonlFile(file, cache_dir)) for name, file in _find_files(path)]
        checked = check_all(path, [file for _, file in files], progress)
        tasks: dict[str, list[Segment]] = {}
        for (file_name, _), segments in zip(files, checked, strict=True):
            for segment in segments:
                tasks.setdefault(segment.task or file_name, []).append(segment)
        self.task_names = sorted(tasks)
        self.task_sizes = [sum(len(one.rows) for one in tasks[n]) for n in self.task_names]
        self.settings = _task_settings(path, self.task_names)
        self._segments = [segment for name in self.task_names for segment in tasks[name]]
        self._ends = list(accumulate(len(one.rows) for one in self._segments))
        self._task_ends = list(accumulate(self.task_sizes))
        self._by_group: dict[int, tuple[Ints, Ints]] = {}
        contents = [(name, file.digest) for name, file in files]
        settings = [asdict(one) for one in self.settings]
        self.fingerprint = digest(json.dumps([contents, settings, instruction]))
        for task, (name, settings) in enumerate(zip(self.task_names, self.settings, strict=True)):
            if settings.label_based:
                expected = "expected 'group' in every line of a label-based task"
                _require("group", tasks[name], expected)
                self._by_group[task] = self._group(task, tasks[name])
            else:
                texts = "expected 'pos' to be a list of at least one non-empty string"
                other = f"label_based = true in {escape_name(name)}.toml to draw positives from the line's group"
                _require("pos", tasks[name], f"{texts}, or {other}")

    def __reduce__(self) -> tuple[Callable[[], "TrainingData"], tuple[()]]:
        return self._reopen, ()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Example:
        """Example i; in a label-based task as epoch 0 of seed 0 draws it, with 7 negatives."""
        return self.example(i, epoch=0, seed=0, num_negatives=7)

    def example(self, i: int, *, epoch: int, seed: int, num_negatives: int) -> Example:
        """Example i, numbered as TaskBatchSampler(task_sizes, ...) does.

        In a label-based task a positive and negatives are drawn from other lines: a pure function
        of (seed, epoch, i) and the data. Examples of other tasks have all texts of their line,
        whatever the epoch, seed and number.
        """
        i = range(len(self))[i]
        task, record, negative_groups = bisect_right(self._task_ends, i), self.record(i), None
        settings = self.settings[task]
        if task in self._by_group:
            # The last number distinguishes this generator from that of batches.py.
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch, i, 1)))
            positive, negatives = self._draw(i, record, task, num_negatives, rng)
            negative_groups = tuple(other["group"] for other in negatives)
            texts = [other["query"] for other in negatives]
            record |= {"pos": [positive], "neg": texts, "pos_scores": None, "neg_scores": None}
        given = (record.get("pos_scores"), record.get("neg_scores"))
        scores = [None if some is None else tuple(map(float, some)) for some in given]
        instructions = (record.get("instruction"), settings.instruction, self.instruction)
        return Example(
            query=record["query"],
            positives=tuple(record.get("pos") or ()),
            negatives=tuple(record.get("neg") or ()),
            task=task,
            index=i,
            instruction=next((text for text in instructions if text is not None), None),
            group=record.get("group"),
            positive_scores=scores[0],
            negative_scores=scores[1],
            negative_groups=negative_groups,
            symmetric=settings.symmetric,
            in_batch_negatives=settings.in_batch_negatives,
        )

    def _group(self, task: int, segments: list[Segment]) -> tuple[Ints, Ints]:
        """The examples of a label-based task, sorted by group, and the hash of each one's group.

        Raises ValueError for a single group, and for a group of one row, which has no positive.
        """
        some = [one.groups[np.asarray(one.rows)] for one in segments]
        hashes, first = np.concatenate(some), self._task_ends[task] - self.task_sizes[task]
        order = np.argsort(hashes, kind="stable")
        _, starts, sizes = np.unique(hashes[order], return_index=True, return_counts=True)
        name = f"the label-based task {self.task_names[task]!r}"
        if len(starts) < 2:
            expected = f"expected texts of at least two groups in {name}, found one group"
            raise ValueError(f"{self.location(first)}: {expected}")
        if len(single := starts[sizes == 1]):
            found = f"{count(len(single), 'group')} of a single one; remove or merge"
            expected = f"expected every group of {name} to have two rows or more, found {found}"
            raise ValueError(f"{self.location(first + int(order[single[0]]))}: {expected}")
        return first + order, hashes[order]

    def _draw(
        self, i: int, record: Object, task: int, number: int, rng: np.random.Generator
    ) -> tuple[str, list[Object]]:
        """A positive of the group of example i, and at most `number` records of other groups.

        Example-based labelling (KaLM-Embedding V2, data curation): a class is learned from its
        texts, not from its name. If a positive has the text of the query (data has duplicates),
        another is drawn, a few times.
        """
        numbers, hashes = self._by_group[task]
        key = text_hash(json.dumps(record["group"]))
        start, end = (int(np.searchsorted(hashes, key, side)) for side in ("left", "right"))
        group, positive = numbers[start:end], record["query"]
        position = int(np.searchsorted(group, i))
        for _ in range(_TRIES):
            drawn = int(rng.integers(len(group) - 1))
            positive = self.record(int(group[drawn + (drawn >= position)]))["query"]
            if positive != record["query"]:
                break
        others = len(numbers) - len(group)
        chosen = rng.choice(others, min(number, others), replace=False)
        chosen[chosen >= start] += len(group)
        return positive, [self.record(other) for other in numbers[chosen].tolist()]

    def record(self, i: int) -> Object:
        """The parsed line of example i."""
        file, row = self._locate(i)
        return file[row]

    def location(self, i: int) -> str:
        """`file:line` of example i."""
        file, row = self._locate(i)
        return file.location(row)

    def _locate(self, i: int) -> tuple[JsonlFile, int]:
        i = range(len(self))[i]
        number = bisect_right(self._ends, i)
        segment = self._segments[number]
        return segment.file, int(segment.rows[i - self._ends[number]])

    def require_scores(self) -> None:
        """Raise ValueError at the first line without a teacher's scores of all its texts."""
        for task, settings in zip(self.task_names, self.settings, strict=True):
            if settings.label_based:
                raise ValueError(
                    f"{escape_name(task)}.toml: expected label_based = false to distil, found true: "
                    "what is drawn has no teacher's scores"
                )
        _require("scores", self._segments, "expected pos_scores and neg_scores to distil")


def _require(what: str, segments: Iterable[Segment], expected: str) -> None:
    """Raise ValueError at the first row that lacks "pos", "group" or "scores"."""
    for segment in segments:
        if what in segment.counts:
            lines, row = segment.counts[what]
            found = f"found none in {count(lines, 'line')} of this file"
            raise ValueError(f"{segment.file.location(row)}: {expected}, {found}")


def _find_files(path: Path) -> list[tuple[str, Path]]:
    """The files of a folder of tasks, or a single file, each with the name of its task."""
    files: dict[str, list[Path]] = {}
    for entry in _entries(path) if path.is_dir() else [path]:
        name = entry.name if entry.is_dir() else _file_name(entry)
        if not is_string(name):
            raise ValueError(f"{path}: expected a file name in UTF-8, found {name!r}")
        if name in files:
            raise ValueError(f"{entry}: expected one file or folder per task, found {name!r} twice")
        files[name] = _entries(entry) if entry.is_dir() else [entry]
        if not files[name]:
            raise ValueError(f"{entry}: expected JSONL files of task {name!r}, found none")
        if len({_file_name(part) for part in files[name]}) < len(files[name]):
            raise ValueError(f"{entry}: expected each file once, found one compressed and not")
    if not files:
        raise ValueError(f"{path}: expected a folder with a JSONL file per task, found none")
    return [(name, file) for name, parts in files.items() for file in parts]


def _entries(folder: Path) -> list[Path]:
    """The content of a folder, sorted; hidden entries, README and settings files are not data."""
    return sorted(
        entry
        for entry in folder.iterdir()
        if not entry.name.startswith((".", "README")) and entry.suffix != ".toml"
    )


def _file_name(path: Path) -> str:
    """The file's name without .jsonl or .jsonl.gz."""
    name, suffix, more = path.name.rpartition(".jsonl")
    if path.is_file() and suffix and more in ("", ".gz"):
        return name
    found = "a folder" if path.is_dir() else "another file" if path.exists() else "nothing there"
    is_table = path.name.removesuffix(".gz").endswith((".csv", ".tsv", ".parquet", ".json"))
    convert = f"; convert it: kalm-min convert {path} --output FOLDER" if is_table else ""
    raise ValueError(f"{path}: expected a .jsonl or .jsonl.gz file, found {found}{convert}")


def _task_settings(path: Path, tasks: list[str]) -> list[TaskSettings]:
    """The settings of each task; every settings file in a folder must belong to a task."""
    found: dict[str, TaskSettings] = {}
    names = {escape_name(task): task for task in tasks}
    for file in sorted((path if path.is_dir() else path.parent).glob("[!.]*.toml")):
        if file.stem in names:
            found[names[file.stem]] = TaskSettings(**read_settings(file, _SETTINGS))
        elif path.is_dir():  # other files beside a single file may be anything
            raise ValueError(
                f"{file}: expected the settings of a task beside it, found none named "
                f"{file.stem!r}{did_you_mean(file.stem, names)}"
            )
    return [found.get(task, TaskSettings()) for task in tasks]
