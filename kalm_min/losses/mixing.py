"""Online hard-negative mixing: synthetic negatives made of a query's own, during the step.

B  queries    N  documents    M  own negatives of a query, padded    D  width

    pair-wise:  h = l p_j + (1 - l) p_k,  l ~ Beta(2, 2), j and k drawn from the query's negatives
    list-wise:  s = sum_m w_m p_m,        w = softmax_m(s(q, p_m) / t)

KaLM V2 report, section on online hard-negative mixing; p are unit vectors, h and s are normalised
again and join the denominator of their own query only. The report leaves open, and this is chosen:
one mix of each kind a query; t = 0.05, the temperature at which the report turns similarities into
distributions elsewhere (distillation), between the hardest negative alone (t -> 0) and the plain mean
(t -> inf); gradients flow into the negatives, as they do from every other term of the denominator;
under Matryoshka each slice mixes its own slices, as if it were the model. A query with fewer than two
negatives has no mixes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kalm_min.losses.cosines import ABSENT

_TEMPERATURE = 0.05


class Mixes(NamedTuple):
    """What to mix, for each of B queries."""

    own: Tensor
    """(B, M) int64 rows of the query's own negatives among the documents; padded with any row."""
    present: Tensor
    """(B, M) bool, False for padding."""
    pair: Tensor
    """(B, 2) int64 places among the M of the two that are mixed pair-wise."""
    share: Tensor
    """(B,) the first one's share, l, drawn with the batch so that it does not depend on processes."""


def mixed_cosines(queries: Tensor, negatives: Tensor, mixes: Mixes) -> Tensor:
    """Cosines of each query with its pair-wise and its list-wise mix.

    Args:
        queries: (B, D).
        negatives: (B, M, D), `documents[mixes.own]`.
        mixes: what to mix.

    Returns:
        (B, 2); a number whose exponential is 0 for a query with fewer than two negatives.
    """
    query = F.normalize(queries, dim=-1)[:, None]  # (B, 1, D)
    negatives = F.normalize(negatives, dim=-1)  # (B, M, D)
    pair = negatives.take_along_dim(mixes.pair[:, :, None], dim=1)  # (B, 2, D)
    share = torch.stack([mixes.share, 1 - mixes.share], dim=1).to(query.dtype)  # (B, 2)
    scores = (query * negatives).sum(-1) / _TEMPERATURE  # (B, M)
    exists = mixes.present.sum(1, keepdim=True) >= 2  # (B, 1)
    weights = scores.masked_fill(~mixes.present, ABSENT).softmax(dim=1)  # (B, M)
    mixed = torch.stack([_sum(share, pair), _sum(weights, negatives)], dim=1)  # (B, 2, D)
    similarity = (query * F.normalize(mixed, dim=-1)).sum(-1)  # (B, 2)
    return similarity.masked_fill(~exists, ABSENT)


def _sum(weights: Tensor, vectors: Tensor) -> Tensor:
    """(B, D) weighted sums of (B, M, D) with (B, M)."""
    return (weights[:, :, None] * vectors).sum(1)
