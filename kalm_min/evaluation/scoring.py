"""The scores of a ranking, on arrays: mteb's numbers without its dictionaries.

mteb turns a ranking into a dictionary of dictionaries and walks through it four times in Python, 2 ms
for each query and dimension. Here a query's judged documents are looked up among its ranked ones, and
every metric follows from their ranks. The definitions are trec_eval's (through pytrec_eval): ties fall
by document id, the greater first; a gain is the judgement itself; a document is relevant above 0.

Q  queries    K  ranked documents    J  judgements of relevance    C  cut-offs (1, 3, ..., 1000)
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
_RATES = np.linspace(0, 1, 11)[:-1]  # of abstention, R of them
_COMPARED = 1 << 24  # ranks compared with judgements at a time


class Ranking(NamedTuple):
    """The documents found for each query, the best first."""

    scores: NDArray[np.float32]
    """(Q, K); -inf where there is no further document."""
    rows: Ints
    """(Q, K) numbers of the documents in the corpus; -1 where there is none."""


class Judged(NamedTuple):
    """What is relevant to whom."""

    queries: Ints
    """(J,) numbers."""
    rows: Ints
    """(J,) numbers in the corpus; -2 for a document that is not in it."""
    gains: Floats
    """(J,) above 0."""


def score_on_arrays(task: Any) -> None:
    """Let a retrieval task of mteb score rankings here, unless its class has rules of its own.

    The model it is then given must have `rank` (encoder.Adapter). Scores are equal to mteb's.
    """
    from mteb.abstasks import AbsTaskRetrieval as Base

    names = ("_evaluate_subset", "task_specific_scores")
    is_plain = isinstance(task, Base) and all(
        getattr(type(task), name) is getattr(Base, name) for name in names
    )
    if is_plain and not task.skip_first_result:
        task._evaluate_subset = partial(_evaluate_subset, task, task._evaluate_subset)


def _evaluate_subset(
    task: Any, slowly: Callable[..., Any], model: Any, data_split: Any, **options: Any
) -> dict[str, float]:
    """In place of the method of mteb's task."""
    relevant = {name: of for name, of in data_split["relevant_docs"].items() if of}
    queries: Any = data_split["queries"]
    kept = [row for row, name in enumerate(queries["id"]) if name in relevant]
    queries, corpus = queries.select(kept), data_split["corpus"]
    ranking = model.rank(
        queries,
        corpus,
        place=(options["hf_split"], options["hf_subset"]),
        task_metadata=task.metadata,
        top_k=max(task.k_values),
        top_ranked=data_split["top_ranked"],
    )
    names, documents = queries["id"][:], corpus["id"][:]
    if task.ignore_identical_ids:
        ranking = without(ranking, rows_of(names, documents))
    if not np.isfinite(ranking.scores[:, :1]).all():  # a query without any document: rare, and odd
        return slowly(model, data_split, **options)
    judged = judge(names, documents, relevant)
    return retrieval_scores(order_ties(ranking, documents), judged, task.k_values)


def rows_of(names: Sequence[str], documents: Sequence[str]) -> Ints:
    """The row of each name among the documents; -2 for one that is not there."""
    wanted = set(names)
    rows = {name: row for row, name in enumerate(documents) if name in wanted}
    return np.array([rows.get(name, -2) for name in names], np.int64)


def judge(
    queries: Sequence[str], documents: Sequence[str], relevant: dict[str, dict[str, int]]
) -> Judged:
    """The judgements above 0 of the queries, as numbers."""
    every = [
        (number, name, gain)
        for number, query in enumerate(queries)
        for name, gain in relevant[query].items()
        if gain > 0
    ]
    numbers, names, gains = zip(*every, strict=True) if every else ((), (), ())
    return Judged(np.array(numbers, int), rows_of(names, documents), np.array(gains, float))


def without(ranking: Ranking, rows: Ints) -> Ranking:
    """The ranking with document rows[q] taken from query q; what stood below moves up."""
    is_out = ranking.rows == rows[:, None]  # (Q, K)
    order = np.argsort(is_out, axis=1, kind="stable")
    scores = np.where(is_out, -np.inf, ranking.scores)
    kept = np.where(is_out, -1, ranking.rows)
    return Ranking(np.take_along_axis(scores, order, 1), np.take_along_axis(kept, order, 1))


def order_ties(ranking: Ranking, documents: list[str]) -> Ranking:
    """Put documents of equal score in descending order of their ids."""
    scores, rows = ranking
    is_equal = (scores[:, 1:] == scores[:, :-1]) & np.isfinite(scores[:, 1:])
    (tied,) = is_equal.any(axis=1).nonzero()
    if len(tied) == 0:
        return ranking
    here, places = np.unique(rows[tied], return_inverse=True)
    names = [documents[row] if row >= 0 else "" for row in here.tolist()]
    by_id = sorted(range(len(here)), key=names.__getitem__)
    rank = np.empty(len(here), np.int64)
    rank[by_id] = np.arange(len(here))
    order = np.lexsort((-rank[places.reshape(len(tied), -1)], -scores[tied]), axis=1)
    rows = rows.copy()
    rows[tied] = np.take_along_axis(rows[tied], order, 1)
    return Ranking(scores, rows)


def retrieval_scores(ranking: Ranking, judged: Judged, k_values: Sequence[int]) -> dict[str, float]:
    """mteb's dictionary of scores; every query has at least one document.

    Averages are rounded as mteb rounds them, to five digits, reciprocal ranks not.
    """
    from mteb._evaluators.retrieval_metrics import make_score_dict

    every = _per_query(ranking, judged, np.array(k_values))
    names = {"NDCG": "ndcg", "MAP": "_map", "Recall": "recall", "P": "precision", "MRR": "mrr"}
    names |= {"HitRate": "hit_rate"}
    means: dict[str, dict[str, float]] = {}
    count = len(ranking.rows)
    for metric, name in names.items():
        sums = {f"{metric}@{k}": sum(every[metric][i].tolist()) for i, k in enumerate(k_values)}
        means[name] = {
            key: total / count if metric == "MRR" else round(total / count, 5)
            for key, total in sums.items()
        }
    confidence = _confidence(ranking.scores)
    naucs = {
        f"nAUC_{metric}@{k}_{name}": area
        for metric in names.keys() - {"HitRate"}
        for name, areas in _naucs(confidence, every[metric]).items()
        for k, area in zip(k_values, areas.tolist(), strict=True)
    }
    return make_score_dict(**means, naucs=naucs, naucs_mrr={}, task_scores={})  # pyright: ignore[reportArgumentType]


def _per_query(ranking: Ranking, judged: Judged, k_values: Ints) -> dict[str, Floats]:
    """(C, Q) of every metric."""
    count = len(ranking.rows)
    cuts = k_values[:, None]  # (C, 1)
    ranks = _ranks(ranking, judged)  # (J,), from 1
    order = np.lexsort((ranks, judged.queries))
    queries, ranks, gains = judged.queries[order], ranks[order], judged.gains[order]
    ideal = np.lexsort((-judged.gains, judged.queries))

    def add(values: Any) -> Any:
        """(C, J) values summed by query: (C, Q)."""
        return np.stack([np.bincount(queries, row, minlength=count) for row in values])

    relevant = np.bincount(queries, minlength=count)  # (Q,)
    place = np.arange(len(queries)) - (np.cumsum(relevant) - relevant)[queries] + 1  # (J,)
    is_found = ranks <= cuts  # (C, J)
    found = add(is_found)
    best = np.full(count, np.inf)
    np.minimum.at(best, queries, ranks)
    gained = add(is_found * gains / np.log2(ranks + 1))
    possible = add((place <= cuts) * judged.gains[ideal] / np.log2(place + 1))
    some = np.maximum(relevant, 1)
    return {
        "NDCG": np.divide(gained, possible, out=np.zeros_like(gained), where=possible > 0),
        "MAP": add(is_found * place / ranks) / some,
        "Recall": found / some,
        "P": found / cuts,
        "MRR": np.where(best <= cuts, 1 / best, 0.0),
        "HitRate": (found > 0).astype(float),
    }


def _ranks(ranking: Ranking, judged: Judged) -> Floats:
    """(J,) from 1; infinity for a judged document that was not found."""
    ranks = np.full(len(judged.rows), np.inf)
    step = max(1, _COMPARED // max(1, ranking.rows.shape[1]))
    for start in range(0, len(ranks), step):
        part = slice(start, start + step)
        judgement, place = np.nonzero(ranking.rows[judged.queries[part]] == judged.rows[part, None])
        ranks[start + judgement] = place + 1
    return ranks


def _confidence(scores: NDArray[np.float32]) -> dict[str, Floats]:
    """(Q,) each: how sure a ranking looks (arXiv:2402.12997)."""
    exact = scores.astype(np.float64)
    counts = np.isfinite(exact).sum(axis=1)
    second = exact[:, 1] if exact.shape[1] > 1 else exact[:, 0]
    return {
        "max": exact[:, 0],
        # Row by row, as mteb does it: the last bits decide which rankings look equally sure.
        "std": np.array([np.std(row[:n]) for row, n in zip(exact, counts, strict=True)]),
        "diff1": np.where(counts > 1, exact[:, 0] - second, 0.0),
    }


def _naucs(confidence: dict[str, Floats], metrics: Floats) -> dict[str, Floats]:
    """(C,) each: what abstaining on the least sure queries gains, of what an oracle would gain.

    (C, Q) metrics. Not a number where an oracle gains nothing. Sums run in mteb's order.
    """
    best = np.concatenate([_abstention_curve(row, row[None]) for row in metrics])  # (C, R)
    flat = best[:, 0] * (_RATES[-1] - _RATES[0])
    gain = _area(best) - flat
    areas: dict[str, Floats] = {}
    for name, sureness in confidence.items():
        area = _area(_abstention_curve(sureness, metrics)) - flat
        areas[name] = np.divide(area, gain, out=np.full_like(gain, np.nan), where=gain != 0)
    return areas


def _abstention_curve(confidence: Floats, metrics: Floats) -> Floats:
    """(C, R) averages of (C, Q) metrics over the queries that are left at each rate of abstention.

    Queries that look equally sure count with their mean.
    """
    order = np.argsort(confidence, kind="stable")
    ordered, values = confidence[order], metrics[:, order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sizes = np.diff(np.r_[starts, len(ordered)])
    values = np.repeat(np.add.reduceat(values, starts, axis=1) / sizes, sizes, axis=1)
    firsts = [min(round(rate * len(ordered)), len(ordered) - 1) for rate in _RATES.tolist()]
    return np.stack([values[:, first:].mean(axis=1) for first in firsts], axis=1)


def _area(curves: Floats) -> Floats:
    """(C,) under (C, R) curves over the rates, by trapezoids."""
    return (np.diff(_RATES) * (curves[:, 1:] + curves[:, :-1]) / 2.0).sum(axis=1)
