"""Score models on mteb's benchmarks and on local datasets, on every device of the machine.

    python evaluate.py --model runs/ft/final --benchmark "MTEB(eng, v1)" --output results
    python evaluate.py --model runs/a/final runs/b/final --data data/eval --dims 896 512 256
    python evaluate.py --benchmark "MTEB(eng, v1)" --datasets mirror --prefetch
    python evaluate.py --output results --report-only
    python evaluate.py --compare results/a results/b

The same command again continues where the last one stopped. The exit code is 0 only if every task
has its score, 1 if a task failed, 2 if the request is wrong, 130 after Ctrl-C and 143 after SIGTERM.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import nan
from pathlib import Path

from kalm_min import program
from kalm_min.config import check_output, run
from kalm_min.console import printable
from kalm_min.evaluation import report
from kalm_min.evaluation.plan import (
    EvaluationConfig,
    Plan,
    check_hub,
    find_tasks,
    make_plans,
    prefetch,
    read_result,
)
from kalm_min.evaluation.runner import Failure, Runner, worker_environment
from kalm_min.files import write_text

# What a child process runs, so that this one holds no device.
_MEASURE = "from kalm_min.evaluation.worker import measure_speed; measure_speed()"
_DEVICES = """
import sys, torch
from kalm_min.embedder import pick_device
try:
    names = [str(pick_device(name)) for name in sys.argv[1:]]
except ValueError as error:
    sys.exit(f"--devices: {error}".replace("device: ", ""))
print(*(names or [f"cuda:{i}" for i in range(torch.cuda.device_count())]))
"""


def main(argv: list[str]) -> int:
    """Run and return the exit code."""
    description = "Score models on mteb's benchmarks and on local datasets, on every device."
    options = {"program": "evaluate.py", "description": description}
    return run(EvaluationConfig, evaluate, argv, **options, resumable=True)


def evaluate(config: EvaluationConfig) -> int:
    """Do what the configuration requests; return the exit code."""
    check_output(config.output, marks=["."])
    if config.compare:
        if len(config.dims) > 1:
            raise ValueError(f"--compare: expected one of --dims, found {len(config.dims)}")
        found = [(one, p) for one in config.compare for p in report.read_plans(one, config.dims)]
        write_comparison(found, config.output)
        return 0
    if config.prefetch:
        failures = prefetch(find_tasks(config), sys.stdout)
        sys.stderr.writelines(f"evaluate.py: could not fetch {one}\n" for one in failures)
        print(f"{'incomplete' if failures else 'complete'}: {config.datasets}")
        return int(bool(failures))
    return tabulate(config) if config.report_only else score(config)


def tabulate(config: EvaluationConfig) -> int:
    """Report without running: the requested plans, or everything that the folder holds."""
    is_named = not config.model and bool(config.benchmark or config.tasks or config.data)
    requested = find_tasks(config) if is_named else []
    plans = report.read_plans(config.output, config.dims, requested, config.benchmark)
    if config.model:
        found = [plan.results for plan in plans]
        plans = make_plans(config)
        for absent in (plan.results for plan in plans if plan.results not in found):
            folders = ", ".join(map(str, found))
            raise ValueError(f"expected results in {absent}, found only {folders}")
    for path in (path for plan in plans for path in sorted(plan.results.glob("*.json"))):
        if read_result(path) is None:
            found = "no result (torn, edited or of another program); evaluate the task again"
            sys.stderr.write(printable(f"{path}: passed over, it holds {found}\n"))
    write_reports(plans, {}, config.output)
    return 0


def score(config: EvaluationConfig) -> int:
    """Run the plan of each model and report; return 1 if a task failed."""
    plans, devices = make_plans(config), find_devices(config.devices)
    for plan in plans:
        speed = nan
        if config.dry_run:
            settings = plan.settings | {"model": plan.model, "device": devices[0]}
            speed = len(devices) * float(_child(_MEASURE, (), json.dumps(settings)))
        print(report.plan_table(plan, speed), end="\n\n", flush=True)
    if config.dry_run:
        return 0
    check_hub(plans)
    options = {"devices": devices, "timeout": config.timeout, "store": config.store}
    options |= {"logs": config.output / "logs", "stream": sys.stdout}
    environment = os.environ | ({"HF_HUB_OFFLINE": "1"} if config.datasets else {})
    failures = {
        plan.results.name: Runner(plan, environment=environment, **options).run() for plan in plans
    }
    write_reports(plans, failures, config.output)
    return int(any(failures.values()))


def find_devices(names: Sequence[str]) -> list[str]:
    """The devices with these names, or every visible GPU, else one CPU.

    A child process looks, so that this one holds none. Raises ValueError for a device that is absent.
    """
    if set(names) == {"cpu"}:
        return list(names)
    return _child(_DEVICES, names).split() or ["cpu"]


def _child(code: str, arguments: Sequence[str], line: str = "") -> str:
    """The last line that Python code prints. Raises ValueError with its last sentence if it fails."""
    command = [sys.executable, "-c", code, *arguments]
    options = {"capture_output": True, "text": True, "env": worker_environment(os.environ, 1)}
    done = subprocess.run(command, input=line, check=False, **options)
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    return done.stdout.splitlines()[-1]


def write_reports(
    plans: Sequence[Plan], failures: Mapping[str, Mapping[str, Failure]], folder: Path
) -> None:
    """Print the tables of each model and write them, with plots; compare the models if several."""
    for plan in plans:
        name = f"{plan.results.parent.name}-{plan.results.name}"
        target = folder / "reports" / name if len(plans) > 1 else folder
        rows = report.score_rows(plan)
        text = report.markdown(plan, rows, failures.get(plan.results.name, {}))
        write_text(target / "summary.md", text)
        write_text(target / "summary.csv", report.comma_separated(plan, rows))
        print(f"\n{text}")
        _say(target, ["summary.md", "summary.csv", *report.draw(target, rows)])
    if len(plans) > 1:
        write_comparison([(folder, plan) for plan in plans], folder)


def write_comparison(found: Sequence[tuple[Path, Plan]], output: Path) -> None:
    """Print how models compare, and write it with a picture."""
    text, columns, types = report.compare(found)
    write_text(output / "comparison.md", text)
    print(text)
    pictures = report.draw_types(output / "comparison.png", types, columns)
    _say(output, ["comparison.md", *pictures])


def _say(folder: Path, names: Sequence[str]) -> None:
    print(f"written to {folder}: {', '.join(names)}")
    if find_spec("matplotlib") is None:
        print('no pictures: they need matplotlib, pip install "kalm-min[report]"')


if __name__ == "__main__":
    program.start("evaluate")
