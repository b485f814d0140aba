from unicodedata import normalize

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_min.files import text_key
from kalm_min.mining.rules import INCONSISTENT, KEPT, SHORT, Rules, choose, random_keys

SCORES = np.linspace(0.9, 0.0, 10, dtype=np.float32)[None]  # one row, ten neighbours


def one(rules, *, best=0.95, unlabelled=None, keys=None):
    """The choice for a single row."""
    unlabelled = np.ones((1, 10), bool) if unlabelled is None else np.array([unlabelled], bool)
    keys = np.arange(10, dtype=np.uint64)[None] if keys is None else keys
    best = np.array([best], np.float32)
    return choose(SCORES, unlabelled, np.ones((1, 10), bool), best, keys, rules)


def columns(choice):
    return [column for column in choice.columns[0].tolist() if column >= 0]


def rules(**changes):
    settings = {"rank_range": (1, 10), "num_negatives": 10, "consistency_top_k": None}
    return Rules(**(settings | changes))


def test_rank_range_counts_from_one_both_ends_in():
    """Ranks 3 to 5 are the third, fourth and fifth unlabelled candidate."""
    assert columns(one(rules(rank_range=(3, 5)))) == [2, 3, 4]


def test_known_answers_take_no_rank():
    """A positive, or the query itself, neither is chosen nor pushes unlabelled candidates down."""
    unlabelled = [False, True, False, True, True, True, True, True, True, True]
    assert columns(one(rules(rank_range=(2, 3)), unlabelled=unlabelled)) == [3, 4]


def test_official_rank_is_zero_based_over_everything():
    """The official slice [2:4] takes 0-based ranks 2 and 3, positives counted."""
    unlabelled = [False, True, True, True, True, True, True, True, True, True]
    choice = one(rules(rank_range=(2, 4), official_rank=True), unlabelled=unlabelled)
    assert columns(choice) == [2, 3]


@pytest.mark.parametrize(("ahead", "status"), [(2, KEPT), (3, INCONSISTENT)])
def test_consistency_is_rank_k(ahead, status):
    """With k = 3 a positive with two unlabelled candidates above it has rank 3 and stays; with three it goes."""
    best = (SCORES[0, ahead - 1] + SCORES[0, ahead]) / 2
    assert one(rules(consistency_top_k=3), best=best).status[0] == status


@pytest.mark.parametrize(("ahead", "status"), [(3, KEPT), (4, INCONSISTENT)])
def test_official_consistency_lets_one_more_pass(ahead, status):
    """The official code compares with the score at the 0-based place k."""
    best = (SCORES[0, ahead - 1] + SCORES[0, ahead]) / 2
    official = KEPT if not best < SCORES[0, 3] else INCONSISTENT
    assert one(rules(consistency_top_k=3, official_rank=True), best=best).status[0] == status
    assert official == status


def test_ties_do_not_outrank():
    """An unlabelled candidate with the positive's own score is not above it."""
    assert one(rules(consistency_top_k=1), best=float(SCORES[0, 0])).ahead[0] == 0


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"max_score": 0.5}, [4, 5, 6, 7, 8, 9]),
        ({"min_score": 0.45}, [0, 1, 2, 3, 4]),
        ({"absolute_margin": 0.4}, [4, 5, 6, 7, 8, 9]),
        ({"relative_margin": 0.25}, [2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_margins(setting, expected):
    """Absolute limits and margins below the best positive's score of 0.95."""
    assert columns(one(rules(**setting))) == expected


def test_relative_margin_of_a_negative_score():
    """A share of a negative score still lowers the ceiling."""
    chosen = columns(one(rules(relative_margin=0.5), best=-0.01))
    assert chosen == []


def test_top_takes_the_highest_and_random_the_lowest_keys():
    """Chosen ones come out in the order of their scores either way."""
    keys = np.array([[9, 0, 8, 1, 7, 2, 6, 3, 5, 4]], np.uint64) * np.uint64(1 << 40)
    assert columns(one(rules(num_negatives=3, choice="top"), keys=keys)) == [0, 1, 2]
    assert columns(one(rules(num_negatives=3), keys=keys)) == [1, 3, 5]


def test_short_rows():
    """A row with fewer candidates than asked for stays with fewer, or goes; never is it filled up."""
    few = {"rank_range": (9, 10), "num_negatives": 3}
    kept = one(rules(**few))
    assert columns(kept) == [8, 9]
    assert kept.status[0] == KEPT
    assert one(rules(**few, short_rows="drop")).status[0] == SHORT


def test_random_keys_depend_on_the_pair_alone():
    """The same query and candidate have the same key in any row, block or company."""
    queries, candidates = np.arange(5) * 7919, np.arange(40).reshape(5, 8) * 104729
    keys = random_keys(queries, candidates, 3)
    np.testing.assert_array_equal(
        random_keys(queries[2:3], candidates[2:3, ::-1], 3)[0, ::-1], keys[2]
    )
    assert len(np.unique(keys)) == keys.size
    assert (keys != random_keys(queries, candidates, 4)).all()


def test_random_choice_is_even():
    """Over many rows every place of the range is chosen about equally often."""
    rows, width = 4000, 20
    queries = np.random.default_rng(0).integers(-(2**62), 2**62, rows)
    candidates = np.broadcast_to(np.arange(width) * 15485863, (rows, width))
    scores = np.broadcast_to(np.linspace(0.9, 0, width, dtype=np.float32), (rows, width))
    every = np.ones((rows, width), bool)
    keys = random_keys(queries, candidates, 0)
    settings = rules(rank_range=(1, width), num_negatives=5)
    found = choose(scores, every, every, np.ones(rows, np.float32), keys, settings).columns
    counts = np.bincount(found.ravel(), minlength=width)
    assert abs(counts - rows * 5 / width).max() < 5 * (rows * 0.25 * 0.75) ** 0.5


@given(st.text("aßΐﬁÅＣé猫 \u3000\t", min_size=1, max_size=9))
def test_a_key_ignores_case_white_space_and_width(text):
    """A duplicate of an answer is recognised however it is written; another word is another text."""
    for other in (
        text.upper(),
        text.lower(),
        text.swapcase(),
        f" {text}\n",
        text.replace(" ", "\t "),
    ):
        assert text_key(other) == text_key(text)
    assert text_key(normalize("NFKD", text)) == text_key(text)
    assert text_key(text + "x") != text_key(text)


@given(st.data())
def test_choice_keeps_its_promises(data):
    """Only unlabelled candidates of the range within the limits, none twice, as many as there are up to n."""
    width = data.draw(st.integers(1, 30))
    unlabelled = np.array([data.draw(st.lists(st.booleans(), min_size=width, max_size=width))])
    first = data.draw(st.integers(0, 20))
    settings = Rules(
        rank_range=(first, data.draw(st.integers(max(first, 1), 40))),
        num_negatives=data.draw(st.integers(0, 12)),
        max_score=data.draw(st.none() | st.floats(0, 1)),
        official_rank=data.draw(st.booleans()),
    )
    scores = np.sort(np.random.default_rng(0).random((1, width), np.float32))[:, ::-1]
    keys = random_keys(np.array([1]), np.arange(width)[None], data.draw(st.integers(0, 9)))
    best = np.ones(1, np.float32)
    listed = np.ones_like(unlabelled)
    found = columns(choose(scores, unlabelled, listed, best, keys, settings))
    ranks = np.cumsum(listed if settings.official_rank else unlabelled) - settings.official_rank
    low, high = settings.rank_range
    fits = [
        j
        for j in range(width)
        if unlabelled[0, j]
        and low <= ranks[j] <= high - settings.official_rank
        and (settings.max_score is None or scores[0, j] <= np.float32(settings.max_score))
    ]
    assert found == sorted(set(found))
    assert set(found) <= set(fits)
    assert len(found) == min(settings.num_negatives, len(fits))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank_range": (9, 3)},
        {"rank_range": (0, 0)},
        {"num_negatives": -1},
        {"consistency_top_k": 0},
    ],
)
def test_impossible_rules_are_refused(wrong):
    """Contradictions are found before anything is read."""
    with pytest.raises(ValueError, match="expected"):
        Rules(**wrong)
