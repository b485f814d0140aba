"""Score a model on mteb's benchmarks and on one's own datasets, on every device of the machine.

    python evaluate.py --model runs/ft/final --benchmark "MTEB(eng, v1)" --output results
    python evaluate.py --model runs/ft/final --data data/eval --output results --dims 896 512 256
    python evaluate.py --benchmark "MTEB(eng, v1)" --datasets mirror --prefetch

The same command again continues where the last one stopped. Exit code 0 only when every task has
its score; 1 when one failed, 2 when the request itself is wrong.
"""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from typing import NoReturn

from kalm_min.config import parse
from kalm_min.evaluation import report
from kalm_min.evaluation.mirror import mirrored, prefetch
from kalm_min.evaluation.plan import EvaluationConfig, find_tasks, make_plan
from kalm_min.evaluation.runner import Runner
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
        return _prefetch(config) if config.prefetch else _evaluate(config)
    except ValueError as error:
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
        stream=sys.stdout,
    )
    failures = runner.run()
    rows = report.score_rows(plan)
    text = report.markdown(plan, rows, failures)
    write_text(config.output / "summary.md", text)
    write_text(config.output / "summary.csv", report.comma_separated(plan, rows))
    print(f"\n{text}\nwritten to {config.output / 'summary.md'} and summary.csv")
    return 1 if failures else 0


def _visible_devices() -> list[str]:
    """Every visible GPU, else one CPU worker; asked of another process, so this one holds none."""
    ask = "import torch; print(torch.cuda.device_count())"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return [f"cuda:{i}" for i in range(int(answer.stdout))] or ["cpu"]


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
