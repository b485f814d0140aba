"""Results of a plan as tables: the plan itself, scores per task and dimension, means, failures.

Scores are mteb's, times 100. Means over what was asked for are named as just that; under the name
of an official benchmark stands only what mteb itself averages, and nothing while a task is missing.
Beside a task that was published for KaLM stand those scores, if it is the same task in all its parts.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from kalm_min.console import format_duration
from kalm_min.evaluation.plan import Plan, PlannedTask, official_means, official_results
from kalm_min.files import read_json

_MISSING = "—"
_PUBLISHED = Path(__file__).with_name("published.json")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the score table; `scores` by dimension, None where there is none."""

    kind: str
    """task, type, mean or benchmark."""
    name: str
    type: str
    metric: str
    scores: Mapping[int, float | None]
    seconds: float | None = None
    published: Mapping[str, float] = field(default_factory=dict)
    """Scores of KaLM's releases in the same task."""


@cache
def _published() -> dict[str, Any]:
    return read_json(_PUBLISHED)


def published_scores(task: PlannedTask) -> dict[str, float]:
    """The scores of KaLM's releases by version; {} if the task, or these parts of it, has none."""
    entry = _published()["tasks"].get(task.name, {"splits": (), "subsets": ()})
    if (task.splits, task.subsets) != (tuple(entry["splits"]), tuple(entry["subsets"])):
        return {}
    return {version: entry[version] for version in _published()["models"]}


def plan_table(plan: Plan) -> str:
    """The tasks, longest first: size, whether they are done, and what is said before their texts.

    The instruction is the task's own, or the default of its type.
    """
    done = [plan.result(task) is not None for task in plan.tasks]
    rows = [
        [
            task.name,
            task.type,
            f"{task.characters / 1e6:.2f}" if task.characters else "?",
            "done" if is_done else "elsewhere" if task.name in plan.elsewhere else "to do",
            task.instruction.origin if _said(task) else "",
            _said(task) or "none",
        ]
        for task, is_done in zip(plan.tasks, done, strict=True)
    ]
    total = sum(task.characters for task in plan.tasks) / 1e6
    head = ["task", "type", "Mchar", "state", "of the", "instruction"]
    return (
        f"{table(head, rows, right={2})}\n\n"
        f"{len(rows)} tasks ({sum(done)} done), {total:.2f} Mchar; results in {plan.results}"
    )


def _said(task: PlannedTask) -> str:
    """The resolved instruction of a task, on both sides."""
    query, document = task.instruction.query, task.instruction.document
    if query == document:
        return f"{query} (both sides)" if query else ""
    return f"{query} | documents: {document}" if document else query


def score_rows(plan: Plan) -> list[Row]:
    """Every task (scores None where it has no result), then means, then official benchmarks."""
    records: dict[str, Any] = {}
    for task in plan.tasks:
        result = plan.result(task)
        if result is not None:
            records[task.name] = result["kalm_min"]
    inside = {leaf for leaves in plan.aggregates.values() for leaf in leaves}
    rows = [_task_row(plan, task, records) for task in plan.tasks if task.name not in inside]
    rows += [_aggregate_row(plan, name, records) for name in plan.aggregates]
    rows.sort(key=lambda row: (row.type, row.name))
    official = [row for name in plan.benchmarks for row in _benchmark_rows(plan, name, records)]
    return rows + _mean_rows(rows, plan.dims) + official


def _task_row(plan: Plan, task: PlannedTask, records: dict[str, Any]) -> Row:
    known = published_scores(task)
    if task.name not in records:
        empty = dict.fromkeys(plan.dims)
        return Row("task", task.name, task.type, task.main_score, empty, published=known)
    record = records[task.name]
    scores = {dim: 100 * record["dims"][str(dim)]["main_score"] for dim in plan.dims}
    return Row("task", task.name, task.type, task.main_score, scores, record["seconds"], known)


def _aggregate_row(plan: Plan, name: str, records: dict[str, Any]) -> Row:
    """A task that is the mean of others (CQADupstackRetrieval), by mteb's own rule."""
    leaves = [task for task in plan.tasks if task.name in plan.aggregates[name]]
    kind, metric = leaves[0].type, leaves[0].main_score
    known = published_scores(replace(leaves[0], name=name))
    if any(leaf.name not in records for leaf in leaves):
        return Row("task", name, kind, metric, dict.fromkeys(plan.dims), published=known)
    results = {dim: official_results(name, _at(records, dim)) for dim in plan.dims}
    scores = {dim: 100 * result.get_score() for dim, result in results.items()}
    seconds = sum(records[leaf.name]["seconds"] for leaf in leaves)
    return Row("task", name, kind, metric, scores, seconds, known)


def _at(records: dict[str, Any], dim: int) -> dict[str, Any]:
    return {name: record["dims"][str(dim)] for name, record in records.items()}


def _mean_rows(rows: Sequence[Row], dims: Sequence[int]) -> list[Row]:
    """Means of each type, over tasks and over types; their names say so when tasks are missing."""

    def mean(kind: str, name: str, group: Sequence[Row], missing: int) -> Row:
        scores = {dim: sum(row.scores[dim] or 0 for row in group) / len(group) for dim in dims}
        note = f" ({missing} task{'s' * (missing > 1)} missing)" if missing else ""
        return Row(kind, f"mean of {len(group)} {name}{note}", "", "", scores)

    done = [row for row in rows if row.scores[dims[0]] is not None]
    types = []
    for kind in sorted({row.type for row in done}):
        group = [row for row in done if row.type == kind]
        missing = sum(row.type == kind for row in rows) - len(group)
        types.append(mean("type", kind, group, missing))
    if not done:
        return []
    missing = len(rows) - len(done)
    return [*types, mean("mean", "tasks", done, missing), mean("mean", "types", types, missing)]


def _benchmark_rows(plan: Plan, name: str, records: dict[str, Any]) -> list[Row]:
    """mteb's own means of a benchmark; none of its numbers while a task is missing."""
    leaves = [leaf for task in plan.benchmarks[name] for leaf in plan.aggregates.get(task, (task,))]
    missing = sum(leaf not in records for leaf in leaves)
    if missing:
        note = f"{name}: {missing} of {len(leaves)} tasks missing"
        return [Row("benchmark", note, "", "", dict.fromkeys(plan.dims))]
    means = {dim: official_means(name, _at(records, dim)) for dim in plan.dims}
    return [
        Row("benchmark", name, "", key, {dim: 100 * (means[dim][key] or 0) for dim in plan.dims})
        for key in ("Mean(Task)", "Mean(TaskType)")
        if all(means[dim].get(key) is not None for dim in plan.dims)
    ]


def markdown(plan: Plan, rows: Sequence[Row], failures: Mapping[str, Any]) -> str:
    """The report: what was evaluated and how, the scores, and what failed and why."""
    head = ["task", "type", "score", *(str(dim) for dim in plan.dims), "time"]
    lines = [
        [
            row.name,
            row.type if row.kind == "task" else "",
            row.metric if row.kind in {"task", "benchmark"} else "",
            *(_number(row.scores[dim]) for dim in plan.dims),
            "" if row.seconds is None else format_duration(row.seconds),
        ]
        for row in rows
    ]
    parts = [
        f"# {plan.model}",
        f"{described(plan)} Scores are mteb's, times 100.",
        table(head, lines, right=set(range(3, len(head)))),
        *_beside_published(plan, rows),
    ]
    for name, failure in failures.items():
        log = f"\n\n```\n{failure.log}\n```" if failure.log else ""
        parts.append(f"**{name} failed**: {failure.reason}{log}")
    return "\n\n".join(parts) + "\n"


def described(plan: Plan) -> str:
    """The checkpoint and its settings.

    Also what settings that were left open came to: more than one answer is a reason to look twice.
    """
    settings = ", ".join(
        f"{key} {value}" for key, value in plan.settings.items() if value is not None
    )
    results = [result for task in plan.tasks if (result := plan.result(task)) is not None]
    used = [result["kalm_min"]["used"] for result in results]
    answers = sorted(
        f"{one['dtype']}, {'causal' if one['causal'] else 'bidirectional'}, {one['pooling']} pooling, "
        f"{one['max_length']} tokens at most"
        for one in used
    )
    computed = f" Computed in {' and in '.join(dict.fromkeys(answers))}." if answers else ""
    return f"Checkpoint {plan.checkpoint[:12]}; {settings}.{computed}"


def _beside_published(plan: Plan, rows: Sequence[Row]) -> list[str]:
    """Our largest dimension beside KaLM's releases, if they have a task in common."""
    ours = f"ours ({plan.dims[0]})"
    columns: dict[str, dict[str, float]] = {version: {} for version in _published()["models"]}
    columns[ours] = {}
    for row in rows:
        if row.published and (score := row.scores[plan.dims[0]]) is not None:
            columns[ours][row.name] = score
            for version, known in row.published.items():
                columns[version][row.name] = known
    if not columns[ours]:
        return []
    types = {row.name: row.type for row in rows}
    pairs = [(ours, version) for version in _published()["models"]]
    return [
        "## Beside KaLM's releases",
        f"Source: {_published()['source']}.",
        side_by_side(columns, types, pairs),
    ]


def side_by_side(
    columns: Mapping[str, Mapping[str, float]],
    types: Mapping[str, str],
    differences: Sequence[tuple[str, str]],
) -> str:
    """Scores of several runs as a table, with differences; means over the tasks of all columns only.

    Args:
        columns: name -> task -> score.
        types: of the tasks.
        differences: (a, b) is a column "a - b".
    """
    names = {name for scores in columns.values() for name in scores}
    order = sorted(names, key=lambda name: (types[name], name))
    common = [name for name in order if all(name in scores for scores in columns.values())]
    groups = {
        kind: [name for name in common if types[name] == kind]
        for kind in dict.fromkeys(types[name] for name in common)
    }

    def line(name: str, kind: str, scores: Mapping[str, float | None]) -> list[str]:
        cells = [_number(scores[column]) for column in columns]
        for a, b in differences:
            x, y = scores[a], scores[b]
            cells.append(_MISSING if x is None or y is None else f"{x - y:+.2f}")
        return [name, kind, *cells]

    def mean(names: Sequence[str]) -> dict[str, float]:
        return {c: sum(scores[n] for n in names) / len(names) for c, scores in columns.items()}

    means = {kind: mean(group) for kind, group in groups.items()}
    lines = [
        line(name, types[name], {c: scores.get(name) for c, scores in columns.items()})
        for name in order
    ]
    lines += [line(f"mean of {len(groups[kind])} {kind}", "", means[kind]) for kind in groups]
    if common:
        over_types = {c: sum(one[c] for one in means.values()) / len(means) for c in columns}
        lines.append(line(f"mean of {len(common)} tasks", "", mean(common)))
        lines.append(line(f"mean of {len(means)} types", "", over_types))
    head = ["task", "type", *columns, *(f"{a} - {b}" for a, b in differences)]
    return table(head, lines, right=set(range(2, len(head))))


def comma_separated(plan: Plan, rows: Sequence[Row]) -> str:
    """The same rows for programs: kind, name, type, score, a column per dimension, seconds.

    Where a task was published, also each release's score and ours at the largest dimension less it.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    versions = list(_published()["models"]) if any(row.published for row in rows) else []
    more = [name for version in versions for name in (version, f"ours - {version}")]
    writer.writerow(["kind", "name", "type", "score", *plan.dims, "seconds", *more])
    for row in rows:
        cells = [row.scores[dim] for dim in plan.dims]
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        beside: list[float | None] = []
        for version in versions:
            known = row.published.get(version)
            beside += [known, None if known is None or cells[0] is None else cells[0] - known]
        shown = [[_number(cell).replace(_MISSING, "") for cell in part] for part in (cells, beside)]
        writer.writerow([row.kind, row.name, row.type, row.metric, *shown[0], seconds, *shown[1]])
    return stream.getvalue()


def _number(score: float | None) -> str:
    return _MISSING if score is None else f"{score:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: set[int]) -> str:
    """A Markdown table whose columns line up when printed; `right` are the numbers' columns."""
    table = [
        [cell.replace("|", "\\|").replace("\n", "\\n") for cell in row] for row in [head, *rows]
    ]
    widths = [max(3, *(len(row[i]) for row in table)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = [
        "-" * (width - 1) + ":" if i in right else "-" * width for i, width in enumerate(widths)
    ]
    return "\n".join([line(table[0]), line(rule), *map(line, table[1:])])
