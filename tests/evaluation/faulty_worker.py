"""The real worker with a stand-in for evaluation, which breaks as $FAULT says on the task "broken"."""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import kalm_min.files
from kalm_min.evaluation import worker

FAULT = os.environ.get("FAULT", "")
write_json = worker.write_json


def evaluate(embedder, order, dims, report):
    """A result that says which task it is of, and is larger than a disk block."""
    broken = FAULT if order["name"] == "broken" else ""
    time.sleep(0.05)
    report(10, 100, False)
    if broken == "exception":
        raise ValueError("no such column")
    if broken == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if broken == "SIGSEGV":
        os.kill(os.getpid(), signal.SIGSEGV)
    if broken == "out of memory":
        raise MemoryError
    if broken == "hang":
        time.sleep(600)
    if broken == "garbage on the pipe":
        pipe = report.__self__
        pipe.stream.write("Downloading: 45%\n")
        pipe.stream.flush()
        time.sleep(600)
    scores = {str(dim): {"main_score": len(order["name"]) / 100} for dim in dims}
    used = {"dtype": "float32", "causal": True, "pooling": "mean", "max_length": 32}
    record = {"key": order["key"], "dims": scores, "seconds": 0.1, "used": used}
    return {"task_name": order["name"], "kalm_min": record, "more": "x" * 50_000}


def write(path, result):
    """Write the result, or break while doing so."""
    broken = FAULT if result["task_name"] == "broken" else ""
    if broken == "torn result file":
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result)[:100])
    elif broken == "full disk":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            write_json(path, result)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    elif broken == "killed between write and rename":
        kalm_min.files.Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
        write_json(path, result)
    else:
        write_json(path, result)


worker.evaluate_task, worker.write_json = evaluate, write
sys.argv = ["worker"]
worker.main()
