"""Each module imports alone, with nothing but the runtime dependencies."""

import subprocess
import sys
from pathlib import Path

import pytest

import kalm_min

ROOT = Path(__file__).parent.parent

BLOCK = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Blocked())
"""

# One fork per module: torch is imported once, kalm_min anew each time.
IMPORT_EACH = """
import importlib, os, traceback
import numpy, safetensors, tokenizers, torch, huggingface_hub, tqdm

for name in sys.argv[1:]:
    if os.fork() == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            print(name, traceback.format_exc(), sep="\\n", flush=True)
            os._exit(1)
        os._exit(0)
    if os.wait()[1]:
        print("failed:", name, flush=True)
"""

EXTRAS = [
    "transformers", "sentence_transformers", "mteb", "faiss", "matplotlib", "pyarrow",
    "openai", "sklearn", "scipy", "pandas", "polars", "datasets",
]  # fmt: skip


def python(script: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_module_imports_alone():
    """No module needs another to have been imported first, nor a package of an extra."""
    paths = sorted((ROOT / "kalm_min").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    assert python(BLOCK.format(names=EXTRAS) + IMPORT_EACH, *names) == ""


@pytest.mark.parametrize(
    "module", ["kalm_min", "kalm_min.sampling", "kalm_min.config", "kalm_min.options"]
)
def test_planning_does_not_wait_for_torch(module):
    """Importing the package, the sampler or the parser leaves torch alone."""
    python(BLOCK.format(names=["torch", "tokenizers", *EXTRAS]) + f"import {module}")


def test_lazy_names():
    """Embedder is imported on first use; a wrong name is an AttributeError like any other."""
    assert kalm_min.Embedder.__name__ == "Embedder"
    assert "Embedder" in dir(kalm_min)
    with pytest.raises(AttributeError, match="no attribute 'Embeder'"):
        kalm_min.Embeder  # noqa: B018 -- the access is the test
