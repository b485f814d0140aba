"""The time that MTEB(eng, v1) takes on 1 to 16 devices with the jobs that evaluate.py makes.

    python benchmarks/schedule.py [--benchmark "MTEB(eng, v1)"] [--devices 1 4 8 16] [--loading 15]

A simulated clock runs the real jobs, which are ordered and cut by characters. A task takes the
seconds that KaLM v2's authors recorded for it (recorded_seconds.json, which holds the source), or, in
a second table, a share of their sum in proportion to its characters: the difference between the two
tables is the loss that arises because characters predict seconds imperfectly. Each slice costs
`--loading` seconds more, for opening the data again. The lower bound is the work divided by the number of devices. Nothing is
downloaded.
"""

import heapq
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from kalm_min.config import parse
from kalm_min.evaluation.plan import EvaluationConfig, PlannedTask, find_tasks
from kalm_min.evaluation.runner import Job, make_jobs, next_job

_RECORDED = Path(__file__).with_name("recorded_seconds.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is simulated."""

    benchmark: Annotated[str, "Benchmark of mteb to simulate."] = "MTEB(eng, v1)"
    devices: Annotated[tuple[int, ...], "Numbers of devices to simulate."] = (1, 4, 8, 16)
    loading: Annotated[float, "Seconds that each slice costs besides encoding."] = 15.0


def main(argv: list[str]) -> None:
    """Print both tables."""
    warnings.simplefilter("ignore")
    options = parse(Options, argv, program="schedule.py", description="A run, simulated.")
    config = EvaluationConfig(model=("none",), benchmark=(options.benchmark,))
    tasks = find_tasks(config)
    recorded = recorded_seconds(tasks)
    hours = sum(recorded.values()) / 3600
    speed = hours * 3600 / sum(task.characters for task in tasks)
    kinds = {
        "as recorded": recorded,
        "in proportion to characters": {task.name: task.characters * speed for task in tasks},
    }
    for kind, seconds in kinds.items():
        print(f"\n{options.benchmark}, {len(tasks)} leaf tasks, {hours:.2f} hours, {kind}\n")
        print("| devices | lower bound, h | uncut, h | with slices, h | above the bound | slices |")
        print("|---|---|---|---|---|---|")
        for devices in options.devices:
            bound = hours / devices
            uncut, _ = simulate([replace(task, documents=0) for task in tasks], seconds, devices)
            span, slices = simulate(tasks, seconds, devices, options.loading)
            print(
                f"| {devices} | {bound:.2f} | {uncut / 3600:.2f} | {span / 3600:.2f} "
                f"| {span / 3600 / bound - 1:+.1%} | {slices} |"
            )


def recorded_seconds(tasks: Sequence[PlannedTask]) -> dict[str, float]:
    """Recorded seconds by task; those of an aggregate are divided by characters."""
    seconds: dict[str, float] = json.loads(_RECORDED.read_text())["seconds"]
    for name in {task.aggregate for task in tasks if task.aggregate}:
        parts = [task for task in tasks if task.aggregate == name]
        total = sum(task.characters for task in parts)
        seconds |= {task.name: seconds[name] * task.characters / total for task in parts}
    return {task.name: seconds[task.name] for task in tasks}


def simulate(
    tasks: Sequence[PlannedTask], seconds: dict[str, float], devices: int, loading: float = 0.0
) -> tuple[float, int]:
    """Seconds until the last job is done, and how many of the jobs were slices."""
    jobs, clock, slices = make_jobs(tasks, devices), 0.0, 0
    free = list(range(devices))
    busy: list[tuple[float, int, Job]] = []
    while jobs or busy:
        while free and (job := next_job(jobs, [job for *_, job in busy])):
            slices += job.part is not None
            duration = seconds[job.task.name] * job.characters / job.task.characters
            end = clock + duration + (loading if job.part else 0.0)
            heapq.heappush(busy, (end, free.pop(), job))
        clock, device, _ = heapq.heappop(busy)
        free.append(device)
    return clock, slices


if __name__ == "__main__":
    main(sys.argv[1:])
