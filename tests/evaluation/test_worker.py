"""mteb's own tasks through the worker, from folders that stand in for the hub's repositories."""

import json

import pytest

from kalm_min import Embedder
from kalm_min.evaluation.worker import evaluate_task

pytestmark = pytest.mark.filterwarnings("ignore")

PARTS = {
    "corpus": [{"_id": f"d{i}", "title": "", "text": f"a {i * 'cat '}"} for i in range(20)],
    "queries": [{"_id": f"q{i}", "text": f"one {i * 'dog '}"} for i in range(4)],
    "default": [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(4)],
    "top_ranked": [
        {"query-id": f"q{i}", "corpus-ids": [f"d{j}" for j in range(i, i + 5)]} for i in range(4)
    ],
}


@pytest.fixture(scope="module")
def embedder(tiny_model_dir):
    return Embedder.from_pretrained(tiny_model_dir, device="cpu", dtype="float32")


@pytest.fixture
def mirror(mteb, tmp_path, monkeypatch):
    """mirror(task name, parts): make mteb load a task from a folder with these configurations."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(name, parts):
        folder = tmp_path / name
        folder.mkdir()
        header = "---\nconfigs:\n"
        for part, rows in parts.items():
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            header += f"- config_name: {part}\n  data_files:\n"
            header += f"  - {{split: test, path: {part}.jsonl}}\n"
        (folder / "README.md").write_text(f"{header}---\n")
        task = mteb.get_task(name)
        monkeypatch.setitem(task.metadata.dataset, "path", str(folder))
        key = {"query_instruction": "", "document_instruction": ""}
        key |= {"splits": task.eval_splits, "subsets": task.hf_subsets}
        return {"name": name, "type": task.metadata.type, "folder": None, "key": key}

    return make


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("AskUbuntuDupQuestions", PARTS),
        ("SciFact", {name: PARTS[name] for name in ("corpus", "queries", "default")}),
        (
            "STS12",
            {
                "default": [
                    {"sentence1": "a cat", "sentence2": i * "a dog ", "score": i % 5}
                    for i in range(9)
                ]
            },
        ),
    ],
)
def test_an_official_task_scores_as_with_sentence_transformers(
    mteb, embedder, tiny_model_dir, mirror, name, parts
):
    """Promise: mteb's own loading and scoring, each dimension as if it were run alone."""
    from sentence_transformers import SentenceTransformer

    order = mirror(name, parts)
    result = evaluate_task(embedder, order, [32, 8])
    for dim in (32, 8):
        peer = SentenceTransformer(str(tiny_model_dir), device="cpu", truncate_dim=dim)
        options = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
        expected = mteb.evaluate(peer, mteb.get_task(name), **options).task_results[0]
        ours = result["kalm_min"]["dims"][str(dim)]
        assert ours["main_score"] == pytest.approx(expected.get_score(), abs=1e-4)


def test_reranking_without_candidates_is_refused(embedder, mirror):
    """Bug to avoid: mteb ranking the whole corpus under the name of a reranking task."""
    parts = {name: rows for name, rows in PARTS.items() if name != "top_ranked"}
    with pytest.raises(ValueError, match="candidates to rerank"):
        evaluate_task(embedder, mirror("AskUbuntuDupQuestions", parts), [32])
