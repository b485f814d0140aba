"""Reading and writing a model folder.

    config.json                              the decoder's sizes: load_config
    model.safetensors, or shards             its weights, every tensor accounted for: load_model
    modules.json, 1_Pooling, config_sentence_transformers.json, sentence_bert_config.json,
    tokenizer_config.json                    what makes it an embedder: Settings, read_settings

What this package does not compute is refused, since a wrong guess would raise no error later and
only lower scores. Remote code is never run, and pickled weights are never opened.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kalm_min.files import Object, parse_object, read_json, write_json, write_text
from kalm_min.model.packed import Pooling
from kalm_min.model.qwen2 import REQUIRED_SIZES, ModelConfig, Qwen2

KALM_TEMPLATE = "Instruct: {instruction} \n Query: "
"""A space before and after the newline, as in the official code and mteb (V1 section 1.6)."""

# Checkpoints whose config.json leaves the attention mode to remote code; from the V2 report.
_BIDIRECTIONAL = {
    f"{owner}/KaLM-embedding-multilingual-mini-instruct-{version}"
    for owner in ("HIT-TMG", "KaLM-Embedding")
    for version in ("v2", "v2.5")
}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_object(path: Path) -> Object:
    """Read a JSON object; {} if the file does not exist."""
    return parse_object(path.read_bytes(), str(path)) if path.is_file() else {}


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What makes a decoder an embedder."""

    causal: bool
    """The attention mode: causal, or bidirectional."""
    pooling: Pooling = "mean"
    max_length: int = 512
    """Tokens kept per text, including the prompt and the end-of-text token."""
    prompts: dict[str, str] = field(default_factory=dict)
    """Texts put before queries ("query") and documents ("document"); other names are kept."""
    instruction_template: str = KALM_TEMPLATE
    """Turns a task instruction into a prompt; contains "{instruction}"."""


def read_settings(
    folder: Path, base: Path, name: str, config: ModelConfig, given: Mapping[str, Any]
) -> Settings:
    """Resolve the settings of a folder from all its side files.

    `folder` may hold sentence-transformers' files; `base`, called `name` (a hub id or a path),
    holds config.json, read as `config`. Values in `given`, unless None, replace the folder's.
    Raises ValueError for what this package does not compute or no file states.
    """
    path = folder / "modules.json"
    for module in read_json(path) if path.is_file() else []:
        if module["type"].rsplit(".", 1)[-1] not in {"Transformer", "Pooling", "Normalize"}:
            raise ValueError(f"{path}: the module {module['type']} is not built")
    main, bert, tokenizer = (
        read_object(folder / f"{file}.json")
        for file in ("config_sentence_transformers", "sentence_bert_config", "tokenizer_config")
    )
    if prompt := main.get("default_prompt_name"):
        warnings.warn(
            f"{folder}: sentence-transformers would put the prompt {prompt!r} before every text; "
            "here encode_query and encode_document use theirs, encode uses none",
            stacklevel=3,
        )
    prompts = {key: text for key, text in (main.get("prompts") or {}).items() if text is not None}
    if "passage" in prompts:
        prompts.setdefault("document", prompts["passage"])
    options = bert.get("config_args") or bert.get("config_kwargs") or {}
    stated = [given.get("causal"), options.get("is_causal"), config.is_causal]
    stated += [False] if name in _BIDIRECTIONAL else []
    causal = next((mode for mode in stated if mode is not None), None)
    if causal is None and read_object(base / "config.json").get("auto_map"):
        raise ValueError(
            f"{base / 'config.json'}: the attention mode is left to remote code, which is never "
            "run; pass causal=False (KaLM v2 and v2.5) or causal=True"
        )
    positions, limit = config.max_position_embeddings, tokenizer.get("model_max_length")
    # transformers writes 10^30 where there is no limit.
    limit = min(limit, positions) if isinstance(limit, int) else positions
    return Settings(
        causal=causal is not False,  # Qwen2's own mode is causal
        pooling=given.get("pooling") or _read_pooling(folder / "1_Pooling" / "config.json"),
        max_length=given.get("max_length") or bert.get("max_seq_length") or limit,
        prompts=prompts,
        instruction_template=main.get("instruction_template", KALM_TEMPLATE),
    )


def _read_pooling(path: Path) -> Pooling:
    """The mode in a new (`pooling_mode`) or old (six booleans) file; "mean" if there is no file."""
    settings = read_object(path)
    if not settings.get("include_prompt", True):
        raise ValueError(f"{path}: include_prompt false is not built, the prompt is always pooled")
    flags = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
    named = [key.removeprefix("pooling_mode_").removesuffix("_tokens") for key in flags]
    stated = settings.get("pooling_mode") or named or "mean"
    match [stated] if isinstance(stated, str) else stated:
        case ["mean" | "lasttoken" as mode]:
            return mode
        case modes:
            raise ValueError(
                f"{path}: expected pooling mean or lasttoken, found {', '.join(modes)}"
            )


def write_settings(
    folder: Path, settings: Settings, config: ModelConfig, *, adapter_base: str | None = None
) -> None:
    """Write the files that make the folder a sentence-transformers model, and a card for people.

    `adapter_base` names the base model if the folder holds only an adapter.
    """
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    main: dict[str, object] = {
        "prompts": settings.prompts,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
        "instruction_template": settings.instruction_template,
    }
    if not settings.causal:
        reason = "older versions ignore is_causal in config.json and would attend causally"
        main["requirements"] = {"transformers": {"specifier": ">=5.2", "reason": reason}}
    bert: dict[str, object] = {"max_seq_length": settings.max_length, "do_lower_case": False}
    if adapter_base:  # config.json is the base's and may state another mode
        bert["config_args"] = {"is_causal": settings.causal}
    files = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds.items())
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": config.hidden_size,
            "pooling_mode_cls_token": False,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_tokens": settings.pooling == "mean",
            "pooling_mode_lasttoken": settings.pooling == "lasttoken",
            "include_prompt": True,
        },
        "sentence_bert_config.json": bert,
        "config_sentence_transformers.json": main,
    }
    for name, value in files.items():
        write_json(folder / name, value)
    (folder / "2_Normalize").mkdir()
    mode = "causal" if settings.causal else "bidirectional (transformers >= 5.2 only)"
    adapter = f" A LoRA adapter on `{adapter_base}`." if adapter_base else ""
    card = f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, kalm-embedding]
---

A text embedding model: {config.model_type}, {mode} attention, {settings.pooling} pooling,
{config.hidden_size} dimensions, at most {settings.max_length} tokens, L2-normalised vectors.{adapter}
An instruction is put before a query as `{settings.instruction_template!r}`.
"""
    write_text(folder / "README.md", card)
