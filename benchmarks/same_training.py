"""The same training twice: by kalm_min, and by sentence-transformers' trainer.

    python benchmarks/same_training.py --model runs/base/final --data data/mined --output runs/same

Both use the same initial weights, rows, order, steps, optimiser and schedule, in float32: kalm_min
InfoNCE over all documents of the batch with Matryoshka, the peer MatryoshkaLoss over
MultipleNegativesRankingLoss. False negatives are not masked, since the peer cannot mask them. The two
compute the same function; the differences that remain come from sums in different orders (packed and
padded), which training amplifies. Every row of the data must have enough negatives, since the columns
of the peer's table must be complete (`mine.py --short-rows drop`; tasks with too few are left out).
Both models are saved, for evaluate.py.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch

from kalm_min import Embedder
from kalm_min.config import parse
from kalm_min.data import TrainingData, collate
from kalm_min.options import LoopConfig, LossConfig, OptimizerConfig, Recipe, SamplingConfig
from kalm_min.sampling import TaskBatchSampler
from kalm_min.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of both trainings."""

    model: Annotated[Path, "Folder of the model to start from."]
    data: Annotated[Path, "Training data in which every row has `num_negatives` negatives."]
    output: Annotated[Path, "Folder for both results."]
    steps: Annotated[int, "Optimizer steps."] = 300
    batch_size: Annotated[int, "Queries per step."] = 32
    num_negatives: Annotated[int, "Negatives per query."] = 4
    max_length: Annotated[int, "Tokens kept per text."] = 64
    temperature: Annotated[float, "Divides the cosine similarity."] = 0.05
    learning_rate: Annotated[
        float, "Peak learning rate, after a linear warm-up over a tenth of the steps."
    ] = 5e-4
    dims: Annotated[tuple[int, ...], "Matryoshka dimensions."] = (128, 64, 32)
    weights: Annotated[tuple[float, ...], "One weight per dimension."] = (1.0, 0.3, 0.2)


def recipe(options: Options) -> Recipe:
    """The common settings, as kalm_min names them."""
    return Recipe(
        sampling=SamplingConfig(batch_size=options.batch_size, num_negatives=options.num_negatives),
        loss=LossConfig(
            temperature=options.temperature,
            matryoshka_dims=options.dims,
            matryoshka_weights=options.weights,
            mask_false_negatives=False,
        ),
        optimizer=OptimizerConfig(learning_rate=options.learning_rate),
        training=LoopConfig(
            max_steps=options.steps,
            epochs=100,
            precision="float32",
            save_every=10**9,
        ),
    )


def ours(options: Options, data: TrainingData) -> list[float]:
    """Train with kalm_min; return the loss of each step."""
    embedder = Embedder.from_pretrained(
        options.model, "cpu", torch.float32, max_length=options.max_length
    )
    losses: list[float] = []
    output = options.output / "kalm_min"
    output.mkdir(parents=True)
    trainer = Trainer(embedder, data, None, output, recipe(options))
    trainer.run(lambda line: losses.append(line["loss"]))
    return losses


def rows_in_order(options: Options, data: TrainingData) -> dict[str, list[str]]:
    """The texts of all steps, as columns: query, positive, negatives."""
    sampler = TaskBatchSampler(data.task_sizes, options.batch_size)
    columns: list[list[str]] = [[] for _ in range(options.num_negatives + 2)]
    batches: Iterator[list[int]] = iter(())
    for step in range(options.steps):
        epoch, within = divmod(step, len(sampler))
        if within == 0:
            sampler.set_epoch(epoch)
            batches = iter(sampler)
        count = options.num_negatives
        examples = [
            data.example(i, epoch=epoch, seed=0, num_negatives=count) for i in next(batches)
        ]
        text = collate(examples, template="{instruction}", epoch=epoch, seed=0, num_negatives=count)
        group = options.num_negatives + 1
        if len(text.documents) != group * len(text.queries):
            short = data.location(examples[0].index)
            raise ValueError(f"{short}: expected {group - 1} negatives in every row of its batch")
        columns[0] += text.queries
        for column in range(group):
            columns[column + 1] += text.documents[column::group]
    names = ["anchor", "positive", *(f"negative_{i}" for i in range(options.num_negatives))]
    return dict(zip(names, columns, strict=True))


def peer(options: Options, columns: dict[str, list[str]]) -> list[float]:
    """Train with sentence-transformers; return the loss of each step."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.sentence_transformer.losses import (
        MatryoshkaLoss,
        MultipleNegativesRankingLoss,
    )

    class InOrder(DefaultBatchSampler):
        """Takes the rows in their order, instead of the peer's shuffling."""

        def __iter__(self) -> Iterator[list[int]]:
            for start in range(0, options.steps * options.batch_size, options.batch_size):
                yield list(range(start, start + options.batch_size))

    model = SentenceTransformer(str(options.model), device="cpu")
    model.max_seq_length = options.max_length
    inner = MultipleNegativesRankingLoss(model, scale=1 / options.temperature)
    loss = MatryoshkaLoss(model, inner, list(options.dims), list(options.weights))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(options.output / "peer"),
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        warmup_steps=round(0.1 * options.steps),
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        weight_decay=0.0,
        batch_sampler=InOrder,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = Dataset.from_dict(columns)
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss)
    trainer.train()
    model.save_pretrained(str(options.output / "peer" / "final"))
    return [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]


def main(argv: list[str]) -> None:
    """Train twice and print how well the losses agree."""
    options = parse(Options, argv, program="same_training.py", description="The same run twice.")
    data = TrainingData(options.data)
    start = time.perf_counter()
    here = ours(options, data)
    middle = time.perf_counter()
    there = peer(options, rows_in_order(options, data))
    end = time.perf_counter()
    gaps = [abs(a - b) / abs(b) for a, b in zip(here, there, strict=True)]
    print("| | kalm_min | sentence-transformers | largest relative difference |")
    print("|---|---|---|---|")
    bounds = [0, 1, 20, 50, 100, 200, *range(300, options.steps + 1, 100)]
    for first, last in pairwise(bounds):
        if last > options.steps:
            break
        part = slice(first, last)
        mean = [math.fsum(x[part]) / (last - first) for x in (here, there)]
        name = f"loss, steps {first + 1} to {last}"
        print(f"| {name} | {mean[0]:.6f} | {mean[1]:.6f} | {max(gaps[part]):.1e} |")
    print(f"| seconds | {middle - start:.0f} | {end - middle:.0f} | |")
    (options.output / "losses.json").write_text(json.dumps({"ours": here, "peer": there}))


if __name__ == "__main__":
    main(sys.argv[1:])
