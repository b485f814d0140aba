"""LoRA: low-rank updates on chosen projections of a frozen decoder (Hu et al. 2021).

I, O  sizes in and out of a projection    R  rank

    y = x W^T + b + (alpha / R) * (x A^T) B^T        W (O, I) frozen, A (R, I) and B (O, R) trained

It is applied to a finished decoder and removed by folding the update into the weights. The base
keeps its parameter names and adapters get PEFT's, so a state dict is a model file plus an adapter
file. The update is zero at the start (B = 0). There is no dropout: gradient caching repeats
forwards, which must agree; one named in a file is ignored, since it only affects training. Refused
in files: DoRA, rsLoRA, trained biases, other saved modules and the like.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from kalm_min.files import write_json
from kalm_min.model.folder import load_tensors, read_object
from kalm_min.model.qwen2 import Linear

ADAPTER_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_A, _B = ".lora_A.weight", ".lora_B.weight"
# Keys of PEFT's that are read, and those that change nothing for a trained adapter; any other key
# must be unset.
_KNOWN = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules"}
_HARMLESS = {"auto_mapping", "peft_version", "inference_mode", "init_lora_weights"}
_HARMLESS |= {"lora_dropout", "megatron_core", "qalora_group_size"}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """Low-rank adapters on a frozen checkpoint instead of training all its weights."""

    rank: Annotated[int, "Rank of the updates; 0 trains all weights."] = 0
    alpha: Annotated[float, "The updates are multiplied by alpha / rank."] = 32.0
    target_modules: Annotated[
        tuple[str, ...], "Projections that get an update, by the end of their names."
    ] = _PROJECTIONS

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank: expected 0 (off) or more, found {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha: expected more than 0, found {self.alpha}")
        if not self.target_modules:
            raise ValueError("target_modules: expected names of projections, found none")


class Adapter(NamedTuple):
    """An adapter's settings and its base model."""

    config: LoRAConfig
    base: str
    """Folder or hub id of the frozen model."""


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        """Take over the parameters of `linear`; A and B are not filled yet."""
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

    A is drawn as PEFT draws it, uniform within 1 / sqrt(I), from `seed` alone.

    Raises ValueError naming a target that no projection of the model is called by.
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
    """Freeze the model and wrap its target projections; the wrappers, not filled yet.

    A projection is a target whose dotted name is, or ends in, one of the names: PEFT's rule for lists.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    ends = tuple(f".{end}" for end in config.target_modules)
    for end in ends:
        if not any(f".{name}".endswith(end) for name in linears):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
            raise ValueError(f"target_modules: expected some of {known}, found {end[1:]!r}")
    model.requires_grad_(False)
    layers: list[LoRALinear] = []
    for name, linear in linears.items():
        if f".{name}".endswith(ends):
            layers.append(LoRALinear(linear, config))
            model.set_submodule(name, layers[-1])
    return layers


def merge(model: nn.Module) -> None:
    """Fold every update into its weights, in place: a plain decoder again, all of it trainable."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            linear = Linear(layer.lora_A.in_features, layer.lora_B.out_features, device="meta")
            weight = _fold(layer.weight, layer.lora_A.weight, layer.lora_B.weight, layer.scale)
            linear.weight, linear.bias = nn.Parameter(weight), layer.bias
            model.set_submodule(name, linear)
    model.requires_grad_(True)


def merged_state(state: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """What `merge` makes of the state dict of a model with adapters."""
    merged = {name: tensor for name, tensor in state.items() if not name.endswith((_A, _B))}
    for name in state:
        if name.endswith(_A):
            layer = name.removesuffix(_A)
            update = (state[name], state[layer + _B], config.alpha / config.rank)
            merged[f"{layer}.weight"] = _fold(state[f"{layer}.weight"], *update)
    return merged


def _fold(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight + scale * b @ a, computed in float32 at least, in the dtype of `weight`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + scale * (b.to(wide) @ a.to(wide))).detach().to(weight.dtype)


def save_adapter(state: Mapping[str, Tensor], folder: Path, adapter: Adapter) -> None:
    """Write PEFT's two files for a state dict with A and B into `folder`, which the caller completes."""
    tensors = {
        f"base_model.model.{name}": tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if name.endswith((_A, _B))
    }
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
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

    Raises ValueError for every setting under which the update is not alpha / r * B A and nothing else.
    """
    path = folder / ADAPTER_CONFIG
    raw = read_object(path)
    try:
        if raw.get("peft_type") != "LORA":
            raise ValueError(f"peft_type: expected LORA, found {raw.get('peft_type')!r}")
        task, start = raw.get("task_type"), raw.get("init_lora_weights", True)
        if task not in {None, "FEATURE_EXTRACTION"}:
            raise ValueError(f"task_type: expected FEATURE_EXTRACTION or none, found {task!r}")
        if isinstance(start, str) and start != "gaussian":
            # PiSSA, OLoRA, CorDA and LoftQ start by changing the base, which is not in the file.
            raise ValueError(
                f"init_lora_weights: {start!r} may have changed the base, convert it first"
            )
        for key, value in raw.items():
            if key not in _KNOWN | _HARMLESS and value and value != "none":
                raise ValueError(f"{key}: {value!r} is not built, only plain LoRA is")
        names, rank, base = (
            raw.get(key) for key in ("target_modules", "r", "base_model_name_or_path")
        )
        if not isinstance(names, list):
            raise ValueError(f"target_modules: expected a list of names, found {names!r}")
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"r: expected a whole number of at least 1, found {rank!r}")
        if not isinstance(base, str):
            raise ValueError(f"base_model_name_or_path: expected a name, found {base!r}")
        alpha = float(raw.get("lora_alpha", 8))  # PEFT's default
        return Adapter(LoRAConfig(rank=rank, alpha=alpha, target_modules=tuple(names)), base)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put the adapter of a folder on `model`, in place, every tensor accounted for.

    A and B keep the dtype of the file, so that merging into 16-bit weights rounds once.

    Raises:
        ValueError: one sentence listing what is missing, unexpected or wrong-shaped.
    """
    adapter = read_adapter(folder)
    try:
        _attach(model, adapter.config)
    except ValueError as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG}: {error}") from error
    if not (folder / _WEIGHTS).is_file():
        raise ValueError(
            f"{folder}: expected {_WEIGHTS}, found none; pickled ones are never opened"
        )
    wanted = {name: x for name, x in model.state_dict().items() if name.endswith((_A, _B))}
    tensors = load_tensors(folder, [_WEIGHTS], wanted)
    state = {name: x.to(wanted[name].device) for name, x in tensors.items()}
    model.load_state_dict(state, strict=False, assign=True)
