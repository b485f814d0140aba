"""One evaluation worker: a process that holds a model on a device and runs the jobs it is given.

Lines of JSON: `runner.Settings` and then `runner.Order`s come in on stdin, events go out on stdout.

    "ready" | "alive" | "progress", texts, characters
    "done", task | "failed", task, error, memory | "unusable", error

A task's result is one file, complete or absent, before "done" is sent. Whatever a library prints goes
to stderr (the log). When stdin closes the parent is gone or finished, and the worker ends at once.
"""

import copy
import faulthandler
import json
import math
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kalm_min.embedder import Embedder
from kalm_min.evaluation.adapter import Adapter
from kalm_min.evaluation.local import build_task
from kalm_min.evaluation.runner import Order, Settings
from kalm_min.files import digest, write_json
from kalm_min.vectors import check_manifest, describe

_PROGRESS_SECONDS = 1.0
_HEARTBEAT_SECONDS = 10.0

Report = Callable[[int, int], None]  # called with the texts and characters done since the last call


class Pipe:
    """Events to the parent, on the real stdout; all else that is written there goes to stderr."""

    def __init__(self) -> None:
        self.stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.lock = threading.Lock()
        self.texts = self.characters = 0
        self.last_sent = 0.0

    def send(self, event: str, **fields: object) -> None:
        """Write one event."""
        with self.lock:
            self.stream.write(json.dumps({"event": event} | fields) + "\n")
            self.stream.flush()

    def progress(self, texts: int, characters: int) -> None:
        """Count what is done; the parent hears of it once per second."""
        self.texts += texts
        self.characters += characters
        if time.monotonic() - self.last_sent > _PROGRESS_SECONDS:
            self.last_sent = time.monotonic()
            self.send("progress", texts=self.texts, characters=self.characters)

    def heartbeat(self) -> None:
        """Say for ever that the process is alive; whether it makes progress is another question."""
        while True:
            time.sleep(_HEARTBEAT_SECONDS)
            self.send("alive")


def main() -> None:
    """Serve until stdin closes."""
    pipe = Pipe()
    faulthandler.enable()
    orders: queue.Queue[Order] = queue.Queue()
    settings: Settings = json.loads(sys.stdin.readline())

    def listen() -> None:
        for line in sys.stdin:
            orders.put(json.loads(line))
        os._exit(0)  # An orphan must not go on using the device.

    threading.Thread(target=listen, daemon=True).start()
    threading.Thread(target=pipe.heartbeat, daemon=True).start()
    try:
        if settings["device"].startswith("cuda"):
            torch.cuda.set_device(settings["device"])
        embedder = Embedder.from_pretrained(
            settings["model"],
            device=settings["device"],
            dtype=None if settings["dtype"] == "auto" else settings["dtype"],
            causal=settings["causal"],
            pooling=settings["pooling"],
            max_length=settings["max_length"],
        )
    except Exception as error:
        traceback.print_exc()
        pipe.send("unusable", error=_sentence(error))
        raise SystemExit(1) from error
    pipe.send("ready")
    tokens_per_batch = embedder.tokens_per_batch
    while True:
        order = orders.get()
        # A job that broke a worker before gets half the batch at each further attempt.
        embedder.tokens_per_batch = max(1, tokens_per_batch >> order["attempt"])
        pipe.texts = pipe.characters = 0
        try:
            if order["slice"]:
                encode_slice(embedder, order, report=pipe.progress)
            else:
                result = evaluate_task(embedder, order, settings["dims"], report=pipe.progress)
                write_json(order["result"], result)
        except Exception as error:
            traceback.print_exc()
            memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            pipe.send("failed", task=order["name"], error=_sentence(error), memory=memory)
        else:
            pipe.send("done", task=order["name"])
        if embedder.device.type == "cuda":
            torch.cuda.empty_cache()


def _sentence(error: BaseException) -> str:
    """An exception as one line, with its root cause."""
    root = error
    while root.__cause__:
        root = root.__cause__
    causes = dict.fromkeys(f"{type(one).__name__}: {one}" for one in (error, root))
    return " ".join("; ".join(causes).split())[:500]


def encode_slice(
    embedder: Embedder, order: Order, report: Report = lambda texts, characters: None
) -> None:
    """Put the vectors of a slice of a task's corpora into its store."""
    adapter, task = _adapt(embedder, order, report)[0], _load_task(order)
    assert order["slice"] is not None
    number, count = order["slice"]
    for subset in order["key"]["subsets"] or task.dataset:
        for split in order["key"]["splits"]:
            corpus = task.dataset[subset][split]["corpus"]
            first, last = len(corpus) * number // count, len(corpus) * (number + 1) // count
            adapter.index(corpus.select(range(first, last)))


def evaluate_task(
    embedder: Embedder,
    order: Order,
    dims: list[int],
    report: Report = lambda texts, characters: None,
) -> dict[str, Any]:
    """Run one task at every dimension and return the content of its result file.

    That is mteb's own result at the largest dimension, which mteb reads, with a further entry
    "kalm_min": the key that says when the result holds, what was used, and all dimensions.
    """
    import mteb
    from datasets import disable_progress_bars

    disable_progress_bars()
    start = time.monotonic()
    adapter, used = _adapt(embedder, order, report)
    loaded = _load_task(order)
    results: dict[str, dict[str, Any]] = {}
    for dim in dims:
        adapter.dim = dim
        report(0, 0)
        # The same data in the random state it was loaded in, so that no dimension affects the next.
        task = copy.copy(loaded)
        task.rng_state, task.np_rng = copy.deepcopy((loaded.rng_state, loaded.np_rng))
        outcome = mteb.evaluate(
            adapter,  # pyright: ignore[reportArgumentType] -- both protocols, checked by mteb
            task,
            co2_tracker=False,
            cache=None,
            show_progress_bar=False,
            encode_kwargs={"show_progress_bar": False},
        ).task_results[0]
        score = outcome.get_score()
        if math.isnan(score):
            raise ValueError(
                f"the main score is not a number at dimension {dim}; either the task does not "
                "define it, or all vectors are alike (an instruction longer than --max-length?)"
            )
        results[str(dim)] = outcome.model_dump(mode="json") | {"main_score": score}
    record = {
        "key": order["key"],
        "type": order["type"],
        "used": used,
        "versions": {name: version(name) for name in ("mteb", "torch")},
        "seconds": round(time.monotonic() - start, 3),
        "dims": results,
    }
    return results[str(dims[0])] | {"kalm_min": record}


def _adapt(embedder: Embedder, order: Order, report: Report) -> tuple[Adapter, dict[str, object]]:
    """The model in the shape of a task, and what the checkpoint and the device made of settings."""
    key = order["key"]
    prompts = {
        kind: embedder.instruction_template.format(instruction=text) if text else ""
        for kind in ("query", "document")
        for text in [key[f"{kind}_instruction"]]
    }
    manifest = describe(embedder, key["checkpoint"])
    # Vectors of other models and settings may stand beside these.
    store = Path(order["store"]) / digest(json.dumps(manifest, sort_keys=True))[:16]
    check_manifest(store, manifest)
    adapter = Adapter(
        embedder,
        query_prompt=prompts["query"],
        document_prompt=prompts["document"],
        store=store,
        report=report,
    )
    return adapter, manifest | {"device": str(embedder.device), "prompts": prompts}


def _load_task(order: Order) -> Any:
    """The mteb task of an order, with its data.

    Raises ValueError where a part that is read only if it is found was not: the candidates of
    reranking, the instructions of instruction tasks. With HF_HUB_OFFLINE=1 `datasets` does not find
    them in its cache, nor in a copy without its README.md, and mteb would call it the same task.
    """
    import mteb

    if order["folder"]:
        return build_task(Path(order["folder"]))
    key = order["key"]
    task: Any = mteb.get_task(order["name"], eval_splits=key["splits"], hf_subsets=key["subsets"])
    if order["mirror"]:
        dataset = task.metadata.dataset | {"path": order["mirror"]}
        task.metadata = task.metadata.model_copy(update={"dataset": dataset})
    task.load_data()
    task.data_loaded = True
    if hasattr(task, "convert_v1_dataset_format_to_v2"):
        task.convert_v1_dataset_format_to_v2(num_proc=None)  # once, for all dimensions
    for subset in key["subsets"]:
        for split in key["splits"]:
            _refuse_other_task(task, subset, split)
    return task


def _refuse_other_task(task: Any, subset: str, split: str) -> None:
    """Raise where the data lacks candidates (by mteb's statistics) or instructions of its queries."""
    kind = task.metadata.type
    statistics = (task.metadata.descriptive_stats or {}).get(split)
    if statistics is None:
        is_ranked = kind.endswith("Reranking")
    else:
        part = (statistics.get("hf_subset_descriptive_stats") or {}).get(subset, statistics)
        is_ranked = bool(part.get("top_ranked_statistics"))
    if is_ranked and not task.dataset[subset][split]["top_ranked"]:
        raise ValueError("the candidates to rerank (top_ranked) were not found in the dataset")
    is_instructed = kind == "InstructionReranking"
    if is_instructed and "instruction" not in task.dataset[subset][split]["queries"].column_names:
        raise ValueError("the instructions of the queries were not found in the dataset")


if __name__ == "__main__":
    main()
