"""kalm_min.console: a bar on a terminal, plain lines in a log, tables."""

import io

import pytest

from kalm_min import console
from kalm_min.console import Progress, format_duration, table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_plain_lines(monkeypatch):
    """One line per interval and one at the end, with what was done before and the time left."""
    times = iter([0.0, 4.0, 12.0, 13.0, 14.0, 90.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    stream = io.StringIO()
    with Progress(10, "steps", stream, title="train", done=2) as progress:
        for _ in range(3):
            progress.update(2, "loss 0.5")
        progress.line("a line that stays")
        progress.update(2)
    assert stream.getvalue().splitlines() == [
        "train 6/10 steps | loss 0.5 | 12s elapsed, 12s left",
        "a line that stays",
        "train 10/10 steps | 1m30s elapsed, 0s left",
    ]


def test_a_terminal_gets_a_bar():
    """tqdm's bar, from where an earlier run ended, with the note beside it."""
    stream = Terminal()
    with Progress(4, "steps", stream, title="train", done=1) as progress:
        progress.update(3, "loss 0.5")
    assert "train: 100%" in stream.getvalue()
    assert "4/4" in stream.getvalue()
    assert "loss 0.5" in stream.getvalue()
    assert "elapsed" not in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_tables():
    """Columns line up, numbers to the right; what would break a row is escaped."""
    assert table(["name", "n"], [["a|b\nc", "1"], ["d", "1,000"]], right={1}) == (
        "| name    |     n |\n| ------- | ----: |\n| a\\|b\\nc |     1 |\n| d       | 1,000 |"
    )
    assert table(["name", "n"], []) == "| name | n   |\n| ---- | --- |"
