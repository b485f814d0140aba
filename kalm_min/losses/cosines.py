"""Cosines of several leading widths in one pass over the dot products.

B  queries    N  documents    D  full width

The product of the first 128 coordinates is that of the first 64 plus that of the next 64, so all
widths of a Matryoshka loss together cost one product of the full width, not one each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST = 1e-12  # a norm below this counts as this: a zero vector has cosine 0 and gradient 0


def cosines(queries: Tensor, documents: Tensor, dims: Sequence[int]) -> list[Tensor]:
    """Cosine of every query with every document, on each leading width.

    Args:
        queries: (B, D).
        documents: (N, D).
        dims: widths from 1 to D, in any order.

    Returns:
        One (B, N) tensor a width, in the order of `dims`.
    """
    found: dict[int, Tensor] = {}
    products, start = torch.zeros((), dtype=queries.dtype, device=queries.device), 0
    for dim in sorted(set(dims)):
        products = products + queries[:, start:dim] @ documents[:, start:dim].T  # (B, N)
        start = dim
        left, right = _inverse_norms(queries[:, :dim]), _inverse_norms(documents[:, :dim])
        found[dim] = products * left[:, None] * right
    return [found[dim] for dim in dims]


def _inverse_norms(vectors: Tensor) -> Tensor:
    """(n,) one over the length of each of (n, D)."""
    return vectors.square().sum(dim=1).clamp_min(_SMALLEST**2).rsqrt()
