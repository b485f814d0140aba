"""An evaluation worker: a process that holds a model on a device and runs jobs.

It reads lines of JSON from stdin, first the settings, then jobs (see `Runner`), and writes events
to stdout: "ready" | "alive" | "progress", texts, characters | "done", task
| "failed", task, error, memory | "unusable", error

A task's result is one file, complete or absent, before "done" is sent. Whatever a library prints goes
to stderr (the log). When stdin closes, the parent is gone or finished, and the worker ends at once.
"""

import copy
import faulthandler
import itertools
import json
import math
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kalm_min.embedder import Embedder, pick_device
from kalm_min.evaluation.adapter import Adapter, Report
from kalm_min.evaluation.local import build_task
from kalm_min.evaluation.plan import ordered, read_result
from kalm_min.files import Object, digest, write_json, write_text
from kalm_min.settings import fill_template
from kalm_min.vectors import check_manifest, describe

_PROGRESS_SECONDS = 1.0
_HEARTBEAT_SECONDS = 10.0
_WORST = 100  # queries written
_SHOWN = 3  # documents written of each

Order = Object
"""A task to run, or a slice of its corpus to encode: a line from the parent."""


class Pipe:
    """Sends events to the parent on the real stdout; other output to stdout goes to stderr."""

    def __init__(self) -> None:
        self.stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.lock = threading.Lock()
        self.texts = self.characters = 0
        self.is_encoding = False
        self.last_sent = 0.0

    def send(self, event: str, **fields: object) -> None:
        """Write one event."""
        with self.lock:
            self.stream.write(json.dumps({"event": event} | fields) + "\n")
            self.stream.flush()

    def progress(self, texts: int, characters: int, is_encoding: bool) -> None:
        """Count the work done, and report it at most once per second."""
        self.texts += texts
        self.characters += characters
        self.is_encoding = is_encoding
        if time.monotonic() - self.last_sent > _PROGRESS_SECONDS:
            self.last_sent = time.monotonic()
            self.send("progress", texts=self.texts, characters=self.characters)

    def heartbeat(self) -> None:
        """Report that the process is alive and, outside encoding, that it computes.

        Libraries that load data and compute scores report no progress; a second of CPU time counts
        instead. It does not while texts are encoded, as waiting for a hung GPU takes CPU time too.
        """
        used = time.process_time()
        while True:
            time.sleep(_HEARTBEAT_SECONDS)
            if self.is_encoding or time.process_time() < used + 1:
                self.send("alive")
            else:
                used = time.process_time()
                self.send("progress", texts=self.texts, characters=self.characters)


def main() -> None:
    """Serve until stdin closes."""
    pipe = Pipe()
    faulthandler.enable()
    orders: queue.Queue[Order] = queue.Queue()
    settings = json.loads(sys.stdin.readline())

    def listen() -> None:
        for line in sys.stdin:
            orders.put(json.loads(line))
        os._exit(0)  # An orphan must not keep the device busy.

    threading.Thread(target=listen, daemon=True).start()
    threading.Thread(target=pipe.heartbeat, daemon=True).start()
    try:
        embedder = open_model(settings)
    except Exception as error:
        traceback.print_exc()
        pipe.send("unusable", error=_sentence(error))
        raise SystemExit(1) from error
    pipe.send("ready")
    tokens_per_batch = embedder.tokens_per_batch
    while True:
        order = orders.get()
        # A job that broke a worker gets half the batch at each further attempt.
        embedder.tokens_per_batch = max(1, tokens_per_batch >> order["attempt"])
        pipe.texts, pipe.characters, pipe.is_encoding = 0, 0, False
        try:
            if result := evaluate_task(embedder, order, order["dims"], pipe.progress):
                write_json(order["result"], result)
        except Exception as error:
            traceback.print_exc()
            memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            pipe.send("failed", task=order["name"], error=_sentence(error), memory=memory)
        else:
            pipe.send("done", task=order["name"])
        if embedder.device.type == "cuda":
            torch.cuda.empty_cache()


def open_model(settings: Order) -> Embedder:
    """The model of a plan on its device."""
    device = pick_device(settings["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = None if settings["dtype"] == "auto" else settings["dtype"]
    options = {name: settings[name] for name in ("device", "causal", "pooling", "max_length")}
    return Embedder.from_pretrained(settings["model"], dtype=dtype, **options)


def measure_speed() -> None:
    """Write how many characters of English text per second the model of a line of settings encodes."""
    embedder, seconds = open_model(json.loads(sys.stdin.readline())), 0.0
    texts = [f"{number} {'words of usual length in a row ' * 15}" for number in range(4)]
    while seconds < 1:
        texts = [f"{number} {text}" for number, text in enumerate(texts * 2)]
        start = time.monotonic()
        embedder.encode(texts, prompt="")
        seconds = time.monotonic() - start
    sys.stdout.write(f"{sum(map(len, texts)) / seconds}\n")


def _sentence(error: BaseException) -> str:
    """An exception as one line, with its root cause."""
    root = error
    while root.__cause__:
        root = root.__cause__
    causes = dict.fromkeys(f"{type(one).__name__}: {one}" for one in (error, root))
    return " ".join("; ".join(causes).split())[:500]


def evaluate_task(
    embedder: Embedder, order: Order, dims: Sequence[str | int], report: Report = lambda *_: None
) -> Object:
    """Run one task at every dimension and return the content of its result file.

    That is mteb's result at the largest dimension, which mteb can read, with an additional entry
    "kalm_min": the key under which the result is valid, what was used, and all dimensions, with
    those that the file holds already. A dimension may name a precision: "256 int8".

    A job with a "slice" only stores the vectors of that part of the corpora and returns {}.
    """
    import mteb
    from datasets import disable_progress_bars

    disable_progress_bars()
    start, key = time.monotonic(), order["key"]
    prompts: dict[str, str] = {}
    for role in ("query", "document"):
        filled = fill_template(embedder.instruction_template, key.get(f"{role}_instruction", ""))
        prompts[role] = key.get(f"{role}_prompt", filled)
    manifest = describe(embedder, key["checkpoint"])
    # Vectors of other models and settings may be beside these.
    store = Path(order["store"]) / digest(json.dumps(manifest, sort_keys=True))[:16]
    check_manifest(store, manifest)
    adapter = Adapter(embedder, prompts["query"], prompts["document"], store, report)
    loaded = _load_task(order)
    if order.get("slice"):
        part, parts = order["slice"]
        for subset, split in itertools.product(key["subsets"] or loaded.dataset, key["splits"]):
            corpus = loaded.dataset[subset][split]["corpus"]
            bounds = len(corpus) * part // parts, len(corpus) * (part + 1) // parts
            adapter.index(corpus.select(range(*bounds)))
        return {}
    old = read_result(Path(order["result"]), key) if "result" in order else None
    record: Object = old["kalm_min"] if old else {"dims": {}, "seconds": 0.0}
    results: dict[str, Object] = record["dims"]
    for number, name in enumerate(map(str, dims)):
        dim, _, precision = name.partition(" ")
        adapter.dim, adapter.precision = int(dim), precision or "float32"
        # The same data and initial random state, so that no dimension affects the next.
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
        if not math.isfinite(score):
            raise ValueError(
                f"the main score is not a number at dimension {name}; either the task does not "
                "define it, or all vectors are alike (an instruction longer than --max-length?)"
            )
        results[name] = outcome.model_dump(mode="json") | {"main_score": score}
        if order.get("queries") and number == 0:
            write_queries(Path(order["queries"]), loaded.dataset["default"]["test"], adapter.hits)
    record |= {
        "key": key,
        "type": order["type"],
        "used": manifest | {"device": str(embedder.device), "prompts": prompts},
        "versions": {name: version(name) for name in ("mteb", "torch")},
        "seconds": round(record["seconds"] + time.monotonic() - start, 3),
        "dims": {name: results[name] for name in ordered(results)},
    }
    return record["dims"][ordered(results)[0]] | {"kalm_min": record}


def write_queries(path: Path, data: Object, hits: Mapping[str, Mapping[str, float]]) -> None:
    """Write the queries whose first relevant document is ranked lowest, one JSON object per line.

    "rank" is null if no relevant document was found; "found" are the documents that were.
    """
    corpus, lines = data["corpus"], list[tuple[float, str]]()
    rows = {name: row for row, name in enumerate(corpus["id"])}

    def shown(names: Sequence[str], scores: Mapping[str, float]) -> list[Object]:
        return [
            {"id": name, "score": round(scores[name], 6) if name in scores else None}
            | {column: corpus[rows[name]][column] for column in ("title", "text")}
            for name in names[:_SHOWN]
        ]

    for query in data["queries"]:
        found = hits.get(query["id"], {})
        best = sorted(found, key=lambda name: -found[name])
        judged = data["relevant_docs"].get(query["id"], {})
        if relevant := [name for name, score in judged.items() if score > 0]:
            rank = min((best.index(name) + 1 for name in relevant if name in found), default=None)
            line = {"rank": rank, "query": query["text"]}
            line |= {"relevant": shown(relevant, found), "found": shown(best, found)}
            lines.append((-(rank or math.inf), json.dumps(line, ensure_ascii=False)))
    lines.sort(key=lambda pair: pair[0])
    write_text(path, "".join(f"{line}\n" for _, line in lines[:_WORST]))


def _load_task(order: Order) -> Any:
    """The mteb task of a job, with its data.

    Raises ValueError if a part that mteb treats as optional is missing: reranking candidates or
    the instructions of instruction tasks. With HF_HUB_OFFLINE=1 `datasets` finds neither in its
    cache, nor in a copy without its README.md, and mteb would still call it the same task.
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
    kind, statistics = task.metadata.type, task.metadata.descriptive_stats or {}
    for subset, split in itertools.product(key["subsets"], key["splits"]):
        is_ranked = kind.endswith("Reranking")
        if split in statistics:
            parts = statistics[split].get("hf_subset_descriptive_stats") or {}
            is_ranked = bool(parts.get(subset, statistics[split]).get("top_ranked_statistics"))
        if is_ranked and not task.dataset[subset][split]["top_ranked"]:
            raise ValueError("the candidates to rerank (top_ranked) were not found in the dataset")
        if kind == "InstructionReranking" and (
            "instruction" not in task.dataset[subset][split]["queries"].column_names
        ):
            raise ValueError("the instructions of the queries were not found in the dataset")
    return task


if __name__ == "__main__":
    main()
