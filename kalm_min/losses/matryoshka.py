"""Matryoshka: the same loss on leading slices of the vectors, so that a slice can be used alone.

    L = sum_k  weight_k * loss(q[:, :dim_k], d[:, :dim_k])

This is a weighted sum, not a mean: with the weights of the public recipe (1, .3, .2, .1, .1 for
896, 512, 256, 128, 64) the total weight is 1.7. The loss normalises each slice again.
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
    """The weighted sum over slices of (B, D) queries and (N, D) documents, a scalar.

    Args:
        queries, documents, labels, options: passed to `loss`; a mask applies to all slices.
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
