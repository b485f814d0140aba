"""InfoNCE, each query against its positive and every other candidate, and Matryoshka over it.

B, b  queries, of a tile    N, n  documents, of a tile    D  dimension    K  leading slices compared

    p_i = exp(s(q_i, d_label_i) / t) / sum_n exp(s(q_i, d_n) / t)      s: cosine, t: temperature
    L   = mean_i -(1 - p_i)^gamma log p_i,    -log p = log(1 + e^x),    x = z - s(q, d+) / t

KaLM V2 report, sections on the training objective and on focal-style reweighting; gamma = 0 is
plain InfoNCE. z is the log-sum-exp over the negatives alone, taken tile by tile; if all tiles
together exceed the memory, each is computed again in the backward pass. Which documents are not
candidates (`masking`) and which process computed them is decided elsewhere.
Matryoshka is the same loss on leading slices of the vectors, so that a slice can be used alone.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

_SMALLEST = 1e-12  # the least norm that is divided by: a zero vector has cosine 0, not nan
_CACHED = 1 << 20  # pairs per tile on a CPU, whose cache then holds the 4 MiB of scores per slice

# For each of K leading slices, the (n, d) coordinates that it adds to the previous slice, and the
# (n, 1) reciprocals of its lengths.
_Prefixes = list[tuple[Tensor, Tensor]]


def info_nce(
    queries: Tensor,
    documents: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    mask: Tensor | Callable[[slice, slice, Tensor, Tensor], Tensor] | None = None,
    gamma: float = 0.0,
    dims: Sequence[int] = (),
    weights: Sequence[float] = (),
    extra_negatives: Callable[[Tensor, Tensor], Tensor] | None = None,
    document_negatives: Tensor | None = None,
    memory_gib: float = 1.0,
) -> Tensor:
    """The mean loss over the B queries given, a scalar in the dtype of the inputs.

    In distributed training each process scores its own queries against the documents of all; the
    mean over processes, which data-parallel averaging takes, is then the mean over all queries.

    Args:
        queries: (B, D), not normalised.
        documents: (N, D), not normalised.
        labels: (B,) int64, the row of each query's positive in `documents`.
        temperature: divides the cosine; 0.01 in the reports.
        mask: (B, N) bool, True where a document is not a candidate of a query; or a function that
            gives this for a tile, from the slices of queries and documents, their (b, n) cosines
            and the (b, 1) cosines of the positives. The positive is always a candidate.
        gamma: exponent of the focal weight (1 - p)^gamma; 0.5 in the V2 report. The gradient flows
            through the weight, as in the original focal loss; the report does not say.
        dims, weights: if given, the result is the weighted sum over leading slices (`matryoshka`),
            in one pass over the products. A mask function gets the cosines of the largest.
        extra_negatives: maps slices of queries and documents to the (B, S) cosines of S further
            negatives per query, -inf for those it lacks (see `mixed_cosines`).
        document_negatives: (N,) bool; the documents that, when they are negatives of a query, are
            also negatives of its positive. As in the public code, GTE and Qwen3, not the reports.
        memory_gib: GiB for scores, in addition to the vectors and their gradients.
    """
    slices = sorted(zip(dims, weights, strict=True)) or [(queries.shape[1], 1.0)]
    cuts = [dim for dim, _ in slices]
    # Measured (benchmarks/loss_memory.py): backward takes 12 float32 numbers per pair and slice.
    products = 1 if document_negatives is None else 2
    pairs = max(1, int(memory_gib * 2**30 / (products * (48 * len(cuts) + 16))))
    fits = len(queries) * len(documents) <= pairs
    pairs = pairs if queries.is_cuda else min(pairs, _CACHED)
    tile_rows = min(len(queries), math.isqrt(pairs))
    tile_columns = pairs // tile_rows
    both = (torch.split(vectors, tile_rows) for vectors in (queries, documents[labels]))
    blocks = [[_prefixes(part, cuts) for part in parts] for parts in zip(*both, strict=True)]
    paired = [torch.stack(_cosines(*block, paired=True)) for block in blocks]  # (K, b, 1) each
    positives = torch.cat(paired, dim=1)  # (K, B, 1)
    indices = torch.arange(len(documents), device=labels.device)

    def negatives_of(block: int, columns: slice, candidates: _Prefixes) -> Tensor:
        """The log-sum-exp over the negatives in a tile, (K, b)."""
        rows = slice(block * tile_rows, (block + 1) * tile_rows)
        query, positive = blocks[block]
        cosines = _cosines(query, candidates)  # K matrices (b, n)
        masked = labels[rows, None] == indices[columns]  # (b, n)
        if callable(mask):
            masked |= mask(rows, columns, cosines[-1].detach(), positives[-1, rows].detach())
        elif mask is not None:
            masked |= mask[rows, columns]
        sums = _masked_log_sum_exp(cosines, masked, temperature)
        if document_negatives is not None:
            masked = masked | ~document_negatives[columns]
            further = _masked_log_sum_exp(_cosines(positive, candidates), masked, temperature)
            sums = torch.logaddexp(sums, further)
        return sums

    compute = negatives_of
    if not fits:
        compute = cast(
            "Callable[[int, slice, _Prefixes], Tensor]",
            partial(checkpoint, negatives_of, use_reentrant=False, preserve_rng_state=False),
        )
    tiles: list[Tensor] = []  # (K, B) per tile of documents
    # The outer loop is over documents, so that backward finishes a tile of them before the next.
    for i, part in enumerate(torch.split(documents, tile_columns)):
        columns = slice(i * tile_columns, (i + 1) * tile_columns)
        candidates = _prefixes(part, cuts)
        sums = [compute(block, columns, candidates) for block in range(len(blocks))]
        tiles.append(torch.cat(sums, dim=1))
    negatives = torch.stack(tiles).logsumexp(0)  # (K, B)
    if extra_negatives is not None:
        extra = [extra_negatives(queries[:, :dim], documents[:, :dim]) for dim in cuts]
        further = (torch.stack(extra) / temperature).logsumexp(2)  # (K, B, S) -> (K, B)
        negatives = torch.logaddexp(negatives, further)
    x = negatives - positives[:, :, 0] / temperature  # unlike p and 1 - p, free of cancellation
    zero = torch.zeros_like(x)
    nll = torch.logaddexp(zero, x)  # (K, B)
    if gamma:
        nll = (-gamma * torch.logaddexp(zero, -x)).exp() * nll  # log(1 - p) = -log(1 + e^-x)
    return (nll.new_tensor([weight for _, weight in slices]) @ nll).mean()


def matryoshka(
    queries: Tensor,
    documents: Tensor,
    labels: Tensor,
    *,
    dims: Sequence[int],
    weights: Sequence[float],
    loss: Callable[..., Tensor] = info_nce,
    **options: object,
) -> Tensor:
    """A loss on leading slices: sum_k weight_k * loss(q[:, :dim_k], d[:, :dim_k]), a scalar.

    This is a weighted sum, not a mean: with the weights of the public recipe (1, .3, .2, .1, .1 for
    896, 512, 256, 128, 64) the total weight is 1.7. The loss normalises each slice again.

    Args:
        queries, documents, labels, options: (B, D), (N, D) and the rest, passed to `loss`; a mask
            applies to all slices.
        dims: leading dimensions, from 1 to D; otherwise ValueError.
        weights: one per dimension; otherwise ValueError.
        loss: `info_nce` computes all slices in one pass over the products.
    """
    full = queries.shape[1]
    if len(dims) != len(weights) or not dims:
        found = f"{dims} and {weights}"
        raise ValueError(f"matryoshka: expected one weight per dimension, found {found}")
    if wrong := [dim for dim in dims if not 1 <= dim <= full]:
        raise ValueError(f"matryoshka: expected dimensions from 1 to {full}, found {wrong[0]}")
    if loss is info_nce:
        return loss(queries, documents, labels, dims=dims, weights=weights, **options)
    values = [loss(queries[:, :dim], documents[:, :dim], labels, **options) for dim in dims]
    return torch.stack([w * value for w, value in zip(weights, values, strict=True)]).sum()


def _prefixes(vectors: Tensor, cuts: list[int]) -> _Prefixes:
    # Split, not sliced: the gradient of a slice would have the full dimension.
    sizes = [end - start for start, end in pairwise([0, *cuts, vectors.shape[1]])]
    parts = torch.split(vectors, sizes, dim=1)[:-1]
    squares = torch.stack([part.square().sum(1, keepdim=True) for part in parts]).cumsum(0)
    return [*zip(parts, squares.clamp_min(_SMALLEST**2).rsqrt(), strict=True)]


def _cosines(queries: _Prefixes, documents: _Prefixes, paired: bool = False) -> list[Tensor]:
    """K matrices (b, n) of all queries with all documents; if paired, (b, 1), row by row.

    The product of the first 128 coordinates is that of the first 64 plus that of the next 64, so
    all slices cost one product of the full dimension.
    """
    found: list[Tensor] = []
    products = queries[0][0].new_zeros(())
    for (q, left), (d, right) in zip(queries, documents, strict=True):
        products = products + ((q * d).sum(1, keepdim=True) if paired else q @ d.T)
        found.append(products * left * (right if paired else right.T))
    return found


def _masked_log_sum_exp(cosines: list[Tensor], masked: Tensor, temperature: float) -> Tensor:
    """(K, b) from K matrices (b, n)."""
    # Filled in after the division, so exp of it is exactly 0 beside any logit at any temperature;
    # unlike -inf, it can be differentiated where a query has no other negative.
    least = torch.finfo(cosines[0].dtype).min / 4
    logits = ((c / temperature).masked_fill(masked, least) for c in cosines)
    return torch.stack([scores.logsumexp(1) for scores in logits])
