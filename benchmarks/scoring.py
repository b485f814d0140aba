"""What scoring costs beside encoding: our search and scores against mteb's, five dimensions against one.

    python benchmarks/scoring.py [--documents 100000] [--queries 1000] [--width 896]
    python benchmarks/scoring.py --model DIR --data DIR [--dims 896 512 256 128 64]

The first runs one retrieval task through mteb twice, with the same random unit vectors, looked up
instead of encoded: with our adapter, and with a plain encoder, for which mteb searches and scores
itself. Looking up is not counted. The second runs dataset folders with a model, at one dimension and
at several. Rounds alternate; medians are printed.
"""

import json
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
from datasets import disable_progress_bars

from kalm_min import Embedder
from kalm_min.config import parse
from kalm_min.evaluation import worker
from kalm_min.evaluation.encoder import Adapter
from kalm_min.evaluation.local import build_task, find_datasets
from kalm_min.evaluation.scoring import score_on_arrays

_JUDGED = 5  # documents for each query


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is scored."""

    documents: Annotated[int, "Documents of the first table's corpus."] = 100_000
    queries: Annotated[int, "Queries of the first table."] = 1000
    width: Annotated[int, "Dimensions of the first table."] = 896
    model: Annotated[Path | None, "Model folder: makes the second table."] = None
    data: Annotated[tuple[Path, ...], "Dataset folders of the second table."] = ()
    dims: Annotated[
        tuple[int, ...], "Dimensions of the second table; the first is the one that is taken alone."
    ] = (896, 512, 256, 128, 64)
    rounds: Annotated[int, "Measured runs of each, taking turns."] = 3


class Table:
    """An encoder that knows the vector of each text, and how long it was asked."""

    device, dtype, tokens_per_batch = torch.device("cpu"), torch.float32, 1

    def __init__(self, count: int, width: int) -> None:
        from mteb.models import ModelMeta

        vectors = np.random.default_rng(0).standard_normal((count, width), np.float32)
        self.vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        self.dimension, self.seconds = width, 0.0
        self.meta = ModelMeta.create_empty(overwrites={"name": "a/table", "modalities": ["text"]})

    def encode(self, texts: list[str], prompt: str = "") -> Any:
        """(n, D) float32 vectors of texts that are their numbers."""
        begun = time.perf_counter()
        vectors = self.vectors[[int(text) for text in texts]]
        self.seconds += time.perf_counter() - begun
        return vectors

    def plain(self) -> Any:
        """What mteb takes for an encoder without a search of its own."""

        def encode(inputs: Any, **_: Any) -> Any:
            return self.encode(inputs.dataset["text"][:])

        def similarity(a: Any, b: Any) -> torch.Tensor:
            return torch.as_tensor(a) @ torch.as_tensor(b).T

        def pairwise(a: Any, b: Any) -> torch.Tensor:
            return (torch.as_tensor(a) * torch.as_tensor(b)).sum(-1)

        return SimpleNamespace(
            encode=encode,
            similarity=similarity,
            similarity_pairwise=pairwise,
            mteb_model_meta=self.meta,
        )


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
    """mteb's search and scores against ours."""
    import mteb

    table = Table(options.documents + options.queries, options.width)
    with tempfile.TemporaryDirectory() as folder:
        task = build_task(write_dataset(Path(folder) / "random", options))
    seconds: dict[str, list[float]] = {"kalm_min": [], "mteb": []}
    scores: dict[str, dict[str, float]] = {}
    for _ in range(options.rounds):
        for name, values in seconds.items():
            one = worker._fresh(task)
            if name == "kalm_min":
                score_on_arrays(one)
            ours: Any = table
            model: Any = Adapter(ours) if name == "kalm_min" else table.plain()
            table.seconds, start = 0.0, time.perf_counter()
            quiet: Any = {"show_progress_bar": False}
            result: Any = mteb.evaluate(
                model, one, co2_tracker=False, cache=None, encode_kwargs=quiet, **quiet
            )
            values.append(time.perf_counter() - start - table.seconds)
            (scores[name],) = result.task_results[0].scores["test"]
    numbers = [key for key, value in scores["mteb"].items() if isinstance(value, float)]
    apart = np.nanmax([abs(scores["mteb"][key] - scores["kalm_min"][key]) for key in numbers])
    print(
        f"{options.queries:,} queries, {options.documents:,} documents, {options.width} dimensions, "
        f"{torch.get_num_threads()} threads, {options.rounds} rounds\n"
    )
    print("| outside encoding | seconds (median) | min - max |")
    print("|---|---|---|")
    for name, values in seconds.items():
        spread = f"{min(values):.2f} - {max(values):.2f}"
        print(f"| {name} | {statistics.median(values):.2f} | {spread} |")
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(f"\nmteb's seconds / ours, median of rounds: {statistics.median(ratios):.2f}")
    print(f"largest difference in {len(numbers)} scores: {apart:.1e}")


def write_dataset(folder: Path, options: Options) -> Path:
    """A dataset whose texts are the numbers of their vectors."""
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
    """Several dimensions of a task against one."""
    embedder = Embedder.from_pretrained(model)
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds; dims {options.dims}\n")
    print("| dataset | one, seconds (median) | all | all / one |")
    print("|---|---|---|---|")
    for dataset in [found for path in options.data for found in find_datasets(path)]:
        key = {"query_instruction": "", "document_instruction": ""}
        order = {"name": dataset.name, "type": "", "folder": str(dataset.path), "key": key}
        every: list[tuple[float, float]] = []
        for number in range(options.rounds + 1):  # the first warms up
            times: list[float] = []
            for dims in (options.dims[:1], options.dims):
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
