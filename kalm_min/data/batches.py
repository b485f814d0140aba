"""Examples -> one training batch of texts, with what the loss must know about each of them.

For each query one of its positives and some of its negatives are drawn by a generator that depends
on (seed, epoch, index of the example) alone: not on the rank, the batch or the data worker. Texts
travel with a 64-bit hash, so that the same text brought by another query, on any rank, is known for
what it is: not a negative.

B queries, N documents. Not here: tokenizing, and turning hashes into masks (training/).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kalm_min.data.dataset import Example
from kalm_min.files import text_hash

_BETA = 2.0  # of the shares of a pair-wise mix, Beta(2, 2): KaLM V2 report, online mixing

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBatch:
    """Texts with their instructions applied; hashes are of the texts without."""

    queries: list[str]
    documents: list[str]
    """For each query its positive, then its negatives."""
    labels: Ints
    """(B,) where the positive of each query is among the documents."""
    query_hashes: Ints
    """(B,)"""
    positive_hashes: list[Ints]
    """Of all known positives of each query, drawn or not."""
    document_hashes: Ints
    """(N,)"""
    query_groups: Ints
    """(B,) hash of task and group; 0 is no group."""
    document_groups: Ints
    """(N,) that of the query for a positive; 0 for a negative, unless its group was drawn."""
    document_owner: Ints
    """(N,) the query that brought the document."""
    in_batch: npt.NDArray[np.bool_]
    """(B,) False: the query sees its own documents only."""
    mix_pair: Ints
    """(B, 2) places, among the query's negatives, of the two that losses/mixing.py mixes."""
    mix_share: Floats
    """(B,) share of the first one, from Beta(2, 2)."""
    teacher_scores: Floats
    """(N,) a teacher's score of each document for its owner; nan where the data has none."""


def collate(
    examples: Sequence[Example], *, num_negatives: int, template: str, epoch: int, seed: int
) -> TextBatch:
    """Draw the documents of each example and join them into one batch.

    Args:
        examples: at least one.
        num_negatives: per query at most; a row with fewer brings fewer. Nothing is repeated.
        template: turns an instruction into a prompt by its field {instruction}. An example
            without an instruction has no prompt.
        epoch: positives and negatives are drawn anew in each.
        seed: of the run.
    """
    assert examples, "a batch needs an example"
    queries: list[str] = []
    documents: list[str] = []
    plain: list[str] = []  # the documents without prompt
    draws: list[_Drawn] = []
    owner: list[int] = []
    labels: list[int] = []
    for number, example in enumerate(examples):
        instruction = example.instruction
        prompt = template.format(instruction=instruction) if instruction else ""
        queries.append(prompt + example.query)
        drawn = _draw(example, num_negatives, seed, epoch)
        draws.append(drawn)
        labels.append(len(documents))
        owner += [number] * len(drawn.texts)
        plain += drawn.texts
        documents += [prompt + text for text in drawn.texts] if example.symmetric else drawn.texts
    document_groups = _ints(
        _group_hash(example.task, group)
        for example, drawn in zip(examples, draws, strict=True)
        for group in drawn.groups
    )
    return TextBatch(
        queries=queries,
        documents=documents,
        labels=_ints(labels),
        query_hashes=_ints(text_hash(example.query) for example in examples),
        positive_hashes=[_ints(map(text_hash, example.positives)) for example in examples],
        document_hashes=_ints(map(text_hash, plain)),
        query_groups=document_groups[labels],
        document_groups=document_groups,
        document_owner=_ints(owner),
        in_batch=np.array([example.in_batch_negatives for example in examples], np.bool_),
        mix_pair=np.array([drawn.mix_pair for drawn in draws], np.int64),
        mix_share=np.array([drawn.mix_share for drawn in draws], np.float64),
        teacher_scores=np.array([score for drawn in draws for score in drawn.scores], np.float64),
    )


class _Drawn(NamedTuple):
    """What one example brings to a batch."""

    texts: list[str]
    """Its positive, then its negatives."""
    scores: list[float]
    """A teacher's of each, nan where there is none."""
    groups: list[str | None]
    """Of each."""
    mix_pair: tuple[int, int]
    mix_share: float


def _draw(example: Example, num_negatives: int, seed: int, epoch: int) -> _Drawn:
    """One positive, then at most `num_negatives` of the negatives, none twice, and how to mix them.

    A negative that equals a positive or the query is no negative (mined data has such rows).
    """
    key = np.random.SeedSequence(seed, spawn_key=(epoch, example.index))
    rng = np.random.default_rng(key)
    place = int(rng.integers(len(example.positives)))
    known = {example.query, *example.positives}
    scores = example.negative_scores or (np.nan,) * len(example.negatives)
    scored = dict(zip(reversed(example.negatives), reversed(scores), strict=True))
    groups = example.negative_groups or (None,) * len(example.negatives)
    group_of = dict(zip(reversed(example.negatives), reversed(groups), strict=True))
    negatives = [text for text in dict.fromkeys(example.negatives) if text not in known]
    if len(negatives) > num_negatives:
        chosen: list[int] = rng.permutation(len(negatives))[:num_negatives].tolist()
        negatives = [negatives[i] for i in chosen]
    share = float(rng.beta(_BETA, _BETA))
    pair: list[int] = rng.permutation(len(negatives))[:2].tolist() if len(negatives) > 1 else [0, 0]
    return _Drawn(
        [example.positives[place], *negatives],
        [(example.positive_scores or (np.nan,) * len(example.positives))[place]]
        + [scored[text] for text in negatives],
        [example.group, *(group_of[text] for text in negatives)],
        (pair[0], pair[1]),
        share,
    )


def _group_hash(task: int, group: str | None) -> int:
    # With the task, so that label "1" of one task is not label "1" of another.
    return 0 if group is None else text_hash(f"{task}:{group}")


def _ints(values: Iterable[int]) -> Ints:
    return np.fromiter(values, dtype=np.int64)
