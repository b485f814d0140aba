"""Starting train.py as a user does, and reading what a run left."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path
from unittest.mock import patch

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
PATIENCE = 300  # seconds; a machine under load is slow, not wrong


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(arguments, output, *extra, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    given = [*(launcher if processes > 1 else []), ROOT / "train.py"]
    return [sys.executable, *map(str, [*given, *flags(*arguments, "--output", output, *extra)])]


def flags(*words):
    """The words of a command line in which a flag replaces its earlier values."""
    found = {}
    values = first = []  # a recipe
    for word in map(str, words):
        if word.startswith("--"):
            values = found[word] = []
        else:
            values.append(word)
    return [*first, *(word for name, values in found.items() for word in (name, *values))]


def run(arguments, output, *extra, processes=1):
    """Run to the end; the finished process."""
    line = command(arguments, output, *extra, processes=processes)
    return subprocess.run(
        line, capture_output=True, text=True, env=environment(), timeout=PATIENCE, check=False
    )


def start(arguments, output, *extra):
    """Run in this process, without the start of another; the exit code and what was said.

    Nothing is synced to the disk, which takes half of the time and only outlasts a loss of power.
    """
    from kalm_min import train

    said = io.StringIO()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    train.say = lambda text: said.write(f"{text}\n")
    try:
        with redirect_stderr(said), patch("os.fsync"):
            code = train.main(command(arguments, output, *extra)[2:])
    except SystemExit as exit:
        code = exit.code
    for number, handler in before.items():
        signal.signal(number, handler)
    return code, said.getvalue()


def log(output):
    """The logged lines without the clock."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def weights(output):
    return load_file(output / "final" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def wait_for_steps(output, steps, process):
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        path = output / "log.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= steps:
            return
        time.sleep(0.005)
    raise AssertionError(f"the run did not reach step {steps}")
