"""What makes a decoder an embedder: read from the side files of its folder and written back.

    modules.json, 1_Pooling, config_sentence_transformers.json, sentence_bert_config.json,
    tokenizer_config.json, config.json      read_settings, write_settings

A wrong guess here raises no error and only lowers scores, so what this package does not compute is
refused. Remote code is never run. Nothing here needs torch.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kalm_min.files import Object, parse_object, read_json, write_json, write_text

Pooling = Literal["mean", "lasttoken"]
"""sentence-transformers' names."""

Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]

KALM_TEMPLATE = "Instruct: {instruction} \n Query: "
"""A space before and after the newline, as in the official code and mteb (V1 section 1.6)."""

# Checkpoints whose config.json leaves the attention mode to remote code; from the V2 report.
_BIDIRECTIONAL = {
    f"{owner}/KaLM-embedding-multilingual-mini-instruct-{version}"
    for owner in ("HIT-TMG", "KaLM-Embedding")
    for version in ("v2", "v2.5")
}

_FIELD = "{instruction}"


def check_template(template: str, where: str = "instruction_template") -> str:
    """Return the template. Raises ValueError, beginning with `where`, unless it has one field."""
    if (count := template.count(_FIELD)) != 1:
        raise ValueError(f"{where}: expected {_FIELD} in it once, found it {count} times")
    return template


def fill_template(template: str, instruction: str | None) -> str:
    """The prompt of a task instruction, "" for none; other braces in either are plain text."""
    return template.replace(_FIELD, instruction) if instruction else ""


def read_object(path: Path) -> Object:
    """Read a JSON object; {} if the file does not exist."""
    return parse_object(path.read_bytes(), str(path)) if path.is_file() else {}


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
    """Turns a task instruction into a prompt: see `fill_template`."""
    default_prompt_name: str | None = None
    """The prompt that sentence-transformers puts before texts for which none is named."""
    similarity_fn_name: Similarity = "cosine"


def read_settings(folder: Path, base: Path, name: str, given: Mapping[str, Any]) -> Settings:
    """Resolve the settings of a folder from all its side files.

    `folder` may hold sentence-transformers' files; `base`, called `name` (a hub id or a path),
    holds config.json. Values in `given`, unless None, replace the folder's.
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
    config = read_object(base / "config.json")
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
    stated = [given.get("causal"), options.get("is_causal"), config.get("is_causal")]
    stated += [False] if name in _BIDIRECTIONAL else []
    causal = next((mode for mode in stated if mode is not None), None)
    if causal is None and config.get("auto_map"):
        raise ValueError(
            f"{base / 'config.json'}: the attention mode is left to remote code, which is never "
            "run; pass causal=False (KaLM v2 and v2.5) or causal=True"
        )
    positions = config.get("max_position_embeddings", 32_768)
    limit = tokenizer.get("model_max_length")
    # transformers writes 10^30 where there is no limit.
    limit = min(limit, positions) if isinstance(limit, int) else positions
    return Settings(
        causal=causal is not False,  # Qwen2's own mode is causal
        pooling=given.get("pooling") or _read_pooling(folder / "1_Pooling" / "config.json"),
        max_length=given.get("max_length") or bert.get("max_seq_length") or limit,
        prompts=prompts,
        instruction_template=check_template(
            main.get("instruction_template", KALM_TEMPLATE), f"{folder}: instruction_template"
        ),
        default_prompt_name=main.get("default_prompt_name"),
        similarity_fn_name=main.get("similarity_fn_name") or "cosine",
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
    folder: Path, settings: Settings, dimension: int, *, adapter_base: str | None = None
) -> None:
    """Write the files that make the folder a sentence-transformers model, and a card for people.

    `adapter_base` names the base model if the folder holds only an adapter.
    """
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    main: dict[str, object] = {
        "prompts": settings.prompts,
        "default_prompt_name": settings.default_prompt_name,
        "similarity_fn_name": settings.similarity_fn_name,
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
            "word_embedding_dimension": dimension,
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

A text embedding model with {mode} attention, {settings.pooling} pooling,
{dimension} dimensions, at most {settings.max_length} tokens, L2-normalised vectors.{adapter}
An instruction is put before a query as `{settings.instruction_template!r}`.
"""
    write_text(folder / "README.md", card)
