"""The command itself: exit codes, files, and what it does the second time."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLAIN = ("--instructions", "none")  # the tiny model's 32 tokens hold little more than one


@pytest.fixture(scope="module")
def evaluate(tiny_model_dir, tmp_path_factory):
    """Runs evaluate.py in an empty folder; returns the finished process."""
    folder = tmp_path_factory.mktemp("cli")

    def run(*arguments, has_model=True):
        command = [sys.executable, str(ROOT / "evaluate.py")]
        command += ["--model", str(tiny_model_dir)] * has_model
        environment = {
            "PATH": os.environ["PATH"],
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        environment |= {name: os.environ[name] for name in ("HOME",) if name in os.environ}
        options = ["--devices", "cpu", "--dtype", "float32", *map(str, arguments)]
        return subprocess.run(
            command + options, cwd=folder, env=environment, capture_output=True, text=True
        )

    run.folder = folder
    return run


def test_a_run_and_its_repetition(mteb, evaluate, eight, datasets):
    """Promise: one failing task gives exit code 1 and is named; a rerun repeats nothing else."""
    (datasets / "classification" / "task.toml").write_text('main_metric = "ap"')
    wanted = ("--data", eight / "sts", datasets / "classification", "--dims", "32", "8", *PLAIN)
    first = evaluate(*wanted)
    assert first.returncode == 1, first.stderr
    output = evaluate.folder / "results"
    summary = (output / "summary.md").read_text()
    assert summary in first.stdout
    assert "**classification failed**: ValueError: the main score" in summary
    assert "Traceback" in summary  # the tail of the worker's log
    rows = (output / "summary.csv").read_text().splitlines()
    assert rows[0] == "kind,name,type,score,32,8,seconds"
    assert rows[1] == "task,classification,Classification,ap,,,"
    assert rows[2].startswith("task,sts,STS,cosine_spearman,")
    (result,) = output.glob("results/local__model/*/sts.json")
    record = json.loads(result.read_text())
    assert record["task_name"] == "sts"
    assert set(record["kalm_min"]["dims"]) == {"32", "8"}
    assert rows[2].split(",")[4] == f"{100 * record['main_score']:.2f}"
    cache = mteb.ResultCache(output).load_results(require_model_meta=False)
    assert cache.model_results[0].task_results[0].task_name == "sts"

    before = result.stat().st_mtime_ns
    again = evaluate("--data", eight / "sts", "--dims", "8", *PLAIN)
    assert again.returncode == 0, again.stderr
    assert "cosine_spearman" in again.stdout
    assert "[1/1]" not in again.stdout  # no task was run
    assert result.stat().st_mtime_ns == before


def test_a_folder_is_tabulated_and_compared_without_running(mteb, evaluate, eight, tmp_path):
    """Promise: --report-only gives the tables of the run and needs only the folder."""
    wanted = ("--data", eight / "sts", eight / "pair", "--output", "tables", *PLAIN)
    assert evaluate(*wanted).returncode == 0
    folder = evaluate.folder / "tables"
    tables = {path: path.read_text() for path in folder.glob("summary.*")}
    assert len(tables) == 2
    (results,) = folder.glob("results/*/*")
    (results / "broken.json").write_text("[" * 100_000)
    for more in (("--report-only",), (*wanted, "--report-only")):
        for path in tables:
            path.unlink()
        output = ("--output", "tables") if len(more) == 1 else ()
        again = evaluate(*output, *more, has_model=len(more) > 1)
        assert again.returncode == 0, again.stderr
        assert "broken.json: passed over, it holds no result" in again.stderr
        assert {path: path.read_text() for path in tables} == tables
    compared = evaluate("--compare", "tables", folder, has_model=False)
    assert compared.returncode == 0, compared.stderr
    assert "mean of 2 tasks" in compared.stdout
    for arguments, found in (
        (("--output", "nothing", "--report-only"), "nothing: expected a folder"),
        (("--compare", "tables"), "--compare: expected two folders"),
        (("--compare", "tables", "nothing"), "nothing: expected a folder"),
    ):
        wrong = evaluate(*arguments, has_model=False)
        assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
        assert found in wrong.stderr
    other = evaluate(*wanted, "--max-length", "16", "--report-only")
    assert other.returncode == 2
    assert "found only tables/results/local__model/" in other.stderr


def test_dry_run_shows_the_plan_and_runs_nothing(mteb, evaluate, eight):
    shown = evaluate("--data", eight, "--dry-run", "--output", "elsewhere")
    assert shown.returncode == 0
    assert len(re.findall(r"\d  +~\d+s$", shown.stdout, re.MULTILINE)) == 8
    assert '- "Retrieve semantically similar text" (v2, type): ' in shown.stdout
    assert "8 tasks (0 done), " in shown.stdout
    assert "characters/s" in shown.stdout
    assert not (evaluate.folder / "elsewhere").exists()


def test_a_wrong_request_is_one_sentence_and_exit_code_2(mteb, evaluate, datasets):
    for arguments in (
        ("--data", "nowhere"),
        ("--data", datasets, "--dims", "64"),
        ("--data", datasets, "--instructions", "v9"),
        ("--data", datasets, "--device", "cpu"),
        (),
    ):
        wrong = evaluate(*arguments)
        assert wrong.returncode == 2, arguments
        assert wrong.stderr.startswith("evaluate.py: ")
        assert wrong.stderr.count("\n") == 1


def test_the_parent_imports_no_torch(mteb, eight, tiny_model_dir):
    """Promise: the parent never uses a device, and loads mteb only for mteb's tasks."""
    code = (
        "import sys, evaluate; from pathlib import Path;"
        "from kalm_min.evaluation.plan import EvaluationConfig, make_plans;"
        f"make_plans(EvaluationConfig(model=({str(tiny_model_dir)!r},), data=(Path({str(eight)!r}),)));"
        "sys.exit(str({'torch', 'mteb'} & set(sys.modules) or 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "0\n"
