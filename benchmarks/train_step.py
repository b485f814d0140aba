"""One training step: kalm_min, transformers with padding, sentence-transformers' loss.

    python benchmarks/train_step.py --data DIR --tokenizer DIR [--layers 4] [--queries 8]

A step takes a batch of one task from texts to gradients: queries with a positive and seven negatives
each (other positives of the task), and InfoNCE over all documents in five Matryoshka dimensions. The
update is the same work for all three and left out. All compute in bfloat16 by autocast over float32
weights where it is native, else in float32.

transformers: a padded batch of queries and one of documents, as in the official code, with gradient
checkpointing. sentence-transformers: its loss as its trainer calls it, with a padded batch for each of
the nine columns.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Annotated

import torch
from measuring import Common, Report, alternate, device, lines, ratio
from random_model import build
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from kalm_min import Embedder
from kalm_min.config import parse
from kalm_min.data.batches import TextBatch, collate
from kalm_min.data.dataset import Example
from kalm_min.embedder import fastest_safe_dtype
from kalm_min.losses import matryoshka
from kalm_min.model import Packed, pool
from kalm_min.training.step import LossConfig, contrastive_step, tokenize

Step = Callable[[TextBatch], Tensor]
Autocast = Callable[[], torch.autocast]
_NEGATIVES = 7
_LOSS = LossConfig(
    temperature=0.02,
    matryoshka_dims=(896, 512, 256, 128, 64),
    matryoshka_weights=(1.0, 0.3, 0.2, 0.1, 0.1),
    mask_false_negatives=False,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options(Common):
    """Options of the batches."""

    layers: Annotated[
        int, "Layers of the Qwen2-0.5B shape, which has 24; all layers cost the same."
    ] = 4
    queries: Annotated[int, "Queries per step, with eight times as many documents."] = 8
    tasks: Annotated[tuple[str, ...], "Tasks; one measurement is one step of each."] = (
        "csl_title2abstract_zh",
        "msdocs_bitext_zh_en",
        "stackoverflow_csharp_code",
    )
    max_length: Annotated[int, "Tokens kept per text."] = 512


def main(argv: list[str]) -> None:
    """Measure and print."""
    options = parse(
        Options, argv, program="train_step.py", description="A training step, measured."
    )
    report = Report("train_step", options)
    dtype = fastest_safe_dtype(device())
    autocast = partial(torch.autocast, device().type, dtype=dtype, enabled=dtype != torch.float32)
    batches = [batch_of(options, task) for task in options.tasks]
    with tempfile.TemporaryDirectory() as folder:
        build(
            options.tokenizer, layers=options.layers, max_length=options.max_length
        ).save_pretrained(folder)
        steps: dict[str, Step] = {
            "kalm_min": ours(folder, autocast),
            "transformers, padded, checkpointing": official(folder, autocast, options.max_length),
            "sentence-transformers' loss": sentence_transformers(folder, autocast),
        }
    describe(batches, options, report, dtype)
    losses = {name: step(batches[-1]).item() for name, step in steps.items()}
    programs = {name: partial(all_of, step, batches) for name, step in steps.items()}
    seconds = alternate(programs, options.rounds)
    for name, values in seconds.items():
        faster = ratio(seconds, name, "kalm_min")
        report.row(
            program=name,
            seconds=statistics.median(values),
            loss=losses[name],
            **{"ours is faster": faster},
        )
        if name != "kalm_min":
            report.ratio(f"against {name}", faster)
    report.close()


def all_of(step: Step, batches: list[TextBatch]) -> None:
    """Run a step of every batch."""
    for batch in batches:
        step(batch)


def batch_of(options: Options, task: str) -> TextBatch:
    """The first queries of a task with their positives, and other positives as negatives."""
    count = options.queries * (1 + _NEGATIVES)
    rows = list({row["pos"][0]: row for row in lines(options.data, 2 * count, task)}.values())
    others = iter([row["pos"][0] for row in rows[options.queries : count]])
    examples = [
        Example(
            query=row["query"],
            positives=(row["pos"][0],),
            negatives=tuple(islice(others, _NEGATIVES)),
            task=0,
            index=i,
        )
        for i, row in enumerate(rows[: options.queries])
    ]
    return collate(examples, num_negatives=_NEGATIVES, template="", epoch=0, seed=0)


def describe(
    batches: list[TextBatch], options: Options, report: Report, dtype: torch.dtype
) -> None:
    """Report the tokens of the steps and the share of padding."""
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    real = computed = 0
    for batch in batches:
        for texts in (batch.queries, batch.documents):
            lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=options.max_length)["input_ids"]]  # fmt: skip
            real += sum(lengths)
            computed += max(lengths) * len(lengths)
    report.note(
        f"{dtype}, {options.layers} layers, {len(batches)} steps of {options.queries} queries, "
        f"{real} tokens, {1 - real / computed:.0%} padding in transformers' batches"
    )


def ours(folder: str, autocast: Autocast) -> Step:
    """The trainer's step."""
    embedder = Embedder.from_pretrained(folder, device(), torch.float32)

    def embed(packed: Packed) -> Tensor:
        with autocast():
            hidden = embedder.model(packed, causal=True)
        return pool(hidden, packed.cu_seqlens, "mean")

    def step(batch: TextBatch) -> Tensor:
        embedder.model.zero_grad()
        tokens = tokenize(batch, embedder.tokenizer, max_length=embedder.max_length)
        return contrastive_step(
            tokens, embed, _LOSS, device=device(), tokens_per_batch=16_384, no_sync=nullcontext
        )[0]

    return step


def official(folder: str, autocast: Autocast, max_length: int) -> Step:
    """Padded batches, mean pooling over the mask, and the same loss."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).to(device()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def embed(texts: list[str]) -> Tensor:
        fed = tokenizer(
            texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        fed = fed.to(device())
        with autocast():
            hidden = model(**fed, use_cache=False).last_hidden_state  # (B, T, D)
        mask = fed["attention_mask"][..., None].float()
        return (hidden.float() * mask).sum(1) / mask.sum(1)

    def step(batch: TextBatch) -> Tensor:
        model.zero_grad()
        queries, documents = embed(batch.queries), embed(batch.documents)
        labels = torch.from_numpy(batch.labels).to(queries.device)
        loss = matryoshka(
            queries,
            documents,
            labels,
            dims=_LOSS.matryoshka_dims,
            weights=_LOSS.matryoshka_weights,
            temperature=_LOSS.temperature,
        )
        loss.backward()
        return loss.detach()

    return step


def sentence_transformers(folder: str, autocast: Autocast) -> Step:
    """The loss module on one batch of features for each column, as the trainer calls it."""
    model = SentenceTransformer(folder, device=str(device()))
    model.train()
    loss = MatryoshkaLoss(
        model,
        MultipleNegativesRankingLoss(model, scale=1 / _LOSS.temperature),
        list(_LOSS.matryoshka_dims),
        list(_LOSS.matryoshka_weights),
    )

    def step(batch: TextBatch) -> Tensor:
        model.zero_grad()
        columns = [
            batch.queries,
            *(batch.documents[k :: 1 + _NEGATIVES] for k in range(1 + _NEGATIVES)),
        ]
        features = [
            {key: value.to(device()) for key, value in model.preprocess(column).items() if isinstance(value, Tensor)}
            for column in columns
        ]  # fmt: skip
        with autocast():
            value = loss(features, torch.arange(len(batch.queries), device=device()))
        value.backward()
        return value.detach()

    return step


if __name__ == "__main__":
    main(sys.argv[1:])
