"""Evaluation datasets in local folders: recognised, checked row by row, given to mteb as tasks.

    retrieval       corpus.jsonl (_id, title, text), queries.jsonl (_id, text), qrels/test.tsv
    reranking       test.jsonl   query, positive [texts], negative [texts]
    sts             test.jsonl   sentence1, sentence2, score
    pair            test.jsonl   sentence1, sentence2, label (0 or 1)
    classification  train.jsonl and test.jsonl   text, label
    clustering      test.jsonl alone             text, label
    summarization   test.jsonl   text, human_summaries, machine_summaries, relevance
    bitext          one file per language pair (or test.jsonl)   sentence1, sentence2

The type is read off the files and the columns of the first row; a `task.toml` beside them may set
`type`, `instruction`, `symmetric`, `languages`, `main_metric`. `.jsonl.gz` is read too. Everything is
checked while planning, before a model is loaded; mteb is imported only to build a task.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kalm_min.data.records import (
    Field,
    is_flag,
    is_label,
    is_number,
    is_string,
    list_problems,
    read_rows,
    read_settings,
)
from kalm_min.files import hash_files, read_jsonl

if TYPE_CHECKING:
    from datasets import Dataset
    from mteb import AbsTask

_UNKNOWN_LANGUAGE = "und-Zyyy"  # ISO 639-3 and 15924 for an undetermined language

Rows = list[dict[str, Any]]

_TEXT = Field("a text", is_string, required=True)
_TEXTS = Field("a list of at least one text", is_string, items=1, required=True)
_ANY_TEXTS = Field("a list of texts", is_string, items=0, required=True)
_LABEL = Field("a text or a whole number", is_label, required=True)
_BINARY = Field("0 or 1", lambda value: is_number(value) and value in (0, 1), required=True)
_NUMBER = Field("a number", is_number, required=True)
_NUMBERS = Field("a list of numbers", is_number, items=1, required=True)
_PAIR = {"sentence1": _TEXT, "sentence2": _TEXT}
_LABELLED = {"text": _TEXT, "label": _LABEL}
_DOCUMENT = {"_id": _LABEL, "title": Field("a text", is_string), "text": _TEXT}
_CANDIDATES = {"query": _TEXT, "positive": _TEXTS, "negative": _ANY_TEXTS}
_SUMMARIES = {
    "text": _TEXT,
    "human_summaries": _TEXTS,
    "machine_summaries": _TEXTS,
    "relevance": _NUMBERS,
}
_RANKED = r"(ndcg|map|recall|precision|mrr|hit_rate)_at_(1|3|5|10|20|100|1000)"
_CLASSES = r"accuracy|(f1|precision|recall)(_weighted)?|ap(_weighted)?"
_BEST = r"(max|similarity|cosine|dot|euclidean|manhattan)_(ap|accuracy|f1|precision|recall)"
_CORRELATION = r"((cosine|euclidean|manhattan)_)?(spearman|pearson)"


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of task: mteb's name, its usual main score, a pattern of all its scores, the columns."""

    type: str
    main_score: str
    scores: str
    columns: Mapping[str, Field]


KINDS = {
    "retrieval": Kind("Retrieval", "ndcg_at_10", _RANKED, _DOCUMENT),
    "reranking": Kind("Reranking", "map_at_1000", _RANKED, _CANDIDATES),
    "sts": Kind("STS", "cosine_spearman", _CORRELATION, _PAIR | {"score": _NUMBER}),
    "pair": Kind("PairClassification", "max_ap", _BEST, _PAIR | {"label": _BINARY}),
    "classification": Kind("Classification", "accuracy", _CLASSES, _LABELLED),
    "clustering": Kind("Clustering", "v_measure", "v_measure|ami", _LABELLED),
    "summarization": Kind(
        "Summarization", "cosine_spearman", r"((cosine|dot)_)?(spearman|pearson)", _SUMMARIES
    ),
    "bitext": Kind("BitextMining", "f1", "f1|accuracy|precision|recall", _PAIR),
}
_SETTINGS = {
    "type": Field("one of " + ", ".join(KINDS), lambda value: value in list(KINDS)),
    "instruction": Field("a text", is_string),
    "symmetric": Field("true or false", is_flag),
    "languages": Field(
        'a list of codes like "eng-Latn"',
        lambda code: bool(re.fullmatch(r"[a-z]{3}-[A-Z][a-z]{3}", str(code))),
        items=1,
    ),
    "main_metric": Field("a text", is_string),
}
_EXPECTED = (
    "expected corpus.jsonl, queries.jsonl and qrels/test.tsv, or test.jsonl with "
    + ", or ".join(
        f"{', '.join(kind.columns)} ({name})" for name, kind in KINDS.items() if name != "retrieval"
    )
)


@dataclass(frozen=True, slots=True)
class LocalDataset:
    """A dataset folder whose every row was read and found good."""

    name: str
    path: Path
    kind: str
    revision: str
    """A hash of every file that counts."""
    texts: int
    characters: int
    main_score: str
    instruction: str | None = None
    symmetric: bool = False
    """The instruction belongs on the documents too (retrieval, reranking)."""
    languages: tuple[str, ...] = ()


def find_datasets(path: Path) -> list[LocalDataset]:
    """Read and check a dataset folder, or every dataset in a folder of folders.

    Raises ValueError: one sentence for a folder that cannot be understood; for malformed rows their
    number and up to 20 lines `file:line: expected ..., found ...`.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: expected a folder of evaluation data, found none")
    folders = [path]
    if not _jsonl_files(path) and not (path / "task.toml").is_file():
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise ValueError(f"{path}: {_EXPECTED}, or folders of these; found neither")
    problems: list[str] = []
    datasets = [read_dataset(folder, problems)[0] for folder in folders]
    if problems:
        raise ValueError(f"{path}: {list_problems(len(problems), 'malformed row', problems)}")
    return datasets


def read_dataset(folder: Path, problems: list[str]) -> tuple[LocalDataset, dict[str, Rows]]:
    """Read one dataset; what is wrong with its rows is added to `problems`.

    Returns:
        The dataset and its rows by part: corpus, queries, qrels, train, test or a language pair.
    """
    toml = folder / "task.toml"
    settings = read_settings(toml, _SETTINGS) if toml.is_file() else {}
    settings |= {"languages": tuple(settings.get("languages", (_UNKNOWN_LANGUAGE,)))}
    kind = settings.pop("type", None) or _recognise(folder)
    main_score = settings.pop("main_metric", KINDS[kind].main_score)
    if not re.fullmatch(KINDS[kind].scores, main_score):
        raise ValueError(
            f"{toml}: main_metric: expected a score of {kind} such as "
            f"{KINDS[kind].main_score}, found {main_score!r}"
        )
    files = _files(folder, kind)
    rows = _read_rows(files, kind, problems)
    encoded = [
        value
        for part in rows.values()
        for row in part
        for column, value in row.items()
        if not column.endswith(("id", "label"))
    ]
    texts = [text for value in encoded for text in (value if isinstance(value, list) else [value])]
    lengths = [len(text) for text in texts if isinstance(text, str)]
    dataset = LocalDataset(
        name=folder.resolve().name,
        path=folder.resolve(),
        kind=kind,
        revision=hash_files((p.name, p) for p in [*files.values(), toml] if p.is_file()),
        texts=len(lengths),
        characters=sum(lengths),
        main_score=main_score,
        **settings,
    )
    return dataset, rows


def _recognise(folder: Path) -> str:
    """The type of a dataset, from its files and the columns of the first row."""
    parts = _jsonl_files(folder)
    if {"corpus", "queries"} <= parts.keys():
        return "retrieval"
    columns = {
        name: next((set(row) for _, row in read_jsonl(path, [])), set())
        for name, path in parts.items()
    }
    for name, kind in KINDS.items():
        # In this order: classification before clustering, which has its columns; bitext last.
        fits = kind.columns.keys() <= columns.get("test", set()) and name != "retrieval"
        if fits and (name != "classification" or "train" in parts):
            return name
    if columns and "test" not in columns and all(_PAIR.keys() <= c for c in columns.values()):
        return "bitext"
    found = [f"{path.name} with {', '.join(columns[name])}" for name, path in parts.items()]
    raise ValueError(f"{folder}: {_EXPECTED}; found {'; '.join(found) or 'no .jsonl file'}")


def _jsonl_files(folder: Path) -> dict[str, Path]:
    """Name without suffix -> data file, sorted; a plain file wins over its gzipped twin."""
    paths = [*sorted(folder.glob("*.jsonl.gz")), *sorted(folder.glob("*.jsonl"))]
    return dict(sorted((path.name.partition(".jsonl")[0], path) for path in paths))


def _files(folder: Path, kind: str) -> dict[str, Path]:
    """Part -> file. Raises ValueError for a missing one."""
    parts = _jsonl_files(folder)
    if kind == "bitext" and parts and "test" not in parts:
        return parts
    wanted = {"retrieval": ["corpus", "queries"], "classification": ["train", "test"]}
    files = {name: parts.get(name, folder / f"{name}.jsonl") for name in wanted.get(kind, ["test"])}
    if kind == "retrieval":
        files["qrels"] = folder / "qrels" / "test.tsv"
    for path in files.values():
        if not path.is_file():
            raise ValueError(f"{path}: expected this file of a {kind} dataset, found none")
    return files


def _read_rows(files: dict[str, Path], kind: str, problems: list[str]) -> dict[str, Rows]:
    """Every row with its line number, checked by itself and then against the others."""
    before = len(problems)
    rows: dict[str, Rows] = {}
    columns = KINDS[kind].columns
    for part, path in files.items():
        if part == "qrels":
            rows[part] = _read_qrels(path, problems)
        else:
            rows[part] = [
                {column: row.get(column) for column in columns} | {"line": number}
                for number, row in read_rows(path, columns, problems)
            ]
        if not rows[part] and len(problems) == before:
            problems.append(f"{path}:1: expected at least one row, found none")
    if len(problems) == before:  # then every row can be compared with the others
        problems += _check_ids(files, rows) if kind == "retrieval" else _check_values(files, rows)
    return rows


def _read_qrels(path: Path, problems: list[str]) -> Rows:
    """BEIR judgements: tab-separated query id, document id and score under a header."""
    rows: Rows = []
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            cells = line.rstrip("\r\n").split("\t")
            is_row = len(cells) == 3 and re.fullmatch(r"-?\d+", cells[2])
            if number > 1 and is_row:
                query, document, score = cells
                rows.append(
                    {"query-id": query, "corpus-id": document, "score": int(score), "line": number}
                )
            elif is_row if number == 1 else line.strip():
                expected = "a header line" if number == 1 else "query id, document id, whole number"
                problems.append(
                    f"{path}:{number}: expected {expected} (tabs), found {line.strip()!r}"
                )
    return rows


def _check_ids(files: dict[str, Path], rows: dict[str, Rows]) -> Iterator[str]:
    """Ids that clash or dangle, and judgements of which none is positive."""
    ids: dict[str, set[str]] = {"corpus": set(), "queries": set()}
    for part, seen in ids.items():
        for row in rows[part]:
            if str(row["_id"]) in seen:
                where = f"{files[part]}:{row['line']}"
                yield f"{where}: _id: expected a new one, found {row['_id']!r} a second time"
            seen.add(str(row["_id"]))
    for row in rows["qrels"]:
        for column, part in (("query-id", "queries"), ("corpus-id", "corpus")):
            if row[column] not in ids[part]:
                where = f"{files['qrels']}:{row['line']}"
                yield f"{where}: expected an _id of {part}.jsonl, found {row[column]!r}"
    if not any(row["score"] > 0 for row in rows["qrels"]):
        yield f"{files['qrels']}: expected a score above 0, found none"


def _check_values(files: dict[str, Path], rows: dict[str, Rows]) -> Iterator[str]:
    """Lists of different lengths, and columns of one value only."""
    part, first = next(iter(rows.items()))
    for row in first if "relevance" in first[0] else ():
        if len(row["relevance"]) != len(row["machine_summaries"]):
            yield (
                f"{files[part]}:{row['line']}: relevance: expected one number for each of "
                f"{len(row['machine_summaries'])} machine_summaries, found {len(row['relevance'])}"
            )
    for column in ("score", "label"):
        if column in first[0] and len({row[column] for row in first}) == 1:
            yield f"{files[part]}: {column}: expected at least two different values, found one"


def build_task(folder: Path) -> "AbsTask":
    """The mteb task of a dataset folder, its data loaded. Raises ValueError for malformed rows.

    Two habits of mteb are kept on purpose: labels are numbers (a binary score needs to know the
    positive class), and reranking candidates carry mteb's own ids (ties are broken by id). One is
    not: clustering reads every text, where mteb's default samples 4 % of them.
    """
    from datasets import DatasetDict
    from mteb import TaskMetadata, abstasks

    problems: list[str] = []
    dataset, rows = read_dataset(folder, problems)
    if problems:
        raise ValueError(problems[0])
    kind = KINDS[dataset.kind]
    attributes: dict[str, object] = {}
    subsets: list[str] = []
    if kind.scores == _RANKED:
        data = {"default": {"test": _search_data(rows, dataset.kind)}}
    else:
        if "label" in kind.columns:  # numbered in sorted order, numbers before texts
            labeled = [row for part in rows.values() for row in part]
            labels = {row["label"] for row in labeled}
            order = sorted(labels, key=lambda label: (isinstance(label, str), label))
            indices = {label: index for index, label in enumerate(order)}
            for row in labeled:
                row["label"] = indices[row["label"]]
        if column := {"sts": "score", "summarization": "relevance"}.get(dataset.kind):
            scores = np.concatenate([np.ravel(row[column]) for row in rows["test"]]).tolist()
            attributes = {"min_score": min(scores), "max_score": max(scores)}
        names = {column: column for column in kind.columns}
        if dataset.kind == "pair":
            names["label"] = "labels"
        elif dataset.kind == "clustering":
            names = {"text": "sentences", "label": "labels"}
            attributes = {"max_fraction_of_documents_to_embed": None}
        data = DatasetDict({part: _columns(rows[part], names) for part in rows})
        if dataset.kind == "bitext" and list(rows) != ["test"]:  # one subset per language pair
            subsets = list(rows)
            data = {part: {"test": pairs} for part, pairs in data.items()}
    languages = list(dataset.languages)
    attributes["metadata"] = TaskMetadata(
        name=dataset.name,
        description=f"a {dataset.kind} dataset in a folder",
        type=kind.type,  # pyright: ignore[reportArgumentType] -- one of its literals
        main_score=dataset.main_score,
        dataset={"path": f"local/{dataset.name}", "revision": dataset.revision},
        eval_splits=["test"],
        eval_langs=dict.fromkeys(subsets, languages) if subsets else languages,
    )
    name = "Retrieval" if kind.scores == _RANKED else kind.type
    task = type(dataset.name, (getattr(abstasks, f"AbsTask{name}"),), attributes)()
    task.dataset, task.data_loaded = data, True
    return task


def _columns(rows: Rows, names: Mapping[str, str]) -> "Dataset":
    """The named columns (name in the rows -> name in the Dataset)."""
    from datasets import Dataset

    return Dataset.from_dict({new: [row[old] for row in rows] for old, new in names.items()})


def _search_data(rows: dict[str, Rows], kind: str) -> dict[str, object]:
    """Retrieval as it is; reranking as retrieval among each query's own candidates."""
    corpus: Rows = rows.get("corpus", [])
    queries: Rows = rows.get("queries", [])
    relevant: dict[str, dict[str, int]] = {}
    for row in rows.get("qrels", ()):
        relevant.setdefault(row["query-id"], {})[row["corpus-id"]] = row["score"]
    for number, row in enumerate(rows.get("test", ())):
        query = f"test_query{number}"
        queries.append({"_id": query, "text": row["query"]})
        relevant[query] = {}
        for column, prefix in (("positive", "apositive"), ("negative", "negative")):
            for index, text in enumerate(row[column]):
                document = f"{prefix}_{query}_{index:05}"
                corpus.append({"_id": document, "text": text})
                relevant[query][document] = int(column == "positive")
    for row in corpus + queries:  # mteb takes neither numbers nor None
        row |= {"_id": str(row["_id"]), "title": row.get("title") or ""}
    ranked = {query: list(documents) for query, documents in relevant.items()}
    return {
        "corpus": _columns(corpus, {"_id": "id", "title": "title", "text": "text"}),
        "queries": _columns(queries, {"_id": "id", "text": "text"}),
        "relevant_docs": relevant,
        "top_ranked": ranked if kind == "reranking" else None,
    }
