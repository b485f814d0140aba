"""The rules applied to a whole task, block by block: what each row keeps, and what a report needs.

Not here: the rules themselves (negatives.py).
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kalm_min.files import atomic_write
from kalm_min.mining.catalogue import Catalogue, Ints
from kalm_min.mining.negatives import Known, Rules, Scores, choose, random_keys
from kalm_min.mining.search import Rows
from kalm_min.mining.store import StoredNeighbours

BINS = 100  # of scores from -1 to 1
_ROWS = 2048  # at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What became of the R rows of a task."""

    fate: Ints
    """(R,) KEPT, OUTRANKED or SHORT."""
    ahead: Ints
    """(R,) listed strangers that score higher than the best positive."""
    beyond: npt.NDArray[np.bool_]
    """(R,) the best positive scores less than every listed neighbour: its rank is not known."""
    negatives: Ints
    """(R, n) numbers in the corpus, the highest score first; -1 is none."""
    negative_scores: Scores
    """(R, n)"""
    positive_scores: Scores
    """(P,) in the order of Catalogue.positives."""
    rivals: Ints
    """(R,) the highest stranger; -1 where there is none."""
    rival_scores: Scores
    """(R,)"""
    neighbour_histogram: Ints
    """(BINS,) scores of all listed strangers."""

    def save(self, path: Path) -> None:
        """Write an .npz file, complete or not at all."""
        with atomic_write(path) as file:
            np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(**{name: file[name] for name in file.files})


def select(
    catalogue: Catalogue,
    corpus: Ints,
    queries: Rows,
    documents: Rows,
    neighbours: StoredNeighbours,
    rules: Rules,
) -> Selection:
    """Judge every row of a task and choose its negatives.

    Args:
        catalogue: the task.
        corpus: (N,) hashes of the texts that were searched.
        queries: vectors of catalogue.queries.
        documents: vectors of catalogue.documents, which hold the positives.
        neighbours: of each query, in the corpus.
        rules: the settings.
    """
    known = Known(catalogue)
    histogram = np.zeros(BINS, np.int64)
    parts: list[dict[str, Any]] = []
    for start in range(0, catalogue.size, _ROWS):
        rows = slice(start, min(start + _ROWS, catalogue.size))
        numbers = catalogue.row_query[rows]
        positives = _positive_scores(catalogue, rows, queries, documents)
        starts = catalogue.starts[rows] - catalogue.starts[start]
        best = np.maximum.reduceat(positives, starts)  # every row has a positive
        ids, scores = neighbours[numbers]
        hashes = corpus[ids]
        asked = catalogue.queries.hashes[numbers]
        listed = ids >= 0
        strangers = listed & ~known.mask(asked, catalogue.groups[rows], hashes)
        keys = random_keys(asked, hashes, rules.seed)
        choice = choose(scores, strangers, listed, best, keys, rules)
        first = np.where(strangers.any(1), strangers.argmax(1), -1)[:, None]
        histogram += score_histogram(scores[strangers])
        parts.append(
            {
                "fate": choice.fate,
                "ahead": choice.ahead,
                "beyond": best < np.where(listed, scores, np.inf).min(1, initial=np.inf),
                "negatives": _at(ids, choice.columns, -1),
                "negative_scores": _at(scores, choice.columns, np.nan),
                "positive_scores": positives,
                "rivals": _at(ids, first, -1)[:, 0],
                "rival_scores": _at(scores, first, np.nan)[:, 0],
            }
        )
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Selection(**joined, neighbour_histogram=histogram)


def _positive_scores(catalogue: Catalogue, rows: slice, queries: Rows, documents: Rows) -> Scores:
    """Of every positive of some rows, exact, then rounded as the neighbours' are."""
    bounds = catalogue.starts[rows.start : rows.stop + 1]
    places = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    asked = queries[catalogue.row_query[rows]].astype(np.float64)[places]
    answers = documents[catalogue.positives[bounds[0] : bounds[-1]]].astype(np.float64)
    return np.einsum("pd,pd->p", asked, answers).astype(np.float32)


def _at(values: npt.NDArray[Any], columns: Ints, none: float) -> npt.NDArray[Any]:
    """values[row, columns[row]], `none` where the column is -1."""
    if values.shape[1] == 0:
        return np.full(columns.shape, none, values.dtype)
    taken = np.take_along_axis(values, np.maximum(columns, 0), 1)
    return np.where(columns >= 0, taken, np.asarray(none, values.dtype))


def score_histogram(scores: Scores) -> Ints:
    """(BINS,) how many scores lie in each fiftieth from -1 to 1; what lies outside counts at the end."""
    places = np.floor((scores.ravel().astype(np.float64) + 1) * (BINS / 2)).astype(np.int64)
    return np.bincount(np.clip(places, 0, BINS - 1), minlength=BINS)
