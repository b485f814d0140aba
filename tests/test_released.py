"""Every layout in which Qwen2 and Qwen3 embedders are released opens right, or says why not.

Random tiny weights under the released side files' keys, in float32, against sentence-transformers
where it is right without remote code, and else against the authors' documented recipe.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer

from kalm_min import Embedder
from kalm_min.files import hash_checkpoint
from kalm_min.settings import open_folder
from kalm_min.tokenizer import Tokenizer
from kalm_min.vectors import check_manifest, describe

END = "<|endoftext|>"
TEXTS = ["the cat sat on a mat", "a dog", "你好世界", "blue birds far from its house " * 200]
SAME = 0.99999
GTE_PROMPT = "Instruct: find the house\nQuery: "
ST = "sentence_transformers.models."


def write(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def change(path, **changes):
    """Change keys of a JSON file; None deletes."""
    value = json.loads(path.read_text()) | changes
    write(path, {key: one for key, one in value.items() if one is not None})


def modules(folder, *kinds):
    """Write modules.json for (class, path) pairs after the Transformer."""
    pairs = [(f"{ST}Transformer", ""), *kinds]
    rows = [{"idx": i, "name": str(i), "path": p, "type": t} for i, (t, p) in enumerate(pairs)]
    write(folder / "modules.json", rows)


def close_texts(folder):
    """Let tokenizer.json itself append the end-of-text token."""
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    sequence, token = {"Sequence": {"id": "A", "type_id": 0}}, {"id": END, "ids": [0]}
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [sequence, {"SpecialToken": {"id": END, "type_id": 0}}],
        "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {END: token | {"tokens": [END]}},
    }
    write(path, state)


def add_dense(folder, out=20, size=32, **changes):
    """A Dense module as stella_en_1.5B_v5 has it."""
    torch.manual_seed(5)
    settings = {"in_features": size, "out_features": out, "bias": True}
    settings["activation_function"] = "torch.nn.modules.linear.Identity"
    write(folder / "2_Dense_20" / "config.json", settings | changes)
    linear = {"linear.weight": torch.randn(out, size), "linear.bias": torch.randn(out)}
    save_file(linear, folder / "2_Dense_20" / "model.safetensors")
    modules(folder, (f"{ST}Pooling", "1_Pooling"), (f"{ST}Dense", "2_Dense_20"))


REMOTE_TOKENIZER = {
    "AutoTokenizer": ["tokenization_qwen.Qwen2Tokenizer", "tokenization_qwen.Qwen2TokenizerFast"]
}


def remote(folder, model, *, is_causal=None, **tokenizer):
    """State remote classes, as repositories with their own code do."""
    change(folder / "config.json", auto_map={"AutoModel": model} if model else None)
    change(folder / "config.json", is_causal=is_causal, use_bidirectional_attention=None)
    change(folder / "tokenizer_config.json", auto_map=REMOTE_TOKENIZER, **tokenizer)


def qwen3_embedding(folder):
    (folder / "sentence_bert_config.json").unlink()
    change(folder / "tokenizer_config.json", model_max_length=131_072, add_bos_token=False)
    change(folder / "config.json", is_causal=None, use_sliding_window=False, sliding_window=None)
    prompts = {"query": "Instruct: find the house\nQuery:", "document": ""}
    change(folder / "config_sentence_transformers.json", instruction_template=None, prompts=prompts)
    close_texts(folder)


def jina_code(folder):
    close_texts(folder)
    prompts = {"nl2code_query": "Find code:\n", "nl2code_document": "Candidate:\n"}
    change(folder / "config_sentence_transformers.json", prompts=prompts)


def pooled_elsewhere(folder):
    (folder / "1_Pooling").rename(folder / "pooling")
    modules(folder, (f"{ST}Pooling", "pooling"), (f"{ST}Normalize", "2_Normalize"))


def plain_language_model(folder):
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (folder / name).unlink()
    change(folder / "config.json", architectures=["Qwen2ForCausalLM"], is_causal=None)


LIKE_SENTENCE_TRANSFORMERS = {
    "Qwen3-Embedding-0.6B": (qwen3_embedding, {"pooling": "lasttoken", "model_type": "qwen3"}),
    "jina-code-embeddings": (jina_code, {"pooling": "lasttoken"}),
    "Pooling in another folder": (pooled_elsewhere, {"pooling": "lasttoken"}),
    "no Normalize (KaLM v1.5)": (lambda f: modules(f, (f"{ST}Pooling", "1_Pooling")), {}),
}


def test_module_folders_of_any_name_count(make_model, tmp_path):
    """A result or a store is of other weights when Pooling changes, wherever its folder is."""
    folder = tmp_path / "model"
    make_model(folder)
    pooled_elsewhere(folder)
    before = hash_checkpoint(folder)
    change(folder / "pooling" / "config.json", pooling_mode_lasttoken=True)
    assert hash_checkpoint(folder) != before


def cosine(a, b):
    return ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min()


def theirs(folder, texts=TEXTS, **options):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(texts, **options)


def opened(folder, **options):
    return Embedder.from_pretrained(folder, dtype="float32", **options)


def check_round_trip(model, path):
    """What is saved gives the same vectors here and in sentence-transformers."""
    model.save_pretrained(path)
    expected = model.encode(TEXTS)
    assert cosine(opened(path).encode(TEXTS), expected) >= SAME
    assert cosine(theirs(path), expected) >= SAME


@pytest.mark.parametrize("name", LIKE_SENTENCE_TRANSFORMERS)
def test_layouts_that_need_no_remote_code(make_model, tmp_path, name):
    """The vectors of sentence-transformers on the same folder, with and without a prompt."""
    alter, options = LIKE_SENTENCE_TRANSFORMERS[name]
    make_model(tmp_path / "model", **options)
    alter(tmp_path / "model")
    model = opened(tmp_path / "model")
    assert cosine(model.encode(TEXTS), theirs(tmp_path / "model")) >= SAME
    prompted = theirs(tmp_path / "model", prompt=GTE_PROMPT)
    assert cosine(model.encode(TEXTS, GTE_PROMPT), prompted) >= SAME
    check_round_trip(model, tmp_path / "saved")


def recipe(folder, *, causal, pooling, closing, length, dense=False):
    """What the authors document, written out: the vectors of TEXTS by transformers."""
    from transformers import AutoConfig, AutoModel

    copy = shutil.copytree(folder, folder.parent / "recipe")
    change(copy / "config.json", auto_map=None, is_causal=causal, use_bidirectional_attention=None)
    change(copy / "config.json", architectures=["Qwen2Model"])
    assert AutoConfig.from_pretrained(copy).is_causal is causal
    model, fast = AutoModel.from_pretrained(copy), FastTokenizer.from_file(f"{copy}/tokenizer.json")
    fast.no_truncation()
    vectors = []
    for text in TEXTS:
        ids = fast.encode(text).ids
        ids = [*ids[: length - 1], fast.token_to_id(END)] if closing else ids[:length]
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        vector = hidden[-1] if pooling == "lasttoken" else hidden.mean(0)
        if dense:
            linear = load_file(folder / "2_Dense_20" / "model.safetensors")
            vector = linear["linear.weight"] @ vector + linear["linear.bias"]
        vectors.append(vector.numpy())
    return np.stack(vectors)


def kalm_v1(folder):
    remote(folder, None, is_causal=None, add_eos_token=True)
    change(folder / "sentence_bert_config.json", max_seq_length=32_768)
    (folder / "config_sentence_transformers.json").unlink()


def kalm_v2(folder):
    kalm_v1(folder)
    remote(folder, "modeling.Qwen2Model")
    change(folder / "tokenizer_config.json", auto_map=None, add_eos_token=None)


def gte(folder, **options):
    remote(folder, "modeling_qwen.Qwen2Model", **options)
    change(folder / "sentence_bert_config.json", max_seq_length=600)
    change(
        folder / "config_sentence_transformers.json",
        instruction_template=None,
        prompts={"query": GTE_PROMPT},
    )


def gte_derived(folder):
    gte(folder)
    remote(folder, "Alibaba-NLP/gte-Qwen2-7B-instruct--modeling_qwen.Qwen2Model")
    change(folder / "tokenizer_config.json", auto_map=None)


def stella(folder):
    gte(folder)
    add_dense(folder)
    prompts = {"s2p_query": GTE_PROMPT, "s2s_query": "Instruct: Retrieve similar.\nQuery: "}
    change(folder / "config_sentence_transformers.json", prompts=prompts)


def bidirectional_by_key(folder):
    change(folder / "config.json", is_causal=None, use_bidirectional_attention=True)
    change(folder / "sentence_bert_config.json", max_seq_length=600)


def bidirectional_by_name(folder):
    bidirectional_by_key(folder)
    change(folder / "config.json", use_bidirectional_attention=None)
    change(folder / "config.json", architectures=["Qwen2BidirectionalModel"])


MEAN = {"causal": False, "pooling": "mean", "closing": False, "length": 600}
GTE = {"causal": False, "pooling": "lasttoken", "closing": True, "length": 600}
BY_RECIPE = {
    "KaLM v1, v1.5": (kalm_v1, MEAN | {"causal": True, "length": 512}),
    "KaLM v2, v2.5": (kalm_v2, MEAN | {"length": 512}),
    "gte-Qwen2": (lambda folder: gte(folder, is_causal=False), GTE),
    "gte-Qwen2 that says add_eos_token": (lambda folder: gte(folder, add_eos_token=True), GTE),
    "gte-Qwen2, derived": (gte_derived, GTE),
    "stella": (stella, GTE | {"pooling": "mean", "dense": True}),
    "QZhou": (
        lambda folder: (bidirectional_by_key(folder), remote(folder, "modeling_qzhou.QZhouModel")),
        MEAN,
    ),
    "use_bidirectional_attention": (bidirectional_by_key, MEAN),
    "*Bidirectional*": (bidirectional_by_name, MEAN),
}


@pytest.mark.parametrize("name", BY_RECIPE)
def test_layouts_with_remote_code(make_model, tmp_path, name):
    """The vectors of the authors' recipe; their code is recognised and never run."""
    alter, facts = BY_RECIPE[name]
    make_model(tmp_path / "model", pooling=facts["pooling"], max_position_embeddings=40_000)
    alter(tmp_path / "model")
    model = opened(tmp_path / "model")
    assert cosine(model.encode(TEXTS), recipe(tmp_path / "model", **facts)) >= SAME
    kalm = "Instruct: {instruction} \n Query: "
    template = GTE_PROMPT.replace("find the house", "{instruction}")
    is_gte = name.startswith(("gte", "stella"))
    assert model.instruction_template == (template if is_gte else kalm)
    check_round_trip(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["is_causal"] is facts["causal"]
    assert config.get("use_bidirectional_attention", False) is not facts["causal"]


def test_a_plain_language_model_is_pooled_as_the_field_does(make_model, tmp_path):
    """Without sentence-transformers' files: its rule, said once; the caller may choose."""
    make_model(tmp_path / "model")
    plain_language_model(tmp_path / "model")
    with pytest.warns(
        UserWarning, match="pooling is 'lasttoken', by sentence-transformers"
    ) as caught:
        model = opened(tmp_path / "model")
    assert len(caught) == 1
    assert cosine(model.encode(TEXTS), theirs(tmp_path / "model")) >= SAME
    assert opened(tmp_path / "model", pooling="mean").pooling == "mean"
    change(tmp_path / "model" / "config.json", is_causal=False)
    with pytest.warns(UserWarning, match="pooling is 'mean'"):
        assert opened(tmp_path / "model").pooling == "mean"


def test_a_dense_module_is_trained_and_kept(make_model, tmp_path):
    """A step changes the Dense module with the decoder; both are saved and opened alike."""
    make_model(tmp_path / "model")
    stella(tmp_path / "model")
    model = opened(tmp_path / "model")
    assert model.dimension == 20
    before = model.encode(TEXTS)
    optimizer = torch.optim.SGD(model.model.parameters(), lr=0.01)
    from kalm_min.model import Packed

    model.model(Packed.from_sequences([[1, 2, 3]]), causal=False).square().sum().backward()
    optimizer.step()
    assert cosine(model.encode(TEXTS), before) < SAME
    check_round_trip(model, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "2_Dense" / "model.safetensors")
    assert torch.equal(stored["linear.bias"], model.model.dense.bias)
    assert "dense.weight" not in load_file(tmp_path / "saved" / "model.safetensors")


def test_an_empty_text_through_a_dense_module_is_its_bias(make_model, tmp_path):
    """As in sentence-transformers, which maps the zeros that nothing is pooled to."""
    make_model(tmp_path / "model")
    add_dense(tmp_path / "model")
    expected = theirs(tmp_path / "model", ["", "a dog"])
    assert cosine(opened(tmp_path / "model").encode(["", "a dog"]), expected) >= SAME


def test_vectors_with_another_end_of_text_are_of_another_model(make_model, tmp_path):
    """The rule may come from outside the folder, whose digest does not know it."""
    make_model(tmp_path / "model")
    remote(tmp_path / "model", "modeling_qwen.Qwen2Model", is_causal=False)
    model = opened(tmp_path / "model")
    check_manifest(tmp_path / "store", describe(model, "checkpoint"))
    check_manifest(tmp_path / "store", describe(opened(tmp_path / "model"), "checkpoint"))
    model.tokenizer = Tokenizer.from_folder(tmp_path / "model", end_of_text=False)
    with pytest.raises(ValueError, match=r"another model \(end_of_text was \[0\], is \[\]\)"):
        check_manifest(tmp_path / "store", describe(model, "checkpoint"))


def test_added_tokens_beyond_the_table_are_plain_text(make_model, tmp_path):
    """Qwen3-Embedding-4B and 8B: the tokenizer names a few more tokens than the table has rows."""
    folder = tmp_path / "model"
    rows = make_model(tmp_path / "any").tokenizer.vocab_size
    model = make_model(folder, vocab_size=rows)
    expected = model.encode([*TEXTS, "a <think> b"])
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    beyond = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    beyond |= {"content": "<think>", "special": False}
    state["added_tokens"].append(beyond | {"id": rows})
    write(path, state)
    listed = {"added_tokens_decoder": {str(rows): beyond}, "extra_special_tokens": ["<think>"]}
    change(folder / "tokenizer_config.json", **listed)
    model = opened(folder)
    assert cosine(model.encode([*TEXTS, "a <think> b"]), expected) >= SAME
    check_round_trip(model, tmp_path / "saved")
    state["model"]["vocab"]["unheard"] = rows + 1  # of the vocabulary itself: of another checkpoint
    write(path, state)
    with pytest.raises(ValueError, match="not of one checkpoint"):
        opened(folder)


def test_what_is_saved_is_read_as_plain_text(make_model, tmp_path):
    """A chat template lies beside nearly every Qwen2 tokenizer; only a folder that sentence-
    transformers saved puts texts into it, and is refused with the way out."""
    from sentence_transformers import SentenceTransformer

    model = make_model(tmp_path / "model")
    template = "{% for m in messages %}user {{ m['content'] }} end{% endfor %}"
    model.tokenizer.settings["chat_template"] = template
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "chat_template.jinja").write_text(template)
    assert cosine(theirs(tmp_path / "saved"), model.encode(TEXTS)) >= SAME
    plain_language_model(shutil.copytree(tmp_path / "saved", tmp_path / "plain"))
    SentenceTransformer(str(tmp_path / "plain"), device="cpu").save_pretrained(str(tmp_path / "st"))
    with pytest.raises(
        ValueError, match=r'expected .*"message" \(each text would be put into the chat.*keep'
    ):
        opened(tmp_path / "st")
    bert = tmp_path / "st" / "sentence_bert_config.json"
    text = json.loads(bert.read_text())["modality_config"]["text"]
    change(bert, modality_config={"text": text})
    assert cosine(opened(tmp_path / "st").encode(TEXTS), theirs(tmp_path / "st")) >= SAME


REFUSED = {
    "C2LLM": (("modules.json", "pma.PMA"), r"the module pma\.PMA is not built .*by attention"),
    "pplx": (("modules.json", "st_quantize.FlexibleQuantizer"), "st_quantize.* use a conversion"),
    "jina-v5": (("modules.json", "custom_st.Pooling"), r"custom_st\.Pooling.* adapter merged"),
    "jina-v5 base": (("model_type", "jina_embeddings_v5"), "found 'jina_embeddings_v5' .*merged"),
    "pplx's decoder": (("model_type", "bidirectional_pplx_qwen3"), "qwen2 or qwen3, found .*use"),
    "Gemma": (("model_type", "gemma3_text"), "expected qwen2 or qwen3, found 'gemma3_text'"),
    "jasper": (("model_type", "jasper_vl"), "found 'jasper_vl' .*stella_en_1.5B_v5 opens"),
    "unknown code": (("auto_map", "mine.Model"), r"remote code mine\.Model .*pass causal=True or"),
    "QZhou-Zh": (("auto_map", "modeling_qzhou.QZhouZhModel"), "puts tokens before its layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_built_is_named(make_model, tmp_path, name):
    """One sentence each, with what to use instead where there is something."""
    (place, value), sentence = REFUSED[name]
    make_model(tmp_path / "model")
    if place == "modules.json":
        modules(tmp_path / "model", (value, "1_Pooling"))
    elif place == "auto_map":
        remote(tmp_path / "model", value)
    else:
        change(tmp_path / "model" / "config.json", model_type=value)
    with pytest.raises(ValueError, match=sentence) as error:
        opened(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_contradictions_and_gaps_are_refused(make_model, tmp_path):
    """Two keys for one thing must agree; modules.json must say how to pool."""
    folder = tmp_path / "model"
    make_model(folder)
    for causal, both_ways in ((True, True), (False, False)):
        change(folder / "config.json", is_causal=causal, use_bidirectional_attention=both_ways)
        with pytest.raises(ValueError, match="contradict one another"):
            opened(folder)
        assert opened(folder, causal=False).causal is False
    change(folder / "config.json", use_bidirectional_attention=None)
    modules(folder, (f"{ST}Normalize", "2_Normalize"))
    with pytest.raises(ValueError, match="expected a Pooling module, found none"):
        opened(folder)
    for changes in (
        {"activation_function": "torch.nn.modules.activation.Tanh"},
        {"use_residual": True},
    ):
        add_dense(folder, **changes)
        with pytest.raises(ValueError, match=next(iter(changes))):
            opened(folder)
    add_dense(folder, size=31)
    with pytest.raises(
        ValueError, match=r"dense\.weight: expected shape \(20, 32\), found \(20, 31\)"
    ):
        opened(folder)


def test_a_snapshot_in_the_cache_is_known_by_its_name(make_model, tmp_path):
    """The hub's cache names the repository, whatever the class of its remote code is called."""
    name = "models--HIT-TMG--KaLM-embedding-multilingual-mini-instruct-v2"
    folder = tmp_path / name / "snapshots" / "5f1c"
    make_model(folder)
    remote(folder, "unheard.Of")
    found = open_folder(folder)
    assert found.settings.causal is False
    assert found.released == "KaLM-Embedding v2 and v2.5"
    moved = shutil.copytree(folder, tmp_path / "moved")
    with pytest.raises(ValueError, match=r"remote code unheard\.Of"):
        open_folder(moved)


def test_the_table_is_complete():
    """Every entry of the table says where its facts are from and whether they were confirmed."""
    from kalm_min import settings

    names = [name for row in settings._FACTS["models"] for name in row["ids"]]
    assert len(names) == len({*names})
    for row in settings._FACTS["models"]:
        assert row["source"]
        assert row["confirmed"] in (True, False)
        assert "{instruction}" in row.get("template", "{instruction}")


# Published values: shared by an independent port of KaLM v2.5, and the card of Qwen3-Embedding.
GOLDEN = [-0.01055833, -0.02115268, 0.00994598, -0.00856667, -0.0047357, 0.01062506, 0.00235983]
GOLDEN += [-0.07997689, -0.03332109, 0.01760131]


@pytest.mark.network
def test_kalm_v25_gives_its_published_vector():
    """Settles what could not be looked up: attention, end-of-text and length of KaLM v2.5."""
    name = "KaLM-Embedding/KaLM-embedding-multilingual-mini-instruct-v2.5"
    model = opened(name)
    assert (model.causal, model.pooling, model.max_length) == (False, "mean", 512)
    found = model.encode("This is an example sentence")[:10]
    np.testing.assert_allclose(found, GOLDEN, atol=2e-4)


@pytest.mark.network
def test_qwen3_embedding_gives_its_published_similarities():
    """The example of its card."""
    model = opened("Qwen/Qwen3-Embedding-0.6B", max_length=8192)
    task = "Given a web search query, retrieve relevant passages that answer the query"
    assert model.prompts["query"] == model.instruction_template.format(instruction=task)
    queries = model.encode_query(["What is the capital of China?", "Explain gravity"])
    documents = model.encode_document(
        [
            "The capital of China is Beijing.",
            (
                "Gravity is a force that attracts two bodies towards each other. It gives weight to "
                "physical objects and is responsible for the movement of planets around the sun."
            ),
        ]
    )
    expected = [[0.7646, 0.1414], [0.1355, 0.6000]]
    np.testing.assert_allclose(model.similarity(queries, documents), expected, atol=2e-3)


@pytest.mark.network
@pytest.mark.parametrize(
    "name",
    [
        "KaLM-embedding-multilingual-mini-instruct-v1",
        "KaLM-embedding-multilingual-mini-instruct-v2",
    ],
)
def test_released_files_lead_to_their_entry(name):
    """The files alone, downloaded to a folder, lead to the entry that the name leads to."""
    by_name = open_folder(f"HIT-TMG/{name}")
    by_files = open_folder(by_name.model)
    assert by_files.released == by_name.released != ""
    assert by_files.settings == by_name.settings
