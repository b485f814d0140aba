"""The report of mining: README.md beside the data, with a plot in README.png (if matplotlib is there).

It covers all tasks: rows read, kept and dropped by reason; ranks of positives; scores of positives,
chosen negatives and unlabelled candidates; and remarks. Each task has a page of examples. No time or
path is included, so the same run gives the same bytes.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from kalm_min.console import printable, table
from kalm_min.data import TrainingData
from kalm_min.files import atomic_write, escape_name, write_text
from kalm_min.mining import rules
from kalm_min.mining.rules import BINS, INCONSISTENT, KEPT, SHORT, Selection
from kalm_min.mining.texts import TextIndex
from kalm_min.options import MiningConfig, Rules
from kalm_min.vectors import TextSet

PAGES = "README.tasks"  # folder of the tasks' pages; reading the data skips the name

_RANKS = (1, 2, 6, 11, 21, 51, 101)  # the first ranks of the bins of the positive's rank
_RANK_NAMES = ("1", "2-5", "6-10", "11-20", "21-50", "51-100", "101-", "below the list")
_KINDS = {  # of scores
    "kept": "positives of kept rows",
    "dropped": "positives of dropped rows",
    "negatives": "chosen negatives",
    "unlabelled": "all listed unlabelled candidates",
}
_SUSPECT = 0.95  # share of the positive's score above which NV-Retriever takes no negative
_COUNTS = (
    *("rows", "kept", "inconsistent", "short", "kept_with_fewer", "negatives", "suspects"),
    *("own_negatives", "own_negatives_kept"),
)

Summary = dict[str, Any]  # counts and histograms of a task, as stored in its record
Tasks = Mapping[str, Summary]


def summarise(
    data: TrainingData, index: TextIndex, selection: Selection, corpus: TextSet, settings: Rules
) -> tuple[Summary, list[str]]:
    """Counts and histograms of a task, and the lines of its page: dropped, suspect and kept rows."""
    kept, ranks, best = selection.status == KEPT, selection.rank, selection.best[:, None]
    dropped, scores = selection.status == INCONSISTENT, selection.negative_scores
    chosen = kept[:, None] & (selection.negatives >= 0)  # (R, n)
    suspects = chosen & (best > 0) & (scores >= _SUSPECT * best)
    listed = np.histogram(ranks[ranks > 0], bins=[*_RANKS, np.iinfo(np.int64).max])[0]
    of_kept = np.repeat(kept, np.diff(index.starts))
    by_kind = {
        "kept": selection.scores[of_kept & index.is_positive],
        "dropped": selection.scores[~of_kept & index.is_positive],
        "negatives": scores[chosen],
    }
    histograms = {kind: rules.score_histogram(some).tolist() for kind, some in by_kind.items()}
    counts = {
        "rows": len(index),
        "kept": kept.sum(),
        "inconsistent": dropped.sum(),
        "short": (selection.status == SHORT).sum(),
        "kept_with_fewer": (chosen[kept].sum(1) < settings.num_negatives).sum(),
        "negatives": chosen.sum(),
        "suspects": suspects.sum(),
        "own_negatives": index.labelled,
        "own_negatives_kept": (of_kept & selection.is_kept & ~index.is_positive).sum(),
        "corpus": len(corpus.hashes),
    }
    summary: Summary = {name: int(count) for name, count in counts.items()} | {
        "ranks": [*listed.tolist(), int((ranks < 0).sum())],
        "scores": histograms | {"unlabelled": selection.histogram.tolist()},
    }
    top = "top unlabelled", selection.top[:, None], selection.top_scores[:, None]
    some = "negative", np.where(suspects, selection.negatives, -1), scores
    lines: list[str] = []
    for key, is_part, title, (kind, numbers, their_scores), count in (
        ("inconsistent", dropped, "rows failed the consistency filter", top, 20),
        ("suspects", suspects.any(1), "suspected false negatives", some, 20),
        ("kept", kept, "rows kept", ("negative", selection.negatives, scores), 5),
    ):
        rows = np.flatnonzero(is_part)
        # A random but always identical sample, in order.
        keys = rules.random_keys(index.queries["hash"][index.row_query[rows]], rows[:, None], 0)
        sample = sorted(rows[np.argsort(keys[:, 0], kind="stable")[:count]].tolist())
        shown = f" ({len(sample)} rows shown)" if len(sample) < len(rows) else ""
        lines += [f"## {summary[key]:,} {title}{shown}", ""] if sample else []
        for row in sample:
            example, rank = data[index.first + row], ranks[row]
            place = f"rank {rank}" if rank > 0 else f"below all {selection.ahead[row]} listed"
            own = slice(*index.starts[row : row + 2])
            first = np.where(index.is_positive[own], selection.scores[own], -np.inf).argmax()
            texts = [(selection.best[row], f"positive, {place}", example.positives[first])]
            texts += [
                (their_scores[row, column], kind, corpus.read(number, number + 1)[0])
                for column, number in enumerate(numbers[row].tolist())
                if number >= 0
            ]
            lines.append(f"- {_code(example.query)}")
            lines += [f"    - {score:.3f} {what}: {_code(text)}" for score, what, text in texts]
        lines += [""] if sample else []
    return summary, lines


def copied(rows: int) -> Summary:
    """The summary of a task that is not mined."""
    counts = dict.fromkeys((*_COUNTS, "corpus"), 0) | {"rows": rows, "kept": rows}
    scores = {kind: [0] * BINS for kind in _KINDS}
    return counts | {"ranks": [0] * len(_RANK_NAMES), "scores": scores}


def totals(tasks: Tasks) -> dict[str, int]:
    """Sums over tasks. Every row is either kept, inconsistent or short."""
    total = {name: sum(one[name] for one in tasks.values()) for name in _COUNTS}
    assert total["rows"] == total["kept"] + total["inconsistent"] + total["short"]
    return total


def remarks(tasks: Tasks) -> list[str]:
    """Remarks: wrong rows, tasks that the model cannot judge, corpora too small for the ranks."""
    found: list[str] = []
    for task, one in tasks.items():
        if one["inconsistent"] > one["rows"] / 2:
            share = one["inconsistent"] / one["rows"]
            found.append(f"{task}: {share:.0%} of the rows failed the consistency filter")
        if one["kept_with_fewer"] > one["kept"] / 2:
            found.append(
                f"{task}: {one['kept_with_fewer']:,} of {one['kept']:,} kept rows have fewer "
                f"negatives than requested, from a corpus of {one['corpus']:,} texts"
            )
    return found


def sentence(total: Mapping[str, int]) -> str:
    """One sentence that accounts for all rows, and one for the negatives that they had."""
    counts = {name: f"{count:,}" for name, count in total.items()}
    rows = "{rows} rows = {kept} kept + {inconsistent} that failed the consistency filter + "
    rows += "{short} with too few negatives"
    if total["own_negatives"]:
        rows += "; of {own_negatives} negatives that the rows had, {own_negatives_kept} stay "
        rows += "(--keep-negatives keeps those of kept rows)"
    return rows.format(**counts)


def _code(text: str, longest: int = 240) -> str:
    """A text on one line, as code: nothing in it is read as Markdown, HTML or a terminal's codes."""
    text = printable(" ".join(text.split()))  # with its control characters as codes
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    ticks = "`" * max(2, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}"


def escaped(name: str) -> str:
    """A name in which nothing is read as Markdown, HTML or a terminal's codes."""
    return re.sub(r"[\\`*\[\]<>&~]|\b_|_\b", r"\\\g<0>", printable(" ".join(name.split())))


def write(config: MiningConfig, tasks: Tasks, model: Mapping[str, object]) -> None:
    """Write README.md and README.png; `model` is the manifest of its vectors."""
    total, summaries = totals(tasks), tasks.values()
    columns = [name for name in _COUNTS if total["own_negatives"] or not name.startswith("own")]
    columns.append("corpus")
    counts = [[f"{one[name]:,}" for name in columns] for one in summaries]
    if any("recall" in one for one in summaries):
        columns.append("recall")
        for row, one in zip(counts, summaries, strict=True):
            row.append(f"{one['recall']:.4f}" if "recall" in one else "none")
    ranks = [[f"{count:,}" for count in one["ranks"]] for one in summaries]
    percentiles = [[_percentiles(one["scores"][kind]) for kind in _KINDS] for one in summaries]
    names = [*(field.name for field in fields(Rules)), "pool", "scorer", "index"]
    settings = {name: value for name in names if (value := getattr(config, name)) is not None}
    flags = " ".join(
        f"--{name.replace('_', '-')} {' '.join(map(str, one)) if isinstance(one, tuple) else one}"
        for name, one in settings.items()
    )
    parts = [
        "# Mined training data",
        (
            f"Checkpoint {str(model['checkpoint'])[:12]}, {model['dtype']}, at most "
            f"{model['max_length']} tokens. Settings: {_code(flags, 10**4)}"
        ),
        (
            f"{sentence(total)}. {total['kept_with_fewer']:,} kept rows have fewer negatives than "
            f"requested; {total['suspects']:,} of {total['negatives']:,} negatives are suspects: they "
            f"score at least {_SUSPECT:.0%} of the row's best positive."
        ),
        (
            "An unlabelled candidate is a document that no line of any task labels as an answer to the "
            "query, also if case and white space are ignored. A row fails the consistency filter when "
            "more unlabelled candidates than allowed score higher than its best positive."
        ),
        "![ranks, one bar per task](README.png)" if _plot(config.output, tasks) else "",
        "\n".join(f"- Look at {escaped(remark)}." for remark in remarks(tasks)),
        _table(tasks, [name.replace("_", " ") for name in columns], counts),
        "## Rank of the best positive among unlabelled candidates",
        _table(tasks, _RANK_NAMES, ranks),
        "## Scores: 10th, 50th and 90th percentile, to a hundredth",
        _table(tasks, [*_KINDS.values()], percentiles),
    ]
    write_text(config.output / "README.md", "\n\n".join(filter(None, parts)) + "\n")


def _table(tasks: Tasks, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One line per task, whose name links to its page."""
    cells = [
        [f"[{escaped(task)}]({PAGES}/{quote(escape_name(task))}.md)", *row]
        if one["corpus"]
        else [escaped(task), *row]
        for (task, one), row in zip(tasks.items(), rows, strict=True)
    ]
    return table(["task", *head], cells, right=range(1, len(head) + 1))


def _percentiles(histogram: Sequence[int]) -> str:
    """The centres of the bins that hold the 10th, 50th and 90th percentile."""
    sums = np.cumsum(histogram)
    bins = np.searchsorted(sums, np.array([0.1, 0.5, 0.9]) * sums[-1])
    centres = (bins + 0.5) * 2 / BINS - 1
    return "/".join(f"{value:.2f}" for value in centres) if sums[-1] else "none"


def _plot(folder: Path, tasks: Tasks) -> bool:
    """Plot each task's rows by the positive's rank; return False without matplotlib."""
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if len(tasks) > 1000:  # more pixels than matplotlib draws
        return False
    figure = Figure(figsize=(8, 2 + 0.3 * len(tasks)), layout="constrained")
    axes = figure.add_subplot(title="rows by the rank of their best positive", xlim=(0, 1))
    left, places = np.zeros(len(tasks)), range(len(tasks))
    for i, name in enumerate(_RANK_NAMES):
        share = np.array([one["ranks"][i] / max(1, one["rows"]) for one in tasks.values()])
        axes.barh(places, share, left=left, color=colormaps["viridis"](i / 7), label=name)
        left += share
    # Names are no formulas ("$"), and the font may lack their characters.
    names = [printable(" ".join(task.split()))[:40] for task in tasks]
    axes.set_yticks(places, names, parse_math=False)
    axes.invert_yaxis()
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    with atomic_write(folder / "README.png") as file, warnings.catch_warnings(action="ignore"):
        FigureCanvasAgg(figure).print_png(file)
    return True
