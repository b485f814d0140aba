"""The convert command: what arrives, what is refused, and what a second run does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import kalm_min.convert
from kalm_min.convert import main
from kalm_min.data import TrainingData

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path: Path, rows: list, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def row(query: str, **more) -> dict:
    return {"query": query, "pos": ["p"], "neg": ["n", "m"], **more}


@pytest.fixture
def hub(tmp_path):
    """Two tasks as the hub publishes them, with shards and a column of empty lists."""
    folder = tmp_path / "hub"
    write(folder / "paq" / "train-00000-of-00002.parquet", [row("0"), row("1")], row_group_size=1)
    write(folder / "paq" / "train-00001-of-00002.parquet", [row("2")])
    empty = {"neg": [], "relevance": 0.5, "id": 7}
    write(
        folder / "csl" / "train-00000-of-00001.parquet", [row("你好", **empty), row("b", **empty)]
    )
    (folder / "README.md").write_text("---")
    (folder / ".cache").mkdir()
    write(folder / ".cache" / "x" / "y.parquet", [row("no")])
    return folder


def convert(hub, output, *flags) -> int:
    return main([str(hub), "--output", str(output), *flags])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("flags", [(), ("--gzip",)])
def test_a_folder_of_tasks(hub, tmp_path, flags, capsys):
    """Every row of every shard arrives under its task, in order, and opens as training data."""
    assert convert(hub, tmp_path / "out", *flags) == 0
    data = TrainingData(tmp_path / "out")
    assert data.task_names == ["csl", "paq"]
    assert [example.query for example in data] == ["你好", "b", "0", "1", "2"]
    assert [example.negatives for example in data] == [()] * 2 + [("n", "m")] * 3
    assert data.record(0) == {"query": "你好", "pos": ["p"], "relevance": 0.5}
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "convert 5/5 rows" in shown.err
    assert "5 rows of 3 files" in shown.err


def test_a_file_alone_is_a_task(tmp_path):
    """As in training data, a single file in the folder is a task of its name."""
    write(tmp_path / "hub" / "nli.parquet", [row("0")])
    assert convert(tmp_path / "hub", tmp_path / "out") == 0
    assert TrainingData(tmp_path / "out").task_names == ["nli"]


def test_a_second_run_skips_what_is_finished(hub, tmp_path, capsys):
    """Finished files are left alone; a new or newer one is converted; other options are refused."""
    out = tmp_path / "out"
    convert(hub, out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")}
    write(hub / "new" / "a.parquet", [row("new")])
    assert convert(hub, out) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert "1 rows of 1 files" in capsys.readouterr().err
    assert convert(hub, out, "--split-instruction") == 2
    error = capsys.readouterr().err
    assert (
        f"{out}: converted before with other options (split_instruction was false, is true); give another"
        in error
    )


def test_an_interrupted_file_is_absent(hub, tmp_path, monkeypatch):
    """A kill in the middle of a file keeps the finished ones and leaves nothing of this one."""
    check = kalm_min.convert.problem_with_line

    def killed(record):
        if record["query"] == "1":
            raise KeyboardInterrupt
        return check(record)

    monkeypatch.setattr(kalm_min.convert, "problem_with_line", killed)
    assert convert(hub, tmp_path / "out") == 130
    names = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(names) == [".convert.json", "train-00000-of-00001.jsonl"]
    monkeypatch.undo()
    assert convert(hub, tmp_path / "out") == 0
    assert len(TrainingData(tmp_path / "out")) == 5


def test_bad_rows_are_named(hub, tmp_path, capsys):
    """File and row number from 1, across row groups; the other files are converted all the same."""
    bad = [row("0"), row(""), row("2"), {**row("3"), "pos": []}, {**row("4"), "pos": ["p", None]}]
    source = write(hub / "bad" / "x.parquet", bad, row_group_size=2)
    assert convert(hub, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{source}: not converted, 3 bad rows:" in error
    for number, problem in (
        (2, "expected 'query' to be a non-empty string, found an empty string"),
        (4, "expected 'pos' to be a list of at least one non-empty string, found nothing"),
        (5, "found nothing as item 2"),
    ):
        (reported,) = [line for line in error.splitlines() if f"{source}, row {number}: " in line]
        assert problem in reported
    assert not (tmp_path / "out" / "bad" / "x.jsonl").exists()
    assert len(list((tmp_path / "out").rglob("*.jsonl"))) == 3

    assert convert(hub, tmp_path / "skipped", "--skip-bad-rows") == 0
    assert f"{source}: left out 3 bad rows:" in capsys.readouterr().err
    assert [one["query"] for one in lines(tmp_path / "skipped" / "bad" / "x.jsonl")] == ["0", "2"]


def test_many_bad_rows(tmp_path, capsys):
    """The first 20 are named, all are counted."""
    write(tmp_path / "hub" / "x.parquet", [row(" ")] * 30)
    assert convert(tmp_path / "hub", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "30 bad rows, the first 20:" in error
    assert error.count(", row ") == 20


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("Instruct: Find it. \n Query: what?", {"instruction": "Find it.", "query": "what?"}),
        ("Instruct: Find it.\nQuery:what\nnow", {"instruction": "Find it.", "query": "what\nnow"}),
        ("Instruct: a \n Query: b \n Query: c", {"instruction": "a", "query": "b \n Query: c"}),
        ("Instruct me", {"query": "Instruct me"}),
        ("see Instruct: a \n Query: b", {"query": "see Instruct: a \n Query: b"}),
    ],
)
def test_instructions(tmp_path, query, expected):
    """The prefix of published queries becomes the line's instruction, if requested."""
    write(tmp_path / "hub" / "x.parquet", [{"query": query, "pos": ["p"]}])
    convert(tmp_path / "hub", tmp_path / "split", "--split-instruction")
    convert(tmp_path / "hub", tmp_path / "whole")
    assert lines(tmp_path / "split" / "x.jsonl") == [{"pos": ["p"], **expected}]
    assert lines(tmp_path / "whole" / "x.jsonl") == [{"query": query, "pos": ["p"]}]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"PAR1", "x.parquet: expected a Parquet file, found: "),
        (b"", "x.parquet: expected a Parquet file, found: "),
        ([{"text": "t"}], "x.parquet: expected the columns 'query' and 'pos' (or 'group'), found text"),
        ([{"query": "t"}], "x.parquet: expected the columns 'query' and 'pos' (or 'group'), found query"),
    ],
)  # fmt: skip
def test_what_is_no_training_data(tmp_path, capsys, content, problem):
    """One sentence with the file, and no output file."""
    path = tmp_path / "hub" / "x.parquet"
    path.parent.mkdir()
    path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
    assert convert(tmp_path / "hub", tmp_path / "out") == 2
    assert problem in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def test_a_damaged_file(tmp_path, capsys):
    """Damage in the middle is reported with the file; no half of it is left behind."""
    path = write(tmp_path / "hub" / "x.parquet", [row(f"{i} " * 50) for i in range(5000)])
    content = bytearray(path.read_bytes())
    content[100:2000] = bytes(1900)
    path.write_bytes(content)
    assert convert(tmp_path / "hub", tmp_path / "out") == 2
    assert "x.parquet: expected a complete Parquet file, found: " in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def test_folders_that_are_no_tasks(tmp_path, capsys):
    """Nothing there, or files too deep: reported before anything is written."""
    write(tmp_path / "hub" / "data" / "a" / "x.parquet", [row("0")])
    for folder, problem in (
        (tmp_path / "none", "none: expected Parquet files, in a sub-folder per task, found none"),
        (
            tmp_path / "hub",
            "hub: expected Parquet files, in a sub-folder per task, found data/a/x.parquet",
        ),
    ):
        assert convert(folder, tmp_path / "out") == 2
        assert problem in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_without_pyarrow(hub, tmp_path):
    """The sentence names the extra to install."""
    program = (
        "import sys; sys.modules['pyarrow'] = None; from kalm_min.convert import main; "
        f"sys.exit(main([{str(hub)!r}, '--output', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'needs pyarrow: pip install "kalm-min[data]"' in done.stderr
    assert "Traceback" not in done.stderr
