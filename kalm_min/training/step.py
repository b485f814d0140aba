"""One training step, from a batch of texts to gradients on the parameters.

n  different texts of this process     B  its queries     N  candidates of all processes     D  dimension

    texts -> ids -> chunks of at most `tokens_per_batch` tokens -> vectors (n, D)
    vectors -> queries (B, D), candidates of all processes (N, D) -> ContrastiveBatch -> loss

A text that occurs in the batch more than once is embedded once.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kalm_min.data import TextBatch
from kalm_min.losses import (
    ContrastiveBatch,
    count_pairs,
    distillation,
    matryoshka,
    mixed_cosines,
    non_candidates,
)
from kalm_min.model import Packed
from kalm_min.sampling import token_budget_batches
from kalm_min.tokenizer import Tokenizer
from kalm_min.training import distributed
from kalm_min.training.gradcache import cached_backward


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The loss of a step; the defaults are those of the public fine-tuning script."""

    temperature: Annotated[float, "Divides the cosine similarity."] = 0.01
    gamma: Annotated[float, "Exponent of the focal weight (1 - p)^gamma; V2 uses 0.5."] = 0.0
    matryoshka_dims: Annotated[
        tuple[int, ...], "Leading dimensions that can be used alone; none: the full dimension only."
    ] = ()
    matryoshka_weights: Annotated[
        tuple[float, ...], "One weight per dimension; the reports use 1, 0.3, 0.2, 0.1, 0.1."
    ] = ()
    mixing: Annotated[bool, "Add two negatives per query, mixed from its own (V2)."] = False
    distillation_weight: Annotated[
        float, "Share of the KL term against the teacher scores in the data; V2.5 uses 0.7."
    ] = 0.0
    distillation_temperature: Annotated[float, "Divides both scores in the KL term."] = 0.05
    memory_gib: Annotated[
        float, "GiB for scores, beside the vectors; what exceeds it is computed again in backward."
    ] = 1.0
    mask_false_negatives: Annotated[
        bool, "Known positives of the query, its own text and its class are not its negatives."
    ] = True
    false_negative_margin: Annotated[
        float | None,
        "Documents whose cosine exceeds the positive's by this are not negatives; Qwen3 uses 0.1.",
    ] = None
    query_negatives: Annotated[bool, "The other queries of a batch are negatives too."] = False
    document_negatives: Annotated[
        bool, "A query's negatives are negatives of its positive too."
    ] = False

    def __post_init__(self) -> None:
        """Validate values and their combinations."""
        for name in ("temperature", "distillation_temperature", "memory_gib"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected more than 0, found {getattr(self, name)}")
        share, dims = self.distillation_weight, self.matryoshka_dims
        if self.gamma < 0:
            raise ValueError(f"gamma: expected 0 or more, found {self.gamma}")
        if not 0 <= share <= 1:
            raise ValueError(f"distillation_weight: expected 0 to 1, found {share}")
        if self.false_negative_margin is not None and not self.mask_false_negatives:
            raise ValueError("false_negative_margin: expected mask_false_negatives to be true")
        if len(set(dims)) != len(dims):
            raise ValueError("matryoshka_dims: expected each dimension once")
        if len(dims) != (found := len(self.matryoshka_weights)):
            expected = f"one for each of the {len(dims)} matryoshka_dims"
            raise ValueError(f"matryoshka_weights: expected {expected}, found {found}")


class TokenBatch(NamedTuple):
    """A batch of texts as token ids, each different text once."""

    sequences: list[list[int]]  # n token lists
    indices: Tensor  # (B + documents,) int64: the sequence of each query, then of each document
    text: TextBatch


class StepResult(NamedTuple):
    """The outcome of one step on this process."""

    loss: Tensor  # mean over this process's queries, detached
    counts: dict[str, float]  # those of `contrastive_loss`, and "tokens"
    finite: Tensor  # (B + documents,) bool, whether the vector is finite


def tokenize(batch: TextBatch, tokenizer: Tokenizer, *, max_length: int) -> TokenBatch:
    """Token ids of every different text of the batch."""
    texts = [*batch.queries, *batch.documents]
    unique = {text: index for index, text in enumerate(dict.fromkeys(texts))}
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
        device: of the chunks that `embed` is given.
        tokens_per_batch: tokens of one chunk; bounds the memory, changes no result.
        no_sync: see `cached_backward`.
        sharded: every call of `embed` is collective.
    """
    lengths = [len(ids) for ids in batch.sequences]
    rows = token_budget_batches(lengths, tokens_per_batch)
    chunks = [Packed.from_sequences([batch.sequences[i] for i in part], device) for part in rows]
    counts: dict[str, float] = {"tokens": sum(lengths)}
    finite: list[Tensor] = []

    def loss(vectors: Tensor) -> Tensor:
        vectors = vectors[batch.indices.to(device)]  # (B + documents, D)
        finite.append(vectors.detach().isfinite().all(1))
        gathered = contrastive_batch(vectors, batch.text, query_negatives=config.query_negatives)
        value, found = contrastive_loss(gathered, config)
        counts.update(found)
        return value

    rounds = distributed.max_over_ranks(len(chunks), device)
    value = cached_backward(embed, chunks, rows, loss, no_sync, rounds=rounds, sharded=sharded)
    return StepResult(value, counts, finite[0])


def contrastive_batch(
    vectors: Tensor, text: TextBatch, *, query_negatives: bool = False, gather: bool = True
) -> ContrastiveBatch:
    """The queries of this process and the candidates of all, or of this one without `gather`.

    Args:
        vectors: (B + documents, D) of the queries, then of the documents.
        text: as many queries on every process.
        query_negatives: the queries are candidates too, before the documents of their process.
        gather: exchange the candidates, with gradient.
    """

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(vectors.device)

    size = len(text.queries)
    numbers = np.arange(size) + (distributed.rank() * size if gather else 0)  # (B,)
    queries = np.stack([text.query_hashes, text.query_groups, numbers])  # (3, B)
    documents = [text.document_hashes, text.document_groups, numbers[text.document_owner]]
    meta = np.vstack([np.hstack([queries, documents]), np.arange(len(vectors)) < size])
    per_query = np.bincount(text.document_owner, minlength=size)  # (B,)
    present = np.arange(max(2, per_query.max())) < per_query[:, None]  # (B, M)
    rows = text.labels[:, None] + np.arange(present.shape[1]) * present  # (B, M)
    longest = max(map(len, text.positive_hashes))
    positives = np.stack([np.resize(hashes, longest) for hashes in text.positive_hashes])  # (B, P)
    start = 0 if query_negatives else size
    candidates, candidate_meta = vectors[start:], tensor(meta.T[start:].copy())
    first = size - start  # the row of this process's first document
    if gather:
        counts = distributed.row_counts(len(candidates), vectors.device)
        first += sum(counts[: distributed.rank()])
        candidates = distributed.gather_rows(candidates, counts)  # (N, D)
        candidate_meta = distributed.gather_rows(candidate_meta, counts)  # (N, 4)
    return ContrastiveBatch(
        queries=vectors[:size],
        documents=candidates,
        labels=tensor(text.labels) + first,
        query_meta=tensor(queries),
        document_meta=candidate_meta.T.contiguous(),
        positives=tensor(positives),
        in_batch=tensor(text.in_batch),
        rows=tensor(rows) + first,
        present=tensor(present),
        teacher=tensor(text.teacher_scores[rows]),
        mix_pair=tensor(text.mix_pair),
        mix_share=tensor(text.mix_share),
    )


def contrastive_loss(
    batch: ContrastiveBatch, config: LossConfig
) -> tuple[Tensor, dict[str, float]]:
    """The mean loss over the queries, and how many pairs of each kind it was computed over.

    Beside the counts of `count_pairs`: "document_document", negatives of the positives; "mixed".
    """
    dims = config.matryoshka_dims or (batch.queries.shape[1],)
    weights = config.matryoshka_weights or (1.0,)
    margin = config.false_negative_margin
    counts: dict[str, Tensor] = {}

    def mask(rows: slice, columns: slice, cosines: Tensor, positives: Tensor) -> Tensor:
        too_similar = None if margin is None else cosines > positives + margin
        masks = non_candidates(batch, rows, columns, too_similar)
        if not config.mask_false_negatives:
            masks = {reason: m & (reason in {"self", "foreign"}) for reason, m in masks.items()}
        for name, count in count_pairs(batch, masks, rows, columns).items():
            counts[name] = counts.get(name, 0) + count
        return reduce(torch.logical_or, masks.values())

    over = partial(matryoshka, batch.queries, batch.documents, dims=dims, weights=weights)
    mixes = {"present": batch.present, "pair": batch.mix_pair, "share": batch.mix_share}
    loss = over(
        batch.labels,
        temperature=config.temperature,
        mask=mask,
        gamma=config.gamma,
        extra_negatives=partial(mixed_cosines, rows=batch.rows, **mixes) if config.mixing else None,
        document_negatives=batch.document_meta[3] == 0 if config.document_negatives else None,
        memory_gib=config.memory_gib,
    )
    # Before backward, in which a tile that is computed again counts again.
    numbers = torch.stack([*counts.values()]).tolist()
    found: dict[str, float] = dict(zip(counts, numbers, strict=True))
    documents = found["hard"] + found["in_batch"] + found["cross_device"]
    found["document_document"] = documents if config.document_negatives else 0
    found["mixed"] = 2 * int((batch.present.sum(1) > 2).sum()) if config.mixing else 0
    if share := config.distillation_weight:
        student = {"present": batch.present, "temperature": config.distillation_temperature}
        kl = over(batch.rows, loss=distillation, teacher=batch.teacher, **student)
        loss = (1 - share) * loss + share * kl
    return loss, found
