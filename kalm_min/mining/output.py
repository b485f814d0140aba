"""The mined folder: which files it may hold, and the lines of a task.

<output>/<task>.jsonl, <task>.toml    the mined data
<output>/README.md, .png, README.tasks/    the report
<output>/.mining/                     the store, and a record of each finished task
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kalm_min.data import TrainingData
from kalm_min.files import atomic_write, write_text
from kalm_min.mining.catalogue import Catalogue
from kalm_min.mining.negatives import KEPT
from kalm_min.mining.selection import Selection
from kalm_min.mining.store import Side

_ROWS = 8192  # whose negatives are read at a time
_WRITTEN = ("query", "pos", "pos_scores", "neg", "neg_scores")


def file_name(task: str) -> str:
    """A name that a file may have, and that reading the folder again does not skip."""
    name = task.replace("/", "%2F")
    return f"%2E{name[1:]}" if name.startswith(".") else name.replace("README", "%52EADME")


def check_output(output: Path, data: Path, names: Iterable[str]) -> None:
    """Refuse an output folder with data in it that this run would not replace, or its own input."""
    if output.resolve() in {data.resolve(), data.resolve().parent}:
        raise ValueError(f"{output}: expected another folder than that of the data")
    if not output.exists():
        return
    expected = {f"{name}{suffix}" for name in names for suffix in (".jsonl", ".toml")}
    for entry in sorted(output.iterdir()):
        if entry.name.startswith((".", "README")):
            continue
        if entry.name not in expected or not (output / ".mining").is_dir():
            raise ValueError(
                f"{output}: expected an empty folder or one that this data was mined into, "
                f"found {entry.name}"
            )


def write_task(path: Path, lines: Iterable[str], settings: Path) -> None:
    """Write the file of a task, and its settings beside it; neither, if there is no line."""
    lines, beside = iter(lines), path.with_suffix(".toml")
    first = next(lines, None)
    if first is None:  # An empty file is no task.
        path.unlink(missing_ok=True)
    else:
        with atomic_write(path, "w") as file:
            file.write(first)
            file.writelines(lines)
    if first is None or not settings.is_file():
        beside.unlink(missing_ok=True)
    else:
        write_text(beside, settings.read_text(encoding="utf-8"))


def copied_lines(data: TrainingData, rows: range) -> Iterator[str]:
    """Rows as they are."""
    return (json.dumps(data.record(row), ensure_ascii=False) + "\n" for row in rows)


def mined_lines(
    data: TrainingData, catalogue: Catalogue, selection: Selection, corpus: Side
) -> Iterator[str]:
    """The kept rows as they are, with their new negatives and scores."""
    kept = np.flatnonzero(selection.fate == KEPT)
    for start in range(0, len(kept), _ROWS):
        rows = kept[start : start + _ROWS]
        needed = np.unique(selection.negatives[rows]).tolist()  # read once, in order
        texts = {number: corpus.text(number) for number in needed if number >= 0}
        for row in rows.tolist():
            record = data.record(catalogue.first + row)
            there = selection.negatives[row] >= 0
            positives = slice(*catalogue.starts[row : row + 2])
            mined = {
                "query": record["query"],
                "pos": record["pos"],
                "pos_scores": _numbers(selection.positive_scores[positives]),
                "neg": [texts[number] for number in selection.negatives[row][there].tolist()],
                "neg_scores": _numbers(selection.negative_scores[row][there]),
            }
            rest = {key: value for key, value in record.items() if key not in _WRITTEN}
            yield json.dumps(mined | rest, ensure_ascii=False) + "\n"


def _numbers(scores: npt.NDArray[np.float32]) -> list[float]:
    """Scores with the digits that float32 vectors justify."""
    return [round(score, 6) for score in scores.tolist()]
