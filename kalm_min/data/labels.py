"""Example-based labelling (KaLM-Embedding V2, data curation): a class is learned from its texts.

For a text of a task with classes the positive is a random other text of the same class, not the
name of the class, and the negatives are texts of other classes. Both are drawn when the example is
read, from the rows of each class; no more texts are read than are drawn.

Not here: the settings that make a task label-based (records.py), and the generator (dataset.py).
"""

from collections.abc import Callable, Mapping

import numpy as np

from kalm_min.data.index import Ints
from kalm_min.files import text_hash

_TRIES = 8  # draws of a positive before one with the text of the query is taken

Record = Mapping[str, object]


class LabelIndex:
    """The rows of one label-based task, ordered by group; a group is a range of this order.

    Args:
        hashes: (rows,) hash of the group of each row of the task.
        task: its name, for messages.
        location: `file:line` of a row of the task, for messages.

    Raises ValueError for a task with one group only, or with a group of a single row: no positive
    can be drawn for it.
    """

    def __init__(self, hashes: Ints, task: str, location: Callable[[int], str]) -> None:
        self._rows = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._rows]
        _, starts, sizes = np.unique(self._hashes, return_index=True, return_counts=True)
        if len(starts) < 2:
            raise ValueError(
                f"{location(0)}: expected texts of at least two groups in the label-based task "
                f"{task!r}, found one group"
            )
        if len(single := starts[sizes == 1]):
            raise ValueError(
                f"{location(int(self._rows[single[0]]))}: expected every group of the label-based "
                f"task {task!r} to have two rows or more, found {len(single)} "
                f"group{'s'[: len(single) - 1]} of a single one; remove or merge"
            )

    def draw(
        self, row: int, read: Callable[[int], Record], count: int, rng: np.random.Generator
    ) -> tuple[Record, list[Record]]:
        """Draw a positive for a row and `count` negatives (fewer if the other groups have fewer).

        A positive with the text of the query (data has duplicates) is drawn again a few times.

        Args:
            row: its number in the task.
            read: gives the record of a row of the task.
            count: the number of negatives.
            rng: decides all draws.
        """
        record = read(row)
        key = text_hash(str(record["group"]))
        start, end = (int(np.searchsorted(self._hashes, key, side)) for side in ("left", "right"))
        position = start + int(np.searchsorted(self._rows[start:end], row))
        positive = record
        for _ in range(_TRIES):
            drawn = start + int(rng.integers(end - start - 1))
            positive = read(int(self._rows[drawn + (drawn >= position)]))
            if positive["query"] != record["query"]:
                break
        others = len(self._rows) - (end - start)
        chosen = rng.choice(others, min(count, others), replace=False)
        chosen += np.where(chosen >= start, end - start, 0)
        return positive, [read(i) for i in self._rows[chosen].tolist()]
