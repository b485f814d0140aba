"""The README is correct: its Python runs, its commands parse, its files exist."""

import re
import shlex
from pathlib import Path

import pytest

from kalm_min.config import parse
from kalm_min.convert import ConvertConfig
from kalm_min.evaluation.plan import EvaluationConfig
from kalm_min.options import TrainConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands(name: str) -> list[list[str]]:
    """The arguments of every call of a command in the README, in any of its three forms."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", "").splitlines()]
    forms = rf"(?:kalm-min {name}|-m kalm_min {name}|{name}\.py) (.*)"
    found = [match[1] for line in lines if (match := re.search(forms, line))]
    return [shlex.split(words, comments=True) for words in found]


def test_the_python_runs(tiny_model_dir, capsys):
    """The first lines a user types work as they stand, on any model."""
    assert len(blocks("python")) == 1
    for block in blocks("python"):
        exec(block.replace("runs/demo/second/final", str(tiny_model_dir)), {})
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("arguments", commands("train"))
def test_training_commands(arguments):
    """Every flag is one that train.py knows."""
    parse(TrainConfig, arguments, program="train.py", description="")


@pytest.mark.parametrize("arguments", commands("evaluate"))
def test_evaluation_commands(arguments):
    """Every flag is one that evaluate.py knows."""
    parse(EvaluationConfig, arguments, program="evaluate.py", description="")


@pytest.mark.parametrize("arguments", commands("convert"))
def test_conversion_commands(arguments):
    """Every flag is one that convert knows."""
    parse(ConvertConfig, arguments, program="convert", positional="input")


def test_its_files_exist():
    """Every path of the project that it names exists."""
    named = set(re.findall(r"[\w./]+\.(?:py|toml|md|txt)\b", README)) - {
        "config.toml",
        "summary.md",
    }
    folders = [ROOT, ROOT / "kalm_min", ROOT / "kalm_min/model", ROOT / "kalm_min/losses"]
    folders.append(ROOT / "kalm_min/training")
    missing = [name for name in named if not any((folder / name).exists() for folder in folders)]
    assert not missing


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_recipes_parse(path):
    """Every recipe is a configuration of train.py, except for what only the user knows."""
    text = path.read_text(encoding="utf-8")
    model = [] if re.search(r"^(path|tokenizer) = ", text, re.MULTILINE) else ["--model.path", "m"]
    parse(
        TrainConfig,
        [str(path), "--data.path", "d", "--output", "o", *model],
        program="train.py",
        description="",
    )
