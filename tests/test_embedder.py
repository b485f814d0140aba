"""The Embedder: vectors independent of other texts, and folders that other libraries open."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kalm_min import Embedder
from kalm_min.embedder import pick_device

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
    with pytest.raises(ValueError, match=r"texts\[1\]: .*lone surrogate U\+D800 at character 2"):
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
        sentence = "the model gives a vector with NaN or infinity in float32; the model's weights"
        with pytest.raises(ValueError, match=rf"texts\[2\], 'x': {sentence}"):
            model.encode(["the cat", "a dog", "x"])
        for value in (torch.inf, 1e30):  # the second one's length is beyond float32
            weights[""].fill_(value)
            with pytest.raises(ValueError, match=rf"texts\[0\], 'the cat': {sentence}"):
                model.encode(["the cat"])
    model.model.half()
    with pytest.raises(ValueError, match="in float16; try dtype float32"):
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
    """A path is never looked up on the hub; an empty folder says what is missing."""
    with pytest.raises(ValueError, match="expected a model folder or a hub id"):
        Embedder.from_pretrained("./nowhere")
    with pytest.raises(ValueError, match=r"expected a model folder with config\.json"):
        Embedder.from_pretrained(tmp_path)


def test_saving_over_a_folder_keeps_what_is_not_ours(folder):
    """save_pretrained into an existing folder replaces its own files and deletes nothing."""
    (folder / "notes.txt").write_text("mine")
    load(folder).save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert load(folder).encode("a").any()
    assert not list(folder.parent.glob(".model*"))
