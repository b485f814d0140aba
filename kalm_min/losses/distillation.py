"""Contrastive distillation: the student's distribution over a query's own documents to the teacher's.

B  queries    M  documents that a query brought, padded

    P_t = softmax_i(z_t,i / t_kd)    P_s = softmax_i(s(q, d_i) / t_kd)    L_KL = KL(P_t || P_s)
    L   = (1 - a) L_CL + a L_KL,     a = 0.7, t_kd = 0.05

KaLM V2.5 (arXiv 2506.20923), section on contrastive distillation; Matryoshka holds for both terms. The
report does not say over which candidates; here over the query's own group (its positive and its
negatives), the documents of which a teacher's score is stored with the data. No factor t_kd^2: the
weights of the report are of the plain terms.
"""

import torch
from torch import Tensor


def distillation_rows(
    similarity: Tensor, teacher: Tensor, present: Tensor, *, temperature: float
) -> Tensor:
    """KL divergence of the student from the teacher, for each query.

    Args:
        similarity: (..., B, M) cosines of the student.
        teacher: (B, M) the teacher's scores of the same pairs.
        present: (B, M) bool, False for padding.
        temperature: divides the scores of both.

    Returns:
        (..., B), 0 where the distributions agree.
    """

    def log_softmax(scores: Tensor) -> Tensor:
        return (scores / temperature).masked_fill(~present, -torch.inf).log_softmax(dim=-1)

    target, found = log_softmax(teacher.to(similarity)), log_softmax(similarity)
    difference = (target - found).masked_fill(~present, 0.0)
    return (target.exp() * difference).sum(-1)
