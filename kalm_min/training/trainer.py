"""The training loop.

    for every batch of the sampler:
        tokenize                        (ahead of time, in a thread)
        gradient of the global batch    (step.py)
        clip, update, log, now and then validate and save

Everything a step does is a pure function of the configuration, the data and the step's number, so
a run that is killed resumes bit for bit (on a CPU; a GPU's sums may reorder).
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
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kalm_min.data import TrainingData, collate
from kalm_min.embedder import Embedder, fastest_safe_dtype
from kalm_min.model import Packed, pool
from kalm_min.sampling import TaskBatchSampler, task_draws
from kalm_min.tokenizer import prefetch
from kalm_min.training import checkpoint, distributed, parallel
from kalm_min.training.parallel import ParallelConfig
from kalm_min.training.step import LossConfig, TokenBatch, contrastive_step, tokenize
from kalm_min.training.validation import validate

_PREPARED = 4  # batches tokenized ahead of the step
_NAMED = 20  # examples of a failed step that are named

# glibc keeps what chunks of ever other sizes leave in pieces: 7 GiB around a model of 0.03 GiB.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
_TRIM_EVERY = 16  # steps on a CPU

LogLine = dict[str, Any]  # a line of log.jsonl: of a step, or {"step": ..., "validation": ...}


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Which examples meet in a batch."""

    batch_size: Annotated[int, "Queries per optimizer step, over all processes."] = 512
    homogeneous_ratio: Annotated[
        float, "Share of each batch that is of one task: 1 is one task per batch, 0 mixes all."
    ] = 1.0
    num_negatives: Annotated[int, "Maximum number of hard negatives drawn per query."] = 7
    size_exponent: Annotated[
        float,
        "A task of size n gets a share n^this of an epoch; 1: each example once, 0: equal shares.",
    ] = 1.0
    seed: Annotated[int, "Seed of the order of examples and of the texts drawn from them."] = 0

    def __post_init__(self) -> None:
        """Validate the values."""
        if self.batch_size < 2:
            raise ValueError(f"batch_size: expected at least 2 queries, found {self.batch_size}")
        for name in ("homogeneous_ratio", "size_exponent"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, found {getattr(self, name)}")
        if self.num_negatives < 0:
            raise ValueError(f"num_negatives: expected 0 or more, found {self.num_negatives}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW; the defaults are those of the public fine-tuning script (paper notes, section 1.2)."""

    learning_rate: Annotated[float, "Peak learning rate."] = 1e-5
    warmup_ratio: Annotated[float, "Share of all steps that warm up from 0 to the peak."] = 0.1
    weight_decay: Annotated[float, "Decay of weight matrices; biases and norms never decay."] = 0.0
    betas: Annotated[tuple[float, float], "Decay rates of both moments."] = (0.9, 0.999)
    eps: Annotated[float, "Added to the square root of the second moment."] = 1e-8
    max_grad_norm: Annotated[float, "L2 norm that all gradients together are clipped to."] = 1.0

    def __post_init__(self) -> None:
        """Validate the values."""
        for name in ("learning_rate", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected more than 0, found {getattr(self, name)}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio: expected 0 to 1, found {self.warmup_ratio}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How long to train, and what to do on the way."""

    epochs: Annotated[int, "Passes over the data."] = 1
    max_steps: Annotated[
        int | None, "Stop after this many steps; the learning rate reaches 0 there too."
    ] = None
    tokens_per_batch: Annotated[
        int, "Tokens per forward of a process; bounds the memory and changes no result."
    ] = 16_384
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        "Precision of matrix products; weights stay float32. auto: bfloat16 where it is native.",
    ] = "auto"
    save_every: Annotated[int, "Steps between checkpoints."] = 500
    keep_checkpoints: Annotated[
        int, "Newest checkpoints to keep, besides the best of those made right after a validation."
    ] = 3
    non_finite: Annotated[
        Literal["stop", "skip"],
        "Stop at a step whose loss or gradient is not finite, or log it and change nothing.",
    ] = "stop"
    validate_every: Annotated[int, "Steps between validations."] = 500
    validation_limit: Annotated[int, "Pairs per held-out task that a validation looks at."] = 500

    def __post_init__(self) -> None:
        """Validate the counts."""
        for name in ("epochs", "max_steps", "tokens_per_batch", "save_every", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How to train, whatever the model and the data."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, matrices with weight decay and vectors without."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
    )


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """The rate of update `step` (from 0) of `total`: Hugging Face's linear schedule with warm-up."""
    warmup = round(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * step / warmup
    return config.learning_rate * (total - step) / max(1, total - warmup)


class _Batch(NamedTuple):
    indices: list[int]  # this process's examples
    task: str  # their task, "mixed" where there are several
    tokens: TokenBatch


class Trainer:
    """One run: `run` takes it from where it is to its end, or to `stop`."""

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
            validation: held-out pairs, if any.
            output: the run's folder.
            recipe: how to train.
            resume: a checkpoint of this run, if there is one.

        Raises ValueError where recipe, data and number of processes do not fit.
        """
        self.embedder, self.data, self.validation = embedder, data, validation
        self.output, self.recipe = output, recipe
        sampling, loop = recipe.sampling, recipe.training
        if too_large := [d for d in recipe.loss.matryoshka_dims if d > embedder.dimension]:
            raise ValueError(
                f"--loss.matryoshka-dims: expected at most {embedder.dimension}, the dimension of "
                f"the model, found {too_large[0]}"
            )
        if sampling.batch_size % distributed.world_size():
            raise ValueError(
                f"--sampling.batch-size: expected a multiple of the {distributed.world_size()} "
                f"processes, found {sampling.batch_size}"
            )
        if recipe.loss.distillation_weight:
            data.require_scores()
        self.sampler = TaskBatchSampler(
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
        self.step = 0
        """Steps taken."""
        self.total_steps = loop.epochs * len(self.sampler)
        self.total_steps = min(self.total_steps, loop.max_steps or self.total_steps)
        self.stop = 0
        """A signal's number, set on any process, saves and returns after the current step."""
        bfloat16 = loop.precision == "bfloat16" or (
            loop.precision == "auto" and fastest_safe_dtype(embedder.device) is torch.bfloat16
        )
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

    def run(self, report: Callable[[LogLine], None]) -> bool:
        """Train to the end; True when it was reached, False when stopped.

        Args:
            report: is given every log line, on rank 0.

        Raises:
            FloatingPointError: loss or gradient is not finite; the weights are as before the step.
        """
        loop, is_main = self.recipe.training, distributed.rank() == 0
        checkpoints, log_path = self.output / "checkpoints", self.output / "log.jsonl"
        if is_main:
            checkpoint.prune(checkpoints, loop.keep_checkpoints)
            checkpoint.cut_log(log_path, self.step)

        def write(line: LogLine) -> None:
            log.write(json.dumps(line) + "\n")
            log.flush()
            if is_main:
                report(line)

        def is_due(every: int) -> bool:
            return self.step % every == 0 or self.step == self.total_steps

        # Without a checkpoint a run begins anew, whatever an earlier start has logged.
        mode = "a" if self.step else "w"
        with (log_path if is_main else Path(os.devnull)).open(mode, encoding="utf-8") as log:
            if self.step == 0:
                self._validate(write)
            clock = time.perf_counter()
            for batch in prefetch(self._prepare, self._remaining(), _PREPARED):
                line = self._train_step(batch)
                self.step += 1
                now = time.perf_counter()
                seconds, clock = now - clock, now
                line["tokens_per_second"] = round(line["tokens"] / seconds)
                write(line | {"seconds": round(seconds, 4)})
                score = self._validate(write) if is_due(loop.validate_every) else None
                stop = distributed.max_over_ranks(self.stop, self.embedder.device)
                if stop or is_due(loop.save_every):
                    if is_main:
                        os.fsync(log.fileno())  # no checkpoint knows of steps that the log lost
                    epoch, step = divmod(self.step, len(self.sampler))
                    sampler = self.sampler.state_dict() | {"epoch": epoch, "step": step}
                    state = checkpoint.State(step=self.step, sampler=sampler, validation=score)
                    checkpoint.save(checkpoints, self.embedder, self.optimizer, state)
                    if is_main:
                        checkpoint.prune(checkpoints, loop.keep_checkpoints)
                if stop and self.step < self.total_steps:
                    self.stop = stop
                    return False
        checkpoint.save_model(self.output / "final", self.embedder)
        return True

    def _remaining(self) -> Iterator[tuple[list[int], int]]:
        """(this process's examples, epoch) of every remaining step."""
        left = self.total_steps - self.step
        for epoch in range(self.step // len(self.sampler), self.recipe.training.epochs):
            self.sampler.set_epoch(epoch)
            for indices in islice(self.sampler, left):
                yield indices, epoch
                left -= 1

    def _prepare(self, step: tuple[list[int], int]) -> _Batch:
        """Draw the texts of one batch, put prompts before them, tokenize."""
        indices, epoch = step
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
        return _Batch(indices, name, tokens)

    def _train_step(self, batch: _Batch) -> LogLine:
        """One update: gradient of the global batch, clipping, AdamW; what the log says of it."""
        config, device = self.recipe, self.embedder.device
        rate = learning_rate(config.optimizer, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        result = contrastive_step(
            batch.tokens,
            self._embed,
            config.loss,
            device=device,
            tokens_per_batch=config.training.tokens_per_batch,
            no_sync=lambda: parallel.no_sync(self.model),
            sharded=parallel.is_sharded(self.model),
        )
        parameters, max_norm = self.embedder.model.parameters(), config.optimizer.max_grad_norm
        norm = parallel.full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm)).item()
        # Over all processes, so that all decide alike.
        values = [result.loss.item(), *result.counts.values()]
        loss, *means = distributed.mean(
            torch.tensor(values, dtype=torch.float64, device=device)
        ).tolist()
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        sums = [mean * distributed.world_size() for mean in means]
        counts = dict(zip(result.counts, sums, strict=True))
        line: LogLine = {
            "step": self.step + 1,
            "epoch": self.step // len(self.sampler),
            "loss": loss if math.isfinite(loss) else None,  # JSON has no infinity
            "lr": rate,
            "grad_norm": norm if math.isfinite(norm) else None,
            "task": batch.task,
            "tokens": round(counts.pop("tokens")),
        }
        if is_finite:
            self.optimizer.step()
        else:
            line["skipped"] = self._offenders(batch, result.finite)
            if config.training.non_finite == "stop":
                raise FloatingPointError(
                    f"step {self.step + 1}: loss {loss} and gradient norm {norm} must be "
                    f"finite; the weights are untouched; look at {', '.join(line['skipped'])}"
                )
        if _malloc_trim is not None and device.type == "cpu" and self.step % _TRIM_EVERY == 0:
            _malloc_trim(0)
        per_query = {name: count / config.sampling.batch_size for name, count in counts.items()}
        return line | per_query

    def _embed(self, packed: Packed) -> Tensor:
        """(B, D) vectors with a graph."""
        # Autocast is entered once per chunk: a weight cast without a graph in the first pass of
        # gradient caching must not be reused by the second.
        with self.autocast():
            hidden = self.model(packed, causal=self.embedder.causal)  # (T, D)
        return pool(hidden, packed.cu_seqlens, self.embedder.pooling)

    def _offenders(self, batch: _Batch, finite: Tensor) -> list[str]:
        """`file:line` of some of the step's examples with a vector that is not finite, else of any."""
        text = batch.tokens.text
        owners = np.concatenate([np.arange(len(text.queries)), text.document_owner])
        broken: list[int] = np.unique(owners[~finite.cpu().numpy()]).tolist()
        for positions in (broken, range(len(batch.indices))):
            local = [self.data.location(batch.indices[i]) for i in positions[:_NAMED]]
            if found := [*chain.from_iterable(distributed.gather_objects(local))]:
                break
        return found[:_NAMED]

    @torch.no_grad()
    def _validate(self, write: Callable[[LogLine], None]) -> float | None:
        """Measure on the held-out pairs, if any; every process takes part. The score to keep by."""
        if self.validation is None:
            return None

        def embed(texts: list[str]) -> Tensor:
            with self.autocast():
                return torch.from_numpy(self.embedder.encode(texts)).to(self.embedder.device)

        scores = validate(
            self.validation,
            embed,
            template=self.embedder.instruction_template,
            batch_size=self.recipe.sampling.batch_size,
            limit=self.recipe.training.validation_limit,
            together=parallel.is_sharded(self.model),
        )
        write({"step": self.step, "validation": scores})
        return scores["mrr"]
