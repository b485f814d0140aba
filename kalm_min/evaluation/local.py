"""Evaluation datasets in local folders, recognised, checked row by row, and given to mteb as tasks.

The type follows from the files and the columns of the first row (`KINDS`); a `task.toml` beside them
may set `type`, `instruction`, `symmetric`, `languages`, `main_metric` (and must set the type of
bitext in files with other names). `.jsonl.gz` is read too. Everything is checked while planning,
before a model is loaded; mteb is imported only to build a task.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from kalm_min import schema
from kalm_min.files import Object, hash_files, read_jsonl, read_lines
from kalm_min.schema import Field, is_number, is_string

if TYPE_CHECKING:
    from mteb import AbsTask

Rows = list[Object]

_TEXT = Field("a text", is_string, required=True)
_TEXTS = Field("a list of at least one text", is_string, items=1, required=True)
_SOME = Field("a list of texts", is_string, items=0, required=True)
_LABEL = Field("a text or a whole number", schema.is_label, required=True)
_BINARY = Field("0 or 1", lambda value: is_number(value) and value in (0, 1), required=True)
_SCORE = Field("a number", is_number, required=True)
_SCORES = Field("a list of numbers", is_number, items=1, required=True)
_DOCUMENT = {"_id": _LABEL, "title": Field("a text", is_string), "text": _TEXT}
_RERANKED = {"query": _TEXT, "positive": _TEXTS, "negative": _SOME}
_PAIR, _LABELLED = {"sentence1": _TEXT, "sentence2": _TEXT}, {"text": _TEXT, "label": _LABEL}
_JUDGED = ("query-id", "corpus-id", "score")
_SUMMARIES = {"text": _TEXT, "human_summaries": _TEXTS, "machine_summaries": _TEXTS}
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


# In corpus.jsonl (retrieval, with queries.jsonl and qrels/test.tsv), test.jsonl (classification also
# train.jsonl) or deu-eng.jsonl and so on (bitext). The order matters: classification before
# clustering, which has its columns; bitext last.
KINDS = {
    "retrieval": Kind("Retrieval", "ndcg_at_10", _RANKED, _DOCUMENT),
    "reranking": Kind("Reranking", "map_at_1000", _RANKED, _RERANKED),
    "sts": Kind("STS", "cosine_spearman", _CORRELATION, _PAIR | {"score": _SCORE}),
    "pair": Kind("PairClassification", "max_ap", _BEST, _PAIR | {"label": _BINARY}),
    "classification": Kind("Classification", "accuracy", _CLASSES, _LABELLED),
    "clustering": Kind("Clustering", "v_measure", "v_measure|ami", _LABELLED),
    "summarization": Kind(
        "Summarization", "cosine_spearman", _SUMMARY, _SUMMARIES | {"relevance": _SCORES}
    ),
    "bitext": Kind("BitextMining", "f1", "f1|accuracy|precision|recall", _PAIR),
}
_SETTINGS = {
    "type": Field("one of " + ", ".join(KINDS), lambda value: value in list(KINDS)),
    "instruction": Field("a text", is_string),
    "symmetric": Field("true or false", schema.is_flag),
    "languages": Field(
        'a list of codes like "eng-Latn"',
        lambda code: bool(re.fullmatch("[a-z]{3}-[A-Z][a-z]{3}", str(code))),
        items=1,
    ),
    "main_metric": Field("a text", is_string),
}
_LANGUAGES = re.compile(r"[a-z]{2,3}([-_][A-Z][a-z]{3})?[-_][a-z]{2,3}([-_][A-Z][a-z]{3})?")
_EXPECTED = (
    "expected corpus.jsonl, queries.jsonl and qrels/test.tsv, or test.jsonl with "
    + ", or ".join(f"{', '.join(KINDS[one].columns)} ({one})" for one in list(KINDS)[1:-1])
    + ', or deu-eng.jsonl with sentence1, sentence2 (bitext, or type = "bitext" in task.toml)'
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """The instructions of a task, or a checkpoint's prompts; an empty text adds no prompt."""

    query: str = ""  # of every text if a task does not distinguish queries and documents
    document: str = ""  # of retrieval and reranking
    origin: str = ""  # the entry: "task" or "type" of a table, "task.toml", or "prompts" and a name
    kind: Literal["instruction", "prompt"] = "instruction"  # a template makes one the other


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """One task (never an aggregate): what a worker needs to run it and to identify its result."""

    name: str
    type: str
    main_score: str
    revision: str  # of a local dataset, a hash of every relevant file
    characters: int  # to encode, each text once; 0 if unknown; orders and divides the work
    instruction: Instruction = Instruction()
    symmetric: bool = False  # documents get the instruction too, whichever it is
    folder: Path | None = None  # the folder of a local dataset
    repository: str = ""  # the hub repository of a task of mteb
    mirror: Path | None = None  # the copy of the repository, by revision, to read instead
    splits: tuple[str, ...] = ("test",)
    subsets: tuple[str, ...] = ()
    corpus_characters: int = 0  # of documents to search, which several workers may encode
    documents: int = 0
    aggregate: str = ""  # the task of mteb whose score is the mean of this one and others
    languages: tuple[str, ...] = ()  # of a local dataset, in codes of ISO 639-3 and 15924


def find_datasets(path: Path) -> list[PlannedTask]:
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
    tasks = [read_dataset(folder, problems)[0] for folder in folders]
    if problems:
        listed = schema.list_problems(len(problems), "malformed row", problems)
        raise ValueError(f"{path}: {listed}")
    return tasks


def read_dataset(folder: Path, problems: list[str]) -> tuple[PlannedTask, dict[str, Rows]]:
    """Read one dataset; errors in its rows are appended to `problems`.

    Returns the task and its rows by part: corpus, queries, qrels, train, test or a language pair.
    """
    toml = folder / "task.toml"
    settings = schema.read_settings(toml, _SETTINGS) if toml.is_file() else {}
    name, files = _find_files(folder, settings.get("type"))
    kind = KINDS[name]
    main_score = settings.get("main_metric", kind.main_score)
    if not re.fullmatch(kind.scores, main_score):
        usual = f"a score of {name} such as {kind.main_score}"
        raise ValueError(f"{toml}: main_metric: expected {usual}, found {main_score!r}")
    before, rows = len(problems), dict[str, Rows]()
    for part, path in files.items():
        columns, read = kind.columns, schema.read_rows(path, kind.columns, problems)
        if part == "qrels":
            columns, read = _JUDGED, _read_qrels(path, problems)
        rows[part] = [{c: row.get(c) for c in columns} | {"line": line} for line, row in read]
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
    is_corpus, is_symmetric = name == "retrieval", settings.get("symmetric", False)
    own = settings.get("instruction")
    instruction = Instruction(own or "", own if own and is_symmetric else "", "task.toml")
    task = PlannedTask(
        name=folder.resolve().name,
        type=kind.type,
        main_score=main_score,
        revision=hash_files((p.name, p) for p in [*files.values(), toml] if p.is_file()),
        characters=sum(lengths),
        instruction=Instruction() if own is None else instruction,
        symmetric=is_symmetric,
        folder=folder.resolve(),
        corpus_characters=sum(lengths) * is_corpus,  # nearly all of the texts are documents
        documents=len(lengths) * is_corpus,
        languages=tuple(settings.get("languages", ["und-Zyyy"])),
    )
    return task, rows


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
    if parts and all(
        _LANGUAGES.fullmatch(name) and _PAIR.keys() <= {*row} and not {"score", "label"} & {*row}
        for name, row in firsts.items()
    ):
        return "bitext"
    found = "; ".join(f"{path.name} with {', '.join(firsts[n])}" for n, path in parts.items())
    raise ValueError(f"{folder}: {_EXPECTED}; found {found or 'no .jsonl file'}")


def _read_qrels(path: Path, problems: list[str]) -> Iterator[tuple[int, Object]]:
    """BEIR judgements: tab-separated query id, document id and score under a header."""
    for number, line in enumerate(read_lines(path), start=1):
        cells = line.split("\t")
        is_row = len(cells) == 3 and re.fullmatch(r"-?[0-9]{1,9}", cells[2]) is not None
        if is_row and number > 1:
            yield number, dict(zip(_JUDGED, (*cells[:2], int(cells[2])), strict=True))
        elif is_row or (number > 1 and line.strip()):
            expected = "a header line" if is_row else "query id, document id, whole number"
            found = f"(tabs), found {line.strip()!r}"
            problems.append(f"{path}:{number}: expected {expected} {found}")


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
            pair = row["query-id"], row["corpus-id"]
            for one, target in zip(pair, ("queries", "corpus"), strict=True):
                if one not in ids[target]:
                    yield f"{where}: expected an _id of {target}.jsonl, found {one!r}"
            if (score := judged.setdefault(pair, row["score"])) != row["score"]:
                expected = f"expected one score of {pair[0]!r} and {pair[1]!r}"
                yield f"{where}: {expected}, found {row['score']} after {score}"
        elif "relevance" in row and len(row["relevance"]) != len(row["machine_summaries"]):
            expected = f"one number for each of {len(row['machine_summaries'])} machine_summaries"
            yield f"{where}: relevance: expected {expected}, found {len(row['relevance'])}"
    if "qrels" in rows and max(judged.values()) <= 0:
        yield f"{files['qrels']}: expected a score above 0, found none"
    if "train" in rows:
        # As JSON: a number and a text are different labels.
        train = list(dict.fromkeys(json.dumps(row["label"]) for row in rows["train"]))
        if len(train) < 2:
            yield f"{files['train']}: expected at least two labels, found only {train[0]}"
        listed = ", ".join(train[:5]) + (f" and {len(train) - 5} more" if len(train) > 5 else "")
        first = {json.dumps(row["label"]): row["line"] for row in reversed(rows["test"])}
        for label in first.keys() - set(train):
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
    plan, rows = read_dataset(folder, problems)
    if problems:
        raise ValueError(problems[0])
    kind = next(one for one in KINDS.values() if one.type == plan.type)
    is_ranked = kind.scores == _RANKED
    if is_ranked:
        data = {"default": {"test": _search_data(rows)}}
    else:
        labelled = [row for row in chain.from_iterable(rows.values()) if "label" in row]
        # Those of test first: of two classes, mteb calls the one with number 1 positive.
        tested = {row["label"] for row in rows.get("test", ()) if "label" in row}
        labels = {row["label"] for row in labelled}
        ordered = sorted(labels, key=lambda x: (x not in tested, isinstance(x, str), x))
        numbers = {label: number for number, label in enumerate(ordered)}
        for row in labelled:
            row["label"] = numbers[row["label"]]
        parts = {
            part: Dataset.from_dict({name: [row[name] for row in group] for name in kind.columns})
            for part, group in rows.items()
        }
        data = {"default": parts}
        if "test" not in parts:  # bitext has one subset per language pair
            data = {part: {"test": pairs} for part, pairs in parts.items()}
    languages = list(plan.languages)
    attributes = {
        "input_column_name": "text",
        "label_column_name": "label",
        "max_fraction_of_documents_to_embed": None,
        "min_score": 0,
        "max_score": 5,  # correlations do not depend on the scale
        "metadata": TaskMetadata(
            name=plan.name,
            description="a dataset in a folder",
            type=kind.type,  # pyright: ignore[reportArgumentType] -- one of its literals
            main_score=plan.main_score,
            dataset={"path": f"local/{plan.name}", "revision": plan.revision},
            eval_splits=["test"],
            eval_langs=languages if "default" in data else dict.fromkeys(data, languages),
        ),
    }
    base = getattr(abstasks, f"AbsTask{'Retrieval' if is_ranked else kind.type}")
    task = type(plan.name, (base,), attributes)()
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
        queries[query], relevant[query] = row["query"], {}
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
