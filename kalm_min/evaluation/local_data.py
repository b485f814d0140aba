"""Evaluation datasets in folders of one's own: what is there, of which type, and is every row good.

    retrieval       corpus.jsonl (_id, title, text), queries.jsonl (_id, text), qrels/test.tsv
    reranking       test.jsonl   query, positive [texts], negative [texts]
    sts             test.jsonl   sentence1, sentence2, score
    pair            test.jsonl   sentence1, sentence2, label (0 or 1)
    classification  train.jsonl and test.jsonl   text, label
    clustering      test.jsonl alone             text, label
    summarization   test.jsonl   text, human_summaries, machine_summaries, relevance
    bitext          one file per language pair (or test.jsonl)   sentence1, sentence2

The type is read off the files and the columns of the first row; a `task.toml` beside them may say
`type`, `instruction`, `symmetric`, `languages`, `main_metric`. `.jsonl.gz` is read too. Everything
is checked while planning, before a model is loaded. Not here: mteb (`local_tasks` builds its tasks).
"""

import difflib
import gzip
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalm_min.files import hash_files, parse_object

_MOST_PROBLEMS = 20
_UNKNOWN_LANGUAGE = "und-Zyyy"  # ISO 639-3 and 15924 for "not said"

Rows = list[dict[str, Any]]
_Check = tuple[str, Callable[[Any], bool]]


def _is_text(value: object) -> bool:
    """True for a str that UTF-8 can hold (JSON may smuggle in half a surrogate pair)."""
    return isinstance(value, str) and (value.isascii() or not re.search("[\ud800-\udfff]", value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_label(value: object) -> bool:
    return _is_text(value) or (isinstance(value, int) and not isinstance(value, bool))


def _is_list(fits: Callable[[Any], bool], least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(fits, value))


_TEXT: _Check = ("a text", _is_text)
_LABEL: _Check = ("a text or a whole number", _is_label)
_NUMBER: _Check = ("a number", _is_number)
_BINARY: _Check = ("0 or 1", lambda value: _is_number(value) and value in {0, 1})
_TEXTS: _Check = ("a list of texts", _is_list(_is_text, least=0))
_SOME_TEXTS: _Check = ("a list of at least one text", _is_list(_is_text, least=1))
_NUMBERS: _Check = ("a list of numbers", _is_list(_is_number, least=1))
_TITLE: _Check = ("a text", lambda value: value is None or _is_text(value))

_PAIR: dict[str, _Check] = {"sentence1": _TEXT, "sentence2": _TEXT}
_LABELLED: dict[str, _Check] = {"text": _TEXT, "label": _LABEL}
_RANKED = r"(ndcg|map|recall|precision|mrr|hit_rate)_at_(1|3|5|10|20|100|1000)"
_CLASSES = r"accuracy|(f1|precision|recall)(_weighted)?|ap(_weighted)?"


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of task: mteb's name, its usual main score, a pattern of all its scores, the columns."""

    type: str
    main_score: str
    scores: str
    columns: Mapping[str, _Check]


KINDS = {
    "retrieval": Kind("Retrieval", "ndcg_at_10", _RANKED, {"_id": _LABEL, "text": _TEXT}),
    "reranking": Kind(
        "Reranking",
        "map_at_1000",
        _RANKED,
        {"query": _TEXT, "positive": _SOME_TEXTS, "negative": _TEXTS},
    ),
    "sts": Kind(
        "STS",
        "cosine_spearman",
        r"((cosine|euclidean|manhattan)_)?(spearman|pearson)",
        _PAIR | {"score": _NUMBER},
    ),
    "pair": Kind(
        "PairClassification",
        "max_ap",
        r"(max|similarity|cosine|dot|euclidean|manhattan)_(ap|accuracy|f1|precision|recall)",
        _PAIR | {"label": _BINARY},
    ),
    "classification": Kind("Classification", "accuracy", _CLASSES, _LABELLED),
    "clustering": Kind("Clustering", "v_measure", r"v_measure|ami", _LABELLED),
    "summarization": Kind(
        "Summarization",
        "cosine_spearman",
        r"((cosine|dot)_)?(spearman|pearson)",
        {
            "text": _TEXT,
            "human_summaries": _SOME_TEXTS,
            "machine_summaries": _SOME_TEXTS,
            "relevance": _NUMBERS,
        },
    ),
    "bitext": Kind("BitextMining", "f1", r"f1|accuracy|precision|recall", _PAIR),
}
_EXPECTED = (
    "expected corpus.jsonl, queries.jsonl and qrels/test.tsv, or test.jsonl with "
    + ", or ".join(
        f"{', '.join(kind.columns)} ({name})" for name, kind in KINDS.items() if name != "retrieval"
    )
)


@dataclass(frozen=True, slots=True)
class LocalDataset:
    """A dataset folder that was read and found good."""

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
    languages: tuple[str, ...] = (_UNKNOWN_LANGUAGE,)


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
    datasets, problems = [], []
    for folder in folders:
        dataset, _ = read_dataset(folder, problems)
        datasets.append(dataset)
    if problems:
        shown = "\n".join(problems[:_MOST_PROBLEMS])
        raise ValueError(f"{path}: {len(problems)} malformed rows\n{shown}")
    return datasets


def read_dataset(folder: Path, problems: list[str]) -> tuple[LocalDataset, dict[str, Rows]]:
    """Read one dataset; what is wrong with its rows is added to `problems`.

    Returns:
        The dataset and its rows by part: corpus, queries, qrels, train, test or a language pair.
    """
    settings = _read_settings(folder / "task.toml")
    kind = settings.pop("type", None) or _recognise(folder)
    main_score = settings.pop("main_metric", KINDS[kind].main_score)
    if not re.fullmatch(KINDS[kind].scores, main_score):
        raise ValueError(
            f"{folder / 'task.toml'}: main_metric: expected a score of {kind} such as "
            f"{KINDS[kind].main_score}, found {main_score!r}"
        )
    files = _files(folder, kind)
    counted = [*files.values(), folder / "task.toml"]
    rows = _read_rows(files, kind, problems)
    lengths = [len(text) for part in rows.values() for row in part for text in _encoded(row)]
    dataset = LocalDataset(
        name=folder.resolve().name,
        path=folder.resolve(),
        kind=kind,
        revision=hash_files((path.name, path) for path in counted if path.is_file()),
        texts=len(lengths),
        characters=sum(lengths),
        main_score=main_score,
        **settings,
    )
    return dataset, rows


def _encoded(row: dict[str, Any]) -> Iterator[str]:
    """The texts of a row that the model will read."""
    for column, value in row.items():
        if not column.endswith(("id", "label")):
            values = value if isinstance(value, list) else [value]
            yield from (text for text in values if isinstance(text, str))


def _read_settings(path: Path) -> dict[str, Any]:
    """`task.toml`, checked; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected TOML, found: {error}") from error
    codes = _is_list(lambda code: bool(re.fullmatch(r"[a-z]{3}-[A-Z][a-z]{3}", str(code))), least=1)
    known: dict[str, _Check] = {
        "type": ("one of " + ", ".join(KINDS), lambda value: value in list(KINDS)),
        "instruction": _TEXT,
        "symmetric": ("true or false", lambda value: isinstance(value, bool)),
        "languages": ('a list of codes like "eng-Latn"', codes),
        "main_metric": _TEXT,
    }
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{path}: expected {', '.join(known)}, found {key!r}{hint}")
        if not known[key][1](value):
            raise ValueError(f"{path}: {key}: expected {known[key][0]}, found {value!r}")
    return {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}


def _recognise(folder: Path) -> str:
    """The type of a dataset, from its files and the columns of the first row."""
    parts = _jsonl_files(folder)
    if {"corpus", "queries"} <= parts.keys():
        return "retrieval"
    columns = {
        name: next((set(row) for _, row in _lines(path)), set()) for name, path in parts.items()
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
    paths = sorted(folder.glob("*.jsonl.gz")) + sorted(folder.glob("*.jsonl"))
    found = {path.name.removesuffix(".gz").removesuffix(".jsonl"): path for path in paths}
    return dict(sorted(found.items()))


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


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object); a line that is not JSON gives {"": the error}, so it hides no other."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, parse_object(line, f"{path}:{number}")
                except ValueError as error:
                    yield number, {"": str(error)}


def _read_rows(files: dict[str, Path], kind: str, problems: list[str]) -> dict[str, Rows]:
    """Every row, checked on its own and then against the others."""
    before = len(problems)
    rows: dict[str, Rows] = {}
    for part, path in files.items():
        if part == "qrels":
            rows[part] = _read_qrels(path, problems)
        else:
            rows[part] = _read_part(path, KINDS[kind].columns, problems)
        if not rows[part] and len(problems) == before:
            problems.append(f"{path}:1: expected at least one row, found none")
    if len(problems) == before:
        problems += _check_together(files, kind, rows)
    return rows


def _read_part(path: Path, columns: Mapping[str, _Check], problems: list[str]) -> Rows:
    rows: Rows = []
    checks = {**columns, **({"title": _TITLE} if "_id" in columns else {})}
    for number, row in _lines(path):
        if "_id" in columns:
            row.setdefault("title", None)
        wrong = [row[""]] if "" in row else []
        for column, (expected, fits) in checks.items():
            if "" not in row and not (column in row and fits(row[column])):
                found = (
                    repr(row[column]) if column in row else f"only {', '.join(row) or 'no column'}"
                )
                found = found if len(found) <= 60 else found[:57] + "..."
                wrong.append(f"{path}:{number}: {column}: expected {expected}, found {found}")
        problems += wrong
        if not wrong:
            rows.append({column: row[column] for column in checks} | {"line": number})
    return rows


def _read_qrels(path: Path, problems: list[str]) -> Rows:
    """BEIR judgements: tab-separated query id, document id and score under a header."""
    rows: Rows = []
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            cells = line.rstrip("\r\n").split("\t")
            is_row = len(cells) == 3 and re.fullmatch(r"-?\d+", cells[2])
            if number > 1 and is_row:
                values = (*cells[:2], int(cells[2]), number)
                rows.append(
                    dict(zip(("query-id", "corpus-id", "score", "line"), values, strict=True))
                )
            elif is_row if number == 1 else line.strip():
                expected = "a header line" if number == 1 else "query id, document id, whole number"
                problems.append(
                    f"{path}:{number}: expected {expected} (tabs), found {line.strip()!r}"
                )
    return rows


def _check_together(files: dict[str, Path], kind: str, rows: dict[str, Rows]) -> list[str]:
    """What no single row shows: ids that clash or dangle, columns that say only one thing."""
    if kind == "retrieval":
        return _check_ids(files, rows)
    if kind == "summarization":
        return [
            f"{files['test']}:{row['line']}: relevance: expected one number for each of "
            f"{len(row['machine_summaries'])} machine_summaries, found {len(row['relevance'])}"
            for row in rows["test"]
            if len(row["relevance"]) != len(row["machine_summaries"])
        ]
    column = next((name for name in ("score", "label") if name in KINDS[kind].columns), None)
    part = next(iter(rows))
    if column and len({row[column] for row in rows[part]}) == 1:
        return [f"{files[part]}: {column}: expected at least two different values, found one"]
    return []


def _check_ids(files: dict[str, Path], rows: dict[str, Rows]) -> list[str]:
    problems = []
    known: dict[str, set[str]] = {"corpus": set(), "queries": set()}
    for part, seen in known.items():
        for row in rows[part]:
            if str(row["_id"]) in seen:
                problems.append(f"{files[part]}:{row['line']}: _id {row['_id']!r} was there before")
            seen.add(str(row["_id"]))
    for row in rows["qrels"]:
        for column, part in (("query-id", "queries"), ("corpus-id", "corpus")):
            if row[column] not in known[part]:
                where = f"{files['qrels']}:{row['line']}"
                problems.append(f"{where}: expected an _id of {part}.jsonl, found {row[column]!r}")
    if not any(row["score"] > 0 for row in rows["qrels"]):
        problems.append(f"{files['qrels']}: expected a score above 0, found none")
    return problems
