"""Datasets in folders: recognised, checked row by row, identified by their content, run as tasks.

The eight types are run as a worker runs them, against mteb with sentence-transformers.
"""

import gzip
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kalm_min import Embedder
from kalm_min.evaluation.local import KINDS, build_task, find_datasets
from kalm_min.evaluation.worker import evaluate_task


def append(path, line):
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def test_every_type_is_read_off_files_and_columns(eight):
    """Promise: the task type needs no configuration."""
    found = find_datasets(eight)
    assert {task.name: task.type for task in found} == {k: one.type for k, one in KINDS.items()}
    assert all(task.characters for task in found)
    assert find_datasets(eight / "sts") == [task for task in found if task.name == "sts"]


def test_gzipped_files_and_bitext_in_one_file(datasets):
    """.jsonl.gz is read like .jsonl; pairs in test.jsonl are bitext only if task.toml says so."""
    plain = datasets / "bitext" / "deu-eng.jsonl"
    (datasets / "one").mkdir()
    (datasets / "one" / "test.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (datasets / "one" / "task.toml").write_text('type = "bitext"')
    assert find_datasets(datasets / "one")[0].type == "BitextMining"


@pytest.mark.parametrize("name", ["test", "dev", "validation", "part-1"])
def test_pairs_without_scores_are_not_taken_for_translations(datasets, name):
    """Bug to avoid: an STS file whose scores were forgotten, scored 100 as bitext mining."""
    rows = map(json.loads, (datasets / "sts" / "test.jsonl").read_text().splitlines())
    lines = [json.dumps({k: v for k, v in row.items() if k != "score"}) for row in rows]
    (datasets / "sts" / "test.jsonl").unlink()
    (datasets / "sts" / f"{name}.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=re.escape('type = "bitext" in task.toml')) as error:
        find_datasets(datasets / "sts")
    assert f"found {name}.jsonl with sentence1, sentence2" in str(error.value)
    with_scores = datasets / "sts" / f"{name}.jsonl"
    with_scores.rename(datasets / "sts" / "deu-eng.jsonl")
    assert find_datasets(datasets / "sts")[0].type == "BitextMining"


LABELS = st.lists(st.sampled_from([0, 1, 2, "0", "1", "2", "cat"]), min_size=1, max_size=6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(train=LABELS, test=LABELS)
def test_labels_that_cannot_be_learnt_are_told_while_planning(tmp_path, train, test):
    """Bug to avoid: accuracy 0 because one file has numbers and the other texts."""
    for part, labels in (("train", train), ("test", test)):
        rows = "".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels)
        (tmp_path / f"{part}.jsonl").write_text(rows)
    strange = dict.fromkeys(map(json.dumps, (label for label in test if label not in train)))
    if len(set(train)) > 1 and not strange:
        assert find_datasets(tmp_path)[0].type == "Classification"
        return
    with pytest.raises(ValueError, match="malformed row") as error:
        find_datasets(tmp_path)
    for label in strange:
        line = f"test.jsonl:{1 + [*map(json.dumps, test)].index(label)}: expected a label of train"
        assert line in str(error.value)
        assert f", found {label}" in str(error.value)
    assert ("expected at least two labels" in str(error.value)) == (len(set(train)) == 1)


def test_a_pair_judged_twice(datasets):
    """The same score twice is one judgement; two scores are an error with its line."""
    path = datasets / "retrieval" / "qrels" / "test.tsv"
    before, again = path.read_text(), path.read_text().splitlines()[1]
    path.write_text(before + again + "\n")
    assert find_datasets(datasets / "retrieval")
    path.write_text(before + again.rpartition("\t")[0] + "\t7\n")
    with pytest.raises(ValueError, match=r"test\.tsv:12: expected one score of '0' and 'd\d+'"):
        find_datasets(datasets / "retrieval")


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
    assert (dataset.type, dataset.main_score) == ("Clustering", "ami")
    assert dataset.instruction.query == dataset.instruction.document == "Group these"
    assert dataset.symmetric
    assert dataset.languages == ("eng-Latn",)


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
