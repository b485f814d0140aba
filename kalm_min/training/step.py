"""One training step, from a batch of texts to gradients on the parameters.

n  different texts of this process     B  its queries     N  documents of all processes     D  width

    texts -> ids -> chunks of at most `tokens_per_batch` tokens -> vectors (n, D)
    vectors -> queries (B, D), documents of all processes (N, D) -> masks -> loss

A text that stands in the batch more than once is embedded once.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kalm_min.data import TextBatch
from kalm_min.losses import (
    ABSENT,
    Documents,
    Mixes,
    Queries,
    candidate_masks,
    contrastive_rows,
    cosines_of,
    distillation_rows,
    mixed_cosines,
    prefixes,
)
from kalm_min.losses.cosines import Prefixes
from kalm_min.model import Packed
from kalm_min.sampling import token_budget_batches
from kalm_min.tokenizer import Tokenizer
from kalm_min.training import distributed
from kalm_min.training.gradcache import cached_backward


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The loss of a step; the defaults are those of the public fine-tuning script."""

    temperature: float = 0.01
    """Divides the cosine."""
    gamma: float = 0.0
    """Exponent of the focal weight (1 - p)^gamma; 0 is plain InfoNCE, 0.5 is the V2 report's."""
    matryoshka_dims: tuple[int, ...] = ()
    """Leading widths that are trained to stand alone; none trains the full width only."""
    matryoshka_weights: tuple[float, ...] = ()
    """One a width; the report's are 1, 0.3, 0.2, 0.1, 0.1."""
    mixing: bool = False
    """Add two synthetic negatives a query, mixed from its own (V2)."""
    distillation_weight: float = 0.0
    """Share of the KL term against teacher scores in the data; 0.7 is the V2.5 report's."""
    distillation_temperature: float = 0.05
    """Divides student and teacher scores in the KL term."""
    memory_gib: float = 1.0
    """What the scores may take beside the vectors; larger batches are scored in blocks."""
    mask_false_negatives: bool = True
    """Documents whose text is a known positive of the query, or the query, are no negatives."""
    false_negative_margin: float | None = None
    """Nor are documents whose cosine exceeds the positive's by more than this; Qwen3's is 0.1."""
    query_negatives: bool = False
    """The other queries of the batch are negatives of a query too."""
    document_negatives: bool = False
    """A query's negatives are negatives of its positive too."""

    def __post_init__(self) -> None:
        """Refuse what cannot be computed."""
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected more than 0, found {self.temperature}")
        if self.gamma < 0:
            raise ValueError(f"gamma: expected 0 or more, found {self.gamma}")
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(
                f"distillation_weight: expected 0 to 1, found {self.distillation_weight}"
            )
        if self.distillation_temperature <= 0 or self.memory_gib <= 0:
            raise ValueError("distillation_temperature and memory_gib must be more than 0")
        if self.false_negative_margin is not None and not self.mask_false_negatives:
            raise ValueError("false_negative_margin: expected mask_false_negatives to be true")
        if len(set(self.matryoshka_dims)) != len(self.matryoshka_dims):
            raise ValueError("matryoshka_dims: expected each width once")
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

    rounds = distributed.most(len(chunks), device)
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
    scores = torch.from_numpy(text.teacher_scores).to(own)  # (own documents,)
    # Only a query's own documents have a score that matters; the others' places are filled.
    teacher = torch.cat(
        [scores.new_zeros(first), scores, scores.new_zeros(len(documents) - first - len(own))]
    )
    mixes = _mixes(text, own.device, first) if config.mixing else None
    everyone = None
    if config.query_negatives:
        each = distributed.row_counts(size, own.device)
        brought = torch.stack([queries.hashes, queries.groups, queries.numbers], dim=1)
        everyone = (
            distributed.gather_rows(vectors[:size], each),
            Documents(*distributed.gather_rows(brought, each).T),
        )
    rows = Rows(vectors[:size], documents, labels, queries, known, teacher, mixes, everyone)
    return loss_in_blocks(rows, config)


class Rows(NamedTuple):
    """All that the loss of any block of queries needs."""

    queries: Tensor  # (B, D)
    documents: Tensor  # (N, D)
    labels: Tensor  # (B,)
    asked: Queries
    known: Documents
    teacher: Tensor  # (N,)
    mixes: Mixes | None
    everyone: tuple[Tensor, Documents] | None = None
    """The queries of all processes as candidates: (Q, D), and what is known of them."""


_REASONS = ("foreign", "positive", "query", "group", "margin")
_FURTHER = ("query_query", "document_document", "mixed")
_LEDGER = (
    *("hard", "in_batch", "cross_device"),
    *_FURTHER,
    *(f"masked_{reason}" for reason in _REASONS),
)


def loss_in_blocks(rows: Rows, config: LossConfig) -> tuple[Tensor, dict[str, float]]:
    """The mean loss over the queries, and the ledger's sums, in about `config.memory_gib`.

    Where all scores at once would not fit, blocks of queries are scored one after the other, and
    again in backward, so that the scores of one block exist at a time.
    """
    size, width = rows.queries.shape
    dims = config.matryoshka_dims or (width,)
    queries, documents = prefixes(rows.queries, dims), prefixes(rows.documents, dims)
    negatives = rows.mixes and rows.documents[rows.mixes.own]  # (B, M, D)
    others = rows.everyone and prefixes(rows.everyone[0], dims)  # (Q, D)
    candidates = len(rows.documents) * (1 + config.document_negatives)
    candidates += 0 if rows.everyone is None else len(rows.everyone[0])
    block = _block_size(candidates, width, len(dims), config.memory_gib)
    totals = []
    for start in range(0, size, block):
        part = slice(start, start + block)
        given = (rows, part, queries.rows(part), documents, negatives, others, config)
        totals.append(
            checkpoint(_block_loss, *given, use_reentrant=False)
            if block < size
            else _block_loss(*given)
        )
    ledger = torch.stack([found for _, found in totals]).sum(0).tolist()
    value = torch.stack([loss for loss, _ in totals]).sum() / size
    return value, dict(zip(_LEDGER, ledger, strict=True))


def _block_size(documents: int, width: int, dims: int, gib: float) -> int:
    """Queries of a block, so that its scores and the documents' gradient fit in `gib`.

    Measured (benchmarks/loss_memory.py): about 12 float32 numbers a document and width while a block
    is in backward, and twice the documents' gradient: the sum so far and what is being added.
    """
    rest = gib * 2**30 - 2 * 4 * documents * width
    return max(1, int(rest / (documents * (48 * dims + 16))))


def _block_loss(
    rows: Rows,
    part: slice,
    queries: Prefixes,
    documents: Prefixes,
    negatives: Tensor | None,
    others: Prefixes | None,
    config: LossConfig,
) -> tuple[Tensor, Tensor]:
    """The sum of the losses of some queries, and the ledger's counts over them."""
    labels = rows.labels[part]
    asked = Queries(*(fact[part] for fact in rows.asked))
    similarities = cosines_of(queries, documents)  # the widest last
    margin = math.inf if config.false_negative_margin is None else config.false_negative_margin
    masks = candidate_masks(asked, rows.known, labels, similarities[-1].detach(), margin)
    mask, masks = _in_force(masks, config)  # (b, N)
    own = asked.numbers[:, None] == rows.known.owners  # (b, N)
    dims = config.matryoshka_dims or (rows.queries.shape[-1],)
    weights = dict(zip(dims, config.matryoshka_weights or (1.0,), strict=True))
    total = rows.queries.new_zeros(())
    further = _further(rows, labels, asked, mask, queries, documents, others, config)
    if rows.mixes is not None and negatives is not None:
        mixes = Mixes(*(fact[part] for fact in rows.mixes))
        further["mixed"] = [
            mixed_cosines(rows.queries[part, :dim], negatives[part, :, :dim], mixes)
            for dim in sorted(dims)
        ]
    for dim, similarity, *extra in zip(sorted(dims), similarities, *further.values(), strict=True):
        losses = contrastive_rows(
            similarity,
            labels,
            temperature=config.temperature,
            mask=mask,
            gamma=config.gamma,
            extra=extra,
        )  # (b,)
        if a := config.distillation_weight:
            gap = distillation_rows(
                similarity, rows.teacher, own, temperature=config.distillation_temperature
            )
            losses = (1 - a) * losses + a * gap
        total = total + weights[dim] * losses.sum()
    seen = ~mask.scatter(1, labels[:, None], True)  # (b, N) negatives that count
    first, last = rows.asked.numbers[[0, -1]]
    here = (rows.known.owners >= first) & (rows.known.owners <= last)  # (N,) of this process
    hard, near = (seen & own).sum(), (seen & here).sum()
    none = [torch.full((), ABSENT, device=hard.device)]
    found = [(further.get(name, none)[-1] > ABSENT).sum() for name in _FURTHER]
    counts = [hard, near - hard, seen.sum() - near, *found]
    return total, torch.stack(counts + [masks[reason].sum() for reason in _REASONS])


def _in_force(masks: dict[str, Tensor], config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Which documents are no candidates, and why, under the reasons that the run goes by."""
    if not config.mask_false_negatives:
        masks = {name: found & (name == "foreign") for name, found in masks.items()}
    return torch.stack(list(masks.values())).any(0), masks


def _further(
    rows: Rows,
    labels: Tensor,
    asked: Queries,
    mask: Tensor,
    queries: Prefixes,
    documents: Prefixes,
    others: Prefixes | None,
    config: LossConfig,
) -> dict[str, list[Tensor]]:
    """Cosines with other queries, (b, Q), and of the positives with other documents, (b, N), by width.

    The report's sum has neither; the public code has them as an option, and so have GTE and Qwen3.
    """
    found: dict[str, list[Tensor]] = {}
    if others is not None and rows.everyone is not None:
        none, _ = _in_force(candidate_masks(asked, rows.everyone[1], asked.numbers), config)
        none = none.scatter(1, asked.numbers[:, None], True)  # (b, Q)
        cosines = cosines_of(queries, others)
        found["query_query"] = [cosine.masked_fill(none, ABSENT) for cosine in cosines]
    if config.document_negatives:
        none = mask.scatter(1, labels[:, None], True)  # (b, N)
        positives = documents.rows(labels)
        cosines = cosines_of(positives, documents)
        found["document_document"] = [cosine.masked_fill(none, ABSENT) for cosine in cosines]
    return found


def _mixes(text: TextBatch, device: torch.device, first: int) -> Mixes:
    """Each query's own negatives, as rows of the documents of all processes."""
    sizes = np.bincount(text.document_owner, minlength=len(text.queries)) - 1  # (B,)
    places = np.arange(max(1, sizes.max()))  # (M,)
    present = places < sizes[:, None]  # (B, M)
    own = np.where(present, text.labels[:, None] + 1 + places, text.labels[:, None]) + first
    columns = (own, present, text.mix_pair, text.mix_share)
    return Mixes(*(torch.from_numpy(column).to(device) for column in columns))


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
