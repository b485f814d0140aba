"""Reading and writing a model folder.

    config.json                     the decoder's sizes: load_config
    model.safetensors, or shards    its weights, every tensor accounted for: load_model

What this package does not compute is refused, since a wrong guess would raise no error later and
only lower scores. Remote code is never run, and pickled weights are never opened.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kalm_min.files import Object, write_json
from kalm_min.model.qwen2 import ModelConfig, Qwen2
from kalm_min.schema import Field, read_object
from kalm_min.settings import DENSE, FIELDS, IDENTITY, SIZES, is_name, read_config

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARDS = {
    "weight_map": Field(
        "an object of plain file names",
        lambda value: isinstance(value, dict) and all(map(is_name, value.values())),
        required=True,
    )
}
# What PEFT, torch.compile, DDP and language models put before names.
_PREFIXES = re.compile(r"^(base_model\.model\.|_orig_mod\.|module\.|model\.)+")
# Tensors without a part in a vector: output heads, and tables of rotary embeddings.
_LEFT_OVER = re.compile(r"(lm_head|score)\.weight|.*rotary_emb\.inv_freq")


def load_config(folder: Path) -> ModelConfig:
    """Read `config.json`. Raises ValueError if it is missing, damaged or not supported."""
    stated = read_config(folder)
    values: Object = {  # transformers' defaults for keys that the file omits
        "num_key_value_heads": stated["num_attention_heads"],
        "rope_theta": 10_000.0,
        "head_dim": 128 if stated["model_type"] == "qwen3" else 0,
        "tie_word_embeddings": False,
    }
    values |= {f.name: stated[f.name] for f in fields(ModelConfig) if f.name in stated}
    values["dense"] = None
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    dense: Path | None = None,
) -> Qwen2:
    """Build the decoder of a folder and fill it from its safetensors files.

    `dtype` None leaves each parameter as it is stored. A tensor already in that dtype stays a
    private view of the mapped file, without a copy: do not rewrite a weights file in place while
    its model is in use (this package renames a finished file over the old one, which is safe).
    `dense` is the folder of a Dense module.
    Raises ValueError, one sentence, for anything that is wrong with config.json or the weights.
    """
    config, files = load_config(folder), [_SINGLE]
    if not (folder / _SINGLE).is_file():
        if not (folder / _INDEX).is_file():
            pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
            hint = "; pickled weights are never opened, convert them to safetensors" * pickled
            raise ValueError(f"{folder}: expected {_SINGLE} or {_INDEX}, found neither{hint}")
        files = sorted({*read_object(folder / _INDEX, _SHARDS, extra=True)["weight_map"].values()})
    tensors = _read_tensors(folder, files)
    if dense is not None:
        stated = read_object(dense / "config.json", FIELDS["Dense"], extra=True)
        config = replace(config, dense=(stated["out_features"], stated.get("bias", True)))
        linear = _read_tensors(dense, [_SINGLE])
        tensors |= {f"dense.{name.removeprefix('linear.')}": x for name, x in linear.items()}
    # A size that no tensor has would be refused below, but only after it has been built.
    longest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    for name in (*SIZES, "num_key_value_heads", "head_dim"):
        most = len(tensors) if name == "num_hidden_layers" else longest
        if (size := getattr(config, name)) > most:
            where = f"{folder / 'config.json'}: {name}"
            raise ValueError(f"{where}: {size} is more than the weights hold")
    with torch.device("meta"):
        model = Qwen2(config)
    if config.tie_word_embeddings and "lm_head.weight" in tensors:  # one of the two may be kept
        tensors.setdefault("embed_tokens.weight", tensors["lm_head.weight"])
    tensors = check_tensors(folder, tensors, model.state_dict())
    state = {name: x.to(device=device, dtype=dtype) for name, x in tensors.items()}
    model.load_state_dict(state, assign=True)
    return model


def load_tensors(
    folder: Path, files: Iterable[str], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a folder's safetensors files, as private views of the mapped files.

    `wanted` is a state dict, for its names and shapes. Stored names may also begin with `model.`
    (language models), `base_model.model.` (PEFT), `module.` (DDP) or `_orig_mod.` (torch.compile).
    Raises ValueError, one sentence that lists every missing, unexpected or wrong-shaped tensor, or
    every file that cannot be read.
    """
    return check_tensors(folder, _read_tensors(folder, files), wanted)


def _read_tensors(folder: Path, files: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of some files, without the prefixes that others put before their names."""
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for file in files:
        try:
            stored = load_file(folder / file)
        except FileNotFoundError:
            problems.append(f"expected {file}, found none")
        except (SafetensorError, OSError) as error:
            problems.append(f"{file} is truncated or not safetensors ({error})")
        else:
            for key, tensor in stored.items():
                name = _PREFIXES.sub("", key)
                problems += [f"{name} is stored twice"] if name in found else []
                found[name] = tensor
    if problems:
        raise ValueError(f"{folder}: {'; '.join(problems)}")
    return found


def check_tensors(
    folder: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Those of `found` that are wanted; ValueError if any is missing, unexpected or misshapen."""
    extra = {name for name in found.keys() - wanted.keys() if not _LEFT_OVER.fullmatch(name)}
    listed = {"missing": wanted.keys() - found.keys(), "unexpected": extra}
    problems = [f"{kind} tensors: {', '.join(sorted(s))}" for kind, s in listed.items() if s]
    for name in sorted(wanted.keys() & found.keys()):
        expected, shape = tuple(wanted[name].shape), tuple(found[name].shape)
        if shape != expected:
            problems.append(f"{name}: expected shape {expected}, found {shape}")
        if not found[name].is_floating_point() or found[name].itemsize == 1:
            problems.append(f"{name}: expected a float tensor, found {found[name].dtype}")
    if problems:
        raise ValueError(f"{folder}: {'; '.join(problems)}")
    return {name: found[name] for name in wanted}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file (not atomic; the caller's folder is)."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(state, path, metadata={"format": "pt"})


def save_model(
    model: Qwen2, folder: Path, *, causal: bool, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write `config.json` and `model.safetensors` (not atomic; the caller's folder is).

    `state` holds the weights, by name, if the model's are distributed over processes.
    """
    state = dict(model.state_dict() if state is None else state)
    config = {key: value for key, value in asdict(model.config).items() if value is not None}
    if sizes := config.pop("dense", None):
        names = [name for name in state if name.startswith("dense")]
        linear = {name.replace("dense", "linear"): state.pop(name) for name in names}
        (folder / DENSE).mkdir(exist_ok=True)
        save_tensors(linear, folder / DENSE / _SINGLE)
        stated = {"in_features": model.config.hidden_size, "out_features": sizes[0]}
        stated |= {"bias": sizes[1], "activation_function": IDENTITY}
        write_json(folder / DENSE / "config.json", stated)
    config |= {
        "architectures": [f"{model.config.model_type.capitalize()}Model"],
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "use_cache": False,
        "is_causal": causal,
        "torch_dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
    }
    if not causal:  # the only key that text-embeddings-inference reads of a Qwen3
        config["use_bidirectional_attention"] = True
    write_json(folder / "config.json", config)
    save_tensors(state, folder / _SINGLE)
