"""Vectors without writing Python: `python -m kalm_min.encode texts.txt --model DIR --output vectors.npy`.

One text a line (or a .jsonl(.gz) file with a "text" in every line, title and all already joined), one
row of the output a line: row i is line i, also where a line is blank. The output is a plain .npy file,
float32, (lines, dimensions), complete or absent.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from kalm_min.config import parse
from kalm_min.embedder import Embedder
from kalm_min.files import atomic_write, read_jsonl


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeConfig:
    """Encode a file of texts."""

    input: Path
    """One text a line, or .jsonl(.gz) with the key "text"; may also stand first, without a flag."""
    model: str
    """Model folder or hub id."""
    output: Path
    """The .npy file to write."""
    prompt_name: Literal["query", "document"] | None = None
    """Put the model's stored prompt for queries or documents before every text."""
    prompt: str | None = None
    """Put this before every text."""
    truncate_dim: int | None = None
    """Keep this many leading coordinates (Matryoshka)."""
    normalize: bool = True
    """Scale every vector to unit length."""
    max_length: int | None = None
    """Tokens kept of a text; none takes the model's."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; none takes the first GPU, else the CPU."""
    dtype: str | None = None
    """float32, bfloat16, ...; none takes the fastest that is safe."""

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        if self.prompt is not None and self.prompt_name is not None:
            raise ValueError("give prompt or prompt_name, not both")
        if self.output.suffix != ".npy":
            raise ValueError(f"output: expected a name that ends in .npy, found {self.output.name}")


def read_texts(path: Path) -> list[str]:
    """The texts of a file. Raises ValueError with file:line for what is not one."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        texts: list[str] = []
        for number, line in read_jsonl(path):
            text = line.get("text")
            if not isinstance(text, str):
                raise ValueError(
                    f'{path}:{number}: expected the key "text" with a string, '
                    f"found {', '.join(line) or 'no keys'}"
                )
            texts.append(text)
    else:
        texts = []
        for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                texts.append(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: expected UTF-8, found {error.reason}"
                ) from error
    if not texts:
        raise ValueError(f"{path}: expected at least one text, found none")
    return texts


def main(argv: list[str]) -> int:
    """Encode; 0 when the file is written, 2 for what the user can mend."""
    if argv and not argv[0].startswith("-") and not argv[0].endswith(".toml"):
        argv = ["--input", *argv]
    description = "Encode a file of texts, one a line, into a .npy file of vectors."
    config = parse(EncodeConfig, argv, program="kalm_min.encode", description=description)
    try:
        texts = read_texts(config.input)
        model = Embedder.from_pretrained(
            config.model, config.device, config.dtype, max_length=config.max_length
        )
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
    except (ValueError, OSError) as error:
        sys.stderr.write(f"kalm_min.encode: {error}\n")
        return 2
    blank = sum(not text for text in texts) if not prompt else 0
    sys.stderr.write(
        f"{vectors.shape[0]:,} texts, {vectors.shape[1]} dimensions, {model.dtype} on {model.device}"
        f" -> {config.output}" + (f" ({blank} blank lines are zero vectors)\n" if blank else "\n")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
