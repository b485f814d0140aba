"""Contrastive distillation: the student's distribution over a query's own documents to the teacher's.

B  queries    N  documents

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
    similarity: Tensor, teacher: Tensor, own: Tensor, *, temperature: float
) -> Tensor:
    """KL divergence of the student from the teacher, for each query.

    Args:
        similarity: (B, N) cosines of the student.
        teacher: (N,) the teacher's score of each document for the query that brought it.
        own: (B, N) bool, the documents a query brought.
        temperature: divides the scores of both.

    Returns:
        (B,), 0 where the distributions agree.
    """

    def log_softmax(scores: Tensor) -> Tensor:
        return (scores / temperature).masked_fill(~own, -torch.inf).log_softmax(dim=1)

    target = log_softmax(teacher.to(similarity.dtype).expand_as(similarity))  # (B, N)
    found = log_softmax(similarity)  # (B, N)
    difference = (target - found).masked_fill(~own, 0.0)
    return (target.exp() * difference).sum(1)
