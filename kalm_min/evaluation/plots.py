"""Pictures of an evaluation: means by type, scores by dimension, what each device did when.

They need matplotlib (an extra). Where there is room, a name stands at what it names instead of in
a legend.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from kalm_min.evaluation.report import Row
from kalm_min.files import atomic_write

# Okabe and Ito's colours, told apart by colour-blind eyes too; grey for what is not ours.
_COLOURS = {
    "Classification": "#0072B2",
    "Clustering": "#E69F00",
    "PairClassification": "#009E73",
    "Reranking": "#CC79A7",
    "Retrieval": "#D55E00",
    "STS": "#56B4E9",
    "Summarization": "#8C6D46",
    "BitextMining": "#B8A900",
}
_OTHER, _GREY, _DARK = "#777777", "#9A9A9A", "#333333"
_MARKERS = ("D", "o", "s")  # of releases
_CHARACTER = 0.058  # inches of width in a task's name on the timeline
_WIDTH = 9.0  # inches
_SHORT_BAR = 8  # a score whose bar has no room for its number
_LONG_GAP = 60.0  # seconds; a shorter one is shown as it was


def draw(folder: Path, rows: Sequence[Row], timeline: Path) -> list[str]:
    """Write what there is to draw into `folder` as PNG; nothing without matplotlib.

    Args:
        folder: where to.
        rows: of the report.
        timeline: file of spans that a run leaves; it may be absent.

    Returns:
        The names of the files written.
    """
    if find_spec("matplotlib") is None:
        return []
    tasks = [row for row in rows if row.kind == "task"]
    done = [row for row in tasks if None not in row.scores.values()]
    figures = {
        "types.png": _types(done) if done else None,
        "dimensions.png": _dimensions(done) if done and len(done[0].scores) > 1 else None,
        "timeline.png": _timeline(spans) if (spans := _read_spans(timeline)) else None,
    }
    for name, figure in figures.items():
        if figure is not None:
            image = BytesIO()
            figure.savefig(image, format="png", dpi=150)
            with atomic_write(folder / name) as file:
                file.write(image.getvalue())
    return [name for name, figure in figures.items() if figure is not None]


def _figure(height: float) -> tuple[Any, Any]:
    """An empty figure and its axes, without the frame's upper and right side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_DARK, length=0)
    return figure, axes


def _by_type(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.type):
        groups.setdefault(row.type, []).append(row)
    return groups


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _types(rows: Sequence[Row]) -> Any:
    """A bar a type at the largest dimension; marks for releases published on all of its tasks."""
    groups = _by_type(rows)
    dim = max(rows[0].scores)
    figure, axes = _figure(1.2 + 0.4 * len(groups))
    ours = [_mean([row.scores[dim] or 0 for row in group]) for group in groups.values()]
    axes.barh(range(len(groups)), ours, height=0.62, color=_COLOURS["Classification"], alpha=0.6)
    marks: dict[str, list[tuple[float, int]]] = {}
    for place, group in enumerate(groups.values()):
        fits = ours[place] > _SHORT_BAR
        axes.text(
            1 if fits else max(0, ours[place]) + 1,
            place,
            f"{ours[place]:.1f}",
            va="center",
            color="white" if fits else _DARK,
            weight="bold",
            size=9,
        )
        known = [row.published for row in group]
        for version in known[0] if all(known) else ():
            marks.setdefault(version, []).append((_mean([one[version] for one in known]), place))
    for shade, (marker, (version, points)) in enumerate(zip(_MARKERS, marks.items(), strict=False)):
        axes.plot(
            *zip(*points, strict=True),
            marker=marker,
            markersize=5,
            color=_DARK,
            markerfacecolor=("white", _GREY, _DARK)[shade],
            linestyle="none",
            label=f"KaLM {version}",
        )
    names = [
        f"{kind} ({len(group)} task{'s' * (len(group) > 1)})" for kind, group in groups.items()
    ]
    axes.set_yticks(range(len(groups)), names)
    axes.set(xlim=(min(0, *ours), 100), ylim=(len(groups) - 0.5, -0.5))
    axes.set_title(f"Mean score by type, {dim} dimensions")
    if marks:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _dimensions(rows: Sequence[Row]) -> Any:
    """A line a type over the dimensions, named at its right end."""
    dims = sorted(rows[0].scores)
    figure, axes = _figure(4.6)
    ends: dict[str, float] = {}
    for kind, group in _by_type(rows).items():
        means = [_mean([row.scores[dim] or 0 for row in group]) for dim in dims]
        ends[kind] = means[-1]
        axes.plot(
            range(len(dims)), means, marker="o", markersize=4, color=_COLOURS.get(kind, _OTHER)
        )
    low, high = axes.get_ylim()
    for kind, place in _apart(ends, (high - low) / 20).items():
        axes.annotate(
            f"{kind} {ends[kind]:.1f}",
            (len(dims) - 1, ends[kind]),
            (len(dims) - 1 + 0.04 * len(dims), place),
            color=_COLOURS.get(kind, _OTHER),
            va="center",
            size=9,
            annotation_clip=False,
        )
    axes.set_xticks(range(len(dims)), map(str, dims))
    axes.set(xlabel="dimensions kept", title="Mean score by dimension")
    axes.grid(axis="y", color="#E5E5E5")
    return figure


def _apart(places: Mapping[str, float], least: float) -> dict[str, float]:
    """The same places moved so far that any two lie `least` apart, in their order."""
    order = sorted(places, key=lambda name: places[name])
    moved = [places[name] for name in order]
    for _ in range(100):
        for i in range(len(moved) - 1):
            overlap = least - (moved[i + 1] - moved[i])
            if overlap > 0:
                moved[i] -= overlap / 2
                moved[i + 1] += overlap / 2
    return dict(zip(order, moved, strict=True))


def _read_spans(path: Path) -> list[dict[str, Any]]:
    """The spans of a timeline, but for lines that a kill has torn."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    spans: list[dict[str, Any]] = []
    for line in lines:
        with suppress(ValueError):
            spans.append(json.loads(line))
    return spans


def _timeline(spans: Sequence[dict[str, Any]]) -> Any:
    """A row a device, a bar a task, named where there is room; failed attempts are hatched."""
    hosts = {span["host"] for span in spans}
    lanes = sorted({_lane(span, hosts) for span in spans}, key=lambda lane: (len(lane), lane))
    clock, pauses = _without_pauses(spans)
    total = max(clock(span["end"]) for span in spans) or 1.0
    unit, seconds = next(
        (unit for unit in (("hours", 3600), ("minutes", 60)) if total > 2 * unit[1]), ("seconds", 1)
    )
    figure, axes = _figure(1.3 + 0.42 * len(lanes))
    for span in spans:
        start, end = clock(span["start"]), clock(span["end"])
        lane, failed = lanes.index(_lane(span, hosts)), _is_lost(span)
        axes.barh(
            lane,
            (end - start) / seconds,
            left=start / seconds,
            height=0.62,
            color=_COLOURS.get(span["type"], _OTHER),
            alpha=0.4 if failed else 0.85,
            hatch="////" if failed else None,
            edgecolor="white",
            linewidth=0.5,
        )
        room = int((end - start) / total * (_WIDTH - 1.2) / _CHARACTER)  # characters
        name = span["task"]
        if room >= min(len(name), 5):
            axes.text(
                (start + end) / 2 / seconds,
                lane,
                name if len(name) <= room else f"{name[: room - 1]}…",
                ha="center",
                va="center",
                size=7,
                color=_DARK if failed else "white",
            )
    for pause in pauses:
        axes.axvline(pause / seconds, color=_GREY, linestyle=":", linewidth=1)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set(xlim=(0, total / seconds), ylim=(len(lanes) - 0.5, -0.5), xlabel=unit)
    notes = ["hatched: failed or tried again"] if any(map(_is_lost, spans)) else []
    notes += ["later runs after the dotted lines"] if pauses else []
    axes.set_title("What each device did" + (f" ({'; '.join(notes)})" if notes else ""))
    _name_colours(figure, sorted({span["type"] for span in spans}))
    return figure


def _name_colours(figure: Any, types: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=_COLOURS.get(kind, _OTHER), alpha=0.85, label=kind) for kind in types]
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=8,
        handlelength=1,
        handleheight=1,
    )


def _is_lost(span: Mapping[str, Any]) -> bool:
    return span["outcome"] != "done"


def _lane(span: Mapping[str, Any], hosts: set[str]) -> str:
    return f"{span['host']} {span['device']}" if len(hosts) > 1 else span["device"]


def _without_pauses(spans: Sequence[Mapping[str, Any]]) -> tuple[Any, list[float]]:
    """A clock (time -> seconds from the first start) that skips long times when nothing ran.

    And where on that clock the skipped times lie.
    """
    skipped: list[tuple[float, float]] = []
    busy_until = min(span["start"] for span in spans)
    first = busy_until
    for span in sorted(spans, key=lambda span: span["start"]):
        if span["start"] - busy_until > _LONG_GAP:
            skipped.append((busy_until, span["start"] - busy_until))
        busy_until = max(busy_until, span["end"])

    def clock(time: float) -> float:
        return time - first - sum(length for start, length in skipped if start < time)

    return clock, [clock(start) for start, _ in skipped]
