"""Exact nearest neighbours by inner product: the same ids from every backend, device and rank count.

A float32 product differs in its last bits with the blocking, so two libraries order near-ties
differently. Here float32 only nominates. All vectors lie on a grid of 2^-26: the products of two
unit vectors are then multiples of 2^-52 and every partial sum below 2, which float64 holds exactly,
so a float64 score is the same number in whatever order it was summed. Nominees are scored so, and
ordered by (-score, id).

    float32 candidates, a few more than asked -> those that can matter by the error bound of the
    product -> exact scores -> the first k; rows the bound leaves open go round again, wider

Blocks are read from what may be a file on disk, so memory depends on the block sizes, not on the
corpus. Not here: approximate search is exact in nothing but its scores (`ApproximateIndex`).

Q  queries    N  documents    D  width    k  neighbours asked for
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kalm_min.training import distributed

Backend = Literal["torch", "faiss"]
Vectors = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Span = tuple[int, int]
Candidates = Callable[[Vectors, int], tuple[Ints, npt.NDArray[Any]]]
"""(queries, width) -> (Q, width) ids and float32 scores, the highest first."""

_GRID = np.float32(2.0**26)
_QUERIES = 8192  # held while all documents pass by
_CHUNK = {"cpu": 512, "cuda": 8192}  # of these, multiplied at a time
_DOCUMENTS = {"cpu": 8192, "cuda": 65_536}  # multiplied at a time
_FAISS_DOCUMENTS = 65_536
_SCORED = 128  # queries whose candidates are read from disk at a time
_SAMPLE = 200_000  # documents an approximate index learns from


class Rows(Protocol):
    """(n, D) float32 on the grid: an array, or vectors on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, D)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Vectors:
        """The rows of a slice, or those numbered by an array."""
        ...


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
        backend: who nominates: "torch" (on a CPU numpy, see `_cpu_candidates`), or "faiss" (an
            extra), on its GPU where it has one.
        device: of the products.
        span: search documents span[0] to span[1] only; ids stay those of the whole.

    Raises:
        ValueError: for vectors longer than 1, or a torch that was told to multiply less exactly
            than float32.
    """
    first, last = span or (0, len(documents))
    device, k = torch.device(device), min(k, last - first)
    own = _cpu_candidates if device.type == "cpu" else _gpu_candidates
    nominate = own if backend == "torch" else _faiss_candidates
    found: list[Neighbours] = []
    for start in range(0, len(queries), _QUERIES):
        block = _checked(queries[start : start + _QUERIES])

        def candidates(rows: Vectors, width: int) -> Any:
            return nominate(rows, documents, (first, last), width, device)

        found.append(_exact(block, documents, k, candidates, (first, last)))
    return concatenate(found, k)


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
    queries: Vectors, documents: Rows, k: int, candidates: Candidates, span: Span
) -> Neighbours:
    """The k nearest, proven: wider nominations for rows where float32 could have missed one."""
    size = span[1] - span[0]
    best = _nothing(len(queries), k)
    rows = np.arange(len(queries))
    for width in (min(size, k + 64), min(size, 16 * k + 256)):
        if len(rows) == 0 or k == 0:
            return best
        ids, scores = candidates(queries[rows], width)
        # k documents score at least floor in float32, so none below floor - 2 error can belong.
        floor = scores[:, k - 1 : k] - 2 * _error(queries.shape[1])
        possible = scores >= floor
        proven = (scores[:, -1] < floor[:, 0]) | (width == size)
        _fill(best, rows[proven], queries, documents, ids[proven], possible[proven])
        rows = rows[~proven]
    for start in range(0, len(rows), _SCORED):
        part = rows[start : start + _SCORED]
        best.ids[part], best.scores[part] = _exhaustive(queries[part], documents, k, span)
    return best


def _error(width: int) -> float:
    """How far a float32 product of two unit vectors can be from the exact one, whatever the order."""
    return 1.01 * (width + 2) * 2.0**-24


def _fill(
    best: Neighbours,
    rows: npt.NDArray[np.intp],
    queries: Vectors,
    documents: Rows,
    ids: Ints,
    possible: npt.NDArray[np.bool_],
) -> None:
    """Score the possible candidates of `rows` exactly; write the first k of each into `best`."""
    parts = [slice(start, start + _SCORED) for start in range(0, len(rows), _SCORED)]

    def score(part: slice) -> None:
        # Vectors on disk are fetched for many queries at once: their files are opened for each fetch.
        here = np.unique(ids[part][possible[part]])
        vectors = documents if isinstance(documents, np.ndarray) else documents[here]
        for row, of_row, may in zip(rows[part], ids[part], possible[part], strict=True):
            own = np.sort(of_row[may])
            places = own if vectors is documents else np.searchsorted(here, own)
            scores = exact_scores(queries[row], vectors[places])
            order = np.argsort(-scores, kind="stable")[: best.ids.shape[1]]  # equal: the first id
            best.ids[row, : len(order)] = own[order]
            best.scores[row, : len(order)] = scores[order]

    with ThreadPoolExecutor(_threads()) as pool:
        list(pool.map(score, parts))


def _threads() -> int:
    """For what numpy does on one thread; more than a few would mostly wait for memory."""
    return min(8, torch.get_num_threads())


def _exhaustive(queries: Vectors, documents: Rows, k: int, span: Span) -> Neighbours:
    """Every document scored exactly: for crowds of (nearly) equal vectors, which no list ends."""
    best = _nothing(len(queries), k)
    for start, block in _blocks(documents, span, _DOCUMENTS["cpu"]):
        scores = queries.astype(np.float64) @ block.astype(np.float64).T
        numbers = np.broadcast_to(np.arange(start, start + len(block)), scores.shape)
        best = merge([best, Neighbours(numbers, scores)], k)
    return best


def _blocks(documents: Rows, span: Span, step: int) -> Iterator[tuple[int, Vectors]]:
    """(number of the first, vectors) of the documents of a span, `step` at a time."""
    for start in range(span[0], span[1], step):
        yield start, _checked(documents[start : min(start + step, span[1])])


def _checked(vectors: Vectors) -> Vectors:
    """The vectors, if exact scores are exact for them."""
    if len(vectors) and np.einsum("nd,nd->n", vectors, vectors).max() > 1.001:
        raise ValueError("expected vectors of length 1, found a longer one")
    return vectors


# ---- nominees ------------------------------------------------------------------------------------


def _cpu_candidates(
    queries: Vectors, documents: Rows, span: Span, width: int, _: torch.device
) -> tuple[Ints, Vectors]:
    """Products in blocks; what beats a query's worst candidate so far joins its list.

    In numpy: on the processor measured (AMD, AVX-512) its BLAS multiplies 1.3 times as fast as
    torch's, and it compares, finds and partitions 3 to 6 times as fast.
    """
    chunk, step = _CHUNK["cpu"], max(width, _DOCUMENTS["cpu"])
    # One buffer for all products: fresh memory of this size costs as much as a pass over it.
    scratch = np.empty(min(chunk, len(queries)) * min(step, span[1] - span[0]), np.float32)
    best: dict[int, tuple[Ints, Vectors]] = {}  # by the first query of each thread's part
    part = -(-chunk // _threads())
    with ThreadPoolExecutor(_threads()) as pool:
        for start, block in _blocks(documents, span, step):
            for first in range(0, len(queries), chunk):
                asked = queries[first : first + chunk]
                scores = scratch[: len(asked) * len(block)].reshape(len(asked), len(block))
                np.matmul(asked, block.T, out=scores)
                places = range(first, first + len(asked), part)
                parts = [scores[place - first : place - first + part] for place in places]
                held = map(best.get, places)
                joined = pool.map(_absorb, held, parts, repeat(start), repeat(width))
                best.update(zip(places, joined, strict=True))
    ids, scores = map(np.concatenate, zip(*best.values(), strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)


def _absorb(
    best: tuple[Ints, Vectors] | None, scores: Vectors, start: int, width: int
) -> tuple[Ints, Vectors]:
    """Join the (q, n) scores of the documents from `start` on to the best (q, width) ids and scores."""
    q, n = scores.shape
    if best is None:
        # The values alone are found five times as fast as where they are.
        least = np.partition(scores, n - width, axis=1)[:, n - width, None]
        floor = np.nextafter(least, -np.inf)
        best = np.empty((q, 0), np.int64), np.empty((q, 0), np.float32)
    else:
        floor = best[1].min(1, keepdims=True)
    places = np.flatnonzero(scores > floor)
    rows, columns = np.divmod(places, n)
    counts = np.bincount(rows, minlength=q)
    slots = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
    new = np.full((q, counts.max()), -np.inf, np.float32)
    new_ids = np.full(new.shape, -1)
    new[rows, slots] = scores.ravel()[places]
    new_ids[rows, slots] = columns + start
    ids, scores = np.concatenate([best[0], new_ids], 1), np.concatenate([best[1], new], 1)
    top = np.argpartition(scores, -width, axis=1)[:, -width:]
    return np.take_along_axis(ids, top, 1), np.take_along_axis(scores, top, 1)


def _gpu_candidates(
    queries: Vectors, documents: Rows, span: Span, width: int, device: torch.device
) -> tuple[Ints, Vectors]:
    """The same on a GPU, which sorts as fast as it multiplies."""
    if torch.get_float32_matmul_precision() != "highest":
        raise ValueError("torch.set_float32_matmul_precision: the search needs 'highest'")
    step = max(width, _DOCUMENTS.get(device.type, 8192))
    chunks = torch.from_numpy(queries).to(device).split(_CHUNK.get(device.type, 512))
    best: list[tuple[Tensor, Tensor] | None] = [None] * len(chunks)
    for start, block in _blocks(documents, span, step):
        there = torch.from_numpy(block).to(device)
        for i, chunk in enumerate(chunks):
            scores, ids = (chunk @ there.T).topk(min(width, len(there)))
            ids += start
            if (held := best[i]) is not None:
                scores, order = torch.cat([held[1], scores], 1).topk(width)
                ids = torch.cat([held[0], ids], 1).gather(1, order)
            best[i] = ids, scores
    ids, scores = map(torch.cat, zip(*filter(None, best), strict=True))
    return ids.cpu().numpy(), scores.cpu().numpy()


def _faiss_candidates(
    queries: Vectors, documents: Rows, span: Span, width: int, device: torch.device
) -> tuple[Ints, npt.NDArray[Any]]:
    """faiss's flat search of one block after another: its index would hold the corpus in memory."""
    faiss = import_faiss()
    best: Neighbours | None = None
    gpu = faiss.StandardGpuResources() if device.type == "cuda" and _has_gpu(faiss) else None
    for start, block in _blocks(documents, span, max(width, _FAISS_DOCUMENTS)):
        options = {"metric": faiss.METRIC_INNER_PRODUCT}
        k = min(width, len(block))
        arrays = np.ascontiguousarray(queries), np.ascontiguousarray(block)
        scores, ids = (
            faiss.knn_gpu(gpu, *arrays, k, **options) if gpu else faiss.knn(*arrays, k, **options)
        )
        found = Neighbours(ids + start, scores.astype(np.float64))
        best = found if best is None else merge([best, found], width)
    assert best is not None
    return best.ids, best.scores


def _has_gpu(faiss: Any) -> bool:
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def import_faiss() -> Any:
    """The module. Raises ValueError naming the extra where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            'faiss is not installed: pip install "kalm-min[mining]" (or [mining-gpu]), '
            "or search with torch, which finds the same"
        ) from error
    return faiss


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
            for _, block in _blocks(documents, self.span, _FAISS_DOCUMENTS):
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
