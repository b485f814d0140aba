"""Queries with one instruction: it is read once for all of them, or with every query.

    python benchmarks/prefix.py --data DIR --tokenizer DIR [--layers 6] [--queries 512]

The decoder is causal, and all rows use the same queries. "joined by hand" is the packed path of
kalm_min without sharing. Queries have exactly 12 tokens after an instruction of 24, or the lengths of
the data.
"""

import statistics
import sys
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from measuring import Common, Report, alternate, device, lines, ratio
from random_model import build

from kalm_min import Embedder
from kalm_min.config import parse
from kalm_min.settings import KALM_TEMPLATE, fill_template

_PROMPT = fill_template(
    KALM_TEMPLATE,
    "Given a question of a user, retrieve the passages and documents that answer it in every "
    "language",
)
_SHARED = 24  # its tokens; the last space merges with the text that follows


@dataclass(frozen=True, kw_only=True, slots=True)
class Options(Common):
    """What is encoded."""

    queries: Annotated[int, "Queries per set."] = 512
    dtypes: Annotated[tuple[str, ...], "Dtypes in which everything is measured."] = (
        "bfloat16",
        "float32",
    )


def main(argv: list[str]) -> None:
    """Measure and print."""
    options = parse(Options, argv, program="prefix.py", description="A shared prefix, measured.")
    report = Report("prefix", options)
    model = build(options.tokenizer, layers=options.layers)
    model.model.to(device())
    words = " ".join(line["query"] for line in lines(options.data, 8 * options.queries))
    short = cut(model, words, 12, options.queries)
    mixed = [line["query"] for line in lines(options.data, options.queries)]
    for dtype in sorted(options.dtypes, reverse=True):  # float32 first: rounding cannot be undone
        model.model.to(dtype=getattr(torch, dtype))
        for name, queries in (("12 tokens", short), ("as in the data", mixed)):
            compare(model, queries, f"{dtype}, queries {name}", options, report)
    report.close()


def cut(model: Embedder, words: str, tokens: int, count: int) -> list[str]:
    """Texts of exactly so many tokens after the instruction, cut from running text."""
    found: dict[str, None] = {}
    parts = words.split()
    for start in range(len(parts)):
        for end in range(start + 1, min(start + tokens + 1, len(parts))):
            text = " ".join(parts[start:end])
            length = len(model.tokenizer.encode([text], _PROMPT, max_length=512)[0]) - _SHARED
            if length == tokens:
                found[text] = None
            if length >= tokens:
                break
        if len(found) == count:
            break
    return list(found)


def compare(
    model: Embedder, queries: list[str], name: str, options: Options, report: Report
) -> None:
    """Print one pair of rows."""
    joined = [_PROMPT + query for query in queries]
    programs = {
        "joined by hand": lambda: model.encode(joined),
        "read once": lambda: model.encode(queries, _PROMPT),
    }
    apart = np.abs(programs["joined by hand"]() - programs["read once"]()).max()
    seconds = alternate(programs, options.rounds)
    faster = ratio(seconds, "joined by hand", "read once")
    report.row(
        what=name,
        queries=len(queries),
        **{key: statistics.median(values) for key, values in seconds.items()},
        faster=faster,
        **{"max |difference|": float(apart)},
    )
    report.ratio(name, faster)


if __name__ == "__main__":
    main(sys.argv[1:])
