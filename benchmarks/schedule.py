"""How long MTEB(eng, v1) takes on 1 to 16 devices, by the schedule that evaluate.py runs.

    python benchmarks/schedule.py [--benchmark "MTEB(eng, v1)"] [--devices 1 4 8 16] [--loading 15]

A clock runs the real schedule, with the seconds that KaLM v2's authors recorded for each task
(recorded_seconds.json, which holds the source) and with our estimates from mteb's statistics. Each
slice costs `--loading` seconds more, for opening the data once again. The lower bound is the work,
each shared corpus encoded once, divided by the devices. Nothing is downloaded.
"""

import heapq
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kalm_min.config import parse
from kalm_min.evaluation.plan import EvaluationConfig, find_tasks
from kalm_min.evaluation.schedule import Job, Schedule, Work

_RECORDED = Path(__file__).with_name("recorded_seconds.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is simulated."""

    benchmark: str = "MTEB(eng, v1)"
    """Whose tasks."""
    devices: tuple[int, ...] = (1, 4, 8, 16)
    """How many work at the same time."""
    loading: float = 15.0
    """Seconds that each slice costs besides encoding."""


def main(argv: list[str]) -> None:
    """Print a table for each kind of seconds."""
    warnings.simplefilter("ignore")
    options = parse(Options, argv, program="schedule.py", description="A run, simulated.")
    config = EvaluationConfig(model="none", benchmark=(options.benchmark,))
    tasks, _, aggregates = find_tasks(config)
    estimated = [task.work() for task in tasks]
    kinds = {"recorded": recorded(estimated, aggregates), "estimated": estimated}
    for kind, works in kinds.items():
        hours = sum(work.seconds for work in works) / 3600
        print(
            f"\n{options.benchmark}, {len(works)} leaf tasks, {kind} seconds: {hours:.2f} hours\n"
        )
        print("| devices | lower bound, h | uncut, h | with slices, h | above the bound | slices |")
        print("|---|---|---|---|---|---|")
        for devices in options.devices:
            once = {work.corpus: work.corpus_seconds for work in works if work.corpus}
            twice = sum(work.corpus_seconds for work in works if work.corpus) - sum(once.values())
            bound = (hours - twice / 3600) / devices
            uncut, _ = simulate([replace(work, blocks=1) for work in works], devices, 0.0)
            span, slices = simulate(works, devices, options.loading)
            print(
                f"| {devices} | {bound:.2f} | {uncut / 3600:.2f} | {span / 3600:.2f} "
                f"| {span / 3600 / bound - 1:+.1%} | {slices} |"
            )


def recorded(works: Sequence[Work], aggregates: dict[str, tuple[str, ...]]) -> list[Work]:
    """The works with recorded seconds where there are any; an aggregate's by its parts' estimates."""
    seconds: dict[str, float] = json.loads(_RECORDED.read_text())["seconds"]
    estimates = {work.name: work.seconds for work in works}
    for name, leaves in aggregates.items():
        total = sum(estimates[leaf] for leaf in leaves)
        seconds |= {leaf: seconds[name] * estimates[leaf] / total for leaf in leaves}
    found: list[Work] = []
    for work in works:
        took = seconds.get(work.name, work.seconds)
        share = work.corpus_seconds / work.seconds
        found.append(replace(work, seconds=took, corpus_seconds=share * took))
    return found


def simulate(works: Sequence[Work], devices: int, loading: float) -> tuple[float, int]:
    """Seconds until the last job is done, and how many of the jobs were slices."""
    schedule, clock, slices = Schedule(works, devices), 0.0, 0
    free = list(range(devices))
    busy: list[tuple[float, int, Job]] = []
    while not schedule.is_empty() or busy:
        while free and (job := schedule.next()):
            slices += job.part is not None
            end = clock + job.seconds + (loading if job.part else 0.0)
            heapq.heappush(busy, (end, free.pop(), job))
        clock, device, job = heapq.heappop(busy)
        free.append(device)
        schedule.done(job)
    return clock, slices


if __name__ == "__main__":
    main(sys.argv[1:])
