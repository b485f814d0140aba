"""How long MTEB(eng, v1) takes on 1 to 16 devices, by the schedule that evaluate.py runs.

    python benchmarks/schedule.py [--benchmark "MTEB(eng, v1)"] [--devices 1 4 8 16] [--loading 15]

A clock runs the real schedule, which orders and cuts by characters. A task takes the seconds that KaLM
v2's authors recorded for it (recorded_seconds.json, which holds the source), or, in a second table, a
share of their sum in proportion to its characters: the difference between the two tables is what the
schedule loses because characters predict seconds imperfectly. Each slice costs `--loading` seconds
more, for opening the data once again. The lower bound is the work divided by the devices. Nothing is
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
from kalm_min.evaluation.plan import EvaluationConfig, find_tasks
from kalm_min.evaluation.schedule import BLOCK, Job, Schedule, Work

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
    config = EvaluationConfig(model="none", benchmark=(options.benchmark,))
    tasks, _, aggregates = find_tasks(config)
    works = [
        Work(task.name, task.characters, task.corpus_characters, task.documents // BLOCK)
        for task in tasks
    ]
    recorded = recorded_seconds(works, aggregates)
    hours = sum(recorded.values()) / 3600
    speed = hours * 3600 / sum(work.seconds for work in works)
    kinds = {
        "as recorded": recorded,
        "in proportion to characters": {work.name: work.seconds * speed for work in works},
    }
    for kind, seconds in kinds.items():
        print(f"\n{options.benchmark}, {len(works)} leaf tasks, {hours:.2f} hours, {kind}\n")
        print("| devices | lower bound, h | uncut, h | with slices, h | above the bound | slices |")
        print("|---|---|---|---|---|---|")
        for devices in options.devices:
            bound = hours / devices
            uncut, _ = simulate([replace(work, blocks=1) for work in works], seconds, devices, 0.0)
            span, slices = simulate(works, seconds, devices, options.loading)
            print(
                f"| {devices} | {bound:.2f} | {uncut / 3600:.2f} | {span / 3600:.2f} "
                f"| {span / 3600 / bound - 1:+.1%} | {slices} |"
            )


def recorded_seconds(
    works: Sequence[Work], aggregates: dict[str, tuple[str, ...]]
) -> dict[str, float]:
    """Recorded seconds by task; those of an aggregate are divided by characters."""
    seconds: dict[str, float] = json.loads(_RECORDED.read_text())["seconds"]
    characters = {work.name: work.seconds for work in works}
    for name, leaves in aggregates.items():
        total = sum(characters[leaf] for leaf in leaves)
        seconds |= {leaf: seconds[name] * characters[leaf] / total for leaf in leaves}
    return {work.name: seconds[work.name] for work in works}


def simulate(
    works: Sequence[Work], seconds: dict[str, float], devices: int, loading: float
) -> tuple[float, int]:
    """Seconds until the last job is done, and how many of the jobs were slices."""
    schedule, clock, slices = Schedule(works, devices), 0.0, 0
    characters = {work.name: work.seconds for work in works}
    free = list(range(devices))
    busy: list[tuple[float, int, Job]] = []
    while not schedule.is_empty() or busy:
        while free and (job := schedule.next()):
            slices += job.part is not None
            duration = seconds[job.task] * job.seconds / characters[job.task]
            end = clock + duration + (loading if job.part else 0.0)
            heapq.heappush(busy, (end, free.pop(), job))
        clock, device, job = heapq.heappop(busy)
        free.append(device)
        schedule.done(job)
    return clock, slices


if __name__ == "__main__":
    main(sys.argv[1:])
