"""Accuracy of held-out retrieval during training, and the prompts that it and a finished model use.

It is cheap enough to show often whether a run learns; it cannot be compared between runs on
different data and does not replace `evaluate.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from kalm_min.data import TrainingData, collate
from kalm_min.embedder import Embedder
from kalm_min.losses import non_candidates
from kalm_min.settings import fill_template
from kalm_min.training import distributed
from kalm_min.training.step import contrastive_batch

_KINDS = ("query", "document")
_LOOKED_AT = 100  # lines of a task, evenly spread, that tell its instruction


def trained_prompts(data: TrainingData, draws: Sequence[int], embedder: Embedder) -> dict[str, str]:
    """The prompts to store beside those of `embedder`, which texts without an instruction get.

    If all tasks with `draws` have one prompt, it is that of queries, and if all are symmetric, of
    documents too. Several are stored by the names of their tasks; "query" is then that of the
    run's default instruction, if there is one. Lines of a task that differ have no common prompt.
    """
    by_task: dict[str, set[str]] = {}
    symmetric, start, template = True, 0, embedder.instruction_template
    for task, size in enumerate(data.task_sizes):
        if draws[task]:
            rows = range(start, start + size, -(-size // _LOOKED_AT))
            by_task[data.task_names[task]] = {
                embedder.prompts["query"] if one is None else fill_template(template, one)
                for one in (data[row].instruction for row in rows)
            }
            symmetric &= data.settings[task].symmetric
        start += size
    found = set[str]().union(*by_task.values())
    if len(found) == 1:
        return dict.fromkeys(_KINDS if symmetric else _KINDS[:1], *found)
    default = {"query": fill_template(template, data.instruction)} if data.instruction else {}
    common = {name: next(iter(one)) for name, one in by_task.items() if len(one) == 1}
    return default | {name: one for name, one in common.items() if name not in _KINDS}


def prompt_of(task: str, prompts: Mapping[str, str]) -> str:
    """The stored prompt of a task's queries."""
    return prompts[task if task in prompts and task not in _KINDS else "query"]


def describe(prompts: Mapping[str, str]) -> str:
    """Which prompt is put before what, in a sentence."""
    query, document = (repr(prompts[kind]) if prompts[kind] else "no prompt" for kind in _KINDS)
    named = [repr(name) for name in prompts if name not in _KINDS]
    others = (
        f"; by prompt_name: {', '.join(named[:5])}{', ...' * (len(named) > 5)}" if named else ""
    )
    return f"encode_query puts {query} before texts, encode_document {document}{others}"


def validate(
    data: TrainingData,
    embedder: Embedder,
    autocast: Callable[[], AbstractContextManager[object]],
    batch_size: int,
    limit: int,
    *,
    together: bool,
) -> dict[str, float]:
    """Accuracy@1 and mean reciprocal rank over the first `limit` pairs of each held-out task.

    Queries without an instruction get the prompt that the model stores for their task, or for all.
    Texts are encoded inside `autocast()`; with `together` every process encodes all of them, as a
    sharded model requires, otherwise its share.

    Returns "accuracy" and "mrr" against every document of a task, "in_batch_accuracy" and
    "in_batch_mrr" against the positives of a batch of queries (means over tasks), and
    "accuracy/<task>" for each. Ties count against the positive.
    """
    tasks: dict[str, dict[str, float]] = {}
    processes = 1 if together else distributed.world_size()
    start = 0
    for name, size in zip(data.task_names, data.task_sizes, strict=True):
        examples = [data[start + i] for i in range(min(size, limit))]
        start += size
        template, draw = embedder.instruction_template, {"epoch": 0, "seed": 0}
        text = collate(
            examples,
            num_negatives=10**6,
            template=template,
            query_prompt=prompt_of(name, embedder.prompts),
            document_prompt=embedder.prompts["document"],
            **draw,
        )
        unique = list(dict.fromkeys([*text.queries, *text.documents]))
        shares = [unique[rank::processes] for rank in range(processes)]
        with autocast():
            share = embedder.encode(shares[distributed.rank() % processes], prompt="")
        vectors = torch.from_numpy(share).to(embedder.device)
        if not together:
            vectors = distributed.gather_rows(vectors, [len(share) for share in shares])
        row = {one: i for i, one in enumerate(one for share in shares for one in share)}
        rows = [row[one] for one in (*text.queries, *text.documents)]
        batch = contrastive_batch(vectors.cpu()[rows], text, gather=False)  # Q queries, N documents
        labels = torch.from_numpy(text.labels)  # (Q,)
        cosines = batch.queries @ batch.documents.T  # (Q, N)
        masks = non_candidates(batch)
        is_ahead = cosines >= cosines.gather(1, labels[:, None])  # (Q, N)
        is_ahead &= ~(masks["positive"] | masks["query"] | masks["group"])
        is_ahead.scatter_(1, labels[:, None], False)
        number = torch.arange(len(text.queries)) // batch_size  # (Q,) the batch of each query
        in_batch = torch.zeros_like(is_ahead)  # (Q, N)
        in_batch[:, labels] = number[:, None] == number
        scores: dict[str, float] = {}
        for prefix, ahead in (("", is_ahead), ("in_batch_", is_ahead & in_batch)):
            ranks = 1 + ahead.sum(1)  # (Q,)
            scores[f"{prefix}accuracy"] = (ranks == 1).double().mean().item()
            scores[f"{prefix}mrr"] = (1 / ranks.double()).mean().item()
        tasks[name] = scores
    names = ("accuracy", "mrr", "in_batch_accuracy", "in_batch_mrr")
    means = {name: sum(scores[name] for scores in tasks.values()) / len(tasks) for name in names}
    return means | {f"accuracy/{task}": scores["accuracy"] for task, scores in tasks.items()}
