"""From examples to one training batch of texts, with what the loss needs to know about each text.

For each query one of its positives and some of its negatives are drawn by a generator that depends
on (seed, epoch, index of the example) alone: not on the rank, the batch or the data worker. Texts
come with a 64-bit hash, so that the same text in the line of another query, on any rank, is
recognised: it is not a negative. Tokenizing (training/) and masking (losses/) happen elsewhere.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt

from kalm_min.data.dataset import Example
from kalm_min.data.index import Ints
from kalm_min.files import text_hash
from kalm_min.settings import fill_template

_BETA = 2.0  # pair-wise shares are from Beta(2, 2): KaLM V2 report, online mixing

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBatch:
    """B queries and N documents with instructions applied; hashes are of the bare texts."""

    queries: list[str]
    documents: list[str]  # for each query its positive, then its negatives
    labels: Ints  # (B,) index of each query's positive among the documents
    query_hashes: Ints  # (B,)
    positive_hashes: list[Ints]  # for each query, of all its positives, drawn or not
    document_hashes: Ints  # (N,)
    query_groups: Ints  # (B,) hash of task and group; 0 for no group
    # (N,) the query's group for a positive; 0 for a negative that was not drawn by its group.
    document_groups: Ints
    document_owner: Ints  # (N,) index of the query that the document belongs to
    # (B,) False if the candidates of the query are only the documents of its line.
    in_batch: npt.NDArray[np.bool_]
    mix_pair: Ints  # (B, 2) indices, among the query's negatives, of the two that losses mix
    mix_share: Floats  # (B,) share of the first one, from Beta(2, 2)
    # (N,) a teacher's score of each document for its owner; nan if the data has none.
    teacher_scores: Floats


def collate(
    examples: Sequence[Example],
    *,
    num_negatives: int,
    template: str,
    epoch: int,
    seed: int,
    query_prompt: str = "",
    document_prompt: str = "",
) -> TextBatch:
    """Draw the documents of each example and join them into one batch.

    Negatives that equal a positive or the query are dropped (mined data has such rows), and no text
    is drawn twice for a query.

    Args:
        examples: at least one.
        num_negatives: the maximum per query; a row with fewer negatives is not padded.
        template: turns an instruction into a prompt through its field {instruction}.
        epoch: positives and negatives are drawn anew in each epoch.
        seed: the run's seed.
        query_prompt: put before queries that have no instruction; "" is one, and means no prompt.
        document_prompt: put before documents, unless the task is symmetric: then they get the
            query's prompt.
    """
    assert examples, "a batch needs an example"
    queries, labels = list[str](), list[int]()
    documents = list[tuple[str, str, int, int, float]]()  # prompted, text, owner, group, score
    mix_pair, mix_share = np.zeros((len(examples), 2), np.int64), np.zeros(len(examples))
    for number, example in enumerate(examples):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch, example.index)))
        chosen = int(rng.integers(len(example.positives)))
        excluded = {example.query, *example.positives}
        scores = example.negative_scores or repeat(np.nan)
        groups = example.negative_groups or repeat(None)
        distinct: dict[str, tuple[str, str | int | None, float]] = {}
        for negative in zip(example.negatives, groups, scores, strict=False):
            if negative[0] not in excluded:
                distinct.setdefault(negative[0], negative)
        negatives = list(distinct.values())
        if len(negatives) > num_negatives:
            order: list[int] = rng.permutation(len(negatives)).tolist()
            negatives = [negatives[i] for i in order[:num_negatives]]
        mix_share[number] = rng.beta(_BETA, _BETA)
        if len(negatives) > 1:
            mix_pair[number] = rng.permutation(len(negatives))[:2]

        instruction = example.instruction
        prompt = query_prompt if instruction is None else fill_template(template, instruction)
        before = prompt if example.symmetric else document_prompt
        queries.append(prompt + example.query)
        labels.append(len(documents))
        teacher = example.positive_scores[chosen] if example.positive_scores else np.nan
        positive = (example.positives[chosen], example.group, teacher)
        for text, group, score in [positive, *negatives]:
            # With the task, so that label "1" of one task is not label "1" of another.
            group_hash = 0 if group is None else text_hash(json.dumps([example.task, group]))
            documents.append((before + text, text, number, group_hash, score))
    prompted_texts, texts, owner, group_hashes, teacher_scores = zip(*documents, strict=True)
    document_groups = np.array(group_hashes, np.int64)
    return TextBatch(
        queries=queries,
        documents=list(prompted_texts),
        labels=np.array(labels, np.int64),
        query_hashes=_hashes(example.query for example in examples),
        positive_hashes=[_hashes(example.positives) for example in examples],
        document_hashes=_hashes(texts),
        query_groups=document_groups[labels],
        document_groups=document_groups,
        document_owner=np.array(owner, np.int64),
        in_batch=np.array([example.in_batch_negatives for example in examples], np.bool_),
        mix_pair=mix_pair,
        mix_share=mix_share,
        teacher_scores=np.array(teacher_scores, np.float64),
    )


def _hashes(texts: Iterable[str]) -> Ints:
    return np.fromiter(map(text_hash, texts), np.int64)
