"""What goes wrong in a long run (numbers, processes, nodes), after which it resumes as if unbroken."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kalm_min import Embedder, files
from kalm_min.training import checkpoint
from kalm_min.training.trainer import OptimizerConfig, build_optimizer
from tests.training.runs import (
    PATIENCE,
    ROOT,
    command,
    environment,
    log,
    run,
    same,
    start,
    wait_for_steps,
    weights,
)

pytestmark = pytest.mark.timeout(6 * PATIENCE)  # each starts several runs
WORDS = ["cat", "dog", "bird", "house", "mat", "blue", "far", "see", "run", "sat"]


def write_task(path, count, **extra):
    """Pairs with scored negatives; returns the lines."""
    rng = random.Random(path.name)
    texts = [" ".join(rng.choices(WORDS, k=5)) for _ in range(count)]
    rows = [
        {"query": f"{text} {path.stem}", "pos": [f"{text} {i}", text], "pos_scores": [0.9, 0.8]}
        | {"neg": rng.sample(texts, 4), "neg_scores": [0.4, 0.3, 0.2, 0.1]}
        | extra
        for i, text in enumerate(texts)
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three tasks of 40 examples, one of them with groups, one without in-batch negatives."""
    folder = tmp_path_factory.mktemp("data") / "train"
    write_task(folder / "a.jsonl", 40)
    write_task(folder / "b.jsonl", 40, group="x")
    write_task(folder / "c.jsonl", 40)
    (folder / "c.toml").write_text("in_batch_negatives = false\n")
    return folder


@pytest.fixture(scope="module")
def arguments(data, tiny_model_dir):
    """Three epochs of seven steps with every option of the loss on, a checkpoint every 5."""
    return [
        *("--model.path", tiny_model_dir, "--data.path", data, "--training.epochs", "3"),
        *("--sampling.batch-size", "16", "--sampling.num-negatives", "3"),
        *("--sampling.homogeneous-ratio", "0.5", "--training.save-every", "5"),
        *("--training.keep-checkpoints", "9", "--training.precision", "float32"),
        *("--training.tokens-per-batch", "200", "--optimizer.learning-rate", "0.01"),
        *("--loss.temperature", "0.1", "--loss.gamma", "0.5", "--loss.mixing"),
        *("--loss.distillation-weight", "0.7", "--loss.matryoshka-dims", "32", "8"),
        *("--loss.matryoshka-weights", "1", "0.3", "--loss.query-negatives"),
        *("--loss.document-negatives", "--loss.false-negative-margin", "0.1"),
        *("--loss.memory-gib", "0.0001"),
    ]


# ---- numbers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(arguments, data, tiny_model_dir, tmp_path_factory):
    """The same run with a model that cannot embed "~", and two lines that hold one."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(tiny_model_dir, folder / "model")
    shutil.copytree(data, folder / "data", ignore=shutil.ignore_patterns(".*"))
    vocabulary = json.loads((folder / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["embed_tokens.weight"][vocabulary["~"]] = np.inf
    save_file(tensors, path, metadata={"format": "pt"})
    path = folder / "data" / "b.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4]["query"] += " ~"
    rows[8]["pos"] = ["a ~"]
    rows[8]["pos_scores"] = [0.9]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = {tiny_model_dir: folder / "model", data: folder / "data"}
    given = [changed.get(argument, argument) for argument in arguments]
    return given, {f"{path}:5", f"{path}:9"}


def test_what_is_not_finite_stops_the_run(broken, tmp_path):
    """Exit code 1 and one sentence with file:line, before a checkpoint could hold it."""
    code, said = start(broken[0], tmp_path / "run")
    assert code == 1, said
    assert "the weights are untouched" in said
    assert any(place in said for place in broken[1])
    steps = log(tmp_path / "run") if (tmp_path / "run" / "log.jsonl").exists() else []
    assert not any("skipped" in line for line in steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "strategy"),
    [(1, "ddp"), (2, "ddp"), (2, "fsdp")],
)
def test_what_is_not_finite_is_skipped_on_request(broken, tmp_path, processes, strategy):
    """Such a step is logged with file:line and changes nothing, on any process; resume is bit for bit."""
    extra = ("--training.non-finite", "skip", "--training.save-every", "1")
    extra += ("--training.max-steps", "10", "--training.keep-checkpoints", "99")
    extra += ("--parallel.strategy", strategy)
    output = tmp_path / "run"
    result = run(broken[0], output, *extra, processes=processes)
    assert result.returncode == 0, result.stderr
    lines = log(output)
    skipped = [line for line in lines if "skipped" in line]
    assert 1 <= len(skipped) <= 4
    assert {place for line in skipped for place in line["skipped"]} <= broken[1]
    assert all(line["loss"] is None for line in skipped)
    assert all(np.isfinite(line["loss"]) for line in lines if "skipped" not in line)
    saved = output / "checkpoints"
    for line in skipped:
        before, after = (saved / f"step_{line['step'] - back:08d}" for back in (1, 0))
        for name in ("model.safetensors", "optimizer.safetensors"):
            if before.exists():
                assert (before / name).read_bytes() == (after / name).read_bytes()
        assert f"step {line['step']} skipped" in result.stderr
    first = skipped[0]["step"]
    trained = weights(output)
    shutil.rmtree(output / "final")
    for path in saved.iterdir():
        if checkpoint.read_state(path)["step"] > first:
            shutil.rmtree(path)
    result = run(broken[0], output, *extra, processes=processes)
    assert result.returncode == 0, result.stderr
    assert f"resuming from step {first}" in result.stderr
    assert log(output) == lines
    assert same(weights(output), trained)


# ---- checkpoints ---------------------------------------------------------------------------------


def fake_checkpoint(root, step, score=None):
    folder = root / f"step_{step:08d}"
    folder.mkdir(parents=True)
    state = {"step": step, "validation": score, "sampler": {}}
    (folder / "state.json").write_text(json.dumps(state))


def test_the_newest_and_the_best_are_kept(tmp_path):
    """The first of equals; only the newest without scores; unfinished and half-deleted ones go."""
    root = tmp_path / "checkpoints"
    for step, score in ((5, 0.2), (10, 0.7), (15, 0.7), (20, None), (25, 0.1)):
        fake_checkpoint(root, step, score)
        checkpoint.prune(root, 2)
    (root / ".step_00000030.abc.tmp" / "sub").mkdir(parents=True)
    (root / ".step_00000005.tmp").mkdir()
    (tmp_path / ".final.abc.tmp").mkdir()
    (tmp_path / ".log.jsonl.abc.tmp").touch()
    checkpoint.prune(root, 1)
    assert [*tmp_path.iterdir()] == [root]
    assert sorted(path.name for path in root.iterdir()) == ["step_00000010", "step_00000025"]
    assert checkpoint.best(checkpoint.whole(root)[0]) == root / "step_00000010"
    assert [*checkpoint.whole(root)[0]][-1] == root / "step_00000025"
    shutil.rmtree(root / "step_00000010")
    (root / "step_00000025" / "state.json").write_text('{"step": 25, "sampler": {}}')
    fake_checkpoint(root, 30)
    checkpoint.prune(root, 1)
    assert checkpoint.best(checkpoint.whole(root)[0]) is None
    assert [path.name for path in root.iterdir()] == ["step_00000030"]


def test_a_checkpoint_before_the_first_update_has_no_moments(tiny_model_dir, tmp_path):
    """Where every step so far was skipped, saving and resuming count no step."""
    embedder = Embedder.from_pretrained(tiny_model_dir, dtype="float32")
    optimizer = build_optimizer(embedder.model, OptimizerConfig())
    state = {"step": 1, "sampler": {}, "validation": None}
    checkpoint.save(tmp_path, embedder, optimizer, state)
    checkpoint.restore_optimizer(next(tmp_path.iterdir()), embedder.model, optimizer)
    assert not optimizer.state


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_option_resumes_bit_for_bit_in_the_second_epoch(arguments, tmp_path, strategy):
    """Two processes, from step 10 of 21: the log, the weights and the moments of the unbroken run."""
    output = tmp_path / "run"
    extra = ("--parallel.strategy", strategy)
    result = run(arguments, output, *extra, processes=2)
    assert result.returncode == 0, result.stderr
    lines, trained = log(output), weights(output)
    assert all(line["cross_device"] and line["mixed"] and line["query_query"] for line in lines)
    moments = (output / "checkpoints" / "step_00000021" / "optimizer.safetensors").read_bytes()
    shutil.rmtree(output / "final")
    for step in (15, 20, 21):
        shutil.rmtree(output / "checkpoints" / f"step_{step:08d}")
    result = run(arguments, output, *extra, processes=2)
    assert result.returncode == 0, result.stderr
    assert "resuming from step 10" in result.stderr
    assert log(output) == lines
    assert same(weights(output), trained)
    again = output / "checkpoints" / "step_00000021" / "optimizer.safetensors"
    assert again.read_bytes() == moments


@pytest.mark.slow
def test_killed_at_random_points():
    """A few of the points of benchmarks/kills.py, alone and with a process that loses its peer."""
    kills = [sys.executable, ROOT / "benchmarks" / "kills.py", "--points", "2", "--seed", "1"]
    result = subprocess.run(
        kills, capture_output=True, text=True, env=environment(), timeout=900, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


# ---- nodes ---------------------------------------------------------------------------------------


def two_nodes(arguments, output, restarts):
    """Two torchrun agents with a process each, meeting on a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    launcher += ["--rdzv-id", port, "--local-addr", "127.0.0.1", "--max-restarts", restarts]
    line = [sys.executable, *launcher, ROOT / "train.py", *arguments, "--output", output]
    # Otherwise torch's agents keep one store for all rounds, with the addresses of dead processes.
    separate = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return [
        subprocess.Popen(
            [*map(str, line)], stderr=subprocess.PIPE, text=True, env=environment() | separate
        )
        for _ in range(2)
    ]


def ends(agents):
    """Exit codes and stderr of both."""
    try:
        stderr = [agent.communicate(timeout=PATIENCE)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    return [agent.returncode for agent in agents], "".join(stderr)


def kill_a_worker(agent):
    """Kill -9 for the process that an agent started."""
    (worker,) = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)


@pytest.fixture(scope="module")
def on_two_nodes(arguments, tmp_path_factory):
    output = tmp_path_factory.mktemp("nodes") / "run"
    codes, stderr = ends(two_nodes(arguments, output, 0))
    assert codes == [0, 0], stderr
    return output


@pytest.mark.slow
def test_two_nodes_equal_one_process(arguments, on_two_nodes, tmp_path):
    """The loss curve of one process, to float32's accuracy, and the same candidates."""
    result = run(arguments, tmp_path / "run")
    assert result.returncode == 0, result.stderr
    for ours, alone in zip(log(on_two_nodes), log(tmp_path / "run"), strict=True):
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-3)
        assert ours["masked_positive"] == alone["masked_positive"]
        assert alone["cross_device"] == 0
        both = ours["cross_device"] + ours["in_batch"], ours["masked_margin"]
        assert sum(both) == pytest.approx(alone["in_batch"] + alone["masked_margin"])


@pytest.mark.slow
def test_a_lost_process_comes_back_from_the_last_checkpoint(arguments, on_two_nodes, tmp_path):
    """kill -9 on one node: with --max-restarts the group returns, to the end of the unbroken run."""
    output = tmp_path / "run"
    agents = two_nodes(arguments, output, 2)
    wait_for_steps(output, 7, agents[0])
    kill_a_worker(agents[1])
    codes, stderr = ends(agents)
    assert codes == [0, 0], stderr
    assert "resuming from step" in stderr
    assert log(output) == log(on_two_nodes)
    assert same(weights(output), weights(on_two_nodes))


@pytest.mark.slow
def test_a_lost_process_ends_the_run_with_a_message(arguments, tmp_path):
    """Without restarts: both agents end, soon, and the survivor says why and how to continue."""
    output = tmp_path / "run"
    agents = two_nodes(arguments, output, 0)
    wait_for_steps(output, 7, agents[0])
    began = time.monotonic()
    kill_a_worker(agents[1])
    codes, stderr = ends(agents)
    assert all(codes)
    assert time.monotonic() - began < PATIENCE / 4
    assert "lost another process of the group" in stderr
    assert "the same command continues from the last checkpoint" in stderr


@pytest.mark.slow
def test_workers_end_with_the_agent_that_started_them(arguments, tmp_path):
    """kill -9 on torchrun: its workers end and leave the folder, connected or not yet."""
    output = tmp_path / "run"
    agent = subprocess.Popen(
        command([*arguments, "--training.epochs", "999"], output, processes=2), env=environment()
    )
    wait_for_steps(output, 2, agent)
    with pytest.raises(ValueError, match=r"found process \d+ on .* at work"):
        files.locked(output).__enter__()
    agent.kill()
    agent.wait()
    began, free = time.monotonic(), False
    while not free and time.monotonic() - began < PATIENCE:
        with suppress(ValueError), files.locked(output):
            free = True
    assert time.monotonic() - began < 10
    gone = {"TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "1"}
    gone |= {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    result = subprocess.run(
        command(arguments, output), env=environment() | gone, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "torchrun's agent, which started this process, is gone" in result.stderr


# ---- teachers and compilers ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_teachers_scores_are_distilled(tiny_model_dir, make_model, tmp_path):
    """mine.py --scorer writes them, the V2.5 recipe takes them; data without is refused by file:line."""
    raw = tmp_path / "raw"
    write_task(raw / "t.jsonl", 60)
    lines = [json.loads(line) for line in (raw / "t.jsonl").read_text().splitlines()]
    plain = "".join(json.dumps({"query": r["query"], "pos": r["pos"]}) + "\n" for r in lines)
    (raw / "t.jsonl").write_text(plain)
    make_model(tmp_path / "teacher", seed=5)
    mine = [sys.executable, ROOT / "mine.py", "--model", tiny_model_dir, "--data", raw]
    mine += ["--scorer", tmp_path / "teacher", "--output", tmp_path / "scored"]
    mine += ["--rank-range", 5, 20, "--num-negatives", 3, "--consistency-top-k", 50]
    result = subprocess.run(
        [*map(str, mine)], capture_output=True, text=True, env=environment(), check=False
    )
    assert result.returncode == 0, result.stderr
    recipe = [ROOT / "configs" / "v25_distill.toml", "--model.path", tiny_model_dir]
    recipe += ["--sampling.batch-size", 8, "--loss.matryoshka-dims", 32, 16]
    recipe += ["--loss.matryoshka-weights", 1, 0.3, "--training.max-steps", 3, "--data.path"]
    result = run([*recipe, tmp_path / "scored"], tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert len(log(tmp_path / "run")) == 3
    result = run([*recipe, raw], tmp_path / "refused")
    assert result.returncode == 2, result.stderr
    assert f"{raw / 't.jsonl'}:1: expected pos_scores and neg_scores to distil" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_compiled_layers_train_or_say_what_is_missing(arguments, tmp_path, monkeypatch):
    """With a C++ compiler the losses of the plain run; without one, one sentence."""
    steps = ("--training.max-steps", "2", "--parallel.compile")
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = run(arguments, tmp_path / "refused", *steps)
    assert result.returncode == 2
    assert "--parallel.compile: expected a C++ compiler, no-such-compiler" in result.stderr
    monkeypatch.delenv("CXX")
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    result = run(arguments, tmp_path / "compiled", *steps)
    assert result.returncode == 0, result.stderr
    result = run(arguments, tmp_path / "plain", *steps[:-1])
    for ours, plain in zip(log(tmp_path / "compiled"), log(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4)
