"""What each technique does at laptop scale: one table, mean and spread over seeds.

    python benchmarks/ablation.py --tokenizer DIR --data data/train --eval data/eval --output runs/ablation

In the order of the reports: a fresh small decoder is pre-trained on all pairs with in-batch
negatives (once bidirectional, once causal, and once larger, as a teacher), mines the hard negatives
of the fine-tuning data itself, and is fine-tuned from there once for each setting and seed; the
teacher is fine-tuned the same way and scores the mined rows for distillation. The seed draws the
order of rows, positives, negatives and mixes. Every step is a command that a user would run, and is
skipped if its result exists, so the script continues where it was stopped.
"""

import csv
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from kalm_min.config import parse

ROOT = Path(__file__).parent.parent
MODEL = "--model.max-length 64 --model.hidden-size 128 --model.intermediate-size 384"
MODEL += " --model.num-hidden-layers 2 --model.num-attention-heads 2 --model.num-key-value-heads 1"
TEACHER = MODEL.replace("128", "256").replace("384", "768").replace("heads 2", "heads 4")
TEACHER = TEACHER.replace("heads 1", "heads 2")
LOSS = (
    "--loss.temperature 0.05 --loss.matryoshka-dims 128 64 32 --loss.matryoshka-weights 1 0.3 0.2"
)
WIDE = LOSS.replace("128", "256 128").replace("1 0.3", "1 0.3 0.2").replace("0.2 0.2", "0.2 0.1")
PRETRAIN = "--sampling.batch-size 256 --sampling.num-negatives 0 --training.epochs 3"
FINETUNE = "--model.max-length 64 --sampling.batch-size 48 --sampling.num-negatives 7"
FINETUNE += (
    " --training.max-steps 120 --training.tokens-per-batch 8192 --optimizer.learning-rate 5e-4"
)
V2 = "--loss.gamma 0.5 --loss.mixing true"

# name: (the model to start from, the data, the settings in addition to FINETUNE and LOSS)
SETTINGS = {
    "baseline": ("base", "mined", ""),
    "rows as they are": ("base", "data", ""),
    "mined, not filtered": ("base", "mined_nofilter", ""),
    "focal, gamma 0.5": ("base", "mined", "--loss.gamma 0.5"),
    "mixing": ("base", "mined", "--loss.mixing true"),
    "focal and mixing (V2)": ("base", "mined", V2),
    "no Matryoshka": (
        "base",
        "mined",
        "--loss.matryoshka-dims 128 --loss.matryoshka-weights 1.5",
    ),
    "no masking": ("base", "mined", "--loss.mask-false-negatives false"),
    "homogeneous ratio 0.5": ("base", "mined", "--sampling.homogeneous-ratio 0.5"),
    "homogeneous ratio 0": ("base", "mined", "--sampling.homogeneous-ratio 0"),
    "causal": ("base_causal", "mined", ""),
    "V2 on scored rows": ("base", "scored", V2),
    "V2 and distillation (V2.5)": ("base", "scored", f"{V2} --loss.distillation-weight 0.7"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of the comparison."""

    tokenizer: Annotated[Path, "Folder with tokenizer.json."]
    data: Annotated[Path, "Training data."]
    eval: Annotated[Path, "Folder of evaluation sets."]
    output: Annotated[Path, "Folder for everything that is written."]
    seeds: Annotated[int, "Fine-tunings of each setting."] = 3
    table_only: Annotated[bool, "Run nothing; print the table of stored results."] = False


def main(argv: list[str]) -> int:
    """Run what is missing and print the table."""
    options = parse(Options, argv, program="ablation.py", description="What each technique does.")
    out = options.output
    if not options.table_only:
        link_pairs(options.data.resolve(), out / "pairs")
        for made, command in commands(options):
            if not (out / made).exists():
                print(f"{time.strftime('%H:%M')} {made}", flush=True)
                environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
                subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=sys.stderr)
    print(table(out, options.seeds))
    return 0


def commands(options: Options) -> list[tuple[str, list[str]]]:
    """(the file it writes, relative to the output; the command) of every stage, in order."""
    out = options.output.resolve()
    data, sets, tokenizer = (p.resolve() for p in (options.data, options.eval, options.tokenizer))

    def train(name: str, start: list[object], on: Path, settings: str) -> tuple[str, list[str]]:
        where = ["--data.path", on, "--output", out / name, "--training.save-every", 100_000]
        return f"{name}/final/config.json", _command("train.py", *start, *where, *settings.split())

    def mine(name: str, *extra: object, rows: Path = data) -> tuple[str, list[str]]:
        where = ["--data", rows, "--output", out / name, "--store", out / f"store_{name}"]
        model = ["--model", out / "base" / "final"]
        return f"{name}/README.md", _command("mine.py", *model, *where, *extra)

    def tuned(name: str, start: str, on: Path, settings: str) -> tuple[str, list[str]]:
        return train(name, ["--model.path", out / start / "final"], on, f"{FINETUNE} {settings}")

    fresh: list[object] = ["--model.tokenizer", tokenizer]
    small = f"{PRETRAIN} {MODEL} {LOSS} --training.max-steps 1600 --optimizer.learning-rate 2e-3"
    large = f"{PRETRAIN} {TEACHER} {WIDE} --training.max-steps 1000 --optimizer.learning-rate 1e-3"
    stages = [
        train("base", fresh, data, small),
        train("base_causal", fresh, data, f"{small} --model.causal true"),
        train("teacher_base", fresh, data, large),
        mine("mined"),
        mine("mined_nofilter", "--consistency-top-k", "none"),
        tuned("teacher", "teacher_base", out / "mined", f"{WIDE} {V2}"),
        mine("scored", "--scorer", out / "teacher" / "final", rows=out / "pairs"),
    ]
    for seed in range(options.seeds):
        for name, (model, on, settings) in SETTINGS.items():
            run, rows = folder(name, seed), data if on == "data" else out / on
            stages.append(tuned(run, model, rows, f"--sampling.seed {seed} {LOSS} {settings}"))
            where = ["--data", sets, "--output", out / "scores" / run, "--devices", "cpu"]
            how = ["--dims", 128, 32, "--instructions", "none", "--dtype", "float32"]
            score = _command("evaluate.py", "--model", out / run / "final", *where, *how)
            stages.append((f"scores/{run}/summary.csv", score))
    return stages


def link_pairs(data: Path, pairs: Path) -> None:
    """Link the tasks whose rows a teacher can score, which excludes label-based ones."""
    pairs.mkdir(parents=True, exist_ok=True)
    for file in data.glob("*.jsonl*"):
        settings = file.with_name(f"{file.name.split('.')[0]}.toml")
        if "label_based" not in (settings.read_text("utf-8") if settings.exists() else ""):
            (pairs / file.name).unlink(missing_ok=True)
            (pairs / file.name).symlink_to(file)


def _command(*words: object) -> list[str]:
    """The words of a command line, in which a flag replaces its earlier values."""
    flags: dict[str, list[str]] = {}
    values = flags[""] = []
    for word in map(str, words):
        if word.startswith("--"):
            values = flags[word] = []
        else:
            values.append(word)
    return [sys.executable, *(w for flag, given in flags.items() for w in (flag, *given) if w)]


def folder(name: str, seed: int) -> str:
    """The folder of one fine-tuning run."""
    return f"{name}.{seed}".replace(" ", "_").replace(",", "")


def table(out: Path, seeds: int) -> str:
    """Mean and standard deviation over the finished seeds; differences are to the same seed."""
    columns = ("all", "all, 32 dimensions", "retrieval", "similarity")
    lines = [
        "| setting | seeds | " + " | ".join(columns) + " | all, against the baseline |",
        "|---|---|" + "---|" * (len(columns) + 1),
    ]
    baseline = {seed: scores(out, "baseline", seed) for seed in range(seeds)}
    for name in SETTINGS:
        found = {s: value for s in range(seeds) if (value := scores(out, name, s))}
        if not found:
            continue
        cells = [_spread([value[c] for value in found.values()]) for c in range(len(columns))]
        gains = [value[0] - b[0] for s, value in found.items() if (b := baseline[s])]
        lines.append(
            f"| {name} | {len(found)} | " + " | ".join([*cells, _spread(gains, "+")]) + " |"
        )
    return "\n".join(lines)


def scores(out: Path, name: str, seed: int) -> list[float] | None:
    """Means over all sets at both dimensions, over retrieval and over similarity, of one run."""
    path = out / "scores" / folder(name, seed) / "summary.csv"
    if not path.exists():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    means = {
        name.split(" of ")[-1].split(" ", 1)[1]: row for name, row in rows.items() if " of " in name
    }
    everything = means["tasks"]
    kinds = [float(means[kind]["128"]) for kind in ("Retrieval", "STS")]
    return [float(everything["128"]), float(everything["32"]), *kinds]


def _spread(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.2f} ± {deviation:.2f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
