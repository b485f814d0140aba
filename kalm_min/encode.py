"""Encode a file of texts: `python -m kalm_min.encode texts.txt --model DIR --output out.npy`.

The input has one text per line, or it is a .jsonl, .csv or .tsv that holds them under `--column`
(any title already joined to the text); "-" is standard input, one text per line. Row i of the
output belongs to line i, of a table to row i, also if it is blank. The output is a plain .npy file,
(lines, dimensions), float32 or what `--precision` says, complete or absent.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from kalm_min import program
from kalm_min.config import check_output, run
from kalm_min.files import in_words, read_lines, read_table
from kalm_min.schema import Field, is_string, read_rows
from kalm_min.settings import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeConfig:
    """Encode a file of texts, one per line, into a .npy file of vectors."""

    input: Annotated[Path, 'One text per line, .jsonl, .csv or .tsv; "-" is standard input.']
    model: Annotated[str, "Model folder or hub id."]
    output: Annotated[Path, "The .npy file to write."]
    column: Annotated[str, "Key of a .jsonl, or column of a table, that holds the texts."] = "text"
    prompt_name: Annotated[str | None, "Stored prompt to prepend: query, document, ..."] = None
    prompt: Annotated[str | None, "Text to prepend to every text."] = None
    truncate_dim: Annotated[int | None, "Leading dimensions to keep; none: all."] = None
    normalize: Annotated[bool, "Scale every vector to unit length."] = True
    precision: Annotated[Precision, "Bits of a coordinate in the output."] = "float32"
    ranges: Annotated[
        Path | None,
        "A .npy of vectors by which int8 and uint8 are calibrated; none: by the output.",
    ] = None
    max_length: Annotated[int | None, "Tokens kept per text; none: the model's limit."] = None
    device: Annotated[str | None, "cpu, cuda, cuda:1, ...; none: the first GPU or the CPU."] = None
    dtype: Annotated[str | None, "float32, bfloat16, ...; none: the fastest safe one."] = None

    def __post_init__(self) -> None:
        """Validate option combinations."""
        if self.prompt is not None and self.prompt_name is not None:
            raise ValueError("give prompt or prompt_name, not both")
        if self.output.suffix != ".npy":
            raise ValueError(f"output: expected a name that ends in .npy, found {self.output.name}")


def read_texts(path: Path, column: str = "text") -> list[str]:
    """Read the texts of a file. Raises ValueError with file:line for a line without a text."""
    kind = Path(path.name.removesuffix(".gz")).suffix
    path = Path("/dev/stdin") if str(path) == "-" else path
    if kind in (".csv", ".tsv"):
        (_, names), *rows = [*read_table(path)] or [(0, [])]
        if column not in names:
            raise ValueError(
                f"{path}: expected the column {column!r}, found {in_words(names)}; name the one to "
                "encode with --column (kalm-min convert makes training data of a table)"
            )
        for line, cells in rows:
            if len(cells) != len(names):
                raise ValueError(f"{path}:{line}: expected {len(names)} cells, found {len(cells)}")
        texts = [cells[names.index(column)] for _, cells in rows]
    else:
        texts = read_lines(path)
    if kind == ".jsonl":
        problems = list[str]()
        fields = {column: Field("a string", is_string, required=True)}
        found = {line: row[column] for line, row in read_rows(path, fields, problems)}
        if problems:
            raise ValueError(problems[0])
        texts = [found.get(line, "") for line, _ in enumerate(texts, 1)]
    if not texts:
        raise ValueError(f"{path}: expected at least one text, found none")
    return texts


def encode(config: EncodeConfig) -> int:
    """Encode the texts and write their vectors."""
    import numpy as np

    from kalm_min.embedder import Embedder, quantize
    from kalm_min.vectors import write_array

    check_output(config.output.parent, marks=["."])
    texts = read_texts(config.input, config.column)
    try:
        ranges = None if config.ranges is None else np.load(config.ranges, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{config.ranges}: expected a .npy file, found: {error}") from error
    length, name = config.max_length, config.prompt_name
    model = Embedder.from_pretrained(config.model, config.device, config.dtype, max_length=length)
    options = (config.prompt, config.truncate_dim, config.normalize, sys.stderr.isatty())
    vectors = model.encode(texts, *options, prompt_name=name)
    blank = int((~vectors.any(1)).sum())
    vectors = quantize(vectors, config.precision, ranges)
    write_array(config.output, vectors)
    note = f" ({blank} blank lines are zero vectors)" if blank else ""
    shape = f"{len(texts):,} texts, {vectors.shape[1]} dimensions"
    sys.stderr.write(f"{shape}, {model.dtype} on {model.device} -> {config.output}{note}\n")
    return 0


main = partial(run, EncodeConfig, encode, loads="kalm_min.embedder", positional="input")

if __name__ == "__main__":
    program.start("encode")
