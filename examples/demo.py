"""From plain text to a trained and evaluated embedding model, on a machine with only Python.

    python examples/demo.py          (or `make demo`, which installs what it needs first)

Each step runs the command that a user would run, shows it, and writes into `runs/demo`: the texts,
the untrained model and the models of two trainings, the hard negatives mined between the two, all
scores, `summary.md`, `loss.png` and `dimensions.png`. It takes about ten minutes on two cores and
needs neither a network nor a GPU.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import bag_of_words
import plots
import standard_library
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kalm_min import Embedder
from kalm_min.config import parse
from kalm_min.files import read_jsonl, write_json, write_text
from kalm_min.options import ModelSource
from kalm_min.training.checkpoint import open_model

ROOT = Path(__file__).parent.parent
BEGUN = time.monotonic()
DIMS = (384, 192, 96, 48)
VOCABULARY = 8192
BOTH_CORES = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
END_OF_TEXT = "<|endoftext|>"
QUESTIONS = (
    "open a URL and read the answer",
    "which characters must be escaped in a shell command?",
    "is this address in the network?",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Options of the demo."""

    output: Annotated[Path, "Folder for everything that is written; deleted first."] = Path(
        "runs/demo"
    )
    steps: Annotated[
        int | None,
        "Optimizer steps of each training; none: as configs/demo.toml and the demo set them.",
    ] = None


def main(argv: list[str]) -> int:
    """Run all steps in order."""
    config = parse(
        DemoConfig, argv, program="demo.py", description="From text to a trained, evaluated model."
    )
    out = config.output
    shutil.rmtree(out, ignore_errors=True)

    title("1. Collect the documentation and code of the standard library")
    collect(out / "data")
    title("2. Train a tokenizer and create a small Qwen2 with random weights")
    create_model(out / "tokenizer", out / "untrained", out / "data" / "train")
    title("3. Evaluate a bag of words and the untrained model on the held-out texts")
    baseline = bag_of_words.scores(out / "data" / "eval")
    evaluate(out / "untrained", out, DIMS[:1])
    title("4. Train")
    train(out / "untrained", out / "data" / "train", out / "first", steps=config.steps)
    evaluate(out / "first" / "final", out, DIMS[:1])
    title("5. Mine hard negatives with the trained model, and drop inconsistent rows")
    mine(out / "first" / "final", out / "data" / "train", out / "mined")
    title("6. Continue training, now with a hard negative for each query")
    hard = ("--sampling.num-negatives", 1, "--optimizer.learning-rate", 1e-3)
    train(out / "first" / "final", out / "mined", out / "second", *hard, steps=config.steps or 100)
    title("7. Evaluate again, at every Matryoshka dimension")
    evaluate(out / "second" / "final", out, DIMS)
    title("8. What was learned")
    report(out, baseline)
    title("9. Ask questions")
    answer(Embedder.from_pretrained(out / "second" / "final"), QUESTIONS)
    print(f"\n{time.monotonic() - BEGUN:.0f} seconds in all; everything is in {out}")
    return 0


def title(text: str) -> None:
    """Announce a step and the seconds since the start."""
    text = f"{text} ({time.monotonic() - BEGUN:.0f} s)"
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n## {text}", flush=True)


def collect(folder: Path) -> None:
    """Write training tasks and evaluation sets, and print their sizes."""
    for name, rows in standard_library.write(folder).items():
        print(f"{rows:7,} rows  {name}")
    print("No text is in both training and evaluation data.")


def create_model(tokenizer: Path, model: Path, texts: Path) -> None:
    """Train a byte-level BPE tokenizer on the training texts; save a random decoder with it."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(training_texts(texts), trainer)
    write_text(tokenizer / "tokenizer.json", fast.to_str())
    side = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, "add_eos_token": True}
    write_json(tokenizer / "tokenizer_config.json", side)
    source = ModelSource(
        tokenizer=tokenizer,
        hidden_size=DIMS[0],
        intermediate_size=384,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_length=64,
    )
    embedder = open_model(source, None, torch.device("cpu"))
    embedder.save_pretrained(model)
    size = sum(parameter.numel() for parameter in embedder.model.parameters())
    print(f"{fast.get_vocab_size():,} tokens, {size / 1e6:.1f} million parameters: {model}")


def training_texts(folder: Path) -> Iterable[str]:
    """Every text of the training tasks."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield from (row["query"], *row["pos"])


def evaluate(model: Path, out: Path, dims: tuple[int, ...]) -> None:
    """Score a model on the held-out sets, without instructions, as it was trained."""
    run(
        *("evaluate.py", "--model", model, "--data", out / "data" / "eval"),
        *("--output", scores_of(model, out), "--instructions", "none", "--dims", *dims),
    )


def scores_of(model: Path, out: Path) -> Path:
    """The folder for the scores of a model, named after its run or the model itself."""
    return out / "scores" / (model.parent.name if model.name == "final" else model.name)


def train(model: Path, data: Path, run_folder: Path, *more: object, steps: int | None) -> None:
    """Train on both cores, one process each."""
    run(
        *(*BOTH_CORES, "train.py", "configs/demo.toml", "--model.path", model),
        *("--data.path", data, "--output", run_folder, *more),
        *(() if steps is None else ("--training.max-steps", steps)),
    )


def mine(model: Path, data: Path, mined: Path) -> None:
    """Mine on both cores; print the first row that has negatives."""
    run(
        *(*BOTH_CORES, "mine.py", "--model", model, "--data", data, "--output", mined),
        *("--rank-range", 5, 50, "--num-negatives", 4, "--relative-margin", 0.05),
    )
    for row in (row for _, row in read_jsonl(mined / "summary_to_code.jsonl") if row["neg"]):
        print(f"\n{row['query']}")
        for sign, kind in (("+", "pos"), ("-", "neg")):
            for text, score in zip(row[kind], row[f"{kind}_scores"], strict=True):
                print(f"  {score:.2f} {sign} {' '.join(text.split())[:90]}")
        break


def run(*arguments: object) -> None:
    """Run a Python program of the project in the working directory and show its output."""
    words = [str(word) for word in arguments]
    words = [str(ROOT / word) if word.endswith((".py", ".toml")) else word for word in words]
    print("$ python", *arguments, flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if "torch.distributed.run" in words:
        environment["OMP_NUM_THREADS"] = "1"  # as torchrun would, after three lines of warning
    subprocess.run([sys.executable, *words], check=True, env=environment)


def report(out: Path, baseline: dict[str, float]) -> None:
    """Print and save the table of scores; draw the loss and the score by dimension."""
    runs = ("untrained", "first", "second")
    before, first, after = (read_scores(out / "scores" / name) for name in runs)
    head = ["task", "score", "bag of words", "untrained", "trained"]
    head += [f"and mined, {dim}" for dim in DIMS]
    lines = [head, ["---"] * len(head)]
    for name, (metric, scores) in after.items():
        cells = [baseline[name], before[name][1][0], first[name][1][0], *scores]
        lines.append([name, metric, *(f"{cell:.1f}" for cell in cells)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    findings = "\n".join(conclude(baseline, before, first, after))
    write_text(out / "summary.md", f"{table}\n\n{findings}\n")
    print(f"{table}\n\n{findings}")
    plots.loss(out / "first" / "log.jsonl", out / "loss.png")
    curves = {name: scores for name, (_, scores) in after.items()}
    plots.dimensions(DIMS, curves, out / "dimensions.png")
    print(f"Plots: {out / 'loss.png'}, {out / 'dimensions.png'}")


Scores = dict[str, tuple[str, list[float]]]


def read_scores(folder: Path) -> Scores:
    """Map each task to its metric and the score at each dimension, from an evaluation's summary.csv."""
    with (folder / "summary.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "task"]
    return {
        row["name"]: (row["score"], [float(row[str(dim)]) for dim in DIMS if str(dim) in row])
        for row in rows
    }


def conclude(baseline: dict[str, float], before: Scores, first: Scores, after: Scores) -> list[str]:
    """State what the numbers show, including unfavourable results."""
    sentences: list[str] = []
    for name, (metric, scores) in after.items():
        learned, words = scores[0], baseline[name]
        times = learned / max(before[name][1][0], 0.01)
        verdict = "above" if learned > words else "below"
        sentences.append(
            f"- {name}: {metric} is {times:.1f} times the untrained model's, "
            f"{abs(learned - words):.1f} points {verdict} the bag of words; "
            f"{learned - first[name][1][0]:+.1f} since the negatives were mined."
        )
    return sentences


def answer(model: Embedder, questions: tuple[str, ...]) -> None:
    """Answer each question with the nearest public functions; a star marks held-out ones."""
    documented = [
        one
        for one in standard_library.collect()
        if one.code and len(one.summary) >= 15 and "._" not in f".{one.module}.{one.name}"
    ]
    vectors = model.encode_document([one.documentation for one in documented])
    for question in questions:
        print(f"\n{question}")
        cosines = model.similarity(model.encode_query(question), vectors).ravel()
        for index in (-cosines).argsort(kind="stable")[:3]:
            star = "*" if documented[index].is_held_out else " "
            print(f"  {cosines[index]:.2f} {star} {documented[index].signature}")
            print(f"         {documented[index].summary}")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
