"""Shared by the speed benchmarks: real texts, alternating rounds, the machine's limit, the report.

Programs take turns, round by round, so that a change of the machine's speed affects all of them. The
first round is not counted, and a measurement during which other work kept a processor busy is
repeated. The limit is the decoder's matrix products alone: the same weights and the same number of
rows, with nothing between the products.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F

from kalm_min import Embedder
from kalm_min.files import read_jsonl, write_json
from kalm_min.model.qwen2 import Linear

_CALM = 0.1  # a time counts if other work used at most this many processors


@dataclass(frozen=True, kw_only=True, slots=True)
class Common:
    """Options common to all speed benchmarks."""

    data: Annotated[
        Path,
        "Folder of training files (.jsonl, .jsonl.gz), one per task, whose texts are used.",
    ]
    tokenizer: Annotated[Path, "Folder of the Qwen2 tokenizer."]
    layers: Annotated[
        int, "Layers of the Qwen2-0.5B shape, which has 24; all layers cost the same."
    ] = 6
    rounds: Annotated[
        int, "Measured runs of each program, in turn, after one that is not counted."
    ] = 3
    output: Annotated[Path | None, "Write conditions, seconds and ratios into this .json file."] = (
        None
    )


def device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def lines(folder: Path, count: int, task: str = "*") -> list[dict[str, Any]]:
    """`count` lines of the training files, equally many of every task."""
    files = sorted(folder.glob(f"{task}.jsonl*"))
    each = -(-count // len(files))
    found = [[line for _, line in islice(read_jsonl(file), each)] for file in files]
    return [rows[i] for i in range(each) for rows in found if i < len(rows)][:count]


def texts(folder: Path, count: int) -> list[str]:
    """Distinct texts of every task, queries and positives in turn."""
    rows = lines(folder, count)
    return list(dict.fromkeys(text for row in rows for text in (row["query"], row["pos"][0])))[
        :count
    ]


def alternate(programs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every program, run `rounds` times in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, program in programs.items():
            print(f"round {number}, {name}", file=sys.stderr)
            others, taken = _timed(program)
            if number and others > _CALM:
                others, taken = min((others, taken), _timed(program))
            if number:
                seconds[name].append(taken)
    return seconds


def _timed(program: Callable[[], object]) -> tuple[float, float]:
    """(processors that other work kept busy, seconds)."""
    before = _processor_seconds()
    program()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    busy, own, wall = (b - a for a, b in zip(before, _processor_seconds(), strict=True))
    others = (busy - own) / wall
    print(f"  {wall:.2f} s, {own:.2f} of a processor, others {others:.2f}", file=sys.stderr)
    return others, wall


def products(model: torch.nn.Module, rows: Sequence[int]) -> Callable[[], None]:
    """The matrix products of the decoder for batches of these many tokens, and nothing else."""
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, Linear)]
    dims = {weight.shape[1] for weight in weights}
    inputs = {
        (count, dim): torch.randn(count, dim).to(weights[0]) for count in rows for dim in dims
    }

    @torch.no_grad()
    def run() -> None:
        for count in rows:
            for weight in weights:
                F.linear(inputs[count, weight.shape[1]], weight)

    return run


def product_flops(embedder: Embedder, tokens: int) -> int:
    """Operations of the matrix products of the decoder for this many tokens; attention is not counted."""
    modules = embedder.model.modules()
    return 2 * tokens * sum(m.weight.numel() for m in modules if isinstance(m, Linear))


def ratio(seconds: dict[str, list[float]], slower: str, faster: str) -> float:
    """How many times as long one program took as the other, as the median over the rounds."""
    pairs = zip(seconds[slower], seconds[faster], strict=True)
    return statistics.median(a / b for a, b in pairs)


class Report:
    """A table on the terminal, the same data as JSON, and the ratios that `all.py` compares."""

    def __init__(self, name: str, options: Common) -> None:
        self.output = options.output
        self.columns: list[str] = []
        self.found: dict[str, Any] = {
            "benchmark": name,
            "command": " ".join(sys.argv),
            "conditions": conditions(),
            "rows": [],
            "ratios": {},
        }
        self._before = _processor_seconds()
        print(f"{name}: {', '.join(f'{k} {v}' for k, v in self.found['conditions'].items())}")

    def note(self, text: str) -> None:
        """Print a line about what is measured."""
        self.found.setdefault("notes", []).append(text)
        print(text)

    def row(self, **cells: object) -> None:
        """Print a row of the table; the first row also prints the column names."""
        if list(cells) != self.columns:
            self.columns = list(cells)
            print(f"\n| {' | '.join(self.columns)} |\n|{'---|' * len(cells)}")
        self.found["rows"].append(cells)
        shown = (f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells.values())
        print(f"| {' | '.join(shown)} |", flush=True)

    def ratio(self, name: str, value: float) -> None:
        """Record a ratio, which depends little on the machine's state; larger is better."""
        self.found["ratios"][name] = round(value, 3)

    def close(self) -> None:
        """Print the ratios and the load from other work, and write the file."""
        busy, own, wall = (b - a for a, b in zip(self._before, _processor_seconds(), strict=True))
        self.found["processors busy with other work"] = round((busy - own) / wall, 2)
        print()
        for name, value in self.found["ratios"].items():
            print(f"{name}: {value:.2f}")
        print(
            f"processors busy with other work: {(busy - own) / wall:.2f}, {wall:.0f} seconds in all"
        )
        if self.output:
            write_json(self.output, self.found)


def conditions() -> dict[str, Any]:
    """The machine and the versions of the run."""
    cuda = torch.cuda.is_available()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def _processor_seconds() -> tuple[float, float, float]:
    """Seconds (of all processors, of this process and its children, of the clock)."""
    stat = Path("/proc/stat")
    busy = 0.0
    if stat.is_file():
        user, nice, system, _, _, irq, soft, *_ = map(int, stat.read_text().split()[1:9])
        busy = (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")
    return busy, sum(os.times()[:4]), time.perf_counter()
