"""Progress of long work (a bar on a terminal, plain lines in a log), and Markdown tables.

A bar written into a file is noise, and a silent job looks like a hung one; so without a terminal a
line is written every few seconds, with the estimated time left.
"""

import time
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from shutil import get_terminal_size
from typing import Self, TextIO

from tqdm import tqdm  # comes with tokenizers, through huggingface_hub

_UNSEEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")  # kinds of characters that draw nothing


@dataclass
class Progress:
    """`with Progress(...) as progress: ... progress.update(n, "loss 0.31")`."""

    total: int
    unit: str
    stream: TextIO
    title: str = ""
    done: int = 0  # units finished by an earlier run
    interval: float = 10.0  # seconds between plain lines

    def __post_init__(self) -> None:
        self._first, self._start = self.done, time.monotonic()
        self._last, self._bar = self._start, None
        if self.stream.isatty():  # only then: tqdm overwrites its line, and starts a thread
            self._bar = tqdm(
                desc=printable(self.title),
                total=self.total,
                unit=self.unit,
                file=self.stream,
                initial=self.done,
                ncols=get_terminal_size().columns - 1,  # 79 if unknown; tqdm would wipe 10 columns
                bar_format="{desc}: {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} {unit} "
                "[{remaining} left{postfix}]",  # what does not fit is cut, not the bar
            )

    def update(self, steps: int, note: str = "") -> None:
        """Advance by `steps`; `note` is shown beside the count."""
        self.done, note = self.done + steps, printable(note)
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(steps)
        elif now - self._last >= self.interval or self.done >= self.total:
            self._last, elapsed = now, now - self._start
            left = elapsed / max(1, self.done - self._first) * (self.total - self.done)
            parts = [f"{printable(self.title)} {self.done}/{self.total} {self.unit}".strip(), note]
            parts.append(f"{format_duration(elapsed)} elapsed, {format_duration(left)} left")
            self.stream.write(" | ".join(filter(None, parts)) + "\n")
            self.stream.flush()

    def line(self, text: str) -> None:
        """Write a permanent line; on a terminal it appears above the bar."""
        tqdm.write(printable(text), file=self.stream)
        self.stream.flush()
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the bar, leaving its last state on the terminal."""
        if self._bar is not None:
            self._bar.close()


def printable(text: str) -> str:
    """The text with control characters and the like as codes; newlines stay.

    Text of others (names of tasks, folders, results) could otherwise move a terminal's cursor, hide
    what was written, or pretend to be another line's.
    """
    unseen = {one for one in text if one != "\n" and unicodedata.category(one) in _UNSEEN}
    return text.translate({ord(one): one.encode("unicode_escape").decode() for one in unseen})


def format_duration(seconds: float) -> str:
    """`42s`, `3m05s` or `2h07m`."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{left:02d}s" if minutes else f"{left}s"


def count(number: int, noun: str) -> str:
    """`1 task`, `2,000 tasks`, `2 processes`."""
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """A Markdown table with aligned columns; those whose indices are in `right` align right."""
    cells = [
        [printable(one.replace("|", "\\|").replace("\n", "\\n")) for one in row]
        for row in [head, *rows]
    ]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * (n - 1) + ":" if i in right else "-" * n for i, n in enumerate(widths)])
    form = [f"{{:{'>' if i in right else '<'}{n}}}" for i, n in enumerate(widths)]
    return "\n".join(f"| {' | '.join(form)} |".format(*row) for row in cells)
