"""Contrastive distillation: the teacher's distribution over a query's documents as the target.

    P_t = softmax_i(z_t,i / t_kd)    P_s = softmax_i(s(q, d_i) / t_kd)    L_KL = KL(P_t || P_s)
    L   = (1 - a) L_CL + a L_KL,     a = 0.7, t_kd = 0.05

KaLM V2.5 (arXiv 2506.20923), section on contrastive distillation; Matryoshka applies to both terms.
Our choices: the documents are the query's positive and negatives, with teacher scores in the data
(the report does not say); there is no factor t_kd^2, since the report weights the plain terms.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


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
