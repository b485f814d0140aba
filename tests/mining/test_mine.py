"""mine.py as a program: what comes out for planted data, and what a second or killed run does."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kalm_min import mine
from kalm_min.data import TrainingData
from kalm_min.files import locked, read_json, write_json
from kalm_min.program import end_at_once
from kalm_min.vectors import write_array

ROOT = Path(__file__).parent.parent.parent
WORDS = "the cat sat on a mat while one dog ran far from its house to see blue birds".split()


def text(rng, words=6):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def write(folder, **tasks):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tasks.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def rows_of(folder, task):
    path = folder / f"{task}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def planted(count=400, wrong=0.1, seed=0):
    """Rows whose positive repeats the query; some are wrong, some repeat as others' negatives."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        query = text(rng, 8)
        is_wrong = number < wrong * count
        positive = text(rng, 8) if is_wrong else query + " " + text(rng, 1)
        rows.append({"query": query, "pos": [positive], "relevance": float(is_wrong)})
    for row in rows[:100]:
        row["neg"] = [rng.choice(rows)["pos"][0], text(rng)]
    return rows


def run(model, data, output, *flags):
    command = ["--model", str(model), "--data", str(data), "--output", str(output), *flags]
    return mine.main([*command, "--dtype", "float32"])


def contents(folder):
    """Everything that a user sees in a mined folder."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "/." not in path.as_posix()
    }


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Four tasks: planted, symmetric with two positives, one with three documents, a label-based one."""
    rng = random.Random(1)
    twice = [
        {"query": (q := text(rng)), "pos": [q + " birds", "one " + q], "instruction": "Find it"}
        for _ in range(60)
    ]
    labels = [
        {"query": text(rng), "pos": [rng.choice(["cat", "dog", "a house"])]} for _ in range(20)
    ]
    grouped = [{"query": text(rng), "group": rng.choice("xy")} for _ in range(10)]
    folder = tmp_path_factory.mktemp("mining") / "data"
    write(folder, planted=planted(), twice=twice, labels=labels, grouped=grouped)
    (folder / "twice.toml").write_text("symmetric = true\nweight = 0.5\n", encoding="utf-8")
    (folder / "grouped.toml").write_text("label_based = true\n", encoding="utf-8")
    return folder


RULES = ("--rank-range", "3", "20", "--num-negatives", "4", "--consistency-top-k", "5")


@pytest.fixture(scope="module")
def mined(toy, tiny_model_dir):
    """The toy data mined by an unbroken run."""
    output = toy.parent / "mined"
    assert run(tiny_model_dir, toy, output, *RULES) == 0
    return output


def test_every_row_is_accounted_for(toy, mined):
    """Rows in are rows kept and rows dropped for a reason, in the record, the report and the files."""
    for task in ("planted", "twice", "labels", "grouped"):
        summary = read_json(mined / ".mining" / "tasks" / f"{task}.json")["summary"]
        assert summary["rows"] == len(rows_of(toy, task))
        assert summary["rows"] == summary["kept"] + summary["inconsistent"] + summary["short"]
        assert summary["kept"] == len(rows_of(mined, task))
        assert sum(summary["ranks"]) == (0 if task == "grouped" else summary["rows"])
    assert "490 rows = 450 kept + 40 that failed the consistency filter + 0 with" in (
        mined / "README.md"
    ).read_text(encoding="utf-8")


def test_report_shows_rows_to_judge(mined):
    """Dropped rows stand with what ranked above them; a corpus without the ranks is named."""
    page = (mined / "README.tasks" / "planted.md").read_text(encoding="utf-8")
    dropped, kept = page.split("rows failed the consistency filter")[1], page.split("rows kept")[1]
    assert dropped.count("top unlabelled: ``") == 20
    assert kept.count("positive, rank") == 5
    assert kept.count(" negative: ``") == 20
    overview = (mined / "README.md").read_text(encoding="utf-8")
    assert "Look at labels: 20 of 20 kept rows have fewer negatives" in overview


def test_no_positive_is_mined(toy, mined):
    """No negative is a positive of its query in any row, the query itself, or a duplicate."""
    for task in ("planted", "twice", "labels"):
        answers = {}
        for row in rows_of(toy, task):
            answers.setdefault(row["query"], {row["query"]}).update(row["pos"])
        for row in rows_of(mined, task):
            assert not answers[row["query"]] & set(row["neg"])
            assert len(set(row["neg"])) == len(row["neg"]) == len(row["neg_scores"])
            assert len(row["pos"]) == len(row["pos_scores"])
    assert all(len(row["neg"]) == 4 for row in rows_of(mined, "planted"))


def test_wrong_pairs_are_dropped(mined):
    """The filter finds most planted wrong pairs and few right ones."""
    kept = rows_of(mined, "planted")
    wrong = sum(row["relevance"] for row in kept)
    assert wrong <= 0.25 * 40
    assert len(kept) - wrong >= 0.95 * 360


def test_a_tiny_corpus_fills_nothing_up(mined):
    """With three documents there is no rank beyond the third, and no row is padded."""
    rows = rows_of(mined, "labels")
    assert len(rows) == 20
    assert all(row["neg"] == [] for row in rows)


def test_output_is_training_data(toy, mined):
    """The folder opens as training data, with settings and the rows' other keys; labels go as they are."""
    data = TrainingData(mined)
    assert data.task_names == ["grouped", "labels", "planted", "twice"]
    assert data.settings[3].symmetric
    assert rows_of(mined, "grouped") == rows_of(toy, "grouped")
    assert rows_of(mined, "twice")[0]["instruction"] == "Find it"


def test_scores_are_the_models_cosines(mined, tiny_model_dir):
    """Scores are those of queries with their instructions, and of documents too if symmetric."""
    from kalm_min import Embedder

    model = Embedder.from_pretrained(tiny_model_dir, dtype="float32")
    prompt = model.instruction_template.format(instruction="Find it")
    for task, said in (("planted", ""), ("twice", prompt)):
        row = rows_of(mined, task)[0]
        query = model.encode([row["query"]], said)
        documents = model.encode(row["pos"] + row["neg"], said)
        expected = model.similarity(query, documents)[0].tolist()
        assert row["pos_scores"] + row["neg_scores"] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("with_pool", [True, False])
def test_texts_without_an_instruction_get_the_stored_prompts(tiny_model_dir, tmp_path, with_pool):
    """As in training: unless a line, the task or the run says otherwise, also that there is none."""
    from kalm_min import Embedder

    model = Embedder.from_pretrained(tiny_model_dir, dtype="float32")
    model.prompts |= {"query": "one cat: ", "document": "a house: "}
    model.save_pretrained(tmp_path / "model")
    rows = planted(30)
    silent = [row | {"instruction": ""} for row in planted(30, seed=1)]
    data = write(tmp_path / "data", stored=rows, silent=silent, both=planted(30, seed=2))
    (data / "both.toml").write_text("symmetric = true\n", encoding="utf-8")
    write(tmp_path, pool=[{"text": row["pos"][0]} for row in rows])
    flags = ["--pool", str(tmp_path / "pool.jsonl")] if with_pool else []
    assert run(tmp_path / "model", data, tmp_path / "out", *RULES, *flags) == 0
    query, document = model.prompts["query"], model.prompts["document"]
    for task, *prompts in (
        ("stored", query, document),
        ("silent", "", document),
        ("both", query, query),
    ):
        row = next(row for row in rows_of(tmp_path / "out", task) if row["neg"])
        texts = [row["query"]], row["pos"] + row["neg"]
        found = row["pos_scores"] + row["neg_scores"]
        expected = model.similarity(*map(model.encode, texts, prompts))[0].tolist()
        assert found == pytest.approx(expected, abs=2e-6), task


def test_second_run_skips_and_other_rules_encode_nothing(mined, toy, tiny_model_dir, capsys):
    """The same command touches no task; another range writes other negatives from stored neighbours."""
    before = contents(mined)
    times = {path: path.stat().st_mtime_ns for path in mined.glob("*.jsonl")}
    assert run(tiny_model_dir, toy, mined, *RULES) == 0
    assert contents(mined) == before
    assert times == {path: path.stat().st_mtime_ns for path in mined.glob("*.jsonl")}
    capsys.readouterr()
    other = toy.parent / "other"
    store = ("--store", str(mined / ".mining"))
    assert run(tiny_model_dir, toy, other, "--rank-range", "2", "9", *RULES[3:], *store) == 0
    progress = capsys.readouterr().err
    assert "encode" not in progress
    assert rows_of(other, "planted") != rows_of(mined, "planted")


def test_other_rules_unfinished(toy, mined, tiny_model_dir, tmp_path, monkeypatch):
    """A run with other rules that dies while writing leaves nothing that the first would reuse."""
    output = tmp_path / "out"
    shutil.copytree(mined, output)

    def die(path, value):
        if path.stem == "planted":
            raise KeyboardInterrupt
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr("kalm_min.mining.pipeline.write_json", die)
        assert run(tiny_model_dir, toy, output, *RULES, "--seed", "9") == 130
    assert contents(output) != contents(mined)
    assert run(tiny_model_dir, toy, output, *RULES) == 0
    assert contents(output) == contents(mined)


def test_full_disk(toy, mined, tiny_model_dir, tmp_path, capsys):
    """A file that cannot be written is one sentence; what was written is used by the next run."""
    output, unlimited = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, unlimited[1]))
    try:
        assert run(tiny_model_dir, toy, output, *RULES) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"mine.py: {output}: ")
    assert "the same command continues" in said
    assert list((output / ".mining").glob("model/shards/*.npy"))
    assert run(tiny_model_dir, toy, output, *RULES) == 0
    assert contents(output) == contents(mined)


def test_damaged_files_are_made_again(toy, mined, tiny_model_dir, tmp_path):
    """Shards and neighbours that cannot be read are encoded and searched again."""
    output = tmp_path / "out"
    shutil.copytree(mined, output)
    for name in ("shards", "neighbours"):
        for path in (output / ".mining" / "model" / name).rglob("*.npy"):
            path.write_bytes(path.read_bytes()[:-9])
    (output / ".mining" / "tasks" / "planted.json").unlink()
    assert run(tiny_model_dir, toy, output, *RULES) == 0
    assert contents(output) == contents(mined)


def test_dry_run_writes_nothing(toy, mined, tiny_model_dir, capsys):
    """It reports the work to do and, if known, what the rules would keep."""
    nowhere = toy.parent / "nowhere"
    store = ("--store", str(mined / ".mining"))
    assert run(tiny_model_dir, toy, nowhere, *RULES, *store, "--dry-run") == 0
    assert not nowhere.exists()
    kept = len(rows_of(mined, "planted"))
    table = capsys.readouterr().out
    assert re.search(rf"\| +0 kchar \| +0 blocks \| +{kept} \|", table)
    assert "copied" in table
    assert run(tiny_model_dir, toy, nowhere, *RULES, "--dry-run") == 0
    assert not nowhere.exists()


def test_faiss_and_torch_write_the_same(mined, toy, tiny_model_dir):
    """The whole output is the same bytes with either search."""
    pytest.importorskip("faiss")
    output = toy.parent / "faiss"
    assert run(tiny_model_dir, toy, output, *RULES, "--search", "faiss") == 0
    assert contents(output) == contents(mined)


def test_pool_scorer_and_index(toy, mined, tiny_model_dir, make_model, tmp_path):
    """Negatives come from the pool alone, scores from the scorer, recall of the index is reported."""
    pytest.importorskip("faiss")
    scorer = make_model(tmp_path / "scorer", seed=5)
    rng = random.Random(2)
    pool = [text(rng, 7) for _ in range(200)] + [
        row["pos"][0] for row in rows_of(toy, "planted")[:50]
    ]
    lines = "".join(json.dumps({"text": one}) + "\n" for one in pool)
    (tmp_path / "pool.jsonl").write_text(lines, encoding="utf-8")
    flags = ("--pool", str(tmp_path / "pool.jsonl"), "--scorer", str(tmp_path / "scorer"))
    output = tmp_path / "out"
    assert run(tiny_model_dir, toy, output, *RULES, *flags, "--index", "IVF4,Flat;nprobe=2") == 0
    for row in rows_of(output, "planted"):
        assert set(row["neg"]) <= set(pool) - set(row["pos"])
    expected = scorer.similarity(
        scorer.encode([row["query"]]), scorer.encode(row["pos"] + row["neg"])
    )
    assert row["pos_scores"] + row["neg_scores"] == pytest.approx(expected[0].tolist(), abs=2e-6)
    assert "recall" in (output / "README.md").read_text(encoding="utf-8")


def test_wrong_requests(toy, mined, tiny_model_dir, make_model, tmp_path, capsys):
    """Another model's store, the data's own folder, and a folder with other data are refused."""
    make_model(tmp_path / "other", seed=7)
    assert run(tmp_path / "other", toy, mined, *RULES) == 2
    assert "checkpoint" in capsys.readouterr().err
    assert run(tiny_model_dir, toy, toy, *RULES) == 2
    assert "expected another" in capsys.readouterr().err
    write(tmp_path / "full", somebody=[{"query": "a", "pos": ["b"]}])
    assert run(tiny_model_dir, toy, tmp_path / "full", *RULES) == 2
    assert "somebody.jsonl" in capsys.readouterr().err
    (tmp_path / "pool.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n', encoding="utf-8")
    assert run(tiny_model_dir, toy, tmp_path / "o", "--pool", str(tmp_path / "pool.jsonl")) == 2
    assert "pool.jsonl:2" in capsys.readouterr().err


def test_changed_rows_cost_their_shards(toy, mined, tiny_model_dir, tmp_path):
    """A task with one more row is mined again; the others are left alone."""
    rows = rows_of(toy, "labels")
    data = write(tmp_path / "data", labels=rows, planted=planted(60))
    assert run(tiny_model_dir, data, tmp_path / "out", *RULES) == 0
    untouched = (tmp_path / "out" / "planted.jsonl").stat().st_mtime_ns
    write(data, labels=[*rows, {"query": "a new one", "pos": ["mat"]}])
    assert run(tiny_model_dir, data, tmp_path / "out", *RULES) == 0
    assert len(rows_of(tmp_path / "out", "labels")) == 21
    assert (tmp_path / "out" / "planted.jsonl").stat().st_mtime_ns == untouched


def program(model, data, output):
    """The command of a run, as a process."""
    return [
        str(ROOT / "mine.py"), "--model", str(model), "--data", str(data), "--output", str(output),
        *RULES, "--dtype", "float32",
    ]  # fmt: skip


def test_killed_runs_resume_to_the_same_bytes(toy, mined, tiny_model_dir, tmp_path):
    """kill -9 once a shard was written; the next run ends like the unbroken one."""
    output = tmp_path / "out"
    command = [sys.executable, *program(tiny_model_dir, toy, output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any((output / ".mining").glob("model/shards/*.npy")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run(tiny_model_dir, toy, output, *RULES) == 0
    assert contents(output) == contents(mined)
    assert not list(output.rglob(".*.tmp"))


@pytest.mark.slow
def test_two_ranks_write_the_same(toy, mined, tiny_model_dir, tmp_path):
    """Under torchrun with two processes the output is that of one."""
    output = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *program(tiny_model_dir, toy, output)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert contents(output) == contents(mined)


def test_what_is_known_of_a_query_is_known_in_every_task(tiny_model_dir, tmp_path):
    """Positives in other tasks, the query, texts of its class, and their duplicates by case, white
    space or width are never negatives, with a pool or without; class 1 of a task is not another's."""
    question, other = "Where is the CAT", "where is\tthe ｃat "
    grouped = [{"query": f"one {group} {n}", "group": group} for group in "xy" for n in range(2)]
    tasks = {
        "a": [{"query": question, "pos": ["on the mat"]}, {"query": "see", "pos": ["the dog"]}],
        "b": [{"query": other, "pos": ["in its house"], "neg": ["On  the MAT", "far"]}],
        "c": [{"query": "in ITS house", "pos": ["a blue house"]}],
        "d": [*grouped, {"query": question, "group": "x"}],
        "e": [
            {"query": question, "pos": ["cat"], "group": 1},
            {"query": "birds", "pos": ["cat"], "group": 1},
            {"query": "dogs", "pos": ["dog"], "group": 2},
        ],
        "f": [{"query": "blue birds", "pos": ["a mat"], "group": 1}],
    }
    data = write(tmp_path / "data", **tasks)
    (data / "c.toml").write_text("symmetric = true\n", encoding="utf-8")
    (data / "d.toml").write_text("label_based = true\n", encoding="utf-8")
    pool = ["ON THE MAT", "IN its house", "Where is the cat", "one x 0", "ONE X 1", "BIRDS", "Cat"]
    pool += ["one y 0", "dogs", "dog", "a blue house", "A  BLUE HOUSE", "blue birds", "far"]
    write(tmp_path, pool=[{"text": one} for one in pool])
    rules = ("--rank-range", "1", "100", "--num-negatives", "99", "--consistency-top-k", "none")
    flags = (*rules, "--pool", str(tmp_path / "pool.jsonl"))
    assert run(tiny_model_dir, data, tmp_path / "out", *flags) == 0
    for task in "abe":  # the first row of each asks the same
        negatives = set(rows_of(tmp_path / "out", task)[0]["neg"])
        assert negatives == {
            "one y 0",
            "dogs",
            "dog",
            "a blue house",
            "A  BLUE HOUSE",
            "blue birds",
            "far",
        }
    asked = rows_of(tmp_path / "out", "c")[0]["neg"]
    assert "a blue house" not in asked
    assert "Where is the cat" in asked  # an answer is no query, except in a symmetric task
    assert run(tiny_model_dir, data, tmp_path / "own", *rules) == 0
    assert rows_of(tmp_path / "own", "b")[0]["neg"] == ["far"]


def test_a_class_does_not_fill_the_list(tiny_model_dir, tmp_path):
    """Where all texts nearest to a query are of its class, negatives are found behind them."""
    texts = {"x": "the cat sat on a mat {}", "y": "blue birds {} ran far"}
    rows = [
        {"query": text.format(n), "pos": [f"{text.format(n)} {n}"], "group": group}
        for group, text in texts.items()
        for n in range(20)
    ]
    data, output = write(tmp_path / "data", one=rows), tmp_path / "out"
    flags = ("--rank-range", "1", "2", "--num-negatives", "2", "--consistency-top-k", "none")
    assert run(tiny_model_dir, data, output, *flags) == 0
    answers = {group: {row["pos"][0] for row in rows if row["group"] == group} for group in texts}
    for row in rows_of(output, "one"):
        assert len(set(row["neg"]) - answers[row["group"]]) == 2


def test_a_new_answer_in_one_task_changes_another(tiny_model_dir, tmp_path):
    """A finished task is mined again when another task says more about its queries, else left."""
    data = write(tmp_path / "data", a=planted(40), b=planted(40, seed=1), c=planted(40, seed=2))
    output, flags = tmp_path / "out", ("--rank-range", "1", "9", "--consistency-top-k", "none")
    assert run(tiny_model_dir, data, output, *flags) == 0
    first, times = rows_of(output, "a")[0], (output / "c.jsonl").stat().st_mtime_ns
    write(data, b=[*planted(40, seed=1), {"query": first["query"], "pos": [first["neg"][0]]}])
    assert run(tiny_model_dir, data, output, *flags) == 0
    assert first["neg"][0] not in rows_of(output, "a")[0]["neg"]
    assert (output / "c.jsonl").stat().st_mtime_ns == times


@pytest.mark.parametrize("with_pool", [True, False])
def test_a_row_keeps_its_negatives(tiny_model_dir, make_model, tmp_path, with_pool):
    """With --keep-negatives they come first, once each, with scores; never one that some line labels
    as an answer, and the report counts them. Without it they are counted as replaced."""
    rows = planted(40)
    rows[0]["neg"] = ["far birds", "far birds", rows[0]["pos"][0].upper(), "its house"]
    rows[1]["neg"] = ["a mat"]
    rows.append({"query": rows[1]["query"], "pos": ["A mat"]})
    data, output = write(tmp_path / "data", one=rows), tmp_path / "out"
    write(tmp_path, pool=[{"text": row["pos"][0]} for row in rows])
    scorer = make_model(tmp_path / "scorer", seed=5)
    flags = ["--rank-range", "1", "30", "--consistency-top-k", "none"]
    flags += ["--pool", str(tmp_path / "pool.jsonl")] if with_pool else []
    keep = ("--keep-negatives", "--scorer", str(tmp_path / "scorer"))
    assert run(tiny_model_dir, data, output, *flags, *keep) == 0
    first, second, *_ = mined = rows_of(output, "one")
    assert first["neg"][:2] == ["far birds", "its house"]
    assert len(first["neg"]) == len(set(first["neg"])) == len(first["neg_scores"]) == 9
    assert "a mat" not in second["neg"]
    assert mined[2]["neg"][:2] == rows[2]["neg"]
    expected = scorer.similarity(scorer.encode([first["query"]]), scorer.encode(first["neg"]))[0]
    assert first["neg_scores"] == pytest.approx(expected.tolist(), abs=2e-6)
    readme = (output / "README.md").read_text(encoding="utf-8")
    total = sum(len(row.get("neg", [])) for row in rows)
    kept = sum(len(row["neg"]) - 7 for row in mined)
    assert f"of {total} negatives that the rows had, {kept} stay" in readme
    assert run(tiny_model_dir, data, output, *flags) == 0
    assert f"of {total} negatives that the rows had, 0 stay" in (output / "README.md").read_text()
    assert len(rows_of(output, "one")[0]["neg"]) == 7


def test_a_damaged_output_is_not_finished(toy, mined, tiny_model_dir, tmp_path):
    """A file of a finished task that was cut, changed or removed is written again, and so is one whose
    record is damaged."""
    output = tmp_path / "out"
    shutil.copytree(mined, output)
    for name in ("planted.jsonl", "twice.toml", "README.tasks/labels.md"):
        path = output / name
        path.write_bytes(path.read_bytes()[:-9])
    record = output / ".mining" / "tasks" / "grouped.json"
    wrong = read_json(record)
    wrong["summary"]["kept"] = "many"
    for damaged in (b"[" * 100_000, b"[]", b"{", json.dumps(wrong).encode()):
        record.write_bytes(damaged)
        assert run(tiny_model_dir, toy, output, *RULES) == 0
        assert contents(output) == contents(mined)


def test_names_of_tasks_are_only_names(tiny_model_dir, tmp_path, capsys):
    """Tasks whose names are paths, share escapes, are long or hold codes have files of their own in the
    output, settings only from the data's folder, and do nothing in the report or on a terminal."""
    names = [
        "a/b",
        "a%2Fb",
        "../secret",
        ".x",
        "README",
        "n" * 300,
        "<b>*[$\\x](y)|",
        "\x1b[31m\nred",
        "猫",
    ]
    rows = [
        {"query": f"one {n} {m}", "pos": [f"the {n} cat ```<i>`` \x1b[0m"], "task": name}
        for n, name in enumerate(names)
        for m in range(3)
    ]
    data, output = write(tmp_path / "data" / "train", all=rows), tmp_path / "out"
    (tmp_path / "data" / "secret.toml").write_text("weight = 7", encoding="utf-8")
    flags = ("--rank-range", "1", "9", "--consistency-top-k", "1")
    assert run(tiny_model_dir, data, output, *flags) == 0
    mined = TrainingData(output)
    assert sorted(mined.task_names) == sorted(names)
    assert sum(mined.task_sizes) == len(rows)
    assert {one.weight for one in mined.settings} == {1.0}
    assert not list(output.rglob("*.toml"))
    for page in (output / "README.md", *output.glob("README.tasks/*")):
        said = page.read_text(encoding="utf-8")
        assert "\x1b" not in said
        assert "<b>" not in said
        assert "``<i>" not in re.sub(r"(`{4,}) .*? \1", "", said)
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("keep", ["--keep-negatives", "--official-rank"])
def test_numbers_beyond_the_corpus(tiny_model_dir, tmp_path, keep):
    """A rank, number or filter of a billion, the highest, means all that the corpus holds."""
    data = write(tmp_path / "data", one=planted(20))
    many = str(10**9)
    flags = ("--rank-range", "1", many, "--num-negatives", many, "--consistency-top-k", many)
    assert run(tiny_model_dir, data, tmp_path / "out", *flags, keep, "--seed", many) == 0
    rows = rows_of(tmp_path / "out", "one")
    assert len({one for row in rows for one in (*row["pos"], *row["neg"])}) == len(
        {one for row in planted(20) for one in (*row["pos"], *row.get("neg", []))}
    )


def test_what_is_missing_is_said_before_encoding(tiny_model_dir, tmp_path, capsys, monkeypatch):
    """No faiss, an index that faiss refuses, no pool: one sentence, and nothing was encoded."""
    data = write(tmp_path / "data", one=planted(20))
    nowhere = str(tmp_path / "nowhere.jsonl")
    wrong = {
        (
            "--pool",
            nowhere,
        ): f'{nowhere}: expected a JSONL(.gz) file of {{"text"}} to mine, found nothing',
        ("--pool", str(tmp_path)): "found a folder",
        ("--index", "Flt"): "faiss refused",
        ("--index", "Flat;nprobe=x"): "faiss refused",
        ("--device", "gpu"): "device: expected cpu",
    }
    monkeypatch.setitem(sys.modules, "faiss", None)
    for flags in (("--search", "faiss"), ("--index", "Flat")):
        assert run(tiny_model_dir, data, tmp_path / "out", *flags) == 2
        assert "faiss is not installed" in capsys.readouterr().err
    monkeypatch.undo()
    for flags, sentence in wrong.items():
        if flags[0] == "--index":
            pytest.importorskip("faiss")
        assert run(tiny_model_dir, data, tmp_path / "out", *flags) == 2
        assert sentence in capsys.readouterr().err
    assert not list(tmp_path.rglob("shards"))


def test_an_index_for_a_corpus_of_few_texts(tiny_model_dir, tmp_path):
    """A task with too few texts to train the index is searched exactly, and stops no other task."""
    pytest.importorskip("faiss")
    data = write(tmp_path / "data", few=planted(20), more=planted(60))
    flags = ("--rank-range", "1", "9", "--index", "IVF64,Flat;nprobe=64")
    assert run(tiny_model_dir, data, tmp_path / "out", *flags) == 0
    assert "1.0000 |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert run(tiny_model_dir, data, tmp_path / "exact", *flags[:3]) == 0
    assert rows_of(tmp_path / "out", "few") == rows_of(tmp_path / "exact", "few")


def test_two_runs_on_one_output(toy, tiny_model_dir, tmp_path, capsys):
    """The second is told about the first and touches nothing; a dry run needs no lock."""
    with locked(tmp_path / "out"):
        assert run(tiny_model_dir, toy, tmp_path / "out", *RULES) == 2
        assert "to be alone there" in capsys.readouterr().err
        assert run(tiny_model_dir, toy, tmp_path / "out", *RULES, "--dry-run") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_stopped_run_says_what_is_kept(toy, mined, tiny_model_dir, tmp_path, capsys, monkeypatch):
    """SIGTERM ends a run in one sentence; the same command continues to the same bytes."""
    output = tmp_path / "out"

    def write_and_stop(path, array):
        write_array(path, array)
        os.kill(os.getpid(), signal.SIGTERM)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, end_at_once)  # as a process begins
    try:
        with monkeypatch.context() as patch:
            patch.setattr("kalm_min.vectors.write_array", write_and_stop)
            assert run(tiny_model_dir, toy, output, *RULES) == 143
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("interrupted; what was written is kept")
    assert len(list(output.rglob("*.npy"))) == 1
    assert run(tiny_model_dir, toy, output, *RULES) == 0
    assert contents(output) == contents(mined)
