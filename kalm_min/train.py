"""Train an embedding model: `torchrun --nproc-per-node 8 train.py configs/finetune.toml --output runs/ft`.

`python train.py ...` or `kalm-min train ...` runs as a single process. The same command continues an interrupted run. The
exit code is 0 if the model in `<output>/final` is finished, 128 + signal if the run was stopped, 2
if the request is wrong, and 1 otherwise.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kalm_min import program
from kalm_min.config import check_output, run, to_toml
from kalm_min.console import Progress, count, printable
from kalm_min.options import DataConfig, TrainConfig

if TYPE_CHECKING:
    from types import FrameType

    import torch

    from kalm_min.data import TrainingData
    from kalm_min.training.tracking import LogLine

_NEGATIVES = ("hard", "in_batch", "cross_device", "query_query", "document_document", "mixed")


def say(text: str) -> None:
    """Write a line for a person."""
    print(printable(text), file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Run and return the exit code."""
    loads = "kalm_min.training.trainer"
    return run(TrainConfig, start, argv, program="train.py", loads=loads, resumable=True)


def start(config: TrainConfig) -> int:
    """Train in the process group of the environment; return the exit code."""
    from kalm_min.training import distributed

    marks = ("config.toml", "log.jsonl", "checkpoints")
    check_output(config.output, config.model.path, config.data.path, marks=marks)
    device = distributed.local_device(os.environ)
    distributed.start(os.environ, device)
    try:
        with distributed.locked(config.output):
            return train(config, device)
    except FloatingPointError as error:  # the same on all processes
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say(f"train.py: {error}")
    except RuntimeError as error:
        if not distributed.is_loss_of_peer(error):
            raise
        say(
            f"train.py: rank {distributed.rank()} lost another process of the group "
            f"({str(error).splitlines()[0]}); the same command continues from the last checkpoint"
        )
    finally:
        distributed.stop()
    return 1


def open_data(config: DataConfig) -> tuple[TrainingData, TrainingData | None]:
    """Index and check the training and the validation data."""
    from kalm_min.data import TrainingData

    options = {"instruction": config.instruction, "cache_dir": config.cache_dir}
    opened = partial(TrainingData, **options, progress=sys.stderr)
    return opened(config.path), opened(config.validation) if config.validation else None


def train(config: TrainConfig, device: torch.device) -> int:
    """Start or resume the run; return the exit code."""
    from kalm_min.training import checkpoint, distributed
    from kalm_min.training.trainer import Trainer
    from kalm_min.training.validation import describe

    is_main, text, output = distributed.rank() == 0, to_toml(config), config.output
    if (tracker := config.training.log_to) and not find_spec(tracker):
        raise ValueError(
            f"--training.log-to: expected the package {tracker}, found none; pip install {tracker}"
        )
    resume, damaged = checkpoint.claim(output, text)
    if len({*distributed.gather_objects(resume)}) > 1:  # no process writes before all have looked
        expected = f"{output}: expected one folder that all processes share"
        raise ValueError(f"{expected}, found other checkpoints on some of them")
    data, validation = distributed.rank_zero_first(partial(open_data, config.data))
    model = checkpoint.open_model(config.model, resume, device, config.lora)
    prompt = config.model.query_prompt
    trainer = Trainer(model, data, validation, output, config, resume, prompt)
    if is_main:
        checkpoint.write_description(output, text, device)
        attention = None if resume else checkpoint.change_of_attention(config.model)
        for remark in filter(None, (*damaged, attention, *trainer.remarks)):
            say(remark)
        say(
            f"{count(len(data), 'example')} in {count(len(data.task_names), 'task')}, "
            f"{count(trainer.total_steps, 'step')} of {trainer.recipe.sampling.batch_size} queries "
            f"on {count(distributed.world_size(), 'process')}, {device.type}"
            + (f", resuming from step {trainer.step}" if resume else "")
        )
    signals: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    told, total = set[str](), trainer.total_steps
    with Progress(total, "steps", sys.stderr, title="train", done=trainer.step) as progress:
        stopped = trainer.run(lambda line: show(progress, line, told), signals)
    if is_main and stopped:
        say(f"stopped after step {trainer.step}; the same command continues from there")
    elif is_main:
        if trainer.step < total:
            waited = f"no better MRR in {config.training.patience} validations"
            say(f"stopped early, after step {trainer.step}: {waited}")
        say(f"finished: {output / 'final'}; {describe(model.prompts)}")
    return 128 + stopped if stopped else 0


def show(progress: Progress, line: LogLine, told: set[str]) -> None:
    """Show a line of the log; `told` are the tasks about which was warned."""
    if scores := line.get("validation"):
        progress.line(
            f"step {line['step']}: accuracy@1 {scores['accuracy']:.3f}, MRR {scores['mrr']:.3f}; "
            f"in batch {scores['in_batch_accuracy']:.3f}, {scores['in_batch_mrr']:.3f}"
        )
    elif skipped := line.get("skipped"):
        progress.update(1)
        progress.line(f"step {line['step']} skipped, not finite: {', '.join(skipped)}")
    else:
        speed = f"{line['tokens_per_second']:,} tokens/s"
        progress.update(1, f"loss {line['loss']:.4f}, {speed}")
        if not any(line[kind] for kind in _NEGATIVES) and line["task"] not in told:
            told.add(line["task"])
            progress.line(
                f"step {line['step']}: no query of task {line['task']} has a negative, so nothing is "
                'learned; give its lines "neg", or set in_batch_negatives = true'
            )


if __name__ == "__main__":
    program.start("train")
