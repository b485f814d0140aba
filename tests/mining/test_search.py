import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kalm_min.mining import nominees
from kalm_min.mining import search as search_module
from kalm_min.mining.search import (
    ApproximateIndex,
    exact_scores,
    merge,
    on_grid,
    recall,
    search,
)

ROOT = Path(__file__).parent.parent.parent


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
    """Every product in float64, sorted whole."""
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
    found = search(queries, documents, k, backend=backend)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_array_equal(found.scores, scores)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_find_what_one_process_finds(tmp_path, ranks):
    """Ids, order and scores of gloo processes that each search their share, of numpy and of faiss."""
    pytest.importorskip("faiss")
    np.save(tmp_path / "vectors.npy", crowded()[1])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = [str(ROOT / "benchmarks" / "search.py"), "--agree", "--vectors", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launch, *script, "--queries", "200", "--k", "20"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert (
        f"identical ids, order and scores from numpy, faiss, cpu and {ranks} process" in done.stdout
    )


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_merge_to_the_whole(parts):
    """Searching spans of the documents and merging is searching them all."""
    queries, documents = crowded()
    cuts = [len(documents) * i // parts for i in range(parts + 1)]
    found = merge([search(queries, documents, 50, span=span) for span in pairwise(cuts)], 50)
    np.testing.assert_array_equal(found.ids, oracle(queries, documents, 50)[0])


def test_blocks_do_not_show(monkeypatch):
    """Near-ties of float32 products fall alike whatever the block sizes are."""
    queries, documents = crowded()
    whole = search(queries, documents, 20)
    monkeypatch.setattr(search_module, "_QUERIES", 37)
    for name, size in (("_CHUNK", 5), ("DOCUMENTS", 101)):
        monkeypatch.setitem(getattr(nominees, name), "cpu", size)
    found = search(queries, documents, 20)
    np.testing.assert_array_equal(found.ids, whole.ids)
    np.testing.assert_array_equal(found.scores, whole.scores)


@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_scores_do_not_depend_on_order(width, seed):
    """On the grid a float64 product is the same number in any order of summation."""
    a, b = unit(2, width, seed)
    shuffled = np.random.default_rng(seed).permutation(width)
    total = sum(float(x) * float(y) for x, y in zip(a[shuffled], b[shuffled], strict=True))
    assert exact_scores(a, b[None])[0] == total


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


@pytest.mark.parametrize("vectors", [crowded, alike, opposed])
@pytest.mark.parametrize(
    "nominate",
    [nominees.by_float32, nominees.by_bfloat16, nominees.by_sorting, nominees.by_faiss],
    ids=lambda nominate: nominate.__name__,
)
def test_whoever_nominates(monkeypatch, nominate, vectors):
    """The same neighbours whoever nominates them, on whatever device, alone."""
    if nominate is nominees.by_faiss:
        pytest.importorskip("faiss")
    both = vectors()
    if vectors is not crowded:
        both = [on_grid(v / np.linalg.norm(v, axis=1, keepdims=True)) for v in both]
    ids, scores = oracle(*both, 20)
    monkeypatch.setattr(search_module, "_rounds", lambda *_: [(nominate, 600)])
    monkeypatch.setitem(nominees.DOCUMENTS, "cpu", 700)
    found = search(*both, 20)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_array_equal(found.scores, scores)


@pytest.mark.parametrize("vectors", [unit, lambda *_: alike()[1]])
def test_bfloat16_leaves_few_to_others(vectors):
    """Its error is small enough that 600 nominees of 6,000 documents prove the first 20."""
    documents = vectors(6000, 48)
    documents = on_grid(documents / np.linalg.norm(documents, axis=1, keepdims=True))
    ids, scores, error = nominees.by_bfloat16(
        documents[:100], documents, (0, 6000), 600, torch.device("cpu")
    )
    exact = np.einsum("qd,qkd->qk", documents[:100].astype(float), documents[ids].astype(float))
    apart = exact - scores  # a constant for each query, and rounding
    assert (np.ptp(apart, axis=1) <= 2 * error[:, 0]).all()
    assert ((scores - 2 * error)[:, 19] > scores[:, -1]).all()


def test_small_corpus():
    """A corpus smaller than k gives a column per document."""
    found = search(unit(4, 8), unit(3, 8, seed=1), 10)
    assert found.ids.shape == (4, 3)
    assert np.sort(found.ids, axis=1).tolist() == [[0, 1, 2]] * 4


def test_long_vectors_are_refused():
    """Exactness holds for unit vectors only."""
    with pytest.raises(ValueError, match="length 1"):
        search(unit(2, 8) * 2, unit(3, 8), 1)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat;nprobe=8"])
def test_approximate_index(factory):
    """An index that looks everywhere finds what the exact search finds; its recall says so."""
    pytest.importorskip("faiss")
    queries, documents = unit(50, 32), unit(900, 32, seed=1)
    exact = search(queries, documents, 10)
    found = ApproximateIndex(documents, factory).nearest(queries, 10)
    np.testing.assert_array_equal(found.ids, exact.ids)
    assert recall(found, exact) == 1.0
    blind = ApproximateIndex(documents, "IVF32,Flat;nprobe=1").nearest(queries, 10)
    assert recall(blind, exact) < 1.0


def test_wrong_factory():
    """A factory string faiss does not know is one sentence."""
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="faiss refused"):
        ApproximateIndex(unit(10, 8), "Flt")
