"""Examples -> one training batch of texts, with what the loss must know about each of them.

For each query one of its positives and some of its negatives are drawn by a generator that depends
on (seed, epoch, index of the example) alone: not on the rank, the batch or the data worker. Texts
come with a 64-bit hash, so that the same text in the line of another query, on any rank, is
recognised: it is not a negative.

B queries, N documents. Not here: tokenizing, and turning hashes into masks (training/).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kalm_min.data.dataset import Example
from kalm_min.data.index import Ints
from kalm_min.files import text_hash

_BETA = 2.0  # of the shares of a pair-wise mix, Beta(2, 2): KaLM V2 report, online mixing

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBatch:
    """Texts with their instructions applied; hashes are of the texts without."""

    queries: list[str]
    documents: list[str]
    """For each query its positive, then its negatives."""
    labels: Ints
    """(B,) index of each query's positive among the documents."""
    query_hashes: Ints
    """(B,)"""
    positive_hashes: list[Ints]
    """Per query, of all its positives, drawn or not."""
    document_hashes: Ints
    """(N,)"""
    query_groups: Ints
    """(B,) hash of task and group; 0 is no group."""
    document_groups: Ints
    """(N,) that of the query for a positive; 0 for a negative, unless its group was drawn."""
    document_owner: Ints
    """(N,) the query in whose line the document is."""
    in_batch: npt.NDArray[np.bool_]
    """(B,) False: the candidates of the query are the documents of its line only."""
    mix_pair: Ints
    """(B, 2) indices, among the query's negatives, of the two that losses/mixing.py mixes."""
    mix_share: Floats
    """(B,) share of the first one, from Beta(2, 2)."""
    teacher_scores: Floats
    """(N,) a teacher's score of each document for its owner; nan where the data has none."""


def collate(
    examples: Sequence[Example], *, num_negatives: int, template: str, epoch: int, seed: int
) -> TextBatch:
    """Draw the documents of each example and join them into one batch.

    A negative that equals a positive or the query is not a negative (mined data has such rows), and
    no text is drawn twice for a query.

    Args:
        examples: at least one.
        num_negatives: the maximum per query; a row with fewer negatives is not filled up.
        template: turns an instruction into a prompt by its field {instruction}. An example
            without an instruction has no prompt.
        epoch: positives and negatives are drawn anew in each.
        seed: of the run.
    """
    assert examples, "a batch needs an example"
    queries: list[str] = []
    documents: list[str] = []
    texts: list[str] = []  # the documents without prompt
    labels: list[int] = []
    owner: list[int] = []
    groups: list[int] = []
    scores: list[float] = []
    mix_pair = np.zeros((len(examples), 2), np.int64)
    mix_share = np.zeros(len(examples))
    for number, example in enumerate(examples):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch, example.index)))
        chosen = int(rng.integers(len(example.positives)))
        positive_score = example.positive_scores[chosen] if example.positive_scores else np.nan
        candidates = zip(
            example.negatives,
            example.negative_scores or [np.nan] * len(example.negatives),
            example.negative_groups or [None] * len(example.negatives),
            strict=True,
        )
        excluded = {example.query, *example.positives}
        found: dict[str, tuple[str, float, str | None]] = {}
        for candidate in candidates:
            if candidate[0] not in excluded:
                found.setdefault(candidate[0], candidate)
        negatives = list(found.values())
        if len(negatives) > num_negatives:
            order: list[int] = rng.permutation(len(negatives)).tolist()
            negatives = [negatives[i] for i in order[:num_negatives]]
        mix_share[number] = rng.beta(_BETA, _BETA)
        if len(negatives) > 1:
            mix_pair[number] = rng.permutation(len(negatives))[:2]

        instruction = example.instruction
        prompt = template.format(instruction=instruction) if instruction else ""
        queries.append(prompt + example.query)
        labels.append(len(documents))
        for text, score, group in [
            (example.positives[chosen], positive_score, example.group),
            *negatives,
        ]:
            documents.append(prompt + text if example.symmetric else text)
            texts.append(text)
            owner.append(number)
            scores.append(score)
            # With the task, so that label "1" of one task is not label "1" of another.
            groups.append(0 if group is None else text_hash(f"{example.task}:{group}"))
    document_groups = _ints(groups)
    return TextBatch(
        queries=queries,
        documents=documents,
        labels=_ints(labels),
        query_hashes=_ints(text_hash(example.query) for example in examples),
        positive_hashes=[_ints(map(text_hash, example.positives)) for example in examples],
        document_hashes=_ints(map(text_hash, texts)),
        query_groups=document_groups[labels],
        document_groups=document_groups,
        document_owner=_ints(owner),
        in_batch=np.array([example.in_batch_negatives for example in examples], np.bool_),
        mix_pair=mix_pair,
        mix_share=mix_share,
        teacher_scores=np.array(scores, np.float64),
    )


def _ints(values: Iterable[int]) -> Ints:
    return np.fromiter(values, dtype=np.int64)
