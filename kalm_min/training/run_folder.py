"""The folder of a run: it explains itself, and the same command continues it.

    <output>/config.toml        the resolved configuration
    <output>/environment.json   versions, machine, processes
    <output>/log.jsonl          one object a step
    <output>/checkpoints/       complete ones only
    <output>/final/             the finished model
    <output>/adapter/           with LoRA, what was trained, by itself

A folder belongs to one configuration. Another one is refused before anything is read or written: a
run continued under other settings is neither of the two.
"""

import json
import platform
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kalm_min.files import atomic_write, write_json, write_text
from kalm_min.training import checkpoint, distributed

_PACKAGES = ("torch", "safetensors", "tokenizers", "numpy")


def claim(output: Path, config_toml: str) -> Path | None:
    """Check that `output` is free or of this very configuration; the newest checkpoint to go on from.

    Raises ValueError naming the settings that differ.
    """
    path, newest = output / "config.toml", checkpoint.newest(output / "checkpoints")
    # Where nothing has been trained there is nothing to protect.
    if newest is not None and path.is_file():
        there, here = tomllib.loads(path.read_text(encoding="utf-8")), tomllib.loads(config_toml)
        if differences := list(_differences(there, here)):
            raise ValueError(
                f"{output} holds a run with other settings ({'; '.join(differences[:5])}); "
                "give another --output, or delete the folder"
            )
    return newest


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    """`key was x, is y` for every setting that differs."""
    found: list[str] = []
    for key in sorted(there.keys() | here.keys()):
        a, b = there.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} was {a}, is {b}")
    return found


def describe(output: Path, config_toml: str, device: torch.device) -> None:
    """Write config.toml and environment.json; called on one process."""
    write_text(output / "config.toml", config_toml)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device.type} {name}".strip(),
        **{package: metadata.version(package) for package in _PACKAGES},
        **distributed.describe(),
    }
    write_json(output / "environment.json", environment)


def cut_log(path: Path, last_step: int) -> None:
    """Drop what was logged after the step a run goes on from, and a last line torn by a kill."""
    if not path.is_file():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except json.JSONDecodeError:
            break
        if step <= last_step:
            kept.append(line + "\n")
    with atomic_write(path, "w") as file:
        file.writelines(kept)
