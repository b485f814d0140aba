"""Which rows are consistent, and which neighbours become their negatives. Numpy only.

KaLM V1 section 3 (ranking consistency filtering, k = 50; 7 hard negatives of ranks 50 to 100), with
margins as in NV-Retriever. An unlabelled candidate is a document of the corpus that no line of any
task labels as an answer to the query: neither the query, nor a positive of it, nor a text of its
class, nor a duplicate of one (`text_key`). Ranks count unlabelled candidates, from 1.

B rows of a block    K stored neighbours    n negatives per row    R, P rows and their texts
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kalm_min.mining.texts import Bools, TextIndex
from kalm_min.options import Rules
from kalm_min.topk import Ints, Rows

Scores = NDArray[np.float32]
Codes = NDArray[np.uint64]

KEPT, INCONSISTENT, SHORT = 0, 1, 2  # status of a row
BINS = 100  # of scores from -1 to 1
_ROWS = 2048  # at a time, if they have about 100 neighbours
_CELLS = 1 << 21  # neighbours of the rows of a block
_ODD = np.uint64(0x9E3779B97F4A7C15)
_LAST = np.uint64(2**64 - 1)


class Choice(NamedTuple):
    """The status and negatives of the rows of a block."""

    status: Ints  # (B,) KEPT, INCONSISTENT or SHORT
    ahead: Ints  # (B,) unlabelled candidates listed above the best positive
    columns: Ints  # (B, n) indices among the neighbours, highest score first; -1 for none


def choose(
    scores: Scores,  # (B, K) of the neighbours, the highest first
    is_unlabelled: Bools,  # (B, K) whether each neighbour is an unlabelled candidate
    is_listed: Bools,  # (B, K) whether each position holds a neighbour
    best: Scores,  # (B,) score of the best positive, whose rank is 1 + those that score higher
    keys: Codes,  # (B, K) random numbers; the lowest are chosen
    rules: Rules,
    is_own: Bools | None = None,  # (B, K) whether each is a negative that the row has already
) -> Choice:
    """Filter rows and choose their negatives.

    With `official_rank` every document counts, a row fails if the score at the 0-based position k
    is higher than its best positive's (so rank k + 1 still passes), and a range is one of 0-based
    positions, including the first but not the last. (The official code also lets every row pass if
    its list is not longer than k, which is not repeated here.)
    """
    off = int(rules.official_rank)
    counted = is_listed if rules.official_rank else is_unlabelled
    ahead = (counted & (scores > best[:, None])).sum(1)
    ranks = np.cumsum(counted, axis=1)
    allowed = is_unlabelled & (ranks >= rules.rank_range[0] + off) & (ranks <= rules.rank_range[1])
    if is_own is not None:
        allowed &= ~is_own
    if rules.min_score is not None:
        allowed &= scores >= np.float32(rules.min_score)
    if rules.max_score is not None:
        allowed &= scores <= np.float32(rules.max_score)
    if rules.absolute_margin is not None:
        allowed &= scores <= (best - np.float32(rules.absolute_margin))[:, None]
    if rules.relative_margin is not None:
        # A share of the magnitude, since a share of a negative score would be a limit above it.
        allowed &= scores <= (best - np.float32(rules.relative_margin) * np.abs(best))[:, None]
    count, (first, last) = allowed.shape[1], rules.rank_range
    n = min(rules.num_negatives, last - first + 1, count)  # before anything has this size
    positions = np.broadcast_to(np.arange(count, dtype=np.uint64), allowed.shape)
    priority = np.where(allowed, keys >> 1 if rules.choice == "random" else positions, _LAST)
    order = np.argsort(priority, axis=1, kind="stable")[:, :n]
    columns = np.sort(np.where(np.take_along_axis(allowed, order, 1), order, count), axis=1)
    columns = np.where(columns < count, columns, -1)
    status = np.full(len(best), KEPT)
    if rules.short_rows == "drop":
        status[(columns >= 0).sum(1) < rules.num_negatives] = SHORT
    if rules.consistency_top_k is not None:
        status[ahead >= rules.consistency_top_k + off] = INCONSISTENT
    return Choice(status, ahead, columns)


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


class Labels(NamedTuple):
    """What the lines of all tasks say about texts, as pairs of keys."""

    answers: Ints  # (a, 2) a query and one of its positives; both ways in a symmetric task
    members: Ints  # (m, 2) a class and a text of it

    @classmethod
    def collect(cls, indexes: Iterable[TextIndex]) -> "Labels":
        """Those of some tasks."""
        answers, members = [np.empty((0, 2), np.int64)], [np.empty((0, 2), np.int64)]
        for index in indexes:
            queries = index.queries["key"][index.row_query]  # (R,)
            rows = np.repeat(np.arange(len(index)), np.diff(index.starts))[index.is_positive]
            texts = index.documents["key"][index.texts[index.is_positive]]
            answers.append(np.stack([queries[rows], texts], 1))
            if index.symmetric:
                answers.append(answers[-1][:, ::-1])
            for some, of_class in ((queries, index.groups), (texts, index.groups[rows])):
                members.append(np.stack([of_class, some], 1)[of_class != 0])
        return cls(np.concatenate(answers), np.concatenate(members))

    def of(self, queries: Ints) -> "Known":
        """What is known of some queries, in whatever task."""
        queries = np.unique(queries)
        answers = self.answers[_is_in(self.answers[:, 0], queries)]
        classes = self.members[_is_in(self.members[:, 1], queries)]
        members = self.members[_is_in(self.members[:, 0], np.unique(classes[:, 0]))]
        order = np.lexsort((classes[:, 0], classes[:, 1]))
        codes = np.unique(_pairs(*np.concatenate([answers, members]).T))
        counts = [np.unique(some[:, 0], return_counts=True)[1] for some in (answers, members)]
        return Known(codes, classes[order], sum(int(some.max(initial=0)) for some in counts))


class Known(NamedTuple):
    """The labels of a task's queries, to look them up."""

    codes: Codes  # sorted: of each query and its answers, of each class and its texts
    classes: Ints  # (c, 2) a class and a query in it, in the order of the queries
    most: int  # answers of a query and texts of a class, at most

    def marks(self, queries: Ints, texts: Ints) -> Bools:
        """(B, K) whether each text is the query, its answer or of its class, for (B,) queries."""
        known = (texts == queries[:, None]) | _is_in(_pairs(queries[:, None], texts), self.codes)
        start, stop = (np.searchsorted(self.classes[:, 1], queries, x) for x in ("left", "right"))
        for step in range(int((stop - start).max(initial=0))):
            (rows,) = np.nonzero(start + step < stop)
            classes = self.classes[start[rows] + step, :1]
            known[rows] |= _is_in(_pairs(classes, texts[rows]), self.codes)
        return known


def _is_in(pairs: NDArray[Any], known: NDArray[Any]) -> Bools:
    """Whether each pair is among sorted ones; np.isin would sort those again for every block."""
    if not len(known):
        return np.zeros(pairs.shape, np.bool_)
    return known[np.minimum(np.searchsorted(known, pairs), len(known) - 1)] == pairs


def _pairs(left: Ints, right: Ints) -> Codes:
    """A 64-bit code of each pair of hashes, as unlikely to collide as they are."""
    return left.view(np.uint64) * _ODD + right.view(np.uint64)


class Selection(NamedTuple):
    """The status and negatives of the rows of a task."""

    status: Ints  # (R,) KEPT, INCONSISTENT or SHORT
    ahead: Ints  # (R,) listed unlabelled candidates that score higher than the best positive
    rank: Ints  # (R,) of the best positive; -1 if it scores less than every listed neighbour
    best: Scores  # (R,) score of the best positive
    negatives: Ints  # (R, n) numbers in the corpus, the highest score first; -1 for none
    negative_scores: Scores  # (R, n)
    scores: Scores  # (P,) in the order of TextIndex.texts
    is_kept: Bools  # (P,) False for a negative of the line that some line labels as an answer
    top: Ints  # (R,) the unlabelled candidate with the highest score; -1 for none
    top_scores: Scores  # (R,)
    histogram: Ints  # (BINS,) scores of all listed unlabelled candidates


def select(
    index: TextIndex,
    corpus: Ints,  # (N,) keys of the texts that were searched
    known: Known,  # what is known of index.queries
    queries: Rows,  # vectors of index.queries
    documents: Rows,  # vectors of index.documents
    # Maps (B,) numbers of queries to (B, K) pairs of "id", in the corpus, and "score".
    neighbours: Callable[[Ints], NDArray[np.void]],
    rules: Rules,
) -> Selection:
    """Filter the rows of a task and choose their negatives, block by block."""
    histogram = np.zeros(BINS, np.int64)
    parts: list[tuple[NDArray[Any], ...]] = []
    step = max(1, min(_ROWS, _CELLS // min(2 * rules.depth + 100, len(corpus))))
    for start in range(0, len(index), step):
        rows = slice(start, min(start + step, len(index)))
        numbers = index.row_query[rows]
        bounds = index.starts[rows.start : rows.stop + 1]
        own = slice(bounds[0], bounds[-1])
        row_of, texts = np.repeat(np.arange(len(numbers)), np.diff(bounds)), index.texts[own]
        own_scores = pair_scores(queries, numbers[row_of], documents, texts)
        hashes, own_keys = index.queries["key"][numbers], index.documents["key"][texts]
        is_kept = index.is_positive[own] | ~known.marks(hashes[row_of], own_keys[:, None])[:, 0]
        of_positives = np.where(index.is_positive[own], own_scores, np.float32(-np.inf))
        best = np.maximum.reduceat(of_positives, bounds[:-1] - bounds[0])  # every row has one
        listed = neighbours(numbers)
        ids, scores = listed["id"], listed["score"]
        is_listed, candidates = ids >= 0, corpus[ids]
        is_unlabelled = is_listed & ~known.marks(hashes, candidates)
        in_rows = _pairs(np.arange(len(numbers))[:, None], candidates)
        is_own = _is_in(in_rows, np.unique(_pairs(row_of, own_keys)))
        keys = random_keys(hashes, candidates, rules.seed)
        choice = choose(scores, is_unlabelled, is_listed, best, keys, rules, is_own)
        is_below = best < np.where(is_listed, scores, np.inf).min(1, initial=np.inf)
        rank = np.where(is_below, -1, choice.ahead + 1)
        chosen = _at(listed, choice.columns)
        first = np.where(is_unlabelled.any(1), is_unlabelled.argmax(1), -1)
        top = map(np.ravel, _at(listed, first[:, None]))
        parts.append((*choice[:2], rank, best, *chosen, own_scores, is_kept, *top))
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


def _at(listed: NDArray[np.void], columns: Ints) -> tuple[Ints, Scores]:
    """The ids and scores in the columns of each row; -1 and NaN where the column is -1."""
    taken = np.take_along_axis(listed, np.maximum(columns, 0), 1)
    is_none = columns < 0
    return np.where(is_none, -1, taken["id"]), np.where(is_none, np.float32("nan"), taken["score"])


def score_histogram(scores: Scores) -> Ints:
    """(BINS,) the number of scores in each fiftieth from -1 to 1, others in the outer bins."""
    return np.histogram(np.clip(scores.astype(np.float64), -1, 1), BINS, (-1, 1))[0]
