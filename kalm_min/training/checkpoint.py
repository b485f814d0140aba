"""The model from which a run starts, and the folder that records the run and resumes it.

    <output>/config.toml, environment.json, log.jsonl    the settings, the machine, every step
    <output>/checkpoints/step_00001000/ and so on        complete ones only
    <output>/final/, with LoRA also adapter/             the finished model

A folder belongs to one configuration. There is no random state to save: order, draws and learning
rate are pure functions of the seed, the epoch and the step. Nothing is pickled.
"""

import json
import platform
import re
import shutil
import tomllib
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict

from kalm_min import files
from kalm_min.embedder import Embedder
from kalm_min.files import Object, atomic_directory, write_json, write_text
from kalm_min.model import ModelConfig, Qwen2, initialise
from kalm_min.model.lora import ADAPTER_CONFIG, Adapter, add_adapter, load_adapter
from kalm_min.options import LoRAConfig, ModelSource
from kalm_min.schema import Field, is_number, is_string, is_whole, read_object
from kalm_min.settings import open_folder
from kalm_min.tokenizer import Tokenizer
from kalm_min.training import distributed, parallel

_STATE, _OPTIMIZER = "state.json", "optimizer.safetensors"
_TABLE = partial(Field, "an object", lambda value: isinstance(value, dict))
_FIELDS = {
    "step": Field("a whole number above 0", partial(is_whole, least=1), required=True),
    "sampler": _TABLE(required=True),  # its fingerprint; the position follows from the step
    "validation": Field("a number", is_number),  # the score at this step, if there is one
    "sources": _TABLE(),  # digests of what the run was started with: see Trainer
    "prompts": Field("two texts", is_string, items=2),  # of queries and of documents: see Trainer
    "files": _TABLE(),  # the name and `_head` of every other file
}

# Shards are joined one tensor at a time, on the CPU of rank 0; other ranks get nothing.
_ALL = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
_TRAINABLE = replace(_ALL, ignore_frozen_params=True)


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
        pooling, length = source.pooling or "mean", source.max_length
        model, causal = model.to(device), bool(source.causal)
        embedder = Embedder(model, tokenizer, causal=causal, pooling=pooling, max_length=length)
    if source.instruction_template is not None:
        embedder.instruction_template = source.instruction_template
    if source.query_prompt is not None:
        embedder.prompts["query"] = source.query_prompt
    if lora and source.path:
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


def change_of_attention(source: ModelSource) -> str | None:
    """A sentence, if the model is trained with another attention than its checkpoint states."""
    if source.path is not None and source.causal is not None:
        with suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # opening the model warns
            if open_folder(source.path).settings.causal != source.causal:
                was, now = ("bidirectional", "causal")[:: 1 if source.causal else -1]
                return f"{source.path} has {was} attention; it is trained with {now} attention"
    return None


def save(
    root: Path, embedder: Embedder, optimizer: torch.optim.Optimizer, state: Mapping[str, object]
) -> None:
    """Write the checkpoint of `state["step"]` below `root`; every process calls it, rank 0 writes.

    A folder that `Embedder.from_pretrained` opens (a model, or with LoRA an adapter, whose base stays
    where it is), plus `optimizer.safetensors` ("step/", "exp_avg/" and "exp_avg_sq/" before each
    parameter's name) and `state.json`: `state` and what `whole` needs. It appears in one rename.
    """
    weights = cast(
        "dict[str, Tensor]", state_dict.get_model_state_dict(embedder.model, options=_TRAINABLE)
    )
    moments: dict[str, Tensor] = {}
    if optimizer.state:  # else every step was skipped, and torch would take one to make a state
        full = state_dict.get_optimizer_state_dict(embedder.model, optimizer, options=_TRAINABLE)
        for name, values in cast("dict[str, dict[str, Tensor]]", full.get("state", {})).items():
            moments |= {f"{kind}/{name}": value for kind, value in values.items()}
    if distributed.rank() == 0:
        if (path := root / f"step_{state['step']:08d}").exists():  # a damaged one
            _remove(path)
        with atomic_directory(path) as folder:
            embedder.write_files(folder, weights, merged=False)
            save_file(moments, folder / _OPTIMIZER)
            written = sorted(file for file in folder.rglob("*") if file.is_file())
            heads = {file.relative_to(folder).as_posix(): _head(file) for file in written}
            write_json(folder / _STATE, {**state, "files": heads})
    distributed.barrier()


def _head(path: Path) -> str:
    """A digest of a file's size and first MiB: all of a small one, the header of a large one."""
    with path.open("rb") as file:
        return files.digest(str(path.stat().st_size), file.read(1 << 20))


def save_model(path: Path, embedder: Embedder) -> None:
    """Write a finished model; every process calls it, rank 0 writes.

    With LoRA the model is merged, and the adapter alone is first written to `adapter/` beside it,
    since a model at `path` marks the end of the run.
    """
    weights = cast(
        "dict[str, Tensor]", state_dict.get_model_state_dict(embedder.model, options=_ALL)
    )
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


def read_state(path: Path) -> Object:
    """The `state` with which the checkpoint `path` was saved. Raises ValueError if it is damaged."""
    state = read_object(path / _STATE, _FIELDS)
    if path.name != f"step_{state['step']:08d}":
        raise ValueError(f"{path / _STATE}: expected the step of its folder, found {state['step']}")
    for name, head in state.get("files", {}).items():
        if not (path / name).is_file() or _head(path / name) != head:
            raise ValueError(f"{path / name}: expected the file that was saved, found another")
    return state


def whole(root: Path) -> tuple[dict[Path, Object], dict[Path, str]]:
    """The states of the whole checkpoints by folder, first to last, and what is wrong with others."""
    states: dict[Path, Object] = {}
    damaged: dict[Path, str] = {}
    for path in sorted(root.glob("step_*"), key=lambda path: (len(path.name), path)):
        if re.fullmatch(r"step_\d{8,}", path.name):
            try:
                states[path] = read_state(path)
            except (ValueError, OSError) as error:
                damaged[path] = str(error)
    return states, damaged


def best(states: Mapping[Path, Object]) -> Path | None:
    """The checkpoint with the highest validation score, the first of equals; None without any."""
    scores = {path: state["validation"] for path, state in states.items() if "validation" in state}
    return max(scores, key=scores.__getitem__, default=None)


def prune(root: Path, keep: int) -> None:
    """Delete all but the best and `keep` newest checkpoints, and remains of interrupted writes."""
    for unfinished in [*root.glob(".*.tmp"), *root.parent.glob(".*.tmp")]:
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
    states, _ = whole(root)
    for old in set(states).difference([best(states), *list(states)[-keep:]]):
        _remove(old)


def _remove(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that a kill leaves no folder that looks whole."""
    shutil.rmtree(path.rename(path.with_name(f".{path.name}.tmp")))


def claim(output: Path, config_toml: str) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of the run, and a sentence about each damaged one.

    Raises ValueError naming the settings that differ, or if all checkpoints are damaged.
    """
    states, damaged = whole(output / "checkpoints")
    if states:  # if nothing has been trained, there is nothing to protect
        old, new = (
            {f"--{name.replace('_', '-')}": value for name, value in files.flatten(table)}
            for table in (files.read_toml(output / "config.toml"), tomllib.loads(config_toml))
        )
        if changed := files.differences(old, new):
            raise ValueError(
                f"{output} holds a run with other settings ({changed}); "
                "give another --output, or delete the folder"
            )
    if damaged and not states:
        found = f"found none ({[*damaged.values()][-1]}); delete the folder to start over"
        raise ValueError(f"{output / 'checkpoints'}: expected a whole checkpoint, {found}")
    remarks = [f"{error}; delete the folder {path}" for path, error in damaged.items()]
    return next(reversed(states), None), remarks


def write_description(output: Path, config_toml: str, device: torch.device) -> None:
    """Write config.toml and environment.json; called on one process."""
    write_text(output / "config.toml", config_toml)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    packages = ("torch", "safetensors", "tokenizers", "numpy")
    environment: Object = {package: metadata.version(package) for package in packages}
    environment |= {"python": platform.python_version(), "platform": platform.platform()}
    environment |= {"device": f"{device.type} {name}".strip()}
    environment |= {"world_size": distributed.world_size(), "threads": torch.get_num_threads()}
    write_json(output / "environment.json", environment)  # sums depend on threads, in the last bits


def cut_log(path: Path, last_step: int) -> list[float]:
    """Drop what was logged after the step to resume from, and from a line that a kill tore on.

    Returns the MRR of the validations that are left.
    """
    kept, scores = "", list[float]()
    if path.is_file():
        with suppress(ValueError, TypeError, KeyError):
            for _, line in files.read_jsonl(path):
                if line["step"] <= last_step:
                    scores += [float(line["validation"]["mrr"])] if "validation" in line else []
                    kept += f"{json.dumps(line)}\n"
        write_text(path, kept)
    return scores
