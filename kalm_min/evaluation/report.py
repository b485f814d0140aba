"""Results as tables and pictures: scores with means, beside KaLM's releases, run against run.

Scores are mteb's, times 100. A mean says over what it was taken; under the name of an official
benchmark stands only what mteb itself averages, and nothing while a task is missing. A result file
records everything it was made with, so a folder is tabulated and compared without the model, the
datasets or mteb. The pictures need matplotlib (an extra).
"""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kalm_min.console import format_duration, table
from kalm_min.evaluation.plan import (
    Instruction,
    Plan,
    PlannedTask,
    Selection,
    official_means,
    official_score,
)
from kalm_min.files import atomic_write, read_json

if TYPE_CHECKING:
    from kalm_min.evaluation.runner import Failure

Records = Mapping[str, dict[str, Any]]
"""Task -> the entry "kalm_min" of its result."""
Column = TypeVar("Column")

# The part of a result's key that belongs to the task; the others are settings of the run.
_TASK_KEYS = {"checkpoint", "revision", "splits", "subsets", "main_score"}
_TASK_KEYS |= {"query_instruction", "document_instruction"}
_MISSING = "—"
PUBLISHED = read_json(Path(__file__).with_name("published.json"))
RELEASES = tuple(PUBLISHED["models"])


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the score table."""

    kind: str  # task, type, mean or benchmark
    name: str
    type: str
    metric: str
    scores: Mapping[int, float | None]  # by dimension; None where there is no result
    seconds: float | None = None
    published: Mapping[str, float] = field(default_factory=dict)  # by release, for the same task


def published_scores(task: PlannedTask) -> dict[str, float]:
    """The scores of KaLM's releases; {} if they have none for exactly these splits and subsets."""
    entry = PUBLISHED["tasks"].get(task.name, {"splits": (), "subsets": ()})
    if (task.splits, task.subsets) != (tuple(entry["splits"]), tuple(entry["subsets"])):
        return {}
    return {release: entry[release] for release in RELEASES}


def plan_table(plan: Plan) -> str:
    """The tasks, largest first: size, state, and the instruction with whether it is the type's."""
    rows: list[list[str]] = []
    for task in plan.tasks:
        state = "elsewhere" if task.name in plan.elsewhere else "to do"
        state = state if plan.result(task) is None else "done"
        query, document = task.instruction.query, task.instruction.document
        text = f"{query} | documents: {document}" if document else query
        if query and query == document:
            text = f"{query} (queries and documents)"
        size = f"{task.characters / 1e6:.2f}" if task.characters else "?"
        origin = task.instruction.origin if text else ""
        rows.append([task.name, task.type, size, state, origin, text or "none"])
    done = sum(row[3] == "done" for row in rows)
    total = sum(task.characters for task in plan.tasks) / 1e6
    summary = f"{len(rows)} tasks ({done} done), {total:.2f} Mchar; results in {plan.results}"
    head = ["task", "type", "Mchar", "state", "of the", "instruction"]
    return f"{table(head, rows, right={2})}\n\n{summary}"


def score_rows(plan: Plan) -> list[Row]:
    """Every task (scores None where it has no result), then means, then official benchmarks."""
    results = {task.name: plan.result(task) for task in plan.tasks}
    records = {name: result["kalm_min"] for name, result in results.items() if result}
    parts = {part for names in plan.aggregates.values() for part in names}
    groups = {task.name: [task] for task in plan.tasks if task.name not in parts}
    for name, leaves in plan.aggregates.items():
        groups[name] = [task for task in plan.tasks if task.name in leaves]
    rows = [_task_row(plan.dims, name, group, records) for name, group in groups.items()]
    rows.sort(key=lambda row: (row.type, row.name))
    done = {row.name: row for row in rows if row.scores[plan.dims[0]] is not None}
    missing = Counter(row.type for row in rows if row.name not in done)
    columns = {dim: {name: row.scores[dim] or 0 for name, row in done.items()} for dim in plan.dims}
    for name, scores in _means({name: row.type for name, row in done.items()}, columns).items():
        unit = name.split()[-1]
        is_overall = unit in {"tasks", "types"}
        count = missing.total() if is_overall else missing[unit]
        note = f" ({count} task{'s' * (count > 1)} missing)" if count else ""
        rows.append(Row("mean" if is_overall else "type", name + note, "", "", scores))
    for name, tasks in plan.benchmarks.items():
        leaves = [leaf for task in tasks for leaf in plan.aggregates.get(task, (task,))]
        if absent := sum(leaf not in records for leaf in leaves):
            note = f"{name}: {absent} of {len(leaves)} tasks missing"
            rows.append(Row("benchmark", note, "", "", dict.fromkeys(plan.dims)))
            continue
        means = {dim: official_means(name, _at(records, dim)) for dim in plan.dims}
        for key in ("Mean(Task)", "Mean(TaskType)"):
            if all(means[dim].get(key) is not None for dim in plan.dims):
                scores = {dim: 100 * (means[dim][key] or 0) for dim in plan.dims}
                rows.append(Row("benchmark", name, "", key, scores))
    return rows


def _task_row(
    dims: Sequence[int], name: str, group: Sequence[PlannedTask], records: Records
) -> Row:
    """A task, or an aggregate of a group of tasks by mteb's own rule (CQADupstackRetrieval)."""
    first = group[0]
    scores: dict[int, float | None] = dict.fromkeys(dims)
    seconds = None
    if all(task.name in records for task in group):
        seconds = sum(records[task.name]["seconds"] for task in group)
        for dim, results in ((dim, _at(records, dim)) for dim in dims):
            if name in results:
                scores[dim] = 100 * results[name]["main_score"]
            else:
                scores[dim] = 100 * official_score(name, results)
    published = published_scores(replace(first, name=name))
    return Row("task", name, first.type, first.main_score, scores, seconds, published)


def _at(records: Records, dim: int) -> Records:
    return {name: record["dims"][str(dim)] for name, record in records.items()}


def _means(
    types: Mapping[str, str], columns: Mapping[Column, Mapping[str, float]]
) -> dict[str, dict[Column, float]]:
    """Means over the tasks of each type, over all tasks, and over the types' means, by their names.

    Args:
        types: task -> type; every column has a score for each of these tasks.
        columns: column -> task -> score.
    """
    if not types:
        return {}
    groups: dict[str, list[str]] = {}
    for name in sorted(types, key=lambda name: types[name]):
        groups.setdefault(types[name], []).append(name)
    means = {
        f"mean of {len(names)} {kind}": {
            column: sum(scores[name] for name in names) / len(names)
            for column, scores in columns.items()
        }
        for kind, names in (groups | {"tasks": list(types)}).items()
    }
    by_type = list(means.values())[:-1]
    over_types = {column: sum(one[column] for one in by_type) / len(groups) for column in columns}
    return means | {f"mean of {len(groups)} types": over_types}


def markdown(plan: Plan, rows: Sequence[Row], failures: Mapping[str, "Failure"]) -> str:
    """The report: what was evaluated and how, the scores, and what failed and why."""
    head = ["task", "type", "score", *map(str, plan.dims), "time"]
    lines: list[list[str]] = []
    for row in rows:
        seconds = "" if row.seconds is None else format_duration(row.seconds)
        scores = [_number(row.scores[dim]) for dim in plan.dims]
        lines.append([row.name, row.type, row.metric, *scores, seconds])
    parts = [
        f"# {plan.model}",
        f"{describe(plan)} Scores are mteb's, times 100.",
        table(head, lines, right=range(3, len(head))),
    ]
    ours = f"ours ({plan.dims[0]})"
    known = [row for row in rows if row.published and row.scores[plan.dims[0]] is not None]
    columns = {one: {row.name: row.published[one] for row in known} for one in RELEASES}
    columns[ours] = {row.name: row.scores[plan.dims[0]] or 0 for row in known}
    if known:
        parts += ["## Beside KaLM's releases", f"Source: {PUBLISHED['source']}."]
        types = {row.name: row.type for row in known}
        parts.append(side_by_side(columns, types, [(ours, release) for release in RELEASES]))
    for name, failure in failures.items():
        log = f"\n\n```\n{failure.log}\n```" if failure.log else ""
        parts.append(f"**{name} failed**: {failure.reason}{log}")
    return "\n\n".join(parts) + "\n"


def describe(plan: Plan) -> str:
    """The checkpoint, its settings, and what the workers made of settings that were left open.

    More than one answer within a plan is a reason to look twice.
    """
    settings = [f"{key} {value}" for key, value in plan.settings.items() if value is not None]
    results = [result for task in plan.tasks if (result := plan.result(task))]
    answers = {
        f"{used['dtype']}, {'causal' if used['causal'] else 'bidirectional'}, "
        f"{used['pooling']} pooling, at most {used['max_length']} tokens"
        for used in (result["kalm_min"]["used"] for result in results)
    }
    computed = f" Computed in {' and in '.join(sorted(answers))}." if answers else ""
    return f"Checkpoint {plan.checkpoint[:12]}; {', '.join(settings)}.{computed}"


def side_by_side(
    columns: Mapping[str, Mapping[str, float]],
    types: Mapping[str, str],
    differences: Sequence[tuple[str, str]],
) -> str:
    """Scores of several runs as a table, with differences; means over the tasks of all columns only.

    Args:
        columns: name -> task -> score.
        types: task -> type.
        differences: (a, b) is a column "a - b".
    """
    names = sorted({n for scores in columns.values() for n in scores}, key=lambda n: (types[n], n))
    common = {n: types[n] for n in names if all(n in scores for scores in columns.values())}
    scored = [(n, types[n], {c: scores.get(n) for c, scores in columns.items()}) for n in names]
    lines: list[list[str]] = []
    for name, kind, scores in [*scored, *((n, "", m) for n, m in _means(common, columns).items())]:
        cells = [_number(scores[column]) for column in columns]
        for a, b in ((scores[a], scores[b]) for a, b in differences):
            cells.append(_MISSING if a is None or b is None else f"{a - b:+.2f}")
        lines.append([name, kind, *cells])
    head = ["task", "type", *columns, *(f"{a} - {b}" for a, b in differences)]
    return table(head, lines, right=range(2, len(head)))


def comma_separated(plan: Plan, rows: Sequence[Row]) -> str:
    """The same rows for programs: kind, name, type, score, one column per dimension, seconds.

    Where a task was published, also each release's score and our largest dimension's minus it.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    releases = RELEASES if any(row.published for row in rows) else ()
    more = [name for release in releases for name in (release, f"ours - {release}")]
    writer.writerow(["kind", "name", "type", "score", *plan.dims, "seconds", *more])
    for row in rows:
        scores = [_number(row.scores[dim], "") for dim in plan.dims]
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        beside: list[str] = []
        for known in map(row.published.get, releases):
            ours = row.scores[plan.dims[0]]
            beside.append(_number(known, ""))
            beside.append("" if known is None or ours is None else f"{ours - known:.2f}")
        writer.writerow([row.kind, row.name, row.type, row.metric, *scores, seconds, *beside])
    return stream.getvalue()


def _number(score: float | None, missing: str = _MISSING) -> str:
    return missing if score is None else f"{score:.2f}"


# ---- folders of results --------------------------------------------------------------------------


def read_plans(
    folder: Path, dims: Sequence[int] = (), selection: Selection | None = None
) -> list[Plan]:
    """One plan per checkpoint and settings in an output folder, or that of one folder of result files.

    Args:
        folder: where to look.
        dims: of the plans; if none is given, those that all tasks have.
        selection: requested tasks, which join each plan where it has no result of their name.

    Raises ValueError if there is no result.
    """
    plans: list[Plan] = []
    for results in (folder, *sorted(folder.glob("results/*/*/"))):
        tasks: dict[str, PlannedTask] = {}
        common: set[int] = set()
        key: dict[str, Any] = {}
        checkpoint = ""
        for path in sorted(results.glob("*.json")):
            try:
                record = read_json(path)["kalm_min"]
                settings, found = record["key"], set(map(int, record["dims"]))
                queries, documents = (settings[f"{x}_instruction"] for x in ("query", "document"))
                task = PlannedTask(
                    name=path.stem,
                    type=record["type"],
                    main_score=settings["main_score"],
                    revision=settings["revision"],
                    characters=0,
                    instruction=Instruction(queries, documents),
                    splits=tuple(settings["splits"]),
                    subsets=tuple(settings["subsets"]),
                )
                tasks[task.name], checkpoint, key = task, settings["checkpoint"], settings
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue  # torn, or another program's
            common = common & found if len(tasks) > 1 else found
        if not tasks:
            continue
        if not (dims or common):
            raise ValueError(
                f"{results}: its tasks have no dimension in common, choose with --dims"
            )
        plan = Plan(
            model=results.absolute().parent.name.replace("__", "/"),
            checkpoint=checkpoint,
            dims=tuple(sorted(dims or common, reverse=True)),
            settings={name: value for name, value in key.items() if name not in _TASK_KEYS},
            tasks=tuple(tasks.values()),
            results=results,
        )
        if selection:
            more = {task.name: task for task in selection.tasks} | tasks
            plan = replace(plan, **selection._asdict() | {"tasks": tuple(more.values())})
        plans.append(plan)
    if not plans:
        raise ValueError(
            f"{folder}: expected a folder that evaluate.py wrote, found no result in it"
        )
    return plans


def comparison(folders: Sequence[Path], dims: Sequence[int] = ()) -> str:
    """Results folders side by side as Markdown; differences are to the first folder.

    Args:
        folders: output folders with one checkpoint and settings each, or folders of result files.
        dims: one dimension to compare at; each folder's largest if none.

    Raises ValueError for a folder without results, or with those of several checkpoints or settings.
    """
    if len(dims) > 1:
        raise ValueError(f"--compare: expected one of --dims, found {len(dims)}")
    names = [folder.absolute().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    plans: dict[str, Plan] = {}
    for name, folder in zip(names, folders, strict=True):
        plan, *others = read_plans(folder, dims)
        if others:
            found = ", ".join(str(one.results) for one in (plan, *others))
            raise ValueError(
                f"{folder}: expected one checkpoint with one set of settings, found {found}"
            )
        plans[f"{name} ({plan.dims[0]})"] = plan
    columns: dict[str, dict[str, float]] = {name: {} for name in plans}
    data: dict[str, tuple[object, ...]] = {}
    types: dict[str, str] = {}
    other: set[str] = set()
    for name, plan in plans.items():
        for task in plan.tasks:
            types.setdefault(task.name, task.type)
            identity = (task.type, task.main_score, task.revision, task.splits, task.subsets)
            if data.setdefault(task.name, identity) != identity:
                other.add(task.name)
            if result := plan.result(task):
                score = result["kalm_min"]["dims"][str(plan.dims[0])]["main_score"]
                columns[name][task.name] = 100 * score
    same = {
        name: {task: score for task, score in scores.items() if task not in other}
        for name, scores in columns.items()
    }
    first, *rest = plans
    parts = [
        "# Comparison",
        "\n".join(f"- {name}: {plan.model}. {describe(plan)}" for name, plan in plans.items()),
        f"Left out, not the same data or score: {', '.join(sorted(other))}." if other else "",
        side_by_side(same, types, [(name, first) for name in rest]),
        "Means are over the tasks that all folders have, not of a benchmark.",
    ]
    return "\n\n".join(filter(None, parts))


def draw(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Draw mean scores by type, and by dimension if there are several; nothing without matplotlib.

    Returns the names of the PNG files written into `folder`.
    """
    done = [row for row in rows if row.kind == "task" and None not in row.scores.values()]
    if find_spec("matplotlib") is None or not done:
        return []
    from matplotlib.figure import Figure

    dims = sorted(done[0].scores)
    columns = {dim: {row.name: row.scores[dim] or 0 for row in done} for dim in dims}
    means = _means({row.name: row.type for row in done}, columns)
    by_type = {name.removeprefix("mean of "): scores for name, scores in list(means.items())[:-2]}
    types = Figure(figsize=(9, 1.2 + 0.4 * len(by_type)), layout="constrained")
    axes = types.add_subplot()
    bars = axes.barh(list(by_type), [scores[dims[-1]] for scores in by_type.values()], alpha=0.6)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set(xlim=(None, 100), title=f"Mean score by type, {dims[-1]} dimensions")
    axes.invert_yaxis()
    figures = {"types.png": types}
    if len(dims) > 1:
        figures["dimensions.png"] = Figure(figsize=(9, 4.6), layout="constrained")
        axes = figures["dimensions.png"].add_subplot()
        for name, scores in by_type.items():
            axes.plot([str(dim) for dim in dims], [scores[dim] for dim in dims], "o-", label=name)
        axes.set(xlabel="dimensions kept", title="Mean score by dimension")
        axes.legend(frameon=False)
    for name, figure in figures.items():
        with atomic_write(folder / name) as file:
            figure.savefig(file, format="png", dpi=150)
    return list(figures)
