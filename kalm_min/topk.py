"""Exact nearest neighbours by inner product: equal ids for every device, backend and block size.

Two libraries order near-ties of float32 products differently, so here these only select a shortlist.
All vectors lie on a grid of 2^-26: the products of two unit vectors are multiples of 2^-52 and every
partial sum is below 2, which float64 holds exactly, in any order of summation.

Q queries    N documents    D dimension    S length of a shortlist    q, n  those of a block
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Vectors = NDArray[np.float32]
Ints = NDArray[np.int64]
Span = tuple[int, int]
_Pairs = tuple[Tensor, Tensor]  # ids and scores

_GRID = np.float32(2.0**26)
_HELD = 8192  # queries compared in one pass over the documents
_QUERIES = {"cpu": 512, "cuda": 8192}  # multiplied at a time
_DOCUMENTS = {"cpu": 8192, "cuda": 65_536}  # multiplied at a time
_INDEXED = 65_536  # documents given to faiss at a time
_SPARE = 64  # documents on a shortlist in addition to k
_RESCORED = {"cpu": 1 << 18, "cuda": 1 << 24}  # float64 coordinates at a time, for the cache
_SAMPLE = 200_000  # documents on which an approximate index is trained


class Rows(Protocol):
    """(n, D) float32 unit or zero vectors on the grid: an array, or vectors on disk."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> Vectors: ...


class Neighbours(NamedTuple):
    """The nearest documents of Q queries, best first, ties in the order of ids."""

    ids: Ints  # (Q, k); -1 if an approximate search found no more
    scores: NDArray[np.float64]  # (Q, k) inner products; -inf if there is no id


def on_grid(vectors: Vectors | NDArray[np.float64]) -> Vectors:
    """Round unit vectors to multiples of 2^-26, by less than float32's error; idempotent."""
    return np.asarray(np.rint(vectors * _GRID) / _GRID, np.float32)


def top_k(
    queries: Rows,  # (Q, D) unit or zero vectors on the grid (`on_grid`)
    documents: Rows,  # (N, D) likewise; they are read in blocks, twice per 8,192 queries
    k: int,  # at least 1; if there are fewer documents, the result has that many columns
    *,
    device: torch.device | str = "cpu",
    backend: Literal["torch", "faiss"] = "torch",
    span: Span | None = None,
    exact: bool = True,
    index: Any = None,
) -> Neighbours:
    """The k documents with the highest inner product, for each query.

    Args:
        device: the device of the products.
        backend: selects the shortlists; faiss is an extra, and uses a GPU if it has one.
        span: search documents span[0] to span[1] only; ids stay those of the full set.
        exact: False returns float32 products, with near-ties in any order, which is enough for
            evaluation and reads the documents once.
        index: an `approximate_index` of the span, which selects the shortlists; see `recall`.

    Raises ValueError for vectors that are longer than 1 or not finite, for k < 1, and if torch is
    set to multiply less exactly than float32.
    """
    if k < 1:
        raise ValueError(f"k: expected 1 or more, found {k}")
    if torch.get_float32_matmul_precision() != "highest":
        raise ValueError("torch.set_float32_matmul_precision: the search needs 'highest'")
    span = span or (0, len(documents))
    total = span[1] - span[0]
    k = min(k, total)
    size = min(k + _SPARE, total) if exact else k
    result = Neighbours(np.empty((len(queries), k), np.int64), np.empty((len(queries), k)))
    for start, block in _blocks(queries, (0, len(queries) if k else 0), _HELD):
        block = block.to(device)  # (q, D)
        if index is not None:
            ids = torch.from_numpy(index.search(block.cpu().numpy(), min(2 * k, total))[1])
            ids, is_found = (ids + span[0]).to(device), (ids >= 0).to(device)
            ids, scores = _rescore(block, documents, ids, is_found, k)
            ids[scores == -torch.inf] = -1
        else:
            ids, scores = _shortlist(block, documents, span, size, backend)  # (q, S)
        if exact and index is None:
            # The maximum error of a float32 product of unit vectors in any order of summation.
            error = 1.01 * (block.shape[1] + 2) * 2.0**-24
            # At least k documents reach scores[k - 1] - error exactly, and no document exceeds its
            # float32 score by more than error. So a shortlist that ends below the bound is proven
            # to hold the top k; other queries (crowds of near-ties) are searched in float64.
            bound = scores[:, k - 1 : k] - 2 * error  # (q, 1)
            is_proven = (scores[:, -1:] < bound) | (size == total)  # (q, 1)
            ids, scores = _rescore(block, documents, ids, (scores >= bound) & is_proven, k)
            rest = (~is_proven[:, 0]).nonzero()[:, 0]
            for part in rest.split(_QUERIES["cpu"]) if len(rest) else ():
                ids[part], scores[part] = _exhaustive(block[part], documents, k, span)
        result.ids[start : start + len(block)] = ids.cpu().numpy()
        result.scores[start : start + len(block)] = scores.cpu().numpy()
    return result


def merge(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """The k best of the neighbours found in disjoint parts of the documents."""
    ids, scores = (np.concatenate(both, axis=1) for both in zip(*parts, strict=True))
    order = np.lexsort((ids, -scores))[:, :k]
    return Neighbours(np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1))


def _blocks(rows: Rows, span: Span, step: int) -> Iterator[tuple[int, Tensor]]:
    """(n, D) blocks of rows, each with its start; exact scores need at most unit length."""
    for start in range(*span, step):
        vectors = rows[start : min(start + step, span[1])]
        if not np.einsum("nd,nd->n", vectors, vectors).max() <= 1.001:  # false for NaN
            raise ValueError("expected finite vectors of length 1, found others")
        yield start, torch.from_numpy(np.require(vectors, np.float32, ["C", "W"]))


def _shortlist(queries: Tensor, documents: Rows, span: Span, size: int, backend: str) -> _Pairs:
    """(q, S) ids and float32 scores, highest first, by blocks of products."""
    if backend == "faiss":
        return _shortlist_of_faiss(queries, documents, span, size)
    kind = queries.device.type
    chunks = queries.split(_QUERIES.get(kind, 512))
    step = max(size, _DOCUMENTS.get(kind, 8192))
    best: list[_Pairs] = []
    # One buffer for all products: new memory of this size costs as much as a pass over it.
    scratch = queries.new_empty(len(chunks[0]) * min(step, span[1] - span[0]))
    for start, block in _blocks(documents, span, step):
        block = block.to(queries.device)
        for i, chunk in enumerate(chunks):
            scores = scratch[: len(chunk) * len(block)].view(len(chunk), len(block))
            torch.mm(chunk, block.T, out=scores)  # (q, n)
            if start == span[0]:
                values, columns = scores.topk(size)
                best.append((columns + start, values))
            else:
                best[i] = _join(best[i], scores, start)
    return torch.cat([ids for ids, _ in best]), torch.cat([scores for _, scores in best])


def _join(best: _Pairs, scores: Tensor, start: int) -> _Pairs:
    """Join the (q, n) scores of documents start, start + 1, ... to the (q, S) best so far."""
    size = best[0].shape[1]
    if scores.is_cuda:
        new, ids = scores.topk(min(size, scores.shape[1]))
    else:
        # Only scores above the lowest on the list are compared: a topk of all takes 5 to 10 times
        # as long on a CPU, and numpy finds these few faster than torch.
        is_above = (scores > best[1][:, -1:]).numpy()
        rows, columns = np.divmod(np.flatnonzero(is_above), scores.shape[1])
        counts = np.bincount(rows, minlength=len(scores))
        slots = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        ids = torch.zeros(len(scores), int(counts.max()), dtype=torch.int64)
        new = torch.full(ids.shape, -torch.inf)
        at = torch.from_numpy(rows), torch.from_numpy(slots)
        ids[at] = torch.from_numpy(columns)
        new[at] = scores[at[0], ids[at]]
    return _best([best, (ids + start, new)], size)


def _best(pairs: Sequence[_Pairs], k: int) -> _Pairs:
    """The k highest of sets of ids and scores, each (q, any number); ties in the order given."""
    ids, scores = (torch.cat(one, 1) for one in zip(*pairs, strict=True))
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order)[:, :k], scores[:, :k]


def _shortlist_of_faiss(queries: Tensor, documents: Rows, span: Span, size: int) -> _Pairs:
    """The same by faiss's flat search of one block after another, with one block in memory."""
    faiss = import_faiss()
    knn = faiss.knn
    if queries.is_cuda and getattr(faiss, "get_num_gpus", int)():
        knn = partial(faiss.knn_gpu, faiss.StandardGpuResources())
    best = torch.empty(len(queries), 0, dtype=torch.int64), torch.empty(len(queries), 0)
    for start, block in _blocks(documents, span, max(size, _INDEXED)):
        left, k = queries.cpu().numpy(), min(size, len(block))
        new, ids = knn(left, block.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        best = _best([best, (torch.from_numpy(ids) + start, torch.from_numpy(new))], size)
    return best[0].to(queries.device), best[1].to(queries.device)


def _rescore(queries: Tensor, documents: Rows, ids: Tensor, is_candidate: Tensor, k: int) -> _Pairs:
    """(q, k) ids and exact scores of the nearest of (q, S) candidates; -inf if there are fewer."""
    ids, order = ids.sort(1)  # so that ties stay in the order of ids
    rows, columns = is_candidate.gather(1, order).nonzero(as_tuple=True)  # (P,) pairs
    wanted, order = ids[rows, columns].sort()  # so that documents are read in order
    rows, columns = rows[order], columns[order]
    scores = torch.full(ids.shape, -torch.inf, dtype=torch.float64, device=queries.device)
    exact = queries.double()  # (q, D)
    step = max(1, _RESCORED.get(queries.device.type, 1 << 18) // queries.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        unique, index = wanted[part].unique_consecutive(return_inverse=True)
        vectors = torch.from_numpy(documents[unique.cpu().numpy()]).to(queries.device)
        scores[rows[part], columns[part]] = (exact[rows[part]] * vectors[index]).sum(1)
    return _best([(ids, scores)], k)


def _exhaustive(queries: Tensor, documents: Rows, k: int, span: Span) -> _Pairs:
    """(q, k) ids and scores, with every document scored in float64."""
    ids = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    best = ids, ids.double()
    for start, block in _blocks(documents, span, _DOCUMENTS["cpu"]):
        scores = queries.double() @ block.to(queries.device).double().T  # (q, n)
        ids = torch.arange(start, start + len(block), device=ids.device).expand(scores.shape)
        best = _best([best, (ids, scores)], k)
    return best


def approximate_index(documents: Rows, factory: str, span: Span | None = None) -> Any:
    """A faiss index of all documents, or those of `span`, for corpora too large for products.

    `factory` is for example "IVF4096,Flat;nprobe=64": after the semicolon, search parameters.
    Raises ValueError if faiss refuses it, which no documents suffice to find out.
    """
    faiss = import_faiss()
    name, _, parameters = factory.partition(";")
    span = span or (0, len(documents))
    try:
        index = faiss.index_factory(documents[:1].shape[1], name, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained and span[1] > span[0]:
            step = max(1, -(-(span[1] - span[0]) // _SAMPLE))
            index.train(documents[np.arange(*span, step)])
        for _, block in _blocks(documents, span, _INDEXED):
            index.add(block.numpy())
        if parameters:
            faiss.ParameterSpace().set_index_parameters(index, parameters)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"index {factory!r}: faiss refused it ({reason})") from error
    return index


def recall(found: Ints, exact: Ints) -> float:
    """The share of the (Q, k) ids of exact neighbours that are among the ids found."""
    hits = sum(len(np.intersect1d(a[a >= 0], b)) for a, b in zip(found, exact, strict=True))
    return hits / max(1, int((exact >= 0).sum()))


def import_faiss() -> Any:
    """The module. Raises ValueError if it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            'faiss is not installed: pip install "kalm-min[mining]" (or [mining-gpu]), '
            "or search with torch, which finds the same"
        ) from error
    return faiss
