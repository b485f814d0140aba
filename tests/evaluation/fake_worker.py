"""A worker that follows the protocol and acts as the name of its task says, without torch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def write(line):
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def say(**message):
    write(json.dumps(message))


def finish(order, settings, score=0.5):
    dims = {str(dim): {"main_score": score} for dim in settings["dims"]}
    used = {"dtype": "float32", "causal": True, "pooling": "mean", "max_length": 32}
    record = {"key": order["key"], "dims": dims, "seconds": 0.1, "used": used}
    Path(order["result"]).write_text(json.dumps({"kalm_min": record}))
    say(event="done", task=order["name"])


def main():
    settings = json.loads(sys.stdin.readline())
    if settings["device"] == "cuda:7":
        say(event="unusable", error="no such device")
        sys.exit(1)
    if settings["device"] == "cuda:8":
        os.kill(os.getpid(), signal.SIGKILL)
    say(event="ready")
    for line in sys.stdin:
        order = json.loads(line)
        name, task = order["name"].split("-")[0], order["name"]
        sys.stderr.write(f"{task}, attempt {order['attempt']}\n")
        if order["slice"]:
            Path(order["store"]).mkdir(parents=True, exist_ok=True)
            with (Path(order["store"]) / "slices").open("a") as file:
                file.write(f"{order['name']} {order['slice']}\n")
            say(event="done", task=task)
        elif name == "cut":
            slices = (Path(order["store"]) / "slices").read_text().splitlines()
            sys.stderr.write(f"{len(slices)} slices\n")
            finish(order, settings, score=len(slices))
        elif name == "once" and order["attempt"]:
            finish(order, settings)
        elif name in {"crash", "once"}:
            os.kill(os.getpid(), signal.SIGSEGV)
        elif name == "exit":
            sys.exit(3)
        elif name == "garbage":
            write("Downloading: 45%")
        elif name == "half":
            say(event="progress")
        elif name == "imposter":
            say(event="done", task="somebody else's")
        elif name == "hang":
            child = subprocess.Popen(["sleep", "600"])
            with Path(order["result"] + ".pids").open("a") as file:
                file.write(f"{os.getpid()} {child.pid}\n")
            time.sleep(600)
        elif name == "slow":
            for texts in range(8):
                say(event="progress", texts=texts, characters=9 * texts)
                time.sleep(0.1)
            finish(order, settings)
        elif name == "memory":
            say(event="failed", task=task, error="OutOfMemoryError", memory=True)
        elif name == "error":
            say(event="failed", task=task, error="ValueError: no", memory=False)
        elif name == "liar":
            say(event="done", task=task)
        elif name == "torn":
            Path(order["result"]).write_text('{"kalm_min": {"key"')
            say(event="done", task=task)
        else:
            finish(order, settings)


main()
