"""What a results folder holds, read back as the plans that it came from.

    <output>/results/<model>/<checkpoint>-<settings>/<task>.json

A result file says by itself what it belongs to, so a folder needs neither the model nor the datasets
it was made with, nor mteb.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kalm_min.evaluation.plan import Instruction, Plan, PlannedTask
from kalm_min.files import read_json

# What of a result's key belongs to the task; the rest are settings of the run.
_OF_TASK = {
    "checkpoint",
    "revision",
    "splits",
    "subsets",
    "main_score",
    "query_instruction",
    "document_instruction",
}


def read_plans(folder: Path, dims: Sequence[int] = ()) -> list[Plan]:
    """A plan for each checkpoint and settings in an output folder, or of one folder of result files.

    `dims` are those the tasks have in common, if none is given. Raises ValueError where no result is.
    """
    folders = [folder, *sorted(folder.glob("results/*/*/"))]
    plans = [plan for one in folders if (plan := _read_plan(one, dims))]
    if not plans:
        raise ValueError(
            f"{folder}: expected a folder that evaluate.py wrote, found no result in it"
        )
    return plans


def _read_plan(folder: Path, dims: Sequence[int]) -> Plan | None:
    records = {path.stem: _record(path) for path in sorted(folder.glob("*.json"))}
    found = {name: record for name, record in records.items() if record}
    if not found:
        return None
    key = next(iter(found.values()))["key"]
    common = set.intersection(*(set(map(int, record["dims"])) for record in found.values()))
    if not (dims or common):
        raise ValueError(f"{folder}: its tasks have no dimension in common, choose with --dims")
    return Plan(
        model=folder.absolute().parent.name.replace("__", "/"),
        checkpoint=key["checkpoint"],
        dims=tuple(sorted(dims or common, reverse=True)),
        settings={name: value for name, value in key.items() if name not in _OF_TASK},
        tasks=tuple(_task(name, record) for name, record in found.items()),
        results=folder,
    )


def _record(path: Path) -> dict[str, Any] | None:
    """Our part of a result file; None for a file that is torn or not ours."""
    try:
        record = read_json(path)["kalm_min"]
        return record if record["key"].keys() >= _OF_TASK and record["dims"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _task(name: str, record: dict[str, Any]) -> PlannedTask:
    key = record["key"]
    return PlannedTask(
        name=name,
        type=record["type"],
        main_score=key["main_score"],
        revision=key["revision"],
        characters=0,
        instruction=Instruction(key["query_instruction"], key["document_instruction"]),
        splits=tuple(key["splits"]),
        subsets=tuple(key["subsets"]),
    )


def asked_for(
    plan: Plan,
    tasks: Sequence[PlannedTask],
    benchmarks: dict[str, tuple[str, ...]],
    aggregates: dict[str, tuple[str, ...]],
) -> Plan:
    """A plan that was read back, with the tasks that were asked for and are not there."""
    names = {task.name for task in plan.tasks}
    missing = [task for task in tasks if task.name not in names]
    return replace(
        plan, tasks=(*plan.tasks, *missing), benchmarks=benchmarks, aggregates=aggregates
    )
