"""Shards: named by what they hold, cut so that a changed corpus keeps most of them."""

import numpy as np
import pytest

from kalm_min import shards

TEXTS = [f"text number {i}" for i in range(6000)]


def names(texts, prompt=""):
    return [name for _, name in shards.split(texts, prompt)]


def test_shards_cover_all_texts_in_order():
    places = [place for place, _ in shards.split(TEXTS, "")]
    assert [i for place in places for i in range(place.start, place.stop)] == list(range(6000))
    assert len(places) > 2
    assert list(shards.split([], "")) == []


def test_a_text_more_changes_the_shard_it_is_in():
    """Promise: another corpus with nearly the same texts has nearly the same shards."""
    before, after = names(TEXTS), names([*TEXTS[:3000], "new", *TEXTS[3000:]])
    assert len(set(before) & set(after)) == len(before) - 1
    assert not set(before) & set(names(TEXTS, "a prompt"))
    assert names(TEXTS[::-1]) != before[::-1]


def test_no_shard_is_larger_than_a_kill_may_cost():
    places = [place for place, _ in shards.split(["long " * 60_000] * 10, "")]
    assert [place.stop - place.start for place in places] == [3, 3, 3, 1]


def test_what_is_read_is_what_was_written(tmp_path):
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    shards.write(tmp_path / "a.npy", vectors)
    assert (shards.read(tmp_path / "a.npy", (4, 3)) == vectors).all()
    with pytest.raises(ValueError, match=r"a.npy: expected \(5, 3\) float32, found \(4, 3\)"):
        shards.read(tmp_path / "a.npy", (5, 3))
    (tmp_path / "b.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b.npy"):
        shards.read(tmp_path / "b.npy", (4, 3))
