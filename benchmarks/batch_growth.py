"""A growing global batch: peak memory and cost per example of a complete training step.

    python benchmarks/batch_growth.py --data DIR --tokenizer DIR [--queries 64 512 8192] [--documents 8]

A small decoder with the real tokenizer's vocabulary embeds texts of the data in chunks of a bounded
number of tokens; the loss is InfoNCE in two Matryoshka dimensions over all documents of the batch.
Every example has its own texts, so no vector is used twice. Memory is measured in a second process,
in which freed blocks go back to the system. The seconds inside the loss are listed separately: every
query meets every document there, so only that part of an example's cost grows with the batch.
"""

import random
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated

import torch
from loss_memory import fresh_memory, measured_afresh, peak
from measuring import Common, Report, device, texts
from torch import Tensor

from kalm_min.config import parse
from kalm_min.data.batches import collate
from kalm_min.data.dataset import Example
from kalm_min.model import ModelConfig, Packed, Qwen2, initialise, pool
from kalm_min.tokenizer import Tokenizer
from kalm_min.training.step import LossConfig, TokenBatch, contrastive_step, tokenize


@dataclass(frozen=True, kw_only=True, slots=True)
class Options(Common):
    """Sizes of the batches and of the decoder."""

    queries: Annotated[tuple[int, ...], "Queries of the global batch."] = (64, 512, 8192)
    documents: Annotated[int, "Documents per query."] = 8
    dim: Annotated[int, "Dimension of the decoder, which has two layers."] = 64
    max_length: Annotated[int, "Tokens kept per text."] = 32
    tokens_per_batch: Annotated[
        int, "Tokens per chunk; the smallest batch must have several chunks."
    ] = 4096
    memory: Annotated[bool, "Set by the benchmark itself: measure memory, in a fresh process."] = (
        False
    )
    memory_gib: Annotated[float, "GiB that the scores of a block of queries may take."] = 0.25


def main(argv: list[str]) -> None:
    """Measure and print."""
    options = parse(Options, argv, program="batch_growth.py", description="A growing batch.")
    model, tokenizer = decoder(options)
    words = [text.split() or [text] for text in texts(options.data, 4096)]
    batches = {size: batch(words, tokenizer, size, options) for size in options.queries}
    if options.memory:
        fresh_memory()
    step(model, batches[options.queries[0]], options)  # warms up
    if options.memory:
        print(*(step(model, tokens, options)[2] for tokens in batches.values()))
        return
    report = Report("batch_growth", options)
    seconds = {size: step(model, tokens, options)[:2] for size, tokens in batches.items()}
    peaks = dict(zip(batches, measured_afresh(__file__, argv), strict=True))
    costs = {}
    for size, (total, in_loss) in seconds.items():
        tokens = sum(map(len, batches[size].sequences))
        costs[size] = (total - in_loss) / tokens
        report.row(
            queries=size,
            documents=size * options.documents,
            tokens=tokens,
            seconds=total,
            **{
                "in the loss": in_loss,
                "ns per pair in the loss": 1e9 * in_loss / size**2 / options.documents,
                "ms per example without the loss": 1e3 * (total - in_loss) / size,
                "us per token without the loss": 1e6 * costs[size],
                "peak GiB": peaks[size],
            },
        )
    first, last = options.queries[1], options.queries[-1]
    report.ratio("peak memory, second size over last", peaks[first] / peaks[last])
    report.ratio("cost of a token, second size over last", costs[first] / costs[last])
    report.close()


def decoder(options: Options) -> tuple[Qwen2, Tokenizer]:
    """A decoder of two layers with the tokenizer's full vocabulary."""
    tokenizer = Tokenizer.from_folder(options.tokenizer)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=options.dim,
        intermediate_size=4 * options.dim,
        num_hidden_layers=2,
        num_attention_heads=options.dim // 32,
        num_key_value_heads=options.dim // 32,
        head_dim=32,
    )
    model = Qwen2(config)
    initialise(model, seed=0)
    return model.to(device()), tokenizer


def batch(words: list[list[str]], tokenizer: Tokenizer, size: int, options: Options) -> TokenBatch:
    """`size` examples of new texts, each made from the words of two texts of the data, in turn."""
    rng = random.Random(size)

    def text() -> str:
        one, other = rng.sample(words, 2)
        return " ".join(
            rng.sample(one, (len(one) + 1) // 2) + rng.sample(other, (len(other) + 1) // 2)
        )

    examples = [
        Example(
            query=text(),
            positives=(text(),),
            negatives=tuple(text() for _ in range(options.documents - 1)),
            task=0,
            index=number,
        )
        for number in range(size)
    ]
    drawn = collate(examples, num_negatives=options.documents - 1, template="", epoch=0, seed=0)
    return tokenize(drawn, tokenizer, max_length=options.max_length)


def step(model: Qwen2, tokens: TokenBatch, options: Options) -> tuple[float, float, float]:
    """(seconds, seconds in the loss, peak GiB above the start)."""
    ends: list[float] = []  # the embeddings without a graph
    starts: list[float] = []  # the embeddings with a graph, after the loss

    def embed(packed: Packed) -> Tensor:
        if torch.is_grad_enabled():
            starts.append(clock())
        vectors = pool(model(packed, causal=False), packed.cu_seqlens, "mean")
        if not torch.is_grad_enabled():
            ends.append(clock())
        return vectors

    config = LossConfig(
        temperature=0.05,
        matryoshka_dims=(options.dim, options.dim // 2),
        matryoshka_weights=(1.0, 0.3),
        memory_gib=options.memory_gib,
    )
    model.zero_grad()
    before, start = used(reset=True), clock()
    contrastive_step(
        tokens,
        embed,
        config,
        device=device(),
        tokens_per_batch=options.tokens_per_batch,
        no_sync=nullcontext,
    )
    seconds = clock() - start
    return seconds, starts[0] - ends[-1], used() - before


def clock() -> float:
    """Seconds, once the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def used(reset: bool = False) -> float:
    """Peak memory in GiB since the last reset, of the GPU or else of this process."""
    if not torch.cuda.is_available():
        return peak(reset)
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 2**30


if __name__ == "__main__":
    main(sys.argv[1:])
