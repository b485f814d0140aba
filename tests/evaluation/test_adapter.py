"""The adapter: what mteb gets from it is what it gets from sentence-transformers."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest

from kalm_min import Embedder, vectors
from kalm_min.evaluation import adapter as adapter_module
from kalm_min.evaluation.adapter import Adapter

pytestmark = pytest.mark.filterwarnings("ignore")

ONE_SIDED = [
    "STS",
    "PairClassification",
    "Classification",
    "MultilabelClassification",
    "Regression",
    "Clustering",
    "BitextMining",
    "Summarization",
    "ZeroShotClassification",
]
TWO_SIDED = ["Retrieval", "Reranking", "InstructionRetrieval", "InstructionReranking"]
QUERY, DOCUMENT = "find: ", "doc: "


@pytest.fixture(scope="module")
def embedder(tiny_model_dir):
    return Embedder.from_pretrained(tiny_model_dir, device="cpu", dtype="float32")


def numbers(result):
    """Every score of a TaskResult that is a number, by split, subset and name."""
    return {
        (split, part["hf_subset"], name): value
        for split, parts in result.scores.items()
        for part in parts
        for name, value in part.items()
        if isinstance(value, float) and not math.isnan(value)
    }


def test_mock_tasks_score_as_with_sentence_transformers(mteb, embedder, tiny_model_dir):
    """Promise: every type of text task that mteb has, every score equal to 1e-4; also of an
    embedder given to mteb as it is, with the prompts it stores."""
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    prompts = dict.fromkeys(ONE_SIDED, QUERY)
    prompts |= {f"{kind}-query": QUERY for kind in TWO_SIDED}
    prompts |= {f"{kind}-document": DOCUMENT for kind in TWO_SIDED}
    peer = SentenceTransformer(str(tiny_model_dir), device="cpu")
    theirs = mteb.mock_run(SentenceTransformerEncoderWrapper(peer, model_prompts=prompts))
    ours = mteb.mock_run(Adapter(embedder, query_prompt=QUERY, document_prompt=DOCUMENT))
    model = copy.copy(embedder)
    model.prompts = prompts
    itself = mteb.mock_run(model)
    names = [name for name, result in ours.items() if result is not None]
    assert len(names) >= 25
    for name in names:
        for found in (ours, itself):
            assert numbers(found[name]) == pytest.approx(numbers(theirs[name]), abs=1e-4), name


def test_results_are_named_by_what_they_depend_on(mteb, embedder):
    """mteb keeps results by name and revision: other weights, prompts or lengths have another."""
    models = [copy.copy(embedder) for _ in range(4)]
    models[1].prompts = {"query": "find "}
    models[2].max_length = 7
    models[3].pooling = "lasttoken"
    metas = [model.mteb_model_meta for model in (*models, embedder)]
    assert {meta.name for meta in metas} == {"kalm_min/model"}
    assert len({meta.revision for meta in metas}) == 4
    assert metas[0].revision == metas[-1].revision


def search(adapter, corpus, queries, top_k, top_ranked=None, split="test"):
    metadata = SimpleNamespace(get_modalities=lambda prompt_type: ["text"], modalities=["text"])
    part = {"hf_split": split, "hf_subset": "default", "encode_kwargs": {}}
    adapter.index(corpus, task_metadata=metadata, **part)
    options = {"task_metadata": metadata, "top_k": top_k, "top_ranked": top_ranked}
    return adapter.search(queries, **options, **part)


@pytest.fixture(scope="module")
def library(mteb):
    """A corpus of 300 documents and 25 queries."""
    from datasets import Dataset

    draw = np.random.default_rng(0)
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "one",
        "dog",
        "ran",
        "far",
        "to",
        "see",
        "birds",
    ]
    texts = [" ".join(draw.choice(words, size=draw.integers(1, 9))) for _ in range(325)]
    corpus = {"id": [f"d{i}" for i in range(300)], "title": ["", "a cat", None] * 100}
    queries = Dataset.from_dict({"id": [f"q{i}" for i in range(25)], "text": texts[300:]})
    return Dataset.from_dict(corpus | {"text": texts[:300]}), queries


@pytest.mark.parametrize("top_k", [7, 1000])
def test_search_in_blocks_ranks_as_brute_force(embedder, library, monkeypatch, top_k):
    """Promise: shards of the corpus and blocks of queries change nothing; every dimension is right."""
    corpus, queries = library
    texts = [
        f"{title or ''} {text}".strip()
        for title, text in zip(corpus["title"], corpus["text"], strict=True)
    ]
    monkeypatch.setattr(vectors, "_LONGEST", 64)
    monkeypatch.setattr(adapter_module, "_QUERIES", 10)
    adapter = Adapter(embedder, query_prompt=QUERY, document_prompt=DOCUMENT)
    for dim in (32, 8):
        adapter.dim = dim
        found = search(adapter, corpus, queries, top_k)
        left = embedder.encode(queries["text"][:], QUERY, truncate_dim=dim)
        right = embedder.encode(texts, DOCUMENT, truncate_dim=dim)
        cosines = left @ right.T
        for number, query in enumerate(queries["id"]):
            best = np.sort(cosines[number])[::-1][:top_k]
            assert list(found[query].values()) == pytest.approx(best.tolist(), abs=1e-5)
            for name, value in found[query].items():
                assert value == pytest.approx(cosines[number, int(name[1:])], abs=1e-5)


def test_candidates_only(embedder, library):
    """Reranking scores the candidates it was given and no other document."""
    corpus, queries = library
    candidates = {"q0": ["d5", "d9", "d2"], "q1": []}
    found = search(Adapter(embedder), corpus, queries, 2, top_ranked=candidates)
    everything = search(Adapter(embedder), corpus, queries, 300)
    best = sorted(candidates["q0"], key=lambda name: -everything["q0"][name])[:2]
    assert list(found["q0"]) == best
    assert all(found["q0"][name] == pytest.approx(everything["q0"][name]) for name in best)
    assert found["q1"] == {}


class Counting:
    """An embedder that counts the texts it is given."""

    def __init__(self, embedder):
        self.embedder, self.texts = embedder, 0
        self.dimension, self.device = embedder.dimension, embedder.device
        self.dtype, self.max_length = embedder.dtype, embedder.max_length

    def encode(self, texts, prompt=""):
        self.texts += len(texts)
        return self.embedder.encode(texts, prompt)


def test_every_text_is_encoded_once_for_all_dimensions(embedder, library):
    """Promise: further dimensions cost no encoding, duplicates neither; progress adds up."""
    corpus, queries = library
    counting, reported = Counting(embedder), []
    adapter = Adapter(counting, report=lambda texts, *_: reported.append(texts))
    loader = SimpleNamespace(dataset={"text": ["a cat", "a dog", "a cat", ""]})
    for dim in (32, 16, 8):
        adapter.dim = dim
        vectors = adapter.encode(loader)
        assert vectors.shape == (4, dim)
        assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1, 0], abs=1e-6)
        assert vectors[:2] == pytest.approx(
            embedder.encode(["a cat", "a dog"], truncate_dim=dim), abs=1e-6
        )
        search(adapter, corpus, queries, 5)
    assert counting.texts == sum(reported) == 3 + len(corpus) + len(set(queries["text"][:]))


def test_another_corpus_in_the_same_place_is_searched_anew(embedder, library):
    """Bug to avoid: using the rankings of one corpus for another."""
    corpus, queries = library
    adapter = Adapter(embedder)
    first = search(adapter, corpus, queries, 3)
    second = search(adapter, corpus.select(range(100, 200)), queries, 3)
    assert first != second
    assert all(100 <= int(name[1:]) < 200 for found in second.values() for name in found)


def test_a_corpus_in_slices_ranks_as_a_whole(embedder, library, monkeypatch, tmp_path):
    """Promise: the same scores and ranks, to the bit, whichever process encoded the corpus."""
    corpus, queries = library
    monkeypatch.setattr(vectors, "_MEAN", 16)
    options = {"query_prompt": QUERY, "document_prompt": DOCUMENT}
    whole = Adapter(embedder, **options)
    for first in range(0, 300, 100):
        part = corpus.select(range(first, first + 100))
        Adapter(embedder, store=tmp_path, **options).index(part)
    counting = Counting(embedder)
    adapter = Adapter(counting, store=tmp_path, **options)
    for dim in (32, 8):
        whole.dim = adapter.dim = dim
        expected = search(whole, corpus, queries, 20)
        found = search(adapter, corpus, queries, 20)
        assert {q: list(docs.items()) for q, docs in found.items()} == {
            q: list(docs.items()) for q, docs in expected.items()
        }
    # The shards at the ends of a slice are not those of the full corpus.
    assert counting.texts < len(corpus) / 2


def test_a_damaged_or_full_store_costs_time_only(embedder, library, tmp_path, monkeypatch):
    """Bug to avoid: a task failing because vectors that can be made again could not be kept."""
    corpus, queries = library
    expected = search(Adapter(embedder), corpus, queries, 5)
    assert search(Adapter(embedder, store=tmp_path), corpus, queries, 5) == expected
    for path in tmp_path.rglob("*.npy"):
        path.write_bytes(path.read_bytes()[:100])

    def full(path, vectors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vectors, "write_array", full)
    assert search(Adapter(embedder, store=tmp_path), corpus, queries, 5) == expected
