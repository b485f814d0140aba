"""Retrieval scores on arrays are the numbers that mteb gets from its dictionaries."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalm_min import Embedder
from kalm_min.evaluation import worker
from kalm_min.evaluation.scoring import (
    Ranking,
    judge,
    order_ties,
    retrieval_scores,
    rows_of,
    without,
)

pytestmark = pytest.mark.filterwarnings("ignore")
K_VALUES = (1, 3, 5, 10, 20, 100, 1000)


def as_mteb_scores_it(ranking, queries, documents, relevant, *, ignore_identical_ids):
    """The score dictionary of mteb's own evaluator."""
    from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores, make_score_dict

    results = {
        query: {
            documents[row]: float(score)
            for row, score in zip(rows, scores, strict=True)
            if row >= 0 and not (ignore_identical_ids and documents[row] == query)
        }
        for query, rows, scores in zip(queries, ranking.rows, ranking.scores, strict=True)
    }
    found = calculate_retrieval_scores(results, relevant, list(K_VALUES))
    return make_score_dict(
        ndcg=found.ndcg,
        _map=found.map,
        recall=found.recall,
        precision=found.precision,
        naucs=found.naucs,
        mrr=found.mrr,
        naucs_mrr=found.naucs_mrr,
        hit_rate=found.hit_rate,
        task_scores={},
    )


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    levels=st.sampled_from([2, 5, 1000]),
    ignore_identical_ids=st.booleans(),
)
def test_scores_of_a_ranking_are_mtebs(mteb, seed, levels, ignore_identical_ids):
    """Promise: every metric, with ties, short lists, graded and missing judgements."""
    draw = np.random.default_rng(seed)
    count, size, depth = draw.integers(1, 12), draw.integers(3, 40), draw.integers(2, 45)
    documents = [f"d{i}" for i in draw.permutation(size)]
    queries = [f"d{i}" if draw.random() < 0.3 else f"q{i}" for i in range(count)]
    documents += [query for query in queries if query not in documents and draw.random() < 0.2]
    depth = min(depth, len(documents))
    rows = np.stack([draw.permutation(len(documents))[:depth] for _ in queries])
    scores = -np.sort(-draw.integers(-levels, levels, rows.shape) / np.float32(levels), axis=1)
    for row, length in zip(range(count), draw.integers(2, depth + 1, count), strict=True):
        scores[row, length:], rows[row, length:] = -np.inf, -1
    names = [*documents, "nowhere"]
    relevant = {
        query: {str(name): int(draw.integers(0, 4)) for name in draw.permutation(names)[:5]}
        for query in queries
    }
    ranking = Ranking(scores.astype(np.float32), rows)
    options = {"ignore_identical_ids": ignore_identical_ids}
    expected = as_mteb_scores_it(ranking, queries, documents, relevant, **options)
    if ignore_identical_ids:
        ranking = without(ranking, rows_of(queries, documents))
    judged = judge(queries, documents, relevant)
    ours = retrieval_scores(order_ties(ranking, documents), judged, K_VALUES)
    # Both round averages to five digits; the last bit of a sum may decide which way.
    assert ours == pytest.approx(expected, abs=1.1e-5, nan_ok=True)


@pytest.mark.parametrize("name", ["retrieval", "reranking"])
def test_a_task_scores_alike_on_arrays_and_through_mteb(
    mteb, eight, tiny_model_dir, monkeypatch, name
):
    """Promise: where the scores are computed changes no number of a result, at any dimension."""
    embedder = Embedder.from_pretrained(tiny_model_dir, device="cpu", dtype="float32")
    key = {"query_instruction": "", "document_instruction": ""}
    order = {"name": name, "type": "", "folder": str(eight / name), "key": key}
    ours = worker.evaluate_task(embedder, order, [32, 8])["kalm_min"]["dims"]
    monkeypatch.setattr(worker, "score_on_arrays", lambda task: None)
    theirs = worker.evaluate_task(embedder, order, [32, 8])["kalm_min"]["dims"]
    for dim in ("32", "8"):
        (mine,), (expected,) = (side[dim]["scores"]["test"] for side in (ours, theirs))
        numbers = {key for key, value in expected.items() if isinstance(value, float)}
        assert len(numbers) > 100
        assert mine.keys() == expected.keys()
        assert {key: mine[key] for key in numbers} == pytest.approx(
            {key: expected[key] for key in numbers}, abs=1.1e-5, nan_ok=True
        )
