"""A run that trains an adapter: what it writes, that it resumes, that processes agree."""

import hashlib
import json
import random
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from kalm_min import Embedder
from tests.training.runs import log, run, start

STEPS = 8


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, tiny_model_dir):
    """Eight steps in two epochs, an adapter of rank 4 on two kinds of projection, float32."""
    folder = tmp_path_factory.mktemp("lora")
    rng = random.Random(0)
    words = ["cat", "dog", "bird", "house", "mat", "blue", "far", "see", "run", "sat"]
    texts = [" ".join(rng.choices(words, k=5)) for _ in range(64)]
    rows = [{"query": f"{text} a", "pos": [f"{text} {i}"]} for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--model.path", tiny_model_dir, "--data.path", folder / "a.jsonl"),
        *("--model.causal", "false", "--sampling.batch-size", "16", "--training.epochs", "2"),
        *("--training.save-every", "4", "--training.precision", "float32"),
        *("--training.tokens-per-batch", "200", "--optimizer.learning-rate", "0.01"),
        *("--loss.temperature", "0.1", "--lora.rank", "4", "--lora.alpha", "8"),
        *("--lora.target-modules", "q_proj", "down_proj"),
    ]


def digests(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(arguments, tiny_model_dir, tmp_path_factory):
    base = digests(tiny_model_dir)
    output = tmp_path_factory.mktemp("run") / "run"
    code, said = start(arguments, output)
    assert code == 0, said
    assert digests(tiny_model_dir) == base
    return output


def test_a_merged_model_and_its_adapter(finished, tiny_model_dir):
    """final/ is a plain model, adapter/ the same by itself; only the target projections moved."""
    assert log(finished)[-1]["loss"] < 0.9 * log(finished)[0]["loss"]
    before = load_file(tiny_model_dir / "model.safetensors")
    after = load_file(finished / "final" / "model.safetensors")
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert moved == {
        f"layers.{i}.{name}.weight"
        for i in (0, 1)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    texts = ["a cat", "far blue house"]
    newest = finished / "checkpoints" / f"step_{STEPS:08d}"
    vectors = [
        Embedder.from_pretrained(folder, dtype="float32").encode(texts)
        for folder in (finished / "final", finished / "adapter", newest)
    ]
    assert np.array_equal(vectors[0], vectors[1])
    assert np.array_equal(vectors[0], vectors[2])
    assert not Embedder.from_pretrained(finished / "adapter").causal  # the base is causal
    assert not (newest / "model.safetensors").exists()


def test_resumes_bit_for_bit(arguments, finished, tmp_path):
    """From the checkpoint in the middle, the same log and the same bytes."""
    before, lines = digests(finished / "final") | digests(finished / "adapter"), log(finished)
    shutil.copytree(finished, tmp_path / "whole")
    for left in ("final", "adapter", f"checkpoints/step_{STEPS:08d}"):
        shutil.rmtree(finished / left)
    code, said = start(arguments, finished)
    assert code == 0, said
    assert "resuming from step 4" in said
    assert log(finished) == lines
    assert digests(finished / "final") | digests(finished / "adapter") == before
    newest = f"checkpoints/step_{STEPS:08d}"
    assert digests(finished / newest) == digests(tmp_path / "whole" / newest)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_agree(arguments, finished, tmp_path, strategy):
    """Two processes, copies or shards: the losses of one, and a model that opens."""
    result = run(
        arguments, tmp_path / "run", "--parallel.strategy", strategy, processes=2
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for ours, alone in zip(log(tmp_path / "run"), log(finished), strict=True):
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)
    texts = ["a cat", "far blue house"]
    vectors = [
        Embedder.from_pretrained(folder, dtype="float32").encode(texts)
        for folder in (finished / "final", tmp_path / "run" / "final", tmp_path / "run" / "adapter")
    ]
    assert np.allclose(vectors[0], vectors[1], atol=1e-3)
    assert np.array_equal(vectors[1], vectors[2])


def test_what_cannot_be_adapted_is_one_sentence(arguments, finished, tiny_model_dir, tmp_path):
    """A fresh model, an unknown projection, an adapter as base: exit code 2, one line."""
    fresh = ["--model.tokenizer", tiny_model_dir, *arguments[2:]]
    other = ["--model.path", finished / "adapter", *arguments[2:]]
    for given, extra, message in (
        (fresh, (), "--lora.rank: expected --model.path, a checkpoint to adapt"),
        (other, (), "an adapter cannot be the base of another"),
        (arguments, ("--lora.target-modules", "c_attn"), "found 'c_attn'"),
        (arguments, ("--lora.rank", "-1"), "rank: expected 0 to 131,072"),
    ):
        code, said = start(given, tmp_path / "run", *extra)
        assert code == 2, said
        assert message in said
        assert len(said.strip().splitlines()) == 1
