"""Parquet as data sets are published -> the training format, in pieces, so that memory stays flat.

    hub/<task>/train-00000-of-00003.parquet -> data/<task>/train-00000-of-00003.jsonl

Each row is checked like a line of training data, so what was converted opens. A file appears
complete or not at all. Columns that the format does not know are left out.

Not here: downloading, and settings of tasks (`<task>.toml`).
"""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kalm_min.data.checking import LISTED
from kalm_min.data.records import LINE, problem_with_line
from kalm_min.files import atomic_write

_BATCH = 1000  # rows in memory at a time
_BUFFER = 1 << 20  # bytes of a column read at a time; else it is a whole row group

_PREFIX = re.compile(r"\s*Instruct:\s*(.*?)\s*\n\s*Query:\s*(.*)", re.DOTALL)


@dataclass(slots=True)
class Converted:
    """What became of a file."""

    rows: int = 0
    """Written."""
    bad: int = 0
    """Left out."""
    problems: list[str] = field(default_factory=list[str])
    """`file, row number: expected ..., found ...` of the first of those."""


def parquet_files(hub: Path) -> list[Path]:
    """The Parquet files of a folder and of its sub-folders, one level deep, sorted.

    Raises ValueError where there is none, or where one lies deeper: its task would be anybody's guess.
    """
    files = sorted(
        file
        for file in hub.rglob("*.parquet")
        if not any(part.startswith(".") for part in file.relative_to(hub).parts)
    )
    if not files:
        raise ValueError(f"{hub}: expected Parquet files, in a sub-folder per task, found none")
    for file in files:
        if len(file.relative_to(hub).parts) > 2:
            raise ValueError(f"{file}: expected <task>/<file>.parquet in {hub}, found it deeper")
    return files


def count_rows(path: Path) -> int:
    """As the file's footer says."""
    return _open(path).metadata.num_rows


def convert_file(
    source: Path,
    target: Path,
    *,
    split_instruction: bool,
    skip_bad_rows: bool,
    report: Callable[[int], None],
) -> Converted:
    r"""Write a Parquet file as .jsonl or .jsonl.gz, complete or not at all.

    Args:
        source: columns query (string) and pos (list of strings), or query and group; any other
            key of a line of training data where present. Empty lists and nulls are left out.
        target: its suffix decides on compression.
        split_instruction: a query "Instruct: ... \n Query: ..." becomes instruction and query.
            Queries of another form, and rows with an instruction of their own, stay as they are.
        skip_bad_rows: leave out what is no training example, instead of refusing the file.
        report: is told numbers of rows as they are done.

    Raises ValueError for a file that is not Parquet or lacks a column, and, with the first 20 of
    them, for rows that are no training examples. Rows are counted from 1.
    """
    done = Converted()
    with atomic_write(target) as plain, ExitStack() as stack:
        out = plain
        if target.suffix == ".gz":
            # Without name and time, so that equal data is equal files.
            zipped = gzip.GzipFile("", "wb", compresslevel=6, fileobj=plain, mtime=0)
            out = stack.enter_context(zipped)
        for batch in _batches(source):
            for row in batch:
                record = _record(row, split_instruction)
                if problem := problem_with_line(record):
                    done.bad += 1
                    number = done.rows + done.bad
                    done.problems += [f"{source}, row {number}: {problem}"][: LISTED - done.bad + 1]
                else:
                    done.rows += 1
                    out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            report(len(batch))
        if done.bad and not skip_bad_rows:
            raise ValueError(f"{source}: not converted, {told(done)}")
        if not done.rows:
            raise ValueError(f"{source}: expected at least one training example, found none")
    return done


def told(done: Converted) -> str:
    """The bad rows in words."""
    first = f", the first {LISTED}" if done.bad > LISTED else ""
    lines = "".join(f"\n  {problem}" for problem in done.problems)
    return f"{done.bad} bad row{'s'[: done.bad - 1]}{first}:{lines}"


def _record(row: dict[str, Any], split_instruction: bool) -> dict[str, Any]:
    """A row as a line: keys in the usual order, without what is empty."""
    record = {key: row[key] for key in LINE if row.get(key) is not None and row[key] != []}
    plain = split_instruction and "instruction" not in record
    if plain and (match := _PREFIX.fullmatch(str(record.get("query")))):
        record["instruction"], record["query"] = match.groups()
    return record


def _open(path: Path) -> Any:
    """A pyarrow.parquet.ParquetFile."""
    try:
        from pyarrow.parquet import ParquetFile  # pyright: ignore -- it has no types
    except ModuleNotFoundError as error:
        raise ValueError(
            'converting Parquet needs pyarrow: pip install "kalm-min[data]"'
        ) from error
    try:
        # Without pre_buffer, which keeps what it has read until the end of the file.
        return ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
    except (OSError, ValueError) as error:  # pyarrow's own errors are these
        raise ValueError(f"{path}: expected a Parquet file, found: {_first_line(error)}") from error


def _batches(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The rows, some at a time, with the columns that training data knows."""
    file = _open(path)
    names: list[str] = file.schema_arrow.names
    if "query" not in names or not {"pos", "group"} & {*names}:
        raise ValueError(
            f"{path}: expected the columns 'query' and 'pos' (or 'group'), found {', '.join(names)}"
        )
    columns = [name for name in names if name in LINE]
    batches = file.iter_batches(_BATCH, columns=columns, use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path}: expected a complete Parquet file, found: {_first_line(error)}"
            ) from error
        if batch is None:
            return
        yield batch.to_pylist()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
