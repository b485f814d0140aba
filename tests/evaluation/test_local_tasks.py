"""The eight local types, run as a worker runs them, against mteb with sentence-transformers."""

import json

import pytest

from kalm_min import Embedder
from kalm_min.evaluation.local_data import KINDS
from kalm_min.evaluation.local_tasks import build_task
from kalm_min.evaluation.worker import evaluate_task

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def embedder(tiny_model_dir):
    return Embedder.from_pretrained(tiny_model_dir, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def peers(mteb, tiny_model_dir):
    """sentence-transformers on the same folder, by dimension."""
    from sentence_transformers import SentenceTransformer

    return {
        dim: SentenceTransformer(str(tiny_model_dir), device="cpu", truncate_dim=dim)
        for dim in (32, 8)
    }


def order(folder, name, **instructions):
    key = {"query_instruction": "", "document_instruction": ""} | instructions
    return {"name": name, "type": KINDS[name].type, "folder": str(folder / name), "key": key}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_those_of_sentence_transformers(mteb, embedder, peers, eight, kind):
    """Promise: the same main score to 1e-4, at each dimension, in mteb's own file format."""
    from mteb.results import TaskResult

    result = json.loads(json.dumps(evaluate_task(embedder, order(eight, kind), [32, 8])))
    for dim, peer in peers.items():
        expected = mteb.evaluate(
            peer,
            build_task(eight / kind),
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs={"normalize_embeddings": True},
        )
        expected = expected.task_results[0]
        ours = result["kalm_min"]["dims"][str(dim)]
        assert ours["main_score"] == pytest.approx(expected.get_score(), abs=1e-4)
        assert TaskResult.from_dict(ours).scores.keys() == expected.scores.keys()
    assert (
        TaskResult.from_dict(result).get_score() == result["kalm_min"]["dims"]["32"]["main_score"]
    )
    metrics = result["scores"]["test"][0]
    assert metrics["main_score"] == metrics[KINDS[kind].main_score]
    if kind == "bitext":
        assert [part["hf_subset"] for part in result["scores"]["test"]] == ["deu-eng", "fra-eng"]


def test_instructions_reach_the_texts(embedder, eight):
    """The prompt is the checkpoint's template around the instruction, and it is recorded."""
    plain = evaluate_task(embedder, order(eight, "sts"), [32])
    said = evaluate_task(embedder, order(eight, "sts", query_instruction="Compare"), [32])
    assert said["kalm_min"]["used"]["prompts"]["query"] == "Instruct: Compare \n Query: "
    assert said["kalm_min"]["used"]["prompts"]["document"] == ""
    assert said["kalm_min"]["used"]["dtype"] == "float32"
    assert plain["main_score"] != said["main_score"]


def test_a_score_that_is_no_number_is_an_error(embedder, datasets):
    """Average precision of three classes does not exist; the task fails instead of passing."""
    (datasets / "classification" / "task.toml").write_text('main_metric = "ap"')
    with pytest.raises(ValueError, match="main score is not a number"):
        evaluate_task(embedder, order(datasets, "classification"), [32])
