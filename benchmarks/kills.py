"""Kill -9 at random points: the same command resumes every time, with the same final result.

    python benchmarks/kills.py [--points 20] [--processes 1 2] [--seed 0]

A tiny run with every part of the loss is completed without a break, then again in a chain: each start
of the same command is killed at a random point, and the next one resumes from what it left. Half of
the points are operations on files of the run or the data (the n-th that Python opens, renames,
removes, ...), which hits the building of the index, checkpoints and the log. The others are moments,
which hit everything else, including the middle of a write (an alarm without a handler ends a process
as kill -9 does). Half of the starts find no index of the data. With two processes, one is killed at
random, and the other must end by itself. The exit code is 0 if everything was equal.
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tokenizers import Tokenizer, models, pre_tokenizers

from kalm_min.config import parse

ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds after which a process counts as hanging
WORDS = "cat dog bird house mat blue far see run sat".split()
PLACES = {".kalm_min": "index of the data", "checkpoints": "checkpoint", "log.jsonl": "log"}
ARGUMENTS = """
--model.hidden-size 32 --model.intermediate-size 48 --model.num-hidden-layers 2
--model.initializer-range 0.3 --model.max-length 32 --sampling.batch-size 16
--sampling.num-negatives 3 --training.epochs 3 --training.save-every 3 --training.keep-checkpoints 2
--training.validate-every 6 --training.precision float32 --training.tokens-per-batch 300
--optimizer.learning-rate 0.01 --loss.temperature 0.1 --loss.gamma 0.5 --loss.mixing
--loss.distillation-weight 0.7 --loss.matryoshka-dims 32 8 --loss.matryoshka-weights 1 0.3
""".split()

CHILD = """
import os, runpy, signal, sys, time
root, operations, seconds, note = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
del sys.argv[:5]
seen, began = 0, 0.0
os._exit = sys.exit  # the note below is written whatever way the program ends
def watch(event, found):
    global seen, began
    if not (event.startswith(("open", "os.", "shutil.")) and str(found[0]).startswith(root)):
        return
    if not seen:
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, seconds)
    seen += 1
    if seen == operations:
        with open(note, "w") as file:
            file.write(f"{event} {found[0]}")
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    with open(note, "w") as file:
        file.write(f"{seen} {time.monotonic() - began}")
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of the kills."""

    points: Annotated[int, "Kills for each number of processes."] = 20
    processes: Annotated[tuple[int, ...], "Numbers of processes."] = (1, 2)
    seed: Annotated[int, "Seed of the points."] = 0


class Run:
    """One training run in its own folder, started repeatedly."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder, self.processes = folder, processes
        self.output, self.data = folder / "run", folder / "data"
        write_data(folder)

    def start(self, victim: int = -1, operations: int = 0, seconds: float = 0.0) -> list[int]:
        """Start the command; `victim` dies at an operation or after a time. Return the exit codes."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        group = {"WORLD_SIZE": self.processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started: list[subprocess.Popen[str]] = []
        for rank in range(self.processes):
            point = (operations, seconds) if rank == victim else (0, 0.0)
            given = [self.folder, *point, self.note(rank), ROOT / "train.py", *ARGUMENTS]
            given += ["--model.tokenizer", self.folder / "tokenizer", "--output", self.output]
            given += ["--data.path", self.data, "--data.validation", self.folder / "valid.jsonl"]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            if self.processes > 1:
                environment |= {key: str(value) for key, value in group.items()}
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-c", CHILD, *map(str, given)]
            with (self.folder / f"stderr.{rank}").open("w") as stderr:
                started.append(subprocess.Popen(command, env=environment, stderr=stderr, text=True))
        return [process.wait(PATIENCE) for process in started]

    def note(self, rank: int) -> Path:
        """A process's record: the operation at which it died, or their number and its time."""
        return self.folder.with_name(f"{self.folder.name}.note.{rank}")

    def outcome(self) -> tuple[list[dict[str, Any]], bytes, list[str]]:
        """The log without times, the weights, and the names of the checkpoints."""
        lines = [json.loads(line) for line in (self.output / "log.jsonl").read_text().splitlines()]
        log = [{k: v for k, v in line.items() if "second" not in k} for line in lines]
        kept = sorted(path.name for path in (self.output / "checkpoints").iterdir())
        return log, (self.output / "final" / "model.safetensors").read_bytes(), kept


def write_data(folder: Path) -> None:
    """Write three tasks of scored pairs, held-out pairs, and a tokenizer of letters."""
    rng = random.Random(0)
    for name in ("data/a", "data/b", "data/c", "valid"):
        texts = [" ".join(rng.choices(WORDS, k=5)) for _ in range(64)]
        rows = [
            {"query": f"{text} {name}", "pos": [f"{text} {i}"], "pos_scores": [0.9]}
            | {"neg": rng.sample(texts, 4), "neg_scores": [0.4, 0.3, 0.2, 0.1]}
            for i, text in enumerate(texts)
        ]
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: number for number, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))


def measure(processes: int, options: Options, folder: Path) -> bool:
    """Kill and restart until all points are used; print one row; return whether all was equal."""
    rng = random.Random(f"{options.seed} {processes}")
    whole = Run(folder / f"whole{processes}", processes)
    assert whole.start() == [0] * processes, (whole.folder / "stderr.0").read_text()
    reach = [whole.note(rank).read_text().split() for rank in range(processes)]
    hits: Counter[str] = Counter()
    slowest, ends, equal = 0.0, 0, 0
    while sum(hits.values()) < options.points:
        chain = Run(folder / f"chain{processes}.{ends}", processes)
        while True:
            left = options.points - sum(hits.values())
            victim = rng.randrange(processes) if left else -1
            operations, seconds = reach[victim]
            point = (rng.randint(1, int(operations)), 0.0)
            if rng.random() < 0.5:
                point = (0, rng.uniform(0.001, float(seconds)))
            if rng.random() < 0.5:
                shutil.rmtree(chain.data / ".kalm_min", ignore_errors=True)
            began = time.monotonic()
            codes = chain.start(victim, *point)
            slowest = max(slowest, time.monotonic() - began)
            if not any(codes):
                break
            error = (chain.folder / f"stderr.{max(victim, 0)}").read_text()
            if not left or codes[victim] >= 0:
                raise AssertionError(f"exit codes {codes} without a kill: {error}")
            hits[kill_site(chain.note(victim).read_text()) if point[0] else "a moment"] += 1
        ends += 1
        equal += chain.outcome() == whole.outcome()
    where = ", ".join(f"{name} {count}" for name, count in sorted(hits.items()))
    print(f"| {processes} | {sum(hits.values())} | {where} | {equal} of {ends} | {slowest:.0f} |")
    return equal == ends


def kill_site(note: str) -> str:
    """What a process was doing when it died at an operation."""
    return next((name for part, name in PLACES.items() if part in note), "elsewhere")


def main(argv: list[str]) -> int:
    """Print the table."""
    options = parse(Options, argv, program="kills.py", description="Kill -9 at random points.")
    print(
        "| processes | kills | during | ends equal to the unbroken run | longest start, seconds |"
    )
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        return int(not all(measure(n, options, Path(folder)) for n in options.processes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
