"""Exactness, shown on your own machine: `python -m kalm_min.check`.

For every loss option: the loss and every parameter gradient of one plain backward over the whole
batch, against the same batch on several gloo processes and through gradient caching in several
chunks, in float64. A small random decoder and made-up examples with everything that masking looks
for: shared positives, several positives, a query that is somebody's document, groups, rows without
negatives, tasks without in-batch negatives.

The two must agree to 1e-10: what is compared are sums of the same numbers in another order.
"""

import os
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from kalm_min.config import run
from kalm_min.console import table
from kalm_min.data import Example, collate
from kalm_min.files import write_text
from kalm_min.model import ModelConfig, Packed, Qwen2, initialise, pool
from kalm_min.training import distributed, parallel
from kalm_min.training.parallel import ParallelConfig
from kalm_min.training.step import LossConfig, TokenBatch, contrastive_step

LIMIT = 1e-10
_QUERIES = 12  # divides by 1, 2 and 3 processes
_PLAIN = LossConfig(temperature=0.05, mask_false_negatives=False)
_MASKED = replace(_PLAIN, mask_false_negatives=True)
_MATRYOSHKA = replace(_MASKED, matryoshka_dims=(16, 8, 4), matryoshka_weights=(1.0, 0.3, 0.2))
_MORE = replace(_MASKED, query_negatives=True, document_negatives=True)
_ALL = replace(
    _MATRYOSHKA,
    gamma=0.5,
    mixing=True,
    distillation_weight=0.7,
    false_negative_margin=0.1,
    query_negatives=True,
    document_negatives=True,
)


class Option(NamedTuple):
    """One row of the table."""

    name: str
    loss: LossConfig
    num_negatives: int = 3


OPTIONS = (
    Option("in-batch negatives", _PLAIN, num_negatives=0),
    Option("hard negatives", _PLAIN),
    Option("masking", _MASKED),
    Option("Matryoshka", _MATRYOSHKA),
    Option("focal", replace(_MASKED, gamma=0.5)),
    Option("mixing", replace(_MASKED, mixing=True)),
    Option("margin", replace(_MASKED, false_negative_margin=0.1)),
    Option("query and document negatives", _MORE),
    Option("distillation", replace(_MASKED, distillation_weight=0.7)),
    Option("all of them", _ALL),
    Option("all of them, in blocks", replace(_ALL, memory_gib=1e-5)),
)


class Way(NamedTuple):
    """One way to compute a step."""

    budget: int  # tokens per chunk
    strategy: Literal["ddp", "fsdp"] = "ddp"
    others: int | None = None  # tokens per chunk on all processes but the first, where they differ


WAYS = {
    "1 chunk": Way(10**6),
    "3 chunks": Way(110),
    "n chunks": Way(1),
    "3 chunks, sharded": Way(110, "fsdp"),
    "1 or n chunks": Way(10**6, others=1),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckConfig:
    """Compare one process, several, and gradient caching, for every loss option."""

    output: Annotated[Path | None, "Markdown file to which the table is written too."] = None
    processes: Annotated[tuple[int, ...], "Numbers of processes; each divides 12."] = (1, 2, 3)


def examples(count: int = _QUERIES) -> list[Example]:
    """Examples in which every kind of false negative occurs."""
    made = []
    for i in range(count):
        positives = (f"positive {i // 2}",) if i < 4 else (f"positive {i}", f"other {i}")
        negatives = [f"negative {i} {j}" for j in range(i % 5)]
        if i == 7:
            negatives[0] = "positive 1"  # another query's positive
        if i == 6:
            negatives[0] = "query 7"  # another query's text
        made.append(
            Example(
                query=f"query {i}",
                positives=positives,
                negatives=tuple(negatives),
                positive_scores=(0.9, 0.8)[: len(positives)],
                negative_scores=tuple(0.1 * j for j in range(len(negatives))),
                task=0,
                index=i,
                group="class" if i in {8, 9} else None,
                in_batch_negatives=i != 10,
            )
        )
    return made


def tokenized(some: list[Example], num_negatives: int) -> TokenBatch:
    """A batch whose token ids are drawn from each text's own letters: 2 to 13 tokens."""
    text = collate(some, num_negatives=num_negatives, template="{instruction}", epoch=0, seed=0)
    texts = [*text.queries, *text.documents]
    unique = {t: i for i, t in enumerate(dict.fromkeys(texts))}
    sequences = [
        np.random.default_rng([*t.encode()]).integers(64, size=2 + sum(t.encode()) % 12).tolist()
        for t in unique
    ]
    return TokenBatch(sequences, torch.tensor([unique[t] for t in texts]), text)


def decoder() -> Qwen2:
    """A small random decoder in float64."""
    config = ModelConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        initializer_range=0.3,
    )
    model = Qwen2(config)
    initialise(model, seed=1)
    return model.double()


def step(option: Option, way: Way) -> dict[str, Tensor]:
    """The "loss" of one step, and every parameter's gradient, as data parallelism gives them.

    The step is taken twice: in the second one DDP exchanges more, having seen the first.
    """
    rank, share = distributed.rank(), _QUERIES // distributed.world_size()
    batch = tokenized(examples()[rank * share : (rank + 1) * share], option.num_negatives)
    model = decoder()
    wrapped = parallel.wrap(model, ParallelConfig(strategy=way.strategy))

    def embed(packed: Packed) -> Tensor:
        return pool(wrapped(packed, causal=False), packed.cu_seqlens, "mean")

    loss = torch.zeros(())
    for _ in range(2):
        model.zero_grad()
        loss = contrastive_step(
            batch,
            embed,
            option.loss,
            device=torch.device("cpu"),
            tokens_per_batch=way.others if rank and way.others else way.budget,
            no_sync=partial(parallel.no_sync, wrapped),
            sharded=parallel.is_sharded(model),
        ).loss
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": distributed.mean(loss)} | {
        name: parallel.full_tensor(gradient) for name, gradient in gradients.items()
    }


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The larger of the relative differences of the loss and of all gradients together."""
    assert one.keys() == other.keys()
    gradients = one.keys() - {"loss"}
    squares = sum((one[name] - other[name]).square().sum() for name in gradients)
    norm = sum(one[name].square().sum() for name in gradients)
    return max(float(abs(other["loss"] / one["loss"] - 1)), float(squares / norm) ** 0.5)


def compare(processes: Iterable[int]) -> Iterator[tuple[str, int, str, float]]:
    """Yield (option, processes, way, relative difference from the plain form)."""
    plain = {option.name: step(option, WAYS["1 chunk"]) for option in OPTIONS}
    for count in processes:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]  # free
        with tempfile.TemporaryDirectory() as folder:
            start_processes(_worker, (count, port, folder), nprocs=count, start_method="spawn")
            for option, way in product(OPTIONS, WAYS):
                found = load_file(Path(folder) / f"{option.name} {way}.safetensors")
                yield option.name, count, way, difference(plain[option.name], found)


def _worker(rank: int, count: int, port: int, folder: str) -> None:
    """One process: every option in every way; rank 0 writes the results."""
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= address | {"RANK": str(rank), "WORLD_SIZE": str(count)}
    distributed.start(dict(os.environ), torch.device("cpu"))
    try:
        for option, (name, way) in product(OPTIONS, WAYS.items()):
            result = step(option, way)
            if rank == 0:
                save_file(result, Path(folder) / f"{option.name} {name}.safetensors")
        distributed.barrier()  # leave together: what ends early breaks the others' connections
    finally:
        distributed.stop()
    distributed.hard_exit(0)


def check(config: CheckConfig) -> int:
    """Print the table; 0 when every difference is within the limit."""
    rows = list(compare(config.processes))
    columns = list(product(config.processes, WAYS))
    cells = {(name, count, way): value for name, count, way, value in rows}
    lines = [
        "# One process = several = gradient-cached",
        "",
        "Largest relative difference of loss and parameter gradients from one plain backward over",
        "the whole batch, float64, CPU, gloo. Columns: processes x chunks (n: one text per",
        "chunk; 1 or n: one chunk on the first process, n on the others; sharded: FSDP2).",
        f"Made by `python -m kalm_min.check`; the limit is {LIMIT:.0e}.",
        "",
        table(
            ["loss option", *(f"{count} x {way}" for count, way in columns)],
            [
                [name, *(f"{cells[name, *column]:.0e}" for column in columns)]
                for name, *_ in OPTIONS
            ],
        ),
        "",
    ]
    sys.stdout.write("\n".join(lines))
    if config.output is not None:
        write_text(config.output, "\n".join(lines))
    return int(max(value for *_, value in rows) > LIMIT)


if __name__ == "__main__":
    sys.exit(run(CheckConfig, check, sys.argv[1:], program="kalm_min.check"))
