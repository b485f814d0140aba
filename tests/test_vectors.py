"""Vectors on disk: shards named by content, cut so that a changed corpus keeps most of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_min import Embedder, topk, vectors
from kalm_min.vectors import StoredVectors, TextSet

TEXTS = [f"text number {i}" for i in range(6000)]


def text_set(texts, prompt=""):
    return TextSet.of(lambda start, stop: texts[start:stop], len(texts), prompt)


def stored(texts, prompt="", folder=None):
    return StoredVectors(folder, text_set(texts, prompt), 8)


def names(texts, prompt=""):
    return stored(texts, prompt).names


@pytest.fixture(scope="module")
def embedder(tiny_model_dir):
    return Embedder.from_pretrained(tiny_model_dir, device="cpu", dtype="float32")


class Encoder:
    """A stand-in for an embedder: random vectors that depend only on the text and its prompt."""

    dtype = "float16"

    def __init__(self, value=None):
        self.value, self.encoded = value, []

    def encode(self, texts, prompt):
        self.encoded += texts
        seeds = [abs(vectors.text_hash(prompt + text)) for text in texts]
        rows = np.stack([np.random.default_rng(seed).standard_normal(8) for seed in seeds])
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows.astype(np.float32) if self.value is None else np.full_like(rows, self.value)


def encoded(texts, folder=None, prompt="", encoder=None):
    """The vectors of some texts, missing ones encoded."""
    found = stored(texts, prompt, folder)
    for shard in found.missing():
        found.encode(shard, encoder or Encoder())
    return found


def test_shards_cover_all_texts_in_order():
    cuts = stored(TEXTS).cuts
    assert cuts[0] == 0
    assert cuts[-1] == 6000
    assert (np.diff(cuts) > 0).all()
    assert len(cuts) > 3
    assert names([]) == []


def test_a_text_more_changes_the_shard_it_is_in():
    """Promise: another corpus with nearly the same texts has nearly the same shards."""
    before, after = names(TEXTS), names([*TEXTS[:3000], "new", *TEXTS[3000:]])
    assert len(set(before) & set(after)) == len(before) - 1
    assert not set(before) & set(names(TEXTS, "a prompt"))
    assert names(TEXTS[::-1]) != before[::-1]


def test_no_shard_is_larger_than_a_kill_may_cost():
    assert np.diff(stored(["long " * 60_000] * 10).cuts).tolist() == [3, 3, 3, 1]


@pytest.mark.parametrize("on_disk", [True, False])
def test_rows_by_slice_and_by_number(tmp_path, on_disk):
    """Rows come in the requested order, from disk or memory, and each text is encoded once."""
    encoder = Encoder()
    found = encoded(TEXTS, tmp_path if on_disk else None, encoder=encoder)
    assert encoder.encoded == TEXTS
    expected = topk.on_grid(Encoder().encode(TEXTS, ""))
    np.testing.assert_array_equal(found[:], expected)
    numbers = np.random.default_rng(0).integers(0, 6000, 500)
    np.testing.assert_array_equal(found[numbers], expected[numbers])
    np.testing.assert_array_equal(found[1000:1010], expected[1000:1010])
    again = stored(TEXTS, folder=tmp_path if on_disk else None)
    assert bool(again.missing()) is not on_disk


def test_each_text_has_its_prompt(embedder, tmp_path):
    """Texts of one set may have different prompts; each is encoded after its own."""
    texts = ["the cat", "a dog", "one house"]
    both = TextSet(
        hashes=np.array([vectors.text_hash(text) for text in texts]),
        sizes=np.array([len(text) for text in texts]),
        prompts=("find: ", "see: "),
        prompt_ids=np.array([0, 1, 0]),
        read=lambda start, stop: texts[start:stop],
    )
    found = StoredVectors(tmp_path, both, embedder.dimension)
    found.encode(0, embedder)
    expected = embedder.encode(["find: the cat", "see: a dog", "find: one house"])
    np.testing.assert_allclose(found[:], expected, atol=2e-6)


def test_cut_vectors_have_unit_length():
    """Matryoshka: leading coordinates of the same vectors, scaled; a zero vector stays zero."""
    full = encoded(["a", "b", "c"])
    cut = vectors.cut_dimension(full[:], 3)
    leading = full[:][:, :3]
    expected = leading / np.linalg.norm(leading, axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=1e-7)
    np.testing.assert_array_equal(cut, topk.on_grid(cut))
    assert full[:].shape == (3, 8)
    assert (vectors.cut_dimension(encoded(["a"], encoder=Encoder(0.0))[:], 3) == 0).all()


def test_damaged_shards_are_encoded_again(tmp_path):
    """A file of another shape, or none at all, is missing; reading it says what is wrong."""
    texts = TEXTS[:10]
    found = encoded(texts, tmp_path)
    (path,) = tmp_path.glob("shards/*.npy")
    whole = path.read_bytes()
    for damage in (b"", whole[:100], whole[:-1]):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"\.npy: expected \(10, 8\) float32, found"):
            found[:]
        assert found.missing() == [0]
        encoded(texts, tmp_path)
        assert path.read_bytes() == whole
    path.unlink()
    assert found.missing() == [0]


@given(st.integers(0), st.integers(1, 255))
def test_a_changed_byte_is_noticed(tmp_path_factory, place, change):
    """Whatever byte of a shard the disk or somebody changes, it is encoded again."""
    folder = tmp_path_factory.mktemp("changed")
    found = encoded(TEXTS[:10], folder)
    (path,) = folder.glob("shards/*.npy")
    whole = bytearray(path.read_bytes())
    np.testing.assert_array_equal(np.load(path), found[:])  # any other program reads it, too
    whole[place % len(whole)] ^= change
    path.write_bytes(whole)
    assert found.missing() == [0]


def test_vectors_of_nobody_are_refused(tmp_path, embedder):
    """Shards without the manifest that was written before them may be of any model."""
    encoded(TEXTS[:10], tmp_path)
    with pytest.raises(ValueError, match=r"manifest.json: expected .* found nothing; delete"):
        vectors.check_manifest(tmp_path, vectors.describe(embedder, "0" * 64))


def test_full_disk(tmp_path, monkeypatch, capsys):
    """Vectors that cannot be written are an error, or stay in memory, as the caller wants it."""

    def full(path, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vectors, "write_array", full)
    found = stored(["a"], folder=tmp_path)
    with pytest.raises(OSError, match="No space left"):
        found.encode(0, Encoder())
    found.encode(0, Encoder(), needs_disk=False)
    assert "was not kept" in capsys.readouterr().err
    np.testing.assert_array_equal(found[:], encoded(["a"])[:])


def test_another_models_folder_is_refused(tmp_path, embedder):
    """The manifest says whose vectors these are; the sentence says what differs."""
    manifest = vectors.describe(embedder, "0" * 64)
    vectors.check_manifest(tmp_path, manifest)
    vectors.check_manifest(tmp_path, manifest)
    with pytest.raises(
        ValueError, match=r"another model \(max_length was \d+, is 7\); give another --store"
    ):
        vectors.check_manifest(tmp_path, manifest | {"max_length": 7})
    for damaged in ("[]", "{", "[" * 100_000):
        (tmp_path / "manifest.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(ValueError, match=r"manifest\.json.*: expected"):
            vectors.check_manifest(tmp_path, manifest)
    vectors.check_manifest(tmp_path / "new", manifest, begin=False)
    assert not (tmp_path / "new").exists()
