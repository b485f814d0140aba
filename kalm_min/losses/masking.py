"""Which pairs of a batch are negatives, and why the others are not.

A contrastive batch is full of false negatives: a query's positive text under another query (label
tasks), another known positive of the query, the query's text as another query's document. Texts are
compared by a 64-bit hash that travels with the embeddings, so the answer is the same on one process
and on many. An optional margin on the cosines also masks unlabelled positives.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor


class ContrastiveBatch(NamedTuple):
    """The queries of one process and all candidates they are compared with.

    B  queries    N  candidates: the documents of all processes, optionally also their queries
    D  dimension    P  known positives per query    M  documents per query, its positive first
    """

    queries: Tensor  # (B, D)
    documents: Tensor  # (N, D), the candidates
    rows: Tensor  # (B, M) int64, the rows of each query's own documents; -1 is padding
    query_meta: Tensor  # (3, B) int64: hash of the text, class (0 for none), global number
    document_meta: Tensor  # (4, N) int64: hash, class, number of its query, whether it is a query
    positives: Tensor  # (B, P) int64, hashes of all known positives; short rows repeat some
    in_batch: Tensor  # (B,) bool, False if a query is compared only with its own documents
    teacher: Tensor  # (B, M), the teacher's scores
    mix_pair: Tensor  # (B, 2) int64, see `mixed_cosines`
    mix_share: Tensor  # (B,), see `mixed_cosines`


def non_candidates(
    batch: ContrastiveBatch,
    rows: slice = slice(None),
    columns: slice = slice(None),
    too_similar: Tensor | None = None,
) -> dict[str, Tensor]:
    """One (b, n) mask per reason why a document is not a negative; no pair has two reasons.

    Args:
        batch: its hashes are of the texts without instruction.
        rows, columns: the b queries and the n documents to compare.
        too_similar: (b, n) bool, documents that are taken for unlabelled positives.
    """
    query_hash, query_group, number = batch.query_meta[:, rows, None]  # (b, 1) each
    hashes, groups, owners, is_query = batch.document_meta[:, columns]  # (n,) each
    indices = torch.arange(batch.document_meta.shape[1], device=owners.device)[columns]  # (n,)
    same = number == owners  # (b, n)
    known = torch.zeros_like(same)
    for column in batch.positives[rows].T:  # P is small; (b, n, P) at once would not be
        known |= column[:, None] == hashes
    masks = {
        # The query's positive, or the query itself.
        "self": (batch.rows[rows, :1] == indices) | (same & (is_query > 0)),
        # A document of another query, if the task has no in-batch negatives.
        "foreign": ~(same | batch.in_batch[rows, None]),
        "positive": known,
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
    """Numbers of pairs for the log, from the result of `non_candidates`.

    Negatives are the query's own ("hard"), documents of other queries of this process ("in_batch")
    and of other processes ("cross_device"), and other queries ("query_query"). Masked documents are
    counted by reason: "masked_foreign", "masked_positive", ...
    """
    number, owners = batch.query_meta[2], batch.document_meta[2, columns]
    is_document = batch.document_meta[3, columns] == 0  # (n,)
    negatives = ~reduce(torch.logical_or, masks.values())  # (b, n)
    documents = negatives & is_document  # (b, n)
    hard = number[rows, None] == owners  # (b, n)
    local = (owners >= number[0]) & (owners <= number[-1])  # (n,)
    pairs = {
        "hard": documents & hard,
        "in_batch": documents & local & ~hard,
        "cross_device": documents & ~local,
        "query_query": negatives & ~is_document,
    }
    pairs |= {f"masked_{name}": m & is_document for name, m in masks.items() if name != "self"}
    return {name: mask.count_nonzero() for name, mask in pairs.items()}
