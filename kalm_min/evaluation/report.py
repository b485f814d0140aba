"""Results as tables and plots: scores with means, beside KaLM's releases, and model against model.

Scores are mteb's, times 100. Every mean states what it was taken over; that of an official benchmark
is mteb's, and is missing while a task is missing. A result file records everything it was made with,
so a folder is tabulated without the model, the datasets or mteb. What is foreign in it reaches
neither HTML nor a formula of a spreadsheet.
"""

import csv
import io
import json
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from math import isnan, nan
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from kalm_min.console import count, format_duration, printable, table
from kalm_min.evaluation.plan import (
    SETTINGS,
    Instruction,
    Plan,
    PlannedTask,
    official_means,
    ordered,
    read_result,
)
from kalm_min.files import Object, atomic_write, escape_name, read_json

if TYPE_CHECKING:
    from kalm_min.evaluation.runner import Failure

PUBLISHED = read_json(Path(__file__).with_name("published.json"))
RELEASES = tuple(PUBLISHED["models"])
Scores = Mapping[str, Mapping[str, float]]
"""Column -> task -> score; a column is a dimension, a model or a release."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the score table."""

    kind: str  # task, type, mean or benchmark
    name: str
    type: str
    metric: str
    scores: Mapping[str, float]  # by dimension; nan if there is no result
    seconds: float = nan
    published: Mapping[str, float] = field(default_factory=dict)  # by release, for the same task


def published_scores(task: PlannedTask) -> dict[str, float]:
    """The scores of KaLM's releases; {} if they have none for exactly these splits and subsets."""
    entry = PUBLISHED["tasks"].get(task.name, {"splits": (), "subsets": ()})
    if (task.splits, task.subsets) != (tuple(entry["splits"]), tuple(entry["subsets"])):
        return {}
    return {release: entry[release] for release in RELEASES}


def plan_table(plan: Plan, speed: float = nan) -> str:
    """The tasks, largest first, in 80 columns; then their instructions, and where these are from.

    `speed` is that of encoding, in characters per second of all devices together.
    """
    rows = [("task", "type", "Mchar", "state")]
    groups: dict[str, list[str]] = {}
    left = 0
    for task in plan.tasks:
        state = "elsewhere" if task.name in plan.elsewhere else "to do"
        state = state if plan.missing(task) else "done"
        if state == "to do":
            left += task.characters
            state = state if isnan(speed) else f"~{format_duration(task.characters / speed)}"
        size = f"{task.characters / 1e6:.2f}" if task.characters else "?"
        rows.append((task.name, task.type, size, state))
        one, style = task.instruction, plan.settings["instructions"]
        text, more = (json.dumps(x, ensure_ascii=False) for x in (one.query, one.document))
        text = text if one.query else "none"
        if one.document:
            text += f", documents {'too' if one.query == one.document else more}"
        origins = [style, one.origin] if one.origin != "task.toml" else [one.origin]
        origins = ", ".join(dict.fromkeys(str(x) for x in origins if x))
        groups.setdefault(f"{text} ({origins})", []).append(task.name)
    wide, narrow = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"{a:{wide}}  {b:{narrow}}  {c:>7}  {d:>9}" for a, b, c, d in rows]
    lines += ["", "Instructions, and where they are from:"]
    for text, names in groups.items():
        sentence = f"- {text}: {', '.join(names)}"
        lines += textwrap.wrap(sentence, 80, subsequent_indent="  ", break_on_hyphens=False)
    done = sum(row[3] == "done" for row in rows)
    total = sum(task.characters for task in plan.tasks) / 1e6
    summary = f"{count(len(plan.tasks), 'task')} ({done} done), {total:.2f} Mchar"
    if not isnan(speed):
        summary += f"; {format_duration(left / speed)} of encoding at {speed:,.0f} characters/s,"
        summary += "\nas just measured, and the time of scoring"
    return printable("\n".join([*lines, "", summary, f"results in {plan.results}"]))


def score_rows(plan: Plan) -> list[Row]:
    """Every task (nan without a result), then means, then official benchmarks.

    An aggregate (CQADupstackRetrieval) is one task; as in mteb, its score is the mean of its parts.
    """
    found = {task.name: result["kalm_min"] for task in plan.tasks if (result := plan.result(task))}
    by_dim = {dim: {n: one["dims"][dim] for n, one in found.items()} for dim in plan.dims}
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
    for kind, name, scores in _means(*_done(rows)):
        absent = missing[kind] if kind else missing.total()
        note = f" ({count(absent, 'task')} missing)" if absent else ""
        rows.append(Row("type" if kind else "mean", name + note, "", "", scores))
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


def _done(rows: Sequence[Row]) -> tuple[dict[str, str], Scores]:
    """The type of each task that has scores, and the scores by dimension."""
    done = [row for row in rows if row.kind == "task" and not any(map(isnan, row.scores.values()))]
    columns = {dim: {row.name: row.scores[dim] for row in done} for dim in rows[0].scores}
    return {row.name: row.type for row in done}, columns


def _type_means(types: Mapping[str, str], columns: Scores) -> dict[str, dict[str, float]]:
    """Type -> column -> mean over the tasks of the type that all columns have."""
    groups: dict[str, list[str]] = {}
    for name, kind in types.items():
        if all(name in scores for scores in columns.values()):
            groups.setdefault(kind, []).append(name)
    return {
        kind: {column: fmean(map(one.__getitem__, groups[kind])) for column, one in columns.items()}
        for kind in sorted(groups)
    }


def _means(types: Mapping[str, str], columns: Scores) -> list[tuple[str, str, dict[str, float]]]:
    """(type, name, column -> mean) of each type, all tasks ("") and all types (""), if not of one.

    `types` is task -> type; the means are over the tasks that all columns have.
    """
    common = {n: types[n] for n in types if all(n in one for one in columns.values())}
    by_type, counts = _type_means(common, columns), Counter(common.values())
    rows = [(k, f"mean of {counts[k]} {k}", by_type[k]) for k in by_type if counts[k] > 1]
    rows = rows if len(by_type) > 1 else []
    if len(common) > 1:
        every = _type_means(dict.fromkeys(common, ""), columns)
        rows.append(("", f"mean of {len(common)} tasks", every[""]))
    if 1 < len(by_type) < len(common):
        over_types = {column: fmean(one[column] for one in by_type.values()) for column in columns}
        rows.append(("", f"mean of {len(by_type)} types", over_types))
    return rows


def markdown(plan: Plan, rows: Sequence[Row], failures: Mapping[str, "Failure"]) -> str:
    """The report: what was evaluated and how, the scores, and what failed and why."""
    dims = [dim for dim in plan.dims if " " not in dim]
    head = ["task", "type", "score", *dims, "time"]
    lines = [
        [
            *map(_text, (row.name, row.type, row.metric)),
            *(_number(row.scores[dim]) for dim in dims),
            "" if isnan(row.seconds) else format_duration(row.seconds),
        ]
        for row in rows
    ]
    parts = [f"# {_text(plan.name)}", f"{_text(describe(plan))} Scores are mteb's, times 100."]
    parts.append(table(head, lines, right=range(3, len(head))))
    types, columns = _done(rows)
    if len(dims) < len(plan.dims) and types:
        parts += ["## What a smaller vector costs", _costs(columns)]
    ours = f"ours ({plan.dims[0]})"
    if known := [row for row in rows if row.published and not isnan(row.seconds)]:
        beside = {one: {row.name: row.published[one] for row in known} for one in RELEASES}
        beside[ours] = {row.name: row.scores[plan.dims[0]] for row in known}
        parts += ["## Beside KaLM's releases", f"Source: {PUBLISHED['source']}."]
        kinds = {row.name: row.type for row in known}
        parts.append(side_by_side(beside, kinds, [(ours, release) for release in RELEASES]))
    for name, failure in failures.items():
        log = f"\n\n{textwrap.indent(failure.log, '    ')}" if failure.log else ""
        parts.append(f"**{_text(name)} failed**: {_text(failure.reason)}{log}")
    return printable("\n\n".join(parts) + "\n")


def _costs(columns: Scores) -> str:
    """Mean scores by dimension and precision, and the bytes of a vector."""
    dims = [dim for dim in columns if " " not in dim]
    names = dict.fromkeys(dim.partition(" ")[2] or "float32" for dim in columns)

    def cell(dim: str, name: str) -> str:
        mean = fmean(columns[f"{dim} {name}".removesuffix(" float32")].values())
        bits = int(dim) * {"float32": 32, "int8": 8, "uint8": 8}.get(name, 1)
        return f"{mean:.2f} ({-(-bits // 8)} B)"

    rows = [[dim, *(cell(dim, name) for name in names)] for dim in dims]
    head = f"Mean score of {count(len(columns[dims[0]]), 'task')}, and the bytes of a vector."
    return f"{head}\n\n{table(['dimensions', *names], rows, right=range(len(names) + 1))}"


def _text(text: str) -> str:
    """Foreign text in Markdown: no HTML, no picture, no code."""
    return re.sub(r"([\\<`]|!(?=\[))", r"\\\1", text)


def describe(plan: Plan) -> str:
    """The checkpoint, its settings, and the values that workers chose for open settings.

    Several values within a plan deserve attention.
    """
    settings = [f"{key} {value}" for key, value in plan.settings.items() if value is not None]
    results = filter(None, map(plan.result, plan.tasks))
    answers = {
        f"{used.get('dtype')}, {'causal' if used.get('causal') else 'bidirectional'}, "
        f"{used.get('pooling')} pooling, at most {used.get('max_length')} tokens"
        for used in (result["kalm_min"]["used"] for result in results)
    }
    computed = f" Computed in {' and in '.join(sorted(answers))}." if answers else ""
    return f"Checkpoint {plan.checkpoint[:12]}; {', '.join(settings)}.{computed}"


def side_by_side(
    columns: Scores, types: Mapping[str, str], differences: Sequence[tuple[str, str]]
) -> str:
    """Scores of several runs as a table, with differences; means over tasks that all columns have.

    (a, b) of `differences` adds the column "a - b".
    """
    names = sorted({n for scores in columns.values() for n in scores}, key=lambda n: (types[n], n))
    rows = [(types[n], n, {c: one.get(n, nan) for c, one in columns.items()}) for n in names]
    rows += [("", name, means) for _, name, means in _means(types, columns)]
    lines = [
        [
            *(_text(name), _text(kind)),
            *(_number(scores[column]) for column in columns),
            *(_number(scores[a] - scores[b], "+.2f") for a, b in differences),
        ]
        for kind, name, scores in rows
    ]
    head = ["task", "type", *columns, *(f"{a} - {b}" for a, b in differences)]
    return table(list(map(_text, head)), lines, right=range(2, len(head)))


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
        # A spreadsheet takes what begins with one of these for a formula.
        names = ["'" * one.startswith(tuple("=+-@\t\r")) + one for one in (row.name, row.type)]
        writer.writerow([row.kind, *names, row.metric, *cells])
    return printable(stream.getvalue())


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
        found = {path: one for path in sorted(results.glob("*.json")) if (one := read_result(path))}
        if not found:
            continue
        tasks = {task.name: task for task in requested}
        key: Object = {}
        for path, result in found.items():
            key = result["kalm_min"]["key"]
            name = str(result.get("task_name", path.stem))
            name = name if escape_name(name) == path.stem else path.stem
            kind = "prompt" if "query_prompt" in key else "instruction"
            texts = (key.get(f"{role}_{kind}", "") for role in ("query", "document"))
            tasks[name] = PlannedTask(
                name=name,
                type=result["kalm_min"].get("type") or "",
                main_score=key["main_score"],
                revision=key["revision"],
                characters=0,
                instruction=Instruction(*texts, kind=kind),
                splits=tuple(key["splits"]),
                subsets=tuple(key["subsets"]),
                aggregate=tasks[name].aggregate if name in tasks else "",
            )
        shared = set.intersection(*(set(one["kalm_min"]["dims"]) for one in found.values()))
        if not (common := ordered(map(str, dims) if dims else shared)):
            raise ValueError(f"{results}: no dimension in common, choose with --dims")
        settings = {name: key[name] for name in key if name in SETTINGS}
        parts = tuple(tasks.values())
        plans.append(Plan("", key["checkpoint"], common, settings, parts, results, benchmarks))
    if not plans:
        raise ValueError(f"{folder}: expected a folder that evaluate.py wrote, found no result")
    return plans


def compare(found: Sequence[tuple[Path, Plan]]) -> tuple[str, Scores, dict[str, str]]:
    """Models side by side, as Markdown; differences are to the first.

    Each is a folder and a plan of it, and its scores are those at the plan's main dimension. Also
    returns model -> task -> score, and task -> type. Raises ValueError if there is only one model.
    """
    possible = [
        (one.absolute().name, str(one), plan.name, f"{one} {plan.name}", str(plan.results))
        for one, plan in found
    ]
    names = next((one for one in zip(*possible, strict=True) if len({*one}) == len(one)), ())
    if len(names) < 2:
        raise ValueError("--compare: expected two folders or more, or one of several models")
    plans = {f"{name} ({plan.dims[0]})": plan for name, (_, plan) in zip(names, found, strict=True)}
    versions: dict[str, set[PlannedTask]] = {}
    for plan in plans.values():
        for task in plan.tasks:  # they differ in data or score, unless only in instructions
            versions.setdefault(task.name, set()).add(replace(task, instruction=Instruction()))
    same = {name: one.pop().type for name, one in versions.items() if len(one) == 1}
    left_out = ", ".join(sorted(versions.keys() - same))
    columns: dict[str, dict[str, float]] = {}
    for name, plan in plans.items():
        scores = {row.name: row.scores[plan.dims[0]] for row in score_rows(plan)}
        columns[name] = {n: one for n, one in scores.items() if n in same and not isnan(one)}
    first, *rest = plans
    models = [f"- {name}: {plan.name}. {describe(plan)}" for name, plan in plans.items()]
    parts = [
        "# Comparison",
        _text("\n".join(models)),
        _text(f"Left out, not the same data or score: {left_out}.") if left_out else "",
        side_by_side(columns, same, [(name, first) for name in rest]),
        "Means are over the tasks that all models have, not of a benchmark.",
    ]
    return printable("\n\n".join(filter(None, parts)) + "\n"), columns, same


def draw(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Plot mean scores by type, and by dimension if there are several, if matplotlib is installed.

    Returns the names of the PNG files written into `folder`.
    """
    types, columns = _done(rows)
    dims = [dim for dim in columns if " " not in dim]
    written = draw_types(folder / "types.png", types, {f"{dims[0]} dimensions": columns[dims[0]]})
    if written and len(dims) > 1:
        scores = {dim: columns[dim] for dim in dims[::-1]}
        written += draw_types(folder / "dimensions.png", types, scores, lines=True)
    return written


def draw_types(
    path: Path, types: Mapping[str, str], columns: Scores, *, lines: bool = False
) -> list[str]:
    """Plot the mean score of each type for each column, as bars or over the columns as lines.

    Returns the name of the file, if matplotlib is installed and there is something to draw.
    """
    means = _type_means(types, columns)
    if find_spec("matplotlib") is None or not means:
        return []
    from matplotlib.figure import Figure

    height, middle = 0.8 / len(columns), (len(columns) - 1) / 2
    tall = 4.6 if lines else 1.4 + 0.4 * len(means) * max(1, 0.6 * len(columns))
    figure = Figure((9, tall), layout="constrained")
    axes = figure.add_subplot()
    if lines:
        for kind, one in means.items():
            axes.plot(list(columns), list(one.values()), "o-", label=kind)
        axes.set(xlabel="dimensions kept", title="Mean score by dimension")
    else:
        for i, column in enumerate(columns):
            places = [place + (i - middle) * height for place in range(len(means))]
            label = printable(column.replace("$", r"\$"))
            scores = [one[column] for one in means.values()]
            bars = axes.barh(places, scores, height, alpha=0.6, label=label)
            axes.bar_label(bars, fmt="%.1f", padding=3)
        lowest = min(score for one in means.values() for score in one.values())
        left = lowest - 10 if lowest < 0 else 0  # with room for the number at a negative bar
        axes.set(xlim=(left, 105), title="Mean score by type")
        axes.set_yticks(range(len(means)), map(printable, means), parse_math=False)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.invert_yaxis()
    axes.legend(frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
    return [path.name]
