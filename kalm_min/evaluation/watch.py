"""What a run shows of itself: a table drawn in place on a terminal, plain lines elsewhere.

    3/12 done, about 4m10s left
    device  task     texts  texts/s  for   left
    cuda:0  FiQA     40960     3120  13s  3m40s
    cuda:1  SciFact   1024      980   1s     6s

A finished task leaves a line that stays. Not here: what decides anything (`runner`).
"""

import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TextIO

from kalm_min.console import format_duration
from kalm_min.evaluation.plan import PlannedTask

_QUIET_SECONDS = 60.0  # without a terminal, the longest time without a line
_HEAD = ("device", "task", "texts", "texts/s", "for", "left")


@dataclass(frozen=True, slots=True)
class Activity:
    """A device and what it is doing: a task, or another state in a word."""

    device: str
    task: str
    texts: int = 0
    seconds: float | None = None
    """For which it is at the task."""
    left: float | None = None
    """Seconds it will go on; None while nothing is known."""

    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        if self.seconds is None:
            return (self.device, self.task, "", "", "", "")
        rate = self.texts / self.seconds if self.seconds else 0
        left = "" if self.left is None else format_duration(self.left)
        age = format_duration(self.seconds)
        return (self.device, self.task, f"{self.texts}", f"{rate:.0f}", age, left)


class Display:
    """Lines that stay, and below them, on a terminal, a table of what goes on."""

    def __init__(self, stream: TextIO, tasks: Iterable[PlannedTask]) -> None:
        """Show the run of `tasks` on `stream`."""
        self.stream, self.is_terminal = stream, stream.isatty()
        self.total, self.finished = len(list(tasks)), 0
        self.last = time.monotonic()
        self.left = ""
        self.table: list[str] = []

    def line(self, text: str) -> None:
        """Write a line that stays."""
        self.clear()
        self.stream.write(text + "\n")
        self.stream.flush()
        self.last = time.monotonic()

    def done(self, task: PlannedTask, score: str, seconds: float, worker: str) -> None:
        """Say that a task has its score, or none."""
        self.finished += 1
        number = f"[{self.finished:{len(str(self.total))}}/{self.total}]"
        parts = [
            f"{number} {task.name}",
            f"{task.main_score} {score}",
            format_duration(seconds),
            worker,
        ]
        more = self.left and self.finished < self.total
        self.line("  ".join(parts) + (f"  ({self.left} left)" if more else ""))

    def status(self, activities: Sequence[Activity], left: float | None = None) -> None:
        """Draw the table anew; without a terminal, write a line if there was none for a while.

        `left` is the number of seconds that the run will go on, if that is known.
        """
        self.left = "" if left is None else format_duration(left)
        head = f"{self.finished}/{self.total} done"
        head += f", about {self.left} left" if self.left else ""
        if self.is_terminal:
            size = shutil.get_terminal_size()
            table = [head, *_table([_HEAD, *(activity.cells() for activity in activities)])]
            table = [line[: size.columns - 1] for line in table[: size.lines - 1]]
            if table != self.table:
                self.clear()
                self.stream.write("".join(line + "\n" for line in table))
                self.stream.flush()
                self.table = table
        elif time.monotonic() - self.last >= _QUIET_SECONDS:
            parts = [head]
            for activity in activities:
                device, task, texts, _, age, _ = activity.cells()
                parts.append(f"{device} {task} {texts} texts {age}" if age else f"{device} {task}")
            self.line(" | ".join(parts))

    def clear(self) -> None:
        """Wipe the table."""
        if self.table:
            self.stream.write(
                f"\x1b[{len(self.table)}F\x1b[J"
            )  # so many lines up, all below erased
            self.stream.flush()
            self.table = []


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns that line up, the first two to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
