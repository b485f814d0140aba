"""The recipes in configs/ are configurations of train.py and begin with a comment."""

from pathlib import Path

import pytest

from kalm_min.config import parse
from kalm_min.options import TrainConfig

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_accepted(path):
    """Each file parses with a model, data and output given, and its first lines are a comment."""
    given = ["--data.path", "d", "--output", "o"]
    if "tokenizer" not in path.read_text():
        given += ["--model.path", "m"]
    config = parse(TrainConfig, [str(path), *given], program="p", description="d")
    assert config.loss.temperature > 0
    assert path.read_text().startswith("# ")
