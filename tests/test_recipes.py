"""The recipes in configs/ are configurations of train.py and begin with a comment."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_accepted(path, monkeypatch):
    """Each file parses with a model, data and output given, and its first lines are a comment."""
    monkeypatch.syspath_prepend(str(ROOT))
    import train
    from kalm_min.config import parse

    given = ["--data.path", "d", "--output", "o"]
    if "tokenizer" not in path.read_text():
        given += ["--model.path", "m"]
    config = parse(train.TrainConfig, [str(path), *given], program="p", description="d")
    assert config.loss.temperature > 0
    assert path.read_text().startswith("# ")
    assert sys.modules["train"].__file__ == str(ROOT / "train.py")
