"""The imports of the project, read from its source: the layers of docs/design.md, and what may be
imported in one place only."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENTRY_POINTS = (
    "train",
    "mine",
    "evaluate",
    "synthesize",
    "kalm_min.__main__",
    "kalm_min.train",
    "kalm_min.mine",
    "kalm_min.evaluate",
    "kalm_min.synthesize",
    "kalm_min.encode",
    "kalm_min.check",
    "kalm_min.soup",
    "kalm_min.convert",
)

# A module may import its own part, and parts of lower layers.
LAYERS = {
    "kalm_min.program": 0,
    "kalm_min.files": 0,
    "kalm_min.schema": 0,
    "kalm_min.console": 0,
    "kalm_min.tokenizer": 0,
    "kalm_min.sampling": 0,
    "kalm_min.settings": 0,
    "kalm_min.options": 0,
    "kalm_min.losses": 0,
    "kalm_min.model": 0,
    "kalm_min.vectors": 1,
    "kalm_min.topk": 1,
    "kalm_min.data": 1,
    "kalm_min.embedder": 1,
    "kalm_min.training.distributed": 1,
    "kalm_min.training.gradcache": 1,
    "kalm_min.training.parallel": 1,
    "kalm_min.training": 2,
    "kalm_min.mining": 2,
    "kalm_min.evaluation": 2,
    "kalm_min.synthesis": 2,
    "kalm_min.config": 3,
    **dict.fromkeys(ENTRY_POINTS, 4),
}
# Parts that may also be imported from their own layer: (importer, imported).
BESIDE = {
    ("kalm_min.settings", "kalm_min.files"),
    ("kalm_min.settings", "kalm_min.schema"),
    ("kalm_min.schema", "kalm_min.files"),
    ("kalm_min.tokenizer", "kalm_min.schema"),
    ("kalm_min.model", "kalm_min.schema"),
    ("kalm_min.model", "kalm_min.files"),
    ("kalm_min.model", "kalm_min.settings"),
    ("kalm_min.model", "kalm_min.options"),
    ("kalm_min.options", "kalm_min.settings"),
    ("kalm_min.tokenizer", "kalm_min.files"),
    ("kalm_min.vectors", "kalm_min.embedder"),
    ("kalm_min.vectors", "kalm_min.topk"),
}

RUNTIME = {"torch", "safetensors", "tokenizers", "numpy", "huggingface_hub", "tqdm"}

MTEB_SIDE = tuple(f"kalm_min.evaluation.{name}" for name in ("plan", "worker", "adapter", "local"))
# What is not imported, except in these modules or packages.
CONFINED = {
    "torch.distributed": (
        "kalm_min.training.distributed",
        "kalm_min.training.parallel",
        "kalm_min.training.checkpoint",
    ),
    "torch.nn.attention.varlen": ("kalm_min.model.attention",),
    "flash_attn": (),
    "faiss": ("kalm_min.topk",),
    "mteb": (*MTEB_SIDE, "kalm_min.embedder"),
    "datasets": MTEB_SIDE,
    "matplotlib": (
        "kalm_min.mining.report",
        "kalm_min.evaluation.report",
        "kalm_min.training.tracking",
        "kalm_min.synthesize",
    ),
    "pyarrow": ("kalm_min.convert",),
    "openai": ("kalm_min.synthesis.server",),
    "transformers": (),
    "sentence_transformers": ("kalm_min.check",),
    "argparse": ("kalm_min.config",),
    "pickle": (),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    name_of(path): path
    for path in sorted(
        [*(ROOT / "kalm_min").rglob("*.py"), *(ROOT / f"{name}.py" for name in ENTRY_POINTS[:4])]
    )
    if path.exists()
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def imports(name: str) -> Iterator[str]:
    """Every module `name` imports, wherever in the file, as the most exact dotted name."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                is_name = node.module.startswith("kalm_min") and dotted not in SOURCES
                yield (
                    "kalm_min.embedder"
                    if dotted == "kalm_min.Embedder"
                    else (node.module if is_name else dotted)
                )
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"


def part_of(name: str) -> str:
    """The longest entry of LAYERS that contains `name`."""
    parts = [part for part in LAYERS if inside(name, part)]
    assert parts, f"{name} has no layer: give it one in docs/design.md and here"
    return max(parts, key=len)


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "kalm_min"])
def test_imports_run_down(name):
    """No module imports one of a higher layer, nor another part of its own layer."""
    part = part_of(name)
    for other in imports(name):
        if not inside(other, "kalm_min", *ENTRY_POINTS):
            continue
        if (other, name) == ("kalm_min", "kalm_min.__main__"):  # its version
            continue
        assert other != "kalm_min", f"{name} imports the package's lazy names"
        below = part_of(other)
        siblings = part.rpartition(".")[0] == below.rpartition(".")[0] != "kalm_min"
        level = LAYERS[part] - LAYERS[below]
        allowed = below == part or level > 0 or (level == 0 and siblings) or (part, below) in BESIDE
        assert allowed, f"{name} (layer {LAYERS[part]}) imports {other} (layer {LAYERS[below]})"


@pytest.mark.parametrize("name", SOURCES)
def test_confined_imports(name):
    """Each heavy or risky import is confined to the modules that need it."""
    for other in imports(name):
        for module, importers in CONFINED.items():
            assert not inside(other, module) or inside(name, *importers), f"{name} imports {other}"


@pytest.mark.parametrize("name", SOURCES)
def test_only_declared_dependencies(name):
    """The core uses only its runtime dependencies; CONFINED names each extra with its modules."""
    for other in imports(name):
        root = other.partition(".")[0]
        assert root in {*RUNTIME, *CONFINED, *sys.stdlib_module_names, "kalm_min"}, other


@pytest.mark.parametrize("name", ["kalm_min.sampling", "kalm_min.settings", "kalm_min.options"])
def test_what_needs_no_torch(name):
    """An epoch is planned, and the settings of a checkpoint are read, without torch."""
    assert not [other for other in imports(name) if inside(other, "torch")]


@pytest.mark.parametrize(
    "name", [name for name in SOURCES if inside(name, "kalm_min.model", "kalm_min.losses")]
)
def test_model_and_losses_keep_no_state(name):
    """What they compute depends on their arguments alone: no logger, no global random state."""
    assert not [other for other in imports(name) if inside(other, "logging", "random")]
    assert not [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Global)]


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in ENTRY_POINTS])
def test_only_entry_points_print(name):
    """A library that prints cannot be used in a program."""
    calls = [node.func for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_unpickled(name):
    """A file from elsewhere can lie, but it cannot run code."""
    attributes = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)]
    assert "torch.load" not in {ast.unparse(node) for node in attributes}
