"""Datasets of one's own as mteb tasks, so that mteb scores them like any other.

One builder per type turns the rows that `local_data` checked into the shapes mteb expects. Two of
mteb's habits are kept on purpose: labels are numbers (a binary score needs to know the positive
class) and reranking candidates carry mteb's own ids (ties fall by id). One is not: clustering reads
every text, where mteb's default takes 4 % of them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kalm_min.evaluation.local_data import KINDS, LocalDataset, Rows, read_dataset

# mteb class, attributes of ours, data: {subset: {split: ...}} or {split: ...}
_Parts = tuple[type, dict[str, Any], Any]


def build_task(folder: Path) -> Any:
    """The mteb task of a dataset folder, its data loaded. Raises ValueError for malformed rows."""
    problems: list[str] = []
    dataset, rows = read_dataset(folder, problems)
    if problems:
        raise ValueError(problems[0])
    base, attributes, data = _BUILDERS[dataset.kind](rows)
    subsets = list(data) if dataset.kind == "bitext" and list(data) != ["test"] else []
    attributes["metadata"] = _metadata(dataset, subsets)
    task = type(dataset.name, (base,), attributes)()
    task.dataset, task.data_loaded = data, True
    return task


def _metadata(dataset: LocalDataset, subsets: list[str]) -> Any:
    from mteb import TaskMetadata

    languages = list(dataset.languages)
    return TaskMetadata(
        name=dataset.name,
        description=f"a {dataset.kind} dataset in a folder",
        type=KINDS[dataset.kind].type,  # pyright: ignore[reportArgumentType] -- one of its literals
        main_score=dataset.main_score,
        dataset={"path": f"local/{dataset.name}", "revision": dataset.revision},
        eval_splits=["test"],
        eval_langs=dict.fromkeys(subsets, languages) if subsets else languages,
    )


def _columns(rows: Rows, **names: str) -> Any:
    """A Dataset of the given columns (new name = name in the rows)."""
    from datasets import Dataset

    return Dataset.from_dict({new: [row[old] for row in rows] for new, old in names.items()})


def _retrieval(rows: dict[str, Rows]) -> _Parts:
    relevant: dict[str, dict[str, int]] = {}
    for row in rows["qrels"]:
        relevant.setdefault(row["query-id"], {})[row["corpus-id"]] = row["score"]
    for row in rows["corpus"] + rows["queries"]:
        row |= {"_id": str(row["_id"]), "title": row["title"] or ""}  # mteb takes no None
    return _search_task(rows["corpus"], rows["queries"], relevant, None)


def _reranking(rows: dict[str, Rows]) -> _Parts:
    queries: Rows = []
    corpus: Rows = []
    relevant: dict[str, dict[str, int]] = {}
    for number, row in enumerate(rows["test"]):
        query = f"test_query{number}"
        queries.append({"_id": query, "text": row["query"]})
        relevant[query] = {}
        for column, prefix in (("positive", "apositive"), ("negative", "negative")):
            for place, text in enumerate(row[column]):
                document = f"{prefix}_{query}_{place:05}"
                corpus.append({"_id": document, "title": "", "text": text})
                relevant[query][document] = int(column == "positive")
    return _search_task(corpus, queries, relevant, {q: list(docs) for q, docs in relevant.items()})


def _search_task(
    corpus: Rows,
    queries: Rows,
    relevant: dict[str, dict[str, int]],
    candidates: dict[str, list[str]] | None,
) -> _Parts:
    from mteb.abstasks import AbsTaskRetrieval

    split = {
        "corpus": _columns(corpus, id="_id", title="title", text="text"),
        "queries": _columns(queries, id="_id", text="text"),
        "relevant_docs": relevant,
        "top_ranked": candidates,
    }
    return AbsTaskRetrieval, {}, {"default": {"test": split}}


def _sts(rows: dict[str, Rows]) -> _Parts:
    from mteb.abstasks import AbsTaskSTS

    scores = [row["score"] for row in rows["test"]]
    data = _columns(rows["test"], sentence1="sentence1", sentence2="sentence2", score="score")
    return AbsTaskSTS, {"min_score": min(scores), "max_score": max(scores)}, {"test": data}


def _pair(rows: dict[str, Rows]) -> _Parts:
    from mteb.abstasks import AbsTaskPairClassification

    data = _columns(rows["test"], sentence1="sentence1", sentence2="sentence2", labels="label")
    return AbsTaskPairClassification, {}, {"test": data}


def _number_labels(rows: dict[str, Rows]) -> None:
    """Replace every label by its place in sorted order, numbers before texts."""
    labels = {row["label"] for part in rows.values() for row in part}
    order = sorted(labels, key=lambda label: (isinstance(label, str), label))
    places = {label: place for place, label in enumerate(order)}
    for part in rows.values():
        for row in part:
            row["label"] = places[row["label"]]


def _classification(rows: dict[str, Rows]) -> _Parts:
    from datasets import DatasetDict
    from mteb.abstasks import AbsTaskClassification

    _number_labels(rows)
    parts = DatasetDict()
    for name, part in rows.items():
        parts[name] = _columns(part, text="text", label="label")
    return AbsTaskClassification, {}, parts


def _clustering(rows: dict[str, Rows]) -> _Parts:
    from mteb.abstasks import AbsTaskClustering

    _number_labels(rows)
    data = _columns(rows["test"], sentences="text", labels="label")
    return AbsTaskClustering, {"max_fraction_of_documents_to_embed": None}, {"test": data}


def _summarization(rows: dict[str, Rows]) -> _Parts:
    from mteb.abstasks import AbsTaskSummarization

    scores = [score for row in rows["test"] for score in row["relevance"]]
    data = _columns(rows["test"], **{name: name for name in KINDS["summarization"].columns})
    return (
        AbsTaskSummarization,
        {"min_score": min(scores), "max_score": max(scores)},
        {"test": data},
    )


def _bitext(rows: dict[str, Rows]) -> _Parts:
    from mteb.abstasks import AbsTaskBitextMining

    data = {
        name: _columns(pairs, sentence1="sentence1", sentence2="sentence2")
        for name, pairs in rows.items()
    }
    if list(data) != ["test"]:  # A subset for each language pair.
        data = {name: {"test": part} for name, part in data.items()}
    return AbsTaskBitextMining, {}, data


_BUILDERS: dict[str, Callable[[dict[str, Rows]], _Parts]] = {
    "retrieval": _retrieval,
    "reranking": _reranking,
    "sts": _sts,
    "pair": _pair,
    "classification": _classification,
    "clustering": _clustering,
    "summarization": _summarization,
    "bitext": _bitext,
}
