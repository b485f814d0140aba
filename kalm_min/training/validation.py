"""Accuracy of held-out retrieval, during training.

Q  queries    N  documents    D  dimension

Two pairs of numbers per task, cheap enough to take often: against the positives of a batch of
queries (what the loss sees), and against every document of the held-out task (closer to retrieval).
They say whether a run learns; they are not to be compared between runs on other data, and no
substitute for `evaluate.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kalm_min.data import TextBatch, TrainingData, collate
from kalm_min.losses import non_candidates
from kalm_min.training import distributed
from kalm_min.training.step import contrastive_batch

Embed = Callable[[list[str]], Tensor]


def validate(
    data: TrainingData,
    embed: Embed,
    *,
    template: str,
    batch_size: int,
    limit: int,
    together: bool = False,
) -> dict[str, float]:
    """Accuracy@1 and mean reciprocal rank over the first `limit` pairs of each held-out task.

    Args:
        data: the held-out pairs.
        embed: (n, D) unit vectors of n texts.
        template: turns an instruction into a prompt.
        batch_size: queries per batch.
        limit: pairs per task that are looked at.
        together: every process embeds every text, as a sharded model must; otherwise its share.

    Returns:
        {"accuracy", "mrr", "in_batch_accuracy", "in_batch_mrr"}, means over tasks, and
        "accuracy/<task>" for each.
    """
    scores: dict[str, dict[str, float]] = {}
    start = 0
    for name, size in zip(data.task_names, data.task_sizes, strict=True):
        examples = [data[start + i] for i in range(min(size, limit))]
        start += size
        batch = collate(examples, num_negatives=10**6, template=template, epoch=0, seed=0)
        rows = {text: i for i, text in enumerate(dict.fromkeys([*batch.queries, *batch.documents]))}
        vectors = embed([*rows]) if together else _embed_shared([*rows], embed)
        queries, documents = (
            vectors.cpu()[[rows[text] for text in texts]]
            for texts in (batch.queries, batch.documents)
        )
        scores[name] = _scores(batch, queries, documents, batch_size)
    names = next(iter(scores.values()))
    means = {name: sum(task[name] for task in scores.values()) / len(scores) for name in names}
    return means | {f"accuracy/{task}": one["accuracy"] for task, one in scores.items()}


def _scores(
    batch: TextBatch, queries: Tensor, documents: Tensor, batch_size: int
) -> dict[str, float]:
    """The numbers of one task, from (Q, D) and (N, D) unit vectors."""
    labels = torch.from_numpy(batch.labels)
    masks = non_candidates(contrastive_batch(torch.cat([queries, documents]), batch, gather=False))
    is_masked = masks["positive"] | masks["query"] | masks["group"]  # (Q, N)
    batch_of = torch.arange(len(queries)) // batch_size  # (Q,)
    in_other_batch = batch_of[:, None] != batch_of[torch.from_numpy(batch.document_owner)]  # (Q, N)
    is_negative = torch.ones(len(documents), dtype=torch.bool)
    is_negative[labels] = False  # (N,)
    scores: dict[str, float] = {}
    for prefix, mask in (("", is_masked), ("in_batch_", is_masked | in_other_batch | is_negative)):
        ranks = rank_of_positive(queries, documents, labels, mask)  # (Q,)
        scores[f"{prefix}accuracy"] = (ranks == 1).double().mean().item()
        scores[f"{prefix}mrr"] = (1 / ranks.double()).mean().item()
    return scores


def rank_of_positive(queries: Tensor, documents: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """The rank, from 1, of each query's positive among its candidates; ties count against it.

    Args:
        queries: (Q, D) unit vectors.
        documents: (N, D) unit vectors.
        labels: (Q,) int64 row of the positive.
        mask: (Q, N) bool, True where the document is not a candidate.

    Returns:
        (Q,) int64.
    """
    scores = queries @ documents.T  # (Q, N)
    positive = scores.gather(1, labels[:, None])  # (Q, 1)
    is_ahead = (scores >= positive) & ~mask
    return is_ahead.scatter(1, labels[:, None], False).sum(1) + 1  # (Q,)


def _embed_shared(texts: list[str], embed: Embed) -> Tensor:
    """(len(texts), D) vectors, each process computing its share."""
    rank, size = distributed.rank(), distributed.world_size()
    share = embed(texts[rank::size])
    counts = [len(texts[r::size]) for r in range(size)]
    vectors = share.new_empty(len(texts), share.shape[1])
    for r, part in enumerate(distributed.gather_rows(share, counts).split(counts)):
        vectors[r::size] = part
    return vectors
