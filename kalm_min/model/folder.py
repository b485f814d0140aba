"""Reading and writing a model folder.

    config.json                     the decoder's sizes: load_config
    model.safetensors, or shards    its weights, every tensor accounted for: load_model

What this package does not compute is refused, since a wrong guess would raise no error later and
only lower scores. Remote code is never run, and pickled weights are never opened.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kalm_min.files import write_json
from kalm_min.model.qwen2 import REQUIRED_SIZES, ModelConfig, Qwen2
from kalm_min.settings import read_object

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_config(folder: Path) -> ModelConfig:
    """Read `config.json`. Raises ValueError if it is missing, damaged or not supported."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: expected a model folder with config.json, found none")
    hf = read_object(path)
    hf |= hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # transformers 5, 4
    kind, mode, act = hf.get("model_type"), hf.get("is_causal"), hf.get("hidden_act", "silu")
    missing = [name for name in REQUIRED_SIZES if name not in hf]
    rope, layers = hf.get("rope_type", hf.get("type", "default")), hf.get("layer_types") or []
    if not layers and hf.get("use_sliding_window") and hf.get("sliding_window") is not None:
        layers = ["sliding"] * (hf.get("num_hidden_layers", 0) - hf.get("max_window_layers", 0))
    for refused, sentence in (
        (kind not in ("qwen2", "qwen3"), f"model_type: expected qwen2 or qwen3, found {kind!r}"),
        (missing, f"the keys {', '.join(missing)} are missing"),
        (not isinstance(mode, bool | None), f"is_causal: expected true or false, found {mode!r}"),
        (act != "silu", f"hidden_act: expected silu, found {act!r}"),
        (
            rope != "default",
            f"rope_type: only unscaled rotary embeddings are built, found {rope!r}",
        ),
        (hf.get("quantization_config"), "quantised weights cannot be read, use the original"),
        (kind == "qwen3" and hf.get("attention_bias"), "Qwen3 with biases is not built"),
        ({*layers} - {"full_attention"}, "sliding-window attention is in use and is not built"),
    ):
        if refused:
            raise ValueError(f"{path}: {sentence}")
    # transformers' defaults for keys that the file omits.
    defaults = {"num_key_value_heads": hf["num_attention_heads"], "rope_theta": 10_000.0}
    defaults |= {"head_dim": 128 if kind == "qwen3" else 0, "tie_word_embeddings": False}
    keys = [f.name for f in fields(ModelConfig)]
    stated = {key: hf[key] for key in keys if hf.get(key) is not None or key in REQUIRED_SIZES}
    try:
        return ModelConfig(**defaults | stated)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_model(
    folder: Path, *, dtype: torch.dtype | None, device: torch.device | str = "cpu"
) -> Qwen2:
    """Build the decoder of a folder and fill it from its safetensors files.

    `dtype` None leaves each parameter as it is stored. A tensor already in that dtype stays a
    private view of the mapped file, without a copy: do not rewrite a weights file in place while
    its model is in use (this package renames a finished file over the old one, which is safe).
    Raises ValueError, one sentence, for anything that is wrong with config.json or the weights.
    """
    with torch.device("meta"):
        model = Qwen2(load_config(folder))
    files = [_SINGLE]
    if not (folder / _SINGLE).is_file():
        names = read_object(folder / _INDEX).get("weight_map")
        if not names and not (folder / _INDEX).is_file():
            pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
            hint = "; pickled weights are never opened, convert them to safetensors" * pickled
            raise ValueError(f"{folder}: expected {_SINGLE} or {_INDEX}, found neither{hint}")
        if not isinstance(names, dict) or any(
            Path(str(name)).name != name for name in names.values()
        ):
            raise ValueError(f"{folder / _INDEX}: expected plain file names in weight_map")
        files = sorted(set(names.values()))
    tensors = load_tensors(folder, files, model.state_dict())
    state = {name: x.to(device=device, dtype=dtype) for name, x in tensors.items()}
    model.load_state_dict(state, assign=True)
    return model


def load_tensors(
    folder: Path, files: Iterable[str], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a folder's safetensors files, as private views of the mapped files.

    `wanted` is a state dict, for its names and shapes; stored names may also begin with `model.`
    (language models) or `base_model.model.` (PEFT). Raises ValueError, one sentence that
    lists every missing, unexpected or wrong-shaped tensor, or every file that cannot be read.
    """
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for file in files:
        try:
            stored = load_file(folder / file)
        except FileNotFoundError:
            problems.append(f"{file} is named by the index and is not there")
        except (SafetensorError, OSError) as error:
            problems.append(f"{file} is truncated or not safetensors ({error})")
        else:
            for key, tensor in stored.items():
                name = key.removeprefix("base_model.model.").removeprefix("model.")
                problems += [f"{name} is stored twice"] if name in found else []
                found[name] = tensor
    # A file that cannot be read would also show up as missing tensors: report only the cause.
    if not problems:
        extra = found.keys() - wanted.keys() - {"lm_head.weight"}  # an embedder has no output head
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
    state = model.state_dict() if state is None else state
    config = {key: value for key, value in asdict(model.config).items() if value is not None}
    config |= {
        "architectures": [f"{model.config.model_type.capitalize()}Model"],
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "use_cache": False,
        "is_causal": causal,
        "torch_dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", config)
    save_tensors(state, folder / _SINGLE)
