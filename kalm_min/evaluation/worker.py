"""One evaluation worker: a process that holds a model on a device and runs the tasks it is given.

Lines of JSON: settings and tasks come in on stdin, events go out on stdout.

    in   {"model", "device", "dtype", "causal", "pooling", "max_length", "dims"}, then tasks
    out  {"event": "ready", ...} | {"event": "alive"} | {"event": "progress", "texts", "characters"}
         {"event": "done", "task"} | {"event": "failed", "task", "error", "memory"}
         {"event": "unusable", "error"}

A task with a "slice" is only the encoding of a part of its corpus into the store. Otherwise the
result is one file, complete or absent, before "done" is said. Whatever a library prints goes to
stderr (the log). When stdin closes the parent is gone or finished, and the worker ends at once.
Run as `python -m kalm_min.evaluation.worker`; evaluate.py does that.
"""

import copy
import faulthandler
import hashlib
import json
import math
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch

from kalm_min.embedder import Embedder
from kalm_min.evaluation.encoder import Adapter
from kalm_min.evaluation.local import build_task
from kalm_min.evaluation.scoring import score_on_arrays
from kalm_min.files import write_json

_SECONDS_BETWEEN_REPORTS = 1.0
_SECONDS_BETWEEN_BEATS = 10.0
_SIDES = ("query", "document")

Report = Callable[[int, int], None]
"""Called with the texts and characters done since the last call."""


@dataclass(slots=True)
class _Pipe:
    """Events to the parent; progress is thinned out to one line a second."""

    stream: TextIO
    texts: int = 0
    characters: int = 0
    last: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, event: str, **fields: Any) -> None:
        with self.lock:
            self.stream.write(json.dumps({"event": event} | fields) + "\n")
            self.stream.flush()

    def progress(self, texts: int, characters: int) -> None:
        self.texts += texts
        self.characters += characters
        if time.monotonic() - self.last > _SECONDS_BETWEEN_REPORTS:
            self.last = time.monotonic()
            self.send("progress", texts=self.texts, characters=self.characters)

    def beat(self) -> None:
        """Say for ever that the process is not stuck; whether it gets on is another question."""
        while True:
            time.sleep(_SECONDS_BETWEEN_BEATS)
            self.send("alive")


def main() -> None:
    """Serve until stdin closes."""
    pipe = _Pipe(_take_stdout())
    faulthandler.enable()
    orders: queue.Queue[dict[str, Any]] = queue.Queue()
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    threading.Thread(target=pipe.beat, daemon=True).start()
    try:
        embedder = load_model(settings)
    except Exception as error:
        traceback.print_exc()
        pipe.send("unusable", error=_sentence(error))
        raise SystemExit(1) from error
    pipe.send("ready", **_describe(embedder))
    tokens_per_batch = embedder.tokens_per_batch
    while True:
        order = orders.get()
        # A task that broke a worker before gets half the batch each time.
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


def _take_stdout() -> TextIO:
    """Keep the real stdout for events; everything else that is written there goes to stderr."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def _listen(orders: queue.Queue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        orders.put(json.loads(line))
    os._exit(0)  # An orphan must not go on using the device.


def _sentence(error: BaseException) -> str:
    """An exception as one line, with what caused it in the end."""
    root = error
    while root.__cause__:
        root = root.__cause__
    causes = dict.fromkeys(f"{type(one).__name__}: {one}" for one in (error, root))
    return " ".join("; ".join(causes).split())[:500]


def load_model(settings: dict[str, Any]) -> Embedder:
    """The model of a worker's settings, on its device."""
    device = torch.device(settings["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    names = ("causal", "pooling", "max_length")
    return Embedder.from_pretrained(
        settings["model"],
        device=device,
        dtype=None if settings["dtype"] == "auto" else settings["dtype"],
        **{name: settings[name] for name in names},
    )


def _describe(embedder: Embedder) -> dict[str, Any]:
    """What the checkpoint and the device made of settings that were left open."""
    return {
        "device": str(embedder.device),
        "dtype": str(embedder.dtype).removeprefix("torch."),
        "causal": embedder.causal,
        "pooling": embedder.pooling,
        "max_length": embedder.max_length,
        "instruction_template": embedder.instruction_template,
    }


def _adapt(
    embedder: Embedder, order: dict[str, Any], dims: list[int], report: Report
) -> tuple[Adapter, dict[str, str]]:
    """The model in the shape of a task, and the prompts that it puts before texts."""
    key = order["key"]
    prompts = {side: _prompt(embedder, key[f"{side}_instruction"]) for side in _SIDES}
    store = order.get("store")
    adapter = Adapter(
        embedder,
        query_prompt=prompts["query"],
        document_prompt=prompts["document"],
        dims=dims,
        store=_open_store(Path(store), embedder, key["checkpoint"]) if store else None,
        report=report,
    )
    return adapter, prompts


def _open_store(store: Path, embedder: Embedder, checkpoint: str) -> Path:
    """The folder of this model with these settings in a store, with a manifest for people."""
    manifest = {"checkpoint": checkpoint} | _describe(embedder)
    del manifest["device"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    folder = store / digest[:16]
    if not (folder / "manifest.json").is_file():
        write_json(folder / "manifest.json", manifest)
    return folder


def encode_slice(
    embedder: Embedder, order: dict[str, Any], report: Report = lambda texts, characters: None
) -> None:
    """Put the vectors of a slice of a task's corpora into its store."""
    adapter, _ = _adapt(embedder, order, [], report)
    task = _load_task(order)
    for subset in order["key"]["subsets"] or task.dataset:
        for split in order["key"]["splits"]:
            adapter.encode_slice(task.dataset[subset][split]["corpus"], *order["slice"])


def evaluate_task(
    embedder: Embedder,
    order: dict[str, Any],
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
    begun = time.monotonic()
    adapter, prompts = _adapt(embedder, order, dims, report)
    loaded = _load_task(order)
    score_on_arrays(loaded)
    results: dict[str, dict[str, Any]] = {}
    for dim in dims:
        adapter.dim = dim
        outcome = mteb.evaluate(
            adapter,  # pyright: ignore[reportArgumentType] -- both protocols, checked by mteb
            _fresh(loaded),
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
        "used": _describe(embedder) | {"prompts": prompts},
        "versions": {name: version(name) for name in ("mteb", "torch")},
        "seconds": round(time.monotonic() - begun, 3),
        "dims": results,
    }
    return results[str(dims[0])] | {"kalm_min": record}


def _prompt(embedder: Embedder, instruction: str) -> str:
    return embedder.instruction_template.format(instruction=instruction) if instruction else ""


def _load_task(order: dict[str, Any]) -> Any:
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
        task.convert_v1_dataset_format_to_v2(num_proc=None)  # once, so that all twins share it
    for subset in key["subsets"]:
        for split in key["splits"]:
            _refuse_other_task(task, subset, split)
    return task


def _refuse_other_task(task: Any, subset: str, split: str) -> None:
    """Raise where the data lacks candidates (by mteb's statistics) or instructions of its queries."""
    kind = task.metadata.type
    whole = (task.metadata.descriptive_stats or {}).get(split)
    if whole is None:
        is_ranked = kind.endswith("Reranking")
    else:
        part = (whole.get("hf_subset_descriptive_stats") or {}).get(subset, whole)
        is_ranked = bool(part.get("top_ranked_statistics"))
    if is_ranked and not task.dataset[subset][split]["top_ranked"]:
        raise ValueError("the candidates to rerank (top_ranked) were not found in the dataset")
    is_instructed = kind == "InstructionReranking"
    if is_instructed and "instruction" not in task.dataset[subset][split]["queries"].column_names:
        raise ValueError("the instructions of the queries were not found in the dataset")


def _fresh(task: Any) -> Any:
    """A task over the same data in the random state it was loaded in: no dimension sees another's."""
    twin = copy.copy(task)
    twin.rng_state, twin.np_rng = copy.deepcopy((task.rng_state, task.np_rng))
    return twin


if __name__ == "__main__":
    main()
