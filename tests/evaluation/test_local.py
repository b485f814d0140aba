"""Datasets in folders: recognised, checked row by row, identified by their content, run as tasks.

The eight types are run as a worker runs them, against mteb with sentence-transformers.
"""

import gzip
import json
import re

import pytest

from kalm_min import Embedder
from kalm_min.evaluation.local import KINDS, build_task, find_datasets
from kalm_min.evaluation.worker import evaluate_task


def append(path, line):
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def test_every_type_is_read_off_files_and_columns(eight):
    """Promise: the task type needs no configuration."""
    found = find_datasets(eight)
    assert {dataset.name: dataset.kind for dataset in found} == {kind: kind for kind in KINDS}
    assert all(dataset.texts and dataset.characters for dataset in found)
    assert find_datasets(eight / "sts") == [dataset for dataset in found if dataset.kind == "sts"]


def test_gzipped_files_and_bitext_in_one_file(datasets):
    """.jsonl.gz is read like .jsonl; sentence pairs without label or score are bitext."""
    plain = datasets / "bitext" / "deu-eng.jsonl"
    (datasets / "one").mkdir()
    (datasets / "one" / "test.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert find_datasets(datasets / "one")[0].kind == "bitext"


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("sts/test.jsonl", "{oops", r"sts/test.jsonl:41: expected a JSON object"),
        (
            "sts/test.jsonl",
            '{"sentence1": "a", "score": 1}',
            ":41: expected 'sentence2' to be a text",
        ),
        (
            "sts/test.jsonl",
            '{"sentence1": "a", "sentence2": "b", "score": NaN}',
            ":41: expected 'score' to be a number, found NaN",
        ),
        (
            "pair/test.jsonl",
            '{"sentence1": "a", "sentence2": "\\ud800", "label": 1}',
            ":41: expected 'sentence2' to be a text",
        ),
        (
            "pair/test.jsonl",
            '{"sentence1": "a", "sentence2": "b", "label": 2}',
            ":41: expected 'label' to be 0 or 1, found 2",
        ),
        (
            "reranking/test.jsonl",
            '{"query": "q", "positive": [], "negative": []}',
            ":11: expected 'positive'",
        ),
        (
            "retrieval/corpus.jsonl",
            '{"_id": "d3", "text": "x"}',
            ":61: _id: expected a new one, found 'd3' a second time",
        ),
        ("retrieval/qrels/test.tsv", "1\td1", ":12: expected query id, document id"),
        ("retrieval/qrels/test.tsv", "1\tnowhere\t1", ":12: expected an _id of corpus.jsonl"),
        ("classification/train.jsonl", '{"text": "a", "label": true}', ":46: expected 'label'"),
        (
            "summarization/test.jsonl",
            '{"text": "", "human_summaries": [""], "machine_summaries": [""], "relevance": [1, 2]}',
            ":7: relevance: expected one number for each of 1",
        ),
    ],
)
def test_a_malformed_row_is_told_by_file_and_line(datasets, file, line, complaint):
    """Promise: every malformed row is a file:line error before a model is loaded."""
    append(datasets / file, line)
    with pytest.raises(ValueError, match=re.escape(complaint.split(": ")[0])) as error:
        find_datasets(datasets)
    assert complaint in str(error.value)
    assert "1 malformed row:" in str(error.value)


def test_all_malformed_rows_are_counted(datasets):
    """One bad line hides no other, in the same dataset or another."""
    for _ in range(30):
        append(datasets / "sts" / "test.jsonl", "[]")
    append(datasets / "pair" / "test.jsonl", "{}")
    with pytest.raises(ValueError, match="31 malformed rows") as error:
        find_datasets(datasets)
    assert str(error.value).count("\n") == 20


@pytest.mark.parametrize("content", ["", '{"question": "q", "answer": "a"}\n'])
def test_a_folder_that_is_no_dataset(tmp_path, content):
    """One sentence names what was expected and what was found."""
    with pytest.raises(ValueError, match=r"expected corpus.jsonl, .* found neither"):
        find_datasets(tmp_path)
    (tmp_path / "test.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"expected corpus.jsonl, .*; found test.jsonl") as error:
        find_datasets(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="expected a folder"):
        find_datasets(tmp_path / "nowhere")


def test_a_missing_file_is_named(datasets):
    (datasets / "retrieval" / "qrels" / "test.tsv").unlink()
    with pytest.raises(ValueError, match=r"qrels/test.tsv: expected this file of a retrieval"):
        find_datasets(datasets)


def test_task_toml_overrides(datasets):
    """type, instruction, symmetric, languages and main_metric are the user's to say."""
    toml = datasets / "classification" / "task.toml"
    toml.write_text(
        'type = "clustering"\ninstruction = "Group these"\nsymmetric = true\n'
        'languages = ["eng-Latn"]\nmain_metric = "ami"\n'
    )
    (dataset,) = find_datasets(datasets / "classification")
    assert (dataset.kind, dataset.main_score, dataset.instruction) == (
        "clustering",
        "ami",
        "Group these",
    )
    assert dataset.symmetric
    assert dataset.languages == ["eng-Latn"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('instuction = "x"', "did you mean instruction?"),
        ('type = "search"', "expected 'type' to be one of retrieval"),
        ('languages = ["english"]', "expected 'languages' to be a list of codes"),
        ('main_metric = "ndcg_at_10"', "expected a score of sts such as cosine_spearman"),
        ("type =", "expected TOML"),
    ],
)
def test_task_toml_errors(datasets, line, complaint):
    (datasets / "sts" / "task.toml").write_text(line)
    with pytest.raises(ValueError, match=r"task\.toml") as error:
        find_datasets(datasets / "sts")
    assert complaint in str(error.value)


def test_the_revision_follows_the_content(datasets):
    """Bug to avoid: an old score reused for changed data or a changed task.toml."""
    seen = [find_datasets(datasets / "sts")[0].revision]
    (datasets / "sts" / "dev.jsonl").write_text("not read, so not counted")
    assert find_datasets(datasets / "sts")[0].revision == seen[0]
    append(datasets / "sts" / "test.jsonl", '{"sentence1": "a", "sentence2": "b", "score": 1}')
    seen.append(find_datasets(datasets / "sts")[0].revision)
    (datasets / "sts" / "task.toml").write_text("symmetric = true")
    seen.append(find_datasets(datasets / "sts")[0].revision)
    assert len(set(seen)) == 3


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


def order(folder, name, store, **instructions):
    key = {"query_instruction": "", "document_instruction": "", "checkpoint": "c"} | instructions
    kind = KINDS[name].type
    return {
        "name": name,
        "type": kind,
        "folder": str(folder / name),
        "key": key,
        "store": str(store),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_those_of_sentence_transformers(mteb, embedder, peers, eight, tmp_path, kind):
    """Promise: the same main score to 1e-4, at each dimension, in mteb's own file format."""
    from mteb.results import TaskResult

    result = json.loads(json.dumps(evaluate_task(embedder, order(eight, kind, tmp_path), [32, 8])))
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


@pytest.mark.filterwarnings("ignore")
def test_instructions_reach_the_texts(embedder, eight, tmp_path):
    """The prompt is the checkpoint's template around the instruction, and it is recorded."""
    plain = evaluate_task(embedder, order(eight, "sts", tmp_path), [32])
    said = evaluate_task(embedder, order(eight, "sts", tmp_path, query_instruction="Compare"), [32])
    assert said["kalm_min"]["used"]["prompts"]["query"] == "Instruct: Compare \n Query: "
    assert said["kalm_min"]["used"]["prompts"]["document"] == ""
    assert said["kalm_min"]["used"]["dtype"] == "float32"
    assert plain["main_score"] != said["main_score"]


@pytest.mark.filterwarnings("ignore")
def test_a_score_that_is_no_number_is_an_error(embedder, datasets, tmp_path):
    """There is no average precision of three classes, so the task fails instead of passing."""
    (datasets / "classification" / "task.toml").write_text('main_metric = "ap"')
    with pytest.raises(ValueError, match="main score is not a number"):
        evaluate_task(embedder, order(datasets, "classification", tmp_path / "store"), [32])
