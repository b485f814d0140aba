"""How well held-out pairs are found again, during training.

Q  queries    N  documents    D  width

Two numbers a task, cheap enough to take often: against the positives of a batch of queries (what
the loss sees), and against every document of the held-out task (closer to retrieval). They say
whether a run learns; they are not to be compared between runs on other data, and no substitute for
`evaluate.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kalm_min.data import TextBatch, TrainingData, collate
from kalm_min.losses import candidate_masks
from kalm_min.training import distributed
from kalm_min.training.step import facts

Embed = Callable[[list[str]], Tensor]


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
    own = scores.gather(1, labels[:, None])  # (Q, 1)
    better = (scores >= own) & ~mask
    return better.scatter(1, labels[:, None], False).sum(1) + 1


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
        embed: (n, D) unit vectors of texts.
        template: of instructions.
        batch_size: queries of a batch.
        limit: pairs of a task that are looked at.
        together: every process embeds every text, as a sharded model must; otherwise its share.

    Returns:
        {"accuracy", "mrr", "in_batch_accuracy", "in_batch_mrr"}, means over tasks, and
        "accuracy/<task>" for each.
    """
    results: dict[str, float] = {}
    totals: list[list[float]] = []
    start = 0
    for name, size in zip(data.task_names, data.task_sizes, strict=True):
        examples = [data[start + i] for i in range(min(size, limit))]
        start += size
        batch = collate(examples, num_negatives=10**6, template=template, epoch=0, seed=0)
        texts = list(dict.fromkeys([*batch.queries, *batch.documents]))
        vectors = (embed(texts) if together else _embed_shared(texts, embed)).cpu()
        numbers = _measure(batch, dict(zip(texts, vectors, strict=True)), batch_size)
        results[f"accuracy/{name}"] = numbers[0]
        totals.append(numbers)
    means = [sum(column) / len(column) for column in zip(*totals, strict=True)]
    names = ("accuracy", "mrr", "in_batch_accuracy", "in_batch_mrr")
    return dict(zip(names, means, strict=True)) | results


def _measure(batch: TextBatch, vectors: dict[str, Tensor], batch_size: int) -> list[float]:
    """[accuracy, mrr, in-batch accuracy, in-batch mrr] of one task, from the vector of each text."""
    queries = torch.stack([vectors[text] for text in batch.queries])  # (Q, D)
    documents = torch.stack([vectors[text] for text in batch.documents])  # (N, D)
    labels = torch.from_numpy(batch.labels)
    queries_known, documents_known = facts(batch, labels.device)
    masks = candidate_masks(queries_known, documents_known, labels)
    mask = masks["positive"] | masks["query"] | masks["group"]  # (Q, N)
    ranks = rank_of_positive(queries, documents, labels, mask)
    block = torch.arange(len(queries)) // batch_size
    outside = block[:, None] != block[documents_known.owners]  # (Q, N)
    extra = torch.ones_like(mask)
    extra[:, labels] = False  # in a batch, only the positives are candidates
    near = rank_of_positive(queries, documents, labels, mask | outside | extra)
    return [
        value
        for rank in (ranks, near)
        for value in ((rank == 1).double().mean().item(), (1 / rank.double()).mean().item())
    ]


def _embed_shared(texts: list[str], embed: Embed) -> Tensor:
    """(len(texts), D) vectors, each process computing its share."""
    rank, size = distributed.rank(), distributed.world_size()
    own = embed(texts[rank::size])
    counts = [len(texts[r::size]) for r in range(size)]
    parts = distributed.gather_rows(own, counts).split(counts)
    vectors = own.new_empty(len(texts), own.shape[1])
    for r, part in enumerate(parts):
        vectors[r::size] = part
    return vectors
