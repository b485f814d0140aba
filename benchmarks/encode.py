"""Encoding: kalm_min, sentence-transformers, and the matrix products that neither can beat.

    python benchmarks/encode.py --data DIR --tokenizer DIR [--layers 6] [--texts 256] [--dtypes bfloat16]

sentence-transformers runs as its users run it (loaded from a float32 folder, its defaults) and tuned as
its documentation advises (with the dtype set and the best of several batch sizes; it sorts by length
itself). FlagEmbedding is measured too if it is installed, at the same batch size.
Every program gets the texts as strings and returns an array.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import numpy as np
import torch
from measuring import Common, Report, alternate, device, product_flops, products, ratio, texts
from random_model import build
from sentence_transformers import SentenceTransformer

from kalm_min import Embedder
from kalm_min.config import parse
from kalm_min.sampling import token_budget_batches

_BATCH_SIZES = (16, 32, 64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options(Common):
    """What is encoded."""

    texts: Annotated[int, "Texts in total, the same number from every task."] = 192
    max_length: Annotated[int, "Tokens kept per text."] = 512
    dtypes: Annotated[tuple[str, ...], "Dtypes in which everything is measured."] = (
        "bfloat16",
        "float32",
    )


def main(argv: list[str]) -> None:
    """Measure and print."""
    options = parse(Options, argv, program="encode.py", description="Encoding, measured.")
    report = Report("encode", options)
    chosen = texts(options.data, options.texts)
    with tempfile.TemporaryDirectory() as folder:
        build(
            options.tokenizer, layers=options.layers, max_length=options.max_length
        ).save_pretrained(folder)
        for dtype in options.dtypes:
            measure(folder, dtype, chosen, options, report)
    report.close()


def measure(folder: str, dtype: str, chosen: list[str], options: Options, report: Report) -> None:
    """Measure all programs in one dtype; the peer as loaded is always float32."""
    ours = Embedder.from_pretrained(folder, device(), dtype)
    start = time.perf_counter()
    lengths = [len(ids) for ids in ours.tokenizer.encode(chosen, max_length=options.max_length)]
    tokenizing, total = time.perf_counter() - start, sum(lengths)
    batches = token_budget_batches(lengths, ours.tokens_per_batch)
    plain = SentenceTransformer(folder, device=str(device()))
    tuned = SentenceTransformer(
        folder, device=str(device()), model_kwargs={"dtype": getattr(torch, dtype)}
    )
    size, waste = best_batch_size(tuned, chosen, lengths)
    names = {
        "ours": f"kalm_min, {dtype}",
        "tuned": f"sentence-transformers, {dtype}, batches of {size}",
        "plain": "sentence-transformers, as loaded (float32)",
        "limit": f"matrix products alone, {dtype}",
    }
    programs = {
        names["ours"]: lambda: ours.encode(chosen),
        names["tuned"]: lambda: tuned.encode(chosen, batch_size=size),
        names["limit"]: products(ours.model, [sum(lengths[i] for i in b) for b in batches]),
    }
    if dtype != "float32" or len(options.dtypes) == 1:
        programs[names["plain"]] = lambda: plain.encode(chosen)
    if (flag := flag_embedding(folder, dtype, options.max_length)) is not None:
        programs[f"FlagEmbedding, {dtype}, batches of {size}"] = lambda: flag(chosen, size)
    seconds = alternate(programs, options.rounds)
    report.note(
        f"\n{dtype}, {options.layers} layers, {len(chosen)} texts of {min(lengths)} to {max(lengths)} "
        f"tokens, mean {np.mean(lengths):.0f}; padding is {waste:.0%} of what sentence-transformers "
        f"computes at {size} a batch; tokenizing alone is {tokenizing / min(seconds[names['ours']]):.1%} of ours"
    )
    for name, values in seconds.items():
        middle = statistics.median(values)
        report.row(
            program=name,
            seconds=middle,
            **{
                "real tokens/s": round(total / middle),
                "GFLOP/s": round(product_flops(ours, total) / middle / 1e9),
                "of the limit": ratio(seconds, names["limit"], name),
                "ours is faster": ratio(seconds, name, names["ours"]),
            },
        )
    report.ratio(f"{dtype}: share of the limit", ratio(seconds, names["limit"], names["ours"]))
    report.ratio(f"{dtype}: against the peer tuned", ratio(seconds, names["tuned"], names["ours"]))
    if names["plain"] in seconds:
        report.ratio(
            f"{dtype}: against the peer as loaded", ratio(seconds, names["plain"], names["ours"])
        )


def flag_embedding(
    folder: str, dtype: str, max_length: int
) -> Callable[[list[str], int], object] | None:
    """FlagEmbedding's encoder on the same folder, if it is installed."""
    try:
        peer: Any = import_module("FlagEmbedding")
    except ImportError:
        return None
    model = peer.FlagModel(
        folder,
        pooling_method="mean",
        use_fp16=False,
        use_bf16=dtype == "bfloat16",
        devices=[str(device())],
        trust_remote_code=False,
    )
    return lambda chosen, size: model.encode(chosen, batch_size=size, max_length=max_length)


def best_batch_size(
    peer: SentenceTransformer, chosen: list[str], lengths: list[int]
) -> tuple[int, float]:
    """(the batch size at which the peer is fastest, its share of padding), from one pass each."""
    seconds = {}
    for size in _BATCH_SIZES:
        start = time.perf_counter()
        peer.encode(chosen, batch_size=size)
        seconds[size] = time.perf_counter() - start
    best = min(seconds, key=lambda size: seconds[size])
    order = sorted(range(len(chosen)), key=lambda i: -len(chosen[i]))  # as the peer does
    padded = [lengths[i] for i in order]
    computed = sum(
        max(padded[s : s + best]) * len(padded[s : s + best]) for s in range(0, len(padded), best)
    )
    return best, 1 - sum(lengths) / computed


if __name__ == "__main__":
    main(sys.argv[1:])
