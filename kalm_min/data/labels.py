"""Example-based labelling (KaLM-Embedding V2, data curation): a class is learned from its texts.

For a text of a task with classes the positive is a random other text of the same class, not the
name of the class, and the negatives are texts of other classes. Both are drawn when the example is
read; no more texts are read than are drawn. Not here: the generator (dataset.py).
"""

from collections.abc import Callable

import numpy as np

from kalm_min.data.index import Ints
from kalm_min.data.records import Row
from kalm_min.files import text_hash

_TRIES = 8  # draws of a positive before one with the text of the query is taken


class LabelIndex:
    """The examples of one label-based task, ordered by group; a group is a range of this order.

    Args:
        hashes: (rows,) hash of the group of each example of the task.
        first: the number of the task's first example.
        task: its name, for messages.
        location: `file:line` of an example, for messages.

    Raises ValueError for a task with one group only, or with a group of a single row: no positive
    can be drawn for it.
    """

    def __init__(self, hashes: Ints, first: int, task: str, location: Callable[[int], str]) -> None:
        order = np.argsort(hashes, kind="stable")
        self._numbers, self._hashes = first + order, hashes[order]
        _, starts, sizes = np.unique(self._hashes, return_index=True, return_counts=True)
        if len(starts) < 2:
            raise ValueError(
                f"{location(first)}: expected texts of at least two groups in the label-based task "
                f"{task!r}, found one group"
            )
        if len(single := starts[sizes == 1]):
            raise ValueError(
                f"{location(int(self._numbers[single[0]]))}: expected every group of the label-based "
                f"task {task!r} to have two rows or more, found {len(single)} "
                f"group{'s'[: len(single) - 1]} of a single one; remove or merge"
            )

    def draw(
        self, i: int, read: Callable[[int], Row], count: int, rng: np.random.Generator
    ) -> tuple[Row, list[Row]]:
        """Draw a positive for example i and `count` negatives, or all if there are fewer.

        `read` gives the record of an example. A positive with the text of the query (data has
        duplicates) is drawn again a few times.
        """
        positive = record = read(i)
        key = text_hash(str(record["group"]))
        start, end = (int(np.searchsorted(self._hashes, key, side)) for side in ("left", "right"))
        group = self._numbers[start:end]
        position = int(np.searchsorted(group, i))
        for _ in range(_TRIES):
            drawn = int(rng.integers(len(group) - 1))
            positive = read(int(group[drawn + (drawn >= position)]))
            if positive["query"] != record["query"]:
                break
        others = len(self._numbers) - len(group)
        chosen = rng.choice(others, min(count, others), replace=False)
        chosen[chosen >= start] += len(group)
        return positive, [read(number) for number in self._numbers[chosen].tolist()]
