"""The cost of growing data: planning an epoch, indexing a file, checking its lines.

    python benchmarks/data_scale.py [--folder DIR] [--rows 100000 ... 470000000] [--lines 100000 ...]

Prints one table: each size with its time, the time per row, and the peak of the memory that numpy
and Python allocated (memory-mapped files belong to the system and are not counted). The sampler's
memory is also given in multiples of its index array. A "capped" plan takes a quarter of the rows of
each task.
"""

import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from kalm_min.config import parse
from kalm_min.data import JsonlFile, TrainingData
from kalm_min.sampling import TaskBatchSampler

TASKS = 25
BATCH = 8192
LINE = b'{"query": "what is written in line %09d", "pos": ["a passage of some words, %s"]}\n'
TEXT = b"and of some more words until it is about as long as a sentence is"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Sizes to measure."""

    rows: Annotated[
        tuple[int, ...], "Rows of the epochs to plan; the largest takes about 4 GB."
    ] = (10**5, 10**6, 10**7, 10**8, 470_000_000)
    lines: Annotated[
        tuple[int, ...], "Lines of the files to index; the largest takes 1.6 GB of disk."
    ] = (10**5, 10**6, 10**7)
    folder: Annotated[
        Path | None,
        "Folder of temporary files; none: the system's.",
    ] = None


def main(argv: list[str]) -> None:
    """Measure and print."""
    options = parse(Options, argv, program="data_scale.py", description="How data grows.")
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    print("| what | rows | seconds | CPU seconds | ns a row | peak MB | in index arrays |")
    print("|---|---|---|---|---|---|---|")
    for rows in options.rows:
        sampler(rows)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for lines in options.lines:
            files(lines, Path(folder) / f"{lines}.jsonl")


def sampler(rows: int) -> None:
    """Plan an epoch of `rows` rows in tasks of unequal sizes, up to its first batch."""
    parts = [rows * (2 * t + 1) // TASKS**2 for t in range(TASKS)]
    whole = TaskBatchSampler(parts, BATCH)
    mixed = TaskBatchSampler(parts, BATCH, homogeneous_ratio=0.5)
    capped = TaskBatchSampler(parts, BATCH, task_draws=[size // 4 for size in parts])
    for name, plan in (("", whole), (", ratio 0.5", mixed), (", capped", capped)):
        line(f"epoch{name}", rows, lambda plan=plan: next(iter(plan)), 4 * sum(plan.draws))


def files(lines: int, path: Path) -> None:
    """Index, open and check a file of `lines` lines."""
    with path.open("wb") as file:
        for start in range(0, lines, 10_000):
            file.write(b"".join(LINE % (i, TEXT) for i in range(start, start + 10_000)))
    line("file, read", lines, lambda: read(path))
    line("index, built", lines, lambda: JsonlFile(path))
    line("index, opened", lines, lambda: JsonlFile(path)[lines // 2])
    # Not traced: lines are read by child processes, and tracing would slow them or miss them.
    line("check of all lines", lines, lambda: TrainingData(path), traced=False)
    line("data, opened", lines, lambda: TrainingData(path)[lines // 2])
    path.unlink()


def read(path: Path) -> None:
    """Read a file from start to end, which every index must do."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 22):
            pass


def line(
    name: str, rows: int, measured: Callable[[], object], index: int = 0, *, traced: bool = True
) -> None:
    """Print one row of the table; `index` is the size of an index array in bytes."""
    if traced:
        tracemalloc.start()
    start, used = time.perf_counter(), sum(os.times()[:4])
    measured()
    seconds, used = time.perf_counter() - start, sum(os.times()[:4]) - used
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    shown = f"{peak / 1e6:.1f}" if traced else ""
    arrays = f"{peak / index:.2f}" if index else ""
    print(
        f"| {name} | {rows:.3g} | {seconds:.4f} | {used:.2f} | {1e9 * seconds / rows:.2f} "
        f"| {shown} | {arrays} |",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
