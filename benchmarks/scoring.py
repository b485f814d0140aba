"""The cost of a retrieval task besides encoding, and of five dimensions compared with one.

    python benchmarks/scoring.py [--documents 100000] [--queries 1000] [--dim 896]
    python benchmarks/scoring.py --model DIR --data DIR [--dims 896 512 256 128 64]

The first runs one retrieval task through mteb with random unit vectors, looked up instead of encoded:
with kalm_min's adapter, whose search is timed apart from mteb's scoring, and with a plain encoder, for
which mteb also searches. The second runs dataset folders with a model, at one dimension and at several.
Rounds alternate; medians are printed.
"""

import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from datasets import disable_progress_bars

from kalm_min import Embedder
from kalm_min.config import parse
from kalm_min.evaluation import worker
from kalm_min.evaluation.adapter import Adapter
from kalm_min.evaluation.local import build_task, find_datasets

_JUDGED = 5  # documents per query


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is scored."""

    documents: Annotated[int, "Documents of the first table's corpus."] = 100_000
    queries: Annotated[int, "Queries of the first table."] = 1000
    dim: Annotated[int, "Dimension of the first table's vectors."] = 896
    model: Annotated[Path | None, "Model folder; with it, the second table is printed."] = None
    data: Annotated[tuple[Path, ...], "Dataset folders of the second table."] = ()
    dims: Annotated[tuple[int, ...], "Dimensions of the second table; the first is run alone."] = (
        896,
        512,
        256,
        128,
        64,
    )
    rounds: Annotated[int, "Rounds of each, alternating."] = 3


class Table:
    """An encoder that looks up the vector of each text, and measures how long that takes."""

    device, dtype, max_length = torch.device("cpu"), torch.float32, 512

    def __init__(self, count: int, dim: int) -> None:
        from mteb.models import ModelMeta

        vectors = np.random.default_rng(0).standard_normal((count, dim), np.float32)
        self.vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        self.dimension = dim
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={"name": "a/table", "modalities": ["text"]}
        )

    def encode(self, texts: Any, prompt: str = "", **_: object) -> Any:
        """(n, dim) float32 vectors of texts that are the numbers of their rows."""
        texts = texts.dataset["text"][:] if hasattr(texts, "dataset") else texts
        return self.vectors[[int(text) for text in texts]]

    similarity = Adapter.similarity
    similarity_pairwise = Adapter.similarity_pairwise


class Clock:
    """Adds up the seconds spent in functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its time is added."""

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def main(argv: list[str]) -> None:
    """Measure and print a table."""
    warnings.simplefilter("ignore")
    disable_progress_bars()
    options = parse(Options, argv, program="scoring.py", description="Scoring, measured.")
    if options.model is None:
        overhead(options)
    else:
        dimensions(options, options.model)


def overhead(options: Options) -> None:
    """kalm_min's search and mteb's scoring, against mteb's search and scoring."""
    import mteb

    table: Any = Table(options.documents + options.queries, options.dim)
    seconds: dict[str, list[float]] = {}
    quiet: dict[str, Any] = {"show_progress_bar": False}
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder) / "random", options)
        for _ in range(options.rounds):
            for name in ("ours", "mteb's"):
                model: Any = table if name == "mteb's" else Adapter(table)
                search, encode = Clock(), Clock()
                if name == "ours":
                    model.index, model.search = encode.wrap(model.index), search.wrap(model.search)
                start = time.perf_counter()
                task = build_task(dataset)
                loading = time.perf_counter() - start
                flags = {"co2_tracker": False, "cache": None, "encode_kwargs": dict(quiet)}
                mteb.evaluate(model, task, **flags, **quiet)
                total = time.perf_counter() - start - loading - encode.seconds
                seconds.setdefault(f"{name} search, mteb's scoring", []).append(total)
                if name == "ours":
                    scoring = total - search.seconds
                    seconds.setdefault("of that, mteb's scoring", []).append(scoring)
    print(
        f"{options.queries:,} queries, {options.documents:,} documents, {options.dim} dimensions, "
        f"{torch.get_num_threads()} threads, {options.rounds} rounds\n"
    )
    print("| outside encoding | seconds (median) | min - max |")
    print("|---|---|---|")
    for name, values in seconds.items():
        print(
            f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} - {max(values):.2f} |"
        )


def write_dataset(folder: Path, options: Options) -> Path:
    """Write a dataset whose texts are the numbers of their vectors."""
    (folder / "qrels").mkdir(parents=True)
    draw = np.random.default_rng(1)
    numbers = range(options.documents + options.queries)
    lines = [json.dumps({"_id": str(i), "title": "", "text": str(i)}) + "\n" for i in numbers]
    (folder / "corpus.jsonl").write_text("".join(lines[: options.documents]))
    (folder / "queries.jsonl").write_text("".join(lines[options.documents :]))
    judged = [
        f"{query}\t{document}\t1\n"
        for query in numbers[options.documents :]
        for document in draw.choice(options.documents, _JUDGED, replace=False)
    ]
    head = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "test.tsv").write_text(head + "".join(judged))
    return folder


def dimensions(options: Options, model: Path) -> None:
    """Measure several dimensions of a task against one."""
    embedder = Embedder.from_pretrained(model)
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds; dims {options.dims}\n")
    print("| dataset | one, seconds (median) | all | all / one |")
    print("|---|---|---|---|")
    for dataset in [found for path in options.data for found in find_datasets(path)]:
        key: Any = {"query_instruction": "", "document_instruction": "", "checkpoint": ""}
        every: list[tuple[float, float]] = []
        for number in range(options.rounds + 1):  # the first warms up
            times: list[float] = []
            for dims in (options.dims[:1], options.dims):
                with tempfile.TemporaryDirectory() as store:
                    order = {"name": dataset.name, "type": "", "folder": str(dataset.folder)}
                    order |= {"key": key, "store": store}
                    start = time.perf_counter()
                    worker.evaluate_task(embedder, order, list(dims))
                    times.append(time.perf_counter() - start)
            if number:
                every.append((times[0], times[1]))
        one, several = (statistics.median(column) for column in zip(*every, strict=True))
        ratio = statistics.median(b / a for a, b in every)
        print(f"| {dataset.name} | {one:.2f} | {several:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
