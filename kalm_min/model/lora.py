"""LoRA: low-rank updates on chosen projections of a frozen decoder (Hu et al. 2021).

I, O  widths in and out of a projection    R  rank

    y = x W^T + b + (alpha / R) * (x A^T) B^T        W (O, I) frozen, A (R, I) and B (O, R) trained

It is applied from outside to a finished decoder and taken off again by folding the update into the
weights. The base keeps its parameter names and adapters get PEFT's, so a state dict is a model file
plus an adapter file. The update is zero at the start (B = 0).

Not here: dropout (gradient caching repeats forwards, which must agree); a file may name one, which is
over with training. Refused in files: DoRA, rsLoRA, trained biases, other saved modules and the like.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from kalm_min.files import read_json, write_json
from kalm_min.model.weights import differences, read, survey

ADAPTER_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's wrapper around the model it adapts
_A, _B = ".lora_A.weight", ".lora_B.weight"
# What PEFT writes and what changes nothing for a trained adapter; any other key must be unset.
_KNOWN = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules"}
_IDLE = {
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """Low-rank adapters on a frozen checkpoint instead of training all its weights."""

    rank: int = 0
    """Rank of the updates; 0 trains all weights."""
    alpha: float = 32.0
    """The updates are scaled by alpha / rank."""
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Projections that get one, by the end of their names."""

    def __post_init__(self) -> None:
        """Refuse what is no adapter."""
        if self.rank < 0:
            raise ValueError(f"rank: expected 0 (off) or more, found {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha: expected more than 0, found {self.alpha}")
        if not self.target_modules:
            raise ValueError("target_modules: expected names of projections, found none")

    @property
    def scale(self) -> float:
        """What the product of B and A is multiplied with."""
        return self.alpha / self.rank


class Adapter(NamedTuple):
    """An adapter and what it stands on."""

    config: LoRAConfig
    base: str
    """Folder or hub id of the frozen model."""


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        """Take over the parameters of `linear`; A and B are not filled yet."""
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = config.scale
        width_out, width_in = self.weight.shape
        self.lora_A = _empty(width_in, config.rank, self.weight)
        self.lora_B = _empty(config.rank, width_out, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(T, I) to (T, O)."""
        return F.linear(x, self.weight, self.bias) + self.scale * self.lora_B(self.lora_A(x))

    def merged(self) -> nn.Linear:
        """A plain linear layer that computes the same."""
        width_out, width_in = self.weight.shape
        linear = nn.Linear(width_in, width_out, bias=self.bias is not None, device="meta")
        weight = _fold(self.weight, self.lora_A.weight, self.lora_B.weight, self.scale)
        linear.weight, linear.bias = nn.Parameter(weight), self.bias
        return linear


def _empty(width_in: int, width_out: int, like: Tensor) -> nn.Linear:
    """A linear layer without bias, not filled, where and in the dtype `like` is."""
    linear = nn.Linear(width_in, width_out, bias=False, device="meta", dtype=like.dtype)
    return linear.to_empty(device=like.device)


def _fold(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight + scale * b @ a, computed in float32 at least, in the dtype of `weight`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + scale * (b.to(wide) @ a.to(wide))).detach().to(weight.dtype)


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
    """Freeze the model and wrap its target projections; the wrappers, not filled yet."""
    targets = dict(_targets(model, config.target_modules))
    model.requires_grad_(False)
    layers = {name: LoRALinear(linear, config) for name, linear in targets.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return list(layers.values())


def _targets(model: nn.Module, ends: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers whose dotted name is, or ends in, one of `ends`: PEFT's rule for lists."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for end in ends:
        if not any(f".{name}".endswith(f".{end}") for name in linears):
            there = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
            raise ValueError(f"target_modules: expected some of {there}, found {end!r}")
    for name, linear in linears.items():
        if f".{name}".endswith(tuple(f".{end}" for end in ends)):
            yield name, linear


def merge(model: nn.Module) -> None:
    """Fold every update into its weights, in place: a plain decoder again, all of it trainable."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.merged())
    model.requires_grad_(True)


def merged_state(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The state dict that `merge` leads to, of that of a model with adapters."""
    merged = {name: tensor for name, tensor in state.items() if not name.endswith((_A, _B))}
    for name in state:
        if name.endswith(_A):
            layer = name.removesuffix(_A)
            weight = f"{layer}.weight"
            merged[weight] = _fold(state[weight], state[name], state[layer + _B], scale)
    return merged


def save_adapter(state: Mapping[str, Tensor], folder: Path, adapter: Adapter) -> None:
    """Write PEFT's two files into `folder` (not atomic: the caller's folder is).

    Args:
        state: of a model with adapters.
        folder: where to.
        adapter: its settings.
    """
    tensors = {
        _PREFIX + name: tensor.detach().cpu().contiguous()
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
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    write_json(folder / ADAPTER_CONFIG, config)


def read_adapter(folder: Path) -> Adapter:
    """Read `adapter_config.json`. Raises ValueError for what is not a plain LoRA of an embedder."""
    path = folder / ADAPTER_CONFIG
    raw = read_json(path)
    try:
        if not isinstance(raw, dict):
            raise ValueError(f"expected a JSON object, found {type(raw).__name__}")
        _refuse_unimplemented(raw)
        names = raw.get("target_modules")
        if not isinstance(names, list):
            raise ValueError(f"target_modules: expected a list of names, found {names!r}")
        rank, base = raw.get("r"), raw.get("base_model_name_or_path")
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"r: expected a whole number of at least 1, found {rank!r}")
        if not isinstance(base, str):
            raise ValueError(f"base_model_name_or_path: expected a name, found {base!r}")
        alpha = float(raw.get("lora_alpha", 8))  # PEFT's default
        return Adapter(LoRAConfig(rank=rank, alpha=alpha, target_modules=tuple(names)), base)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _refuse_unimplemented(raw: Mapping[str, Any]) -> None:
    """Raise for every setting under which the update is not alpha / r * B A and nothing else."""
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"peft_type: expected LORA, found {raw.get('peft_type')!r}")
    if raw.get("task_type") not in {None, "FEATURE_EXTRACTION"}:
        raise ValueError(
            f"task_type: expected FEATURE_EXTRACTION or none, found {raw['task_type']!r}"
        )
    if isinstance(start := raw.get("init_lora_weights", True), str) and start != "gaussian":
        # PiSSA, OLoRA, CorDA and LoftQ start by changing the base, which is not in the file.
        raise ValueError(
            f"init_lora_weights: {start!r} may have changed the base, convert it first"
        )
    for key, value in raw.items():
        if key not in _KNOWN | _IDLE and value and value != "none":
            raise ValueError(f"{key}: {value!r} is not built, only plain LoRA is")


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
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name.endswith((_A, _B))
    }
    if not (folder / _WEIGHTS).is_file():
        raise ValueError(
            f"{folder}: expected {_WEIGHTS}, found none; pickled ones are never opened"
        )
    found, problems = survey([folder / _WEIGHTS])
    found = {
        key.removeprefix(_PREFIX).removeprefix("model."): entry for key, entry in found.items()
    }
    if problems := problems or list(differences(found, wanted)):
        raise ValueError(f"{folder}: {'; '.join(problems)}")
    device = next(model.parameters()).device
    tensors = (tensor.to(device) for tensor in read(found.values()))
    state = dict(zip(found, tensors, strict=True))
    model.load_state_dict(state, strict=False, assign=True)
