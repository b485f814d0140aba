"""Which pairs of a batch are negatives, and why the others are none.

A contrastive batch is full of false negatives: a query's positive text under another query (label
tasks), another known positive of the query, the query itself as somebody's document. Texts are
compared by a 64-bit hash that travels with the embeddings, so the answer is the same on one process
and on many. A margin on the cosines, on request, goes beyond known texts.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor


class ContrastiveBatch(NamedTuple):
    """The queries of one process and all candidates they are compared with.

    B  queries    N  candidates: documents of all processes, on request their queries too
    D  dimension    P  known positives per query    M  documents per query, its positive first
    """

    queries: Tensor  # (B, D)
    documents: Tensor  # (N, D), the candidates
    labels: Tensor  # (B,) int64, the row of each query's positive in `documents`
    query_meta: Tensor  # (3, B) int64: hash of the text, class (0: none), consecutive global number
    document_meta: Tensor  # (4, N) int64: hash, class, number of the query it is of, is a query
    positives: Tensor  # (B, P) int64, hashes of all known positives; short rows repeat theirs
    in_batch: Tensor  # (B,) bool, False where a query sees only its own documents
    rows: Tensor  # (B, M) int64, the rows of each query's own documents in `documents`
    present: Tensor  # (B, M) bool, False for padding
    teacher: Tensor  # (B, M), the teacher's scores
    mix_pair: Tensor  # (B, 2) int64, see `mixed_cosines`
    mix_share: Tensor  # (B,), see `mixed_cosines`


def non_candidates(
    batch: ContrastiveBatch,
    rows: slice = slice(None),
    columns: slice = slice(None),
    too_similar: Tensor | None = None,
) -> dict[str, Tensor]:
    """One (b, n) mask per reason, True where a document is no negative; no pair has two reasons.

    Args:
        batch: its texts are compared without instruction, by hash.
        rows, columns: the b queries and n documents looked at.
        too_similar: (b, n) bool, documents taken for positives that nobody labelled.

    Returns:
        "self": the query's positive, or the query itself;
        "foreign": of another query, and the query's task takes no in-batch negatives;
        "positive": one of the query's known positives;  "query": the query's own text;
        "group": of the query's class;  "margin": too similar.
    """
    query_hash, query_group, number = batch.query_meta[:, rows, None]  # (b, 1) each
    hashes, groups, owners, is_query = batch.document_meta[:, columns]  # (n,) each
    indices = torch.arange(batch.document_meta.shape[1], device=owners.device)[columns]  # (n,)
    same = number == owners  # (b, n)
    positive = torch.zeros_like(same)
    for column in batch.positives[rows].T:  # P is small; (b, n, P) at once would not be
        positive |= column[:, None] == hashes
    masks = {
        "self": (batch.labels[rows, None] == indices) | (same & (is_query > 0)),
        "foreign": ~(same | batch.in_batch[rows, None]),
        "positive": positive,
        "query": query_hash == hashes,
        "group": (query_group == groups) & (groups != 0),
        "margin": torch.zeros_like(same) if too_similar is None else too_similar & (is_query == 0),
    }
    free = torch.ones_like(same)
    for reason, mask in masks.items():
        masks[reason] = mask & free
        free &= ~mask
    return masks


def count_pairs(
    batch: ContrastiveBatch, masks: dict[str, Tensor], rows: slice, columns: slice
) -> dict[str, Tensor]:
    """Numbers of pairs for the log: negatives by kind, masked documents by reason.

    Args:
        batch, rows, columns: see `non_candidates`.
        masks: what it returned.

    Returns:
        "hard": with the query's own negatives; "in_batch", "cross_device": with documents of other
        queries of this process, of other processes; "query_query": with other queries;
        "masked_foreign", "masked_positive", ...: with documents that are no negatives.
    """
    number, owners = batch.query_meta[2], batch.document_meta[2, columns]
    is_document = batch.document_meta[3, columns] == 0  # (n,)
    negatives = ~reduce(torch.logical_or, masks.values())  # (b, n)
    documents = negatives & is_document  # (b, n)
    nearby = (owners >= number[0]) & (owners <= number[-1])  # (n,)
    hard = (documents & (number[rows, None] == owners)).count_nonzero()
    near = (documents & nearby).count_nonzero()
    counts = {"hard": hard, "in_batch": near - hard}
    counts["cross_device"] = documents.count_nonzero() - near
    counts["query_query"] = (negatives & ~is_document).count_nonzero()
    for reason in ("foreign", "positive", "query", "group", "margin"):
        counts[f"masked_{reason}"] = (masks[reason] & is_document).count_nonzero()
    return counts
