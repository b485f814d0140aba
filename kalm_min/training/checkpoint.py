"""Checkpoints that are complete or do not exist, and hold everything a run needs to go on.

`<output>/checkpoints/step_00001000/` is a folder that `Embedder.from_pretrained` opens (a model, or
with LoRA an adapter, whose frozen base stays where it is), plus `optimizer.safetensors` (moments and
step count by parameter name) and `state.json` (where the run is). It appears in one rename. There is
no random state to save: order, draws and learning rate are pure functions of the seed, the epoch and
the step. Nothing is pickled.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from kalm_min.embedder import Embedder
from kalm_min.files import atomic_directory, read_json, write_json
from kalm_min.training import distributed, parallel

_STATE, _OPTIMIZER = "state.json", "optimizer.safetensors"


def save(
    root: Path, embedder: Embedder, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write the checkpoint of `state["step"]` below `root`; every process calls it, rank 0 writes."""
    named = embedder.model.named_parameters()
    weights = _collect((name, parameter) for name, parameter in named if parameter.requires_grad)
    moments = _collect(_moments(embedder.model, optimizer))
    if distributed.rank() == 0:
        with atomic_directory(root / f"step_{state['step']:08d}") as folder:
            embedder.write_files(folder, weights, merged=False)
            save_file(moments, folder / _OPTIMIZER)
            write_json(folder / _STATE, state)
    distributed.barrier()


def save_model(path: Path, embedder: Embedder) -> None:
    """Write a finished model; every process calls it, rank 0 writes.

    With LoRA it is merged, and the adapter by itself goes into `adapter/` beside it, before it: a
    model that is there is the end of the run.
    """
    weights = _collect(embedder.model.state_dict().items())
    if distributed.rank() == 0:
        if embedder.adapter:
            with atomic_directory(path.with_name("adapter")) as folder:
                embedder.write_files(folder, weights, merged=False)
        with atomic_directory(path) as folder:
            embedder.write_files(folder, weights)
    distributed.barrier()


def _collect(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors put together from their shards, one at a time, and kept on rank 0's CPU."""
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        full = parallel.full_tensor(tensor.detach())
        if distributed.rank() == 0:
            kept[name] = full.cpu().contiguous()
    return kept


def newest(root: Path) -> Path | None:
    """The checkpoint of the highest step, if any. Unfinished ones have other names."""
    return max(root.glob("step_*"), default=None)


def read_state(path: Path) -> dict[str, Any]:
    """Where the run was."""
    return read_json(path / _STATE)


def restore_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer the moments of the checkpoint, bit for bit.

    Raises ValueError where the checkpoint is of other parameters.
    """
    with safe_open(path / _OPTIMIZER, framework="pt") as reader:
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        stored = {key.partition("/")[2] for key in reader.keys()}  # noqa: SIM118 -- not a dict
        if stored - names or (stored and names - stored):
            odd = ", ".join(sorted(stored ^ names)[:5])
            raise ValueError(f"{path / _OPTIMIZER}: of another model, differing in {odd}")
        for name, parameter in model.named_parameters():
            if name in stored:
                optimizer.state[parameter] = {
                    kind: parallel.shard_like(
                        reader.get_tensor(f"{kind}/{name}").clone(), parameter
                    )
                    for kind in ("step", "exp_avg", "exp_avg_sq")
                }


def _moments(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, torch.Tensor]]:
    """("exp_avg/<parameter name>", tensor), and so on."""
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            yield f"{kind}/{name}", value


def best(root: Path) -> Path | None:
    """The checkpoint with the highest validation score, the first of equals; None without scores."""
    scores = {path: read_state(path).get("validation") for path in sorted(root.glob("step_*"))}
    scored = {path: score for path, score in scores.items() if score is not None}
    return max(scored, key=scored.__getitem__, default=None)


def prune(root: Path, keep: int) -> None:
    """Delete all checkpoints but the best and the `keep` newest, and what interrupted writes left."""
    for left in root.glob(".step_*.tmp"):
        shutil.rmtree(left)
    kept = [best(root), *sorted(root.glob("step_*"))[-keep:]]
    for old in set(root.glob("step_*")).difference(kept):
        # Renamed first, so that a kill in the middle leaves no folder that looks complete.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.tmp")))
