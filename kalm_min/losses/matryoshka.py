"""Matryoshka: the same loss on leading slices of the vectors, so that a slice can be used alone.

B  queries    N  documents    D  full dimension

    L = sum_k  weight_k * loss(q[:, :dim_k], d[:, :dim_k])

A weighted sum, not a mean: with the weights of the public recipe (1, .3, .2, .1, .1 for 896, 512,
256, 128, 64) the total weight is 1.7. Each slice is normalised again by the loss.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kalm_min.losses.info_nce import info_nce


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
    """Sum of `loss` over slices; `info_nce` takes all of them in one pass over the products.

    Args:
        queries: (B, D).
        documents: (N, D).
        labels: (B,) int64.
        dims: leading dimensions, each at most D.
        weights: one per dimension.
        loss: any loss of (queries, documents, labels, **options).
        options: passed to every slice alike; a mask is decided once and holds for all of them.

    Returns:
        A scalar. Raises ValueError when a dimension exceeds D or the counts differ.
    """
    full = queries.shape[1]
    if len(dims) != len(weights) or not dims:
        found = f"{dims} and {weights}"
        raise ValueError(f"matryoshka: expected one weight per dimension, found {found}")
    if max(dims) > full or min(dims) < 1:
        raise ValueError(f"matryoshka: expected dimensions from 1 to {full}, found {max(dims)}")
    if loss is info_nce:
        return loss(queries, documents, labels, dims=dims, weights=weights, **options)
    values = [loss(queries[:, :dim], documents[:, :dim], labels, **options) for dim in dims]
    return torch.stack([w * value for w, value in zip(weights, values, strict=True)]).sum()
