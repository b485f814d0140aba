"""mteb's tasks through the worker, from folders that replace the hub's repositories."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kalm_min import Embedder, vectors
from kalm_min.evaluation.worker import _sentence, evaluate_task
from tests.evaluation.hub import REPOSITORIES, write_repository

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def embedder(tiny_model_dir):
    return Embedder.from_pretrained(tiny_model_dir, device="cpu", dtype="float32")


@pytest.fixture
def order(mteb, tmp_path, monkeypatch):
    """order(task, subset): the job for a task whose dataset is in a mirror."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(name, subset="default"):
        write_repository(tmp_path / name, name)
        task = mteb.get_task(name)
        key = {"query_instruction": "", "document_instruction": "", "subsets": [subset]}
        key |= {"checkpoint": "c"}
        return {
            "name": name,
            "type": task.metadata.type,
            "folder": None,
            "mirror": str(tmp_path / name),
            "store": str(tmp_path / "store"),
            "key": key | {"splits": task.eval_splits},
        }

    return make


@pytest.mark.parametrize("name", list(REPOSITORIES))
def test_an_official_task_scores_as_with_sentence_transformers(
    mteb, embedder, tiny_model_dir, order, monkeypatch, name
):
    """Promise: mteb's own loading and scoring, each dimension as if it were run alone; of a mirror
    laid out as the hub's repository is, one or more tasks of every type.
    """
    from sentence_transformers import SentenceTransformer

    given = order(name, {"STS17": "en-en", "Tatoeba": "deu-eng"}.get(name, "default"))
    result = evaluate_task(embedder, given, [32, 8])
    assert result["dataset_revision"] == mteb.get_task(name).metadata.revision
    for dim in (32, 8):
        peer = SentenceTransformer(str(tiny_model_dir), device="cpu", truncate_dim=dim)
        options = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
        options["encode_kwargs"] = {"normalize_embeddings": True}
        task = mteb.get_task(name, hf_subsets=given["key"]["subsets"])
        monkeypatch.setitem(task.metadata.dataset, "path", given["mirror"])
        expected = mteb.evaluate(peer, task, **options).task_results[0]
        ours = result["kalm_min"]["dims"][str(dim)]
        assert ours["main_score"] == pytest.approx(expected.get_score(), abs=1e-4)


def test_reranking_without_candidates_is_refused(embedder, order):
    """Bug to avoid: mteb ranking the full corpus under the name of a reranking task."""
    given = order("AskUbuntuDupQuestions")
    card = Path(given["mirror"]) / "README.md"
    card.write_text(card.read_text().replace("config_name: top_ranked", "config_name: other"))
    with pytest.raises(ValueError, match="candidates to rerank"):
        evaluate_task(embedder, given, [32])


def test_an_error_names_its_cause(embedder, order):
    """datasets wraps the reason; a person needs it."""
    given = order("STS12")
    (Path(given["mirror"]) / "test.jsonl.gz").write_bytes(b"torn")
    with pytest.raises(Exception, match="generating") as caught:
        evaluate_task(embedder, given, [32])
    assert "BadGzipFile" in _sentence(caught.value)


def test_a_task_in_slices_has_the_same_result(mteb, embedder, eight, tmp_path, monkeypatch):
    """Promise: vectors that other workers stored are used, and change no digit of any score."""
    monkeypatch.setattr(vectors, "_MEAN", 8)
    key = {"query_instruction": "", "document_instruction": "", "checkpoint": "c"}
    key |= {"splits": ["test"], "subsets": []}
    order = {"name": "retrieval", "type": "", "folder": str(eight / "retrieval"), "key": key}
    order |= {"store": str(tmp_path / "whole")}
    whole = evaluate_task(embedder, order, [32, 8])["kalm_min"]["dims"]
    order |= {"store": str(tmp_path / "slices")}
    for number in range(2):
        assert evaluate_task(embedder, order | {"slice": [number, 2]}, [32, 8]) == {}
    (folder,) = (tmp_path / "slices").iterdir()
    assert len(list(folder.rglob("*.npy"))) > 4
    assert json.loads((folder / "manifest.json").read_text())["dtype"] == "float32"
    sliced = evaluate_task(embedder, order, [32, 8])["kalm_min"]["dims"]
    for dim in ("32", "8"):
        (found,), (expected,) = (result[dim]["scores"]["test"] for result in (sliced, whole))
        for name, value in expected.items():
            if isinstance(value, float):
                assert found[name] == pytest.approx(value, abs=0, nan_ok=True), name


def test_only_computing_outside_encoding_is_progress():
    """Promise: a library that loads or scores for long is not taken for one that hangs.

    A worker that waits without computing, or computes without end while it encodes, still is.
    """
    code = """if True:
        import threading, time
        from kalm_min.evaluation import worker
        worker._HEARTBEAT_SECONDS = 0.2
        pipe = worker.Pipe()
        pipe.progress(3, 9, True)
        threading.Thread(target=pipe.heartbeat, daemon=True).start()
        def compute(seconds):
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass
        compute(1.5)
        pipe.send("encoded")
        pipe.progress(0, 0, False)
        compute(1.5)
        pipe.send("scored")
        time.sleep(1.5)
    """
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    events = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    scored = events.index("scored")
    assert set(events[1 : events.index("encoded")]) == {"alive"}
    assert "progress" in events[events.index("encoded") + 2 : scored]
    assert set(events[scored + 1 :]) == {"alive"}
