"""Evaluation datasets in local folders, recognised, checked row by row, and given to mteb as tasks.

    retrieval       corpus.jsonl (_id, title, text), queries.jsonl (_id, text), qrels/test.tsv
    reranking       test.jsonl   query, positive [texts], negative [texts]
    sts             test.jsonl   sentence1, sentence2, score
    pair            test.jsonl   sentence1, sentence2, label (0 or 1)
    classification  train.jsonl and test.jsonl   text, label
    clustering      test.jsonl alone             text, label
    summarization   test.jsonl   text, human_summaries, machine_summaries, relevance
    bitext          one file per language pair (deu-eng.jsonl)   sentence1, sentence2

The type follows from the files and the columns of the first row; a `task.toml` beside them may set
`type`, `instruction`, `symmetric`, `languages`, `main_metric` (and must set the type of bitext in
files with other names). `.jsonl.gz` is read too. Everything is checked while planning, before a
model is loaded; mteb is imported only to build a task.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kalm_min import schema
from kalm_min.files import hash_files, read_jsonl, read_lines
from kalm_min.schema import Field, is_number, is_string

if TYPE_CHECKING:
    from mteb import AbsTask

Rows = list[dict[str, Any]]

_TEXTS = Field("a list of at least one text", is_string, items=1, required=True)
_LABEL = Field("a text or a whole number", schema.is_label, required=True)
_COLUMNS = {
    **dict.fromkeys(
        ("text", "query", "sentence1", "sentence2"), Field("a text", is_string, required=True)
    ),
    **dict.fromkeys(("positive", "human_summaries", "machine_summaries"), _TEXTS),
    **dict.fromkeys(("_id", "label"), _LABEL),
    "title": Field("a text", is_string),
    "negative": Field("a list of texts", is_string, items=0, required=True),
    "score": Field("a number", is_number, required=True),
    "relevance": Field("a list of numbers", is_number, items=1, required=True),
}
_BINARY = Field("0 or 1", lambda value: is_number(value) and value in (0, 1), required=True)
_RANKED = r"(ndcg|map|recall|precision|mrr|hit_rate)_at_(1|3|5|10|20|100|1000)"
_CLASSES = r"accuracy|(f1|precision|recall)(_weighted)?|ap(_weighted)?"
_BEST = r"(max|similarity|cosine|dot|euclidean|manhattan)_(ap|accuracy|f1|precision|recall)"
_CORRELATION = r"((cosine|euclidean|manhattan)_)?(spearman|pearson)"
_SUMMARY = r"((cosine|dot)_)?(spearman|pearson)"


class Kind(NamedTuple):
    """A type of task: mteb's name, usual main score, a pattern of all scores, and the columns."""

    type: str
    main_score: str
    scores: str
    columns: Mapping[str, Field]


def _columns(names: str, **others: Field) -> Mapping[str, Field]:
    return {name: others.get(name) or _COLUMNS[name] for name in names.split()}


_SCORED, _LABELLED = _columns("sentence1 sentence2 score"), _columns("text label")
_PAIR = _columns("sentence1 sentence2 label", label=_BINARY)
_SUMMARIES = _columns("text human_summaries machine_summaries relevance")
# The order matters: classification before clustering, which has its columns; bitext last.
KINDS = {
    "retrieval": Kind("Retrieval", "ndcg_at_10", _RANKED, _columns("_id title text")),
    "reranking": Kind("Reranking", "map_at_1000", _RANKED, _columns("query positive negative")),
    "sts": Kind("STS", "cosine_spearman", _CORRELATION, _SCORED),
    "pair": Kind("PairClassification", "max_ap", _BEST, _PAIR),
    "classification": Kind("Classification", "accuracy", _CLASSES, _LABELLED),
    "clustering": Kind("Clustering", "v_measure", "v_measure|ami", _LABELLED),
    "summarization": Kind("Summarization", "cosine_spearman", _SUMMARY, _SUMMARIES),
    "bitext": Kind(
        "BitextMining", "f1", "f1|accuracy|precision|recall", _columns("sentence1 sentence2")
    ),
}
_SETTINGS = {
    "type": Field("one of " + ", ".join(KINDS), lambda value: value in list(KINDS)),
    "instruction": Field("a text", is_string),
    "symmetric": Field("true or false", schema.is_flag),
    "languages": Field(
        'a list of codes like "eng-Latn"',
        lambda code: bool(re.fullmatch(r"[a-z]{3}-[A-Z][a-z]{3}", str(code))),
        items=1,
    ),
    "main_metric": Field("a text", is_string),
}
_LANGUAGES = re.compile(r"[a-z]{2,3}([-_][A-Z][a-z]{3})?[-_][a-z]{2,3}([-_][A-Z][a-z]{3})?")
_EXPECTED = "expected corpus.jsonl, queries.jsonl and qrels/test.tsv, or test.jsonl with "
_EXPECTED += ", or ".join(
    f"{', '.join(kind.columns)} ({name})" for name, kind in list(KINDS.items())[1:-1]
)
_EXPECTED += (
    ', or deu-eng.jsonl with sentence1, sentence2 (bitext, or type = "bitext" in task.toml)'
)


@dataclass(frozen=True, slots=True)
class LocalDataset:
    """A dataset folder in which every row was read and found valid."""

    name: str
    path: Path
    kind: str
    revision: str  # a hash of every relevant file
    texts: int
    characters: int
    main_score: str
    instruction: str | None = None
    symmetric: bool = False  # documents get the instruction too (retrieval, reranking)
    languages: Sequence[str] = ("und-Zyyy",)  # ISO 639-3 and 15924: undetermined


def find_datasets(path: Path) -> list[LocalDataset]:
    """Read and check a dataset folder, or every dataset in a folder of folders.

    Raises ValueError: one sentence for a folder that is not recognised; for malformed rows, their
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
        listed = schema.list_problems(len(problems), "malformed row", problems)
        raise ValueError(f"{path}: {listed}")
    return datasets


def read_dataset(folder: Path, problems: list[str]) -> tuple[LocalDataset, dict[str, Rows]]:
    """Read one dataset; errors in its rows are appended to `problems`.

    Returns the dataset and its rows by part: corpus, queries, qrels, train, test or a language pair.
    """
    toml = folder / "task.toml"
    settings = schema.read_settings(toml, _SETTINGS) if toml.is_file() else {}
    kind, files = _find_files(folder, settings.pop("type", None))
    main_score = settings.pop("main_metric", KINDS[kind].main_score)
    if not re.fullmatch(KINDS[kind].scores, main_score):
        usual = f"a score of {kind} such as {KINDS[kind].main_score}"
        raise ValueError(f"{toml}: main_metric: expected {usual}, found {main_score!r}")
    before, columns = len(problems), KINDS[kind].columns
    rows: dict[str, Rows] = {}
    for part, path in files.items():
        if part == "qrels":
            rows[part] = _read_qrels(path, problems)
        else:
            rows[part] = [
                {column: row.get(column) for column in columns} | {"line": number}
                for number, row in schema.read_rows(path, columns, problems)
            ]
        if not rows[part] and len(problems) == before:
            problems.append(f"{path}:1: expected at least one row, found none")
    if len(problems) == before:  # only then can rows be compared with one another
        problems += _check_rows(files, rows)
    lengths = [
        len(text)
        for row in chain.from_iterable(rows.values())
        for column, value in row.items()
        for text in (value if isinstance(value, list) else [value])
        if isinstance(text, str) and not column.endswith(("id", "label"))
    ]
    path, texts, characters = folder.resolve(), len(lengths), sum(lengths)
    revision = hash_files((p.name, p) for p in [*files.values(), toml] if p.is_file())
    required = (path.name, path, kind, revision, texts, characters, main_score)
    return LocalDataset(*required, **settings), rows


def _jsonl_files(folder: Path) -> dict[str, Path]:
    """Map names without suffix to data files, sorted; a plain file precedes its gzipped copy."""
    paths = [*sorted(folder.glob("*.jsonl.gz")), *sorted(folder.glob("*.jsonl"))]
    return dict(sorted((path.name.partition(".jsonl")[0], path) for path in paths))


def _find_files(folder: Path, kind: str | None) -> tuple[str, dict[str, Path]]:
    """The type, recognised unless it is given, and the file of each part."""
    parts = _jsonl_files(folder)
    kind = kind or _recognise(folder, parts)
    if kind == "bitext" and parts and "test" not in parts:
        return kind, parts
    names = {"retrieval": ["corpus", "queries"], "classification": ["train", "test"]}
    files = {name: parts.get(name, folder / f"{name}.jsonl") for name in names.get(kind, ["test"])}
    if kind == "retrieval":
        files["qrels"] = folder / "qrels" / "test.tsv"
    for path in files.values():
        if not path.is_file():
            raise ValueError(f"{path}: expected this file of a {kind} dataset, found none")
    return kind, files


def _recognise(folder: Path, parts: dict[str, Path]) -> str:
    """The type of a dataset, from its files and the columns of the first row of each."""
    if {"corpus", "queries"} <= parts.keys():
        return "retrieval"
    firsts = {name: next((row for _, row in read_jsonl(p, [])), {}) for name, p in parts.items()}
    for name, kind in list(KINDS.items())[1:-1]:
        fits = kind.columns.keys() <= firsts.get("test", {}).keys()
        if fits and (name != "classification" or "train" in parts):
            return name
    # Pairs alone may also be a dataset whose scores or labels were forgotten.
    pair, judged = KINDS["bitext"].columns.keys(), {"score", "label"}
    if parts and all(
        _LANGUAGES.fullmatch(name) and pair <= row.keys() and not judged & row.keys()
        for name, row in firsts.items()
    ):
        return "bitext"
    found = "; ".join(f"{path.name} with {', '.join(firsts[n])}" for n, path in parts.items())
    raise ValueError(f"{folder}: {_EXPECTED}; found {found or 'no .jsonl file'}")


def _read_qrels(path: Path, problems: list[str]) -> Rows:
    """BEIR judgements: tab-separated query id, document id and score under a header."""
    rows: Rows = []
    for number, line in enumerate(read_lines(path), start=1):
        cells = line.split("\t")
        is_row = len(cells) == 3 and re.fullmatch(r"-?[0-9]{1,9}", cells[2]) is not None
        if is_row and number > 1:
            query, document, score = cells
            row = {"query-id": query, "corpus-id": document, "score": int(score)}
            rows.append(row | {"line": number})
        elif is_row or (number > 1 and line.strip()):
            expected = "a header line" if is_row else "query id, document id, whole number"
            found = f"(tabs), found {line.strip()!r}"
            problems.append(f"{path}:{number}: expected {expected} {found}")
    return rows


def _check_rows(files: dict[str, Path], rows: dict[str, Rows]) -> Iterator[str]:
    """Find what is wrong between rows: ids, judgements, lists of unequal length, and labels."""
    ids: dict[str, set[str]] = {"corpus": set(), "queries": set()}
    judged: dict[tuple[str, str], int] = {}
    for part, row in ((part, row) for part, group in rows.items() for row in group):
        where = f"{files[part]}:{row['line']}"
        if part in ids:
            if str(row["_id"]) in ids[part]:
                yield f"{where}: _id: expected a new one, found {row['_id']!r} a second time"
            ids[part].add(str(row["_id"]))
        elif part == "qrels":
            for column, target in (("query-id", "queries"), ("corpus-id", "corpus")):
                if row[column] not in ids[target]:
                    yield f"{where}: expected an _id of {target}.jsonl, found {row[column]!r}"
            score = judged.setdefault((row["query-id"], row["corpus-id"]), row["score"])
            if score != row["score"]:
                pair = f"{row['query-id']!r} and {row['corpus-id']!r}"
                yield f"{where}: expected one score of {pair}, found {row['score']} after {score}"
        elif "relevance" in row and len(row["relevance"]) != len(row["machine_summaries"]):
            expected = f"one number for each of {len(row['machine_summaries'])} machine_summaries"
            yield f"{where}: relevance: expected {expected}, found {len(row['relevance'])}"
    if "qrels" in rows and all(score <= 0 for score in judged.values()):
        yield f"{files['qrels']}: expected a score above 0, found none"
    if "train" in rows:
        known = [
            json.dumps(label) for label in dict.fromkeys(row["label"] for row in rows["train"])
        ]
        if len(known) < 2:
            yield f"{files['train']}: expected at least two labels, found only {known[0]}"
        listed = ", ".join(known[:5]) + (f" and {len(known) - 5} more" if len(known) > 5 else "")
        first: dict[str, int] = {}
        for row in rows["test"]:
            first.setdefault(json.dumps(row["label"]), row["line"])
        for label in first.keys() - set(known):  # a number and a text are different labels
            where = f"{files['test']}:{first[label]}"
            yield f"{where}: expected a label of train.jsonl ({listed}), found {label}"


def build_task(folder: Path) -> "AbsTask":
    """The mteb task of a dataset folder, its data loaded. Raises ValueError for malformed rows.

    Two conventions of mteb are kept on purpose: labels are numbers (a binary score needs to know the
    positive class), and reranking candidates have mteb's ids (ties are broken by id). One is not:
    clustering reads every text, of which mteb samples 4 % by default.
    """
    from datasets import Dataset
    from mteb import TaskMetadata, abstasks

    problems: list[str] = []
    dataset, rows = read_dataset(folder, problems)
    if problems:
        raise ValueError(problems[0])
    kind, languages = KINDS[dataset.kind], list(dataset.languages)
    is_ranked = kind.scores == _RANKED
    if is_ranked:
        data = {"default": {"test": _search_data(rows)}}
    else:
        labelled = [row for row in chain.from_iterable(rows.values()) if "label" in row]
        # Those of test first: of two classes, mteb calls the one with number 1 positive.
        tested = {row["label"] for row in rows.get("test", ()) if "label" in row}
        labels = sorted(
            {row["label"] for row in labelled},
            key=lambda x: (x not in tested, isinstance(x, str), x),
        )
        numbers = {label: number for number, label in enumerate(labels)}
        for row in labelled:
            row["label"] = numbers[row["label"]]
        parts = {
            part: Dataset.from_dict({name: [row[name] for row in group] for name in kind.columns})
            for part, group in rows.items()
        }
        data = {"default": parts}
        if "test" not in parts:  # bitext has one subset per language pair
            data = {part: {"test": pairs} for part, pairs in parts.items()}
    attributes = {
        "input_column_name": "text",
        "label_column_name": "label",
        "max_fraction_of_documents_to_embed": None,
        "min_score": 0,
        "max_score": 5,  # correlations do not depend on the scale
        "metadata": TaskMetadata(
            name=dataset.name,
            description=f"a {dataset.kind} dataset in a folder",
            type=kind.type,  # pyright: ignore[reportArgumentType] -- one of its literals
            main_score=dataset.main_score,
            dataset={"path": f"local/{dataset.name}", "revision": dataset.revision},
            eval_splits=["test"],
            eval_langs=languages if "default" in data else dict.fromkeys(data, languages),
        ),
    }
    base = getattr(abstasks, f"AbsTask{'Retrieval' if is_ranked else kind.type}")
    task = type(dataset.name, (base,), attributes)()
    task.dataset, task.data_loaded = data, True
    return task


def _search_data(rows: dict[str, Rows]) -> dict[str, object]:
    """Retrieval data unchanged; reranking as retrieval among each query's candidates."""
    from datasets import Dataset

    corpus = {str(row["_id"]): row for row in rows.get("corpus", ())}
    queries = {str(row["_id"]): row["text"] for row in rows.get("queries", ())}
    relevant: dict[str, dict[str, int]] = {}
    for row in rows.get("qrels", ()):
        relevant.setdefault(row["query-id"], {})[row["corpus-id"]] = row["score"]
    for number, row in enumerate(rows.get("test", ())):
        query = f"test_query{number}"
        queries[query] = row["query"]
        relevant[query] = {}
        for column, prefix in (("positive", "apositive"), ("negative", "negative")):
            for index, text in enumerate(row[column]):
                document = f"{prefix}_{query}_{index:05}"
                corpus[document] = {"text": text}
                relevant[query][document] = int(column == "positive")
    documents = {
        "id": list(corpus),
        "title": [row.get("title") or "" for row in corpus.values()],  # mteb does not accept None
        "text": [row["text"] for row in corpus.values()],
    }
    return {
        "corpus": Dataset.from_dict(documents),
        "queries": Dataset.from_dict({"id": list(queries), "text": list(queries.values())}),
        "relevant_docs": relevant,
        "top_ranked": {q: list(d) for q, d in relevant.items()} if "test" in rows else None,
    }
