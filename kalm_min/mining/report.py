"""What mining did, for a person to judge: README.md beside the data, with plots in README.png.

Over all tasks: rows in, kept and dropped by reason; where positives ranked; scores of positives,
chosen negatives and unlabelled candidates; what deserves a look. Per task a page with dropped rows
and what ranked above them, suspected false negatives, and kept rows. No time or place is in it, so
the same run gives the same bytes. Plots need matplotlib (an extra).
"""

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from kalm_min import console
from kalm_min.data import TrainingData
from kalm_min.files import atomic_write, write_text
from kalm_min.mining.rules import (
    BINS,
    INCONSISTENT,
    KEPT,
    SHORT,
    Bools,
    Selection,
    random_keys,
    score_histogram,
)
from kalm_min.mining.texts import TextIndex
from kalm_min.topk import Ints
from kalm_min.vectors import TextSet

PAGES = "README.tasks"  # folder of the tasks' pages; reading the data skips the name

_RANKS = (1, 2, 6, 11, 21, 51, 101)  # where the bins of the positive's rank begin
_RANK_NAMES = ("1", "2-5", "6-10", "11-20", "21-50", "51-100", "101-", "below the list")
_SHADES = ("#08306b", "#08519c", "#2171b5", "#4292c6", "#6baed6", "#9ecae1", "#c6dbef", "#d9d9d9")
_KINDS = {
    "kept": ("positives of kept rows", "#2171b5"),
    "dropped": ("positives of dropped rows", "crimson"),
    "negatives": ("chosen negatives", "darkorange"),
    "unlabelled": ("all listed unlabelled candidates", "grey"),
}
_SHOWN = 20  # dropped rows, and suspected negatives, per task
_SUSPECT = 0.95  # of the positive's score: what NV-Retriever would not take
_CUT = 240  # characters of a text
_WORDS = (
    "An unlabelled candidate is a document that is not labelled as an answer to the query. A row "
    "fails the consistency filter when more unlabelled candidates than allowed score higher than "
    "its best positive."
)
_COUNTS = ("rows", "kept", "inconsistent", "short", "kept_with_fewer", "negatives", "suspects")


Summary = dict[str, Any]
"""Counts and histograms of a task, as its record holds them."""
Tasks = Mapping[str, Summary]


def summarise(index: TextIndex, selection: Selection, corpus: int) -> Summary:
    """Counts and histograms of a mined task."""
    status = selection.status
    kept = status == KEPT
    chosen = selection.negatives[kept] >= 0  # (kept, n)
    ranks = _ranks(selection)
    listed = np.histogram(ranks[ranks > 0], bins=[*_RANKS, np.iinfo(np.int64).max])[0]
    of_kept = np.repeat(kept, np.diff(index.starts))
    scores = {
        "kept": score_histogram(selection.positive_scores[of_kept]),
        "dropped": score_histogram(selection.positive_scores[~of_kept]),
        "negatives": score_histogram(selection.negative_scores[kept][chosen]),
        "unlabelled": selection.histogram,
    }
    return {
        "rows": len(index),
        "kept": int(kept.sum()),
        "inconsistent": int((status == INCONSISTENT).sum()),
        "short": int((status == SHORT).sum()),
        "kept_with_fewer": int((~chosen.all(1)).sum()),
        "negatives": int(chosen.sum()),
        "suspects": int(_suspects(index, selection).sum()),
        "corpus": corpus,
        "ranks": [*listed.tolist(), int((ranks < 0).sum())],
        "scores": {kind: histogram.tolist() for kind, histogram in scores.items()},
    }


def copied(rows: int) -> Summary:
    """The summary of a task that is not mined."""
    return {
        **dict.fromkeys(_COUNTS, 0),
        "rows": rows,
        "kept": rows,
        "corpus": 0,
        "ranks": [0] * len(_RANK_NAMES),
        "scores": {kind: [0] * BINS for kind in _KINDS},
    }


def totals(tasks: Tasks) -> dict[str, int]:
    """Sums over tasks. Every row is one of kept, inconsistent, short."""
    total = {name: sum(one[name] for one in tasks.values()) for name in _COUNTS}
    assert total["rows"] == total["kept"] + total["inconsistent"] + total["short"]
    return total


def remarks(tasks: Tasks) -> list[str]:
    """What deserves a look: wrong rows, tasks beyond the model, corpora too small for the ranks."""
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
    """Where all rows went."""
    return (
        f"{total['rows']:,} rows = {total['kept']:,} kept + {total['inconsistent']:,} that failed "
        f"the consistency filter + {total['short']:,} with too few negatives"
    )


def _ranks(selection: Selection) -> Ints:
    """(R,) rank of the best positive; -1 where it is below every listed document."""
    return np.where(selection.beyond, -1, selection.ahead + 1)


def _suspects(index: TextIndex, selection: Selection) -> Bools:
    """(R, n) negatives that score nearly as high as the row's best positive."""
    best = np.maximum.reduceat(selection.positive_scores, index.starts[:-1])[:, None]
    chosen = (selection.status == KEPT)[:, None] & (selection.negatives >= 0) & (best > 0)
    return chosen & (selection.negative_scores >= _SUSPECT * best)


def examples(
    data: TrainingData, index: TextIndex, selection: Selection, corpus: TextSet, summary: Summary
) -> str:
    """A task's page, rows to read: dropped ones, suspected false negatives, kept ones."""
    ranks, suspects = _ranks(selection), _suspects(index, selection)

    def shown(row: int, is_shown: Bools | None) -> str:
        """A row with its best positive and some negatives, or else the top unlabelled candidate."""
        example = data[index.first + row]
        scores = selection.positive_scores[index.starts[row] : index.starts[row + 1]]
        best = int(scores.argmax())
        ahead = f"below all {selection.ahead[row]} listed"
        rank = ahead if ranks[row] < 0 else f"rank {ranks[row]}"
        if is_shown is None:
            others = [("top unlabelled", selection.top_scores[row], selection.top[row])]
        else:
            columns = np.flatnonzero(is_shown[row])
            pairs = selection.negative_scores[row, columns], selection.negatives[row, columns]
            others = [("negative", *pair) for pair in zip(*pairs, strict=True)]
        lines = [
            f"- {_clip(example.query)}",
            f"    - {scores[best]:.3f} positive, {rank}: {_clip(example.positives[best])}",
        ]
        lines += [
            f"    - {score:.3f} {kind}: {_clip(corpus.read(int(number), int(number) + 1)[0])}"
            for kind, score, number in others
            if number >= 0
        ]
        return "\n".join(lines)

    is_kept, is_chosen = selection.status == KEPT, selection.negatives >= 0
    failed = f"{summary['inconsistent']:,} rows failed the consistency filter"
    suspected = f"{summary['suspects']:,} suspected false negatives"
    parts = [
        (failed, selection.status == INCONSISTENT, None, _SHOWN),
        (suspected, suspects.any(1), suspects, _SHOWN),
        (f"{summary['kept']:,} rows kept", is_kept, is_chosen, _SHOWN // 4),
    ]
    sections: list[str] = []
    for title, which, is_shown, count in parts:
        rows = np.flatnonzero(which)
        # At random, but always the same ones, in their order.
        hashes = index.queries["hash"][index.row_query[rows]]
        keys = random_keys(hashes, rows[:, None], 0)[:, 0]
        sample = sorted(rows[np.argsort(keys, kind="stable")[:count]].tolist())
        if sample:
            sections.append("\n".join([f"## {title}\n", *(shown(row, is_shown) for row in sample)]))
    return "\n\n".join(sections) + "\n"


def _clip(text: str) -> str:
    """A text in a line, as code, so that nothing in it is taken for Markdown."""
    text = " ".join(text.split()).replace("``", "` `")
    return f"`` {text if len(text) <= _CUT else text[: _CUT - 1] + '…'} ``"


def write(
    folder: Path, tasks: Tasks, model: Mapping[str, object], settings: Mapping[str, object]
) -> None:
    """Write README.md, and README.png where matplotlib is installed.

    Args:
        folder: where to.
        tasks: the summaries by name.
        model: the manifest of its vectors.
        settings: of the run, by name.
    """
    total, image = totals(tasks), _plot(tasks)
    if image is not None:
        with atomic_write(folder / "README.png") as file:
            file.write(image)
    names = [*_COUNTS, "corpus"]
    recalls = [one.get("recall") for one in tasks.values()]
    head = [name.replace("_", " ") for name in names]
    counts = [[f"{one[name]:,}" for name in names] for one in tasks.values()]
    if any(value is not None for value in recalls):
        head.append("recall")
        for row, value in zip(counts, recalls, strict=True):
            row.append("none" if value is None else f"{value:.4f}")
    percentiles = [
        [
            "/".join(f"{value:.2f}" for value in _percentiles(one["scores"][kind]))
            if any(one["scores"][kind])
            else "none"
            for kind in _KINDS
        ]
        for one in tasks.values()
    ]
    set_to = ((name, "none" if value is None else value) for name, value in settings.items())
    model_line = (
        f"Checkpoint {str(model['checkpoint'])[:12]}, {model['dtype']}, at most "
        f"{model['max_length']} tokens. Settings: {', '.join(f'{name} {value}' for name, value in set_to)}."
    )
    sums = (
        f"{sentence(total)}. {total['kept_with_fewer']:,} kept rows have fewer negatives than "
        f"requested; {total['suspects']:,} of {total['negatives']:,} negatives are suspects: they "
        f"score at least {_SUSPECT:.0%} of the row's best positive."
    )
    parts = [
        "# Mined training data",
        model_line,
        sums,
        _WORDS,
        "![ranks and scores, one line per task](README.png)" if image is not None else "",
        "\n".join(f"- Look at {remark}." for remark in remarks(tasks)),
        _table(tasks, head, counts),
        "## Rank of the best positive among unlabelled candidates",
        _table(tasks, _RANK_NAMES, ([f"{n:,}" for n in one["ranks"]] for one in tasks.values())),
        "## Scores: 10th, 50th and 90th percentile, to a hundredth",
        _table(tasks, [name for name, _ in _KINDS.values()], percentiles),
    ]
    write_text(folder / "README.md", "\n\n".join(filter(None, parts)) + "\n")


def _table(tasks: Tasks, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """One line per task, its name a link to its page."""
    names = [
        f"[{task}]({PAGES}/{quote(task)}.md)" if one["corpus"] else task
        for task, one in tasks.items()
    ]
    cells = [[name, *row] for name, row in zip(names, rows, strict=True)]
    return console.table(["task", *head], cells, right=range(1, len(head) + 1))


def _percentiles(histogram: Sequence[int]) -> list[float]:
    """The centres of the bins that hold the 10th, 50th and 90th percentile; nan without a score."""
    sums = np.cumsum(histogram)
    if sums[-1] == 0:
        return [np.nan] * 3
    bins = np.searchsorted(sums, np.array([0.1, 0.5, 0.9]) * sums[-1])
    return ((bins + 0.5) * 2 / BINS - 1).tolist()


def _plot(tasks: Tasks) -> bytes | None:
    """One line per task: its rows by the positive's rank, and its scores. None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(13, 2 + 0.3 * len(tasks)), layout="constrained")
    ranks, scores = figure.subplots(1, 2, sharey=True)
    lines, rows = np.arange(len(tasks)), np.array([max(1, one["rows"]) for one in tasks.values()])
    shares = np.array([one["ranks"] for one in tasks.values()]).T / rows  # (bins, tasks)
    for share, left, colour, name in zip(
        shares, np.cumsum(shares, 0) - shares, _SHADES, _RANK_NAMES, strict=True
    ):
        ranks.barh(lines, share, left=left, color=colour, label=name)
    kept = np.array([one["kept"] for one in tasks.values()]) / rows
    ranks.vlines(kept, lines - 0.45, lines + 0.45, color="crimson", lw=2.5, label="share kept")
    for offset, (kind, (name, colour)) in enumerate(_KINDS.items()):
        low, middle, high = np.array(
            [_percentiles(one["scores"][kind]) for one in tasks.values()]
        ).T
        y = lines + 0.2 * offset - 0.3
        scores.hlines(y, low, high, color=colour, lw=1.5)
        scores.plot(middle, y, "o", color=colour, ms=4, label=name)
    labels = [f"{task} ({one['rows']:,})" for task, one in tasks.items()]
    ranks.set(yticks=lines, yticklabels=labels, xlim=(0, 1), ylim=(len(tasks) - 0.5, -0.5))
    ranks.set_title("rows by the rank of their best positive", pad=40)
    scores.set_title("scores, 10th to 90th percentile and median", pad=40)
    for axes, columns in ((ranks, 5), (scores, 2)):
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1)}
        axes.legend(ncols=columns, fontsize=8, frameon=False, **place)
    scores.grid(axis="x", alpha=0.3)
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
