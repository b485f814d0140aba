"""The mirror of the hub's datasets, against a server that answers like the hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kalm_min.evaluation.plan import EvaluationConfig, make_plans
from tests.evaluation.hub import serve, write_repository

ROOT = Path(__file__).parents[2]
TASKS = ("STS12", "SciFact", "AskUbuntuDupQuestions")


@pytest.fixture
def evaluate(mteb, tiny_model_dir, tmp_path):
    """evaluate(hub, *arguments): the finished process of evaluate.py with its own home folder."""

    def run(address, *arguments):
        environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_ENDPOINT": address, "PYTHONWARNINGS": "ignore"}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, str(ROOT / "evaluate.py"), *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return run


@pytest.fixture
def repositories(mteb, tmp_path):
    """The hub's side: {"owner/name": (revision, folder)}."""
    found = {}
    for name in TASKS:
        dataset = mteb.get_task(name).metadata.dataset
        write_repository(tmp_path / "hub" / name, name)
        found[dataset["path"]] = (dataset["revision"], tmp_path / "hub" / name)
    return found


def test_fetched_on_one_machine_and_used_on_another(
    evaluate, repositories, tiny_model_dir, tmp_path
):
    """Promise: what --prefetch copies is all that a run needs; the run asks the network nothing."""
    wanted = ("--tasks", *TASKS, "--datasets", "mirror")
    scores = ("--model", tiny_model_dir, "--devices", "cpu", "--instructions", "none")
    with serve(repositories) as (address, asked):
        early = evaluate(address, *wanted, *scores)
        assert early.returncode == 2
        assert early.stderr.startswith("evaluate.py: --datasets: expected ")
        assert "--prefetch" in early.stderr
        assert early.stderr.count("\n") == 1
        (repositories["mteb/scifact"][1] / "loader.py").write_text("raise SystemExit")
        fetched = evaluate(address, *wanted, "--prefetch")
        assert fetched.returncode == 0, fetched.stderr
        assert fetched.stdout.endswith("complete: mirror\n")
        for repository, (revision, folder) in repositories.items():
            copy = tmp_path / "mirror" / repository / revision
            names = {path.relative_to(copy).as_posix() for path in copy.rglob("*")}
            theirs = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
            assert names == theirs - {"loader.py"}
        del asked[:]
        again = evaluate(address, *wanted, "--prefetch")
        assert again.returncode == 0
        assert not [path for path in asked if "datasets" in path]
        done = evaluate(address, *wanted, *scores)
        assert done.returncode == 0, done.stdout
        assert not [path for path in asked if "datasets" in path]
    assert "mean of 3 tasks" in done.stdout


def test_a_repository_that_cannot_be_had(evaluate, repositories, tmp_path):
    """It is named with the reason and leaves nothing behind; the others are there all the same."""
    revision, _ = repositories.pop("mteb/sts12-sts")
    with serve(repositories) as (address, _):
        done = evaluate(address, "--tasks", *TASKS, "--datasets", "mirror", "--prefetch")
    assert done.returncode == 1
    assert "could not fetch mteb/sts12-sts at a0d554a64d88 (STS12): " in done.stderr
    assert done.stdout.endswith("incomplete: mirror\n")
    assert not (tmp_path / "mirror" / "mteb" / "sts12-sts" / revision).exists()
    assert len(list((tmp_path / "mirror").glob("*/*/*/README.md"))) == 2


def test_another_revision_is_not_used(mteb, tiny_model_dir, eight, tmp_path):
    """Bug to avoid: `datasets` reads any content of a folder as the requested revision."""
    config = EvaluationConfig(
        model=(str(tiny_model_dir),), tasks=("STS12",), data=(eight / "sts",), datasets=tmp_path
    )
    dataset = mteb.get_task("STS12").metadata.dataset
    copy = tmp_path / dataset["path"] / dataset["revision"]
    copy.with_name("old").mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"{dataset['path']}/{dataset['revision']}, found none"):
        make_plans(config)
    copy.with_name("old").rename(copy)
    found = {task.name: task.mirror for task in make_plans(config)[0].tasks}
    assert found == {"STS12": copy, "sts": None}
