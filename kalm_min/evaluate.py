"""Score models on mteb's benchmarks and on local datasets, on every device of the machine.

    python evaluate.py --model runs/ft/final --benchmark "MTEB(eng, v1)" --output results
    python evaluate.py --model runs/a/final runs/b/final --data data/eval --dims 896 512 256
    python evaluate.py --benchmark "MTEB(eng, v1)" --datasets mirror --prefetch
    python evaluate.py --output results --report-only
    python evaluate.py --compare results/a results/b

The same command again continues where the last one stopped. The exit code is 0 only if every task
has its score, 1 if a task failed, 2 if the request is wrong, and 130 after an interruption.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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


def main(argv: list[str]) -> int:
    """Run and return the exit code."""
    description = "Score models on mteb's benchmarks and on local datasets, on every device."
    options = {"program": "evaluate.py", "description": description}
    return run(EvaluationConfig, evaluate, argv, **options, resumable=True)


def evaluate(config: EvaluationConfig) -> int:
    """Do what the configuration requests; return the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    check_output(config.output, marks=["."])
    if config.compare:
        if len(config.dims) > 1:
            raise ValueError(f"--compare: expected one of --dims, found {len(config.dims)}")
        found = [(one, p) for one in config.compare for p in report.read_plans(one, config.dims)]
        write_comparison(found, config.output)
        return 0
    if config.prefetch:
        failures = prefetch(find_tasks(config), sys.stdout)
        for failure in failures:
            sys.stderr.write(f"evaluate.py: could not fetch {failure}\n")
        print(f"{'incomplete' if failures else 'complete'}: {config.datasets}")
        return 1 if failures else 0
    return tabulate(config) if config.report_only else score(config)


def tabulate(config: EvaluationConfig) -> int:
    """Report without running: the requested plans, or everything that the folder holds."""
    is_named = not config.model and bool(config.benchmark or config.tasks or config.data)
    requested = find_tasks(config) if is_named else []
    plans = report.read_plans(config.output, config.dims, requested, config.benchmark)
    if config.model:
        found = [plan.results for plan in plans]
        plans = make_plans(config)
        for plan in plans:
            if plan.results not in found:
                folders = ", ".join(map(str, found))
                raise ValueError(f"expected results in {plan.results}, found only {folders}")
    for path in (path for plan in plans for path in sorted(plan.results.glob("*.json"))):
        if read_result(path) is None:
            found = "no result (torn, edited or of another program); evaluate the task again"
            sys.stderr.write(printable(f"{path}: passed over, it holds {found}\n"))
    write_reports(plans, {}, config.output)
    return 0


def score(config: EvaluationConfig) -> int:
    """Run the plan of each model and report; return 1 if a task failed."""
    plans = make_plans(config)
    environment = dict(os.environ) | ({"HF_HUB_OFFLINE": "1"} if config.datasets else {})
    devices = find_devices(config.devices)
    for plan in plans:
        speed = len(devices) * measure(plan, devices[0]) if config.dry_run else float("nan")
        print(report.plan_table(plan, speed), end="\n\n", flush=True)
    if config.dry_run:
        return 0
    check_hub(plans)
    failures: dict[str, Mapping[str, Failure]] = {}
    for plan in plans:
        runner = Runner(
            plan,
            devices=devices,
            environment=environment,
            logs=config.output / "logs",
            timeout=config.timeout,
            store=config.store,
            stream=sys.stdout,
        )
        failures[plan.results.name] = runner.run()
    write_reports(plans, failures, config.output)
    return 1 if any(failures.values()) else 0


def find_devices(names: Sequence[str]) -> list[str]:
    """The devices with these names, or every visible GPU, else one CPU.

    A child process looks, so that this one holds none. Raises ValueError for a device that is absent.
    """
    if set(names) == {"cpu"}:
        return list(names)
    code = "import sys, json, torch; from kalm_min.embedder import pick_device as pick\n"
    code += "try: names = [str(pick(name)) for name in sys.argv[1:]]\n"
    code += "except ValueError as error: sys.exit(f'--devices: {error}'.replace('device: ', ''))\n"
    code += "print(json.dumps(names or [f'cuda:{i}' for i in range(torch.cuda.device_count())]))"
    return _child(code, names) or ["cpu"]


def measure(plan: Plan, device: str) -> float:
    """Characters per second that a plan's model encodes on a device."""
    code = "from kalm_min.evaluation.worker import measure_speed; measure_speed()"
    settings = plan.settings | {"model": plan.model, "device": device}
    return _child(code, (), json.dumps(settings))


def _child(code: str, arguments: Sequence[str], line: str = "") -> Any:
    """What Python code prints as JSON. Raises ValueError with its last sentence if it fails."""
    command = [sys.executable, "-c", code, *arguments]
    environment = worker_environment(os.environ, 1)
    done = subprocess.run(
        command, input=line, capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


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
