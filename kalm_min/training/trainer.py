"""The training loop.

    for epoch, for batch of the sampler:
        texts -> ids (prepared ahead, in a thread)
        gradients of the global batch   (step.py)
        clip, update, log, now and then validate and save

Everything a step does is a pure function of the configuration, the data and the step's number, so
a run that is killed and started again goes on bit for bit (on a CPU; a GPU's sums may reorder).
"""

import ctypes
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kalm_min.data import TrainingData, collate
from kalm_min.embedder import Embedder, fastest_safe_dtype
from kalm_min.model import Packed, pool
from kalm_min.sampling import TaskBatchSampler, task_draws
from kalm_min.tokenizer import prefetch
from kalm_min.training import checkpoint, distributed, parallel, run_folder
from kalm_min.training.batch_loss import LossConfig
from kalm_min.training.optimizer import OptimizerConfig, build_optimizer, learning_rate
from kalm_min.training.parallel import ParallelConfig
from kalm_min.training.step import (
    StepResult,
    TokenBatch,
    contrastive_step,
    tokenize,
)
from kalm_min.training.validation import validate

_PREPARED = 4  # batches tokenised ahead of the step
_TIDY_EVERY = 16  # steps
_NAMED = 20  # examples of a failed step that are named


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Which examples meet in a batch."""

    batch_size: int = 512
    """Queries of one step over all processes; it must divide by their number."""
    homogeneous_ratio: float = 1.0
    """Share of each batch that is of one task; 1 is one task a batch, 0 mixes all."""
    num_negatives: int = 7
    """Hard negatives drawn for each query, at most."""
    size_exponent: float = 1.0
    """An epoch draws examples of a task ~ size^this: 1 is each once, 0 equally many of each task."""
    seed: int = 0
    """Of the order of examples and of the positives and negatives drawn."""

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled."""
        if self.batch_size < 2:
            raise ValueError(f"batch_size: expected at least 2 queries, found {self.batch_size}")
        if not 0 <= self.homogeneous_ratio <= 1:
            raise ValueError(f"homogeneous_ratio: expected 0 to 1, found {self.homogeneous_ratio}")
        if not 0 <= self.size_exponent <= 1:
            raise ValueError(f"size_exponent: expected 0 to 1, found {self.size_exponent}")
        if self.num_negatives < 0:
            raise ValueError(f"num_negatives: expected 0 or more, found {self.num_negatives}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How long to train, and what to do on the way."""

    epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after this many steps, whatever the epochs; the learning rate ends there too."""
    tokens_per_batch: int = 16_384
    """Tokens of one forward on one process; bounds the memory, changes no result."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the products; weights and optimizer stay float32. auto: bfloat16 where it is native."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept, besides the best of those made right after a validation."""
    non_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite stops the run, or changes nothing and is logged."""
    validate_every: int = 500
    """Steps between validations, where validation data is given."""
    validation_limit: int = 500
    """Pairs of each held-out task that a validation looks at."""

    def __post_init__(self) -> None:
        """Refuse counts below one."""
        for name in ("epochs", "tokens_per_batch", "save_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, found {self.max_steps}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How to train, whatever the model and the data."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


class _Prepared(NamedTuple):
    """A batch ready for its step."""

    indices: list[int]
    """This process's examples."""
    task: str
    """Their task, "mixed" where there are several."""
    tokens: TokenBatch


class Trainer:
    """Owns one run: `run` takes it from where it is to its end, or to `stop`."""

    def __init__(
        self,
        embedder: Embedder,
        data: TrainingData,
        validation: TrainingData | None,
        output: Path,
        recipe: Recipe,
        resume: Path | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            embedder: float32 weights on this process's device; of `resume` where given.
            data: what to train on.
            validation: held-out pairs, or None.
            output: the run's folder.
            recipe: how.
            resume: a checkpoint of this run.

        Raises ValueError where recipe, data and number of processes do not fit.
        """
        self.embedder, self.data, self.validation = embedder, data, validation
        self.output, self.recipe = output, recipe
        sampling, loop = recipe.sampling, recipe.training
        if too_wide := [d for d in recipe.loss.matryoshka_dims if d > embedder.dimension]:
            raise ValueError(
                f"matryoshka_dims: expected at most {embedder.dimension}, the width of the model, "
                f"found {too_wide[0]}"
            )
        if recipe.loss.distillation_weight:
            data.refuse_unscored()
        self.sampler = _sampler(data, sampling)
        whole = loop.epochs * len(self.sampler)
        self.total_steps = min(whole, loop.max_steps or whole)
        self.step = 0
        self.stop = False
        """Set from outside (a signal) to save and return after the current step."""
        self._score: float | None = None  # of the validation at this very step
        self._clock = 0.0  # when the last step ended
        bfloat16 = _wants_bfloat16(loop.precision, embedder.device)
        self.model = parallel.wrap(embedder.model, recipe.parallel, bfloat16=bfloat16)
        self.optimizer = build_optimizer(embedder.model, recipe.optimizer)
        self.autocast = partial(
            torch.autocast,
            embedder.device.type,
            dtype=torch.bfloat16,
            enabled=bfloat16 and not parallel.is_sharded(self.model),
        )
        if resume is not None:
            state = checkpoint.read_state(resume)
            checkpoint.restore_optimizer(resume, embedder.model, self.optimizer)
            self.step = state["step"]
            self.sampler.load_state_dict(state["sampler"])

    def run(self, report: Callable[[dict[str, Any]], None]) -> bool:
        """Train to the end; True when it was reached, False when stopped.

        Args:
            report: is given every log line, on rank 0.

        Raises:
            FloatingPointError: loss or gradient is not finite; the weights are as before the step.
        """
        main = distributed.rank() == 0
        loop = self.recipe.training
        log_path = self.output / "log.jsonl" if main else Path(os.devnull)
        if main:
            checkpoint.prune(self.output / "checkpoints", loop.keep_checkpoints)
            run_folder.cut_log(log_path, self.step)
        self._clock = time.perf_counter()
        # Without a checkpoint a run begins anew, whatever an earlier start has logged.
        with log_path.open("a" if self.step else "w", encoding="utf-8") as log:

            def write(line: dict[str, Any]) -> None:
                log.write(json.dumps(line) + "\n")
                log.flush()
                if main:
                    report(line)

            if self.validation is not None and self.step == 0:
                self._validate(self.validation, write)
            for batch in self._batches():
                write(self._step(batch))
                if self.step % _TIDY_EVERY == 0:
                    _return_memory(self.embedder.device)
                self.step, self._score = self.step + 1, None
                if self.validation is not None and self._due(loop.validate_every):
                    self._validate(self.validation, write)
                stop = distributed.max_over_ranks(int(self.stop), self.embedder.device) > 0
                if stop or self._due(loop.save_every):
                    if main:
                        os.fsync(log.fileno())  # no checkpoint knows of steps that the log lost
                    self._save()
                if stop and self.step < self.total_steps:
                    return False
        checkpoint.save_model(self.output / "final", self.embedder)
        return True

    def _due(self, every: int) -> bool:
        """Whether something done every so many steps, and at the end, is to be done now."""
        return self.step % every == 0 or self.step == self.total_steps

    def _batches(self) -> Iterator[_Prepared]:
        """The remaining batches, tokenised ahead of time in a thread."""
        return prefetch(lambda step: self._prepare(*step), self._plan(), _PREPARED)

    def _plan(self) -> Iterator[tuple[list[int], int]]:
        """(this process's examples, epoch) of every remaining step."""
        left = self.total_steps - self.step
        for epoch in range(self.step // len(self.sampler), self.recipe.training.epochs):
            self.sampler.set_epoch(epoch)
            for indices in islice(self.sampler, left):
                yield indices, epoch
                left -= 1

    def _prepare(self, indices: list[int], epoch: int) -> _Prepared:
        """Draw, prompt and tokenise one batch."""
        draw = {
            "epoch": epoch,
            "seed": self.recipe.sampling.seed,
            "num_negatives": self.recipe.sampling.num_negatives,
        }
        examples = [self.data.example(i, **draw) for i in indices]
        batch = collate(examples, template=self.embedder.instruction_template, **draw)
        tokens = tokenize(batch, self.embedder.tokenizer, max_length=self.embedder.max_length)
        tasks = {example.task for example in examples}
        name = self.data.task_names[tasks.pop()] if len(tasks) == 1 else "mixed"
        return _Prepared(indices, name, tokens)

    def _embed(self, packed: Packed) -> Tensor:
        """(b, D) vectors with a graph."""
        # Autocast is entered once a chunk: a weight cast without a graph in the first pass of
        # gradient caching must not be reused by the second.
        with self.autocast():
            hidden = self.model(packed, causal=self.embedder.causal)  # (T, D)
        return pool(hidden, packed.cu_seqlens, self.embedder.pooling)

    def _step(self, batch: _Prepared) -> dict[str, Any]:
        """Gradients, clipping, update; the log line of the step."""
        rate = learning_rate(self.recipe.optimizer, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        result = contrastive_step(
            batch.tokens,
            self._embed,
            self.recipe.loss,
            device=self.embedder.device,
            tokens_per_batch=self.recipe.training.tokens_per_batch,
            no_sync=lambda: parallel.no_sync(self.model),
            sharded=parallel.is_sharded(self.model),
        )
        norm = parallel.full_tensor(
            torch.nn.utils.clip_grad_norm_(
                self.embedder.model.parameters(), self.recipe.optimizer.max_grad_norm
            )
        )
        loss, sums = self._joined(result)
        line = {
            "step": self.step + 1,
            "epoch": self.step // len(self.sampler),
            "loss": _or_none(loss),
            "lr": rate,
            "grad_norm": _or_none(norm.item()),
            "task": batch.task,
        }
        if None not in line.values():
            self.optimizer.step()
        else:  # on all processes: both numbers are joint ones
            line["skipped"] = self._offenders(batch, result.finite)
            if self.recipe.training.non_finite == "stop":
                raise FloatingPointError(
                    f"step {self.step + 1}: loss {loss} and gradient norm {norm.item()} must be "
                    f"finite; the weights are untouched; look at {', '.join(line['skipped'])}"
                )
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        tokens = sums.pop("tokens")
        line |= {
            "tokens": int(tokens),
            "tokens_per_second": round(tokens / seconds),
            "seconds": round(seconds, 4),
        }
        return line | {
            name: value / self.recipe.sampling.batch_size for name, value in sums.items()
        }

    def _offenders(self, batch: _Prepared, finite: Tensor) -> list[str]:
        """`file:line` of the step's examples with a vector that is not finite, else of any; some."""
        text = batch.tokens.text
        owners = np.concatenate([np.arange(len(text.queries)), text.document_owner])
        broken = np.unique(owners[~finite.cpu().numpy()]).tolist()
        found: list[str] = []
        for places in (broken, range(len(batch.indices))):
            named = [self.data.location(batch.indices[i]) for i in places[:_NAMED]]
            found = found or [*chain.from_iterable(distributed.gather_objects(named))]
        return found[:_NAMED]

    def _joined(self, result: StepResult) -> tuple[float, dict[str, float]]:
        """The loss, mean over processes, and the counts, summed over them."""
        numbers = torch.tensor(
            [*result.counts.values()], dtype=torch.float64, device=result.loss.device
        )
        joined = distributed.mean(torch.cat([result.loss.double().view(1), numbers])).tolist()
        sums = [value * distributed.world_size() for value in joined[1:]]
        return joined[0], dict(zip(result.counts, sums, strict=True))

    @torch.no_grad()
    def _validate(self, data: TrainingData, write: Callable[[dict[str, Any]], None]) -> None:
        """Measure on the held-out pairs; every process takes part."""
        embedder = self.embedder

        def embed(texts: list[str]) -> Tensor:
            with self.autocast():
                return torch.from_numpy(embedder.encode(texts)).to(embedder.device)

        numbers = validate(
            data,
            embed,
            template=embedder.instruction_template,
            batch_size=self.recipe.sampling.batch_size,
            limit=self.recipe.training.validation_limit,
            together=parallel.is_sharded(self.model),
        )
        self._score = numbers["mrr"]
        write({"step": self.step, "validation": numbers})

    def _save(self) -> None:
        """A checkpoint of the current step."""
        epoch, within = divmod(self.step, len(self.sampler))
        place = {"epoch": epoch, "step": within}
        state = {"step": self.step, "sampler": self.sampler.state_dict() | place}
        state["validation"] = self._score
        root = self.output / "checkpoints"
        checkpoint.save(root, self.embedder, self.optimizer, state)
        if distributed.rank() == 0:
            checkpoint.prune(root, self.recipe.training.keep_checkpoints)


def _sampler(data: TrainingData, sampling: SamplingConfig) -> TaskBatchSampler:
    """This process's batches of the data, as the settings of its tasks weigh them."""
    return TaskBatchSampler(
        data.task_sizes,
        sampling.batch_size,
        homogeneous_ratio=sampling.homogeneous_ratio,
        seed=sampling.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        task_draws=task_draws(
            data.task_sizes,
            weights=[task.weight for task in data.settings],
            caps=[task.max_examples for task in data.settings],
            size_exponent=sampling.size_exponent,
        ),
    )


def _return_memory(device: torch.device) -> None:
    """Give what is free back to the system, where torch allocates with glibc.

    Chunks of ever other sizes leave it in pieces, and a run on a CPU came to hold 7 GiB around a
    model of 0.03.
    """
    if device.type == "cpu" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def _wants_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether products are taken in bfloat16."""
    if precision == "auto":
        return fastest_safe_dtype(device) is torch.bfloat16
    return precision == "bfloat16"


def _or_none(number: float) -> float | None:
    """A number that JSON can hold."""
    return number if math.isfinite(number) else None
