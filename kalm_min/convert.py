"""What people have to training data: `kalm-min convert support.csv --output data`.

    CSV, TSV, Parquet, JSONL or a JSON array; a folder has one file or sub-folder per task
    support.csv -> data/support.jsonl                       {"query", "pos", "neg", ...} per line
    with --hold-out 100 -> data/train/support.jsonl         without any text that is held out
                           data/validation/support.jsonl    the held-out rows
                           data/eval/support/               the same as a retrieval set (BEIR)

Columns are recognised by their usual names or named by flags; what was understood is printed before
anything is written. Each row is checked like a line of training data. Each file is complete or
absent; the same command resumes, and converts again what changed in size or content. Parquet needs
`pip install "kalm-min[data]"`. Does not download or write `<task>.toml`.
"""

import gzip
import hashlib
import json
import random
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from kalm_min import program
from kalm_min.config import check_output, run
from kalm_min.console import Progress, count
from kalm_min.files import (
    Object,
    atomic_write,
    did_you_mean,
    differences,
    in_words,
    locked,
    open_bytes,
    read_json,
    read_jsonl,
    read_table,
    text_hash,
    write_json,
    write_text,
)
from kalm_min.options import ANY_COUNT, Ranged
from kalm_min.schema import LISTED, Field, list_problems, read_object

_OBJECT = Field("an object", lambda value: isinstance(value, dict), required=True)
_BATCH = 1000  # rows of a Parquet file in memory at a time
_BUFFER = 1 << 20  # bytes of a column read at a time; the default is a full row group
_LIKE = 0.8  # a pair is an example if its score is at least this share of the highest
_PREFIX = re.compile(r"\s*Instruct:\s*(.*?)\s*\n\s*Query:\s*(.*)", re.DOTALL)
_KINDS = (".parquet", ".csv", ".tsv", ".json", ".jsonl")
# Columns as they are usually called, the first that is found; also in the plural and numbered.
_USUAL = {
    "query": ("query", "anchor", "question", "sentence1", "sentence_1"),
    "pos": ("pos", "positive", "answer", "passage", "document", "sentence2", "sentence_2"),
    "neg": ("neg", "negative", "hard_negative"),
    "score": ("score", "similarity", "label", "similarity_score"),
}
_OTHER = {"instruction": "instruction", "prompt": "instruction", "task": "task", "group": "group"}
_NUMBERS = {"pos_scores": "pos_scores", "neg_scores": "neg_scores", "relevance": "relevance"}

Rows = Iterator[tuple[str, Object | str]]  # (where it stands, the row or what is wrong with it)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig(Ranged):
    """Convert CSV, TSV, Parquet, JSONL or JSON files into training data."""

    input: Annotated[Path, "A file, or a folder with a file or a sub-folder per task."]
    output: Annotated[Path, "Folder for the training data."]
    query: Annotated[str | None, "Column of the queries; none: recognised by its name."] = None
    pos: Annotated[tuple[str, ...], "Columns of the positives; none: recognised."] = ()
    neg: Annotated[tuple[str, ...], "Columns of the negatives; none: recognised."] = ()
    min_score: Annotated[
        float | None,
        "Lowest score of a pair of sentences that is an example; none: 0.8 of the highest.",
    ] = None
    hold_out: Annotated[
        int,
        "Rows of each task that are kept from training, for validation and evaluation.",
        ANY_COUNT,
    ] = 0
    split_instruction: Annotated[
        bool, 'Move the prefix "Instruct: ... Query: ..." of a query into the key "instruction".'
    ] = False
    skip_bad_rows: Annotated[
        bool, "Leave out rows that are not valid examples; otherwise their file is not converted."
    ] = False
    gzip: Annotated[bool, "Compress for transfer; training decompresses the files."] = False


class Source(NamedTuple):
    """A file to convert, and how its columns are understood."""

    path: Path
    target: Path  # below the output folder
    task: str
    rows: Callable[[], Rows]
    columns: dict[str, list[str]]  # "query", "pos", "neg", "score" and further keys of a line
    least: float  # the lowest score of an example

    def records(self, config: ConvertConfig) -> Iterator[tuple[str, Object | str | None]]:
        """(where, the line of training data, or what is wrong; None for a pair below `least`)."""
        from kalm_min.data.records import problem_with_line

        for where, row in self.rows():
            if isinstance(row, str):
                yield where, row
                continue
            (query,) = self.columns["query"]
            record: Object = {"query": row.get(query)}
            record |= {key: _texts(row, self.columns[key]) for key in ("pos", "neg")}
            further = [key for key in self.columns if key not in _USUAL]
            record |= {key: row.get(self.columns[key][0]) for key in further}
            record = {key: value for key, value in record.items() if value not in (None, [])}
            plain = config.split_instruction and "instruction" not in record
            if plain and (match := _PREFIX.fullmatch(str(record.get("query")))):
                record["instruction"], record["query"] = match.groups()
            scores = [_number(row.get(one)) for one in self.columns["score"]]
            if None in scores:
                yield where, f"expected a number as {self.columns['score'][0]!r}"
            else:
                is_low = any(one is not None and not one >= self.least for one in scores)
                yield where, None if is_low else problem_with_line(record) or record


def main(argv: list[str]) -> int:
    """Run the command; `config.run` defines the exit codes."""
    return run(
        ConvertConfig, convert, argv, program="kalm_min.convert", positional="input", resumable=True
    )


def convert(config: ConvertConfig) -> int:
    """Convert the files whose output is absent or was made of something else.

    Raises ValueError for an input without files to convert, for an output made with other options
    and, once all other files are done, for the files that could not be converted.
    """
    check_output(config.output, config.input, marks=[".convert.json"])
    paths = _targets(config)
    failures, sources = dict[Path, str](), list[Source]()
    for path, target in paths.items():
        try:
            sources.append(_open(path, target, config))
        except ValueError as error:
            failures[path] = str(error)
    for said, alike in _grouped((_sentence(one), str(one.path)) for one in sources):
        more = f" and {count(len(alike) - 1, 'other')}" if len(alike) > 1 else ""
        sys.stderr.write(f"{alike[0]}{more}: {said}\n")
    if sources or not failures:
        with locked(config.output):
            _convert_all(config, sources, failures)
    if failures:
        raise ValueError("\n".join(failures.values()))
    return 0


def _convert_all(config: ConvertConfig, sources: list[Source], failures: dict[Path, str]) -> None:
    """Write what is missing, with a record of what each output was made of."""
    noted, before = config.output / ".convert.json", dict[str, Any]()
    names = [one.name for one in fields(ConvertConfig) if one.name not in ("input", "output")]
    options = json.loads(json.dumps({name: getattr(config, name) for name in names}))
    if noted.exists():
        before = read_object(noted, dict.fromkeys(("options", "files"), _OBJECT))
        if changed := differences(before["options"], options):
            raise ValueError(
                f"{config.output}: converted before with other options ({changed}); "
                "give another --output, or delete it"
            )
    digests = {one.path: _digest(one.path) for one in sources}
    if config.hold_out:  # what one file holds out is kept from all
        digests = dict.fromkeys(digests, "".join(digests.values()))
    made = {
        one.path: [digests[one.path], one.target.stat().st_size if one.target.exists() else -1]
        for one in sources
    }
    record = {"options": options, "files": before.get("files", {})}
    todo = [one for one in sources if made[one.path] != record["files"].get(str(one.target))]
    if config.hold_out and (gone := record["files"].keys() - {str(one.target) for one in sources}):
        raise ValueError(
            f"{min(gone)}: made of a file that is gone, maybe with texts to hold out; delete it"
        )
    write_json(noted, record)
    held = _hold_out(config, sources) if config.hold_out and todo else {}
    for task, rows in held.items():
        _write_held_out(config.output, task, rows)
    keys = {key for rows in held.values() for row in rows for key in _keys(row)}
    written, left_out = 0, 0
    with Progress(len(todo), "files", sys.stderr, title="convert") as progress:
        for one in todo:
            try:
                good, shared = _convert_file(one, config, keys, progress)
                written, left_out = written + good, left_out + shared
                size = one.target.stat().st_size
                record["files"][str(one.target)] = [digests[one.path], size]
                write_json(noted, record)
            except ValueError as error:
                failures[one.path] = str(error)
            progress.update(1, str(one.path))
    done = len([one for one in todo if one.path not in failures])
    report = f"{count(written, 'row')} of {count(done, 'file')} -> {config.output}"
    if len(todo) < len(sources):
        report += f"; {count(len(sources) - len(todo), 'file')} had been converted before"
    for task, rows in held.items():
        shared = f"; {count(left_out - len(rows), 'row')} left out that share a text with them"
        report += f"\n{task}: {count(len(rows), 'row')} held out{shared if len(held) == 1 else ''}"
    if held:
        report += (
            f"\nnext: kalm-min train --data.path {config.output}/train --data.validation "
            f"{config.output}/validation ..., then kalm-min evaluate --data {config.output}/eval ..."
        )
    sys.stderr.write(report + "\n")


def _targets(config: ConvertConfig) -> dict[Path, Path]:
    """The output file of each input file: of a folder all Parquet files, or else all others."""
    root = config.input
    suffix = ".jsonl.gz" if config.gzip else ".jsonl"
    below = config.output / "train" if config.hold_out else config.output
    if root.is_file():
        return {root: below / f"{_stem(root)}{suffix}"}
    output = config.output.resolve()
    paths = [path.relative_to(root) for path in sorted(root.rglob("*")) if _kind(path) in _KINDS]
    paths = [
        path
        for path in paths
        if not any(part.startswith(".") for part in path.parts)
        and output not in (root / path).resolve().parents
    ]
    paths = [path for path in paths if path.suffix == ".parquet"] or paths
    expected = f"{root}: expected Parquet files, in a sub-folder per task"
    if not paths:
        raise ValueError(f"{expected}, found none, nor CSV, TSV, JSONL or JSON files")
    if deep := [path for path in paths if len(path.parts) > 2]:  # its task would be ambiguous
        raise ValueError(f"{expected}, found {deep[0]}")
    targets = {root / path: below / path.parent / f"{_stem(path)}{suffix}" for path in paths}
    for target, same in _grouped((target, path) for path, target in targets.items()):
        if len(same) > 1:
            raise ValueError(f"{same[0]} and {same[1]}: both would be converted to {target}")
    return targets


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _stem(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).stem


def _grouped(pairs: Iterable[tuple[Any, Any]]) -> Iterable[tuple[Any, list[Any]]]:
    """The values of each key, in order of appearance."""
    found = defaultdict[Any, list[Any]](list)
    for key, value in pairs:
        found[key].append(value)
    return found.items()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(path: Path, target: Path, config: ConvertConfig) -> Source:
    """Open a file and understand its columns; ValueErrors name the file."""
    read = _READERS.get(_kind(path))
    if read is None:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(_KINDS)}")
    names, rows = read(path)
    columns = _understand(path, names, config)
    if _kind(path) in (".csv", ".tsv"):
        columns = {key: value for key, value in columns.items() if key not in _NUMBERS}
    inner = target.relative_to(config.output).parts[bool(config.hold_out) :]
    task = inner[0] if len(inner) > 1 else _stem(path)
    used = [*dict.fromkeys(chain.from_iterable(columns.values()))]
    source = Source(path, target, task, lambda: rows(used), columns, config.min_score or 0.0)
    if columns["score"] and config.min_score is None:
        score = columns["score"][0]
        found = (_number(row.get(score)) for _, row in rows([score]) if not isinstance(row, str))
        source = source._replace(least=_LIKE * max(filter(None, found), default=0.0))
    return source


def _understand(path: Path, names: Sequence[str], config: ConvertConfig) -> dict[str, list[str]]:
    """The columns of each key of a line: those named by flags, else those with usual names."""
    given = {"query": [config.query] if config.query else [], "pos": [*config.pos]}
    given |= {"neg": [*config.neg], "score": []}
    for name in chain.from_iterable(given.values()):
        if name not in names:
            near = did_you_mean(name, names) or f"; the columns are {in_words(names)}"
            raise ValueError(f"{path}: expected the column {name!r}, found none{near}")
    columns = {key: given[key] or _usual(_USUAL[key], names) for key in _USUAL}
    columns |= {key: columns[key][:1] for key in ("query", "score")}
    if not columns["query"] or not (columns["pos"] or "group" in names):
        raise ValueError(
            f"{path}: expected the columns 'query' and 'pos' (or 'group'), found {in_words(names)}; "
            "name the columns: --query COLUMN --pos COLUMN (known without are anchor and positive, "
            "question and answer, sentence1 and sentence2)"
        )
    if not columns["query"][0].lower().startswith("sentence"):
        columns["score"] = []
    taken = {*chain.from_iterable(columns.values())}
    for name, key in (_OTHER | _NUMBERS).items():
        if name in names and name not in taken and key not in columns:
            columns[key] = [name]
    return columns


def _usual(usual: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns whose name is the first usual one that occurs."""
    for one in usual:
        pattern = re.compile(rf"{one}s?(_?\d+)?", re.IGNORECASE)
        if found := [name for name in names if pattern.fullmatch(name)]:
            return found
    return []


def _sentence(source: Source) -> str:
    """How the columns are understood, in words."""
    columns = source.columns.items()
    parts = [f"{key} = {' '.join(map(in_words, zip(names)))}" for key, names in columns if names]
    if source.columns["score"]:
        parts.append(f"pairs below {source.least:g} are left out")
    return ", ".join(parts)


def _number(value: object) -> float | None:
    try:
        return float(str(value)) if not isinstance(value, bool) else float(value)
    except ValueError:
        return None


def _texts(row: Object, columns: Sequence[str]) -> list[object]:
    """The texts of some columns: lists as they are, single cells without blank ones."""
    found: list[object] = []
    for value in map(row.get, columns):
        if isinstance(value, list):
            found += value
        elif value is not None and str(value).strip():
            found.append(value)
    return found


def _keys(record: Object) -> set[int]:
    """Hashes of the query and the documents, without regard to case, width and white space."""
    texts = (record["query"], *record.get("pos", ()), *record.get("neg", ()))
    return {_key(text) for text in texts}


def _key(text: str) -> int:
    return text_hash(" ".join(unicodedata.normalize("NFKC", text).casefold().split()))


def _hold_out(config: ConvertConfig, sources: list[Source]) -> dict[str, list[Object]]:
    """A random sample of the rows with positives of each task, always the same."""
    held: dict[str, list[Object]] = {}
    for task, parts in _grouped((one.task, one) for one in sources):
        draw, seen, kept = random.Random(0), 0, list[Object]()
        for _, record in chain.from_iterable(one.records(config) for one in parts):
            if isinstance(record, dict) and record.get("pos"):
                seen += 1
                if len(kept) < config.hold_out:
                    kept.append(record)
                elif (place := draw.randrange(seen)) < config.hold_out:
                    kept[place] = record
        if seen < 2 * config.hold_out:
            raise ValueError(
                f"--hold-out: expected at most half of the {count(seen, 'row')} of {task}, "
                f"found {config.hold_out}"
            )
        held[task] = kept
    return held


def _convert_file(
    source: Source, config: ConvertConfig, held: set[int], progress: Progress
) -> tuple[int, int]:
    """Write a file, complete or not at all; the rows written, and those that share a held-out text.

    Raises ValueError for a damaged file and bad rows.
    """
    good, low, shared, bad, problems = 0, 0, 0, 0, list[str]()
    with atomic_write(source.target) as plain, ExitStack() as stack:
        out = plain
        if config.gzip:  # without name and time, so that equal data gives equal files
            out = stack.enter_context(gzip.GzipFile("", "wb", 6, plain, mtime=0))
        for number, (where, record) in enumerate(source.records(config)):
            if number % _BATCH == 0:
                progress.update(0, f"{source.path}, row {number:,}")
            if isinstance(record, str):
                bad += 1
                problems += [f"{where}: {record}"] * (bad <= LISTED)
            elif record is None:
                low += 1
            elif held and _keys(record | {"neg": []}) & held:
                shared += 1
            else:
                good += 1
                record = _without(record, held) if held else record
                out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        listed = list_problems(bad, "bad row", problems)
        if bad and not config.skip_bad_rows:
            raise ValueError(f"{source.path}: not converted, {listed}")
        if not good:
            raise ValueError(f"{source.path}: expected at least one training example, found none")
    if bad or low:
        sys.stderr.write(f"{source.path}: left out {listed}\n" if bad else "")
        sys.stderr.write(f"{source.path}: {count(low, 'pair')} left out\n" if low else "")
    return good, shared


def _without(record: Object, held: set[int]) -> Object:
    """The line without the negatives that are held out, and their scores."""
    kept = [_key(text) not in held for text in record.get("neg", ())]
    for key in ("neg", "neg_scores"):
        if key in record:
            record[key] = [one for one, is_kept in zip(record[key], kept, strict=True) if is_kept]
    return record


def _write_held_out(output: Path, task: str, rows: list[Object]) -> None:
    """Write the held-out rows of a task as validation pairs and as a retrieval set."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(output / "validation" / f"{task}.jsonl", "".join(lines))
    corpus, queries, judged = dict[int, str](), dict[int, str](), dict[tuple[int, int], None]()
    for row in rows:
        queries.setdefault(_key(row["query"]), row["query"])
        for text in (*row["pos"], *row.get("neg", ())):
            corpus.setdefault(_key(text), text)
        judged |= dict.fromkeys((_key(row["query"]), _key(text)) for text in row["pos"])
    folder = output / "eval" / task
    for name, texts in (("corpus", corpus), ("queries", queries)):
        ids = ({"_id": f"{name[0]}{i}", "text": text} for i, text in enumerate(texts.values()))
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ids]
        write_text(folder / f"{name}.jsonl", "".join(lines))
    places = [{key: i for i, key in enumerate(texts)} for texts in (queries, corpus)]
    pairs = [f"q{places[0][query]}\tc{places[1][text]}\t1\n" for query, text in judged]
    write_text(folder / "qrels" / "test.tsv", "".join(["query-id\tcorpus-id\tscore\n", *pairs]))


def _read_table(path: Path) -> tuple[list[str], Callable[[Sequence[str]], Rows]]:
    """The columns and the rows of a CSV or TSV file."""
    _, names = next(read_table(path), (0, list[str]()))

    def rows(_: Sequence[str]) -> Rows:
        for line, cells in islice(read_table(path), 1, None):
            wrong = f"expected {count(len(names), 'cell')}, found {len(cells)}"
            row = dict(zip(names, cells, strict=False))
            yield f"{path}:{line}", row if len(cells) == len(names) else wrong

    return names, rows


def _read_lines(path: Path) -> tuple[list[str], Callable[[Sequence[str]], Rows]]:
    """The keys and the objects of a JSONL file, or of a file with one JSON array."""
    with open_bytes(path) as file:
        is_array = file.read(1000).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    array = read_json(path) if is_array else []

    def rows(_: Sequence[str]) -> Rows:
        for number, row in enumerate(array, start=1):
            found = row if isinstance(row, dict) else f"expected an object, found {row!r:.40}"
            yield f"{path}, row {number}", found
        if not is_array:
            yield from ((f"{path}:{number}", row) for number, row in read_jsonl(path))

    first = [row for _, row in islice(rows(()), _BATCH) if isinstance(row, dict)]
    return [*dict.fromkeys(chain.from_iterable(first))], rows


def _read_parquet(path: Path) -> tuple[list[str], Callable[[Sequence[str]], Rows]]:
    """The columns of a Parquet file, and its rows with those that are used, counted from 1."""
    try:
        from pyarrow.parquet import ParquetFile  # pyright: ignore -- it has no types

        # Without pre_buffer, which keeps everything it has read until the end of the file.
        file: Any = ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
    except ModuleNotFoundError as error:
        raise ValueError(
            'converting Parquet needs pyarrow: pip install "kalm-min[data]"'
        ) from error
    except (OSError, ValueError) as error:  # pyarrow's errors are of these classes
        found = str(error).partition("\n")[0]
        raise ValueError(f"{path}: expected a Parquet file, found: {found}") from error

    def rows(columns: Sequence[str]) -> Rows:
        number = 0
        try:
            for batch in file.iter_batches(_BATCH, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
        except (OSError, ValueError) as error:
            found = str(error).partition("\n")[0]
            raise ValueError(f"{path}: expected a complete Parquet file, found: {found}") from error

    return file.schema_arrow.names, rows


_READERS = {
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
    ".json": _read_lines,
    ".jsonl": _read_lines,
}


if __name__ == "__main__":
    program.start("convert")
