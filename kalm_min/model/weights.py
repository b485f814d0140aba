"""Weights on disk: safetensors in Hugging Face's layout, every tensor accounted for.

Reads one `model.safetensors` or the shards an index names. A tensor in the wanted dtype becomes a
private view of the mapped file, so loading costs no copy; files whose tensors must be converted are
mapped a stretch at a time, so the peak stays near one model. Consequence: do not rewrite a weights file in
place while a model read from it lives (everything in this package renames a finished file over the
old one, which is safe). Pickled weights (`pytorch_model.bin`) are never opened.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kalm_min.files import read_json, write_json
from kalm_min.model.config import ModelConfig
from kalm_min.model.qwen2 import Qwen2

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAPPED = 64 * 2**20  # bytes
_DTYPES = {"F64", "F32", "BF16", "F16"}
_IGNORED = "lm_head.weight"  # the output head of a language model; an embedder has none


def load_config(folder: Path) -> ModelConfig:
    """Read `config.json`."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: expected a model folder with config.json, found none")
    return ModelConfig.from_hf(_object(path), where=str(path))


def load_model(
    folder: Path, *, dtype: torch.dtype | None, device: torch.device | str = "cpu"
) -> Qwen2:
    """Build the decoder of a folder and fill it from the safetensors files, each tensor once.

    Args:
        folder: with config.json and the files.
        dtype: of the parameters; None leaves each as it is stored.
        device: where they go.

    Raises:
        ValueError: one sentence listing every missing, unexpected or wrong-shaped tensor and every
            file that cannot be read.
    """
    with torch.device("meta"):
        model = Qwen2(load_config(folder))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    files = [folder / name for name in _file_names(folder)]
    found, problems = survey(files)
    if not problems:
        # A file that cannot be read would also show up as missing tensors: report only the cause.
        problems = list(differences(found, wanted))
    if problems:
        raise ValueError(f"{folder}: {'; '.join(problems)}")
    entries = {name: entry for name, entry in found.items() if name in wanted}
    tensors = (tensor.to(device=device, dtype=dtype) for tensor in read(entries.values()))
    model.load_state_dict(dict(zip(entries, tensors, strict=True)), assign=True)
    return model.requires_grad_(True)


def save_model(
    model: Qwen2, folder: Path, *, causal: bool, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write `config.json` and `model.safetensors` into `folder` (not atomic: the caller's folder is).

    Args:
        model: whose weights, unless `state` is given, and configuration.
        folder: exists.
        causal: the attention mode, which goes into `config.json`.
        state: the weights to write, by name, where the model's own are spread over processes.
    """
    state = model.state_dict() if state is None else state
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    write_json(folder / "config.json", model.config.to_hf(dtype=dtype, causal=causal))
    save_file(state, folder / SINGLE, metadata={"format": "pt"})


def _file_names(folder: Path) -> list[str]:
    """The weight files of a folder: one, or those the index names."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        names = _object(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{folder / INDEX}: expected a weight_map, found none")
        files = sorted({str(name) for name in names.values()})
        if outside := [name for name in files if Path(name).name != name]:
            raise ValueError(f"{folder / INDEX}: expected plain file names, found {outside[0]!r}")
        return files
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
    hint = "; pickled weights are never opened, convert them to safetensors" if pickled else ""
    raise ValueError(f"{folder}: expected {SINGLE} or {INDEX}, found neither{hint}")


_Entry = tuple[Path, str, tuple[int, ...], str]


def survey(files: Iterable[Path]) -> tuple[dict[str, _Entry], list[str]]:
    """Read the headers only: {parameter name: (file, key, shape, dtype)} and what is wrong."""
    found: dict[str, _Entry] = {}
    problems: list[str] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                for key in reader.keys():  # noqa: SIM118 -- not a dict
                    piece = reader.get_slice(key)
                    name = key.removeprefix("model.")
                    if name in found:
                        problems.append(f"{name} stands twice")
                    found[name] = (file, key, tuple(piece.get_shape()), piece.get_dtype())
        except FileNotFoundError:
            problems.append(f"{file.name} is named by the index and is not there")
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name} is truncated or not safetensors ({error})")
    return found, problems


def differences(found: dict[str, _Entry], wanted: dict[str, tuple[int, ...]]) -> Iterable[str]:
    """What keeps the tensors found from being exactly those wanted, one phrase a kind."""
    if missing := sorted(wanted.keys() - found.keys()):
        yield f"missing tensors: {', '.join(missing)}"
    if extra := sorted(found.keys() - wanted.keys() - {_IGNORED}):
        yield f"unexpected tensors: {', '.join(extra)}"
    for name in sorted(wanted.keys() & found.keys()):
        _, _, shape, dtype = found[name]
        if shape != wanted[name]:
            yield f"{name}: expected shape {wanted[name]}, found {shape}"
        if dtype not in _DTYPES:
            yield f"{name}: expected a float tensor, found {dtype}"


def read(entries: Iterable[_Entry]) -> Iterator[torch.Tensor]:
    """Tensors as private views of the mapped files.

    A mapping lives as long as a tensor of it. A file is mapped anew every 64 MiB, so that what has
    been converted to another dtype or device leaves memory; for every tensor would be slow.
    """
    reader, opened, taken = None, None, 0
    for file, key, _, _ in entries:
        if reader is None or file != opened or taken > _MAPPED:
            reader, opened, taken = safe_open(file, framework="pt"), file, 0
        tensor = reader.get_tensor(key)
        taken += tensor.nbytes
        yield tensor


def _object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
