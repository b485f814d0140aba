"""Which rows are consistent, and which neighbours become their negatives. Numpy only.

KaLM V1 section 3 (ranking consistency filtering, k = 50; 7 hard negatives of ranks 50 to 100), with
margins as in NV-Retriever. An unlabelled candidate is a document of the corpus that is not labelled
as an answer to the query: not the query's text itself, not a positive of the query in any row, not a
text of its class. Ranks count unlabelled candidates, from 1; a positive's rank is one more than the
unlabelled candidates with a higher score.

B rows of a block    K stored neighbours    n negatives per row    R, P rows and positives of a task
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kalm_min.mining.texts import TextIndex
from kalm_min.options import Rules
from kalm_min.topk import Ints, Rows

Bools = NDArray[np.bool_]
Scores = NDArray[np.float32]
Codes = NDArray[np.uint64]

KEPT, INCONSISTENT, SHORT = 0, 1, 2  # status of a row
BINS = 100  # of scores from -1 to 1
_ROWS = 2048  # at a time
_ODD = np.uint64(0x9E3779B97F4A7C15)
_LAST = np.uint64(2**64 - 1)


class Choice(NamedTuple):
    """The status and negatives of the rows of a block."""

    status: Ints  # (B,) KEPT, INCONSISTENT or SHORT
    ahead: Ints  # (B,) unlabelled candidates listed above the best positive
    columns: Ints  # (B, n) indices among the neighbours, highest score first; -1 for none


def choose(
    scores: Scores, is_unlabelled: Bools, is_listed: Bools, best: Scores, keys: Codes, rules: Rules
) -> Choice:
    """Filter rows and choose their negatives.

    With `official_rank` every document counts, a row fails if the score at the 0-based position k
    is higher than its best positive's (so rank k + 1 still passes), and a range is one of 0-based
    positions, including the first but not the last. (The official code also lets every row pass if
    its list is not longer than k, which is not repeated here.)

    Args:
        scores: (B, K) of the neighbours, the highest first.
        is_unlabelled: (B, K) whether each neighbour is an unlabelled candidate.
        is_listed: (B, K) whether each position holds a neighbour.
        best: (B,) score of each row's best positive.
        keys: (B, K) random numbers; the lowest are chosen.
        rules: the settings.
    """
    off = int(rules.official_rank)
    counted = is_listed if rules.official_rank else is_unlabelled
    ahead = (counted & (scores > best[:, None])).sum(1)
    ranks = np.cumsum(counted, axis=1)
    allowed = is_unlabelled & (ranks >= rules.rank_range[0] + off) & (ranks <= rules.rank_range[1])
    if rules.min_score is not None:
        allowed &= scores >= np.float32(rules.min_score)
    if rules.max_score is not None:
        allowed &= scores <= np.float32(rules.max_score)
    if rules.absolute_margin is not None:
        allowed &= scores <= (best - np.float32(rules.absolute_margin))[:, None]
    if rules.relative_margin is not None:
        # A share of the magnitude, since a share of a negative score would be a limit above it.
        allowed &= scores <= (best - np.float32(rules.relative_margin) * np.abs(best))[:, None]
    columns = _take(allowed, keys, rules)
    status = np.full(len(best), KEPT)
    if rules.short_rows == "drop":
        status[(columns >= 0).sum(1) < rules.num_negatives] = SHORT
    if rules.consistency_top_k is not None:
        status[ahead >= rules.consistency_top_k + off] = INCONSISTENT
    return Choice(status, ahead, columns)


def _take(allowed: Bools, keys: Codes, rules: Rules) -> Ints:
    """(B, n) columns of the chosen neighbours, in order; -1 if there are fewer."""
    count, n = allowed.shape[1], rules.num_negatives
    positions = np.broadcast_to(np.arange(count, dtype=np.uint64), allowed.shape)
    priority = np.where(allowed, keys >> 1 if rules.choice == "random" else positions, _LAST)
    order = np.argsort(priority, axis=1, kind="stable")[:, :n]
    taken = np.where(np.take_along_axis(allowed, order, 1), order, count)
    columns = np.full((len(allowed), n), -1)
    columns[:, : taken.shape[1]] = np.sort(taken, axis=1)
    columns[columns == count] = -1
    return columns


def random_keys(queries: Ints, candidates: Ints, seed: int) -> Codes:
    """(B, K) random numbers for (B,) query and (B, K) candidate hashes.

    They depend on the seed and the two texts alone, so a row's negatives do not depend on other
    rows, on the order of the file or on the process that computes them.
    """
    state = _pairs(queries[:, None], candidates) + np.uint64(seed * 0xD1342543DE82EF95 % 2**64)
    # The finaliser of splitmix64 (Steele, Lea and Flood 2014).
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return state ^ (state >> np.uint64(31))


def labelled_pairs(index: TextIndex) -> Codes:
    """The codes of a task's labelled pairs, sorted: queries, and classes, with their texts."""
    queries = index.queries["hash"][index.row_query]  # (R,)
    positives = index.documents["hash"][index.positives]  # (P,)
    count, groups = np.diff(index.starts), index.groups
    of_positives = np.repeat(groups, count)  # (P,)
    pairs = [
        _pairs(queries, queries),
        _pairs(np.repeat(queries, count), positives),
        _pairs(groups, queries)[groups != 0],
        _pairs(of_positives, positives)[of_positives != 0],
    ]
    return np.unique(np.concatenate(pairs))


def _is_in(pairs: Codes, known: Codes) -> Bools:
    """Whether each pair is among sorted ones; np.isin would sort those again for every block."""
    return known[np.minimum(np.searchsorted(known, pairs), len(known) - 1)] == pairs


def _pairs(left: Ints, right: Ints) -> Codes:
    """A 64-bit code of each pair of hashes, as unlikely to collide as they are."""
    return left.view(np.uint64) * _ODD + right.view(np.uint64)


class Selection(NamedTuple):
    """The status and negatives of the rows of a task."""

    status: Ints  # (R,) KEPT, INCONSISTENT or SHORT
    ahead: Ints  # (R,) listed unlabelled candidates that score higher than the best positive
    beyond: Bools  # (R,) the best positive scores less than every listed neighbour: rank unknown
    negatives: Ints  # (R, n) numbers in the corpus, the highest score first; -1 for none
    negative_scores: Scores  # (R, n)
    positive_scores: Scores  # (P,) in the order of TextIndex.positives
    top: Ints  # (R,) the unlabelled candidate with the highest score; -1 for none
    top_scores: Scores  # (R,)
    histogram: Ints  # (BINS,) scores of all listed unlabelled candidates


def select(
    index: TextIndex,
    corpus: Ints,
    queries: Rows,
    documents: Rows,
    neighbours: Callable[[Ints], tuple[Ints, Scores]],
    rules: Rules,
) -> Selection:
    """Filter the rows of a task and choose their negatives, block by block.

    Args:
        index: the task.
        corpus: (N,) hashes of the texts that were searched.
        queries: vectors of index.queries.
        documents: vectors of index.documents, which include the positives.
        neighbours: maps (B,) numbers of queries to (B, K) ids in the corpus and scores.
        rules: the settings.
    """
    labelled = labelled_pairs(index)
    histogram = np.zeros(BINS, np.int64)
    parts: list[tuple[NDArray[Any], ...]] = []
    for start in range(0, len(index), _ROWS):
        rows = slice(start, min(start + _ROWS, len(index)))
        numbers = index.row_query[rows]
        bounds = index.starts[rows.start : rows.stop + 1]
        answers = index.positives[bounds[0] : bounds[-1]]
        positives = pair_scores(queries, np.repeat(numbers, np.diff(bounds)), documents, answers)
        best = np.maximum.reduceat(positives, bounds[:-1] - bounds[0])  # every row has a positive
        ids, scores = neighbours(numbers)
        is_listed = ids >= 0
        hashes, candidates = index.queries["hash"][numbers], corpus[ids]
        groups = index.groups[rows, None]
        is_labelled = _is_in(_pairs(hashes[:, None], candidates), labelled)
        is_labelled |= (groups != 0) & _is_in(_pairs(groups, candidates), labelled)
        is_unlabelled = is_listed & ~is_labelled
        keys = random_keys(hashes, candidates, rules.seed)
        status, ahead, columns = choose(scores, is_unlabelled, is_listed, best, keys, rules)
        beyond = best < np.where(is_listed, scores, np.inf).min(1, initial=np.inf)
        chosen = _at(ids, columns, -1), _at(scores, columns, np.nan)
        first = np.where(is_unlabelled.any(1), is_unlabelled.argmax(1), -1)[:, None]
        top = _at(ids, first, -1)[:, 0], _at(scores, first, np.nan)[:, 0]
        parts.append((status, ahead, beyond, *chosen, positives, *top))
        histogram += score_histogram(scores[is_unlabelled])
    return Selection(*map(np.concatenate, zip(*parts, strict=True)), histogram=histogram)


def pair_scores(queries: Rows, numbers: Ints, documents: Rows, answers: Ints) -> Scores:
    """(p,) products of queries[numbers] and documents[answers], exact, then rounded to float32."""
    scores = np.empty(len(numbers), np.float32)
    for start in range(0, len(numbers), 4 * _ROWS):
        part = slice(start, start + 4 * _ROWS)
        left, right = queries[numbers[part]], documents[answers[part]]
        scores[part] = np.einsum("pd,pd->p", left.astype(np.float64), right.astype(np.float64))
    return scores


def _at(values: NDArray[Any], columns: Ints, none: float) -> NDArray[Any]:
    """values[row, columns[row]], `none` where the column is -1."""
    taken = np.take_along_axis(values, np.maximum(columns, 0), 1)
    return np.where(columns >= 0, taken, np.asarray(none, values.dtype))


def score_histogram(scores: Scores) -> Ints:
    """(BINS,) the number of scores in each fiftieth from -1 to 1, others in the outer bins."""
    return np.histogram(np.clip(scores.astype(np.float64), -1, 1), BINS, (-1, 1))[0]
