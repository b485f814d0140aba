"""token_budget_batches: every text once, within budget, and no batch wasted."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_min.sampling import token_budget_batches

lengths_lists = st.lists(st.integers(1, 40), max_size=60)
budgets = st.integers(1, 200)


@given(lengths_lists, budgets)
def test_partition_within_budget(lengths, budget):
    """Each text in exactly one batch; only a text longer than the budget exceeds it, alone."""
    batches = token_budget_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch)
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1


@given(lengths_lists, budgets)
def test_longest_first_and_stable(lengths, budget):
    """Texts come in falling length; those of equal length in their own order."""
    order = [int(i) for batch in token_budget_batches(lengths, budget) for i in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: -lengths[i])


@given(lengths_lists, budgets)
def test_as_few_and_as_even_as_the_order_allows(lengths, budget):
    """No cut of the same order has fewer batches, or as few with a smaller fullest batch."""
    batches = token_budget_batches(lengths, budget)
    ordered = sorted(lengths, reverse=True)

    def count(limit):
        """Batches when each is filled to the limit: the fewest there can be."""
        batches, room = 0, 0
        for length in ordered:
            if length > room:
                batches, room = batches + 1, limit
            room -= min(length, room)
        return batches

    assert len(batches) == count(budget)
    totals = [sum(lengths[i] for i in batch) for batch in batches if len(batch) > 1]
    if totals:
        assert count(max(totals) - 1) > len(batches)


def test_no_tiny_last_batch():
    """11 texts in room for 10 are 6 + 5, not 10 + 1."""
    assert [len(batch) for batch in token_budget_batches([10] * 11, 100)] == [6, 5]


def test_too_long_texts_go_alone():
    """A text above the budget is encoded all the same, by itself."""
    batches = token_budget_batches([5, 500, 5, 300], 100)
    assert [batch.tolist() for batch in batches] == [[1], [3], [0, 2]]


def test_nothing():
    """No texts, no batches."""
    assert token_budget_batches([], 10) == []


def test_zero_length_is_our_bug():
    """An empty sequence has no vector to pool; the caller must take it out before."""
    with pytest.raises(AssertionError, match="at least one token"):
        token_budget_batches([3, 0], 10)


def test_many_texts():
    """A hundred thousand texts take well under a second, and the batches are even."""
    lengths = np.random.default_rng(0).integers(1, 513, 100_000)
    batches = token_budget_batches(lengths.tolist(), 16_384)
    totals = [int(lengths[batch].sum()) for batch in batches]
    assert all(b.dtype == np.int64 for b in batches)
    assert max(totals) <= 16_384
    assert min(totals) > 8_192
    assert all(lengths[a].min() >= lengths[b].max() for a, b in pairwise(batches))
