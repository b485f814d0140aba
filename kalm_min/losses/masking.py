"""Which documents of a batch are not candidates of a query after all.

B  queries of this process    N  documents of all processes    P  known positives of a query, padded

The batch of a contrastive step is full of false negatives: the same positive text under another
query (label tasks), another known positive of the query, the query itself as somebody's document.
Texts are compared by a 64-bit hash that travels with the vectors, so the answer is the same on one
process and on many. A margin on the cosines, where one is asked for, goes beyond known texts.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """What is known of each of N documents, as one integer a document and column."""

    hashes: Tensor
    """(N,) int64 hash of the text, without instruction."""
    groups: Tensor
    """(N,) int64 class of the text, 0 for none."""
    owners: Tensor
    """(N,) int64 global number of the query that brought the document."""


class Queries(NamedTuple):
    """What is known of each of B queries."""

    hashes: Tensor
    """(B,) int64 hash of the query's text, without instruction."""
    positives: Tensor
    """(B, P) int64 hashes of all its known positives; short rows repeat one of theirs."""
    groups: Tensor
    """(B,) int64 class, 0 for none."""
    numbers: Tensor
    """(B,) int64 global number of the query."""
    in_batch: Tensor
    """(B,) bool, False where a query sees only the documents it brought itself."""


def candidate_masks(
    queries: Queries,
    documents: Documents,
    labels: Tensor,
    *,
    first: int = 0,
    close: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """One (B, N) mask a reason, True where the document is not a candidate; no pair has two reasons.

    Args:
        queries, documents: as above.
        labels: (B,) int64, the row of each query's positive, which no mask covers.
        first: the row of the first of these documents, where they are a part of all.
        close: (B, N) cosines, and (B,) the one above which a document is taken for a positive that
            nobody labelled: the positive's and a margin (0.1 in the Qwen3-Embedding report; KaLM's
            has none).

    Returns:
        "foreign": of another query, and the query's task takes no in-batch negatives;
        "positive": one of the query's known positives;  "query": the query's own text;
        "group": of the query's class;  "margin": too similar to be a negative.
    """
    rows = torch.arange(first, first + len(documents.hashes), device=labels.device)  # (N,)
    free = labels[:, None] != rows  # (B, N)
    positive = torch.zeros_like(free)
    for column in queries.positives.T:  # P is small; (B, N, P) at once would not be
        positive |= column[:, None] == documents.hashes
    foreign = ~queries.in_batch[:, None] & (queries.numbers[:, None] != documents.owners)
    group = (queries.groups[:, None] == documents.groups) & (documents.groups != 0)
    reasons = {
        "foreign": foreign,
        "positive": positive,
        "query": queries.hashes[:, None] == documents.hashes,
        "group": group,
    }
    if close is not None:
        similarity, bound = close
        reasons["margin"] = similarity > bound[:, None]
    masks: dict[str, Tensor] = {}
    for name, found in reasons.items():
        masks[name] = found & free
        free &= ~found
    return masks
