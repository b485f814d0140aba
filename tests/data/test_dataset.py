"""TrainingData: tasks and their settings, the numbering of examples, and every malformed line."""

import gzip
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kalm_min.data import JsonlFile, TaskSettings, TrainingData, checking, collate
from kalm_min.files import escape_name
from kalm_min.sampling import TaskBatchSampler

GOOD = {"query": "q", "pos": ["p"]}


def write(path: Path, records: list) -> Path:
    """Write records, or raw lines of text, to a .jsonl or .jsonl.gz file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def record(query: str, **more) -> dict:
    return {"query": query, "pos": ["p"], **more}


def queries(data: TrainingData) -> list[str]:
    return [example.query for example in data]


def test_a_folder_of_tasks(tmp_path):
    """Files and sub-folders are tasks, sorted by name; hidden, README and .toml entries are not."""
    write(tmp_path / "b.jsonl", [record("b0"), record("b1")])
    write(tmp_path / "a" / "part-1.jsonl.gz", [record("a1")])
    write(tmp_path / "a" / "part-0.jsonl", [record("a0")])
    write(tmp_path / "a" / ".hidden", ["no"])
    write(tmp_path / "a" / "README", ["no"])
    write(tmp_path / "c.x.jsonl.gz", [record("c0")])
    write(tmp_path / "b.toml", [])
    write(tmp_path / ".git" / "config", ["no"])
    write(tmp_path / "README.md", ["no"])
    for _ in range(2):
        data = TrainingData(tmp_path)
        assert data.task_names == ["a", "b", "c.x"]
        assert data.task_sizes == [2, 2, 1]
        assert queries(data) == ["a0", "a1", "b0", "b1", "c0"]
        assert [example.task for example in data] == [0, 0, 1, 1, 2]
        assert [example.index for example in data] == [0, 1, 2, 3, 4]
        locations = ["a/part-0.jsonl:1", "a/part-1.jsonl.gz:1", "b.jsonl:1", "b.jsonl:2"]
        locations = [f"{tmp_path}/{location}" for location in [*locations, "c.x.jsonl.gz:1"]]
        assert [data.location(i) for i in range(5)] == locations
        with pytest.raises(IndexError):
            data[5]


def test_a_single_file(tmp_path):
    """A single file is one task of its name, with its settings; other files are ignored."""
    path = write(tmp_path / "only.jsonl.gz", [record("x")])
    write(tmp_path / "only.toml", ["symmetric = true"])
    write(tmp_path / "recipe.toml", ["learning_rate = 1"])
    write(tmp_path / "notes.txt", ["no"])
    data = TrainingData(path)
    assert data.task_names == ["only"]
    assert data.settings == [TaskSettings(symmetric=True)]


names = st.sampled_from(["news", "qa", "code", None])


@given(st.dictionaries(st.sampled_from("xyz"), st.lists(names, min_size=1, max_size=8), min_size=1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_task_column(tmp_path_factory, files):
    """A line's "task" wins over its file's name; lines keep the order of files and lines."""
    folder = tmp_path_factory.mktemp("data")
    expected = {}
    for file in sorted(files):
        records = []
        for number, task in enumerate(files[file]):
            query = f"{file}{number}"
            records.append(record(query) if task is None else record(query, task=task))
            expected.setdefault(task or file, []).append((query, f"{file}.jsonl:{number + 1}"))
        write(folder / f"{file}.jsonl", records)
    for _ in range(2):
        data = TrainingData(folder)
        assert data.task_names == sorted(expected)
        assert data.task_sizes == [len(expected[name]) for name in data.task_names]
        flat = [(name, *row) for name in data.task_names for row in expected[name]]
        for i, (name, query, location) in enumerate(flat):
            assert data.task_names[data[i].task] == name
            assert data[i].query == query
            assert data.location(i) == f"{folder}/{location}"


def test_settings_of_tasks_named_by_lines(tmp_path):
    """Tasks of the "task" column get their settings too."""
    path = write(tmp_path / "all.jsonl", [record("0", task="qa"), record("1", task="news")])
    write(tmp_path / "qa.toml", ["in_batch_negatives = false"])
    data = TrainingData(path)
    assert data.task_names == ["news", "qa"]
    assert [example.in_batch_negatives for example in data] == [True, False]


def test_instruction_of_line_then_task_then_run(tmp_path):
    """The nearest instruction wins, and an empty one means none."""
    lines = [record("0"), record("1", instruction="line"), record("2", instruction="")]
    for task in ("set", "none", "unset"):
        write(tmp_path / f"{task}.jsonl", lines)
    write(tmp_path / "set.toml", ['instruction = "task"'])
    write(tmp_path / "none.toml", ['instruction = ""'])
    found = {}
    data = TrainingData(tmp_path, instruction="run")
    for example in data:
        found.setdefault(data.task_names[example.task], []).append(example.instruction)
    assert found == {
        "none": ["", "line", ""],
        "set": ["task", "line", ""],
        "unset": ["run", "line", ""],
    }
    assert TrainingData(tmp_path)[-3].instruction is None


def test_all_fields(tmp_path):
    """Optional fields arrive; null is absence."""
    full = {
        "query": "q",
        "pos": ["p", "r"],
        "neg": ["n"],
        "task": "t",
        "instruction": "i",
        "group": 3,
        "pos_scores": [1, 0.5],
        "neg_scores": [0.25],
        "relevance": 0.7,
    }
    data = TrainingData(
        write(tmp_path / "x.jsonl", [full, {**dict.fromkeys(full), "query": "q", "pos": ["p"]}])
    )
    whole, plain = data
    assert (whole.positives, whole.negatives) == (("p", "r"), ("n",))
    assert (whole.positive_scores, whole.negative_scores) == ((1.0, 0.5), (0.25,))
    assert (whole.instruction, whole.group) == ("i", 3)
    assert (plain.negatives, plain.group, plain.instruction) == ((), None, None)
    assert (plain.positive_scores, plain.negative_scores) == (None, None)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"pos": ["p"]}, "expected 'query' to be a non-empty string, found nothing"),
        (record(""), "expected 'query' to be a non-empty string, found an empty string"),
        (record(" \n"), "expected 'query' to be a non-empty string, found an empty string"),
        (record(5), "expected 'query' to be a non-empty string, found 5"),
        ({"query": "q"}, "expected 'pos' to be a list of at least one non-empty string, found nothing"),
        (
            {"query": "q", "pos": []},
            "expected 'pos' to be a list of at least one non-empty string, found an empty list",
        ),
        (
            {"query": "q", "pos": "p"},
            "expected 'pos' to be a list of at least one non-empty string, found 'p'",
        ),
        (
            {"query": "q", "pos": {"0": "p"}},
            "expected 'pos' to be a list of at least one non-empty string, found an object",
        ),
        (
            {"query": "q", "pos": ["p", 1.5]},
            "expected 'pos' to be a list of at least one non-empty string, found 1.5 as item 2",
        ),
        (
            record("q", neg=["n", ["m"]]),
            "expected 'neg' to be a list of non-empty strings, found a list as item 2",
        ),
        (
            record("q", neg=[""]),
            "expected 'neg' to be a list of non-empty strings, found an empty string as item 1",
        ),
        (record("q", neg="n"), "expected 'neg' to be a list of non-empty strings, found 'n'"),
        (
            '{"query": "half \\ud83d", "pos": ["p"]}',
            "expected 'query' to be a non-empty string, found a string with half a surrogate pair",
        ),
        (
            {"query": "q", "positives": ["p"]},
            "expected the keys query, pos, neg, task, instruction, group, pos_scores, neg_scores, relevance, found 'positives'",
        ),
        (record("q", pos_scores=[1, 2]), "expected 'pos_scores' to hold one number per 'pos', 1, found 2"),
        (record("q", neg_scores=[1]), "expected 'neg_scores' to hold one number per 'neg', 0, found 1"),
        (
            record("q", pos_scores=[True]),
            "expected 'pos_scores' to be a list of numbers, found true as item 1",
        ),
        (
            '{"query": "q", "pos": ["p"], "pos_scores": [NaN]}',
            "expected 'pos_scores' to be a list of numbers, found NaN as item 1",
        ),
        (record("q", group=1.5), "expected 'group' to be a non-empty string or a whole number, found 1.5"),
        (record("q", group=True), "expected 'group' to be a non-empty string or a whole number, found true"),
        (record("q", task=""), "expected 'task' to be a non-empty string, found an empty string"),
        (record("q", instruction=1), "expected 'instruction' to be a string, found 1"),
        (record("q", relevance="high"), "expected 'relevance' to be a number, found 'high'"),
        ('{"query": "q", "pos": ["p"]', "expected a JSON object, found Expecting"),
        ('"query"', "expected a JSON object, found str"),
        ('{"query": "a", "pos": ["p"], "query": "b"}', "expected a JSON object, found the key 'query' twice"),
        (record("q", pos_scores=[1e39]), "expected 'pos_scores' to be a list of numbers, found a number that is too large"),
        ("\0", "expected a JSON object, found a NUL byte"),
    ],
)  # fmt: skip
def test_malformed_line(tmp_path, line, problem):
    """Each kind of malformed line is reported in one sentence with its location before training."""
    write(tmp_path / "good.jsonl", [GOOD])
    path = write(tmp_path / "bad.jsonl", [GOOD, "", line, GOOD])
    for _ in range(2):  # a failed check is not remembered as a passed one
        with pytest.raises(ValueError, match="1 malformed line:") as error:
            TrainingData(tmp_path)
        location = str(error.value).split("\n  ")[1:]
        assert len(location) == 1
        assert location[0].startswith(f"{path}:3: {problem}")
        assert "\n" not in location[0]
    write(path, [GOOD])
    assert len(TrainingData(tmp_path)) == 2


def test_every_malformed_line_is_counted(tmp_path):
    """All files are checked before anything is raised: 20 locations and the number of all."""
    one = write(tmp_path / "a.jsonl", [GOOD, *[{}] * 15])
    two = write(tmp_path / "b.jsonl", [GOOD, *["{"] * 15])
    with pytest.raises(ValueError, match="30 malformed lines, the first 20:") as error:
        TrainingData(tmp_path)
    listed = str(error.value).split("\n  ")[1:]
    locations = [f"{one}:{n}" for n in range(2, 17)] + [f"{two}:{n}" for n in range(2, 7)]
    assert [line.split(": ")[0] for line in listed] == locations


def test_bytes_that_are_not_utf8(tmp_path):
    """A Latin-1 file is reported as such, line by line."""
    path = tmp_path / "x.jsonl"
    path.write_bytes('{"query": "é", "pos": ["p"]}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.jsonl:1: expected UTF-8 text, found invalid"):
        TrainingData(path)


def test_the_check_is_done_once(tmp_path, monkeypatch):
    """A second opening parses no line; a changed file is checked again, the others are not."""
    write(tmp_path / "a.jsonl", [GOOD])
    path = write(tmp_path / "b.jsonl", [GOOD])
    TrainingData(tmp_path)
    checked = []
    check = checking.problem_with_line
    monkeypatch.setattr(
        checking, "problem_with_line", lambda line: checked.append(line) or check(line)
    )
    TrainingData(tmp_path)
    assert not checked
    write(path, [record("new"), GOOD])
    assert TrainingData(tmp_path).task_sizes == [1, 2]
    assert checked == [record("new"), GOOD]


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([], "expected a folder with a JSONL file per task, found none"),
        (["README.md", ".x.jsonl"], "expected a folder with a JSONL file per task, found none"),
        (["a.jsonl", "a.jsonl.gz"], "expected one file or folder per task, found 'a' twice"),
        (["a/0.jsonl", "a.jsonl"], "expected one file or folder per task, found 'a' twice"),
        (["a/0.jsonl", "a/0.jsonl.gz"], "a: expected each file once, found one compressed and not"),
        (["a.txt"], "a.txt: expected a .jsonl or .jsonl.gz file, found another file"),
        (["a.jsonl", "b/README"], "b: expected JSONL files of task 'b', found none"),
        (["a/b/c.jsonl"], "a/b: expected a .jsonl or .jsonl.gz file, found a folder"),
        (["a/b.parquet"], "b.parquet: expected a .jsonl or .jsonl.gz file, found another file"),
    ],
)
def test_malformed_folder(tmp_path, entries, problem):
    """A folder that cannot be data is reported in one sentence, before any line is read."""
    for entry in entries:
        write(tmp_path / entry, [GOOD])
    with pytest.raises(ValueError, match="expected") as error:
        TrainingData(tmp_path)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_there(tmp_path):
    """A path that does not exist is reported as such."""
    with pytest.raises(ValueError, match=r"none\.jsonl: expected .* found nothing there"):
        TrainingData(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("instructions = 'x'", "expected a setting of a task, found 'instructions' (did you mean instruction?)"),
        ("weight = -1", "expected 'weight' to be a number from 0 to 1000, found -1"),
        ("weight = nan", "expected 'weight' to be a number from 0 to 1000, found NaN"),
        ("weight = true", "expected 'weight' to be a number from 0 to 1000, found true"),
        ("weight = 1000000000", "expected 'weight' to be a number from 0 to 1000, found 1000000000"),
        ("max_examples = 0", "expected 'max_examples' to be a whole number, 1 or more, found 0"),
        ("max_examples = 2.5", "expected 'max_examples' to be a whole number, 1 or more, found 2.5"),
        ("label_based = 1", "expected 'label_based' to be true or false, found 1"),
        ("instruction = 5", "expected 'instruction' to be a string, found 5"),
        ("symmetric = 'yes'", "expected 'symmetric' to be true or false, found 'yes'"),
        ("x = 1", "expected a setting of a task, found 'x'; the settings are instruction, symmetric, in"),
        ("in_batch_negatives = 0", "expected 'in_batch_negatives' to be true or false, found 0"),
        ("symmetric = 2020-01-01", "expected 'symmetric' to be true or false, found \"2020-01-01\""),
    ],
)  # fmt: skip
def test_malformed_settings(tmp_path, line, problem):
    """Settings are checked when the data is opened; unknown ones name the nearest."""
    write(tmp_path / "a.jsonl", [GOOD])
    path = write(tmp_path / "a.toml", [line])
    with pytest.raises(ValueError, match="expected") as error:
        TrainingData(tmp_path)
    assert str(error.value).startswith(f"{path}: {problem}")


def test_settings_that_are_not_toml(tmp_path):
    """The settings file is named, with the line where that is known."""
    write(tmp_path / "a.jsonl", [GOOD])
    (tmp_path / "a.toml").write_bytes(b"instruction = '\xff'")
    with pytest.raises(ValueError, match=r"a\.toml: expected UTF-8 text, found"):
        TrainingData(tmp_path)
    (tmp_path / "a.toml").write_text("\nsymmetric =\n")
    with pytest.raises(ValueError, match=r"a\.toml:2: expected TOML, found Invalid value .*line 2"):
        TrainingData(tmp_path)


def test_settings_of_a_task_whose_name_is_no_file_name(tmp_path):
    """Every task of a line has settings of its own, found by its escaped name, and never elsewhere."""
    names = ["../secret", "a/b", "a%2Fb", "x" * 300, "100%"]
    folder = tmp_path / "data"
    write(folder / "all.jsonl", [record(name, task=name) for name in names])
    write(tmp_path / "secret.toml", ['instruction = "stolen"'])
    assert {one.instruction for one in TrainingData(folder).settings} == {None}
    for name in names:
        (folder / f"{escape_name(name)}.toml").write_text(f'instruction = "{name}"')
    data = TrainingData(folder)
    assert [one.instruction for one in data.settings] == data.task_names == sorted(names)


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    """Any change of a line, of their order, of a setting or of the instruction changes it; a cache,
    a copy, the compression and the time of the file do not."""
    lines = [record("a"), record("b", neg=["n"])]
    write(tmp_path / "t.jsonl", lines)
    first = TrainingData(tmp_path).fingerprint
    found = [first, TrainingData(tmp_path, instruction="x").fingerprint]
    (tmp_path / "t.jsonl").touch()
    assert TrainingData(tmp_path).fingerprint == first
    write(tmp_path / "copy" / "t.jsonl.gz", lines)
    assert TrainingData(tmp_path / "copy").fingerprint == first
    assert pickle.loads(pickle.dumps(TrainingData(tmp_path / "copy"))).fingerprint == first
    for change in (lines[::-1], [record("a"), record("b", neg=["m"])], [*lines, record("c")]):
        write(tmp_path / "copy" / "t.jsonl.gz", change)
        found.append(TrainingData(tmp_path / "copy").fingerprint)
    write(tmp_path / "copy" / "t.jsonl.gz", lines)
    write(tmp_path / "copy" / "t.toml", ["weight = 2"])
    found.append(TrainingData(tmp_path / "copy").fingerprint)
    assert len(set(found)) == len(found)


def test_group_1_and_group_one_are_two_classes(tmp_path):
    """A number is not the text of its digits, for the draws and for the masks."""
    groups = [1, 1, "1", "1"]
    rows = [{"query": f"{group!r}{i}", "group": group} for i, group in enumerate(groups)]
    write(tmp_path / "t.jsonl", rows)
    write(tmp_path / "t.toml", ["label_based = true"])
    data = TrainingData(tmp_path)
    for example in data:
        assert example.positives[0].startswith(repr(example.group))
        assert not [text for text in example.negatives if text.startswith(repr(example.group))]
        assert len(example.negatives) == 2
    batch = collate(list(data), num_negatives=0, template="", epoch=0, seed=0)
    assert len(set(batch.query_groups.tolist())) == 2


def test_settings_of_no_task(tmp_path):
    """A misspelt settings file would silently apply to nothing."""
    write(tmp_path / "banking.jsonl", [GOOD])
    write(tmp_path / "bankin.toml", ["symmetric = true"])
    with pytest.raises(
        ValueError, match=r"expected the settings of a task .*did you mean banking\?"
    ):
        TrainingData(tmp_path)


def test_another_process_opens_the_same_cache(tmp_path):
    """Data workers that are spawned get the path, not the data."""
    write(tmp_path / "x.jsonl", [record(str(i)) for i in range(1000)])
    data = TrainingData(tmp_path, instruction="i", cache_dir=tmp_path / ".cache")
    sent = pickle.dumps(data)
    assert len(sent) < 1000
    assert list(pickle.loads(sent)) == list(data)
    assert not (tmp_path / ".kalm_min").exists()


def test_numbering_is_the_samplers(tmp_path):
    """At ratio 1 a batch of the sampler's indices is a batch of one task."""
    for task in ("a", "b"):
        write(tmp_path / f"{task}.jsonl", [record(f"{task}{i}") for i in range(8)])
    data = TrainingData(tmp_path)
    batches = [[data[i] for i in batch] for batch in TaskBatchSampler(data.task_sizes, 4)]
    assert len(batches) == 4
    assert all(len({example.query[0] for example in batch}) == 1 for batch in batches)


def test_no_torch():
    """Data workers start fast: reading and collating need numpy only."""
    program = "import sys, kalm_min.data; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_jsonl_file_is_public(tmp_path):
    """The same reader serves other formats: it does not know the schema."""
    path = write(tmp_path / "x.jsonl", [{"anything": 1}])
    assert JsonlFile(path)[0] == {"anything": 1}
