"""The Embedder: vectors independent of other texts, and folders that other libraries open."""

import json
import shutil
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from kalm_min import Embedder
from kalm_min.embedder import pick_device
from kalm_min.model import quantize
from kalm_min.settings import Precision, Similarity

TEXTS = [
    "the cat sat on a mat",
    "a dog",
    "",
    "blue birds 🐦 far from its house " * 9,
    "你好世界",
    "the cat sat on a mat",
    "x",
]
SAME = 0.99999


@pytest.fixture(scope="module")
def tiny(tiny_model_dir):
    return Embedder.from_pretrained(tiny_model_dir, dtype="float32")


def cosine(a, b):
    """Row-wise cosine; two zero vectors agree."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.where(
        norms == 0, np.linalg.norm(a - b, axis=1) == 0, (a * b).sum(1) / (norms + 1e-30)
    )


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_saved_folder_gives_the_same_vectors_in_sentence_transformers(
    make_model, tmp_path, causal, pooling
):
    """Every text, truncated and foreign ones too: cosine >= 0.99999 against sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    ours = make_model(tmp_path / "model", causal=causal, pooling=pooling)
    texts = [text for text in TEXTS if text]
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert theirs.max_seq_length == 32
    assert (cosine(ours.encode(texts), theirs.encode(texts)) >= SAME).all()
    prompt = "Instruct: find \n Query: "
    assert (cosine(ours.encode(texts, prompt), theirs.encode(texts, prompt=prompt)) >= SAME).all()
    short = theirs.encode(texts, truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose(ours.encode(texts, truncate_dim=8), short, atol=1e-5)


def test_save_then_load_changes_nothing(make_model, tmp_path):
    """Attention mode, pooling, prompts, template and length survive a round trip, bit for bit."""
    first = make_model(tmp_path / "a", causal=False, pooling="lasttoken", max_length=11)
    first.prompts["query"] = "Q: "
    first.instruction_template = "{instruction}\n"
    first.save_pretrained(tmp_path / "b")
    second = Embedder.from_pretrained(tmp_path / "b", dtype="float32")
    for name in ("causal", "pooling", "max_length", "prompts", "instruction_template"):
        assert getattr(first, name) == getattr(second, name)
    assert np.array_equal(first.encode_query(TEXTS), second.encode_query(TEXTS))


@given(st.lists(st.sampled_from(TEXTS), max_size=12), st.integers(1, 64))
def test_company_and_budget_do_not_matter(tiny, texts, budget):
    """fp32: a text's vector is the same alone and among others, in any order, at any token budget."""
    tiny.tokens_per_batch = budget
    together = tiny.encode(texts)
    tiny.tokens_per_batch = 2048
    assert together.shape == (len(texts), tiny.dimension)
    for text, vector in zip(texts, together, strict=True):
        assert np.abs(vector - tiny.encode(text)).max() <= 1e-6


PROMPTS = ["the cat sat on a mat: ", "the cat sat on a", "query:", "the ", " \n Query: "]


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
@pytest.mark.parametrize("closing", [False, True], ids=["", "closed"])
@given(
    texts=st.lists(st.sampled_from([*TEXTS, " mat", "t", ": x", "\n"]), max_size=9),
    prompt=st.sampled_from(PROMPTS),
    max_length=st.integers(1, 32),
)
def test_a_shared_prompt_is_invisible(
    make_model, tmp_path_factory, pooling, closing, texts, prompt, max_length
):
    """fp32: under a prompt a text's vector is that of prompt and text joined by hand, whatever
    its tokens do at the seam and wherever it is cut; and it does not depend on other texts."""
    folder = tmp_path_factory.getbasetemp() / f"prompted-{pooling}-{closing}"
    if not folder.exists():
        make_model(folder, pooling=pooling)
        edit(folder, "tokenizer_config.json", add_eos_token=closing)
    model = Embedder.from_pretrained(folder, dtype="float32", max_length=max_length)
    found = model.encode(texts, prompt)
    joined = model.encode([prompt + text for text in texts])
    np.testing.assert_allclose(found, joined, atol=1e-6)
    for text, vector in zip(texts, found, strict=True):
        assert np.abs(model.encode(text, prompt) - vector).max() <= 1e-6


@pytest.mark.parametrize("causal", [True, False])
def test_a_shared_prompt_is_read_once(make_model, tmp_path, monkeypatch, causal):
    """Tokens that reach a causal decoder: the prompt's once, then each text's own. A text that
    takes another path to its tokens, and a bidirectional model, read all of theirs."""
    model = make_model(tmp_path / "model", causal=causal)
    seen, forward = [], model.model.forward

    def counted(packed, *, causal):
        seen.append(len(packed.input_ids))
        return forward(packed, causal=causal)

    monkeypatch.setattr(model.model, "forward", counted)
    prompt, texts = "the cat sat on a mat:", [" dog", " house", " bird", " far"]
    whole = [len(ids) for ids in model.tokenizer.encode(texts, prompt, max_length=32)]
    length = len(model.tokenizer.encode([prompt], max_length=32)[0])
    model.encode(texts, prompt)
    assert seen == [sum(whole) - (3 * length if causal else 0)]


def test_edges_of_input(tiny):
    """One text gives (d,); none gives (0, d); an empty one gives zeros; bad ones are named."""
    assert tiny.encode("a").shape == (tiny.dimension,)
    assert tiny.encode([]).shape == (0, tiny.dimension)
    assert not tiny.encode("").any()
    assert tiny.encode("", prompt="a").any()
    assert np.linalg.norm(tiny.encode("a " * 100_000)) == pytest.approx(1.0, abs=1e-6)
    assert np.linalg.norm(tiny.encode("a", normalize_embeddings=False)) != pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"texts\[1\]: .* a string with half a surrogate pair"):
        tiny.encode(["fine", "ab\ud800"], prompt="Q: ")
    with pytest.raises(ValueError, match=r"texts\[0\]: expected a string, found NoneType"):
        tiny.encode([None])
    with pytest.raises(ValueError, match="truncate_dim: expected 1 to 32, found 33"):
        tiny.encode(["a"], truncate_dim=33)


def test_a_vector_that_is_not_finite_is_refused(make_model, tmp_path):
    """NaN, infinity or a length beyond float32: one sentence that names the text and what to try."""
    model = make_model(tmp_path / "model")
    weights = {"x": model.model.embed_tokens.weight, "": model.model.norm.weight}
    row = model.tokenizer.encode(["x"], max_length=9)[0][0]
    with torch.no_grad():
        weights["x"][row] = torch.nan
        sentence = "the model gives this text a vector with NaN or infinity in torch.float32; try"
        with pytest.raises(ValueError, match=f"'x': {sentence}"):
            model.encode(["the cat", "a dog", "x"])
        for value in (torch.inf, 1e30):  # the second one's length is beyond float32
            weights[""].fill_(value)
            with pytest.raises(ValueError, match=f"'the cat': {sentence}"):
                model.encode(["the cat"])
    model.model.half()
    with pytest.raises(ValueError, match=r"in torch\.float16; try dtype float32, or check"):
        model.encode("x")


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda", "cuda:99", "xpu", "meta", "cpu:x", "tpu"])
def test_a_device_that_is_not_here(tiny_model_dir, name):
    """Unknown names, absent devices and ones that hold no values: one sentence with what is here."""
    if name != "cuda" or not torch.cuda.is_available():
        with pytest.raises(ValueError, match=rf"^device: expected cpu.*, found '{name}'$"):
            Embedder.from_pretrained(tiny_model_dir, device=name)
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")


def test_truncation_renormalises(tiny):
    """A Matryoshka slice is scaled to unit length again."""
    full = tiny.encode(["the cat"], normalize_embeddings=False)[0, :8]
    np.testing.assert_allclose(
        tiny.encode(["the cat"], truncate_dim=8)[0], full / np.linalg.norm(full), atol=1e-6
    )


def test_similarity_is_the_cosine(tiny):
    """Lengths do not matter: 1 on the diagonal for scaled copies."""
    vectors = tiny.encode(["the cat", "a dog"])
    table = tiny.similarity(vectors, vectors * 3)
    assert table.shape == (2, 2)
    np.testing.assert_allclose(np.diag(table), 1, atol=1e-6)


def test_out_of_memory_halves_the_batch(tiny, monkeypatch):
    """A device without memory for a batch gets half of it, and no text is lost."""
    expected = tiny.encode(TEXTS)
    forward, sizes = tiny.model.forward, []

    def small_device(packed, *, causal):
        if len(packed.cu_seqlens) > 3:
            raise torch.OutOfMemoryError
        sizes.append(len(packed.cu_seqlens) - 1)
        return forward(packed, causal=causal)

    monkeypatch.setattr(tiny.model, "forward", small_device)
    np.testing.assert_allclose(tiny.encode(TEXTS), expected, atol=1e-6)
    assert max(sizes) <= 2
    assert tiny.tokens_per_batch < 2048
    tiny.tokens_per_batch = 2048


def edit(folder, name, **changes):
    """Change keys of a JSON file; None deletes."""
    path = folder / name
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def load(folder, **options):
    return Embedder.from_pretrained(folder, dtype="float32", **options)


def test_new_style_pooling_file(folder):
    """`pooling_mode` as sentence-transformers 5.3 and later write it."""
    path = folder / "1_Pooling" / "config.json"
    for mode in ("lasttoken", ["lasttoken"]):
        path.write_text(json.dumps({"embedding_dimension": 32, "pooling_mode": mode}))
        assert load(folder).pooling == "lasttoken"
    path.write_text(json.dumps({"pooling_mode": ["mean", "cls"]}))
    with pytest.raises(ValueError, match="expected pooling mean or lasttoken, found mean, cls"):
        load(folder)
    path.write_text(json.dumps({"pooling_mode": "mean", "include_prompt": False}))
    with pytest.raises(ValueError, match="include_prompt"):
        load(folder)


def test_modules_that_would_be_skipped_are_refused(folder):
    """A Dense layer after the last module would silently be missing from the vectors."""
    modules = json.loads((folder / "modules.json").read_text())
    modules.append(
        {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    )
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="Dense is not built"):
        load(folder)


def test_attention_mode_is_never_guessed(folder):
    """Remote code without is_causal: the caller must say; the argument wins over the file."""
    edit(folder, "config.json", is_causal=None)
    assert load(folder).causal is True
    edit(folder, "config.json", auto_map={"AutoModel": "someone/model--custom.Model"})
    with pytest.raises(ValueError, match=r"remote code custom\.Model .* pass causal=True or"):
        load(folder)
    assert load(folder, causal=False).causal is False
    edit(folder, "config.json", is_causal=False)
    assert load(folder).causal is False
    assert load(folder, causal=True).causal is True


def test_maximum_length_stays_within_the_positions(folder):
    """sentence-transformers' file wins; else the smaller of tokenizer's and model's limit."""
    assert load(folder).max_length == 32
    (folder / "sentence_bert_config.json").unlink()
    for stated, expected in ((17, 17), (131_072, 512), (10**30, 512), (None, 512)):
        edit(folder, "tokenizer_config.json", model_max_length=stated)
        assert load(folder).max_length == expected


def test_end_of_text_rule_is_kept_for_others(folder, tmp_path):
    """add_eos_token (gte-Qwen2) closes every text here, and in transformers after a save."""
    from transformers import AutoTokenizer

    edit(folder, "tokenizer_config.json", add_eos_token=True)
    ours = load(folder)
    end = 0
    ids = ours.tokenizer.encode(["the cat", "the cat " * 50, ""], max_length=6)
    assert [s[-1] for s in ids] == [end, end, end]
    assert [len(s) for s in ids][1:] == [6, 1]
    ours.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.tokenizer.encode(["the cat"], max_length=6) == ids[:1]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs("the cat")["input_ids"] == ids[0]


def test_what_a_wrong_path_says(tmp_path):
    """A path is never looked up on the hub; an empty folder says what is missing; a run's folder
    says where its model is."""
    with pytest.raises(ValueError, match="expected a model folder or a hub id"):
        Embedder.from_pretrained("./nowhere")
    with pytest.raises(ValueError, match=r"expected a model folder with config\.json"):
        Embedder.from_pretrained(tmp_path)
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"found none \(did you mean {tmp_path}/final\?\)"):
        Embedder.from_pretrained(tmp_path)


def test_saving_over_a_folder_keeps_what_is_not_ours(folder):
    """save_pretrained into an existing folder replaces its own files and deletes nothing."""
    (folder / "notes.txt").write_text("mine")
    load(folder).save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert load(folder).encode("a").any()
    assert not list(folder.parent.glob(".model*"))


FEW = st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4)
COLLECTIONS = {
    "tuple": tuple,
    "generator": iter,
    "map": lambda texts: map(str, texts),
    "deque": deque,
    "keys": lambda texts: dict(zip(texts, texts, strict=True)).keys(),
    "values": lambda texts: dict(enumerate(texts)).values(),
    "array": np.array,
    "array of objects": lambda texts: np.array(texts, dtype=object),
    "Series": lambda texts: pytest.importorskip("pandas").Series(texts),
    "Arrow array": lambda texts: pytest.importorskip("pyarrow").array(texts),
    "Arrow column": lambda texts: pytest.importorskip("pyarrow").chunked_array([texts]),
    "column": lambda texts: pytest.importorskip("datasets").Dataset.from_dict({"a": texts})["a"],
}


@pytest.mark.parametrize("make", COLLECTIONS.values(), ids=COLLECTIONS)
def test_any_ordered_collection_is_a_list_of_texts(tiny, make):
    """What gives strings in an order, once or often, gives the rows of the list of them."""
    texts = list(dict.fromkeys(TEXTS))
    assert np.array_equal(tiny.encode(make(texts)), tiny.encode(texts))


@pytest.mark.parametrize(
    "make",
    [
        *(set, frozenset, dict.fromkeys, lambda texts: texts[0].encode(), lambda texts: None, len),
        lambda texts: np.array([texts]),
        lambda texts: np.array(texts[0]),
        lambda texts: pytest.importorskip("pandas").DataFrame({"text": texts}),
        lambda texts: pytest.importorskip("pyarrow").table({"text": texts}),
        lambda texts: pytest.importorskip("datasets").Dataset.from_dict({"text": texts}),
    ],
)
@given(texts=FEW)
def test_what_has_no_order_or_more_than_texts_is_refused(tiny, make, texts):
    """Sets, mappings, bytes, numbers and tables: one sentence that names the type."""
    given_texts = make(texts)
    with pytest.raises(
        ValueError, match=r"^texts: expected .*, found " + type(given_texts).__name__
    ):
        tiny.encode(given_texts)


def test_the_prompt_before_texts(make_model, tmp_path):
    """A prompt, else a named one, else the folder's default; each method has its own name; all as
    in sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    model = make_model(tmp_path / "model")
    model.prompts |= {"query": "the cat: ", "web": "a dog: "}
    model.default_prompt_name = "web"
    model.save_pretrained(tmp_path / "model")
    model, theirs = (
        load(tmp_path / "model"),
        SentenceTransformer(str(tmp_path / "model"), device="cpu"),
    )
    text, same = "one dog ran", partial(np.testing.assert_allclose, atol=1e-5)
    for options in ({}, {"prompt": "see "}, {"prompt": None, "prompt_name": "query"}):
        same(model.encode(text, **options), theirs.encode(text, **options))
        same(model.encode_query(text, **options), theirs.encode_query(text, **options))
        same(model.encode_document(text, **options), theirs.encode_document(text, **options))
    same(model.encode(text), model.encode("a dog: " + text, prompt=""))
    instructed = model.encode_query(text, instruction="find it")
    same(instructed, model.encode(text, prompt="Instruct: find it \n Query: "))
    with pytest.raises(
        ValueError, match="prompt_name: expected one of query, document, web, found"
    ):
        model.encode(text, prompt_name="news")
    with pytest.raises(ValueError, match=r"prompt\[0\]: expected a string, found int"):
        model.encode(text, prompt=3)
    model.default_prompt_name = "news"
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="expected the prompt 'news' among prompts"):
        load(tmp_path / "model")


def test_words_of_sentence_transformers(tiny):
    """Options that mean something here are taken, whatever else is refused with our word for it."""
    expected = tiny.encode(TEXTS)
    same = {"batch_size": 1, "device": "cpu", "convert_to_numpy": True, "show_progress_bar": None}
    assert np.array_equal(tiny.encode(TEXTS, output_value="sentence_embedding", **same), expected)
    tensor = tiny.encode(TEXTS, convert_to_tensor=True, convert_to_numpy=False)
    assert torch.equal(tensor, torch.from_numpy(expected))
    assert tiny.encode("a", convert_to_tensor=True).shape == (32,)
    for options, message in (
        ({"convert_to_numpy": False}, "convert_to_numpy=False.*convert_to_tensor=True gives one"),
        ({"device": "cuda:7"}, "from_pretrained"),
        ({"output_value": "token_embeddings"}, "only one vector per text"),
        ({"batch_size": 0}, "batch_size: expected at least 1 text, found 0"),
        ({"max_length": 9}, "from_pretrained"),
        ({"instruction": "a"}, "encode_query"),
        ({"truncate": 9}, "encode.truncate=9.: there is no such option"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.encode(TEXTS, **options)


@pytest.mark.parametrize("precision", get_args(Precision))
@given(
    rows=st.integers(0, 5), width=st.integers(1, 20), seed=st.integers(0, 99), given_=st.booleans()
)
def test_fewer_bits_are_those_of_sentence_transformers(precision, rows, width, seed, given_):
    """The same bytes on the same vectors, with the ranges of the vectors or given ones, also where
    a coordinate never changes or a value is outside."""
    from sentence_transformers import quantize_embeddings

    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((rows, width), np.float32)
    vectors[:, 0] = 0.25
    known = rng.standard_normal((4, width), np.float32) / 2
    ranges = np.stack([known.min(0), known.max(0)]) if given_ else None
    if rows == 1 and ranges is None and "int8" in precision:
        with pytest.raises(ValueError, match="one vector has no range"):
            quantize(vectors, precision)
        return
    with warnings.catch_warnings():
        expected = quantize_embeddings(vectors, precision, ranges)
    for given_ranges in (ranges, known if given_ else None):
        found = quantize(vectors, precision, given_ranges)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()


def test_precision_of_encode(tiny):
    """Rows in the order given; one text needs ranges; a wrong word or shape is one sentence."""
    full = tiny.encode(TEXTS, truncate_dim=12)
    assert np.array_equal(
        tiny.encode(TEXTS, None, 12, precision="ubinary"), quantize(full, "ubinary")
    )
    assert np.array_equal(tiny.encode(TEXTS, None, 12, precision="int8"), quantize(full, "int8"))
    assert tiny.encode("a", precision="binary").shape == (4,)
    with pytest.raises(ValueError, match="one vector has no range, so ranges are needed"):
        tiny.encode("a", precision="int8")
    with pytest.raises(ValueError, match=r"expected float32, int8, .* found 'int4' of float32"):
        quantize(full, "int4")
    with pytest.raises(
        ValueError, match=r"ranges: expected shape \(2 or more, 12\), found \(2, 3\)"
    ):
        quantize(full, "int8", full[:2, :3])


@pytest.mark.parametrize("name", get_args(Similarity))
def test_similarities_are_those_of_sentence_transformers(tiny, name, monkeypatch):
    """The folder's function, of all pairs and row by row, float32 for any kind of numbers."""
    from sentence_transformers.util import SimilarityFunction

    monkeypatch.setattr(tiny, "similarity_fn_name", name)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 8), np.float32), rng.standard_normal((3, 8), np.float32)
    full = SimilarityFunction.to_similarity_fn(name)(a, b).numpy()
    pairs = SimilarityFunction.to_similarity_pairwise_fn(name)(a, b).numpy()
    for dtype, atol in ((np.float32, 1e-5), (np.float64, 1e-5), (np.float16, 1e-2)):
        for left, right in ((a.astype(dtype), b), (a, torch.from_numpy(b.astype(dtype)))):
            found, by_row = tiny.similarity(left, right), tiny.similarity_pairwise(left, right)
            assert found.dtype == by_row.dtype == np.float32
            np.testing.assert_allclose(found, full, atol=atol)
            np.testing.assert_allclose(by_row, pairs, atol=atol)
    np.testing.assert_allclose(tiny.similarity(a.tolist(), [*b]), full, atol=1e-5)
    np.testing.assert_allclose(tiny.similarity(a[0], b), full[:1], atol=1e-5)
    assert float(tiny.similarity(a[0], b[1])) == pytest.approx(full[0, 1], abs=1e-5)
    a.flags.writeable = False
    np.testing.assert_allclose(tiny.similarity(a, b), full, atol=1e-5)


def test_weights_are_saved_as_exactly_as_they_are_known(tiny_model_dir, tmp_path):
    """A model that computes in fewer or more bits is saved as its folder has it; what was changed
    is saved as it is now; another dtype on request only."""

    def stored(folder):
        return load_file(folder / "model.safetensors")

    first = stored(tiny_model_dir)
    half = Embedder.from_pretrained(tiny_model_dir, dtype="bf16")
    half.save_pretrained(tmp_path / "same")
    assert all(torch.equal(x, first[name]) for name, x in stored(tmp_path / "same").items())
    with torch.no_grad():
        half.model.norm.weight.mul_(2)
    half.save_pretrained(tmp_path / "changed")
    for name, x in stored(tmp_path / "changed").items():
        assert torch.equal(x, first[name] * 2 if name == "norm.weight" else first[name])
    half.save_pretrained(tmp_path / "half", dtype="half")
    assert {x.dtype for x in stored(tmp_path / "half").values()} == {torch.float16}
    wide = load(tmp_path / "half")
    wide.save_pretrained(tmp_path / "half again")
    files = [tmp_path / name / "model.safetensors" for name in ("half", "half again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    shutil.rmtree(tmp_path / "half")
    with pytest.raises(ValueError, match="half: expected a folder with"):
        wide.save_pretrained(tmp_path / "lost")
    wide.save_pretrained(tmp_path / "kept", dtype="float32")


@pytest.mark.parametrize(("number", "message"), [(2**32 - 1, "4294967296 ids"), (400, "401 ids")])
def test_ids_beyond_the_table_are_refused_at_once(folder, number, message):
    """A vocabulary whose ids go beyond the table, however far: one sentence, within a moment."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["at"] = number
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        ValueError, match=f"the tokenizer has {message} and the embedding table 320"
    ):
        load(folder)


def test_names_of_dtypes(tiny_model_dir):
    """torch's names and the short ones; any other word is refused by name."""
    for name, dtype in (("fp16", torch.float16), ("half", torch.float16), ("bf16", torch.bfloat16)):
        assert Embedder.from_pretrained(tiny_model_dir, dtype=name).dtype is dtype
    for name in ("int8", "float8_e4m3fn", "fp4", "nn", ""):
        with pytest.raises(ValueError, match=f"dtype: expected a name like .*, found '{name}'"):
            Embedder.from_pretrained(tiny_model_dir, dtype=name)


def test_what_a_model_is(tiny_model_dir):
    """repr tells it in a line; the dimension has sentence-transformers' name as well."""
    model = load(tiny_model_dir)
    assert model.get_sentence_embedding_dimension() == model.dimension == 32
    assert repr(model) == (
        f"Embedder('{tiny_model_dir}': qwen2, 25,888 parameters, 32 dimensions, causal attention, "
        "mean pooling, at most 32 tokens, float32 on cpu)"
    )


def test_the_bar_ends_at_its_end(tiny, capsys):
    """Empty and equal texts count as done."""
    tiny.encode(["", "a", "b", "a"], show_progress_bar=True)
    assert "3/3" in capsys.readouterr().err


def test_two_lengths_share_a_tokenizer(tiny):
    """In two threads, each text is cut at the length of its own model."""
    ours = [Embedder(tiny.model, tiny.tokenizer, causal=True, max_length=n) for n in (3, 30)]
    texts = ["the cat sat on a mat while one dog ran far " * 3] * 40
    expected = [model.encode(texts[0]) for model in ours]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            for found, vector in zip(
                pool.map(lambda m: m.encode(texts), ours), expected, strict=True
            ):
                np.testing.assert_allclose(found[0], vector, atol=1e-6)
