"""The model from which a run starts, and the folder that records the run and resumes it.

    <output>/config.toml, environment.json, log.jsonl    the settings, the machine, every step
    <output>/checkpoints/step_00001000/ and so on        complete ones only
    <output>/final/, with LoRA also adapter/             the finished model

A folder belongs to one configuration. There is no random state to save: order, draws and learning
rate are pure functions of the seed, the epoch and the step. Nothing is pickled.
"""

import json
import platform
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

from kalm_min.embedder import Embedder
from kalm_min.files import (
    atomic_directory,
    differences,
    flatten,
    read_json,
    read_toml,
    write_json,
    write_text,
)
from kalm_min.model import ModelConfig, Qwen2, initialise
from kalm_min.model.lora import ADAPTER_CONFIG, Adapter, add_adapter, load_adapter
from kalm_min.options import LoRAConfig, ModelSource
from kalm_min.tokenizer import Tokenizer
from kalm_min.training import distributed, parallel

_STATE, _OPTIMIZER = "state.json", "optimizer.safetensors"

# Shards are joined one tensor at a time, on the CPU of rank 0; other ranks get nothing.
_ALL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_TRAINABLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def open_model(
    source: ModelSource, resume: Path | None, device: torch.device, lora: LoRAConfig | None = None
) -> Embedder:
    """The embedder with which a run starts or resumes, in float32 on `device`.

    With LoRA it is the checkpoint of `source`, frozen, with the adapter of `resume` or a fresh one
    (an update of zero). Raises ValueError for what cannot be trained or opened.
    """
    lora = lora if lora is not None and lora.rank else None
    if resume is not None and lora is None:
        return Embedder.from_pretrained(resume, device, torch.float32)
    if source.path is not None:
        embedder = Embedder.from_pretrained(
            source.path, device, torch.float32, source.causal, source.pooling, source.max_length
        )
    elif lora is not None:
        raise ValueError(
            "--lora.rank: expected --model.path, a checkpoint to adapt; a fresh model has none"
        )
    else:
        assert source.tokenizer is not None
        tokenizer = Tokenizer.from_folder(source.tokenizer)
        config = ModelConfig(
            vocab_size=-(-tokenizer.vocab_size // 64) * 64,  # odd numbers of rows are slow on a GPU
            max_position_embeddings=max(512, source.max_length),
            # The sizes, which have the same names in both classes.
            **{k: v for k, v in asdict(source).items() if k in ModelConfig.__dataclass_fields__},
        )
        model = Qwen2(config)
        initialise(model, source.init_seed)
        embedder = Embedder(
            model.to(device),
            tokenizer,
            causal=bool(source.causal),
            pooling=source.pooling or "mean",
            max_length=source.max_length,
        )
    if source.instruction_template is not None:
        embedder.instruction_template = source.instruction_template
    if lora is not None and source.path is not None:
        folder = Path(source.path).expanduser()
        if (folder / ADAPTER_CONFIG).is_file():
            raise ValueError(
                f"{folder}: an adapter cannot be the base of another; save it merged first, "
                "with Embedder.from_pretrained(...).save_pretrained(...)"
            )
        embedder.adapter = Adapter(lora, str(folder.resolve()) if folder.is_dir() else source.path)
        if resume is None:
            add_adapter(embedder.model, lora, source.init_seed)
        else:
            load_adapter(embedder.model, resume)
    return embedder


def save(
    root: Path, embedder: Embedder, optimizer: torch.optim.Optimizer, state: Mapping[str, object]
) -> None:
    """Write the checkpoint of `state["step"]` below `root`; every process calls it, rank 0 writes.

    A folder that `Embedder.from_pretrained` opens (a model, or with LoRA an adapter, whose base stays
    where it is), plus `optimizer.safetensors` ("step/", "exp_avg/" and "exp_avg_sq/" before each
    parameter's name) and `state.json`: "step", "sampler" (position and fingerprint), "validation"
    (the score at this step, or null). It appears in one rename.
    """
    weights = cast("dict[str, Tensor]", get_model_state_dict(embedder.model, options=_TRAINABLE))
    moments: dict[str, Tensor] = {}
    if optimizer.state:  # else every step was skipped, and torch would take one to make a state
        full = get_optimizer_state_dict(embedder.model, optimizer, options=_TRAINABLE)
        for name, values in cast("dict[str, dict[str, Tensor]]", full.get("state", {})).items():
            moments |= {f"{kind}/{name}": value for kind, value in values.items()}
    if distributed.rank() == 0:
        with atomic_directory(root / f"step_{state['step']:08d}") as folder:
            embedder.write_files(folder, weights, merged=False)
            save_file(moments, folder / _OPTIMIZER)
            write_json(folder / _STATE, state)
    distributed.barrier()


def save_model(path: Path, embedder: Embedder) -> None:
    """Write a finished model; every process calls it, rank 0 writes.

    With LoRA the model is merged, and the adapter alone is first written to `adapter/` beside it,
    since a model at `path` marks the end of the run.
    """
    weights = cast("dict[str, Tensor]", get_model_state_dict(embedder.model, options=_ALL))
    if distributed.rank() == 0:
        if embedder.adapter:
            with atomic_directory(path.with_name("adapter")) as folder:
                embedder.write_files(folder, weights, merged=False)
        with atomic_directory(path) as folder:
            embedder.write_files(folder, weights)
    distributed.barrier()


def restore_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer the moments of the checkpoint, bit for bit.

    This takes one tensor at a time: torch's `set_optimizer_state_dict` needs all of them in the
    memory of every process. Raises ValueError if the checkpoint has other parameters.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with safe_open(path / _OPTIMIZER, framework="pt") as reader:
        stored = {key.partition("/")[2] for key in reader.keys()}  # noqa: SIM118 -- not a dict
        if stored and stored != trainable.keys():
            different = ", ".join(sorted(stored ^ trainable.keys())[:5])
            raise ValueError(f"{path / _OPTIMIZER}: of another model, differing in {different}")
        # In the same order on every process, since laying out shards is collective.
        for name, parameter in trainable.items() if stored else ():
            optimizer.state[parameter] = {
                kind: parallel.shard_like(reader.get_tensor(f"{kind}/{name}").clone(), parameter)
                for kind in ("step", "exp_avg", "exp_avg_sq")
            }


def read_state(path: Path) -> dict[str, Any]:
    """The `state` with which the checkpoint `path` was saved."""
    return read_json(path / _STATE)


def newest(root: Path) -> Path | None:
    """The checkpoint of the highest step, if any. Unfinished ones have other names."""
    return max(root.glob("step_*"), default=None)


def best(root: Path) -> Path | None:
    """The checkpoint with the highest validation score, the first of equals; None without any."""
    states = ((path, read_state(path).get("validation")) for path in sorted(root.glob("step_*")))
    scores = {path: score for path, score in states if score is not None}
    return max(scores, key=scores.__getitem__, default=None)


def prune(root: Path, keep: int) -> None:
    """Delete all but the best and `keep` newest checkpoints, and remains of interrupted writes."""
    for unfinished in root.glob(".step_*.tmp"):
        shutil.rmtree(unfinished)
    kept = [best(root), *sorted(root.glob("step_*"))[-keep:]]
    for old in set(root.glob("step_*")).difference(kept):
        # Renamed first, so that a kill in the middle leaves no folder that looks complete.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.tmp")))


def claim(output: Path, config_toml: str) -> Path | None:
    """Check that `output` is free or of this configuration; return the newest checkpoint.

    Raises ValueError naming the settings that differ.
    """
    path, checkpoint = output / "config.toml", newest(output / "checkpoints")
    # If nothing has been trained, there is nothing to protect.
    if checkpoint is not None and path.is_file():
        old, new = (
            {f"--{name.replace('_', '-')}": value for name, value in flatten(table)}
            for table in (read_toml(path), tomllib.loads(config_toml))
        )
        if changed := differences(old, new):
            raise ValueError(
                f"{output} holds a run with other settings ({changed}); "
                "give another --output, or delete the folder"
            )
    return checkpoint


def write_description(output: Path, config_toml: str, device: torch.device) -> None:
    """Write config.toml and environment.json; called on one process."""
    write_text(output / "config.toml", config_toml)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    environment = {
        "python": platform.python_version(),
        **{
            name: metadata.version(name) for name in ("torch", "safetensors", "tokenizers", "numpy")
        },
        "platform": platform.platform(),
        "device": f"{device.type} {name}".strip(),
        "world_size": distributed.world_size(),
        "threads": torch.get_num_threads(),  # sums depend on it, and with them the last bits
    }
    write_json(output / "environment.json", environment)


def cut_log(path: Path, last_step: int) -> None:
    """Drop what was logged after the step to resume from, and a last line that a kill tore."""
    if not path.is_file():
        return
    kept = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            kept += f"{line}\n" if json.loads(line)["step"] <= last_step else ""
        except json.JSONDecodeError:
            break
    write_text(path, kept)
