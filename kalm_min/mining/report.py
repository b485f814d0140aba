"""What mining did, for a person to judge: README.md beside the data, with plots in README.png.

Over all tasks: rows in, kept and dropped by reason; where positives ranked; scores of positives,
chosen negatives and strangers; what deserves a look. Per task a page with dropped rows and what
outranked them, suspected false negatives, and kept rows. No time or place is in it, so the same run
gives the same bytes.

Plots need matplotlib (an extra); without it the text says the same in numbers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from kalm_min.data import TrainingData
from kalm_min.files import atomic_write, write_text
from kalm_min.mining.catalogue import Catalogue, Ints
from kalm_min.mining.negatives import KEPT, OUTRANKED, SHORT, random_keys
from kalm_min.mining.selection import BINS, Selection, score_histogram

PAGES = "README.tasks"  # folder of the tasks' pages; reading the data skips the name

_RANKS = (1, 2, 6, 11, 21, 51, 101)  # where the bins of the positive's rank begin
_RANK_NAMES = ("1", "2-5", "6-10", "11-20", "21-50", "51-100", "101-", "below the list")
_SHADES = ("#08306b", "#08519c", "#2171b5", "#4292c6", "#6baed6", "#9ecae1", "#c6dbef", "#d9d9d9")
_KINDS = {
    "kept": ("positives of kept rows", "#2171b5"),
    "dropped": ("positives of dropped rows", "crimson"),
    "negatives": ("chosen negatives", "darkorange"),
    "strangers": ("all listed strangers", "grey"),
}
_SHOWN = 20  # dropped rows, and suspected negatives, per task
_SUSPECT = 0.95  # of the positive's score: what NV-Retriever would not take
_CUT = 240  # characters of a text
_COUNTS = ("rows", "kept", "outranked", "short", "kept_with_fewer", "negatives", "suspects")

Summary = dict[str, Any]
Tasks = Mapping[str, Summary]
Text = Callable[[int], str]


def summarise(catalogue: Catalogue, selection: Selection, corpus_size: int) -> Summary:
    """The record of a task: counts and histograms, as JSON holds them."""
    fate = selection.fate
    kept = fate == KEPT
    chosen = selection.negatives[kept] >= 0  # (kept, n)
    ranks = _ranks(selection)
    edges = [*_RANKS, np.iinfo(np.int64).max]
    of_kept = np.repeat(kept, np.diff(catalogue.starts))
    scores = {
        "kept": selection.positive_scores[of_kept],
        "dropped": selection.positive_scores[~of_kept],
        "negatives": selection.negative_scores[kept][chosen],
    }
    return {
        "rows": catalogue.size,
        "kept": int(kept.sum()),
        "outranked": int((fate == OUTRANKED).sum()),
        "short": int((fate == SHORT).sum()),
        "kept_with_fewer": int((~chosen.all(1)).sum()),
        "negatives": int(chosen.sum()),
        "suspects": int(_suspects(catalogue, selection).sum()),
        "corpus": corpus_size,
        "ranks": [
            *np.histogram(ranks[ranks > 0], bins=edges)[0].tolist(),
            int((ranks < 0).sum()),
        ],
        "scores": {kind: score_histogram(values).tolist() for kind, values in scores.items()}
        | {"strangers": selection.neighbour_histogram.tolist()},
    }


def copied(rows: int) -> Summary:
    """The record of a task that is not mined."""
    counts = dict.fromkeys(_COUNTS, 0) | {"rows": rows, "kept": rows, "corpus": 0}
    scores = {kind: [0] * BINS for kind in _KINDS}
    return counts | {"ranks": [0] * len(_RANK_NAMES), "scores": scores}


def totals(tasks: Tasks) -> dict[str, int]:
    """Sums over tasks. Every row is in one of kept, outranked, short."""
    total = {name: sum(summary[name] for summary in tasks.values()) for name in _COUNTS}
    assert total["rows"] == total["kept"] + total["outranked"] + total["short"]
    return total


def remarks(tasks: Tasks) -> list[str]:
    """What deserves a look: tasks of wrong rows or beyond the model, corpora too small for the ranks."""
    found: list[str] = []
    for task, one in tasks.items():
        if one["outranked"] > one["rows"] / 2:
            share = one["outranked"] / one["rows"]
            found.append(f"{task}: {share:.0%} of the rows are outranked")
        if one["kept_with_fewer"] > one["kept"] / 2:
            found.append(
                f"{task}: {one['kept_with_fewer']:,} of {one['kept']:,} kept rows have fewer "
                f"negatives than asked for, of a corpus of {one['corpus']:,} texts"
            )
    return found


def _ranks(selection: Selection) -> Ints:
    """(R,) of the best positive; -1 where it is below every listed document."""
    return np.where(selection.beyond, -1, selection.ahead + 1)


def _suspects(catalogue: Catalogue, selection: Selection) -> npt.NDArray[np.bool_]:
    """(R, n) negatives that score nearly as high as the row's best positive."""
    best = np.maximum.reduceat(selection.positive_scores, catalogue.starts[:-1])[:, None]
    there = (selection.fate == KEPT)[:, None] & (selection.negatives >= 0) & (best > 0)
    return there & (selection.negative_scores >= _SUSPECT * best)


# ---- a task's page -------------------------------------------------------------------------------


def examples(
    data: TrainingData, catalogue: Catalogue, selection: Selection, text: Text, summary: Summary
) -> str:
    """Rows to read: dropped ones with what outranked them, suspected negatives, kept ones."""
    ranks, suspects = _ranks(selection), _suspects(catalogue, selection)

    def shown(row: int, others: Iterator[tuple[str, float, int]]) -> str:
        example = data[catalogue.first + row]
        scores = selection.positive_scores[catalogue.starts[row] : catalogue.starts[row + 1]]
        place = int(scores.argmax())
        rank = (
            f"rank {ranks[row]}" if ranks[row] > 0 else f"below all {selection.ahead[row]} listed"
        )
        lines = [
            f"- {_clip(example.query)}",
            f"    - {scores[place]:.3f} positive, {rank}: {_clip(example.positives[place])}",
        ]
        lines += [
            f"    - {score:.3f} {kind}: {_clip(text(number))}" for kind, score, number in others
        ]
        return "\n".join(lines)

    def rival(row: int) -> Iterator[tuple[str, float, int]]:
        if selection.rivals[row] >= 0:
            yield "first stranger", selection.rival_scores[row], int(selection.rivals[row])

    def negatives(row: int, which: npt.NDArray[np.bool_]) -> Iterator[tuple[str, float, int]]:
        for column in np.flatnonzero(which[row]).tolist():
            number = int(selection.negatives[row, column])
            yield "negative", selection.negative_scores[row, column], number

    kept = selection.fate == KEPT
    parts = [
        (f"{summary['outranked']:,} rows outranked", selection.fate == OUTRANKED, rival, _SHOWN),
        (
            f"{summary['suspects']:,} suspected false negatives",
            suspects.any(1),
            lambda row: negatives(row, suspects),
            _SHOWN,
        ),
        (
            f"{summary['kept']:,} rows kept",
            kept,
            lambda row: negatives(row, selection.negatives >= 0),
            _SHOWN // 4,
        ),
    ]
    return (
        "\n\n".join(
            "\n".join([f"## {title}", "", *(shown(row, others(row)) for row in rows)])
            for title, where, others, most in parts
            if (rows := _sample(catalogue, where, most))
        )
        + "\n"
    )


def _sample(catalogue: Catalogue, where: npt.NDArray[np.bool_], most: int) -> list[int]:
    """Some of the rows, at random but always the same ones, in their order."""
    rows = np.flatnonzero(where)
    hashes = catalogue.queries.hashes[catalogue.row_query[rows]]
    keys = random_keys(hashes, rows[:, None].astype(np.int64), 0)[:, 0]
    return sorted(rows[np.argsort(keys, kind="stable")[:most]].tolist())


def _clip(text: str) -> str:
    """A text in a line, as code, so that nothing in it is taken for Markdown."""
    text = " ".join(text.split()).replace("``", "` `")
    return f"`` {text if len(text) <= _CUT else text[: _CUT - 1] + '…'} ``"


# ---- the page of all tasks -----------------------------------------------------------------------


def write(folder: Path, tasks: Tasks, facts: Mapping[str, Any]) -> None:
    """Write README.md, and README.png where matplotlib is installed."""
    image = _plot(tasks)
    if image is not None:
        with atomic_write(folder / "README.png") as file:
            file.write(image)
    write_text(folder / "README.md", markdown(tasks, facts, plotted=image is not None))


def markdown(tasks: Tasks, facts: Mapping[str, Any], *, plotted: bool) -> str:
    """The report as text."""
    total = totals(tasks)
    settings = ", ".join(f"{name} {_said(value)}" for name, value in facts["rules"].items())
    others = "".join(
        f" {name}: {facts[name]}." for name in ("pool", "scorer", "index") if facts[name]
    )
    model = facts["model"]
    opening = (
        f"Checkpoint {model['checkpoint'][:12]}, {model['dtype']}, at most {model['max_length']} "
        f"tokens. Rules: {settings}.{others}"
    )
    sums = (
        f"{total['rows']:,} rows in = {total['kept']:,} kept + {total['outranked']:,} dropped as "
        f"outranked + {total['short']:,} dropped for too few negatives. "
        f"{total['kept_with_fewer']:,} kept rows have fewer negatives than asked for; "
        f"{total['suspects']:,} of {total['negatives']:,} negatives are suspects: they score at "
        f"least {_SUSPECT:.0%} of the row's best positive."
    )
    words = (
        "A stranger is a document that is not known to answer the query. A row is outranked when "
        "more strangers than allowed score higher than its best positive."
    )
    parts = [
        "# Mined training data",
        opening,
        sums,
        words,
        *(["![ranks and scores, a task a line](README.png)"] if plotted else []),
        "\n".join(f"- Look at {remark}." for remark in remarks(tasks)),
        _count_table(tasks),
        "## Where the best positive ranks, among strangers",
        _table_of(tasks, _RANK_NAMES, lambda one: [f"{count:,}" for count in one["ranks"]]),
        "## Scores: 10th, 50th and 90th percentile, to a hundredth",
        _table_of(
            tasks,
            [name for name, _ in _KINDS.values()],
            lambda one: [_said(_percentiles(one["scores"][kind])) for kind in _KINDS],
        ),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _said(value: object) -> str:
    if isinstance(value, list | tuple):
        return "-".join(map(str, value))
    return "none" if value is None else str(value)


def _count_table(tasks: Tasks) -> str:
    names = (*_COUNTS, "corpus")
    approximate = any(one.get("recall") is not None for one in tasks.values())
    head = [name.replace("_", " ") for name in names] + ["recall"] * approximate

    def cells(one: Summary) -> list[str]:
        recall = [f"{one['recall']:.4f}" if one.get("recall") is not None else "none"]
        return [f"{one[name]:,}" for name in names] + recall * approximate

    return _table_of(tasks, head, cells)


def _table_of(tasks: Tasks, head: Sequence[str], cells: Callable[[Summary], Sequence[str]]) -> str:
    """A line for each task, its name a link to its page."""
    rows = [
        [f"[{task}]({PAGES}/{quote(task)}.md)" if one["corpus"] else task, *cells(one)]
        for task, one in tasks.items()
    ]
    return table(["task", *head], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [list(head), ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percentiles(histogram: Sequence[int]) -> tuple[float, ...] | None:
    """The centres of the bins that hold the 10th, 50th and 90th percentile."""
    sums = np.cumsum(histogram)
    if sums[-1] == 0:
        return None
    places = np.searchsorted(sums, np.array([0.1, 0.5, 0.9]) * sums[-1])
    return tuple(round(float((place + 0.5) * 2 / BINS - 1), 2) for place in places)


def _plot(tasks: Tasks) -> bytes | None:
    """A line for each task: its rows by the positive's rank, and its scores. None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(13, 2 + 0.3 * len(tasks)), layout="constrained")
    ranks, scores = figure.subplots(1, 2, sharey=True)
    lines, rows = np.arange(len(tasks)), [max(1, one["rows"]) for one in tasks.values()]
    left = np.zeros(len(tasks))
    for place, name in enumerate(_RANK_NAMES):
        share = np.array([one["ranks"][place] for one in tasks.values()]) / rows
        ranks.barh(lines, share, left=left, color=_SHADES[place], label=name)
        left += share
    kept = np.array([one["kept"] for one in tasks.values()]) / rows
    ranks.vlines(kept, lines - 0.45, lines + 0.45, color="crimson", lw=2.5, label="share kept")
    for place, (kind, (name, colour)) in enumerate(_KINDS.items()):
        middles = [_percentiles(one["scores"][kind]) or (np.nan,) * 3 for one in tasks.values()]
        low, middle, high = np.array(middles).T
        y = lines + 0.2 * place - 0.3
        scores.hlines(y, low, high, color=colour, lw=1.5)
        scores.plot(middle, y, "o", color=colour, ms=4, label=name)
    labels = [f"{task} ({one['rows']:,})" for task, one in tasks.items()]
    ranks.set(yticks=lines, yticklabels=labels, xlim=(0, 1), ylim=(len(tasks) - 0.5, -0.5))
    for axes, columns, title in (
        (ranks, 5, "rows by the rank of their best positive"),
        (scores, 2, "scores, 10th to 90th percentile and median"),
    ):
        axes.set_title(title, pad=40)
        axes.legend(
            ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8, frameon=False
        )
    scores.grid(axis="x", alpha=0.3)
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
