"""The convert command: what arrives, what is refused, and what a second run does."""

import csv
import gzip
import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalm_min import Embedder
from kalm_min.convert import main
from kalm_min.data import TrainingData, checking
from kalm_min.evaluation.local import find_datasets
from kalm_min.files import sweep
from tests.conftest import WORDS

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
ROOT = Path(__file__).parents[1]


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
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


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
    assert "convert 3/3 files" in shown.err
    assert "5 rows of 3 files" in shown.err


def test_a_file_alone_is_a_task(tmp_path):
    """As in training data, a single file in the folder is a task of its name."""
    write(tmp_path / "hub" / "nli.parquet", [row("0")])
    assert convert(tmp_path / "hub", tmp_path / "out") == 0
    assert TrainingData(tmp_path / "out").task_names == ["nli"]


def test_a_second_run_skips_what_is_finished(hub, tmp_path, capsys):
    """Finished files are left alone, a new one is converted; other options are refused."""
    out = tmp_path / "out"
    convert(hub, out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")}
    write(hub / "new" / "a.parquet", [row("new")])
    assert convert(hub, out) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert "1 row of 1 file " in capsys.readouterr().err
    assert convert(hub, out, "--split-instruction") == 2
    error = capsys.readouterr().err
    assert (
        f"{out}: converted before with other options (split_instruction was false, is true); give another"
        in error
    )


def test_an_interrupted_file_is_absent(hub, tmp_path, monkeypatch):
    """A kill in the middle of a file keeps the finished ones and leaves nothing of this one."""
    check = checking.problem_with_line

    def killed(record):
        if record["query"] == "1":
            raise KeyboardInterrupt
        return check(record)

    monkeypatch.setattr(checking, "problem_with_line", killed)
    assert convert(hub, tmp_path / "out") == 130
    names = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(names) == [".convert.json", ".lock", "train-00000-of-00001.jsonl"]
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


def table(path: Path, *rows: list[str], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


LAYOUTS = {
    "question,answer": ("q", ["p"], []),
    "anchor,positive,negative": ("q", ["p"], ["n"]),
    "Anchor,Positive,Negative_1,Negative_2": ("q", ["p"], ["n", "m"]),
    "query,positive,negative": ("q", ["p"], ["n"]),
    "sentence1,sentence2": ("q", ["p"], []),
    "id,question,answer": ("p", ["n"], []),
}


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.csv.gz", "x.jsonl", "x.json", "x.parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_usual_columns_are_recognised(tmp_path, capsys, name, layout):
    """From every kind of file, and said before anything is written."""
    names = layout.split(",")
    cells = ["q", "p", "n", "m"][: len(names)]
    row = dict(zip(names, cells, strict=True))
    source = tmp_path / name
    if name == "x.parquet":
        write(source, [row])
    elif name == "x.jsonl":
        source.write_text(json.dumps(row) + "\n")
    elif name == "x.json":
        source.write_text(json.dumps([row], indent=2))
    else:
        text = table(tmp_path / "t", names, cells, delimiter="\t" if name == "x.tsv" else ",")
        source.write_bytes(
            gzip.compress(text.read_bytes()) if name.endswith("gz") else text.read_bytes()
        )
    assert convert(source, tmp_path / "out") == 0
    query, pos, neg = LAYOUTS[layout]
    expected = {"query": query, "pos": pos} | ({"neg": neg} if neg else {})
    assert lines(tmp_path / "out" / "x.jsonl") == [expected]
    assert capsys.readouterr().err.startswith(f"{source}: query = ")


def test_flagembeddings_lines(tmp_path):
    """Lists stay lists, with their scores; its prompt is the line's instruction."""
    row = {
        "query": "q",
        "pos": ["p"],
        "neg": ["n", "m"],
        "pos_scores": [0.9],
        "neg_scores": [0.2, 0.1],
    }
    source = tmp_path / "x.jsonl"
    source.write_text(json.dumps(row | {"prompt": "Find it.", "type": "normal"}) + "\n")
    assert convert(source, tmp_path / "out") == 0
    assert lines(tmp_path / "out" / "x.jsonl") == [row | {"instruction": "Find it."}]


@pytest.mark.parametrize(
    ("scores", "flags", "kept"),
    [(["0", "1", "1"], (), ["b", "c"]), (["4", "5", "1.5"], (), ["a", "b"]),
     (["0.4", "0.5", "0.9"], ("--min-score", "0.5"), ["b", "c"])],
)  # fmt: skip
def test_scored_pairs(tmp_path, capsys, scores, flags, kept):
    """Pairs with a high score are examples; the bound is said."""
    rows = [[name, f"{name}2", score] for name, score in zip("abc", scores, strict=True)]
    source = table(tmp_path / "x.csv", ["sentence1", "sentence2", "score"], *rows)
    assert convert(source, tmp_path / "out", *flags) == 0
    assert [one["query"] for one in lines(tmp_path / "out" / "x.jsonl")] == kept
    assert "pairs below" in capsys.readouterr().err


def test_columns_named_by_flags(tmp_path, capsys):
    """Any column, with the nearest name for one that is not there."""
    source = table(tmp_path / "x.csv", ["Frage", "Antwort", "falsch"], ["q", "p", "n"])
    assert convert(source, tmp_path / "out") == 2
    assert "found Frage, Antwort, falsch; name the columns: --query" in capsys.readouterr().err
    flags = ["--query", "Frage", "--pos", "Antwort", "--neg", "falsch"]
    assert convert(source, tmp_path / "out", *flags[:-1], "fasch") == 2
    assert (
        "expected the column 'fasch', found none (did you mean falsch?)" in capsys.readouterr().err
    )
    assert convert(source, tmp_path / "out", *flags) == 0
    assert lines(tmp_path / "out" / "x.jsonl") == [{"query": "q", "pos": ["p"], "neg": ["n"]}]


def test_names_of_columns_stay_in_their_line(tmp_path, capsys):
    """A line break in a name is a code wherever the name is said."""
    source = table(tmp_path / "x.csv", ["the\nquery", "the\npos"], ["q", "p"])
    for flags, message in (
        (("--query", "question"), "the columns are 'the\\nquery', 'the\\npos'\n"),
        (("--query", "the query"), "(did you mean 'the\\nquery'?)\n"),
        ((), "found 'the\\nquery', 'the\\npos'; name the columns: "),
        (
            ("--query", "the\nquery", "--pos", "the\npos"),
            "query = 'the\\nquery', pos = 'the\\npos'\n",
        ),
    ):
        assert convert(source, tmp_path / "out", *flags) == (0 if "--pos" in flags else 2)
        assert message in capsys.readouterr().err


CSV = [
    ('question;answer\n"a;b";c\n', [("a;b", "c")]),
    ('\ufeffquestion,answer\r\n"a\r\nb","say ""c"""\r\n\r\nd,e\r\n', [("a\r\nb", 'say "c"'), ("d", "e")]),
    ("question|answer\nüb|你好\u2028x\n", [("üb", "你好\u2028x")]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "rows"), CSV)
def test_tables_as_programs_write_them(tmp_path, text, rows):
    """Delimiters, quotes, newlines in cells, a byte order mark, blank lines."""
    source = tmp_path / "x.csv"
    source.write_bytes(text.encode())
    assert convert(source, tmp_path / "out") == 0
    assert [(one["query"], one["pos"][0]) for one in lines(tmp_path / "out" / "x.jsonl")] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'question,answer\n"a\nb",c\nd\n', "x.csv:4: expected 2 cells, found 1"),
        (
            b'question,answer\na,b\n"c,d\n',
            "x.csv:3: expected a table, found: unexpected end",
        ),
        (b"question,question\na,b\n", "x.csv: expected each column once, found 'question' twice"),
        (b"question,answer\na,\xff\n", "x.csv:2: expected UTF-8 text"),
        (b"question,answer\na,\n", "x.csv:2: expected 'pos' to be a list of at least one"),
        (b"", "x.csv: expected the columns 'query' and 'pos' (or 'group'), found"),
    ],
)
def test_odd_tables_are_named_by_line(tmp_path, capsys, content, message):
    """One sentence with file and line, and no output."""
    source = tmp_path / "x.csv"
    source.write_bytes(content)
    assert convert(source, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.jsonl"))


def test_size_and_content_decide(hub, tmp_path):
    """A source replaced by an older file, and an output that was cut, are converted again."""
    out = tmp_path / "out"
    assert convert(hub, out) == 0
    expected = lines(out / "paq" / "train-00001-of-00002.jsonl")
    source = write(hub / "csl" / "train-00000-of-00001.parquet", [row("new")])
    os.utime(source, (0, 0))
    (out / "paq" / "train-00001-of-00002.jsonl").write_text("")
    assert convert(hub, out) == 0
    assert lines(out / "csl" / "train-00000-of-00001.jsonl")[0]["query"] == "new"
    assert lines(out / "paq" / "train-00001-of-00002.jsonl") == expected


def test_what_a_killed_run_left_is_removed(hub, tmp_path):
    """Temporary files of a process that is gone; those of a living one stay."""
    folder = tmp_path / "out" / "csl"
    code = "import sys, os; from kalm_min.files import atomic_write as w\n"
    code += "with w(sys.argv[1]): os._exit(0)"
    subprocess.run([sys.executable, "-c", code, folder / "old.jsonl"], check=True, cwd=ROOT)
    (torn,) = folder.glob(".old.jsonl.*.tmp")
    alive = folder / torn.name.replace("old", "new").replace(
        torn.name.split("-")[1].split(".")[0], "1"
    )
    alive.touch()
    assert convert(hub, tmp_path / "out") == 2  # a folder with something else
    (tmp_path / "out" / ".convert.json").write_text('{"options": {}, "files": {}}')
    assert convert(hub, tmp_path / "new") == 0
    assert torn.exists()
    sweep(folder)
    assert not torn.exists()
    assert alive.exists()


@given(st.integers(0, 10**6))
@settings(max_examples=10)
def test_nothing_held_out_is_trained_on(tmp_path_factory, seed):
    """Whatever texts are shared, also in other case and spacing: in no line of training."""
    folder, draw = tmp_path_factory.mktemp("held"), random.Random(seed)
    texts = [one for i in range(60) for one in (f"text {i}", f"TEXT  {i}", f"Text {i} ")]
    rows = [draw.choices(texts, k=3) for _ in range(90)]
    source = table(folder / "faq.csv", ["anchor", "positive", "negative"], *rows)
    code = convert(source, folder / "out", "--hold-out", "8")
    assert code == 0
    out = folder / "out"

    def normal(row):
        return {
            " ".join(t.casefold().split()) for t in (row["query"], *row["pos"], *row.get("neg", []))
        }

    held = lines(out / "validation" / "faq.jsonl")
    assert len(held) == 8
    trained = set().union(*map(normal, lines(out / "train" / "faq.jsonl")))
    assert not trained & set().union(*map(normal, held))
    (found,) = find_datasets(out / "eval")
    assert (found.name, found.type) == ("faq", "Retrieval")
    documents = {
        " ".join(one["text"].casefold().split()) for one in lines(out / "eval/faq/corpus.jsonl")
    }
    assert documents <= set().union(*map(normal, held))


@pytest.mark.slow
def test_from_a_table_to_a_better_model(tmp_path, make_model, monkeypatch):
    """The newcomer's walk: a CSV, three commands, and a model with the same vectors elsewhere."""
    from sentence_transformers import SentenceTransformer

    draw = random.Random(0)
    make_model(tmp_path / "base")
    rows = [
        [f"{i}", f"{' '.join(draw.choices(WORDS, k=4))} {i}", f"{i} {draw.choice(WORDS)}"]
        for i in range(100)
    ]
    table(tmp_path / "support.csv", ["id", "question", "answer"], *rows)
    monkeypatch.chdir(tmp_path)
    small = "--sampling.batch-size 16 --training.max-steps 2 --training.precision float32"
    for name, words in (
        ("convert", "support.csv --hold-out 20 --output data"),
        ("train", f"--model.path base --data.path data/train --data.validation data/validation --output run {small}"),
    ):  # fmt: skip
        assert importlib.import_module(f"kalm_min.{name}").main(words.split()) == 0
    words = "--model run/final --data data/eval --devices cpu --dtype float32 --output results"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "kalm_min", "evaluate", *words.split()],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ndcg_at_10" in done.stdout
    texts = [question for _, question, _ in rows[:5]]
    ours = Embedder.from_pretrained("run/final", dtype="float32").encode(texts)
    theirs = SentenceTransformer("run/final", device="cpu").encode(texts)
    assert ours.shape == theirs.shape == (5, 32)
    assert abs(ours - theirs).max() < 1e-5
