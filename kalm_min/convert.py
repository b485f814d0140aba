"""Published data to training data: `python -m kalm_min.convert hub_folder --output data/train`.

    hub/<task>/train-00000-of-00003.parquet -> data/<task>/train-00000-of-00003.jsonl

Each row is checked like a line of training data, so that the result can be opened. Rows are read in
batches, so memory stays flat. Each file is complete or absent; the same command resumes after an
interruption. Needs `pip install "kalm-min[data]"`. Does not download or write `<task>.toml`.
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

from kalm_min import program
from kalm_min.config import run
from kalm_min.console import Progress
from kalm_min.data.records import LINE, problem_with_line
from kalm_min.files import Object, atomic_write, differences, read_json, write_json
from kalm_min.schema import LISTED, list_problems

_BATCH = 1000  # rows in memory at a time
_BUFFER = 1 << 20  # bytes of a column read at a time; the default is a full row group
_NOTED = ("split_instruction", "skip_bad_rows", "gzip")  # the options recorded with an output
_PREFIX = re.compile(r"\s*Instruct:\s*(.*?)\s*\n\s*Query:\s*(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Convert folders of Parquet files (query, pos, neg) into training data."""

    input: Annotated[Path, "Folder with Parquet files, in a sub-folder per task."]
    output: Annotated[Path, "Folder for the training data, with a sub-folder per task."]
    split_instruction: Annotated[
        bool, 'Move the prefix "Instruct: ... Query: ..." of a query into the key "instruction".'
    ] = False
    skip_bad_rows: Annotated[
        bool, "Leave out rows that are not valid examples; otherwise their file is not converted."
    ] = False
    gzip: Annotated[bool, "Compress for transfer; training decompresses the files."] = False


def main(argv: list[str]) -> int:
    """Run the command; `config.run` defines the exit codes."""
    return run(
        ConvertConfig, convert, argv, program="kalm_min.convert", positional="input", resumable=True
    )


def convert(config: ConvertConfig) -> int:
    """Convert the files whose output is absent or older.

    Raises ValueError for an input without Parquet files, for an output made with other options and,
    once all other files are done, for the files that could not be converted.
    """
    targets = _targets(config)
    # An output has one set of options, recorded in a hidden file, which is not data.
    noted, options = config.output / ".convert.json", {key: getattr(config, key) for key in _NOTED}
    before = read_json(noted) if noted.exists() else options
    if changed := differences(before, options):
        raise ValueError(
            f"{config.output}: converted before with other options ({changed}); "
            "give another --output, or delete it"
        )
    write_json(noted, options)
    todo = {
        source: target
        for source, target in targets.items()
        if not target.exists() or target.stat().st_mtime < source.stat().st_mtime
    }
    failures, rows, written = dict[Path, str](), 0, 0
    for source in todo:
        try:
            rows += _open(source).metadata.num_rows
        except ValueError as error:
            failures[source] = str(error)
    with Progress(rows, "rows", sys.stderr, title="convert") as progress:
        for source in [source for source in todo if source not in failures]:
            try:
                written += _convert_file(source, todo[source], config, progress)
            except ValueError as error:
                failures[source] = str(error)
    report = f"{written:,} rows of {len(todo) - len(failures)} files -> {config.output}"
    if kept := len(targets) - len(todo):
        report += f"; {kept} files had been converted before"
    sys.stderr.write(report + "\n")
    if failures:
        raise ValueError("\n".join(failures.values()))
    return 0


def _targets(config: ConvertConfig) -> dict[Path, Path]:
    """The output file of each Parquet file of the folder and of its sub-folders."""
    paths = sorted(path.relative_to(config.input) for path in config.input.rglob("*.parquet"))
    paths = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    expected = f"{config.input}: expected Parquet files, in a sub-folder per task"
    if not paths:
        raise ValueError(f"{expected}, found none")
    if deep := [path for path in paths if len(path.parts) > 2]:  # its task would be ambiguous
        raise ValueError(f"{expected}, found {deep[0]}")
    suffix = ".jsonl.gz" if config.gzip else ".jsonl"
    return {config.input / path: (config.output / path).with_suffix(suffix) for path in paths}


def _convert_file(source: Path, target: Path, config: ConvertConfig, progress: Progress) -> int:
    """Write a Parquet file as .jsonl or .jsonl.gz, complete or not at all; return its rows.

    Raises ValueError for a damaged file, a missing column and bad rows. Rows are counted from 1.
    """
    good, bad, problems = 0, 0, list[str]()
    with atomic_write(target) as plain, ExitStack() as stack:
        out = plain
        if config.gzip:  # without name and time, so that equal data gives equal files
            out = stack.enter_context(gzip.GzipFile("", "wb", 6, plain, mtime=0))
        for rows in _read(source):
            for row in rows:
                # The keys in the usual order, without empty ones.
                record: Object = {key: row[key] for key in LINE if row.get(key) not in (None, [])}
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
        listed = list_problems(bad, "bad row", problems)
        if bad and not config.skip_bad_rows:
            raise ValueError(f"{source}: not converted, {listed}")
        if not good:
            raise ValueError(f"{source}: expected at least one training example, found none")
    if bad:
        sys.stderr.write(f"{source}: left out {listed}\n")
    return good


def _open(path: Path) -> Any:
    """A pyarrow.parquet.ParquetFile."""
    try:
        from pyarrow.parquet import ParquetFile  # pyright: ignore -- it has no types

        # Without pre_buffer, which keeps everything it has read until the end of the file.
        return ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
    except ModuleNotFoundError as error:
        raise ValueError(
            'converting Parquet needs pyarrow: pip install "kalm-min[data]"'
        ) from error
    except (OSError, ValueError) as error:  # pyarrow's errors are of these classes
        found = str(error).partition("\n")[0]
        raise ValueError(f"{path}: expected a Parquet file, found: {found}") from error


def _read(path: Path) -> Iterator[list[Object]]:
    """Yield the rows in batches, with the columns that training data uses."""
    file = _open(path)
    names: list[str] = file.schema_arrow.names
    if "query" not in names or not {"pos", "group"} & {*names}:
        expected = "expected the columns 'query' and 'pos' (or 'group')"
        raise ValueError(f"{path}: {expected}, found {', '.join(names)}")
    try:
        columns = [name for name in names if name in LINE]
        for batch in file.iter_batches(_BATCH, columns=columns, use_threads=False):
            yield batch.to_pylist()
    except (OSError, ValueError) as error:
        found = str(error).partition("\n")[0]
        raise ValueError(f"{path}: expected a complete Parquet file, found: {found}") from error


if __name__ == "__main__":
    program.start("convert")
