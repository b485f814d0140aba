"""The rules applied to a whole task, block by block: what each row keeps, and what a report needs.

R  rows of a task    P  positives of all rows    n  negatives asked for
Not here: the rules themselves (negatives.py).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kalm_min.mining.catalogue import Catalogue, Ints
from kalm_min.mining.negatives import KEPT, Bools, Known, Rules, Scores, choose, random_keys
from kalm_min.mining.nominees import Rows
from kalm_min.mining.store import StoredNeighbours

BINS = 100  # of scores from -1 to 1
_ROWS = 2048  # at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What became of the rows of a task."""

    fate: Ints
    """(R,) KEPT, OUTRANKED or SHORT."""
    ahead: Ints
    """(R,) listed strangers that score higher than the best positive."""
    beyond: Bools
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

    def pairs(self, catalogue: Catalogue) -> tuple[Bools, Ints, Bools, Ints]:
        """Which of the positives and negatives are written, and the row of each one written.

        Returns:
            (P,) and its rows; (R, n) and its rows.
        """
        rows = np.arange(catalogue.size)
        owner = np.repeat(rows, np.diff(catalogue.starts))
        kept = self.fate == KEPT
        chosen = kept[:, None] & (self.negatives >= 0)
        return kept[owner], owner[kept[owner]], chosen, np.repeat(rows, chosen.sum(1))


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
        bounds = catalogue.starts[rows.start : rows.stop + 1]
        asked = np.repeat(numbers, np.diff(bounds))
        answers = catalogue.positives[bounds[0] : bounds[-1]]
        positives = pair_scores(queries, asked, documents, answers)
        best = np.maximum.reduceat(positives, bounds[:-1] - bounds[0])  # every row has a positive
        ids, scores = neighbours[numbers]
        codes, hashes = catalogue.queries.hashes[numbers], corpus[ids]
        listed = ids >= 0
        strangers = listed & ~known.mask(codes, catalogue.groups[rows], hashes)
        keys = random_keys(codes, hashes, rules.seed)
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


def with_scores(
    selection: Selection, catalogue: Catalogue, positives: Scores, negatives: Scores
) -> Selection:
    """The same choice with another model's scores of what is written; nan for the rest."""
    of_positives, _, of_negatives, _ = selection.pairs(catalogue)
    positive_scores = np.full_like(selection.positive_scores, np.nan)
    negative_scores = np.full_like(selection.negative_scores, np.nan)
    positive_scores[of_positives] = positives
    negative_scores[of_negatives] = negatives
    return replace(selection, positive_scores=positive_scores, negative_scores=negative_scores)


def pair_scores(queries: Rows, asked: Ints, documents: Rows, answers: Ints) -> Scores:
    """(p,) products of queries[asked] and documents[answers], exact, then rounded to float32."""
    scores = np.empty(len(asked), np.float32)
    for start in range(0, len(asked), 4 * _ROWS):
        part = slice(start, start + 4 * _ROWS)
        left, right = queries[asked[part]], documents[answers[part]]
        scores[part] = np.einsum("pd,pd->p", left.astype(np.float64), right.astype(np.float64))
    return scores


def _at(values: npt.NDArray[Any], columns: Ints, none: float) -> npt.NDArray[Any]:
    """values[row, columns[row]], `none` where the column is -1."""
    taken = np.take_along_axis(values, np.maximum(columns, 0), 1)
    return np.where(columns >= 0, taken, np.asarray(none, values.dtype))


def score_histogram(scores: Scores) -> Ints:
    """(BINS,) how many scores lie in each fiftieth from -1 to 1; what lies outside counts at the end."""
    places = np.floor((scores.ravel().astype(np.float64) + 1) * (BINS / 2)).astype(np.int64)
    return np.bincount(np.clip(places, 0, BINS - 1), minlength=BINS)
