"""LoRA: low-rank updates on chosen projections of a frozen decoder (Hu et al. 2021).

I, O  input and output size of a projection    R  rank

    y = x W^T + b + (alpha / R) * (x A^T) B^T        W (O, I) frozen, A (R, I) and B (O, R) trained

The base keeps its parameter names and adapters get PEFT's, so a state dict is a model file plus an
adapter file. There is no dropout: gradient caching repeats forward passes, which must agree. A
dropout rate in a file is ignored, since it only affects training. Files with DoRA, rsLoRA, trained
biases, other saved modules and the like are refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalm_min.files import Object, write_json
from kalm_min.model.folder import load_tensors, save_tensors
from kalm_min.model.qwen2 import Linear, Qwen2
from kalm_min.options import LoRAConfig
from kalm_min.schema import read_object

ADAPTER_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_A, _B = ".lora_A.weight", ".lora_B.weight"
# PEFT's keys that are checked, and those that have no effect on a trained adapter.
_ALLOWED = {
    *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules"),
    *("auto_mapping", "peft_version", "inference_mode", "init_lora_weights", "lora_dropout"),
    *("megatron_core", "qalora_group_size"),
}


class Adapter(NamedTuple):
    """An adapter's settings and its base model."""

    config: LoRAConfig
    base: str
    """Folder or hub id of the frozen model."""


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        """Take over the parameters of `linear`; A and B are not initialised yet."""
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = config.alpha / config.rank
        kind = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.lora_A = Linear(linear.in_features, config.rank, bias=False, **kind)
        self.lora_B = Linear(config.rank, linear.out_features, bias=False, **kind)

    def forward(self, x: Tensor) -> Tensor:
        """(T, I) to (T, O)."""
        return F.linear(x, self.weight, self.bias) + self.scale * self.lora_B(self.lora_A(x))


def add_adapter(model: nn.Module, config: LoRAConfig, seed: int = 0) -> None:
    """Freeze `model` and put an update of zero on its target projections, in place.

    A is drawn as PEFT draws it, uniform within 1 / sqrt(I), from `seed` alone; B is zero.
    Raises ValueError naming a target that matches no projection of the model.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in _attach(model, config):
        a, b = layer.lora_A.weight, layer.lora_B.weight
        # Drawn on the CPU in float32, so that a seed means the same on every device.
        draw = torch.empty(a.shape).uniform_(-1, 1, generator=generator)
        with torch.no_grad():
            a.copy_(draw * a.shape[1] ** -0.5)
            b.zero_()


def _attach(model: nn.Module, config: LoRAConfig) -> list[LoRALinear]:
    """Freeze the model, wrap its target projections and return the wrappers, not initialised yet.

    A target's dotted name is, or ends in, one of the names, which is PEFT's rule for lists.
    """
    linears = {f".{name}": m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    ends = tuple(f".{end}" for end in config.target_modules)
    for end in ends:
        if not any(name.endswith(end) for name in linears):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
            raise ValueError(f"target_modules: expected some of {known}, found {end[1:]!r}")
    model.requires_grad_(False)
    layers = {name: LoRALinear(m, config) for name, m in linears.items() if name.endswith(ends)}
    for name, layer in layers.items():
        model.set_submodule(name[1:], layer)
    return [*layers.values()]


def merge(model: Qwen2, config: LoRAConfig) -> Qwen2:
    """A plain, fully trainable decoder with every update folded into its weight."""
    with torch.device("meta"):
        plain = Qwen2(model.config)
    plain.load_state_dict(merged_state(model.state_dict(), config), assign=True)
    return plain


def merged_state(state: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """Fold the updates of a state dict into its weights, in at least float32, rounded once."""
    folded = {name: tensor for name, tensor in state.items() if not name.endswith((_A, _B))}
    for layer in (name.removesuffix(_A) for name in state if name.endswith(_A)):
        weight = state[f"{layer}.weight"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        update = state[layer + _B].to(wide) @ state[layer + _A].to(wide)  # (O, I)
        total = weight.to(wide) + config.alpha / config.rank * update
        folded[f"{layer}.weight"] = total.detach().to(weight.dtype)
    return folded


def save_adapter(state: Mapping[str, Tensor], folder: Path, adapter: Adapter) -> None:
    """Write PEFT's two files for a state dict with A and B into `folder` (atomic only with it)."""
    updates = {f"base_model.model.{k}": x for k, x in state.items() if k.endswith((_A, _B))}
    save_tensors(updates, folder / _WEIGHTS)
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": adapter.base,
        "r": adapter.config.rank,
        "lora_alpha": adapter.config.alpha,
        "target_modules": list(adapter.config.target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / ADAPTER_CONFIG, config)


def read_adapter(folder: Path) -> Adapter:
    """Read `adapter_config.json`.

    Raises ValueError for any setting under which the update is not exactly alpha / r * B A.
    """
    path = folder / ADAPTER_CONFIG
    raw: Object = {"lora_alpha": 8} | read_object(path, {}, extra=True)  # PEFT's default
    rank, alpha, names = raw.get("r", 0), raw["lora_alpha"], raw.get("target_modules", "")
    start, base = raw.get("init_lora_weights"), raw.get("base_model_name_or_path", "")
    # PiSSA, OLoRA, CorDA and LoftQ first change the base, and the file does not hold that change.
    starts = "true, false or gaussian, since another may have changed the base (convert it first)"
    tasks = (None, "FEATURE_EXTRACTION")
    for key, fine, expected in (
        ("peft_type", raw.get("peft_type") == "LORA", "LORA"),
        ("task_type", raw.get("task_type") in tasks, "FEATURE_EXTRACTION or none"),
        ("init_lora_weights", start in (None, True, False, "gaussian"), starts),
        ("target_modules", isinstance(names, list) and names, "a list of names"),
        ("r", isinstance(rank, int) and rank > 0, "a whole number of at least 1"),
        ("lora_alpha", isinstance(alpha, int | float) and alpha > 0, "a number above 0"),
        ("base_model_name_or_path", isinstance(base, str) and base, "a name"),
    ):
        if not fine:
            raise ValueError(f"{path}: {key}: expected {expected}, found {raw.get(key)!r}")
    for key, value in raw.items():
        if key not in _ALLOWED and value and value != "none":
            raise ValueError(f"{path}: {key}: {value!r} is not built, only plain LoRA is")
    return Adapter(LoRAConfig(rank=rank, alpha=float(alpha), target_modules=tuple(names)), base)


def load_adapter(model: nn.Module, folder: Path) -> Adapter:
    """Put the adapter of a folder on `model`, in place, accounting for every tensor.

    A and B keep the dtype of the file, so that merging into 16-bit weights rounds once. Raises
    ValueError, one sentence listing what is missing, unexpected or wrong-shaped.
    """
    if not (folder / _WEIGHTS).is_file():
        raise ValueError(f"{folder}: expected {_WEIGHTS}, found none; pickled ones are not opened")
    adapter = read_adapter(folder)
    try:
        _attach(model, adapter.config)
    except ValueError as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG}: {error}") from error
    wanted = {name: x for name, x in model.state_dict().items() if name.endswith((_A, _B))}
    tensors = load_tensors(folder, [_WEIGHTS], wanted)
    state = {name: x.to(wanted[name].device) for name, x in tensors.items()}
    model.load_state_dict(state, strict=False, assign=True)
    return adapter
