"""Exact search: kalm_min, faiss's flat index, and the bare matrix product that neither can beat.

    python benchmarks/search.py [--documents 200000] [--queries 10000] [--dim 896] [--k 100]
    python benchmarks/search.py --memory [--sizes 100000 2000000] [--dim 64]
    torchrun --nproc-per-node 3 benchmarks/search.py --agree --documents 50000 --dim 256 [--vectors DIR]

All three take the queries in parts, in turn, so that a change of the machine's speed affects them
equally; ratios are medians over the parts. Vectors are random unit vectors. faiss's index holds its
own copy of the documents; building it is not timed.

--memory searches documents on disk and applies the mining rules to the result, each size in a fresh
process, and prints the increase of its resident memory (Linux only).

--agree compares ids, order and scores from torch, faiss, a GPU and all processes together.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from kalm_min.config import parse
from kalm_min.mining.pipeline import as_pairs, stored_neighbours
from kalm_min.mining.rules import Labels, select
from kalm_min.mining.texts import TEXT, TextIndex
from kalm_min.options import Rules
from kalm_min.topk import Ints, Vectors, merge, on_grid, top_k
from kalm_min.training import distributed
from kalm_min.vectors import StoredVectors, TextSet

_SHARD = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is searched."""

    documents: Annotated[int, "Number of vectors that are searched."] = 200_000
    queries: Annotated[int, "Number of query vectors."] = 10_000
    dim: Annotated[int, "Dimension of the vectors."] = 896
    k: Annotated[int, "Neighbours."] = 100
    rounds: Annotated[int, "Parts into which the queries are divided."] = 10
    device: Annotated[str, "Device of the products; faiss stays on the CPU."] = "cpu"
    memory: Annotated[bool, "Measure memory instead of speed."] = False
    sizes: Annotated[tuple[int, ...], "Documents on disk, for --memory."] = (
        100_000,
        500_000,
        2_000_000,
    )
    agree: Annotated[bool, "Compare neighbours instead of measuring; fail if they differ."] = False
    vectors: Annotated[
        Path | None,
        "For --agree: a folder of .npy files with vectors, as a store has; none: random ones.",
    ] = None
    child: Annotated[
        Path | None,
        "Set by the benchmark itself: the folder of documents a memory process searches.",
    ] = None


def main(argv: list[str]) -> None:
    """Measure and print a table."""
    options = parse(Options, argv, program="search.py", description="Exact search, measured.")
    if options.child is not None:
        print(*searched_on_disk(options, options.child))
    elif options.memory:
        memory(options)
    elif options.agree:
        agree(options)
    else:
        speed(options)


def unit(count: int, dim: int, seed: int) -> Vectors:
    """Random unit vectors on the grid of the store, made in blocks."""
    rng = np.random.default_rng(seed)
    vectors = np.empty((count, dim), np.float32)
    for start in range(0, count, _SHARD):
        block = rng.standard_normal((min(_SHARD, count - start), dim), np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        vectors[start : start + _SHARD] = on_grid(block)
    return vectors


def speed(options: Options) -> None:
    """Alternate kalm_min, faiss and the product; print medians and ratios."""
    documents = unit(options.documents, options.dim, 0)
    queries = unit(options.queries, options.dim, 1)
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(options.dim)
    index.add(documents)
    programs = {
        "kalm_min": lambda part: top_k(part, documents, options.k, device=options.device).ids,
        "faiss IndexFlatIP": lambda part: index.search(part, options.k)[1],
        "matrix product alone": lambda part: product(part, documents, options.device),
    }
    wall: dict[str, list[float]] = {name: [] for name in programs}
    work: dict[str, float] = dict.fromkeys(programs, 0.0)
    different = 0.0
    for part in np.array_split(queries, options.rounds):
        found: list[Any] = []
        for name, program in programs.items():
            start, started = time.perf_counter(), time.process_time()
            found.append(program(part))
            wall[name].append(time.perf_counter() - start)
            work[name] += time.process_time() - started
        different += (found[0] != found[1]).sum() / (options.queries * options.k)
    flop = 2 * options.queries * options.documents * options.dim
    print(
        f"{options.queries:,} queries, {options.documents:,} documents, {options.dim} dimensions, "
        f"top {options.k}, {torch.get_num_threads()} threads, in {options.rounds} parts\n"
    )
    print("| search | seconds | processor seconds | GFLOP/s | share of the product's speed |")
    print("|---|---|---|---|---|")
    for name, values in wall.items():
        share = ratio(wall["matrix product alone"], values)
        total = sum(values)
        print(
            f"| {name} | {total:.1f} | {work[name]:.1f} | {flop / total / 1e9:.0f} | {share:.2f} |"
        )
    print(f"\nfaiss's seconds / ours: {ratio(wall['faiss IndexFlatIP'], wall['kalm_min']):.2f}")
    print(f"positions whose id differs from faiss's float32 order: {different:.2%}")


def ratio(a: list[float], b: list[float]) -> float:
    """The median of the ratios of the parts."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def product(queries: Vectors, documents: Vectors, device: str) -> None:
    """Compute all scores in the blocks of the search, and keep none."""
    if device == "cpu":
        scores = np.empty((512, 8192), np.float32)
        for start in range(0, len(documents), 8192):
            block = documents[start : start + 8192]
            for first in range(0, len(queries), 512):
                chunk = queries[first : first + 512]
                np.matmul(chunk, block.T, out=scores[: len(chunk), : len(block)])
        return
    rows, columns = 8192, 65_536
    chunks = torch.from_numpy(queries).to(device).split(rows)
    scratch = torch.empty(rows * columns, device=device)
    for start in range(0, len(documents), columns):
        block = torch.from_numpy(documents[start : start + columns]).to(device)
        for chunk in chunks:
            out = scratch[: len(chunk) * len(block)].view(len(chunk), len(block))
            torch.mm(chunk, block.T, out=out)
    torch.cuda.synchronize()


def agree(options: Options) -> None:
    """Search in every available way; raise if two ways find different ids or a different order."""
    distributed.start(dict(os.environ), torch.device(options.device))
    if options.vectors is None:
        documents = unit(options.documents, options.dim, 0)
        queries = unit(options.queries, options.dim, 1)
    else:
        found = [np.load(path) for path in sorted(options.vectors.glob("*.npy"))]
        documents = np.concatenate(found)[: options.documents]
        queries = documents[:: max(1, len(documents) // options.queries)]
    k = options.k
    ways = {
        "torch": lambda: top_k(queries, documents, k),
        "faiss": lambda: top_k(queries, documents, k, backend="faiss"),
    }
    if options.device != "cpu":
        ways[options.device] = lambda: top_k(queries, documents, k, device=options.device)
    rank, world = distributed.rank(), distributed.world_size()
    span = len(documents) * rank // world, len(documents) * (rank + 1) // world
    found = distributed.gather_objects(top_k(queries, documents, k, span=span))
    searched = merge(found, k)
    if distributed.rank() == 0:
        for name, way in ways.items():
            other = way()
            assert np.array_equal(other.ids, searched.ids), name
            assert np.array_equal(other.scores, searched.scores), name
        print(
            f"{documents.shape} documents, {len(queries):,} queries, top {k}: identical ids, order "
            f"and scores from {', '.join(ways)} and {distributed.world_size()} process(es)"
        )
    distributed.barrier()
    distributed.stop()


def memory(options: Options) -> None:
    """Measure each size in a fresh process, with the documents on disk."""
    print(f"{options.dim} dimensions, {options.queries:,} queries, top {options.k}\n")
    print("| documents | on disk | resident before | rise in search | rise in filter | seconds |")
    print("|---|---|---|---|---|---|")
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            documents = on_disk(Path(folder), size, options.dim)
            for shard in documents.missing():
                documents.encode(shard, RandomVectors(options.dim))  # pyright: ignore[reportArgumentType]
            command = [sys.executable, __file__, "--child", folder, "--documents", str(size)]
            for name in ("dim", "k", "queries"):
                command += [f"--{name}", str(getattr(options, name))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            *numbers, seconds = done.stdout.split()
            cells = [f"{number} MiB" for number in (size * options.dim * 4 >> 20, *numbers)]
            print(f"| {size:,} | {' | '.join(cells)} | {seconds} |", flush=True)


def searched_on_disk(options: Options, folder: Path) -> tuple[str, ...]:
    """Resident MiB before, the increase in the search and in the filter, and the seconds of both."""
    documents = on_disk(folder, options.documents, options.dim)
    queries = unit(options.queries, options.dim, 1)
    index = an_index(options.queries, documents.texts.hashes)
    stored = stored_neighbours(folder / str(options.k), options.queries)
    top_k(queries[:8], unit(2048, options.dim, 2), 8)  # what a library allocates once
    start, before = time.perf_counter(), resident("VmRSS")
    rises: list[int] = []
    for step in ("search", "filter"):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
        if step == "search":
            for block in stored.missing():
                some = queries[slice(*stored.cuts[block : block + 2])]
                stored.write(block, as_pairs(top_k(some, documents, options.k)))
        else:
            known = Labels.collect([index]).of(index.queries["key"])
            keys = documents.texts.hashes
            select(index, keys, known, queries, documents, stored.__getitem__, Rules())
        rises.append(resident("VmHWM") - before)
    return str(before), *map(str, rises), f"{time.perf_counter() - start:.0f}"


class RandomVectors:
    """A stand-in for an embedder."""

    dtype = torch.float32

    def __init__(self, dim: int) -> None:
        """One vector per row, of this dimension."""
        self.dim = dim

    def encode(self, texts: list[str], prompt: str) -> Vectors:
        """Random unit vectors."""
        return unit(len(texts), self.dim, int(texts[0]))


def on_disk(folder: Path, size: int, dim: int) -> StoredVectors:
    """Store the vectors of texts that are their own numbers."""
    texts = TextSet.of(lambda start, stop: [str(i) for i in range(start, stop)], size)
    return StoredVectors(folder, texts, dim)


def an_index(queries: int, documents: Ints) -> TextIndex:
    """A text index with one row per query, each with one of the documents as its positive."""
    rng = np.random.default_rng(0)
    tables = [np.zeros(number, TEXT) for number in (queries, len(documents))]
    tables[0]["key"] = rng.integers(-(2**62), 2**62, queries)
    tables[1]["key"] = documents
    return TextIndex(
        first=0,
        instructions=("",),
        queries=tables[0],
        documents=tables[1],
        row_query=np.arange(queries),
        starts=np.arange(queries + 1),
        texts=rng.integers(0, len(documents), queries),
        is_positive=np.ones(queries, np.bool_),
        groups=np.zeros(queries, np.int64),
        labelled=0,
        symmetric=False,
        fingerprint="",
    )


def resident(name: str) -> int:
    """MiB of this process: VmRSS (current) or VmHWM (peak)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1024


if __name__ == "__main__":
    main(sys.argv[1:])
