"""Who could be among the nearest: fast products, compared and kept a few more than asked.

Scores here are off by rounding, by at most the `error` that comes with them. `search` scores the
nominees exactly and proves by that error that nobody else could belong, so what is nominated by which
library, device or number format changes the time and nothing else.

Blocks are read from what may be a file on disk, so memory depends on the block sizes, not on the
corpus.

Q  queries    N  documents    D  width    W  nominees    q, n  those of a block
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Vectors = npt.NDArray[np.float32]
Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]
Span = tuple[int, int]

DOCUMENTS = {"cpu": 8192, "cuda": 65_536}  # multiplied at a time
_CHUNK = {"cpu": 512, "cuda": 8192}  # queries multiplied at a time
_FAISS_DOCUMENTS = 65_536
_CACHED = 256  # vectors rounded at a time
_BFLOAT16_DIGITS = 8
_LEAST = {np.dtype(np.float32): -np.inf, np.dtype(np.int16): 1}  # a score that ends every list


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


class Nominees(NamedTuple):
    """W documents for each of Q queries, the highest score first."""

    ids: Ints
    """(Q, W); -1 where none is left, its score being one that no other document exceeds."""
    scores: Floats
    """(Q, W) rounded inner products, up to a constant for each query."""
    error: Floats
    """(Q, W) how far the score can be from the exact one, and all lower ones too, nominated or not."""


Nominate = Callable[[Vectors, Rows, Span, int, torch.device], Nominees]
"""(queries, documents, the part of them searched, W, device of the products)."""


def rounding(width: int) -> float:
    """How far a float32 product of two unit vectors can be from the exact one, whatever the order."""
    return 1.01 * (width + 2) * 2.0**-24


def threads() -> int:
    """For what numpy does on one thread; more than a few would mostly wait for memory."""
    return min(8, torch.get_num_threads())


def blocks(documents: Rows, span: Span, step: int) -> Iterator[tuple[int, Vectors]]:
    """(number of the first, vectors) of the documents of a span, `step` at a time."""
    for start in range(span[0], span[1], step):
        yield start, checked(documents[start : min(start + step, span[1])])


def checked(vectors: Vectors) -> Vectors:
    """The vectors, if exact scores are exact for them; ValueError for vectors longer than 1."""
    if len(vectors) and np.einsum("nd,nd->n", vectors, vectors).max() > 1.001:
        raise ValueError("expected vectors of length 1, found a longer one")
    return vectors


# ---- processors ----------------------------------------------------------------------------------


def by_float32(
    queries: Vectors, documents: Rows, span: Span, width: int, device: torch.device
) -> Nominees:
    """On a CPU.

    In numpy: on the processor measured (AMD, AVX-512) its BLAS multiplies 1.3 times as fast as
    torch's, and it compares, finds and partitions 3 to 6 times as fast.
    """
    step = max(width, DOCUMENTS["cpu"])
    # One buffer for all products: fresh memory of this size costs as much as a pass over it.
    scratch = np.empty(min(_CHUNK["cpu"], len(queries)) * min(step, span[1] - span[0]), np.float32)

    def products(block: Vectors) -> Callable[[slice], Vectors]:
        def multiplied(chunk: slice) -> Vectors:
            asked = queries[chunk]
            scores = scratch[: len(asked) * len(block)].reshape(len(asked), len(block))
            return np.matmul(asked, block.T, out=scores)

        return multiplied

    ids, scores = _highest(len(queries), width, blocks(documents, span, step), products)
    return Nominees(ids, scores, np.full(ids.shape, rounding(queries.shape[1])))


def by_bfloat16(
    queries: Vectors, documents: Rows, span: Span, width: int, device: torch.device
) -> Nominees:
    """On a CPU with native bfloat16, which multiplies several times as fast; only scores above 0.

    What documents share adds the same to all scores of a query: it is taken from the documents, and
    with their length the rounding errors shrink, to a third for vectors with cosines around 0.9.

    Positive bfloat16 numbers are ordered like the integers of the same bits, and negative numbers are
    negative integers: the integers are compared.
    """
    step = max(width, 2 * DOCUMENTS["cpu"])  # as many bytes of scores
    asked, moved, _ = _rounded(queries, np.zeros(queries.shape[1], np.float32))  # (Q, D), (Q,)
    shared = documents[span[0] : min(span[0] + step, span[1])].mean(0)  # (D,)
    scratch = torch.empty(_CHUNK["cpu"] * step, dtype=torch.bfloat16)
    furthest, longest = 0.0, 0.0

    def products(block: Vectors) -> Callable[[slice], npt.NDArray[np.int16]]:
        nonlocal furthest, longest
        there, distances, lengths = _rounded(block, shared)  # (n, D)
        furthest, longest = max(furthest, distances.max()), max(longest, lengths.max())

        def multiplied(chunk: slice) -> npt.NDArray[np.int16]:
            scores = scratch[: len(asked[chunk]) * len(there)].view(-1, len(there))  # (q, n)
            return torch.mm(asked[chunk], there.T, out=scores).view(torch.int16).numpy()

        return multiplied

    ids, codes = _highest(len(queries), width, blocks(documents, span, step), products)
    scores = torch.from_numpy(codes).view(torch.bfloat16).float().numpy()  # (Q, W)
    # |qd - q'd'| <= |q - q'| |d| + |q'| |d - d'|; then the sum's rounding; then the score's own, which
    # is half of the distance to the next number.
    error = moved[:, None] * longest + 1.01 * furthest + 2 * rounding(queries.shape[1])  # (Q, 1)
    own = 2.0 ** (np.frexp(scores)[1] - _BFLOAT16_DIGITS - 1)  # (Q, W)
    return Nominees(ids, scores, 1.01 * (error + own))


def _rounded(vectors: Vectors, shared: Vectors) -> tuple[Tensor, Vectors, Vectors]:
    """(n, D) in bfloat16, less (D,); and (n,) how far rounding moved each, and how long they were."""
    rounded = torch.empty(vectors.shape, dtype=torch.bfloat16)
    moved, lengths = torch.empty(2, len(vectors))
    for start in range(0, len(vectors), _CACHED):
        part = slice(start, start + _CACHED)
        whole = torch.from_numpy(vectors[part] - shared)
        near = rounded[part].copy_(whole).float().sub_(whole)
        torch.linalg.vector_norm(near, dim=1, out=moved[part])
        torch.linalg.vector_norm(whole, dim=1, out=lengths[part])
    return rounded, moved.numpy(), lengths.numpy()


def _highest(
    count: int,
    width: int,
    documents: Iterator[tuple[int, Vectors]],
    products: Callable[[Vectors], Callable[[slice], npt.NDArray[Any]]],
) -> tuple[Ints, npt.NDArray[Any]]:
    """(Q, W) ids and scores: what beats a query's worst candidate so far joins its list."""
    chunk = _CHUNK["cpu"]
    best: dict[int, tuple[Ints, npt.NDArray[Any]]] = {}  # by the first query of each thread's part
    part = -(-chunk // threads())
    with ThreadPoolExecutor(threads()) as pool:
        for start, block in documents:
            multiplied = products(block)
            for first in range(0, count, chunk):
                scores = multiplied(slice(first, first + chunk))
                places = range(first, first + len(scores), part)
                parts = [scores[place - first : place - first + part] for place in places]
                held = map(best.get, places)
                joined = pool.map(_absorb, held, parts, repeat(start), repeat(width))
                best.update(zip(places, joined, strict=True))
    ids, scores = map(np.concatenate, zip(*best.values(), strict=True))
    return _in_order(ids, scores, width)


def _absorb(
    best: tuple[Ints, npt.NDArray[Any]] | None,
    scores: npt.NDArray[Any],
    start: int,
    width: int,
) -> tuple[Ints, npt.NDArray[Any]]:
    """Join the (q, n) scores of the documents from `start` on to the best (q, W) ids and scores."""
    q, n = scores.shape
    least = _LEAST[scores.dtype]
    if best is None:
        # The values alone are found five times as fast as where they are.
        floor = np.partition(scores, n - width, axis=1)[:, n - width, None]
        places = np.flatnonzero(scores >= np.maximum(floor, least, dtype=scores.dtype))
        best = np.empty((q, 0), np.int64), np.empty((q, 0), scores.dtype)
    else:
        places = np.flatnonzero(scores > best[1].min(1, keepdims=True))
    rows, columns = np.divmod(places, n)
    counts = np.bincount(rows, minlength=q)
    slots = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
    room = max(counts.max(), width - best[0].shape[1])
    new = np.full((q, room), least, scores.dtype)
    new_ids = np.full(new.shape, -1)
    new[rows, slots] = scores.ravel()[places]
    new_ids[rows, slots] = columns + start
    ids, scores = np.concatenate([best[0], new_ids], 1), np.concatenate([best[1], new], 1)
    top = np.argpartition(scores, -width, axis=1)[:, -width:]
    return np.take_along_axis(ids, top, 1), np.take_along_axis(scores, top, 1)


def _in_order(ids: Ints, scores: npt.NDArray[Any], width: int) -> tuple[Ints, npt.NDArray[Any]]:
    """The W highest, the highest first."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :width]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)


# ---- GPUs and faiss ------------------------------------------------------------------------------


def by_sorting(
    queries: Vectors, documents: Rows, span: Span, width: int, device: torch.device
) -> Nominees:
    """In float32 on a GPU, which sorts as fast as it multiplies.

    Raises:
        ValueError: for a torch that was told to multiply less exactly than float32.
    """
    if torch.get_float32_matmul_precision() != "highest":
        raise ValueError("torch.set_float32_matmul_precision: the search needs 'highest'")
    step = max(width, DOCUMENTS.get(device.type, 8192))
    chunks = torch.from_numpy(queries).to(device).split(_CHUNK.get(device.type, 512))
    best: list[tuple[Tensor, Tensor] | None] = [None] * len(chunks)
    for start, block in blocks(documents, span, step):
        there = torch.from_numpy(block).to(device)
        for i, chunk in enumerate(chunks):
            scores, ids = (chunk @ there.T).topk(min(width, len(there)))
            ids += start
            if (held := best[i]) is not None:
                scores, order = torch.cat([held[1], scores], 1).topk(width)
                ids = torch.cat([held[0], ids], 1).gather(1, order)
            best[i] = ids, scores
    ids, scores = map(torch.cat, zip(*filter(None, best), strict=True))
    error = np.full(ids.shape, rounding(queries.shape[1]))
    return Nominees(ids.cpu().numpy(), scores.cpu().numpy(), error)


def by_faiss(
    queries: Vectors, documents: Rows, span: Span, width: int, device: torch.device
) -> Nominees:
    """faiss's flat search of one block after another: its index would hold the corpus in memory."""
    faiss = import_faiss()
    ids, scores = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    gpu = faiss.StandardGpuResources() if device.type == "cuda" and _has_gpu(faiss) else None
    for start, block in blocks(documents, span, max(width, _FAISS_DOCUMENTS)):
        options = {"metric": faiss.METRIC_INNER_PRODUCT}
        k = min(width, len(block))
        arrays = np.ascontiguousarray(queries), np.ascontiguousarray(block)
        new, new_ids = (
            faiss.knn_gpu(gpu, *arrays, k, **options) if gpu else faiss.knn(*arrays, k, **options)
        )
        ids, scores = np.concatenate([ids, new_ids + start], 1), np.concatenate([scores, new], 1)
        ids, scores = _in_order(ids, scores, width)
    return Nominees(ids, scores, np.full(ids.shape, rounding(queries.shape[1])))


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
