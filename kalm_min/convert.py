"""Published data to training data: `python -m kalm_min.convert hub_folder --output data/train`.

The folder holds Parquet files, in a sub-folder per task, with the columns query, pos and neg. Each
file becomes one of JSON lines, complete or absent; the same command goes on where it was
interrupted. Needs `pip install "kalm-min[data]"`.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from kalm_min.config import parse
from kalm_min.console import Progress
from kalm_min.data.parquet import convert_file, count_rows, parquet_files, told
from kalm_min.files import read_json, write_json

_OPTIONS = ".convert.json"  # in the output: hidden entries are not data


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Parquet to training data."""

    input: Path
    """Folder with Parquet files; may also stand first, without a flag."""
    output: Path
    """Folder for the training data, a sub-folder per task."""
    split_instruction: bool = False
    """Make "Instruct: ... Query: ..." at the start of queries the instruction of the line."""
    skip_bad_rows: bool = False
    """Leave out rows that are no training examples; else their file is not converted."""
    gzip: bool = False
    """Compress. Training unpacks the files again, so it saves space on the way only."""


def main(argv: list[str]) -> int:
    """Convert; 0 when all files are there, 2 for what the user can mend."""
    if argv and not argv[0].startswith("-") and not argv[0].endswith(".toml"):
        argv = ["--input", *argv]
    description = "Convert folders of Parquet files (query, pos, neg) into training data."
    config = parse(ConvertConfig, argv, program="kalm_min.convert", description=description)
    try:
        sources = parquet_files(config.input)
        _claim(config)
        failures = _convert(config, sources)
    except (ValueError, OSError) as error:
        failures = [str(error)]
    for failure in failures:
        sys.stderr.write(f"kalm_min.convert: {failure}\n")
    return 2 if failures else 0


def _claim(config: ConvertConfig) -> None:
    """Note the options in the output. Raises ValueError where it was made with others."""
    options = {key: value for key, value in asdict(config).items() if isinstance(value, bool)}
    path = config.output / _OPTIONS
    if not path.exists():
        write_json(path, options)
    elif (before := read_json(path)) != options:
        changed = ", ".join(
            f"{key} {str(before.get(key)).lower()}"
            for key in options
            if before.get(key) != options[key]
        )
        raise ValueError(
            f"{config.output}: converted before with {changed}; give another --output, or delete it"
        )


def _convert(config: ConvertConfig, sources: list[Path]) -> list[str]:
    """Convert what is not there yet; what went wrong, file by file."""
    suffix = ".jsonl.gz" if config.gzip else ".jsonl"
    targets = [
        (config.output / source.relative_to(config.input)).with_suffix(suffix) for source in sources
    ]
    waiting = [
        (source, target)
        for source, target in zip(sources, targets, strict=True)
        if not target.exists() or target.stat().st_mtime < source.stat().st_mtime
    ]
    failures: list[str] = []
    written = 0
    with Progress(_total(waiting), "rows", sys.stderr, title="convert") as progress:
        for source, target in waiting:
            note = str(source.relative_to(config.input))
            try:
                done = convert_file(
                    source,
                    target,
                    split_instruction=config.split_instruction,
                    skip_bad_rows=config.skip_bad_rows,
                    report=lambda rows, note=note: progress.update(rows, note),
                )
            except ValueError as error:
                failures.append(str(error))
                continue
            written += done.rows
            if done.bad:
                sys.stderr.write(f"{source}: left out {told(done)}\n")
    sys.stderr.write(
        f"{written:,} rows of {len(waiting) - len(failures)} files -> {config.output}"
        + (f"; {there} files were there" if (there := len(sources) - len(waiting)) else "")
        + "\n"
    )
    return failures


def _total(waiting: list[tuple[Path, Path]]) -> int:
    """Rows to convert; a file that cannot be read is told when its turn comes."""
    total = 0
    for source, _ in waiting:
        try:
            total += count_rows(source)
        except ValueError:
            continue
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
