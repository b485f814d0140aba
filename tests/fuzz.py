"""Malformed input: random edits of every file that a user hands in, or that a crash may damage.

    make fuzz INPUTS=2000          python tests/fuzz.py --inputs 2000 --seed 0 --only train cache

For each kind of file a small good folder is made. Per input one file of it is edited and read in this
process as the program reads it, with limits on time and memory. What may come of it:

- a ValueError or OSError: one sentence that names the file (a list of bad lines has one per line);
- the result of the good file, which is the only one that a damaged cache may give;
- another result, if the edited file means something else: the same as for the file that the standard
  library's parser and writer make of it.

Everything else is printed with the numbers that repeat it: another exception, no end within the limit,
an allocation beyond a gigabyte, a result that the meaning of the file does not give.
"""

import argparse
import faulthandler
import gzip
import importlib.util
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

SECONDS, BYTES = 20, 1 << 30  # of the processor, so that other work on the machine does not count


@dataclass
class Kind:
    """How to make a good folder, which of its files are edited, and how the program reads it."""

    make: Callable[[Path], None]
    files: str  # a pattern
    read: Callable[[Path], object]
    exact: bool = False  # a cache: only the result of the good file is right
    never_fails: bool = False  # a bad file among many is left out or made anew
    share: int = 1  # of the inputs; a whole command takes a second
    has_path: bool = True  # errors name a file, not a key that a flag may have set


# --- Edits ---------------------------------------------------------------------------------------

WEIRD = [
    None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e39, 1e308, math.nan, math.inf, 10**9, 10**12, 2**63,
    -(2**63), 10**400, "", " ", "0", "x" * 5000, "\ud83d", "a\0b", "\x1b[31m", "../x", "质", "{", "{0}",
    "{instruction}", "NaN", "true", [], [None], [[]], {}, {"": 0}, [1, "a"], ["a", "a"],
]  # fmt: skip
TOKENS = [
    b"\xef\xbb\xbf", b"\0", b"\xff", b"\r", b"\n", b"\r\n", b"{", b"}", b"[", b"]", b'"', b",", b":",
    b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 99_999, b'{"a":' * 99_999,
    b"\xe2\x80\xa8", b"\\ud800", b"\\", b"=", b"#", b"'''", b"0x" + b"f" * 9999, b"a." * 99_999, b"inf",
]  # fmt: skip


def edit_bytes(draw: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat, insert or replace, at a random place."""
    start = draw.randrange(len(data) + 1)
    end = min(len(data), start + int(draw.expovariate(0.1)))
    middle = [
        lambda: bytes(byte ^ 1 << draw.randrange(8) for byte in data[start : start + 1]),
        lambda: b"",
        lambda: data[start:end] * 2,
        lambda: draw.randbytes(end - start),
        lambda: draw.choice(TOKENS) + data[start:end],
        lambda: draw.choice(TOKENS),
    ]
    number = draw.randrange(len(middle) + 1)
    if number == len(middle):
        return data[:start]  # torn
    return data[:start] + middle[number]() + data[start + 1 if number == 0 else end :]


def edit_value(draw: random.Random, value: object) -> object:
    """The value with one part, at a random depth, replaced, removed, renamed or added."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.1:
        return draw.choice(WEIRD)
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    changed = value.copy()
    if draw.random() < 0.6:
        changed[key] = edit_value(draw, value[key])
    elif draw.random() < 0.5:
        del changed[key]
    elif isinstance(changed, dict):
        changed[draw.choice(["x", "", "\x1b", str(key).upper(), "lr"])] = draw.choice(WEIRD)
    else:
        changed.insert(draw.randrange(len(value)), draw.choice(WEIRD))
    return changed


def edit_text(draw: random.Random, data: bytes) -> bytes:
    """Another encoding, other ends of lines, or a container of the whole file."""
    text = data.decode("utf-8", "replace")
    return draw.choice([
        b"\xef\xbb\xbf" + data, text.encode("utf-16"), text.encode("utf-16-le"), gzip.compress(data),
        (text + "é").encode("latin-1", "replace"), data.replace(b"\n", b"\r\n"), data * 2, b"", b"\n\n",
        b"[" + data.replace(b"\n", b",\n") + b"]", data.replace(b"\n", b"\r"), data + b"\n\n",
    ])  # fmt: skip


def edit(draw: random.Random, path: Path, data: bytes) -> bytes:
    """An edited content of a file, of the kind its name says."""
    if path.suffix == ".gz" and draw.random() < 0.5:
        return gzip.compress(edit(draw, path.with_suffix(""), gzip.decompress(data)))
    if path.suffix == ".safetensors" and draw.random() < 0.8:
        length = int.from_bytes(data[:8], "little")
        header = dump(edit_value(draw, json.loads(data[8 : 8 + length])))
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    if path.suffix in (".json", ".jsonl", ".toml") and draw.random() < 0.6:
        if path.suffix == ".toml":
            return dump_toml(edit_value(draw, tomllib.loads(data.decode())))
        lines = [data] if path.suffix == ".json" else data.splitlines()
        number = draw.randrange(len(lines))
        lines[number] = dump(edit_value(draw, json.loads(lines[number])))
        if draw.random() < 0.05:  # a key twice
            lines[number] = re.sub(rb'^\{("\w+": )', rb'{\g<1>"x", \g<1>', lines[number])
        return b"\n".join(lines) + b"\n"
    if path.suffix in (".json", ".jsonl", ".toml", ".txt", ".tsv", ".csv") and draw.random() < 0.2:
        return edit_text(draw, data)
    for _ in range(draw.choice([1, 1, 1, 2, 9])):
        data = edit_bytes(draw, data)
    return data


def dump(value: object) -> bytes:
    return json.dumps(value).encode()


def dump_toml(value: object) -> bytes:
    """A table as dotted keys; what TOML cannot hold becomes something that is not TOML."""

    def lines(table: dict[str, object], prefix: str) -> list[str]:
        found = list[str]()
        for key, one in table.items():
            name = prefix + (key if re.fullmatch(r"[\w-]+", key, re.ASCII) else json.dumps(key))
            if isinstance(one, dict) and one:
                found += lines(one, f"{name}.")
            else:
                text = json.dumps(one, default=str).replace("Infinity", "inf").replace("NaN", "nan")
                found.append(f"{name} = {text}")
        return found

    return ("\n".join(lines(value, "")) if isinstance(value, dict) else str(value)).encode(
        "utf-8", "surrogatepass"
    )


def plain(path: Path, data: bytes) -> bytes | None:
    """The file that the standard library makes of an edited one; None if it finds no meaning."""
    with suppress(ValueError, RecursionError, EOFError, OSError):
        if path.suffix == ".gz":
            inner = plain(path.with_suffix(""), gzip.decompress(data))
            return None if inner is None else gzip.compress(inner)
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.numpy import load, save

            try:
                return save(load(data))
            except SafetensorError:
                return None
        text = data.decode("utf-8-sig")
        if path.suffix == ".json":
            return dump(json.loads(text))
        if path.suffix == ".toml":
            return dump_toml(tomllib.loads(text))
        if path.suffix == ".jsonl":
            rows = [line.strip(" \t\r") for line in text.split("\n")]
            return b"\n".join(dump(json.loads(row)) if row else b"" for row in rows)
        return text.encode() if path.suffix in (".txt", ".tsv", ".csv") else None
    return None


# --- Kinds ---------------------------------------------------------------------------------------


def helper(name: str) -> object:
    """The helpers of a part of the tests."""
    spec = importlib.util.spec_from_file_location(f"{name}_helpers", TESTS / name / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_train(folder: Path) -> None:
    rows = [
        {"query": f"what is {i}", "pos": [f"p{i}", "质"], "neg": ["n1", "n2"], "group": i % 2}
        for i in range(6)
    ]
    rows[1] |= {
        "task": "other",
        "instruction": "find",
        "pos_scores": [1, 0.5],
        "neg_scores": [0, 0],
    }
    (folder / "t.jsonl").write_bytes(b"".join(dump(row) + b"\n" for row in rows))
    (folder / "z.jsonl.gz").write_bytes(gzip.compress(b"".join(dump(row) + b"\n" for row in rows)))
    settings = {"instruction": "é", "symmetric": True, "weight": 0.5, "max_examples": 3}
    (folder / "t.toml").write_bytes(dump_toml(settings | {"in_batch_negatives": False}))


def read_train(folder: Path) -> object:
    from kalm_min.data import TrainingData, collate

    data = TrainingData(folder)
    batch = collate(list(data), num_negatives=1, template="{instruction}", epoch=0, seed=0)
    return (
        data.task_names,
        data.settings,
        list(data),
        batch.documents,
        batch.teacher_scores.tolist(),
    )


def make_cache(folder: Path) -> None:
    make_train(folder)
    read_train(folder)


def make_texts(folder: Path) -> None:
    (folder / "a.txt").write_text("one\ntwo é\n\nfour\r\n", newline="")
    (folder / "c.csv").write_text('id,text\n1,"one, ""two""\nlines"\n2,é\n')
    (folder / "d.tsv").write_text("id\ttext\n1\tone\n2\té\n")
    (folder / "b.jsonl").write_text('{"text": "one"}\n{"text": "", "id": 3}\n')


def read_texts(folder: Path) -> object:
    from kalm_min.encode import read_texts

    return [read_texts(folder / name) for name in ("a.txt", "b.jsonl", "c.csv", "d.tsv")]


def make_config(folder: Path) -> None:
    shutil.copy(TESTS.parent / "configs" / "v2_finetune.toml", folder / "recipe.toml")


def read_config(folder: Path) -> object:
    """A recipe, as train.py reads it; the parser exits with its sentence."""
    from kalm_min.config import parse, to_toml
    from kalm_min.options import TrainConfig

    stream = io.StringIO()
    try:
        with redirect_stderr(stream):
            flags = ["--output", "x", "--data.path", "data", "--model.path", "m"]
            return to_toml(
                parse(TrainConfig, [str(folder / "recipe.toml"), *flags], program="train")
            )
    except SystemExit as error:
        raise ValueError(stream.getvalue().strip()) from error


def read_datasets(folder: Path) -> object:
    from kalm_min.evaluation.local import find_datasets, read_dataset

    found = []
    for one in find_datasets(folder):
        _, rows = read_dataset(one.folder, [])
        parts = [
            {k: v for k, v in row.items() if k != "line"} for part in rows.values() for row in part
        ]
        found.append((one.name, one.type, one.main_score, one.instruction, one.languages, parts))
    return found


def make_model(folder: Path) -> None:
    from conftest import build_model

    model = build_model(folder, num_hidden_layers=1)
    model.prompts = {"query": "find: ", "document": ""}
    model.save_pretrained(folder)


def read_model(folder: Path) -> object:
    from kalm_min import Embedder

    model = Embedder.from_pretrained(folder, device="cpu", dtype="float32")
    vectors = model.encode(["the cat sat", "on a mat", ""], model.prompts.get("query", ""))
    assert np.isfinite(vectors).all(), "a vector is not finite"
    names = ("causal", "pooling", "max_length", "prompts", "dimension", "instruction_template")
    return [getattr(model, name) for name in names], vectors.tobytes()


def make_adapter(folder: Path) -> None:
    from conftest import build_model

    from kalm_min.model.lora import Adapter, LoRAConfig, add_adapter, save_adapter

    model = build_model(folder / "base", num_hidden_layers=1).model
    config = LoRAConfig(rank=2)
    add_adapter(model, config)
    (folder / "adapter").mkdir()
    save_adapter(model.state_dict(), folder / "adapter", Adapter(config, str(folder / "base")))


def make_run(folder: Path) -> None:
    from kalm_min.files import write_json

    for step, score in ((2, 0.5), (4, 0.25)):
        state = {"step": step, "validation": score, "sampler": {"sizes": [3, 4]}, "files": {}}
        write_json(folder / "checkpoints" / f"step_{step:08d}" / "state.json", state)
    (folder / "config.toml").write_text('output = "x"\nseed = 1\n')
    rows = [{"step": i + 1, "loss": 1 / (i + 1)} for i in range(5)]
    (folder / "log.jsonl").write_bytes(b"".join(dump(row) + b"\n" for row in rows))


def read_run(folder: Path) -> object:
    from kalm_min.training import checkpoint

    found, _ = checkpoint.claim(folder, 'output = "x"\nseed = 1\n')
    checkpoint.prune(folder / "checkpoints", 2)
    return found and checkpoint.read_state(found), checkpoint.cut_log(folder / "log.jsonl", 4)


def make_results(folder: Path) -> None:
    from kalm_min.evaluation.plan import Instruction, Plan, PlannedTask
    from kalm_min.files import write_json

    names = ["STS12", "STS13", "Banking77Classification"]
    tasks = [PlannedTask(n, "STS", "cosine_spearman", "1", 1000, Instruction()) for n in names]
    settings = {"dtype": "auto", "causal": None, "pooling": None, "max_length": None}
    results = folder / "results" / "a__model" / "cccc-5555"
    plan = Plan("a/model", "c" * 64, ("16", "8"), settings, tuple(tasks), results)
    for task in tasks:
        dims = {str(dim): {"main_score": 0.5} for dim in plan.dims}
        used = {"dtype": "float32", "causal": True, "pooling": "mean", "max_length": 512}
        record = {"key": plan.key(task), "dims": dims, "seconds": 2.0, "used": used, "type": "STS"}
        write_json(plan.result_path(task), {"scores": {}, "kalm_min": record})


def read_results(folder: Path) -> object:
    from kalm_min.evaluation import report

    (plan,) = report.read_plans(folder)
    rows = report.score_rows(plan)
    return (
        report.markdown(plan, rows, {}),
        report.comma_separated(plan, rows),
        report.describe(plan),
    )


def read_manifest(folder: Path) -> object:
    from kalm_min.vectors import check_manifest

    return check_manifest(folder, MANIFEST)


MANIFEST = {
    "layout": 1,
    "checkpoint": "c" * 64,
    "dtype": "float32",
    "causal": True,
    "dimension": 32,
}


def make_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(dump(MANIFEST))


def read_vectors(folder: Path) -> object:
    from kalm_min import vectors

    vectors._is_whole.cache_clear()
    shape = (4, 3), np.dtype(np.float32)
    return vectors.read_array(folder / "0.npy", *shape, check=True).tobytes()


def make_vectors(folder: Path) -> None:
    from kalm_min.vectors import write_array

    write_array(folder / "0.npy", np.ones((4, 3), np.float32))


def make_convert(folder: Path) -> None:
    (folder / "in").mkdir()
    rows = [{"question": f"q{i}", "answer": f"a{i}, or é"} for i in range(5)]
    (folder / "in" / "a.jsonl").write_bytes(b"".join(dump(row) + b"\n" for row in rows))
    (folder / "in" / "b.json").write_bytes(dump(rows))
    for name, comma in (("c.csv", ","), ("d.tsv", "\t")):
        lines = [
            comma.join(f'"{cell}"' for cell in row) for row in [rows[0], *map(dict.values, rows)]
        ]
        (folder / "in" / name).write_text("\n".join(lines))


def convert(folder: Path) -> object:
    """The whole command, over files of each kind; the last line that it prints is the sentence."""
    from kalm_min.convert import main

    stream, output = io.StringIO(), folder / "out"
    with redirect_stderr(stream):
        code = main([str(folder / "in"), "--output", str(output)])
    found = [path.read_bytes() for path in sorted(output.rglob("[!.]*.jsonl"))]
    shutil.rmtree(output, ignore_errors=True)
    if code:
        raise ValueError(stream.getvalue().strip().splitlines()[-1])
    return found


def make_mining(folder: Path) -> None:
    from conftest import WORDS, build_model

    build_model(folder / "model", num_hidden_layers=1)
    (folder / "data").mkdir()
    for task in "ab":
        rows = [{"query": f"{WORDS[i]} {task}", "pos": [f"{WORDS[i + 1]}"]} for i in range(12)]
        (folder / "data" / f"{task}.jsonl").write_bytes(b"".join(dump(row) + b"\n" for row in rows))
    mine(folder)


def mine(folder: Path) -> object:
    """The whole command, which finds everything done; what is damaged is made again or refused."""
    from kalm_min.mine import main

    stream = io.StringIO()
    flags = {"model": "model", "data": "data", "output": "mined"}
    arguments = [part for name, at in flags.items() for part in (f"--{name}", str(folder / at))]
    with redirect_stderr(stream):
        code = main([*arguments, "--device", "cpu", "--dtype", "float32", "--rank-range", "1", "9"])
    if code:
        raise ValueError(stream.getvalue().strip().splitlines()[-1])
    return [path.read_bytes() for path in sorted((folder / "mined").glob("*.jsonl"))]


def make_pipe(folder: Path) -> None:
    messages = [
        {"event": "ready"},
        {"event": "progress", "texts": 3, "characters": 40},
        {"event": "done", "task": "STS12"},
        {"event": "failed", "task": "STS12", "error": "no", "memory": False},
        {"event": "unusable", "error": "no model"},
    ]
    (folder / "pipe.jsonl").write_bytes(b"".join(dump(one) + b"\n" for one in messages))


def read_pipe(folder: Path) -> object:
    """What a worker sends to the parent, which must outlive it."""
    from kalm_min.console import Progress
    from kalm_min.evaluation import runner
    from kalm_min.evaluation.plan import Instruction, Plan, PlannedTask

    task = PlannedTask("STS12", "STS", "cosine_spearman", "1", 1000, Instruction())
    plan = Plan("a/model", "c" * 64, ("16",), {}, (task,), folder / "results")
    for line in (folder / "pipe.jsonl").read_bytes().split(b"\n"):
        one = runner.Runner(
            plan, devices=["cpu"], environment={}, logs=folder, timeout=9, stream=io.StringIO()
        )
        one.progress = Progress(10, "characters", io.StringIO())
        (slot,) = one.slots
        slot.log.touch()
        closed = SimpleNamespace(close=lambda: None)
        process = SimpleNamespace(
            wait=lambda timeout=0: 0, returncode=1, pid=2**22 + 1, stdin=closed
        )
        slot.process, slot.job = process, one.jobs.pop(0)
        one._handle(slot, process, line + b"\n")
        one._show()
    return None


KINDS = {
    "train": Kind(make_train, "*.jsonl*", read_train),
    "settings": Kind(make_train, "t.toml", read_train),
    "cache": Kind(make_cache, ".kalm_min/*", read_train, exact=True, never_fails=True),
    "texts": Kind(make_texts, "*", read_texts),
    "recipe": Kind(make_config, "recipe.toml", read_config, has_path=False),
    "datasets": Kind(lambda f: helper("evaluation").write_datasets(f), "*/**/*.*", read_datasets),
    "model": Kind(make_model, "[!Rt]*.json", read_model),
    "pooling": Kind(make_model, "1_Pooling/config.json", read_model),
    "tokenizer": Kind(make_model, "tokenizer*.json", read_model),
    "weights": Kind(make_model, "*.safetensors", read_model),
    "adapter": Kind(make_adapter, "adapter/*", lambda folder: read_model(folder / "adapter")),
    "run": Kind(make_run, "checkpoints/*/*", read_run, never_fails=True),
    "run_config": Kind(make_run, "config.toml", read_run),
    "log": Kind(make_run, "log.jsonl", read_run, never_fails=True),
    "results": Kind(make_results, "results/*/*/*.json", read_results, never_fails=True),
    "manifest": Kind(make_manifest, "*.json", read_manifest),
    "vectors": Kind(make_vectors, "*.npy", read_vectors, exact=True),
    "convert": Kind(make_convert, "in/*.*", convert),
    "mining": Kind(make_mining, "mined/.mining/**/*.*", mine, exact=True, share=20),
    "pipe": Kind(make_pipe, "*.jsonl", read_pipe, never_fails=True),
}


# --- The run -------------------------------------------------------------------------------------


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Hang(BaseException):
    """No end within the limit."""


def alarm(*_: object) -> None:
    raise Hang


def outcome(kind: Kind, folder: Path) -> tuple[object, str]:
    """The result, or the sentence of the error; anything else is raised."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    faulthandler.dump_traceback_later(9 * SECONDS, exit=True)
    try:
        return kind.read(folder), ""
    except (ValueError, OSError) as error:
        return None, str(error) or type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()


def fault(kind: Kind, folder: Path, path: Path, data: bytes, good: object) -> str:
    """What is wrong with how the edited file `path` was read; empty if nothing is."""
    try:
        found, sentence = outcome(kind, folder)
        if sentence:
            first, *rest = sentence.split("\n  ")
            if kind.never_fails:
                return f"refused: {sentence:.300}"
            if "\n" in first + "".join(rest) or (rest and not first.endswith(":")):
                return f"more than one sentence: {sentence:.300}"
            if kind.has_path and str(folder) not in sentence and "texts[" not in sentence:
                return f"names no file: {sentence:.300}"
            return ""
        if repr(found) == repr(good):
            return ""
        if kind.exact:
            return "another result from a damaged cache"
        if kind.never_fails:
            return ""
        if (meaning := plain(path, data)) is None:
            return "a result from a file without a meaning"
        path.write_bytes(meaning)
        same, sentence = outcome(kind, folder)
        if sentence or repr(same) != repr(found):
            return f"another result than the plain file: {sentence:.300}"
    except BaseException as error:  # a panic of Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        where, trace = "", error.__traceback__
        while trace:
            name = trace.tb_frame.f_code.co_filename
            if "kalm_min" in name:
                where = f"{Path(name).name}:{trace.tb_lineno}"
            trace = trace.tb_next
        return f"{type(error).__name__} at {where}: {error!s:.200}"
    return ""


def fuzz(name: str, inputs: int, seed: int, first: int, show: bool) -> int:
    """Try some inputs of one kind; return the number of faults."""
    kind, faults = KINDS[name], dict[str, list[int]]()
    inputs = -(-inputs // kind.share)
    signal.signal(signal.SIGPROF, alarm)
    warnings.simplefilter("ignore")
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as top:
        folder = Path(top) / "data"
        folder.mkdir()
        kind.make(folder)
        good = kind.read(folder)  # without a limit, since this imports torch
        originals = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        edited = [p for p in sorted(folder.glob(kind.files)) if p in originals]
        with suppress(OSError, ValueError):
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, resource.RLIM_INFINITY))
        begin = time.monotonic()
        for number in range(first, first + inputs):
            draw = random.Random(f"{name} {seed} {number}")
            path = draw.choice(edited)
            data = edit(draw, path, originals[path])
            path.write_bytes(data)
            if show:
                say(f"{path}:\n{data[:3000]!r}")
            if found := fault(kind, folder, path, data, good):
                faults.setdefault(re.sub(r"\d+", "0", found)[:60], []).append(number)
                if len(faults[re.sub(r"\d+", "0", found)[:60]]) <= 3:
                    relative = path.relative_to(folder)
                    say(f"{name} --seed {seed} --first {number} ({relative}): {found}")
            for entry in sorted(folder.rglob("*"), reverse=True):  # as it was
                if entry.is_file() and entry not in originals:
                    entry.unlink()
            for original, content in originals.items():
                if original == path or not original.exists() or kind.exact:
                    original.parent.mkdir(parents=True, exist_ok=True)
                    original.write_bytes(content)
    count = sum(map(len, faults.values()))
    seconds = time.monotonic() - begin
    say(f"{name}: {inputs:,} inputs, {count:,} faults of {len(faults)} sorts, {seconds:.0f} s")
    return count


def main() -> int:
    """Each kind in a process of its own, so that limits and crashes stay apart."""
    parser = argparse.ArgumentParser(description="Random edits of every file that is read.")
    parser.add_argument("--inputs", type=int, default=1000, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--show", action="store_true", help="print what was edited")
    options = parser.parse_args()
    if len(options.only) == 1:
        parts = options.inputs, options.seed, options.first, options.show
        return min(1, fuzz(options.only[0], *parts))
    code = 0
    for name in options.only:
        command = [sys.executable, __file__, "--only", name, "--inputs", str(options.inputs)]
        command += ["--seed", str(options.seed), "--first", str(options.first)]
        done = subprocess.run(command, check=False)
        if done.returncode not in (0, 1):
            say(f"{name}: the process ended with {done.returncode}")
        code |= done.returncode != 0
    return code


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
