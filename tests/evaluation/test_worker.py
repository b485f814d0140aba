"""mteb's tasks through the worker, from folders that replace the hub's repositories."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kalm_min import Embedder, vectors
from kalm_min.evaluation.plan import EvaluationConfig, make_plans
from kalm_min.evaluation.worker import _sentence, evaluate_task
from kalm_min.files import read_jsonl, write_json
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


@pytest.mark.parametrize("task", ["SciFact", "STS12", "AskUbuntuDupQuestions"])
def test_stored_prompts_score_as_with_sentence_transformers(
    mteb, make_model, order, monkeypatch, tmp_path, task
):
    """Promise: a folder with prompts has the score that mteb gives it through sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    prompts = {"query": "find the cat: ", "document": "on a mat: ", "STS": "the dog: "}
    make_model(tmp_path / "model")
    path = tmp_path / "model" / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompts": prompts}))
    given = order(task)
    folders = {"data": (), "tasks": (task,), "datasets": tmp_path / "mirror"}
    (target := tmp_path / "mirror" / mteb.get_task(task).metadata.dataset["path"]).mkdir(
        parents=True
    )
    write_repository(target / mteb.get_task(task).metadata.dataset["revision"], task)
    (plan,) = make_plans(EvaluationConfig(model=(str(tmp_path / "model"),), **folders))
    given["key"] |= plan.key(plan.tasks[0])
    assert plan.settings["instructions"] == "checkpoint"
    embedder = Embedder.from_pretrained(tmp_path / "model", device="cpu", dtype="float32")
    ours = evaluate_task(embedder, given, [32])
    peer = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    loaded = mteb.get_task(task)
    monkeypatch.setitem(loaded.metadata.dataset, "path", given["mirror"])
    options = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
    expected = mteb.evaluate(peer, loaded, **options).task_results[0].get_score()
    assert ours["main_score"] == pytest.approx(expected, abs=1e-4)
    plain = evaluate_task(embedder, given | {"key": given["key"] | {"query_prompt": ""}}, [32])
    assert plain["main_score"] != pytest.approx(expected, abs=1e-4)


def test_a_split_without_a_relevant_document_scores_0(embedder, order):
    """Bug to avoid: an error of numpy where mteb, which drops its queries, gives 0."""
    given = order("SciFact")
    path = Path(given["mirror"]) / "qrels" / "test.jsonl"
    path.write_text(path.read_text().replace('"score": 1', '"score": 0'))
    assert evaluate_task(embedder, given, [32])["main_score"] == 0


def test_a_local_query_without_a_relevant_document_scores_0(embedder, datasets, tmp_path):
    """Promise: as in mteb, a query that is judged counts; one without any judgement does not."""
    key = {"query_instruction": "", "document_instruction": "", "checkpoint": "c"}
    given = {"name": "retrieval", "type": "Retrieval", "folder": str(datasets / "retrieval")}
    given |= {"key": key, "store": str(tmp_path)}
    before = evaluate_task(embedder, given, [32])["main_score"]  # over 10 of 12 queries
    with (datasets / "retrieval" / "qrels" / "test.tsv").open("a") as file:
        file.write("10\td1\t0\n11\td2\t-1\n")
    after = evaluate_task(embedder, given, [32])["main_score"]
    assert after == pytest.approx(before * 10 / 12, abs=1e-5)


def test_dimensions_and_precisions_are_added(embedder, eight, tmp_path):
    """Promise: what the result file holds stays, and each score is as if it were the only one."""
    key = {"query_instruction": "", "document_instruction": "", "checkpoint": "c"}
    key |= {"revision": "1", "main_score": "ndcg_at_10", "splits": ["test"], "subsets": []}
    given = {"name": "retrieval", "type": "Retrieval", "folder": str(eight / "retrieval")}
    given |= {"key": key, "store": str(tmp_path), "result": str(tmp_path / "result.json")}
    first = evaluate_task(embedder, given, ["32", "32 int8"])
    write_json(given["result"], first)
    both = evaluate_task(embedder, given, ["8", "8 binary"])
    assert list(both["kalm_min"]["dims"]) == ["32", "8", "8 binary", "32 int8"]
    assert both["main_score"] == first["main_score"]
    assert both["kalm_min"]["seconds"] > first["kalm_min"]["seconds"]
    alone = evaluate_task(embedder, given | {"result": str(tmp_path / "none.json")}, ["8 binary"])
    dims = both["kalm_min"]["dims"]
    assert alone["main_score"] == dims["8 binary"]["main_score"]
    assert dims["32 int8"]["main_score"] == pytest.approx(dims["32"]["main_score"], abs=0.1)
    changed = evaluate_task(embedder, given | {"key": key | {"revision": "2"}}, ["8"])
    assert list(changed["kalm_min"]["dims"]) == ["8"]


def test_the_worst_queries_are_written(embedder, eight, tmp_path):
    """Promise: rank, scores and texts of the queries that fail, the worst first."""
    key = {"query_instruction": "", "document_instruction": "", "checkpoint": "c"}
    given = {"name": "retrieval", "type": "Retrieval", "folder": str(eight / "retrieval")}
    given |= {"key": key, "store": str(tmp_path), "queries": str(tmp_path / "queries.jsonl")}
    evaluate_task(embedder, given, ["32", "8"])
    lines = [line for _, line in read_jsonl(tmp_path / "queries.jsonl")]
    assert len(lines) == 10  # two queries have no judgement
    ranks = [line["rank"] for line in lines]
    assert ranks == sorted(ranks, reverse=True)
    for line in lines:
        scores = [found["score"] for found in line["found"]]
        assert scores == sorted(scores, reverse=True)
        best = line["found"][0]
        texts = [line["query"], f"{best['title']} {best['text']}".strip()]
        query, document = embedder.encode(texts)
        assert best["score"] == pytest.approx(float(query @ document), abs=1e-5)


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
