"""From a cold process to the first vector: import, load, encode one text.

    python benchmarks/startup.py --tokenizer DIR [--layers 24] [--rounds 5]

Each round starts one fresh process of kalm_min and one of sentence-transformers on the same folder, in
turn, so that a change of the machine's speed affects both. Both run with their defaults (kalm_min in
the dtype it chooses, the peer as loaded from a float32 folder) and in float32.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from random_model import build

from kalm_min.config import parse

OURS = """
import sys
from kalm_min import Embedder
Embedder.from_pretrained(sys.argv[1], dtype={dtype}).encode("the first text")
"""
PEER = """
import sys
from sentence_transformers import SentenceTransformer
SentenceTransformer(sys.argv[1], device="cpu").encode("the first text")
"""
PROGRAMS = {
    "kalm_min, default settings": OURS.format(dtype=None),
    "kalm_min, float32": OURS.format(dtype="'float32'"),
    "sentence-transformers": PEER,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of the comparison."""

    tokenizer: Annotated[Path, "Folder of the Qwen2 tokenizer."]
    layers: Annotated[int, "Layers of the Qwen2-0.5B shape."] = 24
    rounds: Annotated[int, "Processes of each kind, after one that is not counted."] = 5


def main(argv: list[str]) -> None:
    """Measure in turn; print medians and ratios."""
    options = parse(Options, argv, program="startup.py", description="Time to the first vector.")
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as folder:
        build(options.tokenizer, layers=options.layers).save_pretrained(folder)
        for number in range(options.rounds + 1):
            for name, program in PROGRAMS.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, "-W", "ignore", "-c", program, folder], check=True)
                if number:
                    seconds[name].append(time.perf_counter() - start)
    peer = seconds["sentence-transformers"]
    print(
        "| program | seconds (median) | min - max | share of sentence-transformers, pair by pair |"
    )
    print("|---|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, peer, strict=True))
        spread = f"{min(values):.1f} - {max(values):.1f}"
        print(f"| {name} | {statistics.median(values):.2f} | {spread} | {ratio:.2f} |")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"largest resident memory of any of them: {peak:.2f} GiB")


if __name__ == "__main__":
    main(sys.argv[1:])
