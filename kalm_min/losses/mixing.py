"""Online hard-negative mixing: synthetic negatives made from a query's negatives in each step.

B  queries    N  documents    M  documents per query, its positive first    D  dimension

    pair-wise:  h = l p_j + (1 - l) p_k,  l ~ Beta(2, 2), j and k drawn from the query's negatives
    list-wise:  s = sum_m w_m p_m,        w = softmax_m(s(q, p_m) / t)

KaLM V2 report, section on online hard-negative mixing; p are unit vectors, h and s are normalised
again and join the denominator of their own query only. Our choices, where the report is silent: one
mix of each kind per query; t = 0.05, the report's temperature for distributions in distillation,
between the hardest negative alone (t -> 0) and the plain mean (t -> inf); gradients flow into the
negatives, as from every other term; under Matryoshka each slice mixes its own slices.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

_TEMPERATURE = 0.05


def mixed_cosines(
    queries: Tensor, documents: Tensor, *, rows: Tensor, pair: Tensor, share: Tensor
) -> Tensor:
    """(B, 2) cosines of each query with its pair-wise and its list-wise mix.

    -inf for a query with fewer than two negatives, which has no mixes.

    Args:
        queries: (B, D).
        documents: (N, D).
        rows: (B, M) int64, the rows of each query's documents, its positive first; -1 is padding.
        pair: (B, 2) int64, which two of its M - 1 negatives are mixed pair-wise.
        share: (B,) l, drawn with the batch, so that it does not depend on the number of processes.
    """
    rows = rows[:, 1:]  # (B, M - 1)
    query = normalize(queries, dim=1)[:, None]  # (B, 1, D)
    negatives = normalize(documents[rows], dim=2)  # (B, M - 1, D)
    scores = (query * negatives).sum(2) / _TEMPERATURE  # (B, M - 1)
    least = torch.finfo(scores.dtype).min  # unlike -inf, no nan for a query without negatives
    listwise = scores.masked_fill(rows < 0, least).softmax(dim=1)  # (B, M - 1)
    two = negatives.take_along_dim(pair[:, :, None], dim=1)  # (B, 2, D)
    pairwise = torch.stack([share, 1 - share], dim=1).to(query)  # (B, 2)
    mixes = ((pairwise[:, :, None] * two).sum(1), (listwise[:, :, None] * negatives).sum(1))
    similarity = (query * normalize(torch.stack(mixes, dim=1), dim=2)).sum(2)  # (B, 2)
    return similarity.masked_fill((rows >= 0).sum(1, keepdim=True) < 2, -torch.inf)
