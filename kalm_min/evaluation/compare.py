"""Results folders against one another: per task, with means over what they have in common."""

from collections.abc import Sequence
from pathlib import Path

from kalm_min.evaluation.plan import Plan, PlannedTask
from kalm_min.evaluation.report import described, side_by_side
from kalm_min.evaluation.results import read_plans


def comparison(folders: Sequence[Path], dims: Sequence[int] = ()) -> str:
    """The comparison as Markdown; differences are to the first folder.

    Args:
        folders: output folders with one checkpoint and settings each, or folders of result files.
        dims: one dimension to compare at; each folder's largest if none.

    Raises ValueError for a folder without results, or with those of several checkpoints or settings.
    """
    if len(dims) > 1:
        raise ValueError(f"--compare: expected one of --dims, found {len(dims)}")
    plans = [_only_plan(folder, dims) for folder in folders]
    names = [f"{name} ({plan.dims[0]})" for name, plan in zip(_names(folders), plans, strict=True)]
    tasks: dict[str, list[PlannedTask]] = {}
    for plan in plans:
        for task in plan.tasks:
            tasks.setdefault(task.name, []).append(task)
    other = sorted(name for name, group in tasks.items() if len(set(map(_data, group))) > 1)
    columns = {
        name: {task: score for task, score in _scores(plan).items() if task not in other}
        for name, plan in zip(names, plans, strict=True)
    }
    parts = [
        "# Comparison",
        "\n".join(f"- {n}: {p.model}. {described(p)}" for n, p in zip(names, plans, strict=True)),
    ]
    if other:
        parts.append(f"Left out, not the same data or score: {', '.join(other)}.")
    types = {name: group[0].type for name, group in tasks.items()}
    parts.append(side_by_side(columns, types, [(name, names[0]) for name in names[1:]]))
    parts.append("Means are over the tasks that all of them have, not of a benchmark.")
    return "\n\n".join(parts)


def _only_plan(folder: Path, dims: Sequence[int]) -> Plan:
    plans = read_plans(folder, dims)
    if len(plans) > 1:
        found = ", ".join(str(plan.results) for plan in plans)
        raise ValueError(
            f"{folder}: expected one checkpoint with one set of settings, found {found}"
        )
    return plans[0]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, or the paths where those are alike."""
    last = [folder.absolute().name for folder in folders]
    return last if len(set(last)) == len(last) else [str(folder) for folder in folders]


def _data(task: PlannedTask) -> tuple[object, ...]:
    """What must be alike for two scores to be of the same task."""
    return task.type, task.main_score, task.revision, task.splits, task.subsets


def _scores(plan: Plan) -> dict[str, float]:
    """Scores by task at the plan's largest dimension, times 100."""
    found = ((task.name, plan.result(task)) for task in plan.tasks)
    dim = str(plan.dims[0])
    return {
        name: 100 * result["kalm_min"]["dims"][dim]["main_score"]
        for name, result in found
        if result
    }
