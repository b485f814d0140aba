"""Train an embedding model: `torchrun --nproc-per-node 8 train.py configs/finetune.toml --output runs/ft`.

Works alone too: `python train.py ...` is one process. The same command continues a run that was
interrupted. Exit code 0 means that the model in `<output>/final` is finished.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from kalm_min.config import parse, to_toml
from kalm_min.console import Progress
from kalm_min.data import TrainingData
from kalm_min.model.lora import LoRAConfig
from kalm_min.training import distributed, run_folder
from kalm_min.training.source import ModelSource, open_model
from kalm_min.training.trainer import Recipe, Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What to train on."""

    path: Path
    """JSONL(.gz) file, or folder in which every file or sub-folder is a task."""
    validation: Path | None = None
    """Held-out pairs in the same format, measured during training."""
    instruction: str | None = None
    """Put before the queries of tasks and lines that have no instruction of their own."""
    cache_dir: Path | None = None
    """Where line indices are kept; none keeps them beside the data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Recipe):
    """A training run."""

    output: Path
    """Folder of the run: config.toml, log.jsonl, checkpoints/, final/, with LoRA also adapter/."""
    model: ModelSource
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig


def main(argv: list[str]) -> int:
    """Run; 0 when finished, 128 + signal when stopped, 2 for what the user can mend, 1 otherwise."""
    description = "Train an embedding model, alone or under torchrun."
    config = parse(TrainConfig, argv, program="train.py", description=description)
    environment = dict(os.environ)
    device = distributed.local_device(environment)
    distributed.start(environment, device)
    try:
        return _train(config, device)
    except (ValueError, FloatingPointError) as error:
        if environment.get("LOCAL_RANK", "0") == "0":
            _say(f"train.py: {error}")
        return 2 if isinstance(error, ValueError) else 1
    except RuntimeError as error:
        if not distributed.is_loss_of_peer(error):
            raise
        reason = str(error).splitlines()[0]
        _say(
            f"train.py: rank {distributed.rank()} lost another process of the group ({reason}); "
            "the same command goes on from the last checkpoint"
        )
        return 1
    finally:
        distributed.stop()


def _train(config: TrainConfig, device: Any) -> int:
    """Wire the parts and run them."""
    main_process = distributed.rank() == 0
    text = to_toml(config)
    resume = run_folder.claim(config.output, text)
    if len({*distributed.gather_objects(resume)}) > 1:  # nobody writes before everybody has looked
        raise ValueError(
            f"{config.output}: expected one folder that all processes share, found other "
            "checkpoints on some of them"
        )
    data, validation = distributed.rank_zero_first(partial(_open_data, config.data))
    model = open_model(config.model, resume, device, config.lora)
    trainer = Trainer(model, data, validation, config.output, config, resume)
    if main_process:
        run_folder.describe(config.output, text, device)
        _say(
            f"{len(data):,} examples in {len(data.task_names)} tasks, {trainer.total_steps:,} steps "
            f"of {config.sampling.batch_size} queries on {distributed.world_size()} process(es), "
            f"{device.type}" + (f", going on from step {trainer.step}" if resume else "")
        )
    with (
        _stop_on_signals(trainer) as caught,
        Progress(
            trainer.total_steps, "steps", sys.stderr, title="train", done=trainer.step
        ) as progress,
    ):
        finished = trainer.run(_reporter(progress))
    if not main_process:
        pass
    elif finished:
        _say(f"finished: {config.output / 'final'}")
    else:
        _say(f"stopped after step {trainer.step}; the same command goes on from there")
    return 0 if finished else 128 + (caught[0] if caught else signal.SIGTERM)


def _open_data(config: DataConfig) -> tuple[TrainingData, TrainingData | None]:
    """Open and check the data."""
    data, validation = (
        path
        and TrainingData.open(
            path,
            instruction=config.instruction,
            cache_dir=config.cache_dir,
            progress=sys.stderr,
        )
        for path in (config.path, config.validation)
    )
    assert data is not None
    return data, validation


@contextmanager
def _stop_on_signals(trainer: Trainer) -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C save a checkpoint after the current step; a second one ends at once."""
    caught: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        caught.append(number)
        trainer.stop = True
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:  # a handler left behind would keep the model, and with it the group's threads
        for number, handler in before.items():
            signal.signal(number, handler)


def _reporter(progress: Progress) -> Callable[[dict[str, Any]], None]:
    """Shows log lines as they come."""

    def report(line: dict[str, Any]) -> None:
        if "validation" in line:
            numbers = line["validation"]
            _say(
                f"step {line['step']}: accuracy@1 {numbers['accuracy']:.3f}, MRR {numbers['mrr']:.3f}; "
                f"in batch {numbers['in_batch_accuracy']:.3f}, {numbers['in_batch_mrr']:.3f}"
            )
        elif "skipped" in line:
            progress.update(1)
            _say(f"step {line['step']} skipped, not finite: {', '.join(line['skipped'])}")
        else:
            speed = f"{line['tokens_per_second']:,} tokens/s"
            progress.update(1, f"loss {line['loss']:.4f}, lr {line['lr']:.2e}, {speed}")

    return report


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    distributed.hard_exit(main(sys.argv[1:]))
