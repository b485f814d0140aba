"""LoRA: low-rank updates on chosen projections of a frozen decoder (Hu et al. 2021).

    y = x W^T + b + (alpha / R) * (x A^T) B^T        W (O, I) frozen, A (R, I) and B (O, R) trained

The base keeps its parameter names and adapters get PEFT's, so a state dict is a model file plus an
adapter file. There is no dropout, since gradient caching repeats forward passes, which must agree;
a dropout rate in a file is ignored. Files of PEFT may give projections other ranks and alphas or
scale by alpha / sqrt(R) (rsLoRA); DoRA, trained biases, saved modules and the like are refused.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kalm_min.files import Object, write_json
from kalm_min.model.folder import load_tensors, save_tensors
from kalm_min.model.qwen2 import Linear, Qwen2
from kalm_min.options import LoRAConfig
from kalm_min.schema import Field, is_flag, is_number, is_text, is_whole, read_object

ADAPTER_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_A, _B, _PREFIX = ".lora_A.weight", ".lora_B.weight", "base_model.model."


def _are_names(value: object) -> bool:
    return is_text(value) or (isinstance(value, list) and value != [] and all(map(is_text, value)))


def _are_patterns(fits: Callable[[object], bool], value: object) -> bool:
    return isinstance(value, dict) and all(map(fits, value.values()))


_IS_RANK = partial(is_whole, least=1, most=2**31)  # the tensors of the file decide
_IS_ALPHA = partial(is_number, least=1e-30)
# PiSSA, OLoRA, CorDA and LoftQ first change the base, and the file does not hold that change.
_STARTS = "true, false or gaussian, since another may have changed the base (convert it first)"
_FIELDS = {
    "peft_type": Field("LORA", lambda kind: kind == "LORA", required=True),
    "base_model_name_or_path": Field("a name", is_text, required=True),
    "r": Field("a whole number of at least 1", _IS_RANK, required=True),
    "lora_alpha": Field("a number above 0", _IS_ALPHA, required=True),
    "target_modules": Field("names, or a regular expression", _are_names, required=True),
    "init_lora_weights": Field(_STARTS, lambda start: start in (True, False, "gaussian")),
    "use_rslora": Field("true or false", is_flag),
    "rank_pattern": Field("ranks by name", partial(_are_patterns, _IS_RANK)),
    "alpha_pattern": Field("numbers above 0 by name", partial(_are_patterns, _IS_ALPHA)),
}
# PEFT's keys that have no effect on a trained adapter.
_HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout"),
    *("megatron_core", "qalora_group_size"),
}


class Adapter(NamedTuple):
    """An adapter's settings and its base model."""

    config: LoRAConfig
    base: str
    """Folder or hub id of the frozen model."""


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        """Take over the parameters of `linear`; A and B have no values yet, on no device."""
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        kind = {"device": "meta", "dtype": self.weight.dtype}
        self.lora_A = Linear(linear.in_features, rank, bias=False, **kind)
        self.lora_B = Linear(rank, linear.out_features, bias=False, **kind)

    def forward(self, x: Tensor) -> Tensor:
        """(T, I) to (T, O)."""
        return F.linear(x, self.weight, self.bias) + self.scale * self.lora_B(self.lora_A(x))


def add_adapter(model: nn.Module, config: LoRAConfig, seed: int = 0) -> None:
    """Freeze `model` and put an update of zero on its target projections, in place.

    A is drawn as PEFT draws it, uniform within 1 / sqrt(I), from `seed` alone; B is zero.
    Raises ValueError naming a target that matches no projection, or for a model with Dense.
    """
    if any(name.startswith("dense.") for name in model.state_dict()):
        raise ValueError("LoRA beside a Dense module is not built; train all weights (rank 0)")
    generator = torch.Generator().manual_seed(seed)
    for layer in _attach(model, config, dict.fromkeys(_targets(model, config), config.rank)):
        pair = nn.ModuleList([layer.lora_A, layer.lora_B]).to_empty(device=layer.weight.device)
        a, b = pair.parameters()
        # Drawn on the CPU in float32, so that a seed means the same on every device.
        draw = torch.empty(a.shape).uniform_(-1, 1, generator=generator)
        with torch.no_grad():
            a.copy_(draw * a.shape[1] ** -0.5)
            b.zero_()


def _targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The projections whose dotted name is, or ends in, one of the names: PEFT's rule for lists."""
    linears = [f".{name}" for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    ends = tuple(f".{end}" for end in config.target_modules)
    for end in ends:
        if not any(name.endswith(end) for name in linears):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
            raise ValueError(f"target_modules: expected some of {known}, found {end[1:]!r}")
    return [name[1:] for name in linears if name.endswith(ends)]


def _attach(model: nn.Module, config: LoRAConfig, ranks: Mapping[str, int]) -> list[LoRALinear]:
    """Freeze the model, wrap projections with the given ranks and return the wrappers."""
    model.requires_grad_(False)
    layers: list[LoRALinear] = []
    for name, rank in ranks.items():
        linear = cast("nn.Linear", model.get_submodule(name))
        layers.append(LoRALinear(linear, rank, config.alpha / config.rank))
        model.set_submodule(name, layers[-1])
    return layers


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
    updates = {_PREFIX + k: x for k, x in state.items() if k.endswith((_A, _B))}
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


def load_adapter(model: nn.Module, folder: Path) -> Adapter:
    """Put the adapter of a folder on `model`, in place, accounting for every tensor.

    A and B keep the dtype of the file, so that merging into 16-bit weights rounds once; a B whose
    projection has an alpha of its own is scaled to the common one, in float32. Raises ValueError,
    one sentence, for a setting under which the update is not built, or listing the tensors that are
    missing, unexpected or wrong-shaped.
    """
    if not (folder / _WEIGHTS).is_file():
        raise ValueError(f"{folder}: expected {_WEIGHTS}, found none; pickled ones are not opened")
    path = folder / ADAPTER_CONFIG
    raw = read_object(path, _FIELDS, extra=True)
    for key, value in raw.items():
        if key not in _FIELDS and key not in _HARMLESS and value and value != "none":
            raise ValueError(f"{path}: {key}: {value!r} is not built, only plain LoRA is")
    start = ""  # of the names in a language model, by which PEFT matches
    with suppress(SafetensorError), safe_open(folder / _WEIGHTS, "pt") as file:
        causal = f"{_PREFIX}model."
        start = "model." if all(key.startswith(causal) for key in file.keys()) else ""  # noqa: SIM118
    rank, alpha, power = raw["r"], raw["lora_alpha"], 0.5 if raw.get("use_rslora") else 1.0
    names: list[str] | str = raw["target_modules"]

    def stated(key: str, layer: str, default: float) -> float:
        """The value of the first pattern that a name is, or ends in: PEFT's rule."""
        table: Object = raw.get(key, {})
        fitting = (x for end, x in table.items() if re.match(rf"(.*\.)?({end})$", start + layer))
        return next(fitting, default)

    try:
        if isinstance(names, str):
            found = [name for name, _ in model.named_modules() if re.fullmatch(names, start + name)]
            names = found or [names]
        names = [name.removeprefix(start) for name in names]
        common = float(alpha * rank ** (1 - power))
        config = LoRAConfig(rank=rank, alpha=common, target_modules=tuple(names))
        ranks = {x: int(stated("rank_pattern", x, rank)) for x in _targets(model, config)}
        alphas = {x: stated("alpha_pattern", x, alpha) for x in ranks}
    except (ValueError, re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error
    _attach(model, config, ranks)
    wanted = {name: x for name, x in model.state_dict().items() if name.endswith((_A, _B))}
    state = load_tensors(folder, [_WEIGHTS], wanted)
    for layer, own in ranks.items():
        if (scale := alphas[layer] / own**power / (alpha / rank**power)) != 1:
            state[layer + _B] = state[layer + _B].float() * scale
    device = next(model.parameters()).device
    state = {name: tensor.to(device) for name, tensor in state.items()}
    model.load_state_dict(state, strict=False, assign=True)
    return Adapter(config, raw["base_model_name_or_path"])
