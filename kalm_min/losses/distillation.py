"""Contrastive distillation: the student's distribution over a query's own documents to the teacher's.

    P_t = softmax_i(z_t,i / t_kd)    P_s = softmax_i(s(q, d_i) / t_kd)    L_KL = KL(P_t || P_s)
    L   = (1 - a) L_CL + a L_KL,     a = 0.7, t_kd = 0.05

KaLM V2.5 (arXiv 2506.20923), section on contrastive distillation; Matryoshka holds for both terms. The
report does not say over which candidates; here over the query's own documents (its positive and its
negatives), whose teacher scores are stored with the data. No factor t_kd^2: the weights of the report
are of the plain terms.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def distillation(
    queries: Tensor,
    documents: Tensor,
    labels: Tensor,
    *,
    teacher: Tensor,
    present: Tensor,
    temperature: float,
) -> Tensor:
    """The mean over the queries of the KL divergence of the student from the teacher.

    Args:
        queries: (B, D).
        documents: (N, D).
        labels: (B, M) int64, the rows of each query's own documents in `documents`, padded.
        teacher: (B, M) the teacher's scores of the same pairs.
        present: (B, M) bool, False for padding.
        temperature: divides the scores of both.

    Returns:
        A scalar, 0 where the distributions agree.
    """
    similarity = cosine_similarity(queries[:, None], documents[labels], dim=2, eps=1e-12)  # (B, M)
    student, target = (
        (scores.to(similarity) / temperature).masked_fill(~present, -torch.inf).log_softmax(1)
        for scores in (similarity, teacher)
    )
    difference = (target - student).masked_fill(~present, 0.0)
    return (target.exp() * difference).sum(1).mean()
