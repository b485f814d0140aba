"""Score a model on mteb's benchmarks and on local datasets, on every device of the machine.

    python evaluate.py --model runs/ft/final --benchmark "MTEB(eng, v1)" --output results
    python evaluate.py --model runs/ft/final --data data/eval --output results --dims 896 512 256
    python evaluate.py --benchmark "MTEB(eng, v1)" --datasets mirror --prefetch
    python evaluate.py --output results --report-only
    python evaluate.py --compare results/a results/b

The same command again continues where the last one stopped. The exit code is 0 only if every task
has its score, 1 if a task failed, 2 if the request is wrong, and 130 after an interruption.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from kalm_min.config import run
from kalm_min.evaluation import report
from kalm_min.evaluation.plan import EvaluationConfig, Plan, find_tasks, make_plan, prefetch
from kalm_min.evaluation.runner import Failure, Runner
from kalm_min.files import write_text


def evaluate(config: EvaluationConfig) -> int:
    """Do what the configuration requests; return the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    if config.compare:
        print(report.comparison(config.compare, config.dims))
        return 0
    if config.prefetch:
        failures = prefetch(find_tasks(config), sys.stdout)
        for failure in failures:
            sys.stderr.write(f"evaluate.py: could not fetch {failure}\n")
        print(f"{'incomplete' if failures else 'complete'}: {config.datasets}")
        return 1 if failures else 0
    return tabulate(config) if config.report_only else score(config)


def tabulate(config: EvaluationConfig) -> int:
    """Report without running: the requested plan, or everything that the folder holds."""
    is_named = not config.model and bool(config.benchmark or config.tasks or config.data)
    requested = find_tasks(config) if is_named else []
    plans = report.read_plans(config.output, config.dims, requested, config.benchmark)
    if config.model:
        found, plans = plans, [make_plan(config)]
        if plans[0].results not in [plan.results for plan in found]:
            folders = ", ".join(str(plan.results) for plan in found)
            raise ValueError(f"expected results in {plans[0].results}, found only {folders}")
    for plan in plans:
        one_of_many = config.output / "reports" / plan.results.name
        write_report(plan, {}, one_of_many if len(plans) > 1 else config.output)
    return 0


def score(config: EvaluationConfig) -> int:
    """Run the plan and report; return 1 if a task failed."""
    plan = make_plan(config)
    environment = dict(os.environ) | ({"HF_HUB_OFFLINE": "1"} if config.datasets else {})
    print(report.plan_table(plan), end="\n\n", flush=True)
    if config.dry_run:
        return 0
    runner = Runner(
        plan,
        devices=config.devices or visible_devices(),
        environment=environment,
        logs=config.output / "logs",
        timeout=config.timeout,
        store=config.store,
        stream=sys.stdout,
    )
    failures = runner.run()
    write_report(plan, failures, config.output)
    return 1 if failures else 0


def visible_devices() -> list[str]:
    """Every visible GPU, else one CPU; a child process counts, so that this one holds none."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    count = int(subprocess.run(command, capture_output=True, check=True).stdout)
    return [f"cuda:{i}" for i in range(count)] or ["cpu"]


def write_report(plan: Plan, failures: Mapping[str, Failure], folder: Path) -> None:
    """Print the tables and write them, with plots, into a folder."""
    rows = report.score_rows(plan)
    text = report.markdown(plan, rows, failures)
    write_text(folder / "summary.md", text)
    write_text(folder / "summary.csv", report.comma_separated(plan, rows))
    written = ", ".join(["summary.md", "summary.csv", *report.draw(folder, rows)])
    print(f"\n{text}\nwritten to {folder}: {written}")
    if find_spec("matplotlib") is None:
        print('no pictures: they need matplotlib, pip install "kalm-min[report]"')


if __name__ == "__main__":
    names = {"program": "evaluate.py", "description": (__doc__ or "").partition("\n")[0]}
    raise SystemExit(run(EvaluationConfig, evaluate, sys.argv[1:], **names, resumable=True))
