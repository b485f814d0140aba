"""Exact nearest neighbours by inner product: the same ids from every backend, device and rank count.

A float32 product differs in its last bits with the blocking, so two libraries order near-ties
differently. Here fast products only nominate (`nominees`). All vectors lie on a grid of 2^-26: the
products of two unit vectors are then multiples of 2^-52 and every partial sum below 2, which float64
holds exactly, so a float64 score is the same number in whatever order it was summed. Nominees are
scored so, and ordered by (-score, id).

    nominees, more than asked -> those that can matter by the error bound of their scores -> exact
    scores -> the first k; rows the bound leaves open go round again, finer and wider

Not here: approximate search is exact in nothing but its scores (`ApproximateIndex`).

Q  queries    N  documents    D  width    k  neighbours asked for    W  nominees
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kalm_min.embedder import fastest_safe_dtype
from kalm_min.mining.nominees import (
    DOCUMENTS,
    Ints,
    Nominate,
    Rows,
    Span,
    Vectors,
    blocks,
    by_bfloat16,
    by_faiss,
    by_float32,
    by_sorting,
    checked,
    import_faiss,
    rounding,
    threads,
)
from kalm_min.training import distributed

Backend = Literal["torch", "faiss"]

_GRID = np.float32(2.0**26)
_QUERIES = 8192  # held while all documents pass by
_SCORED = 64  # queries whose nominees are read from disk at a time
_INDEXED = 65_536  # documents added to an approximate index at a time
_SAMPLE = 200_000  # documents an approximate index learns from


class Neighbours(NamedTuple):
    """Of Q queries, the best first, ties by id."""

    ids: Ints
    """(Q, k); -1 where an approximate search found no more."""
    scores: npt.NDArray[np.float64]
    """(Q, k) exact; -inf where an approximate search found no more."""


def on_grid(vectors: Vectors) -> Vectors:
    """Round unit vectors to multiples of 2^-26: at most 7.5e-9 a coordinate, less than float32's own error.

    Applying it again changes nothing.
    """
    return np.asarray(np.rint(vectors * _GRID) / _GRID, np.float32)


def exact_scores(query: Vectors, documents: Vectors) -> npt.NDArray[np.float64]:
    """(n,) inner products of one (D,) with (n, D) vectors on the grid, without any rounding."""
    return documents.astype(np.float64) @ query.astype(np.float64)


def search(
    queries: Rows,
    documents: Rows,
    k: int,
    *,
    backend: Backend = "torch",
    device: torch.device | str = "cpu",
    span: Span | None = None,
) -> Neighbours:
    """The k documents with the highest inner product, for each query.

    Args:
        queries: (Q, D) unit or zero vectors on the grid (`on_grid`).
        documents: (N, D) likewise.
        k: at least 1; with fewer documents there are that many columns.
        backend: who nominates: "torch" (with numpy on a CPU, see `nominees`), or "faiss" (an extra),
            on its GPU where it has one.
        device: of the products.
        span: search documents span[0] to span[1] only; ids stay those of the whole.

    Raises:
        ValueError: for vectors longer than 1, or a torch that was told to multiply less exactly
            than float32.
    """
    first, last = span or (0, len(documents))
    device, k = torch.device(device), min(k, last - first)
    rounds = _rounds(backend, device, k, last - first)
    found: list[Neighbours] = []
    for start in range(0, len(queries), _QUERIES):
        block = checked(queries[start : start + _QUERIES])
        found.append(_exact(block, documents, k, rounds, (first, last), device))
    return concatenate(found, k)


def _rounds(
    backend: Backend, device: torch.device, k: int, size: int
) -> list[tuple[Nominate, int]]:
    """Who nominates how many, the cheapest first."""
    if backend == "faiss":
        finer = by_faiss
    else:
        finer = by_float32 if device.type == "cpu" else by_sorting
    first = finer, min(size, k + 64)
    if finer is by_float32 and fastest_safe_dtype(device) is torch.bfloat16:
        first = by_bfloat16, 4 * k + 64
    if size <= first[1]:
        first = finer, size
    return [first, (finer, min(size, 16 * k + 256))]


def search_on_all_ranks(
    queries: Rows, documents: Rows, k: int, nearest: Callable[[Rows, Span], Neighbours]
) -> Neighbours:
    """Each process searches its part of the documents; all get the merged neighbours.

    Args:
        queries: (Q, D), the same on every process.
        documents: (N, D), the same on every process.
        k: neighbours wanted.
        nearest: a search of the queries in a span of the documents, on this process.
    """
    rank, world = distributed.rank(), distributed.world_size()
    span = (len(documents) * rank // world, len(documents) * (rank + 1) // world)
    return merge(distributed.gather_objects(nearest(queries, span)), k)


def merge(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """The k best of the neighbours found in disjoint parts of the documents."""
    ids = np.concatenate([part.ids for part in parts], axis=1)
    scores = np.concatenate([part.scores for part in parts], axis=1)
    order = np.lexsort((ids, -scores))[:, :k]
    return Neighbours(np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1))


def concatenate(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """The neighbours of several blocks of queries, as one."""
    return Neighbours(*map(np.concatenate, zip(_nothing(0, k), *parts, strict=True)))


def _nothing(rows: int, k: int) -> Neighbours:
    """Neighbours still to be found."""
    return Neighbours(np.full((rows, k), -1), np.full((rows, k), -np.inf))


# ---- exact scores of nominees --------------------------------------------------------------------


def _exact(
    queries: Vectors,
    documents: Rows,
    k: int,
    rounds: Sequence[tuple[Nominate, int]],
    span: Span,
    device: torch.device,
) -> Neighbours:
    """The k nearest, proven: more exact or wider nominations for rows where one could be missing."""
    size = span[1] - span[0]
    best = _nothing(len(queries), k)
    rows = np.arange(len(queries))
    for nominate, width in rounds:
        if len(rows) == 0 or k == 0:
            return best
        ids, scores, error = nominate(queries[rows], documents, span, width, device)
        # k documents are known to reach floor + error, so none whose score is below floor can belong.
        floor = (scores - 2 * error)[:, k - 1 : k]
        possible = scores >= floor
        proven = (scores[:, -1] < floor[:, 0]) | (width == size)
        _fill(best, rows[proven], queries, documents, ids[proven], possible[proven])
        rows = rows[~proven]
    for start in range(0, len(rows), _SCORED):
        part = rows[start : start + _SCORED]
        best.ids[part], best.scores[part] = _exhaustive(queries[part], documents, k, span)
    return best


def _fill(
    best: Neighbours,
    rows: npt.NDArray[np.intp],
    queries: Vectors,
    documents: Rows,
    ids: Ints,
    possible: npt.NDArray[np.bool_],
) -> None:
    """Score the possible nominees of `rows` exactly; write the first k of each into `best`."""
    parts = [slice(start, start + _SCORED) for start in range(0, len(rows), _SCORED)]

    def score(part: slice) -> None:
        # Vectors on disk are fetched for many queries at once: their files are opened for each fetch.
        here = np.unique(ids[part][possible[part]])
        vectors = documents if isinstance(documents, np.ndarray) else documents[here]
        for row, of_row, may in zip(rows[part], ids[part], possible[part], strict=True):
            own = np.sort(of_row[may])
            places = own if vectors is documents else np.searchsorted(here, own)
            own, scores = _nearest(queries[row], own, vectors[places], best.ids.shape[1])
            best.ids[row, : len(own)], best.scores[row, : len(own)] = own, scores

    with ThreadPoolExecutor(threads()) as pool:
        list(pool.map(score, parts))


def _nearest(
    query: Vectors, ids: Ints, vectors: Vectors, k: int
) -> tuple[Ints, npt.NDArray[np.float64]]:
    """Ids and exact scores of the k nearest of some documents, given in the order of their ids."""
    if len(ids) > k:  # float32 leaves few of them to float64
        scores = vectors @ query
        floor = np.partition(scores, -k)[-k] - 2 * rounding(len(query))
        ids, vectors = ids[scores >= floor], vectors[scores >= floor]
    exact = exact_scores(query, vectors)
    order = np.argsort(-exact, kind="stable")[:k]  # equal: the first id
    return ids[order], exact[order]


def _exhaustive(queries: Vectors, documents: Rows, k: int, span: Span) -> Neighbours:
    """Every document scored exactly: for crowds of (nearly) equal vectors, which no list ends."""
    best = _nothing(len(queries), k)
    for start, block in blocks(documents, span, DOCUMENTS["cpu"]):
        scores = queries.astype(np.float64) @ block.astype(np.float64).T
        numbers = np.broadcast_to(np.arange(start, start + len(block)), scores.shape)
        best = merge([best, Neighbours(numbers, scores)], k)
    return best


class ApproximateIndex:
    """A faiss index made from a factory string, for corpora too large to multiply with.

    Its neighbours are scored exactly and ordered as always, but some are missed: measure it with
    `recall`. On several processes each indexes its part, so what is missed depends on their number.
    """

    def __init__(self, documents: Rows, factory: str, span: Span | None = None) -> None:
        """Train on a sample and add the documents of `span`.

        Args:
            documents: (N, D) on the grid.
            factory: e.g. "IVF4096,Flat;nprobe=64": after the semicolon, search parameters.
            span: part of the documents to index.
        """
        faiss = import_faiss()
        name, _, parameters = factory.partition(";")
        self.documents, self.span = documents, span or (0, len(documents))
        try:
            self.index = faiss.index_factory(documents.shape[1], name, faiss.METRIC_INNER_PRODUCT)
            if not self.index.is_trained:
                step = max(1, -(-(self.span[1] - self.span[0]) // _SAMPLE))
                self.index.train(documents[np.arange(*self.span, step)])
            for _, block in blocks(documents, self.span, _INDEXED):
                self.index.add(block)
            if parameters:
                faiss.ParameterSpace().set_index_parameters(self.index, parameters)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"index {factory!r}: faiss refused it ({reason})") from error

    def nearest(self, queries: Rows, k: int) -> Neighbours:
        """About the k nearest."""
        k = min(k, self.span[1] - self.span[0])
        found = [self._nearest(queries[i : i + 2048], k) for i in range(0, len(queries), 2048)]
        return concatenate(found, k)

    def _nearest(self, queries: Vectors, k: int) -> Neighbours:
        _, ids = self.index.search(queries, min(2 * k, self.span[1] - self.span[0]))
        best = _nothing(len(queries), k)
        there = ids + np.where(ids >= 0, self.span[0], 0)
        _fill(best, np.arange(len(queries)), queries, self.documents, there, ids >= 0)
        return best


def recall(found: Neighbours, exact: Neighbours) -> float:
    """Share of the exact neighbours that were found, over all queries."""
    hits = sum(len(np.intersect1d(a[a >= 0], b)) for a, b in zip(found.ids, exact.ids, strict=True))
    return hits / max(1, int((exact.ids >= 0).sum()))
