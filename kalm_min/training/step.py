"""One training step, from a batch of texts to gradients on the parameters.

n  distinct texts of this process    B  its queries    N  candidates everywhere    D  dimension

    texts -> ids -> chunks of at most `tokens_per_batch` tokens -> vectors (n, D)
    vectors -> queries (B, D), candidates of all processes (N, D) -> ContrastiveBatch -> loss

A text that occurs in the batch more than once is embedded once.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial, reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kalm_min import losses
from kalm_min.data import TextBatch
from kalm_min.losses import ContrastiveBatch
from kalm_min.model import Packed
from kalm_min.options import LossConfig
from kalm_min.sampling import token_budget_batches
from kalm_min.tokenizer import Tokenizer
from kalm_min.training import distributed
from kalm_min.training.gradcache import cached_backward


class TokenBatch(NamedTuple):
    """A batch of texts as token ids, each distinct text once."""

    sequences: list[list[int]]  # n token lists
    indices: Tensor  # (B + documents,) int64: the sequence of each query, then of each document
    text: TextBatch


def tokenize(batch: TextBatch, tokenizer: Tokenizer, *, max_length: int) -> TokenBatch:
    """Token ids of every distinct text of the batch."""
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
) -> tuple[Tensor, dict[str, float], Tensor]:
    """Add the gradient of the global batch's mean loss to the parameters.

    Args:
        batch: this process's share of the global batch, with equally many queries on every process.
        embed: (b, D) vectors of a packed chunk on `device`.
        tokens_per_batch: maximum tokens of a chunk; bounds the memory and changes no result.
        no_sync, sharded: see `cached_backward`.

    Returns:
        The mean loss over this process's queries, detached; the counts of `contrastive_loss` and
        "tokens"; (B + documents,) bool, which vectors are finite.
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
    return value, counts, finite[0]


def contrastive_batch(
    vectors: Tensor, text: TextBatch, *, query_negatives: bool = False, gather: bool = True
) -> ContrastiveBatch:
    """The queries of this process and the candidates of all, or without `gather` of this one.

    Args:
        vectors: (B + documents, D), queries first; every process has equally many queries.
        query_negatives: queries are candidates too, placed before the documents of their process.
    """

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(vectors.device)

    size = len(text.queries)
    numbers = np.arange(size) + (distributed.rank() * size if gather else 0)  # (B,)
    queries = np.stack([text.query_hashes, text.query_groups, numbers])  # (3, B)
    documents = [text.document_hashes, text.document_groups, numbers[text.document_owner]]
    meta = np.vstack([np.hstack([queries, documents]), np.arange(len(vectors)) < size])
    per_query = np.bincount(text.document_owner)  # (B,)
    offsets = np.arange(max(2, per_query.max()))  # (M,)
    rows = np.where(offsets < per_query[:, None], text.labels[:, None] + offsets, -1)  # (B, M)
    known = max(map(len, text.positive_hashes))
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
        rows=tensor(np.where(rows < 0, -1, rows + first)),
        query_meta=tensor(queries),
        document_meta=candidate_meta.T.contiguous(),
        positives=tensor(np.stack([np.resize(one, known) for one in text.positive_hashes])),
        in_batch=tensor(text.in_batch),
        teacher=tensor(text.teacher_scores[rows]),
        mix_pair=tensor(text.mix_pair),
        mix_share=tensor(text.mix_share),
    )


def contrastive_loss(
    batch: ContrastiveBatch, config: LossConfig
) -> tuple[Tensor, dict[str, float]]:
    """The mean loss over the queries, and the number of pairs of each kind that it covers.

    Adds to those of `count_pairs` "document_document" (negatives of positives) and "mixed".
    """
    margin = config.false_negative_margin
    counts: dict[str, Tensor] = {}

    def mask(rows: slice, columns: slice, cosines: Tensor, positives: Tensor) -> Tensor:
        too_similar = None if margin is None else cosines > positives + margin
        masks = losses.non_candidates(batch, rows, columns, too_similar)
        if not config.mask_false_negatives:
            masks = {reason: m & (reason in {"self", "foreign"}) for reason, m in masks.items()}
        for name, count in losses.count_pairs(batch, masks, rows, columns).items():
            counts[name] = counts.get(name, 0) + count
        return reduce(torch.logical_or, masks.values())

    dims = config.matryoshka_dims or (batch.queries.shape[1],)
    weights = config.matryoshka_weights or (1.0,)
    over = partial(losses.matryoshka, batch.queries, batch.documents, dims=dims, weights=weights)
    mixes = {"rows": batch.rows, "pair": batch.mix_pair, "share": batch.mix_share}
    loss = over(
        batch.rows[:, 0],
        temperature=config.temperature,
        mask=mask,
        gamma=config.gamma,
        extra_negatives=partial(losses.mixed_cosines, **mixes) if config.mixing else None,
        document_negatives=batch.document_meta[3] == 0 if config.document_negatives else None,
        memory_gib=config.memory_gib,
    )
    # Before the backward pass, in which a tile that is computed again would count again.
    numbers = torch.stack([*counts.values()]).tolist()
    found: dict[str, float] = dict(zip(counts, numbers, strict=True))
    documents = found["hard"] + found["in_batch"] + found["cross_device"]
    found["document_document"] = documents if config.document_negatives else 0
    found["mixed"] = 2 * int((batch.rows[:, 2:3] >= 0).sum()) if config.mixing else 0
    if share := config.distillation_weight:
        student = {"teacher": batch.teacher, "temperature": config.distillation_temperature}
        kl = over(batch.rows, loss=losses.distillation, **student)
        loss = (1 - share) * loss + share * kl
    return loss, found
