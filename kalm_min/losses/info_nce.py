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

import torch
from torch import Tensor

from kalm_min.losses.cosines import ABSENT, cosines, log_sum
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
    (similarity,) = cosines(queries, documents, (queries.shape[-1],))  # (B, N)
    positive = labels[:, None]  # (B, 1)
    none = torch.zeros_like(similarity, dtype=torch.bool) if mask is None else mask
    negatives = similarity.masked_fill(none.scatter(1, positive, True), ABSENT)
    z = log_sum(negatives, temperature)  # (B,)
    if mixes is not None:
        z = torch.logaddexp(
            z, log_sum(mixed_cosines(queries, documents[mixes.own], mixes), temperature)
        )
    own = similarity.gather(1, positive).squeeze(1) / temperature  # (B,)
    return contrastive_rows(own, z, gamma=gamma).mean()


def contrastive_rows(positive: Tensor, negatives: Tensor, *, gamma: float = 0.0) -> Tensor:
    """The loss of each query, from logits.

    Written in the difference x of the two, so that neither 1 - p nor its logarithm cancels:
    -log p = log(1 + e^x) and log(1 - p) = -log(1 + e^-x).

    Args:
        positive: any shape, s(q, d+) / t.
        negatives: likewise, the logarithm of the sum of exp(s / t) over the negatives.
        gamma: see `info_nce`.

    Returns:
        As large.
    """
    x = negatives - positive
    zero = torch.zeros_like(x)
    surprise = torch.logaddexp(zero, x)
    if gamma == 0.0:
        return surprise
    return (-gamma * torch.logaddexp(zero, -x)).exp() * surprise
