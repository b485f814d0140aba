import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kalm_min import topk
from kalm_min.topk import approximate_index, merge, on_grid, recall, top_k

ROOT = Path(__file__).parent.parent


def unit(count, width, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return on_grid(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def crowded():
    """Documents with crowds of equal vectors, some larger than any list; queries among them."""
    documents = unit(6000, 48)
    documents[1000:1100] = documents[5]
    documents[2000:5000] = documents[7]
    documents[5500] = 0
    return np.concatenate([unit(300, 48, seed=1), documents[[5, 7, 5500]]]), documents


def oracle(queries, documents, k):
    """Every product in float64, sorted completely."""
    scores = queries.astype(np.float64) @ documents.astype(np.float64).T
    ids = np.broadcast_to(np.arange(len(documents)), scores.shape)
    order = np.lexsort((ids, -scores))[:, :k]
    return order, np.take_along_axis(scores, order, 1)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("k", [1, 100])
def test_same_neighbours_from_every_backend(backend, k):
    """Ids, order and scores are those of a complete float64 sort, ties by id, crowds included."""
    if backend == "faiss":
        pytest.importorskip("faiss")
    queries, documents = crowded()
    ids, scores = oracle(queries, documents, k)
    found = top_k(queries, documents, k, backend=backend)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_array_equal(found.scores, scores)


def test_inexact_scores_are_float32_products():
    """Without exact scores only near-ties may change places."""
    queries, documents = crowded()
    scores = oracle(queries, documents, 100)[1]
    found = top_k(queries, documents, 100, exact=False)
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    products = np.take_along_axis(queries @ documents.T, found.ids, 1)
    np.testing.assert_allclose(found.scores, products, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_find_what_one_process_finds(tmp_path, ranks):
    """Ids, order and scores of gloo processes that each search their share, of torch and of faiss."""
    pytest.importorskip("faiss")
    np.save(tmp_path / "vectors.npy", crowded()[1])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = [str(ROOT / "benchmarks" / "search.py"), "--agree", "--vectors", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launch, *script, "--queries", "200", "--k", "20"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert f"identical ids, order and scores from torch, faiss and {ranks} process" in done.stdout


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_merge_to_the_whole(parts):
    """Searching spans of the documents and merging is searching them all."""
    queries, documents = crowded()
    cuts = [len(documents) * i // parts for i in range(parts + 1)]
    found = merge([top_k(queries, documents, 50, span=span) for span in pairwise(cuts)], 50)
    np.testing.assert_array_equal(found.ids, oracle(queries, documents, 50)[0])


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_blocks_do_not_show(monkeypatch, backend):
    """Near-ties of float32 products are ordered alike for all block sizes."""
    if backend == "faiss":
        pytest.importorskip("faiss")
    queries, documents = crowded()
    full = top_k(queries, documents, 20)
    monkeypatch.setattr(topk, "_HELD", 37)
    monkeypatch.setattr(topk, "_INDEXED", 301)
    for name, size in (("_QUERIES", 5), ("_DOCUMENTS", 101), ("_RESCORED", 999)):
        monkeypatch.setitem(getattr(topk, name), "cpu", size)
    found = top_k(queries, documents, 20, backend=backend)
    np.testing.assert_array_equal(found.ids, full.ids)
    np.testing.assert_array_equal(found.scores, full.scores)


@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_scores_do_not_depend_on_order(dim, seed):
    """On the grid a float64 product is the same number in any order of summation."""
    a, b = unit(2, dim, seed)
    shuffled = np.random.default_rng(seed).permutation(dim)
    total = sum(float(x) * float(y) for x, y in zip(a[shuffled], b[shuffled], strict=True))
    assert top_k(a[None], b[None], 1).scores[0, 0] == total


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape_and_ties(data):
    """Few or many documents, equal and zero vectors, any k and span: a complete sort's ids and scores."""
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    count, dim = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 70))
    documents = unit(count, dim, draw)
    documents = documents[draw.integers(0, data.draw(st.integers(1, count)), count)]
    documents[draw.random(count) < 0.05] = 0
    queries = np.concatenate([unit(data.draw(st.integers(0, 9)), dim, draw), documents[:3]])
    first = data.draw(st.integers(0, count - 1))
    span = first, data.draw(st.integers(first + 1, count))
    k = data.draw(st.integers(1, 50))
    ids, scores = oracle(queries, documents[span[0] : span[1]], k)
    found = top_k(queries, documents, k, span=span)
    np.testing.assert_array_equal(found.ids, ids + first)
    np.testing.assert_array_equal(found.scores, scores)


def test_the_grid_is_finer_than_float32_error():
    """Rounding to the grid moves a coordinate by at most 2^-27, and only once."""
    vectors = np.random.default_rng(0).standard_normal((50, 896)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.abs(on_grid(vectors) - vectors).max() <= 2.0**-27
    np.testing.assert_array_equal(on_grid(on_grid(vectors)), on_grid(vectors))


def alike():
    """Documents that share most of their direction, as those of a model that learnt little."""
    shared = unit(1, 48, seed=2)
    return [0.3 * unit(n, 48, seed=n) + 0.95 * shared for n in (300, 6000)]


def opposed():
    """Queries that all documents point away from: no score is positive."""
    queries, documents = alike()
    return [-queries, documents]


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("vectors", [alike, opposed])
def test_cosines_close_together(vectors, backend):
    """The same neighbours where all scores are alike, or none is positive."""
    if backend == "faiss":
        pytest.importorskip("faiss")
    both = [on_grid(v / np.linalg.norm(v, axis=1, keepdims=True)) for v in vectors()]
    ids, scores = oracle(*both, 20)
    found = top_k(*both, 20, backend=backend)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_array_equal(found.scores, scores)


def test_few_queries_are_searched_twice(monkeypatch):
    """The shortlist proves itself for all queries but those in crowds."""
    searched = []
    exhaustive = topk._exhaustive

    def counted(queries, *arguments):
        searched.append(len(queries))
        return exhaustive(queries, *arguments)

    monkeypatch.setattr(topk, "_exhaustive", counted)
    top_k(unit(300, 48, 1), unit(6000, 48), 20)
    assert not searched
    top_k(*crowded(), 20)
    assert 0 < sum(searched) < 60


def test_no_query():
    """No query gives no row."""
    assert top_k(unit(0, 8), unit(3, 8), 2).ids.shape == (0, 2)


def test_small_corpus():
    """A corpus smaller than k gives a column per document."""
    found = top_k(unit(4, 8), unit(3, 8, seed=1), 10)
    assert found.ids.shape == (4, 3)
    assert np.sort(found.ids, axis=1).tolist() == [[0, 1, 2]] * 4


def test_long_vectors_are_refused():
    """Exactness holds for unit vectors only."""
    with pytest.raises(ValueError, match="length 1"):
        top_k(unit(2, 8) * 2, unit(3, 8), 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("exact", [True, False])
def test_what_is_not_finite_is_refused(value, exact):
    """No score can be NaN."""
    wrong = unit(3, 8)
    wrong[1, 2] = value
    for queries, documents in ((wrong, unit(3, 8)), (unit(2, 8), wrong)):
        with pytest.raises(ValueError, match="expected finite vectors"):
            top_k(queries, documents, 1, exact=exact)


@pytest.mark.parametrize("exact", [True, False])
def test_nothing_to_find(exact):
    """An empty corpus has no neighbours; fewer than one is no number of neighbours."""
    assert top_k(unit(2, 8), unit(0, 8), 3, exact=exact).ids.shape == (2, 0)
    with pytest.raises(ValueError, match="k: expected 1 or more, found 0"):
        top_k(unit(2, 8), unit(3, 8), 0)


@given(st.data())
def test_ties_come_by_id(data):
    """Whatever ties there are, for any number of documents, blocks and neighbours: the ids, order and
    scores of a complete sort, in one process or merged from the spans of several."""
    count, dim = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    numbers = st.integers(-2, 2)
    rows = data.draw(
        st.lists(st.lists(numbers, min_size=dim, max_size=dim), min_size=count, max_size=count)
    )
    documents = np.array(rows, np.float32)
    norms = np.linalg.norm(documents, axis=1, keepdims=True)
    documents = on_grid(documents / np.where(norms > 0, norms, 1))
    k, parts = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 4))
    ids, scores = oracle(documents[:5], documents, k)
    cuts = [count * i // parts for i in range(parts + 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(topk._DOCUMENTS, "cpu", data.draw(st.integers(1, 50)))
        patch.setattr(topk, "_SPARE", data.draw(st.integers(0, 9)))
        found = merge([top_k(documents[:5], documents, k, span=span) for span in pairwise(cuts)], k)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_array_equal(found.scores, scores)


def test_less_exact_products_are_refused():
    """A torch that multiplies in TF32 or bfloat16 would break the bound on the error."""
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ValueError, match="the search needs 'highest'"):
            top_k(unit(2, 8), unit(3, 8), 1)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat;nprobe=8"])
def test_approximate_index(factory):
    """An index that looks everywhere finds what the exact search finds; its recall says so."""
    pytest.importorskip("faiss")
    queries, documents = unit(50, 32), unit(900, 32, seed=1)
    exact = top_k(queries, documents, 10)
    found = top_k(queries, documents, 10, index=approximate_index(documents, factory))
    np.testing.assert_array_equal(found.ids, exact.ids)
    assert recall(found.ids, exact.ids) == 1.0
    blind = approximate_index(documents, "IVF32,Flat;nprobe=1")
    assert recall(top_k(queries, documents, 10, index=blind).ids, exact.ids) < 1.0


def test_wrong_factory():
    """A factory string faiss does not know is one sentence."""
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="faiss refused"):
        approximate_index(unit(10, 8), "Flt")
