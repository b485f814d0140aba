"""Encode a file of texts: `python -m kalm_min.encode texts.txt --model DIR --output out.npy`.

The input has one text per line, or is a .jsonl(.gz) file with the key "text" in every line (any
title already joined to the text). Row i of the output belongs to line i, even if lines of a text
file are blank. The output is a plain .npy file, float32, (lines, dimensions), complete or absent.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from kalm_min.config import run
from kalm_min.embedder import Embedder
from kalm_min.files import atomic_write, read_jsonl, read_lines
from kalm_min.schema import Field, is_string, problem_with

_LINE = {"text": Field("a string", is_string, required=True)}


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeConfig:
    """Encode a file of texts, one per line, into a .npy file of vectors."""

    input: Annotated[Path, 'One text per line, or .jsonl(.gz) with the key "text".']
    model: Annotated[str, "Model folder or hub id."]
    output: Annotated[Path, "The .npy file to write."]
    prompt_name: Annotated[Literal["query", "document"] | None, "Stored prompt to prepend."] = None
    prompt: Annotated[str | None, "Text to prepend to every text."] = None
    truncate_dim: Annotated[int | None, "Leading dimensions to keep; none: all."] = None
    normalize: Annotated[bool, "Scale every vector to unit length."] = True
    max_length: Annotated[int | None, "Tokens kept per text; none: the model's limit."] = None
    device: Annotated[str | None, "cpu, cuda, cuda:1, ...; none: the first GPU or the CPU."] = None
    dtype: Annotated[str | None, "float32, bfloat16, ...; none: the fastest safe one."] = None

    def __post_init__(self) -> None:
        """Validate option combinations."""
        if self.prompt is not None and self.prompt_name is not None:
            raise ValueError("give prompt or prompt_name, not both")
        if self.output.suffix != ".npy":
            raise ValueError(f"output: expected a name that ends in .npy, found {self.output.name}")


def read_texts(path: Path) -> list[str]:
    """Read the texts of a file. Raises ValueError with file:line for a line without a text."""
    texts: list[str] = []
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        for number, record in read_jsonl(path):
            if problem := problem_with(record, _LINE, extra=True):
                raise ValueError(f"{path}:{number}: {problem}")
            texts.append(record["text"])
    else:
        texts = read_lines(path)
    if not texts:
        raise ValueError(f"{path}: expected at least one text, found none")
    return texts


def encode(config: EncodeConfig) -> int:
    """Encode the texts and write their vectors."""
    texts = read_texts(config.input)
    length = config.max_length
    model = Embedder.from_pretrained(config.model, config.device, config.dtype, max_length=length)
    prompt = model.prompts[config.prompt_name] if config.prompt_name else config.prompt or ""
    vectors = model.encode(
        texts,
        prompt,
        truncate_dim=config.truncate_dim,
        normalize_embeddings=config.normalize,
        show_progress_bar=sys.stderr.isatty(),
    )
    with atomic_write(config.output) as file:
        np.save(file, vectors, allow_pickle=False)
    blank = 0 if prompt else texts.count("")
    note = f" ({blank} blank lines are zero vectors)" if blank else ""
    shape = f"{len(texts):,} texts, {vectors.shape[1]} dimensions"
    sys.stderr.write(f"{shape}, {model.dtype} on {model.device} -> {config.output}{note}\n")
    return 0


main = partial(run, EncodeConfig, encode, program="kalm_min.encode", positional="input")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
