"""What KaLM V2 and V2.5 add to the loss: online hard-negative mixing and contrastive distillation.

B  queries    N  documents    M  documents per query, its positive first    D  dimension

    pair-wise:  h = l p_j + (1 - l) p_k,  l ~ Beta(2, 2), j and k drawn from the query's negatives
    list-wise:  s = sum_m w_m p_m,        w = softmax_m(s(q, p_m) / t)

    P_t = softmax_i(z_t,i / t_kd)    P_s = softmax_i(s(q, d_i) / t_kd)    L_KL = KL(P_t || P_s)
    L   = (1 - a) L_CL + a L_KL,     a = 0.7, t_kd = 0.05

V2 report, section on online hard-negative mixing; p are unit vectors, h and s are normalised again
and join the denominator of their own query only. Our choices, where the report is silent: one mix
of each kind per query; t = 0.05, the report's temperature for distributions in distillation,
between the hardest negative alone (t -> 0) and the plain mean (t -> inf); gradients flow into the
negatives, as from every other term; under Matryoshka each slice mixes its own slices.

V2.5 (arXiv 2506.20923), section on contrastive distillation; Matryoshka applies to both terms. Our
choices: the documents are the query's positive and negatives, with teacher scores in the data (the
report does not say); there is no factor t_kd^2, since the report weights the plain terms.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

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


def distillation(
    queries: Tensor, documents: Tensor, labels: Tensor, *, teacher: Tensor, temperature: float
) -> Tensor:
    """L_KL, the mean over the queries: a scalar, 0 where the distributions agree.

    Args:
        queries: (B, D).
        documents: (N, D).
        labels: (B, M) int64, the rows of each query's own documents; -1 is padding.
        teacher: (B, M) the teacher's scores of the same pairs.
        temperature: t_kd.
    """
    padding = labels < 0
    similarity = cosine_similarity(queries[:, None], documents[labels], dim=2, eps=1e-12)  # (B, M)
    student, target = (
        (scores.to(similarity) / temperature).masked_fill(padding, -torch.inf).log_softmax(1)
        for scores in (similarity, teacher)
    )
    return (target.exp() * (target - student).masked_fill(padding, 0.0)).sum(1).mean()
