"""InfoNCE: each query against one positive and every other candidate.

B  queries of this process    N  candidate documents    D  width of the vectors
S  further negatives of each query

    p_i = exp(s(q_i, d_label_i) / t) / sum_n exp(s(q_i, d_n) / t)        s: cosine, t: temperature
    L   = mean_i  -(1 - p_i)^gamma log p_i

KaLM V2 report, sections on the training objective and on focal-style reweighting; gamma = 0 is
plain InfoNCE. The candidates are the documents of all queries, the hard negatives of others
included. Which of them are no candidates after all is decided outside (`masking`), and so is where
documents come from: the function knows nothing of processes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kalm_min.losses.cosines import cosines
from kalm_min.losses.mixing import Mixes, mixed_cosines


def info_nce(
    queries: Tensor,
    documents: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    mask: Tensor | None = None,
    gamma: float = 0.0,
    mixes: Mixes | None = None,
) -> Tensor:
    """The mean loss over the B queries given.

    In distributed training each process scores its own queries against the documents of all; the
    mean over processes, which data-parallel averaging takes, is then the mean over all queries.

    Args:
        queries: (B, D), of any length; normalised here.
        documents: (N, D), likewise.
        labels: (B,) int64, the row of each query's positive in `documents`.
        temperature: divides the cosine; 0.01 in the reports.
        mask: (B, N) bool, True where a document is not a candidate of a query. The positive always
            is, whatever the mask says.
        gamma: exponent of the focal weight (1 - p)^gamma; 0.5 in the V2 report. The gradient flows
            through the weight, as in the focal loss it is named after; the report does not say.
        mixes: how to mix each query's own negatives into S more (V2), or None.

    Returns:
        A scalar in the dtype of the inputs.
    """
    (similarity,) = cosines(queries, documents, (queries.shape[-1],))
    extra = [] if mixes is None else [mixed_cosines(queries, documents[mixes.own], mixes)]
    losses = contrastive_rows(
        similarity, labels, temperature=temperature, mask=mask, gamma=gamma, extra=extra
    )
    return losses.mean()


def contrastive_rows(
    similarity: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    mask: Tensor | None = None,
    gamma: float = 0.0,
    extra: Sequence[Tensor] = (),
) -> Tensor:
    """The loss of each query, from cosines.

    Args:
        similarity: (B, N) cosines.
        labels, temperature, mask, gamma: see `info_nce`.
        extra: (B, S) cosines that join the denominator: synthetic negatives (`mixed_cosines`), other
            queries, other documents against the positive; `ABSENT` where there is none.

    Returns:
        (B,).
    """
    positive = labels[:, None]  # (B, 1)
    if mask is not None:
        similarity = similarity.masked_fill(mask.scatter(1, positive, False), -torch.inf)
    total = (similarity / temperature).logsumexp(dim=1)  # (B,)
    for more in extra:
        total = torch.logaddexp(total, (more / temperature).logsumexp(dim=1))
    log_p = similarity.gather(1, positive).squeeze(1) / temperature - total  # (B,)
    if gamma == 0.0:
        return -log_p
    # 1 - exp(log p) without cancellation; bounded away from 0, where x^gamma has no derivative.
    rest = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)
    return -(rest**gamma) * log_p
