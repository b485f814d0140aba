"""Results as tables and plots: scores with means, beside KaLM's releases, and run against run.

Scores are mteb's, times 100. Every mean states what it was taken over; the mean of an official
benchmark is the one that mteb computes, and is missing while a task is missing. A result file
records everything it was made with, so a folder is tabulated and compared without the model, the
datasets or mteb. The plots need matplotlib (an extra).
"""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from math import isnan, nan
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from kalm_min.console import format_duration, table
from kalm_min.evaluation.plan import SETTINGS, Instruction, Plan, PlannedTask, official_means
from kalm_min.files import atomic_write, read_json

if TYPE_CHECKING:
    from kalm_min.evaluation.runner import Failure

Column = TypeVar("Column")

PUBLISHED = read_json(Path(__file__).with_name("published.json"))
RELEASES = tuple(PUBLISHED["models"])


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the score table."""

    kind: str  # task, type, mean or benchmark
    name: str
    type: str
    metric: str
    scores: Mapping[int, float]  # by dimension; nan if there is no result
    seconds: float = nan
    published: Mapping[str, float] = field(default_factory=dict)  # by release, for the same task


def published_scores(task: PlannedTask) -> dict[str, float]:
    """The scores of KaLM's releases; {} if they have none for exactly these splits and subsets."""
    entry = PUBLISHED["tasks"].get(task.name, {"splits": (), "subsets": ()})
    if (task.splits, task.subsets) != (tuple(entry["splits"]), tuple(entry["subsets"])):
        return {}
    return {release: entry[release] for release in RELEASES}


def plan_table(plan: Plan) -> str:
    """The tasks, largest first: size, state, instruction, and whether that is the type's."""
    rows: list[list[str]] = []
    for task in plan.tasks:
        state = "elsewhere" if task.name in plan.elsewhere else "to do"
        state = state if plan.result(task) is None else "done"
        text, document = task.instruction.query, task.instruction.document
        if document:
            same = text == document
            text += " (queries and documents)" if same else f" | documents: {document}"
        size = f"{task.characters / 1e6:.2f}" if task.characters else "?"
        origin = task.instruction.origin if text else ""
        rows.append([task.name, task.type, size, state, origin, text or "none"])
    done = sum(row[3] == "done" for row in rows)
    total = sum(task.characters for task in plan.tasks) / 1e6
    head = ["task", "type", "Mchar", "state", "from", "instruction"]
    summary = f"{len(rows)} tasks ({done} done), {total:.2f} Mchar; results in {plan.results}"
    return f"{table(head, rows, right={2})}\n\n{summary}"


def score_rows(plan: Plan) -> list[Row]:
    """Every task (nan without a result), then means, then official benchmarks.

    An aggregate (CQADupstackRetrieval) is one task; as in mteb, its score is the mean of its parts.
    """
    found = {task.name: result["kalm_min"] for task in plan.tasks if (result := plan.result(task))}
    by_dim = {dim: {n: one["dims"][str(dim)] for n, one in found.items()} for dim in plan.dims}
    groups: dict[tuple[str, str], list[PlannedTask]] = {}
    for task in plan.tasks:
        groups.setdefault((task.type, task.aggregate or task.name), []).append(task)
    rows: list[Row] = []
    for (kind, name), parts in sorted(groups.items()):
        names = [task.name for task in parts]
        scores, seconds = dict.fromkeys(plan.dims, nan), nan
        if found.keys() >= set(names):
            seconds = sum(found[name]["seconds"] for name in names)
            for dim, one in by_dim.items():
                scores[dim] = 100 * fmean(one[name]["main_score"] for name in names)
        published = published_scores(replace(parts[0], name=name))
        rows.append(Row("task", name, kind, parts[0].main_score, scores, seconds, published))
    missing = Counter(row.type for row in rows if isnan(row.seconds))
    for name, scores in _row_means(rows, plan.dims).items():
        unit = name.split()[-1]
        is_overall = unit in {"tasks", "types"}
        count = missing.total() if is_overall else missing[unit]
        note = f" ({count} task{'s' * (count > 1)} missing)" if count else ""
        rows.append(Row("mean" if is_overall else "type", name + note, "", "", scores))
    for name in plan.benchmarks:
        try:
            means = {dim: official_means(name, one) for dim, one in by_dim.items()}
        except ValueError as error:
            rows.append(Row("benchmark", f"{name}: {error}", "", "", dict.fromkeys(plan.dims, nan)))
            continue
        for metric in ("Mean(Task)", "Mean(TaskType)"):
            if means[plan.dims[0]].get(metric) is not None:
                scores = {dim: 100 * (means[dim][metric] or 0) for dim in plan.dims}
                rows.append(Row("benchmark", name, "", metric, scores))
    return rows


def _means(
    types: Mapping[str, str], columns: Mapping[Column, Mapping[str, float]]
) -> dict[str, dict[Column, float]]:
    """Means over the tasks of each type, over all tasks, and over the types' means, by their names.

    `types` is task -> type, `columns` column -> task -> score, with a score for each of these tasks.
    """
    groups = {kind: [n for n in types if types[n] == kind] for kind in sorted({*types.values()})}
    if not groups:
        return {}
    means = {
        f"mean of {len(names)} {kind}": {
            column: fmean(scores[name] for name in names) for column, scores in columns.items()
        }
        for kind, names in (groups | {"tasks": list(types)}).items()
    }
    by_type = list(means.values())[:-1]
    over_types = {column: fmean(one[column] for one in by_type) for column in columns}
    return means | {f"mean of {len(groups)} types": over_types}


def _row_means(rows: Sequence[Row], dims: Sequence[int]) -> dict[str, dict[int, float]]:
    """`_means` of the tasks that have scores, by dimension."""
    done = [row for row in rows if row.kind == "task" and not isnan(row.scores[dims[0]])]
    columns = {dim: {row.name: row.scores[dim] for row in done} for dim in dims}
    return _means({row.name: row.type for row in done}, columns)


def markdown(plan: Plan, rows: Sequence[Row], failures: Mapping[str, "Failure"]) -> str:
    """The report: what was evaluated and how, the scores, and what failed and why."""
    head = ["task", "type", "score", *map(str, plan.dims), "time"]
    lines: list[list[str]] = []
    for row in rows:
        seconds = "" if isnan(row.seconds) else format_duration(row.seconds)
        scores = [_number(row.scores[dim]) for dim in plan.dims]
        lines.append([row.name, row.type, row.metric, *scores, seconds])
    parts = [f"# {plan.model}", f"{describe(plan)} Scores are mteb's, times 100."]
    parts.append(table(head, lines, right=range(3, len(head))))
    ours = f"ours ({plan.dims[0]})"
    known = [row for row in rows if row.published and not isnan(row.seconds)]
    if known:
        columns = {one: {row.name: row.published[one] for row in known} for one in RELEASES}
        columns[ours] = {row.name: row.scores[plan.dims[0]] for row in known}
        parts += ["## Beside KaLM's releases", f"Source: {PUBLISHED['source']}."]
        types = {row.name: row.type for row in known}
        parts.append(side_by_side(columns, types, [(ours, release) for release in RELEASES]))
    for name, failure in failures.items():
        log = f"\n\n```\n{failure.log}\n```" if failure.log else ""
        parts.append(f"**{name} failed**: {failure.reason}{log}")
    return "\n\n".join(parts) + "\n"


def describe(plan: Plan) -> str:
    """The checkpoint, its settings, and the values that workers chose for open settings.

    Several values within a plan deserve attention.
    """
    settings = [f"{key} {value}" for key, value in plan.settings.items() if value is not None]
    answers: set[str] = set()
    for result in filter(None, map(plan.result, plan.tasks)):
        used = result["kalm_min"]["used"]
        mode = "causal" if used["causal"] else "bidirectional"
        limit = f"at most {used['max_length']} tokens"
        answers.add(f"{used['dtype']}, {mode}, {used['pooling']} pooling, {limit}")
    computed = f" Computed in {' and in '.join(sorted(answers))}." if answers else ""
    return f"Checkpoint {plan.checkpoint[:12]}; {', '.join(settings)}.{computed}"


def side_by_side(
    columns: Mapping[str, Mapping[str, float]],
    types: Mapping[str, str],
    differences: Sequence[tuple[str, str]],
) -> str:
    """Scores of several runs as a table, with differences; means over tasks that all columns have.

    `columns` is name -> task -> score, `types` task -> type; (a, b) of `differences` adds "a - b".
    """
    names = sorted({n for scores in columns.values() for n in scores}, key=lambda n: (types[n], n))
    common = {n: types[n] for n in names if all(n in scores for scores in columns.values())}
    scored = [
        (n, types[n], {c: scores.get(n, nan) for c, scores in columns.items()}) for n in names
    ]
    lines: list[list[str]] = []
    for name, kind, scores in [*scored, *((n, "", m) for n, m in _means(common, columns).items())]:
        cells = [_number(scores[column]) for column in columns]
        cells += [_number(scores[a] - scores[b], "+.2f") for a, b in differences]
        lines.append([name, kind, *cells])
    head = ["task", "type", *columns, *(f"{a} - {b}" for a, b in differences)]
    return table(head, lines, right=range(2, len(head)))


def _number(score: float, form: str = ".2f", missing: str = "—") -> str:
    return missing if isnan(score) else f"{score:{form}}"


def comma_separated(plan: Plan, rows: Sequence[Row]) -> str:
    """The rows as CSV: kind, name, type, score, one column per dimension, seconds.

    Published tasks also have each release's score and its difference to the largest dimension's.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    releases = RELEASES if any(row.published for row in rows) else ()
    more = [name for release in releases for name in (release, f"ours - {release}")]
    writer.writerow(["kind", "name", "type", "score", *plan.dims, "seconds", *more])
    for row in rows:
        scores = [row.scores[dim] for dim in plan.dims]
        known = [row.published.get(release, nan) for release in releases]
        beside = [one for score in known for one in (score, scores[0] - score)]
        cells = [_number(one, missing="") for one in (*scores, *beside)]
        cells.insert(len(scores), _number(row.seconds, ".1f", ""))
        writer.writerow([row.kind, row.name, row.type, row.metric, *cells])
    return stream.getvalue()


def read_plans(
    folder: Path,
    dims: Sequence[int] = (),
    requested: Sequence[PlannedTask] = (),
    benchmarks: tuple[str, ...] = (),
) -> list[Plan]:
    """One plan per checkpoint and settings in an output folder, or the plan of one results folder.

    The default `dims` are those that all tasks have. Each plan also gets those `requested` tasks of
    which it has no result. Raises ValueError if there is no result.
    """
    plans: list[Plan] = []
    for results in (folder, *sorted(folder.glob("results/*/*/"))):
        tasks = {task.name: task for task in requested}
        found: list[set[int]] = []
        checkpoint, settings = "", {}
        for path in sorted(results.glob("*.json")):
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                record = read_json(path)["kalm_min"]  # unless torn, or another program's
                key = record["key"]
                instruction = Instruction(key["query_instruction"], key["document_instruction"])
                splits, subsets = tuple(key["splits"]), tuple(key["subsets"])
                basics = (path.stem, record["type"], key["main_score"], key["revision"], 0)
                task = PlannedTask(*basics, instruction, splits=splits, subsets=subsets)
                task = replace(task, aggregate=tasks.get(task.name, task).aggregate)
                checkpoint, settings = key["checkpoint"], {n: key[n] for n in key if n in SETTINGS}
                found.append(set(map(int, record["dims"])))
                tasks[task.name] = task
        if not found:
            continue
        common = tuple(sorted(dims or set.intersection(*found), reverse=True))
        if not common:
            raise ValueError(f"{results}: no dimension in common, choose with --dims")
        model = results.absolute().parent.name.replace("__", "/")
        parts = tuple(tasks.values())
        plans.append(Plan(model, checkpoint, common, settings, parts, results, benchmarks))
    if not plans:
        raise ValueError(f"{folder}: expected a folder that evaluate.py wrote, found no result")
    return plans


def comparison(folders: Sequence[Path], dims: Sequence[int] = ()) -> str:
    """Results folders side by side as Markdown; differences are to the first folder.

    Scores are at one dimension, or at each folder's largest. Raises ValueError for a folder without
    results, or with those of several checkpoints or settings.
    """
    if len(dims) > 1:
        raise ValueError(f"--compare: expected one of --dims, found {len(dims)}")
    names = [folder.absolute().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    plans: dict[str, Plan] = {}
    versions: dict[str, set[PlannedTask]] = {}
    for name, folder in zip(names, folders, strict=True):
        plan, *others = read_plans(folder, dims)
        if others:
            found = ", ".join(str(one.results) for one in (plan, *others))
            raise ValueError(
                f"{folder}: expected one checkpoint with one set of settings, found {found}"
            )
        plans[f"{name} ({plan.dims[0]})"] = plan
        for task in plan.tasks:  # they differ in data or score, unless only in instructions
            versions.setdefault(task.name, set()).add(replace(task, instruction=Instruction()))
    same = {name: one.pop().type for name, one in versions.items() if len(one) == 1}
    left_out = ", ".join(sorted(versions.keys() - same))
    columns = {
        name: {
            row.name: row.scores[plan.dims[0]]
            for row in score_rows(plan)
            if row.name in same and not isnan(row.scores[plan.dims[0]])
        }
        for name, plan in plans.items()
    }
    first, *rest = plans
    parts = [
        "# Comparison",
        "\n".join(f"- {name}: {plan.model}. {describe(plan)}" for name, plan in plans.items()),
        f"Left out, not the same data or score: {left_out}." if left_out else "",
        side_by_side(columns, same, [(name, first) for name in rest]),
        "Means are over the tasks that all folders have, not of a benchmark.",
    ]
    return "\n\n".join(filter(None, parts))


def draw(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Plot mean scores by type, and by dimension if there are several, if matplotlib is installed.

    Returns the names of the PNG files written into `folder`.
    """
    dims = sorted(rows[0].scores)
    means = list(_row_means(rows, dims).items())[:-2]
    by_type = {name.removeprefix("mean of "): scores for name, scores in means}
    if find_spec("matplotlib") is None or not by_type:
        return []
    from matplotlib.figure import Figure

    figures = {"types.png": Figure((9, 1.2 + 0.4 * len(by_type)), layout="constrained")}
    axes = figures["types.png"].add_subplot()
    bars = axes.barh(list(by_type), [scores[dims[-1]] for scores in by_type.values()], alpha=0.6)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set(xlim=(None, 100), title=f"Mean score by type, {dims[-1]} dimensions")
    axes.invert_yaxis()
    if len(dims) > 1:
        figures["dimensions.png"] = Figure((9, 4.6), layout="constrained")
        axes = figures["dimensions.png"].add_subplot()
        for name, scores in by_type.items():
            axes.plot([str(dim) for dim in dims], [scores[dim] for dim in dims], "o-", label=name)
        axes.set(xlabel="dimensions kept", title="Mean score by dimension")
        axes.legend(frameon=False)
    for name, figure in figures.items():
        with atomic_write(folder / name) as file:
            figure.savefig(file, format="png", dpi=150)
    return list(figures)
