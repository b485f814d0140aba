"""Published data to training data: `python -m kalm_min.convert hub_folder --output data/train`.

    hub/<task>/train-00000-of-00003.parquet -> data/<task>/train-00000-of-00003.jsonl

Each row is checked like a line of training data, so what was converted opens. Rows are read in
batches, so memory stays flat. Each file is complete or absent; the same command resumes after an
interruption. Needs `pip install "kalm-min[data]"`. Not here: downloading, and `<task>.toml`.
"""

import gzip
import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from kalm_min.config import run
from kalm_min.console import Progress
from kalm_min.data.records import LINE, LISTED, list_problems, problem_with_line
from kalm_min.files import atomic_write, read_json, write_json

_OPTIONS = ".convert.json"  # in the output: hidden entries are not data
_BATCH = 1000  # rows in memory at a time
_BUFFER = 1 << 20  # bytes of a column read at a time; by default it is a full row group
_PREFIX = re.compile(r"\s*Instruct:\s*(.*?)\s*\n\s*Query:\s*(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Parquet to training data."""

    input: Annotated[Path, "Folder with Parquet files, in a sub-folder per task."]
    output: Annotated[Path, "Folder for the training data, with a sub-folder per task."]
    split_instruction: Annotated[
        bool,
        'Make a prefix "Instruct: ... Query: ..." of a query the instruction of its line; queries '
        "without it, and rows with an instruction, stay as they are.",
    ] = False
    skip_bad_rows: Annotated[
        bool,
        "Leave out rows that are not training examples; otherwise their file is not converted.",
    ] = False
    gzip: Annotated[
        bool, "Compress. Training unpacks the files again, so this saves space in transfer only."
    ] = False


def main(argv: list[str]) -> int:
    """The command; see `config.run` for the exit code."""
    description = "Convert folders of Parquet files (query, pos, neg) into training data."
    return run(
        ConvertConfig,
        convert,
        argv,
        program="kalm_min.convert",
        description=description,
        positional="input",
        resumable=True,
    )


def convert(config: ConvertConfig) -> int:
    """Convert the files whose output is absent or older.

    Raises ValueError for an input without Parquet files and an output made with other options, and,
    after all other files, for the files that could not be converted.
    """
    suffix = ".jsonl.gz" if config.gzip else ".jsonl"
    sources = _parquet_files(config.input)
    _claim(config)
    todo: list[tuple[Path, Path]] = []
    failures: list[str] = []
    stored = total = written = 0
    for source in sources:
        target = (config.output / source.relative_to(config.input)).with_suffix(suffix)
        if target.exists() and target.stat().st_mtime >= source.stat().st_mtime:
            stored += 1
            continue
        try:
            total += _open(source).metadata.num_rows
            todo.append((source, target))
        except ValueError as error:
            failures.append(str(error))
    with Progress(total, "rows", sys.stderr, title="convert") as progress:
        for source, target in todo:
            try:
                written += _convert_file(source, target, config, progress)
            except ValueError as error:
                failures.append(str(error))
    sys.stderr.write(
        f"{written:,} rows of {len(sources) - stored - len(failures)} files -> {config.output}"
        + (f"; {stored} files had been converted before\n" if stored else "\n")
    )
    if failures:
        raise ValueError("\n".join(failures))
    return 0


def _parquet_files(hub: Path) -> list[Path]:
    """The Parquet files of a folder and of its sub-folders, sorted; raises ValueError for none."""
    files = sorted(
        file
        for file in hub.rglob("*.parquet")
        if not any(part.startswith(".") for part in file.relative_to(hub).parts)
    )
    if not files:
        raise ValueError(f"{hub}: expected Parquet files, in a sub-folder per task, found none")
    for file in files:
        if len(file.relative_to(hub).parts) > 2:  # its task would be ambiguous
            raise ValueError(f"{file}: expected <task>/<file>.parquet in {hub}, found it deeper")
    return files


def _claim(config: ConvertConfig) -> None:
    """Note the options in the output. Raises ValueError where it was made with others."""
    options = {
        name: getattr(config, name) for name in ("split_instruction", "skip_bad_rows", "gzip")
    }
    path = config.output / _OPTIONS
    before = read_json(path) if path.exists() else None
    if before is None:
        write_json(path, options)
    elif changed := [key for key in options if before.get(key) != options[key]]:
        found = ", ".join(f"{key} {json.dumps(before.get(key))}" for key in changed)
        raise ValueError(
            f"{config.output}: converted before with {found}; give another --output, or delete it"
        )


def _convert_file(source: Path, target: Path, config: ConvertConfig, progress: Progress) -> int:
    """Write a Parquet file as .jsonl or .jsonl.gz, complete or not at all; return its rows.

    Raises ValueError for a damaged file, one that lacks a column, and for bad rows. Rows are
    counted from 1.
    """
    good = bad = 0
    problems: list[str] = []
    with atomic_write(target) as plain, ExitStack() as stack:
        out = plain
        if config.gzip:
            # Without name and time, so that equal data is equal files.
            zipped = gzip.GzipFile("", "wb", compresslevel=6, fileobj=plain, mtime=0)
            out = stack.enter_context(zipped)
        for rows in _batches(source):
            for row in rows:
                # The keys in the usual order, without those that are empty.
                record = {key: row[key] for key in LINE if row.get(key) not in (None, [])}
                plain_query = config.split_instruction and "instruction" not in record
                if plain_query and (match := _PREFIX.fullmatch(str(record.get("query")))):
                    record["instruction"], record["query"] = match.groups()
                if problem := problem_with_line(record):
                    bad += 1
                    if bad <= LISTED:
                        problems.append(f"{source}, row {good + bad}: {problem}")
                else:
                    good += 1
                    out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            progress.update(len(rows), str(source.relative_to(config.input)))
        if bad and not config.skip_bad_rows:
            raise ValueError(f"{source}: not converted, {list_problems(bad, 'bad row', problems)}")
        if not good:
            raise ValueError(f"{source}: expected at least one training example, found none")
    if bad:
        sys.stderr.write(f"{source}: left out {list_problems(bad, 'bad row', problems)}\n")
    return good


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
    except (OSError, ValueError) as error:  # pyarrow's errors are of these classes
        found = str(error).partition("\n")[0]
        raise ValueError(f"{path}: expected a Parquet file, found: {found}") from error


def _batches(path: Path) -> Iterator[list[dict[str, object]]]:
    """The rows, some at a time, with the columns that training data knows."""
    file = _open(path)
    names: list[str] = file.schema_arrow.names
    if "query" not in names or not {"pos", "group"} & {*names}:
        raise ValueError(
            f"{path}: expected the columns 'query' and 'pos' (or 'group'), found {', '.join(names)}"
        )
    columns = [name for name in names if name in LINE]
    try:
        for batch in file.iter_batches(_BATCH, columns=columns, use_threads=False):
            yield batch.to_pylist()
    except (OSError, ValueError) as error:
        found = str(error).partition("\n")[0]
        raise ValueError(f"{path}: expected a complete Parquet file, found: {found}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
