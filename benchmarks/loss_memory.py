"""Memory and time of the loss alone, on a CPU: forward and backward over given vectors.

    python benchmarks/loss_memory.py [--queries 8192] [--per-query 8] [--budget 1.0]

Prints, for growing batches, the seconds and, from a second process, the peak resident memory above
the vectors and their gradients, beside the budget. The loss uses five Matryoshka dimensions, the focal
weight and masking, in float32.
"""

import ctypes
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from kalm_min.config import parse
from kalm_min.losses import ContrastiveBatch
from kalm_min.training.step import LossConfig, contrastive_loss

WIDTH = 896
_MMAP_THRESHOLD = -3  # parameters of glibc's mallopt


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Sizes of the batches."""

    queries: Annotated[
        int, "Queries of the largest batch; batches grow up to it by factors of four."
    ] = 8192
    per_query: Annotated[int, "Documents per query."] = 8
    budget: Annotated[float, "GiB that the scores may take."] = 1.0
    share: Annotated[
        float,
        "Share of the queries that are scored against all documents; less takes less time and the same peak of memory.",
    ] = 1.0
    memory: Annotated[bool, "Set by the benchmark itself: measure memory, in a fresh process."] = (
        False
    )


def fresh_memory() -> None:
    """Make the C library take every large block from the system and return it when it is freed.

    Call this at the start of a process. The peak is then that of live tensors, and everything is
    slower, since fresh pages cost more than the sums.
    """
    if not torch.cuda.is_available():
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)


def measured_afresh(script: str, argv: list[str]) -> list[float]:
    """The numbers that a script prints in a separate process that measures memory."""
    command = [sys.executable, script, *argv, "--memory", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


def peak(reset: bool = False) -> float:
    """Peak resident memory of this process in GiB, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) / 2**20


def measure(queries: int, options: Options) -> tuple[float, float]:
    """(seconds, GiB above the vectors and their gradients) of one forward and backward."""
    count = queries * options.per_query
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(queries, WIDTH, generator=generator, requires_grad=True)
    d = torch.randn(count, WIDTH, generator=generator, requires_grad=True)
    q.grad, d.grad = torch.zeros_like(q), torch.zeros_like(d)
    numbers, owners = torch.arange(queries), torch.arange(count) // options.per_query
    scored = slice(int(queries * options.share))
    unused = torch.zeros(0)  # neither distillation nor mixing
    batch = ContrastiveBatch(
        queries=q[scored],
        documents=d,
        rows=numbers[scored, None] * options.per_query,
        query_meta=torch.stack([numbers + 1, numbers * 0, numbers])[:, scored],
        document_meta=torch.stack([torch.arange(count) + 10**9, owners * 0, owners, owners * 0]),
        positives=numbers[scored, None] - 10**9,
        in_batch=numbers[scored] >= 0,
        teacher=unused,
        mix_pair=unused,
        mix_share=unused,
    )
    config = LossConfig(
        gamma=0.5,
        matryoshka_dims=(896, 512, 256, 128, 64),
        matryoshka_weights=(1.0, 0.3, 0.2, 0.1, 0.1),
        memory_gib=options.budget,
    )
    before, start = peak(reset=True), time.perf_counter()
    value, _ = contrastive_loss(batch, config)
    value.backward()
    return time.perf_counter() - start, peak() - before


def main(argv: list[str]) -> None:
    """Print one row per size."""
    options = parse(Options, argv, program="loss_memory.py", description="Memory of the loss.")
    sizes = [options.queries // 4**k for k in (3, 2, 1, 0)]
    if options.memory:
        fresh_memory()
        print(*(measure(queries, options)[1] for queries in sizes))
        return
    print(
        f"{torch.get_num_threads()} threads, float32, budget {options.budget} GiB, {options.share} of the queries"
    )
    print("| queries x documents | seconds | ns a pair | peak above vectors and gradients, GiB |")
    print("|---|---|---|---|")
    peaks = measured_afresh(__file__, argv)
    for queries, gib in zip(sizes, peaks, strict=True):
        taken, _ = measure(queries, options)
        pairs = int(queries * options.share) * queries * options.per_query
        print(
            f"| {queries:,} x {queries * options.per_query:,} | {taken:.1f} | "
            f"{taken / pairs * 1e9:.1f} | {gib:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
