"""Example-based labelling (KaLM-Embedding V2, data curation): a class is learned from its texts.

For a text of a task with classes the positive is a random other text of the same class, not the
name of the class, and the negatives are texts of other classes. Both are drawn when the example is
read, from an index of the rows of each class that the check of the data leaves behind; the texts
themselves are never read whole.

Not here: the settings that make a task one of classes (records.py), and the generator (examples.py).
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kalm_min.data.checking import rows_of_groups
from kalm_min.data.jsonl import JsonlFile
from kalm_min.files import text_hash

_TRIES = 8  # draws of a positive before one of the query's own text is taken

Ints = npt.NDArray[np.int64]


class Drawn(NamedTuple):
    """What an example is trained on."""

    positive: str
    negatives: tuple[str, ...]
    groups: tuple[str, ...]
    """Of the negatives."""


class LabelIndex:
    """The rows of one task, as if written one after another, group by group.

    A place is a number in that order: the places of a group are one range, all others are the rest.
    """

    def __init__(self, task: str, parts: list[tuple[JsonlFile, int]]) -> None:
        """Join the indices of the files.

        Args:
            task: its name, for messages.
            parts: each file that holds rows of the task, and the task's number in that file.

        Raises ValueError, one sentence, for a task with one group only, or with a group of a single
        row: no positive can be drawn for it.
        """
        self._files = [file for file, _ in parts]
        self._orders: list[Ints] = []
        tables: list[Ints] = []
        for number, (file, number_in_file) in enumerate(parts):
            order, table = rows_of_groups(file)
            self._orders.append(order)
            table = table[table[:, 0] == number_in_file]
            tables.append(np.column_stack([np.full(len(table), number), table[:, 1:]]))
        joined = np.concatenate(tables)  # (entries, 4) part, hash, start, end
        joined = joined[np.argsort(joined[:, 1], kind="stable")]
        self._part, self._hash, self._start, end = np.ascontiguousarray(joined.T)
        self._ends = np.cumsum(end - self._start)  # place after each entry
        self._begins = self._ends - (end - self._start)
        self._refuse_what_cannot_be_drawn(task)

    def _refuse_what_cannot_be_drawn(self, task: str) -> None:
        firsts = np.flatnonzero(np.diff(self._hash, prepend=self._hash[0] - 1))
        if len(firsts) < 2:
            raise ValueError(
                f"{self._files[0].path}: expected texts of at least two groups in the label-based "
                f"task {task!r}, found one group"
            )
        begins = self._begins[firsts]
        single = np.flatnonzero(np.diff(begins, append=self._ends[-1]) == 1)
        if len(single):
            raise ValueError(
                f"{self._locate(int(begins[single[0]]))}: expected every group of the label-based "
                f"task {task!r} to have two rows or more, found {len(single)} "
                f"group{'s'[: len(single) - 1]} of a single one; remove or merge"
            )

    def _locate(self, place: int) -> str:
        part, row = self._row(place)
        return self._files[part].location(row)

    def _row(self, place: int) -> tuple[int, int]:
        """Part and row of a place."""
        entry = int(np.searchsorted(self._ends, place, side="right"))
        part = int(self._part[entry])
        return part, int(self._orders[part][self._start[entry] + place - self._begins[entry]])

    def _record(self, place: int) -> dict[str, Any]:
        part, row = self._row(place)
        return self._files[part][row]

    def _places(self, part: int, row: int, group: str) -> tuple[int, int, int]:
        """Where the group begins and ends, and the place of one of its rows."""
        key = text_hash(group)
        first, last = (int(np.searchsorted(self._hash, key, side)) for side in ("left", "right"))
        entry = first + int(np.searchsorted(self._part[first:last], part))
        start, size = int(self._start[entry]), int(self._ends[entry] - self._begins[entry])
        within = int(np.searchsorted(self._orders[part][start : start + size], row))
        return (
            int(self._begins[first]),
            int(self._ends[last - 1]),
            int(self._begins[entry]) + within,
        )

    def draw(
        self, part: int, row: int, record: dict[str, Any], count: int, rng: np.random.Generator
    ) -> Drawn:
        """A positive and `count` negatives (fewer where the other groups have fewer).

        A positive of the query's own text (data has duplicates) is drawn again a few times.
        """
        begin, end, own = self._places(part, row, str(record["group"]))
        positive = record["query"]
        for _ in range(_TRIES):
            place = begin + int(rng.integers(end - begin - 1))
            positive = self._record(place + (place >= own))["query"]
            if positive != record["query"]:
                break
        others = int(self._ends[-1]) - (end - begin)
        places: list[int] = rng.choice(others, min(count, others), replace=False).tolist()
        records = [self._record(place + (end - begin if place >= begin else 0)) for place in places]
        texts = tuple(other["query"] for other in records)
        return Drawn(positive, texts, tuple(str(other["group"]) for other in records))
