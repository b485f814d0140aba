"""The training loop.

    for every batch of the sampler, tokenized ahead of time in a thread:
        gradient of the global batch (step.py), clip, update, log, now and then validate and save

A step is a pure function of the configuration, the data and the step's number, so a killed run
resumes bit for bit (on a CPU; a GPU may change the order of sums).
"""

import ctypes
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kalm_min.data import TrainingData, collate
from kalm_min.embedder import Embedder, fastest_safe_dtype
from kalm_min.files import checkpoint_folders, hash_checkpoint
from kalm_min.model import Packed, pool
from kalm_min.options import OptimizerConfig, Recipe
from kalm_min.sampling import TaskBatchSampler, task_draws
from kalm_min.tokenizer import prefetch
from kalm_min.training import checkpoint, distributed, parallel
from kalm_min.training.step import TokenBatch, contrastive_step, tokenize
from kalm_min.training.tracking import LogLine, draw_curve, open_tracker
from kalm_min.training.validation import trained_prompts, validate

_PREPARED = 4  # batches tokenized ahead of the step
_NAMED = 20  # examples of a failed step that the error names
_EARLY = 1 << 16  # in the place of a signal's number: the validation shows no progress
_CURVE = 30  # steps from which on a run gets a picture

# glibc keeps the fragments that chunks of varying sizes leave: 7 GiB with a model of 0.03 GiB.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
_TRIM_EVERY = 16  # steps on a CPU


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; matrices have weight decay, vectors do not."""
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


@dataclass(eq=False)
class Trainer:
    """One run: `run` takes it from `step` to `total_steps`.

    Raises ValueError if recipe, data and number of processes do not fit.
    """

    embedder: Embedder  # float32 weights on this process's device; those of `resume` if given
    data: TrainingData
    validation: TrainingData | None  # held-out pairs
    output: Path  # the run's folder
    recipe: Recipe
    resume: Path | None = None  # a checkpoint of this run
    query_prompt: str | None = None  # that the model stores, whatever the instructions

    def __post_init__(self) -> None:
        data, device, embedder = self.data, self.embedder.device, self.embedder
        self.remarks: list[str] = []
        """What was changed to fit the model and the data, a sentence each."""
        if self.recipe.loss.distillation_weight:
            data.require_scores()
        if self.recipe.training.patience and self.validation is None:
            raise ValueError("--training.patience: expected --data.validation, found none")
        draws = task_draws(
            data.task_sizes,
            weights=[task.weight for task in data.settings],
            caps=[task.max_examples for task in data.settings],
            size_exponent=self.recipe.sampling.size_exponent,
        )
        self._fit(sum(draws))
        sampling, loop = self.recipe.sampling, self.recipe.training
        self.sampler = TaskBatchSampler(
            data.task_sizes,
            sampling.batch_size,
            homogeneous_ratio=sampling.homogeneous_ratio,
            seed=sampling.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            task_draws=draws,
        )
        self.step = 0
        self.total_steps = min(loop.epochs * len(self.sampler), loop.max_steps or sys.maxsize)
        auto = loop.precision == "auto" and fastest_safe_dtype(device) is torch.bfloat16
        bfloat16 = auto or loop.precision == "bfloat16"
        self.model = parallel.wrap(embedder.model, self.recipe.parallel, bfloat16=bfloat16)
        self.sharded = parallel.is_sharded(self.model)
        autocast = bfloat16 and not self.sharded
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=autocast)
        self.optimizer = build_optimizer(embedder.model, self.recipe.optimizer)
        base = checkpoint_folders(embedder.adapter.base) if embedder.adapter else ()
        self.sources = {
            "--data.path": data.fingerprint,
            "--data.validation": self.validation.fingerprint if self.validation else None,
            "--model.path": hash_checkpoint(*base),  # of the frozen base; without one, of nothing
        }
        # Of queries without an instruction, and of documents; later the model has those to be stored.
        self.prompts = [embedder.prompts["query"], embedder.prompts["document"]]
        if self.resume is not None:
            self._restore(self.resume)
        embedder.prompts["query"], embedder.prompts["document"] = self.prompts
        embedder.prompts |= trained_prompts(data, draws, embedder)
        if self.query_prompt is not None:
            embedder.prompts["query"] = self.query_prompt

    def _fit(self, examples: int) -> None:
        """Lower the batch size to an epoch of so many examples, and slices to the model."""
        sampling, loss, full = self.recipe.sampling, self.recipe.loss, self.embedder.dimension
        if 1 < examples < (batch := sampling.batch_size):
            # Whatever the number of processes, so that a run may resume on more or fewer.
            size = examples // 8 * 8 or examples // 2 * 2
            sampling = replace(sampling, batch_size=size)
            lowered = f"the batch is lowered from {batch} to {size} queries"
            self.remarks.append(f"an epoch has {examples} examples: {lowered}")
        slices = sorted(zip(loss.matryoshka_dims, loss.matryoshka_weights, strict=True))
        if large := [dim for dim, _ in slices if dim > full]:
            self.remarks.append(
                f"--loss.matryoshka-dims {' '.join(map(str, large))}: dropped, since the model has "
                f"{full} dimensions, which together get the weight of {large[-1]}"
            )
            fits = {min(dim, full): weight for dim, weight in slices}
            loss = replace(loss, matryoshka_dims=(*fits,), matryoshka_weights=(*fits.values(),))
        self.recipe = replace(self.recipe, sampling=sampling, loss=loss)

    def _restore(self, path: Path) -> None:
        """Continue from a checkpoint. Raises ValueError if it is not one of this run."""
        state, total = checkpoint.read_state(path), self.total_steps
        self.step, stored = state["step"], state.get("sources", {})
        for name, now in self.sources.items():
            if stored.get(name, now) != now:
                raise ValueError(
                    f"{path}: cannot resume: expected {name} to hold what it held when the run began, "
                    "found other content; restore it, or give another --output"
                )
        if self.step > total:
            raise ValueError(
                f"{path}: cannot resume: expected a step of at most {total}, the length of the run, "
                f"found {self.step}; delete the folder"
            )
        epoch, step = divmod(self.step, len(self.sampler))
        try:
            self.sampler.load_state_dict(state["sampler"] | {"epoch": epoch, "step": step})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        checkpoint.restore_optimizer(path, self.embedder.model, self.optimizer)
        self.prompts = state.get("prompts", self.prompts)

    def run(self, report: Callable[[LogLine], None], signals: Sequence[int] = ()) -> int:
        """Train to the end; return 0, or the number of the signal that stopped the run.

        Args:
            report: called with every log line, on rank 0.
            signals: numbers of the signals received so far. One on any process makes all processes
                save and return after the current step.

        Raises FloatingPointError if loss or gradient is not finite, before the weights change.
        """
        loop, is_main = self.recipe.training, distributed.rank() == 0
        checkpoints, log_path = self.output / "checkpoints", self.output / "log.jsonl"
        shown: list[Callable[[LogLine], None]] = []
        scores: list[float] = []  # of all validations so far, on rank 0
        if is_main:
            checkpoint.prune(checkpoints, loop.keep_checkpoints)
            # Without a checkpoint a run starts over, even if an earlier start has logged steps.
            scores += checkpoint.cut_log(log_path, self.step or -1)
            shown = [report]
            if loop.log_to:
                shown.append(open_tracker(loop.log_to, self.output, self.step))

        def check_folder() -> None:
            """Raise OSError if the folder, or the log in it, was removed or replaced."""
            here = log_path.stat() if log_path.exists() else None
            if is_main and not (here and os.path.samestat(here, os.fstat(log.fileno()))):
                raise OSError(f"{log_path}: expected the log of this run, found it removed")

        def write(line: LogLine) -> None:
            check_folder()
            log.write(json.dumps(line) + "\n")
            log.flush()
            for show in shown:
                show(line)

        def validated() -> float | None:
            """Validate on every process; return the score by which checkpoints are kept."""
            if self.validation is None:
                return None
            size, limit = self.recipe.sampling.batch_size, loop.validation_limit
            given = (self.validation, self.embedder, self.autocast, size, limit)
            found = validate(*given, together=self.sharded)
            write({"step": self.step, "validation": found})
            if is_main:
                scores.append(found["mrr"])
            return found["mrr"]

        def is_due(every: int) -> bool:
            return self.step % every == 0 or self.step == self.total_steps

        def reason_to_stop() -> int:
            """The number of a signal on any process, _EARLY without progress for long, or 0."""
            waited = len(scores) - 1 - scores.index(max(scores)) if scores else 0
            early = _EARLY if loop.patience and waited >= loop.patience else 0
            found = distributed.max_over_ranks(max([*signals, early]), self.embedder.device)
            return found if self.step < self.total_steps else 0

        with (log_path if is_main else Path(os.devnull)).open("a", encoding="utf-8") as log:
            if self.step == 0:
                validated()
            clock = time.perf_counter()
            stop = reason_to_stop()
            left = 0 if stop == _EARLY else self.total_steps - self.step
            for batch in prefetch(self._tokenize, islice(self._order(), left), _PREPARED):
                line = self._train_step(*batch)
                self.step += 1
                now = time.perf_counter()
                seconds, clock = now - clock, now
                speed = round(line["tokens"] / seconds)
                write(line | {"tokens_per_second": speed, "seconds": round(seconds, 4)})
                score = validated() if is_due(loop.validate_every) else None
                stop = reason_to_stop()
                if stop or is_due(loop.save_every):
                    if is_main:
                        os.fsync(log.fileno())  # no checkpoint may be ahead of the log on disk
                    epoch, step = divmod(self.step, len(self.sampler))
                    state = {
                        "step": self.step,
                        "sampler": self.sampler.state_dict() | {"epoch": epoch, "step": step},
                        "validation": score,
                        "sources": self.sources,
                        "prompts": self.prompts,
                    }
                    checkpoint.save(checkpoints, self.embedder, self.optimizer, state)
                    if is_main:
                        checkpoint.prune(checkpoints, loop.keep_checkpoints)
                if stop:
                    break
            if 0 < stop < _EARLY:
                return stop
            checkpoint.save_model(self.output / "final", self.embedder)
            check_folder()
        if is_main and self.step >= _CURVE:
            draw_curve(self.output)
        return 0

    def _order(self) -> Iterator[tuple[list[int], int]]:
        """(this process's examples, epoch) of every step from the next one on."""
        for epoch in range(self.step // len(self.sampler), self.recipe.training.epochs):
            self.sampler.set_epoch(epoch)
            yield from ((indices, epoch) for indices in self.sampler)

    def _tokenize(self, step: tuple[list[int], int]) -> tuple[list[int], str, TokenBatch]:
        """Draw the texts of a step: its examples, their task ("mixed" if several), token ids."""
        indices, epoch = step
        sampling = self.recipe.sampling
        draw = {"epoch": epoch, "seed": sampling.seed, "num_negatives": sampling.num_negatives}
        examples = [self.data.example(i, **draw) for i in indices]
        query, document = self.prompts
        options = {"template": self.embedder.instruction_template, **draw}
        text = collate(examples, query_prompt=query, document_prompt=document, **options)
        tokens = tokenize(text, self.embedder.tokenizer, max_length=self.embedder.max_length)
        tasks = {self.data.task_names[example.task] for example in examples}
        return indices, tasks.pop() if len(tasks) == 1 else "mixed", tokens

    def _train_step(self, indices: list[int], task: str, batch: TokenBatch) -> LogLine:
        """One update: gradient of the global batch, clipping, AdamW; return its log line."""
        config, device = self.recipe, self.embedder.device
        rate = learning_rate(config.optimizer, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        value, counts, finite = contrastive_step(
            batch,
            self._embed,
            config.loss,
            device=device,
            tokens_per_batch=config.training.tokens_per_batch,
            no_sync=lambda: parallel.no_sync(self.model),
            sharded=self.sharded,
        )
        parameters, max_norm = self.embedder.model.parameters(), config.optimizer.max_grad_norm
        norm = parallel.full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm)).item()
        # Means over processes, so that all processes decide alike.
        values = torch.tensor([value.item(), *counts.values()], dtype=torch.float64, device=device)
        loss, *means = distributed.mean(values).tolist()
        per_query = {name: mean / len(indices) for name, mean in zip(counts, means, strict=True)}
        line: LogLine = {
            "step": self.step + 1,
            "epoch": self.step // len(self.sampler),
            "loss": loss if math.isfinite(loss) else None,  # JSON has no infinity
            "lr": rate,
            "grad_norm": norm if math.isfinite(norm) else None,
            "task": task,
            "tokens": round(per_query.pop("tokens") * config.sampling.batch_size),
            **per_query,
        }
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
        else:
            # Examples with a vector that is not finite, or else the first ones.
            owners = np.append(np.arange(len(indices)), batch.text.document_owner)
            broken = np.unique(owners[~finite.cpu().numpy()])
            for positions in (broken, range(len(indices))):
                local = [self.data.location(indices[i]) for i in positions[:_NAMED]]
                if found := list(chain.from_iterable(distributed.gather_objects(local))):
                    break
            line["skipped"] = found[:_NAMED]
            if config.training.non_finite == "stop":
                raise FloatingPointError(
                    f"step {self.step + 1}: loss {loss} and gradient norm {norm} must be "
                    f"finite; the weights are untouched; look at {', '.join(line['skipped'])}"
                )
        if _malloc_trim is not None and device.type == "cpu" and self.step % _TRIM_EVERY == 0:
            _malloc_trim(0)
        return line

    def _embed(self, packed: Packed) -> Tensor:
        """(B, D) vectors with a graph."""
        # Autocast is entered once per chunk: a weight cast without a graph in the first pass of
        # gradient caching must not be reused by the second.
        with self.autocast():
            hidden = self.model(packed, causal=self.embedder.causal)  # (T, D)
        return pool(hidden, packed.cu_seqlens, self.embedder.pooling)
