"""What a run shows: a table that is redrawn, or few lines."""

import io

from kalm_min.evaluation import watch
from kalm_min.evaluation.plan import Instruction, PlannedTask
from kalm_min.evaluation.watch import Activity, Display

BUSY = Activity("cuda:0", "SciFact", texts=3000, seconds=2.0, left=70.0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def tasks(*names):
    return [PlannedTask(name, "STS", "cosine_spearman", "1", 99, Instruction()) for name in names]


def test_a_terminal_gets_a_table_that_is_redrawn():
    """Promise: columns line up, and the table is wiped before it is drawn again or a line stays."""
    stream = Terminal()
    display = Display(stream, tasks("SciFact", "FiQA"))
    display.status([BUSY, Activity("cpu", "(starting)")], 90.0)
    display.status([BUSY, Activity("cpu", "(starting)")], 90.0)  # nothing new, nothing drawn
    assert stream.getvalue().splitlines() == [
        "0/2 done, about 1m30s left",
        "device  task        texts  texts/s  for   left",
        "cuda:0  SciFact      3000     1500   2s  1m10s",
        "cpu     (starting)",
    ]
    display.line("stays")
    assert stream.getvalue().endswith("\x1b[4F\x1b[Jstays\n")
    display.clear()
    assert stream.getvalue().endswith("stays\n")


def test_a_table_larger_than_the_terminal_is_cut(monkeypatch):
    """Bug to avoid: lines that wrap or scroll away cannot be wiped."""
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "5")
    stream = Terminal()
    Display(stream, tasks("SciFact")).status([BUSY] * 9)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) == 19


def test_a_log_gets_a_line_a_minute(monkeypatch):
    stream = io.StringIO()
    display = Display(stream, tasks("SciFact", "FiQA"))
    display.status([BUSY])
    assert stream.getvalue() == ""
    monkeypatch.setattr(watch, "_QUIET_SECONDS", 0.0)
    display.status([BUSY, Activity("cpu", "(idle)")])
    assert stream.getvalue() == "0/2 done | cuda:0 SciFact 3000 texts 2s | cpu (idle)\n"


def test_a_finished_task_says_how_long_the_others_take():
    stream = io.StringIO()
    display = Display(stream, tasks("SciFact", "FiQA"))
    display.status([BUSY], 8.0)
    display.done(tasks("SciFact")[0], "50.00", 3.0, "cpu")
    display.done(tasks("FiQA")[0], "60.00", 3.0, "cpu")
    assert stream.getvalue().splitlines() == [
        "[1/2] SciFact  cosine_spearman 50.00  3s  cpu  (8s left)",
        "[2/2] FiQA  cosine_spearman 60.00  3s  cpu",
    ]
