"""One training step, from a batch of texts to gradients on the parameters.

n  different texts of this process     B  its queries     N  documents of all processes     D  width

    texts -> ids -> chunks of at most `tokens_per_batch` tokens -> vectors (n, D)
    vectors -> queries (B, D), documents of all processes (N, D) -> masks -> loss

A text that stands in the batch more than once is embedded once.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kalm_min.data import TextBatch
from kalm_min.losses import Documents, Queries, candidate_masks, matryoshka
from kalm_min.model import Packed
from kalm_min.sampling import token_budget_batches
from kalm_min.tokenizer import Tokenizer
from kalm_min.training import distributed
from kalm_min.training.gradcache import cached_backward


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """InfoNCE with Matryoshka; the defaults are those of the public fine-tuning script."""

    temperature: float = 0.01
    """Divides the cosine."""
    gamma: float = 0.0
    """Exponent of the focal weight (1 - p)^gamma; 0 is plain InfoNCE, 0.5 is the V2 report's."""
    matryoshka_dims: tuple[int, ...] = ()
    """Leading widths that are trained to stand alone; none trains the full width only."""
    matryoshka_weights: tuple[float, ...] = ()
    """One a width; the report's are 1, 0.3, 0.2, 0.1, 0.1."""
    mask_false_negatives: bool = True
    """Documents whose text is a known positive of the query, or the query, are no negatives."""

    def __post_init__(self) -> None:
        """Refuse what cannot be computed."""
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected more than 0, found {self.temperature}")
        if self.gamma < 0:
            raise ValueError(f"gamma: expected 0 or more, found {self.gamma}")
        if len(self.matryoshka_dims) != len(self.matryoshka_weights):
            raise ValueError(
                f"matryoshka_weights: expected one for each of the {len(self.matryoshka_dims)} "
                f"matryoshka_dims, found {len(self.matryoshka_weights)}"
            )


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
    """Sums over this process's queries: "hard" (its own negatives), "in_batch", and each reason
    for which a document was masked ("masked_positive", ...); and "tokens" of its texts."""


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
) -> StepResult:
    """Add the gradient of the global batch's mean loss to the parameters.

    Args:
        batch: this process's share of the global batch, as many queries on every process.
        embed: (b, D) vectors of a packed chunk.
        config: the loss.
        device: where `embed` wants its chunks.
        tokens_per_batch: tokens of one chunk; bounds the memory, changes no result.
        no_sync: see `cached_backward`.
    """
    lengths = [len(ids) for ids in batch.sequences]
    rows = token_budget_batches(lengths, tokens_per_batch)
    chunks = [Packed.from_sequences([batch.sequences[i] for i in part], device) for part in rows]
    counts: dict[str, float] = {"tokens": sum(lengths)}

    def loss(vectors: Tensor) -> Tensor:
        vectors = vectors[batch.places.to(device)]  # (B + own documents, D)
        value, ledger = _batch_loss(vectors, batch.text, config)
        counts.update(ledger)
        return value

    return StepResult(cached_backward(embed, chunks, rows, loss, no_sync), counts)


def _batch_loss(
    vectors: Tensor, text: TextBatch, config: LossConfig
) -> tuple[Tensor, dict[str, float]]:
    """The loss of this process's queries against the documents of all, and the ledger."""
    size = len(text.queries)
    own = vectors[size:]  # (own documents, D)
    counts = distributed.row_counts(len(own), own.device)
    documents = distributed.gather_rows(own, counts)  # (N, D)
    queries, brought = facts(text, own.device, first=distributed.rank() * size)
    columns = distributed.gather_rows(torch.stack(brought, dim=1), counts)  # (N, 3)
    known = Documents(*columns.T)
    labels = torch.from_numpy(text.labels).to(own.device) + sum(counts[: distributed.rank()])
    masks = candidate_masks(queries, known, labels)
    if not config.mask_false_negatives:
        masks = {"foreign": masks["foreign"]}
    mask = torch.stack(list(masks.values())).any(0)  # (B, N)
    options = {"temperature": config.temperature, "gamma": config.gamma, "mask": mask}
    dims = config.matryoshka_dims or (vectors.shape[-1],)
    weights = config.matryoshka_weights or (1.0,)
    value = matryoshka(vectors[:size], documents, labels, dims=dims, weights=weights, **options)
    seen = ~mask.scatter(1, labels[:, None], True)  # (B, N) negatives that count
    hard = seen & (queries.numbers[:, None] == known.owners)
    ledger = {"hard": hard, "in_batch": seen & ~hard}
    ledger |= {f"masked_{reason}": found for reason, found in masks.items()}
    return value, {name: float(found.sum()) for name, found in ledger.items()}


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
