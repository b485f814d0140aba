"""collate: what is drawn, from what it depends, and what travels with the texts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_min.data import Example, collate
from kalm_min.files import text_hash

TEMPLATE = "Instruct: {instruction} \n Query: "

words = st.sampled_from([f"w{i}" for i in range(12)])


@st.composite
def rows(draw):
    """Examples as mined data has them: repeated texts, negatives that are no negatives."""
    examples = st.builds(
        Example,
        query=words,
        positives=st.lists(words, min_size=1, max_size=3).map(tuple),
        negatives=st.lists(words, max_size=8).map(tuple),
        task=st.integers(0, 2),
        index=st.integers(0, 10**9),
        instruction=st.sampled_from([None, "", "find"]),
        group=st.sampled_from([None, "1", "2"]),
        symmetric=st.booleans(),
        in_batch_negatives=st.booleans(),
    )
    return draw(st.lists(examples, min_size=1, max_size=5))


def batch_of(examples, num_negatives=3, epoch=0, seed=0):
    return collate(examples, num_negatives=num_negatives, template=TEMPLATE, epoch=epoch, seed=seed)


def example(**changes) -> Example:
    values = {"query": "q", "positives": ("p",), "negatives": (), "task": 0, "index": 0}
    return Example(**{**values, **changes})


def hashes(texts) -> list[int]:
    return [text_hash(text) for text in texts]


@given(rows(), st.integers(0, 9))
def test_documents_of_a_query_are_its_positive_then_its_negatives(examples, num_negatives):
    """Documents are grouped by query; negatives are real ones, distinct, as many as requested."""
    batch = batch_of(examples, num_negatives)
    assert batch.document_owner.tolist() == sorted(batch.document_owner)
    assert set(batch.document_owner) == set(range(len(examples)))
    for i, row in enumerate(examples):
        mine = np.flatnonzero(batch.document_owner == i)
        assert batch.labels[i] == mine[0]
        prompt = "Instruct: find \n Query: " if row.instruction and row.symmetric else ""
        texts = [batch.documents[j].removeprefix(prompt) for j in mine]
        assert [prompt + text for text in texts] == [batch.documents[j] for j in mine]
        assert texts[0] in row.positives
        allowed = set(row.negatives) - {row.query, *row.positives}
        assert set(texts[1:]) <= allowed
        assert len(texts) - 1 == len(set(texts[1:])) == min(num_negatives, len(allowed))
        assert batch.document_hashes[mine].tolist() == hashes(texts)


@given(rows())
def test_what_travels_with_the_texts(examples):
    """Hashes are of the text without instruction; groups of different tasks differ; 0 is none."""
    batch = batch_of(examples)
    assert batch.query_hashes.tolist() == hashes(row.query for row in examples)
    for row, known in zip(examples, batch.positive_hashes, strict=True):
        assert known.tolist() == hashes(row.positives)
    assert batch.in_batch.tolist() == [row.in_batch_negatives for row in examples]
    groups = [None if row.group is None else (row.task, row.group) for row in examples]
    for i, one in enumerate(groups):
        assert (batch.query_groups[i] == 0) == (one is None)
        for j, other in enumerate(groups):
            same = batch.query_groups[i] == batch.query_groups[j]
            assert same == (one == other)
    expected = np.zeros(len(batch.documents), np.int64)
    expected[batch.labels] = batch.query_groups
    assert batch.document_groups.tolist() == expected.tolist()
    for name in ("labels", "query_hashes", "document_hashes", "query_groups", "document_owner"):
        assert getattr(batch, name).dtype == np.int64


@given(rows(), st.integers(0, 3), st.integers(0, 3))
def test_the_draw_does_not_know_its_batch(examples, epoch, seed):
    """An example has the same documents alone, in another batch, and on another rank."""
    batch = batch_of(examples, 2, epoch, seed)
    for i, row in enumerate(examples):
        alone = batch_of([row], 2, epoch, seed)
        mine = np.flatnonzero(batch.document_owner == i)
        assert alone.documents == [batch.documents[j] for j in mine]
        assert alone.queries == [batch.queries[i]]


def test_the_draw_differs_by_epoch_seed_and_example():
    """Over epochs, seeds and examples, every positive and every negative gets its turn."""
    row = {"positives": ("a", "b", "c"), "negatives": tuple("rstuvwxyz")}
    for key in ("epoch", "seed", "index"):
        drawn = set()
        for n in range(60):
            keys = {"epoch": 0, "seed": 0, key: n}
            index = keys.pop("index", 0)
            drawn.update(batch_of([example(**row, index=index)], 2, **keys).documents)
        assert drawn == {*row["positives"], *row["negatives"]}


def test_negatives_are_drawn_uniformly():
    """No position in the list is preferred."""
    row = example(negatives=tuple("abcde"))
    counts = dict.fromkeys("abcde", 0)
    for epoch in range(2000):
        for text in batch_of([row], 2, epoch).documents[1:]:
            counts[text] += 1
    assert abs(np.array(list(counts.values())) - 800).max() < 5 * np.sqrt(2000 * 0.4 * 0.6)


def test_instruction_template():
    """The report's form, a space on both sides of the line break; documents only if symmetric."""
    given_one = {"instruction": "Find {it}", "negatives": ("n",)}
    batch = batch_of([example(**given_one), example(**given_one, symmetric=True), example()])
    prompt = "Instruct: Find {it} \n Query: "
    assert batch.queries == [prompt + "q", prompt + "q", "q"]
    assert batch.documents == ["p", "n", prompt + "p", prompt + "n", "p"]


def test_a_row_without_negatives():
    """Public pre-training data has none (the official code divides by zero)."""
    batch = batch_of([example(), example(negatives=("q", "p"), index=1)], 7)
    assert batch.documents == ["p", "p"]
    assert batch.labels.tolist() == [0, 1]


def test_no_examples_is_our_bug():
    """The sampler yields no empty batch."""
    with pytest.raises(AssertionError):
        batch_of([])
