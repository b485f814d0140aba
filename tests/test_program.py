"""A command as a process: flags before torch, Ctrl-C, output that cannot end it, and its errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kalm_min import evaluate, program
from kalm_min.__main__ import COMMANDS
from kalm_min.config import check_output

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# A stand-in for a module that takes seconds to import.
SLOW = "import time, sys; print('importing', flush=True); time.sleep(60)"


def command(*words, **environment):
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env=ENVIRONMENT | environment, capture_output=True, timeout=120, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_are_read_without_torch(tmp_path, name):
    """--help and a wrong flag, with a torch and a numpy that cannot be imported."""
    for module in ("torch", "numpy", "tokenizers"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('imported')")
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = command("-m", "kalm_min", name, "--help", **path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert f"usage: kalm-min {name}".encode() in done.stdout
    done = command("-m", "kalm_min", name, "--xyzzy", "1", **path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"kalm-min {name}: ".encode())


def test_the_command_itself():
    """A list of the commands, a version, and the nearest name for a typo."""
    assert all(name in command("-m", "kalm_min").stdout.decode() for name in COMMANDS)
    assert command("-m", "kalm_min", "--version").stdout.startswith(b"kalm-min 0.")
    done = command("-m", "kalm_min", "trian")
    assert done.returncode == 2
    assert done.stderr == b"kalm-min: unknown command 'trian' (did you mean train?)\n"


@pytest.mark.parametrize("word", ["train.py", "-m kalm_min train", "-m kalm_min.train"])
def test_ctrl_c_while_modules_are_imported(tmp_path, word):
    """Exit code 130 and one sentence, whoever catches exceptions in between."""
    (tmp_path / "torch.py").write_text(SLOW)
    words = [*word.split(), "--model.path", "m", "--data.path", "d", "--output", tmp_path / "o"]
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, env=ENVIRONMENT | path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b"\ninterrupted\n"
    assert process.returncode == 130


PRINTER = r"""
import sys
from types import ModuleType
from kalm_min import program
module = sys.modules["kalm_min.x"] = ModuleType("kalm_min.x")
def main(argv):
    for _ in range(20_000):
        print("\u4f60\u597d \udcff \x1b done")
        sys.stderr.write("\u4f60\u597d\n")
    open(argv[0], "w").write("the end")
    return 7
module.main = main
program.start("x")
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_never_ends_a_run(tmp_path, encoding):
    """Whatever the terminal can show; with a reader that leaves (`| head`); on a full device."""
    done = command("-c", PRINTER, tmp_path / "a", PYTHONIOENCODING=encoding)
    assert done.returncode == 7
    assert len(done.stdout.splitlines()) == 20_000
    line = (
        f"{sys.executable} -c '{PRINTER}' {tmp_path / 'b'} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    )
    head = subprocess.run(
        ["bash", "-c", line], env=ENVIRONMENT | {"PYTHONIOENCODING": encoding},
        capture_output=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert (head.returncode, head.stdout.count(b"\n")) == (7, 1)
    if Path("/dev/full").exists():
        with Path("/dev/full").open("w") as full:
            code = subprocess.run(
                [sys.executable, "-c", PRINTER, tmp_path / "c"], stdout=full, stderr=full,
                env=ENVIRONMENT, timeout=120, cwd=ROOT, check=False,
            ).returncode  # fmt: skip
        assert code == 7
        assert (tmp_path / "c").read_text() == "the end"
    assert (tmp_path / "b").read_text() == "the end"


def test_torchrun_gets_the_sentence(tmp_path):
    """In the file from which torchrun's own report takes what it prints last."""
    path = tmp_path / "error.json"
    done = command("train.py", "--xyzzy", TORCHELASTIC_ERROR_FILE=str(path), LOCAL_RANK="1")
    assert (done.returncode, done.stderr) == (2, b"")
    message = json.loads(path.read_text())["message"]
    assert message["message"].endswith("train.py: unknown flag --xyzzy (--help lists them all)")
    assert int(message["extraInfo"]["timestamp"]) <= time.time()


def test_where_a_command_may_write(tmp_path):
    """Not at or below a file, not over its input, not among other things; else anywhere."""
    (tmp_path / "file").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "other" / "photos").mkdir(parents=True)
    for output, message in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below" / "it", "is a file"),
        (tmp_path / "model", "expected another folder than the input"),
        (tmp_path, "expected another folder than the input"),
        (tmp_path / "other", "expected a new or an empty folder, found photos in it"),
    ):
        with pytest.raises(ValueError, match=message):
            check_output(output, tmp_path / "model", marks=["config.toml"])
    for output in (tmp_path / "new" / "deep", tmp_path / "model" / "results"):
        check_output(output, tmp_path / "model")
    (tmp_path / "other" / "config.toml").touch()
    check_output(tmp_path / "other", marks=["config.toml"])


@pytest.mark.parametrize("name", ["soup", "encode"])
def test_a_disk_that_is_full(tiny_model_dir, tmp_path, name):
    """One sentence with the path, exit code 1, and nothing half-written."""
    (tmp_path / "x.txt").write_text("a b c\n" * 400)
    words = {
        "soup": [tiny_model_dir, tiny_model_dir, "--output", tmp_path / "out"],
        "encode": [tmp_path / "x.txt", "--model", tiny_model_dir, "--output", tmp_path / "v.npy"],
    }[name]
    code = "import resource as r, runpy, sys; r.setrlimit(r.RLIMIT_FSIZE, (9_000, 9_000)); "
    code += "sys.argv[0] = 'kalm-min'; runpy.run_module('kalm_min', run_name='__main__')"
    done = command("-W", "ignore", "-c", code, name, *words)
    assert done.returncode == 1, done.stderr
    assert done.stderr.decode().startswith(f"kalm-min {name}: {words[-1]}: ")
    assert len(done.stderr.splitlines()) == 1
    assert not Path(words[-1]).exists()


def test_an_evaluation_ends_by_sigterm_as_every_command(tmp_path, monkeypatch):
    """It keeps the frame's handler, which gives exit code 143, where its own once gave 130."""
    monkeypatch.setattr(evaluate, "tabulate", lambda _: 0)
    before = signal.signal(signal.SIGTERM, program._interrupt)
    try:
        assert evaluate.main(["--report-only", "--output", str(tmp_path)]) == 0
        assert signal.getsignal(signal.SIGTERM) is program._interrupt
    finally:
        signal.signal(signal.SIGTERM, before)
