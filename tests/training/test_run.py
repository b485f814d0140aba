"""Runs as a user starts them: killed, stopped, continued, refused."""

import json
import random
import shutil
import signal
import subprocess
from collections import Counter

import pytest

from kalm_min import Embedder
from kalm_min.training import checkpoint
from kalm_min.training.checkpoint import cut_log
from tests.training.runs import command, environment, log, run, start, wait_for_steps

STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two tasks of 40 pairs about numbered items, and a validation file."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    words = ["cat", "dog", "bird", "house", "mat", "blue", "far", "see", "run", "sat"]
    for task in ("a", "b"):
        rows = []
        for i in range(40):
            text = " ".join(rng.choices(words, k=5))
            rows.append(
                {"query": f"{text} {task}", "pos": [f"{text} {i}", text], "neg": ["the", "on"]}
            )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "train").mkdir(exist_ok=True)
        (folder / "train" / f"{task}.jsonl").write_text(lines)
    (folder / "valid.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def arguments(data, tiny_model_dir):
    """A run of 12 steps of a billion epochs on one thread, a checkpoint every 4."""
    return [
        *("--model.path", tiny_model_dir, "--data.path", data / "train"),
        *(
            "--sampling.batch-size",
            "16",
            "--sampling.num-negatives",
            "1",
            "--training.epochs",
            10**9,
        ),
        *("--training.max-steps", str(STEPS), "--training.save-every", "4"),
        *("--training.precision", "float32", "--training.tokens-per-batch", "200"),
        *("--loss.temperature", "0.1", "--optimizer.learning-rate", "0.01"),
    ]


@pytest.fixture(scope="module")
def unbroken(arguments, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken") / "run"
    result = run(arguments, output)
    assert result.returncode == 0, result.stderr
    return output


def test_a_finished_run_explains_itself(unbroken):
    """config, environment, one line per step, the newest checkpoints, and a model that encodes."""
    assert [line["step"] for line in log(unbroken)] == list(range(1, STEPS + 1))
    assert sorted(p.name for p in (unbroken / "checkpoints").iterdir()) == [
        f"step_{step:08d}" for step in (4, 8, 12)
    ]
    assert json.loads((unbroken / "environment.json").read_text())["world_size"] == 1
    first, last = log(unbroken)[0], log(unbroken)[-1]
    assert first["lr"] == 0.0
    assert last["loss"] < log(unbroken)[1]["loss"]
    assert {"hard", "in_batch", "masked_positive", "masked_query", "tokens", "grad_norm"} <= set(
        first
    )
    assert Embedder.from_pretrained(unbroken / "final").encode("a cat").any()
    assert Embedder.from_pretrained(unbroken / "checkpoints" / "step_00000004").encode("a").any()


def test_the_log_is_cut_where_a_run_resumes(tmp_path):
    """Later steps, and a line torn by a kill with all after it, go; the rest is unchanged."""
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(lines) + '{"step": 4, "los')
    cut_log(path, 3)
    assert path.read_text() == "".join(lines)
    cut_log(path, 1)
    assert path.read_text() == lines[0]
    path.write_text('{"step": 0, "validation": {"mrr": 0.5}}\n{"step": 1, "validation": []}\n')
    assert cut_log(path, 1) == [0.5]
    assert cut_log(tmp_path / "none.jsonl", 1) == []
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_saves_a_checkpoint(arguments, tmp_path, number):
    """SIGTERM and Ctrl-C finish the step, save, say how to continue, and exit with 128 + signal."""
    longer = [*arguments, "--training.max-steps", "15"]
    process = subprocess.Popen(
        command(longer, tmp_path / "run"), stderr=subprocess.PIPE, text=True, env=environment()
    )
    wait_for_steps(tmp_path / "run", 2, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    saved = max((tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoint.read_state(saved)["step"] == len(log(tmp_path / "run"))
    assert "the same command continues from there" in stderr
    assert "Traceback" not in stderr


def test_a_folder_belongs_to_one_configuration(arguments, unbroken):
    """Other settings in the same folder are refused by name; the same command has nothing to do."""
    code, said = start(arguments, unbroken, "--optimizer.learning-rate", "0.5")
    assert code == 2
    assert "--optimizer.learning-rate was 0.01, is 0.5" in said
    before = (unbroken / "log.jsonl").read_text()
    assert start(arguments, unbroken)[0] == 0
    assert (unbroken / "log.jsonl").read_text() == before


@pytest.mark.slow
def test_torchrun_equals_one_process(arguments, unbroken, data, tmp_path):
    """Two torchrun processes: the losses of one process to float32's accuracy, and validation runs."""
    extra = ("--data.validation", str(data / "valid.jsonl"), "--training.validate-every", "6")
    result = run(arguments, tmp_path / "run", *extra, processes=2)
    assert result.returncode == 0, result.stderr
    lines = log(tmp_path / "run")
    validations = [line for line in lines if "validation" in line]
    assert [line["step"] for line in validations] == [0, 6, 12]
    assert 0 < validations[0]["validation"]["mrr"] <= 1
    steps = [line for line in lines if "loss" in line]
    for ours, alone in zip(steps, log(unbroken), strict=True):
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)
        assert ours["masked_positive"] == alone["masked_positive"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--optimizer.learning-rat", "1"], "learning-rate"),
        (
            ["--loss.matryoshka-dims", "8"],
            "--loss.matryoshka-weights: expected one for each of the 1",
        ),
        (
            ["--loss.matryoshka-dims", "0", "--loss.matryoshka-weights", "1"],
            "matryoshka-dims: expected",
        ),
        (["--training.patience", "2"], "patience: expected --data.validation, found none"),
        (["--loss.temperature", "inf"], "temperature: expected 1e-06 to 1,000,000, found inf"),
        (["--model.path", "nowhere"], "nowhere"),
        (["--data.path", "nowhere"], "nowhere"),
        (["--model.tokenizer", "x"], "give either --model.path"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(arguments, tmp_path, extra, message):
    """Exit code 2, one line, no traceback, and nothing that looks like a run."""
    code, said = start(arguments, tmp_path / "run", *extra)
    assert code == 2, said
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_sharded_run_equals_one_process(arguments, unbroken, data, tmp_path):
    """FSDP2 on two processes: the losses of one process."""
    extra = ("--parallel.strategy", "fsdp", "--parallel.gradient-checkpointing")
    extra += ("--data.validation", str(data / "valid.jsonl"))
    result = run(arguments, tmp_path / "whole", *extra, processes=2)
    assert result.returncode == 0, result.stderr
    steps = [line for line in log(tmp_path / "whole") if "loss" in line]
    for ours, alone in zip(steps, log(unbroken), strict=True):
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-4)


def test_weights_caps_and_label_based_tasks_reach_the_run(tmp_path, arguments, data):
    """An epoch takes of each task what its settings say, resumed or not, and trains on classes."""
    shutil.copytree(data / "train", tmp_path / "train")
    classes = [{"query": f"the cat {i}", "group": i % 3} for i in range(40)]
    text = "".join(json.dumps(row) + "\n" for row in classes)
    (tmp_path / "train" / "c.jsonl").write_text(text)
    (tmp_path / "train" / "a.toml").write_text("weight = 2\n")
    (tmp_path / "train" / "b.toml").write_text("max_examples = 16\n")
    (tmp_path / "train" / "c.toml").write_text("label_based = true\nweight = 0.4\n")
    extra = ("--data.path", str(tmp_path / "train"), "--training.epochs", "1")
    output = tmp_path / "run"
    assert start(arguments, output, *extra)[0] == 0
    whole = log(output)
    # 80 + 16 + 16 examples, 16 a batch
    assert Counter(line["task"] for line in whole) == {"a": 5, "b": 1, "c": 1}
    shutil.rmtree(output / "final")
    shutil.rmtree(max((output / "checkpoints").glob("step_*")))
    assert start(arguments, output, *extra)[0] == 0
    assert log(output) == whole
