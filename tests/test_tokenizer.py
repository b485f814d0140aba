"""Text to ids by the rules of a checkpoint."""

import json
import shutil
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from kalm_min import Embedder
from kalm_min.tokenizer import Tokenizer, check_texts, prefetch


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def test_ids_are_those_of_transformers(folder):
    """Prompt joined as text, truncation that counts it, foreign scripts, the empty text."""
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    texts = ["the cat sat", "", "你好 🐦 naïve", "dog " * 100, "<|endoftext|> inside"]
    for prompt in ("", "Instruct: see \n Query: "):
        found = ours.encode(texts, prompt, max_length=20)
        expected = [theirs(prompt + t, truncation=True, max_length=20)["input_ids"] for t in texts]
        assert found == expected


def test_a_vocabulary_may_have_holes(folder):
    """The highest id decides whether it fits a table, not the number of entries."""
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["unheard of"] = 5 * len(vocabulary)
    path.write_text(json.dumps(state))
    assert Tokenizer.from_folder(folder).vocab_size == vocabulary["unheard of"] + 1
    with pytest.raises(ValueError, match="not of one checkpoint"):
        Embedder.from_pretrained(folder, dtype="float32")


def test_ids_of_the_post_processor_count(folder):
    """A token that closes every text and is in no vocabulary: refused when the model is opened."""
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    fast.post_processor = TemplateProcessing("$A <t>", special_tokens=[("<t>", 320)])
    fast.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="the tokenizer has 321 ids and the embedding table 320"):
        Embedder.from_pretrained(folder, dtype="float32")


def test_a_file_that_closes_texts_is_not_closed_twice(folder, tmp_path):
    """add_eos_token with a post-processor that already appends the token: one token."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"add_eos_token": True}))
    once = Tokenizer.from_folder(folder)
    assert once.encode(["a"], max_length=9)[0][-1] == 0
    once.save(tmp_path, max_length=9)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(saved | {"add_eos_token": True}))
    twice = Tokenizer.from_folder(tmp_path)
    assert twice.encode(["a"], max_length=9) == once.encode(["a"], max_length=9)
    path.write_text(json.dumps(settings | {"add_eos_token": True, "eos_token": "<nope>"}))
    with pytest.raises(ValueError, match="eos_token '<nope>' is not a known token"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("template", ["$A", "$A <e>", "<b> $A", "<b> $A <e> <e>"])
@given(st.lists(st.text(max_size=9), max_size=4), st.integers(4, 12))
def test_texts_are_cut_as_the_library_cuts(tiny_model_dir, template, texts, length):
    """What opens and closes every text is kept; the tokenizer that was given keeps no length."""
    fast = FastTokenizer.from_file(str(tiny_model_dir / "tokenizer.json"))
    special = [("<b>", fast.token_to_id("a")), ("<e>", 0)]
    fast.post_processor = TemplateProcessing(template, special_tokens=special)
    ours = Tokenizer(FastTokenizer.from_str(fast.to_str()))
    before = ours._fast.to_str()
    found = ours.encode(texts, "the ", max_length=length)
    fast.enable_truncation(length)
    assert found == [one.ids for one in fast.encode_batch(["the " + text for text in texts])]
    assert ours._fast.to_str() == before


def test_what_is_missing_or_damaged_is_named(folder, monkeypatch):
    """No tokenizer.json; one that is not JSON; remote code is dropped, never run."""
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizers file"):
        Tokenizer.from_folder(folder)
    for found in ("[]", "{}", "[" * 100_000, '{"model": ' + "9" * 5000 + "}"):
        (folder / "tokenizer.json").write_text(found)
        with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizers file"):
            Tokenizer.from_folder(folder)

    class PanicException(BaseException):
        """What the library raises when its Rust code panics."""

    monkeypatch.setattr(FastTokenizer, "from_file", Mock(side_effect=PanicException("index 9")))
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: expected a tokenizers file, .* index 9"
    ):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"expected tokenizer\.json, found none"):
        Tokenizer.from_folder(folder)


def test_texts_are_checked_by_position():
    """The first bad one is named by its position."""
    check_texts(["fine", "", "🐦"])
    with pytest.raises(ValueError, match=r"texts\[2\]: expected a string, found int"):
        check_texts(["a", "b", 3])


def test_prefetching_keeps_the_order_and_its_bound():
    """Results in order, at most `ahead` items taken in advance, an error at its item's turn."""
    taken = []

    def items():
        for i in range(1, 6):
            taken.append(i)
            yield i

    results = prefetch(lambda i: 12 // (4 - i), items(), ahead=2)
    assert next(results) == 4
    assert taken == [1, 2, 3]
    assert [next(results), next(results)] == [6, 12]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(prefetch(str, [])) == []
