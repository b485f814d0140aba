"""Score a model on mteb's benchmarks and on one's own datasets, on every device of the machine.

    python evaluate.py --model runs/ft/final --benchmark "MTEB(eng, v1)" --output results
    python evaluate.py --model runs/ft/final --data data/eval --output results --dims 896 512 256
    python evaluate.py --benchmark "MTEB(eng, v1)" --datasets mirror --prefetch
    python evaluate.py --output results --report-only
    python evaluate.py --compare results/a results/b

The same command again continues where the last one stopped. Exit code 0 only when every task has
its score; 1 when one failed, 2 when the request itself is wrong.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from kalm_min.config import parse
from kalm_min.evaluation import plots, report
from kalm_min.evaluation.compare import comparison
from kalm_min.evaluation.mirror import mirrored, prefetch
from kalm_min.evaluation.plan import EvaluationConfig, Plan, find_tasks, make_plan
from kalm_min.evaluation.results import asked_for, read_plans
from kalm_min.evaluation.runner import Failure, Runner
from kalm_min.files import write_text


def main() -> int:
    """Parse, plan, run, report."""
    config = parse(
        EvaluationConfig,
        sys.argv[1:],
        program="evaluate.py",
        description=(__doc__ or "").splitlines()[0],
    )
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if config.compare:
            print(comparison(config.compare, config.dims))
            return 0
        if config.prefetch:
            return _prefetch(config)
        return _tabulate(config) if config.report_only else _evaluate(config)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"evaluate.py: {error}\n")
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished results are kept, the same command continues")
        return 130


def _prefetch(config: EvaluationConfig) -> int:
    """Fill the mirror."""
    assert config.datasets is not None
    failures = prefetch(config.datasets, find_tasks(config)[0], sys.stdout)
    for failure in failures:
        sys.stderr.write(f"evaluate.py: could not fetch {failure}\n")
    print(f"{'incomplete' if failures else 'complete'}: {config.datasets}")
    return 1 if failures else 0


def _tabulate(config: EvaluationConfig) -> int:
    """Report without running: the plan that was asked for, or whatever the folder holds."""
    there = read_plans(config.output, config.dims)
    if config.model:
        plans = [make_plan(config)]
        if not any(plan.results == plans[0].results for plan in there):
            found = ", ".join(str(plan.results) for plan in there)
            raise ValueError(f"expected results in {plans[0].results}, found only {found}")
    elif config.benchmark or config.tasks or config.data:
        plans = [asked_for(plan, *find_tasks(config)) for plan in there]
    else:
        plans = there
    for plan in plans:
        apart = config.output / "reports" / plan.results.name
        _write_report(config, plan, {}, apart if len(plans) > 1 else config.output)
    return 0


def _evaluate(config: EvaluationConfig) -> int:
    """The exit code of a run."""
    plan = make_plan(config)
    environment = dict(os.environ)
    if config.datasets:
        plan = replace(plan, tasks=tuple(mirrored(config.datasets, plan.tasks)))
        environment["HF_HUB_OFFLINE"] = "1"
    print(report.plan_table(plan), end="\n\n", flush=True)
    if config.dry_run:
        return 0
    runner = Runner(
        plan,
        devices=config.devices or _visible_devices(),
        environment=environment,
        logs=config.output / "logs",
        timeout=config.timeout,
        store=config.store,
        stream=sys.stdout,
    )
    failures = runner.run()
    _write_report(config, plan, failures, config.output)
    return 1 if failures else 0


def _write_report(
    config: EvaluationConfig, plan: Plan, failures: Mapping[str, Failure], folder: Path
) -> None:
    """Print the tables and write them, and plots, into a folder."""
    rows = report.score_rows(plan)
    text = report.markdown(plan, rows, failures)
    write_text(folder / "summary.md", text)
    write_text(folder / "summary.csv", report.comma_separated(plan, rows))
    images = plots.draw(folder, rows, config.output / "logs" / "timeline.jsonl")
    written = ", ".join(["summary.md", "summary.csv", *images])
    print(f"\n{text}\nwritten to {folder}: {written}")
    if find_spec("matplotlib") is None:
        print('no plots: they need matplotlib, pip install "kalm-min[report]"')


def _visible_devices() -> list[str]:
    """Every visible GPU, else one CPU worker; asked of another process, so this one holds none."""
    ask = "import torch; print(torch.cuda.device_count())"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return [f"cuda:{i}" for i in range(int(answer.stdout))] or ["cpu"]


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
