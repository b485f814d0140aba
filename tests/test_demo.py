"""The demo's text: training and evaluation share nothing and are always the same."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LIBRARY = {
    "alpha/__init__.py": '"""Alpha does the first things of all. It is a package."""\n',
    "alpha/beta.py": '''"""Beta: things that come second, told at length."""

def open_box(path, mode="r"):
    """Open the box at the given path. The lid is lifted before the box is entered,
    and it stays open until somebody closes it again."""
    # the lid has to be lifted first
    lift(path)
    return Box(path, mode)

class Box:
    """A box with a lid.

    It holds what is put into it for as long as nobody takes it out.
    """

    def close(self):
        self.lid.put_back_on(self.hinge, force=True, noise="little")
        self.hinge.oil(with_what="the finest oil", how_often="every year")

    async def send(self, *, where: str = "home") -> None:
        """Open the box at the given path."""
        await self.post(where)
''',
    "test/secret.py": 'def never():\n    """This is never read by anybody at all."""\n',
}


@pytest.fixture
def demo(monkeypatch):
    """The demo's text module."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("standard_library")


@pytest.fixture
def library(tmp_path):
    """A library of three files."""
    for name, text in LIBRARY.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_definitions(demo, library):
    """Modules, classes and functions are found with their documentation, but not tests."""
    found = {(one.module, one.name): one for one in demo.collect(library)}
    assert sorted(found) == [
        ("alpha", ""),
        ("alpha.beta", ""),
        ("alpha.beta", "Box"),
        ("alpha.beta", "Box.close"),
        ("alpha.beta", "Box.send"),
        ("alpha.beta", "open_box"),
    ]
    function = found["alpha.beta", "open_box"]
    assert function.signature == "alpha.beta: open_box(path, mode='r')"
    assert function.summary == "Open the box at the given path."
    assert function.details.startswith("The lid is lifted before the box is entered, and it")
    assert function.code == (
        'def open_box(path, mode="r"):\n    lift(path)\n    return Box(path, mode)'
    )
    assert function.comments == (
        ("the lid has to be lifted first", "lift(path)\nreturn Box(path, mode)"),
    )
    assert found["alpha.beta", "Box.close"].summary == ""
    assert found["alpha", ""].package == found["alpha.beta", ""].package == "alpha"


def test_methods_stay_with_their_class(demo, library):
    """Everything inside a definition is assigned with it."""
    box = [one for one in demo.collect(library) if one.name.startswith("Box")]
    assert len(box) == 3
    assert len({one.is_held_out for one in box}) == 1


def test_words_of_code(demo):
    """The baseline splits identifiers into words, so that it is a fair one."""
    expected = ["get", "content", "type", "http", "response", "3"]
    assert demo.words("getContent_type(HTTPResponse, 3)") == expected


@pytest.mark.slow
def test_nothing_is_on_both_sides(demo, tmp_path):
    """The real library: no text of training in evaluation, and two runs write the same bytes."""
    rows = demo.write(tmp_path / "a")
    demo.write(tmp_path / "b")
    texts = {"train": set(), "eval": set()}
    for name in rows:
        text = (tmp_path / "a" / name).read_text(encoding="utf-8")
        assert text == (tmp_path / "b" / name).read_text(encoding="utf-8")
        if name.endswith(".jsonl"):
            loaded = [json.loads(line) for line in text.splitlines()]
            texts[name.split("/")[0]] |= demo.texts_of(loaded)
            assert len(loaded) == rows[name] >= 100
    assert len(texts["train"]) > 20_000
    assert len(texts["eval"]) > 4_000
    assert not texts["train"] & texts["eval"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_runs(tmp_path):
    """The full demo, with two training steps, succeeds and writes all promised files."""
    command = [sys.executable, "examples/demo.py", "--output", str(tmp_path / "demo")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--steps", "2"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("summary.md", "loss.png", "dimensions.png", "second/final/model.safetensors"):
        assert (tmp_path / "demo" / name).stat().st_size > 100
