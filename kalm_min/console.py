"""Long work shows itself: a bar on a terminal, plain lines in a log.

A bar written into a file is noise, and a silent job looks like a hung one; so without a terminal a
line goes out every few seconds, with the time that is left.
"""

import time
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm  # comes with tokenizers, through huggingface_hub


class Progress:
    """`with Progress(...) as progress: ... progress.update(n, "loss 0.31")`."""

    def __init__(
        self,
        total: int,
        unit: str,
        stream: TextIO,
        *,
        title: str = "",
        done: int = 0,
        interval: float = 10.0,
    ) -> None:
        """Start at `done` of `total` units, drawn on `stream`; `interval` seconds between plain lines."""
        self.total, self.unit, self.stream, self.title = total, unit, stream, title
        self.interval = interval
        self.done = self.first = done
        self._start = self._last = time.monotonic()
        self._bar = (
            tqdm(total=total, unit=unit, file=stream, initial=done, desc=title, smoothing=0.1)
            if stream.isatty()
            else None
        )

    def update(self, steps: int, note: str = "") -> None:
        """Advance by `steps`; `note` says how it goes."""
        self.done += steps
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(steps)
        elif time.monotonic() - self._last >= self.interval or self.done >= self.total:
            self._line(note)

    def line(self, text: str) -> None:
        """Write a line that stays, on a terminal above the bar."""
        tqdm.write(text, file=self.stream)
        self.stream.flush()
        self._last = time.monotonic()

    def _line(self, note: str) -> None:
        """One plain line: how far, how it goes, how long still."""
        self._last = time.monotonic()
        elapsed = self._last - self._start
        left = elapsed / max(1, self.done - self.first) * (self.total - self.done)
        parts = [f"{self.title} {self.done}/{self.total} {self.unit}".strip(), note]
        parts.append(f"{format_duration(elapsed)} elapsed, {format_duration(left)} left")
        self.stream.write(" | ".join(part for part in parts if part) + "\n")
        self.stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the bar, leaving its last state on the terminal."""
        if self._bar is not None:
            self._bar.close()


def format_duration(seconds: float) -> str:
    """`42s`, `3m05s` or `2h07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """A Markdown table whose columns line up when printed; `right` holds the numeric columns."""
    cells = [
        [cell.replace("|", "\\|").replace("\n", "\\n") for cell in row] for row in [head, *rows]
    ]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]
    rule = [
        "-" * (width - 1) + ":" if i in right else "-" * width for i, width in enumerate(widths)
    ]
    aligned = [
        [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in cells
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [aligned[0], rule, *aligned[1:]])
