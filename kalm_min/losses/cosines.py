"""Cosines of several leading widths in one pass over the dot products.

B  queries    N  documents    D  full width

The product of the first 128 coordinates is that of the first 64 plus that of the next 64, so all
widths of a Matryoshka loss together cost one product of the full width, not one each.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# The cosine of a candidate that is none: exp(ABSENT / t) is exactly 0, and unlike -inf it can be
# differentiated where a query has no other candidate.
ABSENT = -1e4
_SMALLEST = 1e-12  # a norm below this counts as this: a zero vector has cosine 0 and gradient 0


class Prefixes(NamedTuple):
    """n vectors cut at the widths that are compared, with the length of each leading slice."""

    parts: tuple[Tensor, ...]
    """(n, w) for each width, in rising order: what it adds to the one before."""
    scales: tuple[Tensor, ...]
    """(n,) for each width: one over the length of the leading slice."""


def prefixes(vectors: Tensor, dims: Sequence[int]) -> Prefixes:
    """Cut (n, D) at the widths `dims`, from 1 to D, in any order.

    Cut once, not sliced for every width: the gradient of a slice is as wide as the whole.
    """
    bounds = [0, *sorted(set(dims)), vectors.shape[-1]]
    widths = [end - start for start, end in pairwise(bounds)]
    parts = torch.split(vectors, widths, dim=-1)[:-1]
    squares = torch.stack([part.square().sum(-1) for part in parts]).cumsum(0)  # (W, n)
    return Prefixes(parts, tuple(squares.clamp_min(_SMALLEST**2).rsqrt()))


def paired_cosines(queries: Prefixes, documents: Prefixes) -> Tensor:
    """(W, B, ...) cosines of each query with the document beside it, a width after the other."""
    products = torch.zeros((), dtype=queries.parts[0].dtype, device=queries.parts[0].device)
    found: list[Tensor] = []
    for q, left, d, right in zip(*queries, *documents, strict=True):
        products = products + (q * d).sum(-1)
        found.append(products * left * right)
    return torch.stack(found)


def log_sum(cosines: Tensor, temperature: float) -> Tensor:
    """(..., N) to (...): the logarithm of the sum of exp(cosine / temperature)."""
    return (cosines / temperature).logsumexp(-1)


def cosines_of(queries: Prefixes, documents: Prefixes) -> list[Tensor]:
    """One (B, N) tensor of cosines a width, in rising order."""
    found: list[Tensor] = []
    products = torch.zeros((), dtype=queries.parts[0].dtype, device=queries.parts[0].device)
    for q, left, d, right in zip(*queries, *documents, strict=True):
        products = products + q @ d.T  # (B, N)
        found.append(products * left[:, None] * right)
    return found


def cosines(queries: Tensor, documents: Tensor, dims: Sequence[int]) -> list[Tensor]:
    """Cosine of every query with every document, on each leading width.

    Args:
        queries: (B, D).
        documents: (N, D).
        dims: widths from 1 to D, in any order.

    Returns:
        One (B, N) tensor a width, in the order of `dims`.
    """
    found = cosines_of(prefixes(queries, dims), prefixes(documents, dims))
    places = sorted(set(dims))
    return [found[places.index(dim)] for dim in dims]
