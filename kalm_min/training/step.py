"""One training step, from a batch of texts to gradients on the parameters.

n  different texts of this process     B  its queries     N  documents of all processes     D  width

    texts -> ids -> chunks of at most `tokens_per_batch` tokens -> vectors (n, D)
    vectors -> queries (B, D), documents of all processes (N, D) -> masks -> loss

A text that stands in the batch more than once is embedded once.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kalm_min.data import TextBatch
from kalm_min.losses import Documents, Queries
from kalm_min.model import Packed
from kalm_min.sampling import token_budget_batches
from kalm_min.tokenizer import Tokenizer
from kalm_min.training import distributed
from kalm_min.training.batch_loss import LossConfig, Own, Rows, batch_loss
from kalm_min.training.gradcache import cached_backward


class TokenBatch(NamedTuple):
    """A batch of texts as token ids, each different text once."""

    sequences: list[list[int]]
    """n token lists."""
    places: Tensor
    """(B + documents,) int64: where in `sequences` each query, then each document, is."""
    text: TextBatch


class StepResult(NamedTuple):
    """What one step did, on this process."""

    loss: Tensor
    """Mean over this process's queries, detached."""
    counts: dict[str, float]
    """Sums over this process's queries: negatives of each kind ("hard": a query's own; "in_batch"
    and "cross_device": documents of other queries of this process, of other processes;
    "query_query", "document_document", "mixed": see LossConfig), and documents masked for each
    reason ("masked_positive", ...); and the "tokens" of its texts."""
    finite: Tensor
    """(B + documents,) bool: whether the vector of each query, then each document, is finite."""


def tokenize(batch: TextBatch, tokenizer: Tokenizer, *, max_length: int) -> TokenBatch:
    """Token ids of every different text of the batch."""
    texts = [*batch.queries, *batch.documents]
    unique = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    sequences = tokenizer.encode(list(unique), max_length=max_length)
    return TokenBatch(sequences, torch.tensor([unique[text] for text in texts]), batch)


def contrastive_step(
    batch: TokenBatch,
    embed: Callable[[Packed], Tensor],
    config: LossConfig,
    *,
    device: torch.device,
    tokens_per_batch: int,
    no_sync: Callable[[], AbstractContextManager[None]],
    sharded: bool = False,
) -> StepResult:
    """Add the gradient of the global batch's mean loss to the parameters.

    Args:
        batch: this process's share of the global batch, as many queries on every process.
        embed: (b, D) vectors of a packed chunk.
        config: the loss.
        device: where `embed` wants its chunks.
        tokens_per_batch: tokens of one chunk; bounds the memory, changes no result.
        no_sync: see `cached_backward`.
        sharded: every call of `embed` is a joint act of all processes.
    """
    lengths = [len(ids) for ids in batch.sequences]
    rows = token_budget_batches(lengths, tokens_per_batch)
    chunks = [Packed.from_sequences([batch.sequences[i] for i in part], device) for part in rows]
    counts: dict[str, float] = {"tokens": sum(lengths)}
    finite: list[Tensor] = []

    def loss(vectors: Tensor) -> Tensor:
        vectors = vectors[batch.places.to(device)]  # (B + own documents, D)
        finite.append(vectors.detach().isfinite().all(1))
        value, ledger = _batch_loss(vectors, batch.text, config)
        counts.update(ledger)
        return value

    rounds = distributed.max_over_ranks(len(chunks), device)
    value = cached_backward(embed, chunks, rows, loss, no_sync, rounds=rounds, sharded=sharded)
    return StepResult(value, counts, finite[0])


def _batch_loss(
    vectors: Tensor, text: TextBatch, config: LossConfig
) -> tuple[Tensor, dict[str, float]]:
    """The loss of this process's queries against the documents of all, and the ledger."""
    size = len(text.queries)
    own = vectors[size:]  # (own documents, D)
    counts = distributed.row_counts(len(own), own.device)
    documents = distributed.gather_rows(own, counts)  # (N, D)
    first = sum(counts[: distributed.rank()])  # this process's documents stand from here on
    queries, brought = facts(text, own.device, first=distributed.rank() * size)
    columns = distributed.gather_rows(torch.stack(brought, dim=1), counts)  # (N, 3)
    known = Documents(*columns.T)
    labels = torch.from_numpy(text.labels).to(own.device) + first
    everyone = None
    if config.query_negatives:
        each = distributed.row_counts(size, own.device)
        brought = torch.stack([queries.hashes, queries.groups, queries.numbers], dim=1)
        everyone = (
            distributed.gather_rows(vectors[:size], each),
            Documents(*distributed.gather_rows(brought, each).T),
        )
    brought_by = own_documents(text, own.device, first)
    return batch_loss(
        Rows(vectors[:size], documents, labels, queries, known, brought_by, everyone), config
    )


def own_documents(text: TextBatch, device: torch.device, first: int = 0) -> Own:
    """What each query brought; this process's documents stand among all from `first` on."""
    sizes = np.bincount(text.document_owner, minlength=len(text.queries))  # (B,)
    places = np.arange(max(2, sizes.max()))  # (M,)
    present = places < sizes[:, None]  # (B, M)
    rows = text.labels[:, None] + np.where(present, places, 0)
    columns = rows + first, present, text.teacher_scores[rows], text.mix_pair, text.mix_share
    return Own(*(torch.from_numpy(column).to(device) for column in columns))


def facts(text: TextBatch, device: torch.device, first: int = 0) -> tuple[Queries, Documents]:
    """What `candidate_masks` needs of a batch; its queries are numbered from `first` on."""

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    most = max(map(len, text.positive_hashes))
    positives = np.stack([np.resize(hashes, most) for hashes in text.positive_hashes])  # (B, P)
    numbers = np.arange(len(text.queries), dtype=np.int64)
    queries = Queries(
        tensor(text.query_hashes),
        tensor(positives),
        tensor(text.query_groups),
        tensor(numbers + first),
        tensor(text.in_batch),
    )
    documents = Documents(
        tensor(text.document_hashes),
        tensor(text.document_groups),
        tensor(text.document_owner + first),
    )
    return queries, documents
