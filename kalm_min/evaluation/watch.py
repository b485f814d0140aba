"""What a run shows of itself: a table drawn in place on a terminal, plain lines elsewhere.

    3/12 done, about 4m10s left
    device  task     texts  texts/s  for
    cuda:0  FiQA     40960     3120  13s
    cuda:1  SciFact   1024      980   1s

A finished task leaves a line that stays. Not here: what decides anything (`runner`).
"""

import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TextIO

from kalm_min.evaluation.plan import PlannedTask
from kalm_min.progress import duration

_QUIET_SECONDS = 60.0  # without a terminal, the longest time without a line
_HEAD = ("device", "task", "texts", "texts/s", "for")


@dataclass(frozen=True, slots=True)
class Activity:
    """A device and what it is doing: a task since `seconds`, or another state in a word."""

    device: str
    task: str
    texts: int = 0
    seconds: float | None = None

    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        if self.seconds is None:
            return (self.device, self.task, "", "", "")
        rate = self.texts / self.seconds if self.seconds else 0
        return (self.device, self.task, str(self.texts), f"{rate:.0f}", duration(self.seconds))


class Display:
    """Lines that stay, and below them, on a terminal, a table of what goes on."""

    def __init__(self, stream: TextIO, tasks: Iterable[PlannedTask]) -> None:
        """Show the run of `tasks` on `stream`."""
        self.stream, self.is_terminal = stream, stream.isatty()
        self.left = {task.name: task.characters + 1 for task in tasks}
        self.total, self.work = len(self.left), sum(self.left.values())
        self.start = self.last = time.monotonic()
        self.drawn = 0

    def line(self, text: str) -> None:
        """Write a line that stays."""
        self.clear()
        self.stream.write(text + "\n")
        self.stream.flush()
        self.last = time.monotonic()

    def done(self, task: PlannedTask, score: str, seconds: float, worker: str) -> None:
        """Say that a task has its score, or none."""
        self.left.pop(task.name, None)
        number = f"[{self.total - len(self.left):{len(str(self.total))}}/{self.total}]"
        parts = [f"{number} {task.name}", f"{task.main_score} {score}", duration(seconds), worker]
        left = self._time_left()
        self.line("  ".join(parts) + (f"  ({left} left)" if left else ""))

    def status(self, activities: Sequence[Activity]) -> None:
        """Draw the table anew; without a terminal, write a line if there was none for a while."""
        left = self._time_left()
        head = f"{self.total - len(self.left)}/{self.total} done" + (
            f", about {left} left" if left else ""
        )
        if self.is_terminal:
            size = shutil.get_terminal_size()
            table = _table([_HEAD, *(activity.cells() for activity in activities)])
            shown = [line[: size.columns - 1] for line in [head, *table][: size.lines - 1]]
            self.clear()
            self.stream.write("".join(line + "\n" for line in shown))
            self.stream.flush()
            self.drawn = len(shown)
        elif time.monotonic() - self.last >= _QUIET_SECONDS:
            parts = [head]
            for activity in activities:
                device, task, texts, _, age = activity.cells()
                parts.append(f"{device} {task} {texts} texts {age}" if age else f"{device} {task}")
            self.line(" | ".join(parts))

    def clear(self) -> None:
        """Wipe the table."""
        if self.drawn:
            self.stream.write(f"\x1b[{self.drawn}F\x1b[J")  # so many lines up, all below erased
            self.stream.flush()
            self.drawn = 0

    def _time_left(self) -> str:
        """If a character goes on costing what it cost so far; "" while nothing is finished."""
        left = sum(self.left.values())
        if not left or left == self.work:
            return ""
        return duration((time.monotonic() - self.start) * left / (self.work - left))


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
