"""mteb, imported once, and eight small local datasets."""

import json
import random
import warnings

import pytest

from kalm_min.evaluation.plan import Instruction, Plan, PlannedTask, ordered
from kalm_min.files import write_json

WORDS = ["the", "cat", "sat", "on", "a", "mat", "one", "dog", "ran", "far", "to", "see", "birds"]


@pytest.fixture(scope="session")
def mteb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("sentence_transformers")
        return pytest.importorskip("mteb")


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_datasets(folder, seed=0):
    """Write one dataset of each type, in a folder named after the type."""
    draw = random.Random(seed)

    def text(least=3, most=8):
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    def pair():
        return {"sentence1": text(), "sentence2": text()}

    corpus = [{"_id": f"d{i}", "title": text(0, 2), "text": text()} for i in range(60)]
    corpus[7] |= {"title": None, "text": ""}  # such documents exist (cranfield)
    write_rows(folder / "retrieval" / "corpus.jsonl", corpus)
    write_rows(
        folder / "retrieval" / "queries.jsonl", [{"_id": i, "text": text()} for i in range(12)]
    )
    judged = [f"{i}\td{draw.randrange(60)}\t{draw.randint(1, 2)}" for i in range(10)]
    (folder / "retrieval" / "qrels").mkdir()
    (folder / "retrieval" / "qrels" / "test.tsv").write_text(
        "\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n"
    )
    write_rows(
        folder / "reranking" / "test.jsonl",
        [
            {"query": text(), "positive": [text()], "negative": [text() for _ in range(i % 5 + 1)]}
            for i in range(10)
        ],
    )
    write_rows(
        folder / "sts" / "test.jsonl", [pair() | {"score": draw.random() * 5} for _ in range(40)]
    )
    write_rows(folder / "pair" / "test.jsonl", [pair() | {"label": i % 2} for i in range(40)])
    labels = ["cat", "dog", "bird"]
    for part in ("train", "test"):
        rows = [{"text": f"{labels[i % 3]} {text()}", "label": labels[i % 3]} for i in range(45)]
        write_rows(folder / "classification" / f"{part}.jsonl", rows)
    rows = [{"text": f"{labels[i % 3]} {text()}", "label": i % 3 - 1} for i in range(45)]
    write_rows(folder / "clustering" / "test.jsonl", rows)
    rows = [
        {
            "text": text(),
            "human_summaries": [text(), text()],
            "machine_summaries": [text() for _ in range(5)],
            "relevance": [draw.randint(1, 5) + i / 10 for i in range(5)],
        }
        for _ in range(6)
    ]
    write_rows(folder / "summarization" / "test.jsonl", rows)
    for name in ("deu-eng", "fra-eng"):
        write_rows(folder / "bitext" / f"{name}.jsonl", [pair() for _ in range(20)])
    return folder


@pytest.fixture(scope="session")
def eight(tmp_path_factory):
    """A folder with a dataset of each type; not to be written to."""
    return write_datasets(tmp_path_factory.mktemp("eight"))


@pytest.fixture
def datasets(tmp_path):
    """The same, to be broken."""
    return write_datasets(tmp_path / "data")


@pytest.fixture
def finished(tmp_path):
    """finished("a", {task: {dim: score}}, types): a plan whose results below tmp_path / "a" are there.

    A task without scores is planned and has no result.
    """

    def make(output, scores, types=None, revision="1", **changes):
        parts = {"STS17": ("en-en",)}
        tasks = tuple(
            PlannedTask(
                name,
                (types or {}).get(name, "STS"),
                "cosine_spearman",
                revision,
                1000,
                Instruction(),
                subsets=parts.get(name, ("default",)),
            )
            for name in scores
        )
        settings = {"dtype": "auto", "causal": None, "pooling": None, "max_length": None}
        options = {
            "model": "a/model",
            "checkpoint": "c" * 64,
            "dims": ordered(map(str, next(iter(scores.values())))),
            "settings": settings | {"instructions": "v2"},
            "tasks": tasks,
            "results": tmp_path / output / "results" / "a__model" / f"{'c' * 12}-{'5' * 8}",
        }
        plan = Plan(**options | changes)
        used = {"dtype": "float32", "causal": True, "pooling": "mean", "max_length": 512}
        for task in tasks:
            dims = {str(dim): {"main_score": score} for dim, score in scores[task.name].items()}
            record = {"key": plan.key(task), "dims": dims, "seconds": 2.0}
            record |= {"used": used, "type": task.type}
            if dims:
                write_json(plan.result_path(task), {"kalm_min": record})
        return plan

    return make
