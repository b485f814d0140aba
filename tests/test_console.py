"""kalm_min.console: a bar on a terminal, plain lines in a log, tables."""

import io

import pytest

from kalm_min import console
from kalm_min.console import Progress, count, format_duration, printable, table


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("你好, naïve 🙂", "你好, naïve 🙂"),
        ("a\x1b[2Jb\rc\x07", "a\\x1b[2Jb\\rc\\x07"),
        ("evil\u202egnp.exe", "evil\\u202egnp.exe"),
        ("\x9b31m\u2028\udcff", "\\x9b31m\\u2028\\udcff"),
        ("two\nlines", "two\nlines"),
    ],
)
def test_foreign_text_is_made_visible(text, shown):
    """No escape sequence or direction mark reaches a terminal, from a table, a bar or a line."""
    assert printable(text) == shown
    stream = io.StringIO()
    with Progress(1, "steps", stream, title=text) as progress:
        progress.line(text)
        progress.update(1, text)
    assert stream.getvalue().count(shown) == 3
    assert "\x1b" not in table(["name"], [[text]])


def test_a_bar_of_eighty_columns():
    """The bar keeps its ten columns; what does not fit is cut at the end."""
    stream = Terminal()
    with Progress(1000, "steps", stream, title="train") as progress:
        progress.update(500, "loss 0.5432, 12,345 tokens/s and more that is said")
    last = stream.getvalue().rstrip().rpartition("\r")[2]
    assert len(last) <= 79
    assert last.partition("|")[2].index("|") == 10


def test_plurals():
    assert [count(n, "task") for n in (0, 1, 2000)] == ["0 tasks", "1 task", "2,000 tasks"]
    assert count(2, "process") == "2 processes"
