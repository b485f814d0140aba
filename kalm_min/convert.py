"""What people have to training data: `kalm-min convert support.csv --output data`.

    CSV, TSV, Parquet, JSONL or a JSON array; a folder has one file or sub-folder per task
    support.csv -> data/support.jsonl                       {"query", "pos", "neg", ...} per line
    with --hold-out 100 -> data/train/support.jsonl         without any text that is held out
                           data/validation/support.jsonl    the held-out rows
                           data/eval/support/               the same as a retrieval set (BEIR)
Each file is complete or absent; the same command converts what is missing or has changed.
"""

import gzip
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from heapq import nsmallest
from itertools import chain, compress, islice
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
    hash_files,
    in_words,
    locked,
    open_bytes,
    read_json,
    read_jsonl,
    read_table,
    text_hash,
    text_key,
    write_json,
    write_text,
)
from kalm_min.options import ANY_COUNT, Ranged
from kalm_min.schema import LISTED, Field, describe, list_problems, read_object

_OBJECT = Field("an object", lambda value: isinstance(value, dict), required=True)
_BATCH = 1000  # rows of a Parquet file in memory at a time
_BUFFER = 1 << 20  # bytes of a column read at a time; the default is a full row group
_LIKE = 0.8  # a pair is an example if its score is at least this share of the highest
_PREFIX = re.compile(r"\s*Instruct:\s*(.*?)\s*\n\s*Query:\s*(.*)", re.DOTALL)
# Columns as they are usually called, the first that is found; also in the plural and numbered.
_USUAL = {
    "query": ("query", "anchor", "question", "sentence1", "sentence_1"),
    "pos": ("pos", "positive", "answer", "passage", "document", "sentence2", "sentence_2"),
    "neg": ("neg", "negative", "hard_negative"),
    "score": ("score", "similarity", "label", "similarity_score"),
}
_OTHER = {"instruction": "instruction", "prompt": "instruction", "task": "task", "group": "group"}
_NUMBERS = {name: name for name in ("pos_scores", "neg_scores", "relevance")}

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
    columns: dict[str, list[str]]  # "query", "pos", "neg", "score" and further keys of a line
    least: float  # the lowest score of an example

    def records(self, config: ConvertConfig) -> Iterator[tuple[str, Object | str | None]]:
        """(where, the line of training data, or what is wrong; None for a pair below `least`)."""
        from kalm_min.data.checking import problem_with_line

        for where, row in _rows(self.path, [*chain.from_iterable(self.columns.values())]):
            if isinstance(row, str):
                yield where, row
                continue
            cells = {
                key: _texts(row, names) if key in ("pos", "neg") else row.get(names[0])
                for key, names in self.columns.items()
                if names and key != "score"
            }
            record: Object = {key: one for key, one in cells.items() if one not in (None, [])}
            plain = config.split_instruction and "instruction" not in record
            if plain and (match := _PREFIX.fullmatch(str(record.get("query")))):
                record["instruction"], record["query"] = match.groups()
            scores = [_number(row.get(name)) for name in self.columns["score"]]
            if None in scores:
                yield where, f"expected a number as {self.columns['score'][0]!r}"
            else:
                is_low = any(one is not None and not one >= self.least for one in scores)
                yield where, None if is_low else problem_with_line(record) or record


def convert(config: ConvertConfig) -> int:
    """Convert the files whose output is absent or was made of something else.

    Raises ValueError for an input without files to convert, for an output made with other options
    and, once all other files are done, for the files that could not be converted.
    """
    check_output(config.output, config.input, marks=[".convert.json"])
    failures, sources, said = list[str](), list[Source](), dict[str, list[str]]()
    for target, path in _targets(config).items():
        try:
            sources.append(_understand(path, target, config))
        except ValueError as error:
            failures.append(str(error))
    for one in sources:
        columns = {key: " ".join(map(in_words, zip(one.columns[key]))) for key in one.columns}
        parts = [f"{key} = {names}" for key, names in columns.items() if names]
        parts += [f"pairs below {one.least:g} are left out"] * bool(one.columns["score"])
        said.setdefault(", ".join(parts), []).append(str(one.path))
    for sentence, alike in said.items():
        more = f" and {count(len(alike) - 1, 'other')}" if len(alike) > 1 else ""
        sys.stderr.write(f"{alike[0]}{more}: {sentence}\n")
    if sources:
        with locked(config.output):
            failures += _convert_all(config, sources)
    if failures:
        raise ValueError("\n".join(failures))
    return 0


def _convert_all(config: ConvertConfig, sources: list[Source]) -> list[str]:
    """Write what is missing, with a record of what each output was made of; what failed."""
    noted, files, failures = config.output / ".convert.json", dict[str, Any](), list[str]()
    options = json.loads(json.dumps(asdict(config), default=str))
    del options["input"], options["output"]
    if noted.exists():
        before = read_object(noted, dict.fromkeys(("options", "files"), _OBJECT))
        files = before["files"]
        if changed := differences(before["options"], options):
            raise ValueError(
                f"{config.output}: converted before with other options ({changed}); "
                "give another --output, or delete it"
            )
    made = {str(one.target): hash_files([("", one.path)]) for one in sources}
    if config.hold_out:  # what one file holds out is kept from all
        made = dict.fromkeys(made, "".join(made.values()))

    def state(name: str) -> list[object]:
        return [made[name], Path(name).stat().st_size if Path(name).exists() else -1]

    todo = [one for one in sources if files.get(str(one.target)) != state(str(one.target))]
    if config.hold_out and (gone := files.keys() - made.keys()):
        raise ValueError(
            f"{min(gone)}: made of a file that is gone, maybe with texts to hold out; delete it"
        )
    write_json(noted, {"options": options, "files": files})
    held = _hold_out(config, sources) if config.hold_out and todo else {}
    for task, rows in held.items():
        _write_held_out(config.output, task, rows)
    keys = {key for rows in held.values() for row in rows for key in _keys(row)}
    total = Counter[str]()
    with Progress(len(todo), "files", sys.stderr, title="convert") as progress:
        for one in todo:
            try:
                total += _convert_file(one, config, keys, progress)
                files[str(one.target)] = state(str(one.target))
                write_json(noted, {"options": options, "files": files})
            except ValueError as error:
                failures.append(str(error))
            progress.update(1, str(one.path))
    done = count(len(todo) - len(failures), "file")
    report = f"{count(total['good'], 'row')} of {done} -> {config.output}"
    if len(todo) < len(sources):
        report += f"; {count(len(sources) - len(todo), 'file')} had been converted before"
    if held:
        kept = "\n".join(f"{task}: {count(len(held[task]), 'row')} held out" for task in held)
        shared = count(total["shared"] - sum(map(len, held.values())), "row")
        report += (
            f"\n{kept}; {shared} left out that share a text with what is held out"
            f"\nnext: kalm-min train --data.path {config.output}/train --data.validation "
            f"{config.output}/validation ..., then kalm-min evaluate --data {config.output}/eval ..."
        )
    sys.stderr.write(report + "\n")
    return failures


def _targets(config: ConvertConfig) -> dict[Path, Path]:
    """Output file -> input file: of a folder all Parquet files, or else all others."""
    root, output, targets = config.input, config.output.resolve(), dict[Path, Path]()
    base = root.parent if root.is_file() else root
    paths = [root] if root.is_file() else []
    for path in sorted(root.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(base).parts)
        if not is_hidden and _kind(path) in _READERS and output not in path.resolve().parents:
            paths.append(path)
    paths = [path for path in paths if path.suffix == ".parquet"] or paths
    expected = f"{root}: expected Parquet files, in a sub-folder per task"
    if not paths:
        raise ValueError(f"{expected}, found none, nor CSV, TSV, JSONL or JSON files")
    for path in paths:
        name = _plain(path.relative_to(base)).with_suffix(".jsonl.gz" if config.gzip else ".jsonl")
        target = config.output / ("train" if config.hold_out else "") / name
        if len(name.parts) > 2:  # its task would be ambiguous
            raise ValueError(f"{expected}, found {path.relative_to(base)}")
        if target in targets:
            raise ValueError(f"{targets[target]} and {path}: both would be converted to {target}")
        targets[target] = path
    return targets


def _plain(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".gz"))


def _kind(path: Path) -> str:
    return _plain(path).suffix.lower()


def _understand(path: Path, target: Path, config: ConvertConfig) -> Source:
    """The columns of each key of a line: those named by flags, else those with usual names.

    Raises ValueError with the file's name for columns that are absent and files that are none.
    """
    if _kind(path) not in _READERS:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(_READERS)}")
    names = [*next(_READERS[_kind(path)](path, []))[1]]
    given = {"query": [config.query] if config.query else [], "pos": config.pos, "neg": config.neg}
    for name in chain.from_iterable(given.values()):
        if name not in names:
            near = did_you_mean(name, names) or f"; the columns are {in_words(names)}"
            raise ValueError(f"{path}: expected the column {name!r}, found none{near}")
    columns = {key: [*given.get(key, ())] or _usual(_USUAL[key], names) for key in _USUAL}
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
    further = _OTHER if _READERS[_kind(path)] is _read_table else _OTHER | _NUMBERS
    for name, key in further.items():
        if name in names and name not in taken:
            columns.setdefault(key, [name])
    least = config.min_score or 0.0
    if columns["score"] and config.min_score is None:
        (score,) = columns["score"]
        rows = (row for _, row in _rows(path, [score]) if not isinstance(row, str))
        least = _LIKE * max(filter(None, (_number(row.get(score)) for row in rows)), default=0.0)
    inner = target.relative_to(config.output).parts[bool(config.hold_out) :]
    return Source(path, target, inner[0] if len(inner) > 1 else _plain(path).stem, columns, least)


def _usual(usual: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns whose name is the first usual one that occurs."""
    patterns = [re.compile(rf"{one}s?(_?\d+)?", re.IGNORECASE) for one in usual]
    found = ([name for name in names if one.fullmatch(name)] for one in patterns)
    return next(filter(None, found), [])


def _number(value: object) -> float | None:
    try:
        return float(value if isinstance(value, bool) else str(value))
    except ValueError:
        return None


def _texts(row: Object, columns: Sequence[str]) -> list[object]:
    """The texts of some columns: lists as they are, single cells without blank ones."""
    cells = [
        one if isinstance(one, list) else [one]
        for one in map(row.get, columns)
        if isinstance(one, list) or (one is not None and str(one).strip())
    ]
    return [*chain.from_iterable(cells)]


def _keys(record: Object) -> set[str]:
    """The keys of the query and the documents."""
    return set(map(_key, (record["query"], *record.get("pos", ()), *record.get("neg", ()))))


def _key(text: str) -> str:
    return f"{text_key(text) % 2**64:016x}"


def _hold_out(config: ConvertConfig, sources: list[Source]) -> dict[str, list[Object]]:
    """The rows with positives of each task that have the lowest hashes: random, always the same."""
    held: dict[str, list[Object]] = {}
    for task in dict.fromkeys(one.task for one in sources):
        records = chain.from_iterable(one.records(config) for one in sources if one.task == task)
        rows = (row for _, row in records if isinstance(row, dict) and row.get("pos"))
        found = nsmallest(2 * config.hold_out, rows, lambda row: text_hash(json.dumps(row)))
        if len(found) < 2 * config.hold_out:
            raise ValueError(
                f"--hold-out: expected at most half of the {count(len(found), 'row')} of {task}, "
                f"found {config.hold_out}"
            )
        held[task] = found[: config.hold_out]
    return held


def _convert_file(
    source: Source, config: ConvertConfig, held: set[str], progress: Progress
) -> Counter[str]:
    """Write a file, complete or not at all; the number of rows of each kind.

    Raises ValueError for a damaged file and bad rows.
    """
    rows, problems = Counter[str](), list[str]()
    with (
        atomic_write(source.target) as plain,
        # Without name and time, so that equal data gives equal files.
        gzip.GzipFile("", "wb", 6, plain, 0) if config.gzip else nullcontext(plain) as out,
    ):
        for number, (where, record) in enumerate(source.records(config)):
            if number % _BATCH == 0:
                progress.update(0, where)
            if isinstance(record, str):
                rows["bad"] += 1
                problems += [f"{where}: {record}"] * (len(problems) < LISTED)
            elif record is None:
                rows["low"] += 1
            elif held and _keys(record | {"neg": []}) & held:
                rows["shared"] += 1
            else:
                rows["good"] += 1
                kept = [_key(text) not in held for text in record.get("neg", ())] if held else []
                for key in {"neg", "neg_scores"} & record.keys() if held else ():
                    record[key] = [*compress(record[key], kept)]
                out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        listed = list_problems(rows["bad"], "bad row", problems)
        if rows["bad"] and not config.skip_bad_rows:
            raise ValueError(f"{source.path}: not converted, {listed}")
        if not rows["good"]:
            raise ValueError(f"{source.path}: expected at least one training example, found none")
    left_out = ([listed] if rows["bad"] else []) + [count(rows["low"], "pair")] * bool(rows["low"])
    sys.stderr.writelines(f"{source.path}: left out {one}\n" for one in left_out)
    return rows


def _write_held_out(output: Path, task: str, rows: list[Object]) -> None:
    """Write the held-out rows of a task as validation pairs and as a retrieval set."""
    queries, corpus, pairs = dict[str, str](), dict[str, str](), dict[str, None]()
    for row in rows:
        query = f"q{_key(row['query'])}"
        queries.setdefault(query, row["query"])
        for text in (*row["pos"], *row.get("neg", ())):
            corpus.setdefault(f"c{_key(text)}", text)
        pairs |= dict.fromkeys(f"{query}\tc{_key(text)}\t1\n" for text in row["pos"])
    folder = output / "eval" / task
    _write_lines(output / "validation" / f"{task}.jsonl", rows)
    for name, texts in (("corpus", corpus), ("queries", queries)):
        _write_lines(folder / f"{name}.jsonl", ({"_id": i, "text": texts[i]} for i in texts))
    write_text(folder / "qrels" / "test.tsv", "".join(["query-id\tcorpus-id\tscore\n", *pairs]))


def _write_lines(path: Path, rows: Iterable[Object]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# Readers of a kind of file: first a row with all its columns, then its rows, with those needed.


def _read_table(path: Path, _: Sequence[str]) -> Rows:
    """A CSV or TSV file."""
    rows = read_table(path)
    names = next(rows, (0, list[str]()))[1]
    yield "", dict.fromkeys(names)
    for line, cells in rows:
        wrong = f"expected {count(len(names), 'cell')}, found {len(cells)}"
        row = dict(zip(names, cells, strict=False))
        yield f"{path}:{line}", row if len(cells) == len(names) else wrong


def _read_lines(path: Path, _: Sequence[str]) -> Rows:
    """A JSONL file, or a file with one JSON array; the keys of its first rows are its columns."""
    with open_bytes(path) as file:
        is_array = file.read(1000).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    numbered = enumerate(read_json(path), 1) if is_array else read_jsonl(path)
    rows = ((f"{path}, row {n}" if is_array else f"{path}:{n}", row) for n, row in numbered)
    first = [*islice(rows, _BATCH)]
    yield "", dict.fromkeys(key for _, row in first if isinstance(row, dict) for key in row)
    for where, row in chain(first, rows):
        yield where, row if isinstance(row, dict) else f"expected an object, found {describe(row)}"


def _read_parquet(path: Path, columns: Sequence[str]) -> Rows:
    """A Parquet file; its rows are counted from 1."""
    try:
        from pyarrow.parquet import ParquetFile  # pyright: ignore -- it has no types
    except ModuleNotFoundError as error:
        raise ValueError(
            'converting Parquet needs pyarrow: pip install "kalm-min[data]"'
        ) from error
    expected = "a Parquet file"
    try:
        # Without pre_buffer, which keeps everything it has read until the end of the file.
        file: Any = ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
        yield "", dict.fromkeys(file.schema_arrow.names)
        expected = "a complete Parquet file"
        batches = file.iter_batches(_BATCH, columns=columns, use_threads=False)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
    except (OSError, ValueError) as error:  # pyarrow's errors are of these classes
        found = str(error).partition("\n")[0]
        raise ValueError(f"{path}: expected {expected}, found: {found}") from error


_READERS = {
    ".parquet": _read_parquet,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".json": _read_lines,
    ".jsonl": _read_lines,
}


def _rows(path: Path, columns: Sequence[str]) -> Rows:
    return islice(_READERS[_kind(path)](path, columns), 1, None)


main = partial(run, ConvertConfig, convert, positional="input", resumable=True)

if __name__ == "__main__":
    program.start("convert")
