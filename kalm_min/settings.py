"""What makes a decoder an embedder: resolved from the files of its folder, and written back.

    config.json, modules.json, 1_Pooling, 2_Dense, sentence_bert_config.json,
    config_sentence_transformers.json, tokenizer_config.json      open_folder, write_settings
    model/released.json      what released checkpoints need and their files do not state;
                             what the keys of all these files may hold

A wrong guess here raises no error and only lowers scores. So every key of these files is used, known
to be harmless, or refused, and one that is none of these is named in a warning. Remote code is never
run: the classes that files name are only recognised. Nothing here needs torch.
"""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kalm_min import schema
from kalm_min.files import Object, checkpoint_folders, read_json, write_json, write_text
from kalm_min.schema import Field, is_string, problem_with

Pooling = Literal["mean", "lasttoken"]
"""sentence-transformers' names."""
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
SHORT_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}  # of dtypes

KALM_TEMPLATE = "Instruct: {instruction} \n Query: "
"""A space before and after the newline, as in the official code and mteb (V1 section 1.6)."""
_PLACEHOLDER = "{instruction}"
# A stored prompt of this form shows the template of all instructions.
_PROMPT = re.compile(r"(Instruct:\s*)\S.*?(\s*\n\s*Query:\s*)", re.DOTALL)

_MODULES = ["Transformer", "Pooling", "Dense", "Normalize"]  # what is built, in this order
DENSE = "2_Dense"  # the folder of the third one, as it is written here
IDENTITY = "torch.nn.modules.linear.Identity"
_MAIN, _BERT = "config_sentence_transformers.json", "sentence_bert_config.json"
_TOKENIZER, _IN_PROMPTS = "tokenizer_config.json", f"prompts in {_MAIN}"

_FACTS: Object = read_json(Path(__file__).parent / "model" / "released.json")


def is_name(value: object) -> bool:
    """A plain name of a file or folder, not a path."""
    return is_string(value) and Path(value).name == value


_KINDS: dict[str, Callable[[object], bool]] = {  # of values, under the names of released.json
    "anything": lambda _: True,
    "true or false": schema.is_flag,
    "a whole number": schema.is_whole,
    "a whole number of at least 1": partial(schema.is_whole, least=1),
    "a number above 0": partial(schema.is_number, least=1e-30, most=1e31),
    "a string": is_string,
    "a name": schema.is_text,
    "a file name": is_name,
    "a name or a list of names": lambda value: isinstance(value, str | list),
    "a list of names": lambda value: isinstance(value, list) and all(map(schema.is_text, value)),
    "an object": lambda value: isinstance(value, dict),
    'an object without "message" (each text would be put into the chat template, which is not done '
    'here; keep only "text" of the model\'s model[0].modality_config in sentence-transformers)': (
        lambda value: isinstance(value, dict) and "message" not in value
    ),
    "an object of strings": lambda value: (
        isinstance(value, dict) and all(one is None or is_string(one) for one in value.values())
    ),
    "a token": lambda value: is_string(value.get("content") if isinstance(value, dict) else value),
}


def _fields(keys: Object) -> dict[str, Field]:
    """What the keys of one file may hold."""
    needed, only = keys.get("required", []), keys.get("only", {})
    kinds = [(key, kind, fits) for kind, fits in _KINDS.items() for key in keys.get(kind, [])]
    for key, values in only.items():
        stated = " or ".join(map(json.dumps, values)) or "absent"
        kinds.append((key, f"{stated} (nothing else is built)", values.__contains__))
    return {key: Field(kind, fits, required=key in needed) for key, kind, fits in kinds}


FIELDS = {file: _fields(keys) for file, keys in _FACTS["keys"].items()}  # and of objects in them
FIELDS |= dict.fromkeys(["tokenizer_args", "processor_kwargs"], FIELDS[_TOKENIZER])
FIELDS |= {"config_kwargs": FIELDS["config_args"], "rope_scaling": FIELDS["rope_parameters"]}
SIZES = [key for key, one in FIELDS["config.json"].items() if one.required and key != "model_type"]


def check_template(template: str, where: str = "instruction_template") -> str:
    """Return the template. Raises ValueError, beginning with `where`, unless it has one field."""
    if (count := template.count(_PLACEHOLDER)) != 1:
        raise ValueError(f"{where}: expected {_PLACEHOLDER} in it once, found it {count} times")
    return template


def fill_template(template: str, instruction: str | None) -> str:
    """The prompt of a task instruction, "" for none; other braces in either are plain text."""
    return template.replace(_PLACEHOLDER, instruction) if instruction else ""


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
    """The prompt put before texts for which neither a prompt nor a name is given."""
    similarity_fn_name: Similarity = "cosine"


class Opened(NamedTuple):
    """A checkpoint of which all is known except its weights and its vocabulary."""

    settings: Settings
    model: Path  # the folder with config.json and the weights: of the base, if there is an adapter
    adapter: Path | None  # the folder of a LoRA adapter
    tokenizer: Path  # the folder with tokenizer.json
    end_of_text: bool  # whether that token closes every text, even if tokenizer.json does not
    dense: Path | None  # the folder of a Dense module, a linear map of the pooled vector
    dimension: int  # coordinates of a full vector
    config: Object  # what config.json states
    released: str  # the name of its entry in released.json, or ""
    sources: dict[str, str]  # for each setting, the file, the entry or the rule that decided


def open_folder(path_or_hub_id: str | Path, **given: Any) -> Opened:
    """Resolve what a checkpoint says about itself.

    `given` may hold `causal`, `pooling` and `max_length`; those that are not None win. Raises
    ValueError, one sentence, for what is missing, damaged, contradictory or not built.
    """
    first, *rest = checkpoint_folders(path_or_hub_id)
    base = (rest or [first])[0]
    folder, words = (
        first if (first / file).is_file() else base for file in ("modules.json", "tokenizer.json")
    )
    unknown, sources = list[str](), dict[str, str]()
    config = read_config(base, unknown)
    main, bert = (_read(folder / file, file, unknown) for file in (_MAIN, _BERT))
    over: Object = {}  # what sentence-transformers puts over config.json and tokenizer_config.json
    for key in FIELDS:
        over |= bert.get(key, {}) if key in FIELDS[_BERT] else {}
    tokens = _read(words / _TOKENIZER, _TOKENIZER, unknown) | over
    stated_pooling, dense, dimension = _read_modules(folder, config["hidden_size"], unknown)

    def choose(setting: str, *candidates: tuple[Any, str]) -> Any:
        """The first value that is not None."""
        stated = [(given.get(setting), "the caller"), *candidates]
        value, sources[setting] = next(pair for pair in stated if pair[0] is not None)
        return value

    path, (code, owner) = base / "config.json", _remote_class(config, "AutoModel")
    facts = {"code": code, "tokenizer_code": _remote_class(tokens, "AutoTokenizer")[0]}
    facts |= {"model_type": config["model_type"], "pooling": stated_pooling}
    cached = re.search(r"models--(.+?)--(.+?)\Wsnapshots", str(base))  # a folder of the hub's cache
    names = {str(path_or_hub_id), owner, "/".join(cached.groups()) if cached else ""}
    rows = [row for row in _FACTS["models"] if names & {*row["ids"]}]
    matches = [(row, row.get("match", {"code": "?"}).items()) for row in _FACTS["models"]]
    rows += [row for row, stated in matches if stated <= facts.items()]
    row: Object = rows[0] if rows else {"name": ""}
    here = f"released.json: {row['name']}"
    is_known = given.get("causal") is not None or "is_causal" in over
    causal = choose(
        "causal",
        (over.get("is_causal"), _BERT),
        (None if is_known else _stated_attention(path, config), "config.json"),
        (row.get("causal"), here),
        ("?" if code else True, f"{config['model_type']}'s own mode"),
    )
    if causal == "?" or (code and not rows and _advice(code)):
        advice = _advice(code or "") or "; pass causal=True or causal=False, as its authors say"
        what = f"expected to know what the remote code {code} does, which is never run"
        raise ValueError(f"{path}: {what}{advice}")
    has_modules = (folder / "modules.json").is_file()
    if has_modules and stated_pooling is None and given.get("pooling") is None:
        raise ValueError(f"{folder / 'modules.json'}: expected a Pooling module, found none")
    is_chat = any(one.endswith("ForCausalLM") for one in config.get("architectures", [])[:1])
    usual, rule = "lasttoken" if is_chat and causal else "mean", "sentence-transformers' rule"
    pooling = choose(
        "pooling", (stated_pooling, "modules.json"), (row.get("pooling"), here), (usual, rule)
    )
    notes = [f"the keys {', '.join(unknown)} are not known and play no part"] if unknown else []
    if sources["pooling"] == rule:
        notes += [f"no modules.json, so pooling is {usual!r}, by {rule} (pooling=... chooses)"]
    for note in notes:
        warnings.warn(f"{first}: {note}", stacklevel=3)
    limits = {_BERT: bert.get("max_seq_length"), here: row.get("max_length")}
    if limits[_BERT] is None:
        limits[_TOKENIZER] = tokens.get("model_max_length")
        limits["config.json"] = config.get("max_position_embeddings", 32_768)
    lengths = [(int(limit), where) for where, limit in limits.items() if limit is not None]
    prompts = {key: text for key, text in main.get("prompts", {}).items() if text is not None}
    if "passage" in prompts:
        prompts.setdefault("document", prompts["passage"])
    default = main.get("default_prompt_name")
    if default not in (None, *prompts):
        expected = f"expected the prompt {default!r} among prompts, found none"
        raise ValueError(f"{folder / _MAIN}: {expected}")
    shown = map(_PROMPT.fullmatch, [prompts.get("query", ""), *prompts.values()])
    template = choose(
        "instruction_template",
        (main.get("instruction_template"), _MAIN),
        (next((_PLACEHOLDER.join(one.groups()) for one in shown if one), None), _IN_PROMPTS),
        (row.get("template"), here),
        (KALM_TEMPLATE, "KaLM's"),
    )
    found = Settings(
        causal=causal,
        pooling=pooling,
        max_length=choose("max_length", min(lengths)),
        prompts=prompts,
        instruction_template=check_template(template, f"{folder}: instruction_template"),
        default_prompt_name=default,
        similarity_fn_name=main.get("similarity_fn_name", "cosine"),
    )
    closes = row.get("end_of_text")
    ends = closes is not False and tokens.get("add_eos_token", bool(closes))
    sources["end_of_text"] = _TOKENIZER if closes is None else here
    sources |= {"prompts": _MAIN} if prompts else {}
    sources |= {"dense": "modules.json"} if dense else {}
    adapter = first if rest else None
    facts = (dense, dimension, config, row["name"], sources)
    return Opened(found, base, adapter, words, ends, *facts)


def _read(path: Path, kind: str, unknown: list[str], *, needed: bool = False) -> Object:
    """A side file, checked; {} if there is none. Keys without a field are added to `unknown`."""
    if needed and not path.is_file():
        raise ValueError(f"{path.parent}: expected a folder with {path.name}, found none")
    if not path.is_file():
        return {}
    found = schema.read_object(path, FIELDS[kind], extra=True)
    for key in found.keys() & FIELDS[kind].keys() & FIELDS.keys():
        if problem := problem_with(found[key], FIELDS[key], extra=key.startswith("rope")):
            raise ValueError(f"{path}: {key}: {problem}")
    others = sorted(found.keys() - FIELDS[kind])
    unknown += [f"{key} of {path.name}" for key in others if found[key]]
    return found


def read_config(folder: Path, unknown: list[str] | None = None) -> Object:
    """Read `config.json`, with the keys of its rotary embeddings beside the others.

    Raises ValueError if it is missing, damaged or of a decoder that is not built.
    """
    path = folder / "config.json"
    raw: Object = read_json(path) if path.is_file() else {}
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if isinstance(kind, str) and kind not in {"qwen2", "qwen3"}:
        expected = f"model_type: expected qwen2 or qwen3, found {kind!r}"
        raise ValueError(f"{path}: {expected}{_advice(kind)}")
    config = _read(path, "config.json", [] if unknown is None else unknown, needed=True)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # transformers 5, 4
    config |= {key: rope[key] for key in FIELDS["rope_parameters"] & rope.keys()}
    for key in ("rope_theta", "rms_norm_eps"):
        if config.get(key, raw.get(key, 0)) is None:
            raise ValueError(f"{path}: expected {key!r} to be a number above 0, found null")
    if kind == "qwen3" and config.get("attention_bias"):
        raise ValueError(f"{path}: Qwen3 with biases is not built")
    window, layers = config.get("sliding_window") or 0, config.get("layer_types", [])
    if not layers and config.get("use_sliding_window") and window:
        slides = config["num_hidden_layers"] > config.get("max_window_layers", 28)
        layers = ["sliding_attention"] if slides else []
    if {*layers} - {"full_attention"} and window < config.get("max_position_embeddings", 32_768):
        raise ValueError(f"{path}: sliding-window attention is in use and is not built")
    return config


def _stated_attention(path: Path, config: Object) -> bool | None:
    """Whether attention is causal, by any of the keys under which others look for it."""
    both_ways = config.get("use_bidirectional_attention")
    is_named = any("Bidirectional" in name for name in config.get("architectures", []))
    modes = {config.get("is_causal"), None if both_ways is None else not both_ways}
    modes = (modes | {False} if is_named else modes) - {None}
    if len(modes) > 1:
        keys = "is_causal, use_bidirectional_attention and architectures"
        raise ValueError(f"{path}: {keys} contradict one another; pass causal=True or causal=False")
    return modes.pop() if modes else None


def _remote_class(table: Object, key: str) -> tuple[str | None, str]:
    """The class that auto_map names for `key`, or else for anything, and its repository or ""."""
    mapping = table.get("auto_map") or {}
    names = mapping.get(key) or next(iter(mapping.values()), None)
    name = next(filter(None, names if isinstance(names, list) else [names]), None)
    owner, _, name = ("" if name is None else str(name)).rpartition("--")
    return name or None, owner


def _advice(found: str) -> str:
    """What to use instead of something that is not built, where there is something."""
    known = (text for key, text in _FACTS["refused"].items() if key.lower() in found.lower())
    return "".join(f" ({text})" for text in [*known][:1])


def _read_modules(
    folder: Path, size: int, unknown: list[str]
) -> tuple[Pooling | None, Path | None, int]:
    """Pooling, folder of a Dense module and dimension, by modules.json; hidden states have `size`.

    Raises ValueError for a module or an order of modules that is not built.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None, None, size
    modules = read_json(path)
    if not isinstance(modules, list) or not modules:
        raise ValueError(f"{path}: expected a list of modules, found {schema.describe(modules)}")
    places: dict[str, Path] = {}
    for number, module in enumerate(modules, 1):
        problem = f"expected an object, found {schema.describe(module)}"
        if not isinstance(module, dict) or (problem := problem_with(module, FIELDS[path.name])):
            raise ValueError(f"{path}: module {number}: {problem}")
        package, _, kind = (name := module["type"]).rpartition(".")
        ours = package.partition(".")[0] == "sentence_transformers" and kind not in places
        places[kind if ours else name] = folder / (module.get("path") or "")
        if [*places] != [one for one in _MODULES if one in places]:
            order = f"expected {', '.join(_MODULES)} in this order"
            raise ValueError(f"{path}: the module {name} is not built here{_advice(name)}; {order}")
    if places.get("Transformer", folder) != folder:
        raise ValueError(f"{path}: expected the Transformer in the folder itself, found a path")
    dense, pooling = places.get("Dense"), places.get("Pooling")
    if dense is not None:
        size = _read(dense / "config.json", "Dense", unknown, needed=True)["out_features"]
    return pooling and _read_pooling(pooling / "config.json", unknown), dense, size


def _read_pooling(path: Path, unknown: list[str]) -> Pooling:
    """The mode in a new (`pooling_mode`) or old (six booleans) file."""
    stated, prefix = _read(path, "Pooling", unknown, needed=True), "pooling_mode_"
    flags = [key for key in FIELDS["Pooling"] if key.startswith(prefix) and stated.get(key)]
    named = [key.removeprefix(prefix).removesuffix("_tokens") for key in flags]
    modes = stated.get("pooling_mode") or named or "mean"
    modes = [modes] if isinstance(modes, str) else modes
    if modes not in (["mean"], ["lasttoken"]):
        found = ", ".join(map(str, modes))
        raise ValueError(f"{path}: expected pooling mean or lasttoken, found {found}")
    return "mean" if modes == ["mean"] else "lasttoken"


def write_settings(
    folder: Path, settings: Settings, size: int, *, dense: bool, adapter_base: str | None = None
) -> None:
    """Write the files that make the folder a sentence-transformers model, and a card for people.

    `size` is that of a hidden state; `adapter_base` names the base model if the folder holds only an
    adapter. The weights and settings of a Dense module are written with the decoder's.
    """
    kinds = [kind for kind in _MODULES if dense or kind != "Dense"]
    places = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    names = ("prompts", "default_prompt_name", "similarity_fn_name", "instruction_template")
    main: dict[str, object] = {name: getattr(settings, name) for name in names}
    if not settings.causal:
        reason = "older versions ignore is_causal in config.json and would attend causally"
        main["requirements"] = {"transformers": {"specifier": ">=5.2", "reason": reason}}
    bert: dict[str, object] = {"max_seq_length": settings.max_length, "do_lower_case": False}
    if adapter_base:  # config.json is the base's and may state another mode
        bert["config_args"] = {"is_causal": settings.causal}
    modes = {
        f"pooling_mode_{mode}": mode.startswith(settings.pooling)
        for mode in ("cls_token", "max_tokens", "mean_tokens", "lasttoken")
    } | {"include_prompt": True}
    files = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(zip(places, kinds, strict=True))
        ],
        f"{places[1]}/config.json": {"word_embedding_dimension": size} | modes,
        _BERT: bert,
        _MAIN: main,
    }
    for name, value in files.items():
        write_json(folder / name, value)
    (folder / places[-1]).mkdir()
    mode = "causal" if settings.causal else "bidirectional (transformers >= 5.2 only)"
    adapter = f" A LoRA adapter on `{adapter_base}`." if adapter_base else ""
    card = f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, kalm-embedding]
---

A text embedding model with {mode} attention, {settings.pooling} pooling and L2-normalised vectors of
{settings.max_length} tokens at most.{adapter}
An instruction is put before a query as `{settings.instruction_template!r}`.
"""
    write_text(folder / "README.md", card)
