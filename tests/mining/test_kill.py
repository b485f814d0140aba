"""kill -9 of mine.py at any write of any phase: the next run ends as if nothing had happened.

KILLS=20 makes 20 of the test's points.
"""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kalm_min import mine
from kalm_min.data import TrainingData

ROOT = Path(__file__).parent.parent.parent
KILLS = int(os.environ.get("KILLS", "4"))
WORDS = "the cat sat on a mat while one dog ran far from its house to see blue birds".split()

# Ends the process before or after its n-th file is put in place; for n = 0 counts them.
PROGRAM = """
import os, pathlib, signal, sys
from kalm_min import mine
point, after, done = int(sys.argv[1]), sys.argv[2] == "after", 0
replace = pathlib.Path.replace
def counted(self, target):
    global done
    done += 1
    if done == point and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(self, target)
    if done == point:
        os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.replace = counted
assert mine.main(sys.argv[3:]) == 0
print(done)
"""


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "/." not in path.as_posix()
    }


def run(point, after, arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(point), after, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)


@pytest.mark.slow
def test_killed_at_random_points(tiny_model_dir, make_model, tmp_path):
    """Reading, encoding, searching, scoring, writing: equal bytes after a kill at any write."""
    rng = random.Random(0)
    make_model(tmp_path / "scorer", seed=3)
    for task in ("one", "two"):
        texts = [" ".join(rng.choices(WORDS, k=6)) for _ in range(150)]
        rows = "".join(f'{{"query": "{text}", "pos": ["{text} birds"]}}\n' for text in texts)
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{task}.jsonl").write_text(rows, encoding="utf-8")
    TrainingData(tmp_path / "data")  # its line index is written once, not by each run

    def arguments(name):
        flags = ("--model", tiny_model_dir, "--scorer", tmp_path / "scorer", "--dtype", "float32")
        folders = ("--data", tmp_path / "data", "--output", tmp_path / name)
        return [*map(str, (*flags, *folders)), "--rank-range", "2", "9", "--seed", "1"]

    unbroken = run(0, "before", arguments("unbroken"))
    assert unbroken.returncode == 0, unbroken.stderr
    writes = int(unbroken.stdout)
    points = [(rng.randint(1, writes), rng.choice(("before", "after"))) for _ in range(KILLS)]
    for number, (point, after) in enumerate(points):
        name = f"killed{number}"
        assert run(point, after, arguments(name)).returncode == -signal.SIGKILL
        assert mine.main(arguments(name)) == 0
        assert contents(tmp_path / name) == contents(tmp_path / "unbroken"), (point, after)
        assert not list((tmp_path / name).rglob(".*.tmp"))
