"""What mining did, for a person to judge: README.md beside the data, with plots in README.png.

Per task: rows in, kept and dropped by reason; where positives ranked; scores of positives, chosen
negatives and strangers; suspected false negatives; dropped rows with what outranked them. Everything
comes from the records of the tasks, so finished tasks need not be opened again, and holds no time or
place, so the same run gives the same bytes.

Plots need matplotlib (an extra); without it the text says the same in numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kalm_min.data import TrainingData
from kalm_min.files import atomic_write, write_text
from kalm_min.mining.catalogue import Catalogue, Ints
from kalm_min.mining.negatives import KEPT, OUTRANKED, SHORT, random_keys
from kalm_min.mining.selection import BINS, Selection, score_histogram

_RANKS = (1, 2, 6, 11, 21, 51, 101, 201)  # where the bins of the positive's rank begin
_SHOWN = 20  # dropped rows, and suspected negatives, per task
_SUSPECT = 0.95  # of the positive's score: what NV-Retriever would not take
_CUT = 240  # characters of a text

_COUNTS = ("rows", "kept", "outranked", "short", "kept_with_fewer", "negatives", "suspects")

Summary = dict[str, Any]


def summarise(
    data: TrainingData,
    catalogue: Catalogue,
    selection: Selection,
    text: Callable[[int], str],
    corpus_size: int,
) -> Summary:
    """The record of a task: counts, histograms and examples, as JSON holds them."""
    fate, negatives = selection.fate, selection.negatives
    chosen = negatives[fate == KEPT] >= 0  # (kept, n)
    counts = {
        "rows": catalogue.size,
        "kept": int((fate == KEPT).sum()),
        "outranked": int((fate == OUTRANKED).sum()),
        "short": int((fate == SHORT).sum()),
        "kept_with_fewer": int((~chosen.all(1)).sum()),
        "negatives": int(chosen.sum()),
        "corpus": corpus_size,
    }
    best = np.maximum.reduceat(selection.positive_scores, catalogue.starts[:-1])
    suspects = ((fate == KEPT)[:, None] & (negatives >= 0) & (best > 0)[:, None]) & (
        selection.negative_scores >= _SUSPECT * best[:, None]
    )
    ranks = np.where(selection.beyond, -1, selection.ahead + 1)
    of_kept = np.repeat(fate == KEPT, np.diff(catalogue.starts))
    return counts | {
        "suspects": int(suspects.sum()),
        "ranks": _rank_histogram(ranks),
        "scores": {
            "positives": _histogram(selection.positive_scores[of_kept]),
            "negatives": _histogram(selection.negative_scores[fate == KEPT][chosen]),
            "strangers": selection.neighbour_histogram.tolist(),
        },
        "dropped": [
            _dropped(data, catalogue, selection, text, row, int(ranks[row]))
            for row in _sample(catalogue, fate == OUTRANKED)
        ],
        "suspected": [
            _suspected(data, catalogue, selection, text, row, suspects[row])
            for row in _sample(catalogue, suspects.any(1))
        ],
    }


def copied(rows: int) -> Summary:
    """The record of a task that is not mined."""
    counts = dict.fromkeys(_COUNTS, 0) | {"rows": rows, "kept": rows, "corpus": 0}
    scores = dict.fromkeys(("positives", "negatives", "strangers"), [0] * BINS)
    ranks = [0] * (len(_RANKS) + 1)
    return counts | {"ranks": ranks, "scores": scores, "dropped": [], "suspected": []}


def _histogram(scores: npt.NDArray[np.float32]) -> list[int]:
    return score_histogram(scores[np.isfinite(scores)]).tolist()


def _rank_histogram(ranks: Ints) -> list[int]:
    """Rows by the rank of their best positive; the last are those below every listed document."""
    edges = [*_RANKS, np.iinfo(np.int64).max]
    return [*np.histogram(ranks[ranks > 0], bins=edges)[0].tolist(), int((ranks < 0).sum())]


def _sample(catalogue: Catalogue, where: npt.NDArray[np.bool_]) -> list[int]:
    """Some of the rows, at random but always the same ones, in their order."""
    rows = np.flatnonzero(where)
    hashes = catalogue.queries.hashes[catalogue.row_query[rows]]
    keys = random_keys(hashes, rows[:, None].astype(np.int64), 0)[:, 0]
    return sorted(rows[np.argsort(keys, kind="stable")[:_SHOWN]].tolist())


def _dropped(
    data: TrainingData,
    catalogue: Catalogue,
    selection: Selection,
    text: Callable[[int], str],
    row: int,
    rank: int,
) -> dict[str, Any]:
    example = data[catalogue.first + row]
    scores = selection.positive_scores[catalogue.starts[row] : catalogue.starts[row + 1]]
    place = int(scores.argmax())
    return {
        "query": _clip(example.query),
        "positive": _clip(example.positives[place]),
        "positive_score": _round(scores[place]),
        "rank": rank,
        "ahead": int(selection.ahead[row]),
        "rival": _clip(text(int(selection.rivals[row]))) if selection.rivals[row] >= 0 else None,
        "rival_score": _round(selection.rival_scores[row]),
    }


def _suspected(
    data: TrainingData,
    catalogue: Catalogue,
    selection: Selection,
    text: Callable[[int], str],
    row: int,
    suspects: npt.NDArray[np.bool_],
) -> dict[str, Any]:
    example = data[catalogue.first + row]
    scores = selection.positive_scores[catalogue.starts[row] : catalogue.starts[row + 1]]
    place = int(scores.argmax())
    column = int(np.where(suspects, selection.negative_scores[row], -np.inf).argmax())
    return {
        "query": _clip(example.query),
        "positive": _clip(example.positives[place]),
        "positive_score": _round(scores[place]),
        "negative": _clip(text(int(selection.negatives[row, column]))),
        "negative_score": _round(selection.negative_scores[row, column]),
    }


def _clip(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _CUT else text[: _CUT - 1] + "…"


def _round(score: float) -> float | None:
    return round(float(score), 4) if np.isfinite(score) else None


# ---- the page ------------------------------------------------------------------------------------


def totals(summaries: Sequence[Summary]) -> dict[str, int]:
    """Sums over tasks. Every row is in one of kept, outranked, short."""
    total = {name: sum(summary[name] for summary in summaries) for name in _COUNTS}
    assert total["rows"] == total["kept"] + total["outranked"] + total["short"]
    return total


def write(
    folder: Path, tasks: Sequence[str], summaries: Sequence[Summary], facts: Mapping[str, Any]
) -> None:
    """Write README.md, and README.png where matplotlib is installed."""
    image = _plot(tasks, summaries)
    if image is not None:
        with atomic_write(folder / "README.png") as file:
            file.write(image)
    write_text(folder / "README.md", markdown(tasks, summaries, facts, image is not None))


def markdown(
    tasks: Sequence[str], summaries: Sequence[Summary], facts: Mapping[str, Any], plotted: bool
) -> str:
    """The report as text."""
    total = totals(summaries)
    model, rules = facts["model"], facts["rules"]
    settings = ", ".join(f"{name} {_said(value)}" for name, value in rules.items())
    others = "".join(
        f" {name}: {facts[name]}." for name in ("pool", "scorer", "index") if facts[name]
    )
    parts = [
        "# Mined training data",
        (
            f"Checkpoint {model['checkpoint'][:12]}, {model['dtype']}, at most {model['max_length']} "
            f"tokens. Rules: {settings}.{others}"
        ),
        (
            f"{total['rows']:,} rows in = {total['kept']:,} kept + {total['outranked']:,} dropped as "
            f"outranked + {total['short']:,} dropped for too few negatives. "
            f"{total['kept_with_fewer']:,} kept rows have fewer negatives than asked for; "
            f"{total['suspects']:,} of {total['negatives']:,} negatives score at least "
            f"{_SUSPECT:.0%} of the row's best positive."
        ),
        _count_table(tasks, summaries),
        "## Where the best positive ranks",
        (
            "Among the documents that are not known to answer the query; the last column: below all "
            "that were listed."
        ),
        _rank_table(tasks, summaries),
        "## Scores",
        (
            "10th, 50th and 90th percentile, to a hundredth. Strangers are all listed documents that "
            "are not known to answer the query."
        ),
        _score_table(tasks, summaries),
    ]
    if plotted:
        parts.append("![rows, ranks and scores](README.png)")
    for task, summary in zip(tasks, summaries, strict=True):
        parts += _examples(task, summary)
    return "\n\n".join(parts) + "\n"


def _said(value: object) -> str:
    if isinstance(value, list | tuple):
        return "-".join(map(str, value))
    return "none" if value is None else str(value)


def _count_table(tasks: Sequence[str], summaries: Sequence[Summary]) -> str:
    names = (*_COUNTS, "corpus")
    head = ["task", "rows", "kept", "outranked", "too few", "kept with fewer", "negatives"]
    head += ["suspects", "corpus"]
    recalls = [summary.get("recall") for summary in summaries]
    approximate = any(recall is not None for recall in recalls)
    rows = [
        [task, *(f"{summary[name]:,}" for name in names)]
        + ([_said(recall and round(recall, 4))] if approximate else [])
        for task, summary, recall in zip(tasks, summaries, recalls, strict=True)
    ]
    return table([*head, "recall"] if approximate else head, rows)


def _rank_table(tasks: Sequence[str], summaries: Sequence[Summary]) -> str:
    ends = [str(end - 1) for end in _RANKS[1:]] + [""]
    head = [
        f"{start}" if str(start) == end else f"{start}-{end}"
        for start, end in zip(_RANKS, ends, strict=True)
    ]
    rows = [
        [task, *(f"{count:,}" for count in summary["ranks"])]
        for task, summary in zip(tasks, summaries, strict=True)
    ]
    return table(["task", *head, "below"], rows)


def _score_table(tasks: Sequence[str], summaries: Sequence[Summary]) -> str:
    kinds = ("positives", "negatives", "strangers")
    rows = [
        [task, *(_percentiles(summary["scores"][kind]) for kind in kinds)]
        for task, summary in zip(tasks, summaries, strict=True)
    ]
    return table(["task", *kinds], rows)


def _percentiles(histogram: Sequence[int]) -> str:
    """The centre of the bins that hold the 10th, 50th and 90th percentile."""
    sums = np.cumsum(histogram)
    if sums[-1] == 0:
        return "none"
    places = np.searchsorted(sums, np.array([0.1, 0.5, 0.9]) * sums[-1])
    return " ".join(f"{(place + 0.5) * 2 / BINS - 1:.2f}" for place in places)


def _examples(task: str, summary: Summary) -> list[str]:
    """Sections of a task; none when nothing was dropped or suspected."""
    parts: list[str] = []
    if summary["dropped"]:
        parts.append(
            f"## {task}: {len(summary['dropped'])} of {summary['outranked']} outranked rows"
        )
        rows = [
            [
                one["query"],
                one["positive"],
                f"{one['positive_score']}",
                str(one["rank"]) if one["rank"] > 0 else f"> {one['ahead']}",
                one["rival"] or "",
                f"{one['rival_score']}",
            ]
            for one in summary["dropped"]
        ]
        head = ["query", "its best positive", "score", "rank", "the first stranger", "score"]
        parts.append(table(head, rows))
    if summary["suspected"]:
        parts.append(f"## {task}: suspected false negatives")
        rows = [
            [
                one["query"],
                one["positive"],
                f"{one['positive_score']}",
                one["negative"],
                f"{one['negative_score']}",
            ]
            for one in summary["suspected"]
        ]
        parts.append(table(["query", "its best positive", "score", "negative", "score"], rows))
    return parts


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [list(head), ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plot(tasks: Sequence[str], summaries: Sequence[Summary]) -> bytes | None:
    """Rows, ranks and scores as a PNG; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(10, 4 + 0.22 * len(tasks)), layout="constrained")
    rows, ranks, scores = figure.subplots(3, 1, height_ratios=[1 + len(tasks) / 8, 1, 1])
    left = np.zeros(len(tasks))
    for name in ("kept", "outranked", "short"):
        counts = np.array([summary[name] for summary in summaries])
        rows.barh(range(len(tasks)), counts, left=left, label=name)
        left += counts
    rows.set(yticks=range(len(tasks)), yticklabels=tasks, title="rows")
    rows.invert_yaxis()
    rows.legend()
    labels = [*(f"from {start}" for start in _RANKS), "below"]
    ranks.bar(labels, np.sum([summary["ranks"] for summary in summaries], axis=0))
    ranks.set(title="rank of the best positive")
    centres = (np.arange(BINS) + 0.5) * 2 / BINS - 1
    for kind in ("positives", "negatives", "strangers"):
        counts = np.sum([summary["scores"][kind] for summary in summaries], axis=0)
        scores.plot(centres, counts / max(1, counts.sum()), label=kind)
    scores.set(title="scores, share of all")
    scores.legend()
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
