"""The rules: which rows are consistent, and which neighbours become their negatives. Numpy only.

KaLM V1 section 3 (ranking consistency filtering, k = 50; 7 hard negatives of ranks 50 to 100), with
margins as in NV-Retriever. Every rule is a mask over stored neighbours, so other settings cost
seconds.

A stranger is a document of the corpus that is not known to answer the query: not the query's own
text, not a positive of the query in any row, not a text of its class. Ranks count strangers, from 1;
a positive's rank is one more than the strangers with a higher score.

`official_rank` counts as the official code does: every document, a row falls when the score at the
0-based place k is higher than its best positive's (so rank k + 1 still passes), and of a range only
0-based places are taken, first included, last not. (The official code also lets every row pass when
its list is not longer than k. That is not repeated.)

B  rows of a block    K  stored neighbours    n  negatives asked for
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kalm_min.mining.catalogue import Catalogue, Ints

Bools = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint64]

KEPT, OUTRANKED, SHORT = 0, 1, 2  # what becomes of a row
_ODD = np.uint64(0x9E3779B97F4A7C15)
_LAST = np.uint64(2**64 - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How rows are judged and negatives chosen."""

    rank_range: tuple[int, int] = (50, 100)
    """First and last rank a negative may have, both included."""
    num_negatives: int = 7
    """Negatives a row gets, if it has as many candidates."""
    consistency_top_k: int | None = 50
    """Drop a row whose best positive has a rank beyond this; none keeps every row."""
    official_rank: bool = False
    """Count ranks as the official code does: one off, the positives among them."""
    choice: Literal["random", "top"] = "random"
    """Which candidates: any, or those with the highest scores."""
    min_score: float | None = None
    """Lowest score of a negative."""
    max_score: float | None = None
    """Highest score of a negative."""
    absolute_margin: float | None = None
    """A negative scores at least this much less than the row's best positive."""
    relative_margin: float | None = None
    """The same as a share of the positive's score: 0.05 is NV-Retriever's 95 %."""
    short_rows: Literal["keep", "drop"] = "keep"
    """What becomes of a row with fewer candidates than negatives asked for."""
    seed: int = 0
    """Of the random choice."""

    def __post_init__(self) -> None:
        """Refuse what no run could mean."""
        first, last = self.rank_range
        if not 0 <= first <= last or last < 1:
            raise ValueError(f"rank_range: expected two ranks, first <= last, found {first} {last}")
        if self.num_negatives < 0:
            raise ValueError(f"num_negatives: expected 0 or more, found {self.num_negatives}")
        if self.consistency_top_k is not None and self.consistency_top_k < 1:
            raise ValueError(
                f"consistency_top_k: expected a rank from 1, found {self.consistency_top_k}"
            )

    @property
    def depth(self) -> int:
        """Strangers that must be in a list of neighbours."""
        return max(self.rank_range[1], (self.consistency_top_k or 0) + self.official_rank)


class Choice(NamedTuple):
    """What becomes of the rows of a block."""

    fate: Ints
    """(B,) KEPT, OUTRANKED or SHORT."""
    ahead: Ints
    """(B,) strangers listed above the best positive; its rank is one more."""
    columns: Ints
    """(B, n) places of the negatives among the neighbours, the highest score first; -1 is none."""


def choose(
    scores: Scores, strangers: Bools, listed: Bools, best: Scores, keys: Codes, rules: Rules
) -> Choice:
    """Judge rows and choose their negatives.

    Args:
        scores: (B, K) of the neighbours, the highest first.
        strangers: (B, K) which neighbours are strangers.
        listed: (B, K) which places hold a neighbour at all.
        best: (B,) score of each row's best positive.
        keys: (B, K) random; the lowest are chosen.
        rules: the settings.
    """
    off = int(rules.official_rank)
    counted = listed if rules.official_rank else strangers
    ahead = (counted & (scores > best[:, None])).sum(1)
    ranks = np.cumsum(counted, axis=1)
    allowed = strangers & (ranks >= rules.rank_range[0] + off) & (ranks <= rules.rank_range[1])
    allowed &= scores <= _ceiling(best, rules)[:, None]
    if rules.min_score is not None:
        allowed &= scores >= np.float32(rules.min_score)
    columns = _take(allowed, keys, rules)
    fate = np.full(len(best), KEPT)
    if rules.short_rows == "drop":
        fate[(columns >= 0).sum(1) < rules.num_negatives] = SHORT
    if rules.consistency_top_k is not None:
        fate[ahead >= rules.consistency_top_k + off] = OUTRANKED
    return Choice(fate, ahead, columns)


def _ceiling(best: Scores, rules: Rules) -> Scores:
    """(B,) highest score a negative of each row may have."""
    ceiling = np.full_like(best, np.inf if rules.max_score is None else rules.max_score)
    if rules.absolute_margin is not None:
        ceiling = np.minimum(ceiling, best - np.float32(rules.absolute_margin))
    if rules.relative_margin is not None:
        # Of the magnitude: a share of a negative score would be a ceiling above it.
        ceiling = np.minimum(ceiling, best - np.float32(rules.relative_margin) * np.abs(best))
    return ceiling


def _take(allowed: Bools, keys: Codes, rules: Rules) -> Ints:
    """(B, n) columns of the chosen, in order; -1 where there are fewer."""
    width, n = allowed.shape[1], rules.num_negatives
    places = np.broadcast_to(np.arange(width, dtype=np.uint64), allowed.shape)
    priority = np.where(allowed, keys >> 1 if rules.choice == "random" else places, _LAST)
    order = np.argsort(priority, axis=1, kind="stable")[:, :n]
    taken = np.where(np.take_along_axis(allowed, order, 1), order, width)
    columns = np.full((len(allowed), n), -1)
    columns[:, : taken.shape[1]] = np.sort(taken, axis=1)
    columns[columns == width] = -1
    return columns


def random_keys(queries: Ints, candidates: Ints, seed: int) -> Codes:
    """(B, K) random numbers for (B,) query and (B, K) candidate hashes.

    A function of seed and the two texts alone, so a row's negatives do not depend on the rows around
    it, on the order of the file or on who computed them.
    """
    state = _pairs(queries[:, None], candidates) + np.uint64(seed * 0xD1342543DE82EF95 % 2**64)
    # The finaliser of splitmix64 (Steele, Lea and Flood 2014).
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return state ^ (state >> np.uint64(31))


class Known:
    """Which documents are known to answer which queries of a task, in all its rows."""

    def __init__(self, catalogue: Catalogue) -> None:
        """Collect the pairs: a query and itself, a query and its positives, a class and its texts."""
        queries = catalogue.queries.hashes[catalogue.row_query]  # (R,)
        positives = catalogue.documents.hashes[catalogue.positives]  # (P,)
        count = np.diff(catalogue.starts)
        groups = catalogue.groups
        pairs = [
            _pairs(queries, queries),
            _pairs(np.repeat(queries, count), positives),
            _pairs(groups, queries)[groups != 0],
            _pairs(np.repeat(groups, count), positives)[np.repeat(groups, count) != 0],
        ]
        self._pairs = np.unique(np.concatenate(pairs))
        of_each = np.unique(np.repeat(queries, count), return_counts=True)[1]
        self.most = int(of_each.max()) + 1
        """Most documents known for one query; for a class there may be more."""

    def mask(self, queries: Ints, groups: Ints, candidates: Ints) -> Bools:
        """(B, K) which candidate hashes are known, for rows of these (B,) query and group hashes."""
        return self._has(_pairs(queries[:, None], candidates)) | (
            (groups != 0)[:, None] & self._has(_pairs(groups[:, None], candidates))
        )

    def _has(self, pairs: Codes) -> Bools:
        places = np.searchsorted(self._pairs, pairs)
        return self._pairs[np.minimum(places, len(self._pairs) - 1)] == pairs


def _pairs(left: Ints, right: Ints) -> Codes:
    """A 64-bit code of each pair of hashes, as unlikely to collide as they are."""
    return left.view(np.uint64) * _ODD + right.view(np.uint64)
