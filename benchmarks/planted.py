"""Ranking-consistency filtering on planted data: precision and recall, for several k.

    python benchmarks/planted.py --model runs/demo/first/final --data runs/demo/data/train/name_to_code.jsonl

Rows of a training file get the positives of other rows (wrong pairs), and positives of some rows occur
again in the corpus as negatives of others, verbatim or with a full stop added. Each variant of the
rows is mined once per k from the same stored vectors. Precision is the share of planted wrong rows
among the dropped rows; recall is the share of dropped rows among the planted wrong rows.
"""

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from kalm_min.config import parse
from kalm_min.files import read_jsonl, write_text
from kalm_min.mining.pipeline import Miner, MiningConfig

Row = dict[str, Any]
TOP_K = (1, 5, 20, 50, 100)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is planted."""

    model: Annotated[str, "Model folder or hub id."]
    data: Annotated[Path, "A training file of one task."]
    rows: Annotated[int, "Maximum number of rows of the file."] = 4000
    wrong: Annotated[tuple[float, ...], "Shares of wrong pairs."] = (0.05, 0.2)
    duplicates: Annotated[
        float,
        "Share of positives repeated in the corpus, once verbatim and once with a full stop.",
    ] = 0.1
    seed: Annotated[int, "Seed of the planted errors."] = 0


def main(argv: list[str]) -> None:
    """Plant, mine and count; print a table."""
    options = parse(Options, argv, program="planted.py", description="The filter on planted data.")
    rows = [row for _, row in read_jsonl(options.data)]
    random.Random(options.seed).shuffle(rows)
    shapes = {
        "one positive": [row | {"pos": row["pos"][:1]} for row in rows[: options.rows]],
        "three positives": [row | {"pos": parts(row["pos"][0])} for row in rows[: options.rows]],
        "corpus smaller than k": [row | {"pos": row["pos"][:1]} for row in rows[:40]],
    }
    print("| rows | planted wrong | " + " | ".join(f"k = {k}" for k in TOP_K) + " |")
    print("|---" * (2 + len(TOP_K)) + "|")
    negatives = 0
    for name, shape in shapes.items():
        for share in options.wrong:
            planted = list(plant(shape, share, options.duplicates, random.Random(options.seed)))
            cells, mined = zip(*measured(planted, options.model), strict=True)
            negatives += sum(mined)
            wrong = sum(row["relevance"] for row in planted)
            print(f"| {len(planted):,}, {name} | {wrong:,.0f} | {' | '.join(cells)} |", flush=True)
    print("\nEach cell: precision / recall / rows dropped.")
    print(f"Positives of the query among {negatives:,} mined negatives: 0.")


def parts(text: str) -> list[str]:
    """A text, and both halves of its words."""
    words = text.split()
    half = max(1, len(words) // 2)
    return [text, " ".join(words[:half]), " ".join(words[half:]) or text]


def plant(rows: list[Row], wrong: float, duplicates: float, rng: random.Random) -> Iterator[Row]:
    """The rows with wrong pairs ("relevance" 1) and, as negatives, copies of others' positives."""
    moved_rows = rng.sample(range(len(rows)), round(wrong * len(rows)))
    positives = {
        number: rows[other]["pos"]
        for number, other in zip(moved_rows, moved_rows[1:] + moved_rows[:1], strict=True)
    }
    for number, row in enumerate(rows):
        copies = [rng.choice(rows)["pos"][0] for _ in range(2)]
        planted = {
            "pos": positives.get(number, row["pos"]),
            "relevance": float(number in positives),
        }
        if rng.random() < duplicates:
            planted["neg"] = [copies[0], copies[1] + " ."]
        yield {"query": row["query"]} | planted


def measured(rows: list[Row], model: str) -> Iterator[tuple[str, int]]:
    """For each k, precision, recall and dropped rows as text, and how many negatives were mined."""
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row["query"], {row["query"]}).update(row["pos"])
    wrong = sum(row["relevance"] for row in rows)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data" / "planted.jsonl"
        write_text(data, "".join(json.dumps(row) + "\n" for row in rows))
        for k in TOP_K:
            kept, total = mine(model, data, Path(folder), k)
            for row in kept:
                assert not answers[row["query"]] & set(row["neg"]), row
            assert total["rows"] == len(rows) == len(kept) + total["inconsistent"] + total["short"]
            dropped = len(rows) - len(kept)
            caught = wrong - sum(row["relevance"] for row in kept)
            shares = [f"{caught / of:.2f}" if of else "-" for of in (dropped, wrong)]
            yield f"{shares[0]} / {shares[1]} / {dropped:,}", total["negatives"]


def mine(model: str, data: Path, folder: Path, k: int) -> tuple[list[Row], dict[str, int]]:
    """Mine the hardest negatives of ranks 1 to 100; return the rows kept with this k and the totals."""
    output = folder / f"top{k}"
    config = MiningConfig(
        model=model, data=data, output=output, store=folder / "store",
        rank_range=(1, 100), consistency_top_k=k,
    )  # fmt: skip
    with Path("/dev/null").open("w") as stream:
        total, _ = Miner(config, torch.device("cpu"), stream).run()
    path = output / "planted.jsonl"
    return [row for _, row in read_jsonl(path)] if path.exists() else [], total


if __name__ == "__main__":
    main(sys.argv[1:])
