"""The report of mining: README.md beside the data, with a plot in README.png.

It covers all tasks: rows read, kept and dropped by reason; ranks of positives; scores of positives,
chosen negatives and unlabelled candidates; and remarks. Each task has a page with dropped rows and
what ranked above them, suspected false negatives, and kept rows. No time or path is included, so the
same run gives the same bytes. The plot needs matplotlib (an extra).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from kalm_min import console
from kalm_min.data import TrainingData
from kalm_min.files import atomic_write, write_text
from kalm_min.mining import rules
from kalm_min.mining.rules import BINS, INCONSISTENT, KEPT, SHORT, Bools, Selection
from kalm_min.mining.texts import TextIndex
from kalm_min.topk import Ints
from kalm_min.vectors import TextSet

PAGES = "README.tasks"  # folder of the tasks' pages; reading the data skips the name

_RANKS = (1, 2, 6, 11, 21, 51, 101)  # the first ranks of the bins of the positive's rank
_RANK_NAMES = ("1", "2-5", "6-10", "11-20", "21-50", "51-100", "101-", "below the list")
_KINDS = {
    "kept": "positives of kept rows",
    "dropped": "positives of dropped rows",
    "negatives": "chosen negatives",
    "unlabelled": "all listed unlabelled candidates",
}
_SHOWN = 20  # dropped rows, and suspected negatives, per task
_SUSPECT = 0.95  # share of the positive's score above which NV-Retriever takes no negative
_CUT = 240  # characters shown of a text
_COUNTS = ("rows", "kept", "inconsistent", "short", "kept_with_fewer", "negatives", "suspects")

Summary = dict[str, Any]  # counts and histograms of a task, as stored in its record
Tasks = Mapping[str, Summary]


def summarise(index: TextIndex, selection: Selection, corpus: int) -> Summary:
    """Counts and histograms of a task and of the corpus it was mined from."""
    status = selection.status
    kept = status == KEPT
    chosen = selection.negatives[kept] >= 0  # (kept, n)
    ranks = _ranks(selection)
    listed = np.histogram(ranks[ranks > 0], bins=[*_RANKS, np.iinfo(np.int64).max])[0]
    of_kept = np.repeat(kept, np.diff(index.starts))
    scores = {
        "kept": selection.positive_scores[of_kept],
        "dropped": selection.positive_scores[~of_kept],
        "negatives": selection.negative_scores[kept][chosen],
    }
    histograms = {kind: rules.score_histogram(some).tolist() for kind, some in scores.items()}
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
        "scores": histograms | {"unlabelled": selection.histogram.tolist()},
    }


def copied(rows: int) -> Summary:
    """The summary of a task that is not mined."""
    counts = dict.fromkeys(_COUNTS, 0) | {"rows": rows, "kept": rows, "corpus": 0}
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
    """One sentence that accounts for all rows."""
    return (
        f"{total['rows']:,} rows = {total['kept']:,} kept + {total['inconsistent']:,} that failed "
        f"the consistency filter + {total['short']:,} with too few negatives"
    )


def _ranks(selection: Selection) -> Ints:
    """(R,) rank of the best positive; -1 if it is below every listed document."""
    return np.where(selection.beyond, -1, selection.ahead + 1)


def _suspects(index: TextIndex, selection: Selection) -> Bools:
    """(R, n) negatives that score nearly as high as the row's best positive."""
    best = np.maximum.reduceat(selection.positive_scores, index.starts[:-1])[:, None]
    chosen = (selection.status == KEPT)[:, None] & (selection.negatives >= 0) & (best > 0)
    return chosen & (selection.negative_scores >= _SUSPECT * best)


def examples(
    data: TrainingData, index: TextIndex, selection: Selection, corpus: TextSet, summary: Summary
) -> str:
    """A task's page with example rows: dropped, with suspected false negatives, and kept."""
    ranks, suspects = _ranks(selection), _suspects(index, selection)
    failed = f"{summary['inconsistent']:,} rows failed the consistency filter"
    suspected = f"{summary['suspects']:,} suspected false negatives"
    top = selection.top[:, None], selection.top_scores[:, None]
    negatives, scores = selection.negatives, selection.negative_scores
    some = np.where(suspects, negatives, -1)
    parts = [
        (failed, selection.status == INCONSISTENT, "top unlabelled", *top, _SHOWN),
        (suspected, suspects.any(1), "negative", some, scores, _SHOWN),
        (
            f"{summary['kept']:,} rows kept",
            selection.status == KEPT,
            "negative",
            negatives,
            scores,
            5,
        ),
    ]
    lines: list[str] = []
    for title, which, kind, numbers, scores, count in parts:
        rows = np.flatnonzero(which)
        # A random but always identical sample, in order.
        hashes = index.queries["hash"][index.row_query[rows]]
        keys = rules.random_keys(hashes, rows[:, None], 0)[:, 0]
        sample = sorted(rows[np.argsort(keys, kind="stable")[:count]].tolist())
        lines += [f"## {title}", ""] if sample else []
        for row in sample:
            example = data[index.first + row]
            positives = selection.positive_scores[index.starts[row] : index.starts[row + 1]]
            best = int(positives.argmax())
            below = f"below all {selection.ahead[row]} listed"
            rank = below if ranks[row] < 0 else f"rank {ranks[row]}"
            shown = [(positives[best], f"positive, {rank}", example.positives[best])]
            shown += [
                (scores[row, column], kind, corpus.read(number, number + 1)[0])
                for column, number in enumerate(numbers[row].tolist())
                if number >= 0
            ]
            lines.append(f"- {_clip(example.query)}")
            lines += [f"    - {score:.3f} {what}: {_clip(text)}" for score, what, text in shown]
        lines += [""] if sample else []
    return "\n".join(lines)


def _clip(text: str) -> str:
    """A text on one line, as code, so that nothing in it is read as Markdown."""
    text = " ".join(text.split()).replace("``", "` `")
    return f"`` {text if len(text) <= _CUT else text[: _CUT - 1] + '…'} ``"


def write(
    folder: Path, tasks: Tasks, model: Mapping[str, object], settings: Mapping[str, object]
) -> None:
    """Write README.md and, if matplotlib is installed, README.png into `folder`.

    `tasks` holds the summaries by name, `model` the manifest of its vectors.
    """
    total = totals(tasks)
    counts = {name: [f"{one[name]:,}" for one in tasks.values()] for name in (*_COUNTS, "corpus")}
    recalls = [one.get("recall") for one in tasks.values()]
    if any(value is not None for value in recalls):
        counts["recall"] = ["none" if value is None else f"{value:.4f}" for value in recalls]
    ranks = [[f"{count:,}" for count in one["ranks"]] for one in tasks.values()]
    percentiles = [[_percentiles(one["scores"][kind]) for kind in _KINDS] for one in tasks.values()]
    set_to = (f"{name} {'none' if one is None else one}" for name, one in settings.items())
    head = [name.replace("_", " ") for name in counts]
    model_line = (
        f"Checkpoint {str(model['checkpoint'])[:12]}, {model['dtype']}, at most "
        f"{model['max_length']} tokens. Settings: {', '.join(set_to)}."
    )
    sums = (
        f"{sentence(total)}. {total['kept_with_fewer']:,} kept rows have fewer negatives than "
        f"requested; {total['suspects']:,} of {total['negatives']:,} negatives are suspects: they "
        f"score at least {_SUSPECT:.0%} of the row's best positive.\n\nAn unlabelled candidate is a "
        "document that is not labelled as an answer to the query. A row fails the consistency filter "
        "when more unlabelled candidates than allowed score higher than its best positive."
    )
    parts = [
        "# Mined training data",
        model_line,
        sums,
        "![ranks, one bar per task](README.png)" if _plot(folder, tasks) else "",
        "\n".join(f"- Look at {remark}." for remark in remarks(tasks)),
        _table(tasks, head, zip(*counts.values(), strict=True)),
        "## Rank of the best positive among unlabelled candidates",
        _table(tasks, _RANK_NAMES, ranks),
        "## Scores: 10th, 50th and 90th percentile, to a hundredth",
        _table(tasks, [*_KINDS.values()], percentiles),
    ]
    write_text(folder / "README.md", "\n\n".join(filter(None, parts)) + "\n")


def _table(tasks: Tasks, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """One line per task, whose name links to its page."""
    cells = [
        [f"[{task}]({PAGES}/{quote(task)}.md)" if one["corpus"] else task, *row]
        for (task, one), row in zip(tasks.items(), rows, strict=True)
    ]
    return console.table(["task", *head], cells, right=range(1, len(head) + 1))


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
    figure = Figure(figsize=(8, 2 + 0.3 * len(tasks)), layout="constrained")
    axes = figure.add_subplot(title="rows by the rank of their best positive", xlim=(0, 1))
    left = np.zeros(len(tasks))
    for i, name in enumerate(_RANK_NAMES):
        share = np.array([one["ranks"][i] / max(1, one["rows"]) for one in tasks.values()])
        axes.barh([*tasks], share, left=left, color=colormaps["viridis"](i / 7), label=name)
        left += share
    axes.invert_yaxis()
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    with atomic_write(folder / "README.png") as file:
        FigureCanvasAgg(figure).print_png(file)
    return True
