"""Averaging checkpoints: the arithmetic, the refusals, and a result that is a complete model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kalm_min import Embedder
from kalm_min.soup import main

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def checkpoints(make_model, tmp_path_factory):
    """Three models of one shape and three draws."""
    folder = tmp_path_factory.mktemp("soup")
    for seed in range(3):
        make_model(folder / str(seed), seed=seed)
    return [folder / str(seed) for seed in range(3)]


def run(capsys, output, *arguments):
    """(exit code, standard error) of the command."""
    code = main([*map(str, arguments), "--output", str(output)])
    return code, capsys.readouterr().err


def test_the_weighted_mean(checkpoints, tmp_path, capsys):
    """Every tensor against float64 arithmetic, to half a unit in the last place of float32."""
    weights = (0.5, 0.3, 0.2)
    code, err = run(capsys, tmp_path / "out", *checkpoints, "--weights", *weights)
    assert (code, "3 checkpoints averaged" in err) == (0, True)
    states = [load_file(folder / FILE) for folder in checkpoints]
    mixed = load_file(tmp_path / "out" / FILE)
    assert mixed.keys() == states[0].keys()
    for name, tensor in mixed.items():
        exact = sum(w * s[name].double() for w, s in zip(weights, states, strict=True))
        half = torch.from_numpy(np.spacing(tensor.abs().numpy())).double() / 2
        assert ((tensor.double() - exact).abs() <= half * (1 + 1e-6)).all(), name


def test_a_complete_model(checkpoints, tmp_path, capsys):
    """The folder opens here and in sentence-transformers; prompts and length are the first's."""
    from sentence_transformers import SentenceTransformer

    first = Embedder.from_pretrained(checkpoints[0], dtype="float32", max_length=17)
    first.prompts["query"] = "the "
    first.save_pretrained(tmp_path / "first")
    code, _ = run(capsys, tmp_path / "out", tmp_path / "first", checkpoints[1])
    assert code == 0
    ours = Embedder.from_pretrained(tmp_path / "out", dtype="float32")
    assert (ours.max_length, ours.prompts["query"]) == (17, "the ")
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert np.abs(ours.encode(["a cat"]) - theirs.encode(["a cat"])).max() < 1e-5
    assert np.abs(ours.encode(["a cat"]) - first.encode(["a cat"])).max() > 0.01


def test_one_model_alone_is_itself(checkpoints, tmp_path, capsys):
    """A with A, at any weights, and A with weight 1 are A, bit for bit; inputs are untouched."""
    a, b = checkpoints[:2]
    before = (a / FILE).read_bytes()
    for number, arguments in enumerate(
        [(a, a, "--weights", 0.3, 0.7), (a, b, "--weights", 1, 0), (b, a, "--weights", 0, 1)]
    ):
        code, err = run(capsys, tmp_path / str(number), *arguments)
        assert code == 0, err
        assert (tmp_path / str(number) / FILE).read_bytes() == before
    assert (a / FILE).read_bytes() == before


def test_sixteen_bits_are_rounded_once(checkpoints, tmp_path, capsys):
    """The sum is taken in float64 and stored in the dtype of the first."""
    half = []
    for number, folder in enumerate(checkpoints[:2]):
        half.append(tmp_path / f"half{number}")
        Embedder.from_pretrained(folder).save_pretrained(half[-1], dtype="bfloat16")
    assert run(capsys, tmp_path / "out", *half)[0] == 0
    a, b, mixed = (load_file(folder / FILE) for folder in (*half, tmp_path / "out"))
    for name, tensor in mixed.items():
        assert tensor.dtype == torch.bfloat16
        exact = (0.5 * a[name].double() + 0.5 * b[name].double()).to(torch.bfloat16)
        assert torch.equal(tensor, exact)


def edit(folder, file, **changes):
    """Change keys of a JSON file."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"rope_theta": 5.0}, "rope_theta is 1000000.0 in the first and 5.0 here"),
        ("config.json", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-06 in the first"),
        ("config.json", {"is_causal": False}, "causal in the first and bidirectional here"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True},
            "pooling is mean in the first and lasttoken here",
        ),
        ("tokenizer.json", {"pre_tokenizer": None}, "tokenizer.json is not that of the first"),
    ],
)
def test_what_differs_is_named(checkpoints, tmp_path, capsys, file, changes, message):
    """Settings under which the same numbers mean something else."""
    other = shutil.copytree(checkpoints[1], tmp_path / "other")
    edit(other, file, **changes)
    code, err = run(capsys, tmp_path / "out", checkpoints[0], other)
    assert code == 2
    assert message in err
    assert str(other) in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_other_shapes_are_named(checkpoints, make_model, tmp_path, capsys):
    """Another width by its configuration; tensors that contradict it by name."""
    make_model(tmp_path / "wide", intermediate_size=64)
    code, err = run(capsys, tmp_path / "out", checkpoints[0], tmp_path / "wide")
    assert code == 2
    assert "intermediate_size is 48 in the first and 64 here" in err
    edit(tmp_path / "wide", "config.json", intermediate_size=48)
    code, err = run(capsys, tmp_path / "out", checkpoints[0], tmp_path / "wide")
    assert code == 2
    assert "mlp.up_proj.weight: expected shape (48, 32), found (64, 32)" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "expected at least 2, found 1"),
        (["a", "b", "--weights", "0.5"], "expected one for each of 2 checkpoints, found 1"),
        (["a", "b", "--weights", "0.5", "0.6"], "expected them to add up to 1, found 1.1"),
        (["a", "b", "--weights", "nan", "1"], "--weights: expected a list, each a number"),
    ],
)
def test_what_is_no_average_is_refused(tmp_path, capsys, arguments, message):
    """Exit code 2 and a sentence, before anything is read."""
    with pytest.raises(SystemExit) as stop:
        run(capsys, tmp_path / "out", *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_memory_is_about_one_model(make_model, tmp_path):
    """Three checkpoints of 40 MB: the private memory at the end of averaging is one of them."""
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 6, "head_dim": 32}
    for seed in range(3):
        make_model(tmp_path / str(seed), seed=seed, **sizes)
    size = (tmp_path / "0" / FILE).stat().st_size
    code = """
import re, sys
from pathlib import Path
from kalm_min import Embedder
from kalm_min.soup import average
def private(): return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def mix(*folders):
    models = [Embedder.from_pretrained(folder, "cpu", "auto") for folder in folders]
    average([one.model for one in models], [1 / len(models)] * len(models))
    return models
small = mix(sys.argv[1], sys.argv[1])  # what torch allocates on first use is not the models'
start = private()
models = mix(*sys.argv[2:])
print(private() - start)
"""
    folders = [tmp_path / str(seed) for seed in range(3)]
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path / "0", *folders],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert int(out.stdout) < 1.75 * size  # one and what malloc keeps, not two
