"""What makes a decoder an embedder: resolved from the files of its folder, and written back.

    config.json, modules.json, 1_Pooling, 2_Dense, sentence_bert_config.json,
    config_sentence_transformers.json, tokenizer_config.json      open_folder, write_settings
    model/released.json       what released checkpoints need and their files do not state

A wrong guess here raises no error and only lowers scores. So every key of these files is used, known
to be harmless, or refused, and one that is none of these is named in a warning. Remote code is never
run: the classes that files name are only recognised. Nothing here needs torch.
"""

import json
import re
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from kalm_min.files import Object, checkpoint_folders, read_json, write_json, write_text
from kalm_min.schema import (
    Field,
    describe,
    is_flag,
    is_number,
    is_string,
    is_text,
    is_whole,
    problem_with,
    read_object,
)

Pooling = Literal["mean", "lasttoken"]
"""sentence-transformers' names."""
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]

KALM_TEMPLATE = "Instruct: {instruction} \n Query: "
"""A space before and after the newline, as in the official code and mteb (V1 section 1.6)."""
_PLACEHOLDER = "{instruction}"
# A stored prompt of this form shows the template of all instructions.
_PROMPT = re.compile(r"(Instruct:\s*)\S.*?(\s*\n\s*Query:\s*)", re.DOTALL)

SIZES = ["vocab_size", "hidden_size", "intermediate_size"]
SIZES += ["num_hidden_layers", "num_attention_heads"]  # what every config.json must state

_FACTS: Object = read_json(Path(__file__).with_name("model") / "released.json")


_KINDS = ["Transformer", "Pooling", "Dense", "Normalize"]  # the modules that are built
DENSE = "2_Dense"  # the folder of the third one, as it is written here
_ANY = Field("anything", lambda _: True)


def _fields(file: str, **used: Field) -> dict[str, Field]:
    """What the keys of a file may hold: those used here, and those of released.json."""
    known = dict.fromkeys(_FACTS["keys"][file]["harmless"], _ANY)
    for key, values in _FACTS["keys"][file]["only"].items():
        stated = " or ".join(map(json.dumps, values)) or "absent"
        known[key] = Field(f"{stated} (no other value is computed here)", values.__contains__)
    return known | used


def is_name(value: object) -> bool:
    """A plain name of a file or folder, not a path."""
    return is_string(value) and Path(value).name == value


[IDENTITY] = _FACTS["keys"]["Dense"]["only"]["activation_function"]
_SIZE = Field("a whole number of at least 1", partial(is_whole, least=1))
_NEEDED = Field(_SIZE.expected, _SIZE.fits, required=True)
_ABOVE_0 = Field("a number above 0", partial(is_number, least=1e-30))
_WHOLE, _FLAG = Field("a whole number", is_whole), Field("true or false", is_flag)
_TEXT, _NAMES = Field("a string", is_string), Field("a list of names", is_text, items=0)
_OBJECT = Field("an object", lambda value: isinstance(value, dict))
_TEXTS = Field(
    "an object of strings",
    lambda value: (
        isinstance(value, dict) and all(x is None or is_string(x) for x in value.values())
    ),
)
_CONFIG = _fields(
    "config.json",
    model_type=Field("qwen2 or qwen3", is_text, required=True),
    **dict.fromkeys(SIZES, _NEEDED),
    **dict.fromkeys(["num_key_value_heads", "head_dim", "max_position_embeddings"], _SIZE),
    **dict.fromkeys(["max_window_layers", "sliding_window"], _WHOLE),
    **dict.fromkeys(["rms_norm_eps", "rope_theta"], _ABOVE_0),
    initializer_range=Field("a number", is_number),
    **dict.fromkeys(["is_causal", "use_bidirectional_attention", "attention_bias"], _FLAG),
    **dict.fromkeys(["tie_word_embeddings", "use_sliding_window"], _FLAG),
    **dict.fromkeys(["rope_parameters", "rope_scaling", "auto_map"], _OBJECT),
    **dict.fromkeys(["architectures", "layer_types"], _NAMES),
    quantization_config=Field("absent: quantised weights cannot be read", lambda _: False),
)
_UNSCALED = Field("default (scaled rotary embeddings are not built)", ["default"].__contains__)
_ROPE = {"rope_theta": _ABOVE_0, "rope_type": _UNSCALED, "type": _UNSCALED}
_ROPE["partial_rotary_factor"] = _CONFIG["partial_rotary_factor"]
_MODULE = _fields(
    "modules.json",
    type=Field("the name of a class", is_text, required=True),
    path=Field("the name of a folder", is_name),
)
_FLAGS = ["cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens"]
_FLAGS += ["weightedmean_tokens", "lasttoken"]
_POOLING = _fields(
    "Pooling",
    pooling_mode=Field("a name or a list of names", lambda mode: isinstance(mode, str | list)),
    **{f"pooling_mode_{name}": _FLAG for name in _FLAGS},
)
_DENSE = _fields("Dense", in_features=_NEEDED, out_features=_NEEDED, bias=_FLAG)
_BERT = _fields(
    "sentence_bert_config.json",
    max_seq_length=_SIZE,
    modality_config=Field(
        'text alone (with "message", each text is put into the chat template, which is not done '
        "here; to save the model for plain text, keep only the entry text of "
        "model[0].modality_config in sentence-transformers)",
        lambda value: isinstance(value, dict) and [*value] == ["text"],
    ),
    **dict.fromkeys(
        ["tokenizer_args", "processor_kwargs", "config_args", "config_kwargs"], _OBJECT
    ),
)
_MODES = {"is_causal": _FLAG} | dict.fromkeys(["trust_remote_code", "attn_implementation"], _ANY)
_MAIN = _fields(
    "config_sentence_transformers.json",
    prompts=_TEXTS,
    default_prompt_name=_TEXT,
    similarity_fn_name=Field(" or ".join(get_args(Similarity)), get_args(Similarity).__contains__),
    instruction_template=_TEXT,
)
_TOKENIZER = _fields(
    "tokenizer_config.json",
    # transformers writes 10^30 where there is no limit.
    model_max_length=Field("a number of at least 1", partial(is_number, least=1, most=1e31)),
    eos_token=Field("a token", lambda token: is_string(token_text(token))),
    add_eos_token=_FLAG,
    auto_map=_OBJECT,
)


def token_text(token: object) -> object:
    """The text of a token, which a file states alone or as the `content` of an object."""
    return token.get("content") if isinstance(token, dict) else token


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
    model: Path
    """The folder with config.json and the weights: of the base, if there is an adapter."""
    adapter: Path | None
    """The folder of a LoRA adapter."""
    tokenizer: Path
    """The folder with tokenizer.json."""
    end_of_text: bool
    """Whether the end-of-text token must close every text, if tokenizer.json does not do it."""
    dense: Path | None
    """The folder of a Dense module, a linear map of the pooled vector."""
    dimension: int
    """Coordinates of a full vector."""
    config: Object
    """What config.json states."""
    released: str
    """The name of its entry in released.json, or ""."""
    sources: dict[str, str]
    """For each setting the file, the entry or the rule that decided."""


def open_folder(path_or_hub_id: str | Path, **given: Any) -> Opened:
    """Resolve what a checkpoint says about itself.

    `given` may hold `causal`, `pooling` and `max_length`; those that are not None win. Raises
    ValueError, one sentence, for what is missing, damaged, contradictory or not built.
    """
    first, *rest = checkpoint_folders(path_or_hub_id)
    base, name = (rest or [first])[0], str(path_or_hub_id)
    if rest:
        name = str(read_json(first / "adapter_config.json")["base_model_name_or_path"])
    folder, words = (
        first if (first / file).is_file() else base for file in ("modules.json", "tokenizer.json")
    )
    unknown: list[str] = []
    config = read_config(base, unknown)
    main = _read(folder / "config_sentence_transformers.json", _MAIN, unknown)
    bert = _read(folder / "sentence_bert_config.json", _BERT, unknown)
    tokens = _read(words / "tokenizer_config.json", _TOKENIZER, unknown)
    changes = dict[str, Any]()  # what sentence-transformers would put over the two files
    for kind, fields in (("tokenizer", _TOKENIZER), ("processor", _TOKENIZER), ("config", _MODES)):
        for key in (f"{kind}_args", f"{kind}_kwargs"):
            if problem := problem_with(bert.get(key, {}), fields):
                raise ValueError(f"{folder / 'sentence_bert_config.json'}: {key}: {problem}")
            changes |= bert.get(key, {})
    tokens |= changes
    pooled, dense, dimension = _read_modules(folder, config["hidden_size"], unknown)
    if unknown:
        warnings.warn(
            f"{first}: the keys {', '.join(unknown)} are not known here and play no part",
            stacklevel=3,
        )
    sources: dict[str, str] = {}

    def choose(setting: str, *candidates: tuple[Any, str]) -> Any:
        """The first value that is not None."""
        stated = [(given.get(setting), "the caller"), *candidates]
        value, sources[setting] = next(pair for pair in stated if pair[0] is not None)
        return value

    path, (code, owner) = base / "config.json", _remote_class(config, "AutoModel")
    facts = {"code": code, "tokenizer_code": _remote_class(tokens, "AutoTokenizer")[0]}
    facts |= {"model_type": config["model_type"], "pooling": pooled}
    row: Object = {"name": ""}
    for one in reversed(_FACTS["models"]):  # so that the first one wins
        if one.get("match") and one["match"].items() <= facts.items():
            row = one
    row = next((one for one in _FACTS["models"] if {name, owner} & {*one["ids"]}), row)
    here = f"released.json: {row['name']}"
    is_explicit = {given.get("causal"), changes.get("is_causal")} != {None}
    stated = None if is_explicit else _stated_attention(path, config)
    causal = choose(
        "causal",
        (changes.get("is_causal"), "sentence_bert_config.json"),
        (stated, "config.json"),
        (row.get("causal"), here),
        (None if code else True, f"no file, so {config['model_type']}'s own mode"),
        ("?", ""),
    )
    if causal == "?" or (code and not row["name"] and _advice(code)):
        raise ValueError(
            f"{path}: expected to know what the remote code {code} does, which is never run"
            + (_advice(code or "") or "; pass causal=True or causal=False, as its authors say")
        )
    if pooled is None and (folder / "modules.json").is_file() and not given.get("pooling"):
        raise ValueError(f"{folder / 'modules.json'}: expected a Pooling module, found none")
    is_chat = any(kind.endswith("ForCausalLM") for kind in config.get("architectures", [])[:1])
    default = "lasttoken" if is_chat and causal else "mean"
    rule = "no file, so the rule of sentence-transformers"
    pooling = choose(
        "pooling", (pooled, "modules.json"), (row.get("pooling"), here), (default, rule)
    )
    if sources["pooling"] == rule:
        taken = "its last token" if pooling == "lasttoken" else "the mean of its tokens"
        warnings.warn(
            f"{folder}: no modules.json says what becomes a text's vector; {taken} does, as in "
            'sentence-transformers (pooling="mean" or "lasttoken" chooses)',
            stacklevel=3,
        )
    positions = config.get("max_position_embeddings", 32_768)
    limits = [(bert.get("max_seq_length"), "sentence_bert_config.json")]
    if limits[0][0] is None:
        limits = [(tokens.get("model_max_length"), "tokenizer_config.json")]
        limits += [(positions, "config.json")]
    limits = [limit for limit in [*limits, (row.get("max_length"), here)] if limit[0] is not None]
    prompts = {key: text for key, text in main.get("prompts", {}).items() if text is not None}
    if "passage" in prompts:
        prompts.setdefault("document", prompts["passage"])
    usual = main.get("default_prompt_name")
    if usual is not None and usual not in prompts:
        raise ValueError(f"{folder}: expected the prompt {usual!r} among prompts, found none")
    shown = map(_PROMPT.fullmatch, [prompts.get("query", ""), *prompts.values()])
    shown = (_PLACEHOLDER.join(match.groups()) for match in shown if match)
    template = choose(
        "instruction_template",
        (main.get("instruction_template"), "config_sentence_transformers.json"),
        (next(shown, None), "the prompts in config_sentence_transformers.json"),
        (row.get("template"), here),
        (KALM_TEMPLATE, "no file, so KaLM's"),
    )
    sources |= {"prompts": "config_sentence_transformers.json"} if prompts else {}
    sources |= {"dense": "modules.json"} if dense else {}
    closes = row.get("end_of_text")
    sources["end_of_text"] = "tokenizer_config.json" if closes is None else here
    return Opened(
        Settings(
            causal=causal,
            pooling=pooling,
            max_length=choose("max_length", min(limits, key=lambda limit: limit[0])),
            prompts=prompts,
            instruction_template=check_template(template, f"{folder}: instruction_template"),
            default_prompt_name=usual,
            similarity_fn_name=main.get("similarity_fn_name", "cosine"),
        ),
        model=base,
        adapter=first if rest else None,
        tokenizer=words,
        end_of_text=closes is not False and tokens.get("add_eos_token", bool(closes)),
        dense=dense,
        dimension=dimension,
        config=config,
        released=row["name"],
        sources=sources,
    )


def _read(path: Path, fields: dict[str, Field], unknown: list[str]) -> Object:
    """A side file, checked; {} if there is none. Keys without a field are added to `unknown`."""
    if not path.is_file():
        return {}
    found = read_object(path, fields, extra=True)
    unknown += [f"{key} of {path.name}" for key in sorted(found.keys() - fields) if found[key]]
    return found


def read_config(folder: Path, unknown: list[str] | None = None) -> Object:
    """Read `config.json`, with the keys of its rotary embeddings beside the others.

    Raises ValueError if it is missing, damaged or of a decoder that is not built.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: expected a model folder with config.json, found none")
    raw = read_json(path)
    raw = raw if isinstance(raw, dict) else {}
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind not in {"qwen2", "qwen3"}:
        expected = f"model_type: expected qwen2 or qwen3, found {kind!r}"
        raise ValueError(f"{path}: {expected}{_advice(kind)}")
    config = _read(path, _CONFIG, [] if unknown is None else unknown)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # transformers 5, 4
    if problem := problem_with(rope, _ROPE, extra=True):
        raise ValueError(f"{path}: {problem}")
    config |= {key: rope[key] for key in _ROPE.keys() & rope}
    for key in ("rope_theta", "rms_norm_eps"):
        if raw.get(key, 0) is None and key not in config:
            raise ValueError(f"{path}: expected {key!r} to be {_ABOVE_0.expected}, found null")
    if kind == "qwen3" and config.get("attention_bias"):
        raise ValueError(f"{path}: Qwen3 with biases is not built")
    window, layers = config.get("sliding_window"), config.get("layer_types", [])
    if not layers and config.get("use_sliding_window") and window is not None:
        slides = config["num_hidden_layers"] > config.get("max_window_layers", 28)
        layers = ["sliding_attention"] if slides else []
    longest = config.get("max_position_embeddings", 32_768)
    if {*layers} - {"full_attention"} and (window or 0) < longest:
        raise ValueError(f"{path}: sliding-window attention is in use and is not built")
    return config


def _stated_attention(path: Path, config: Object) -> bool | None:
    """Whether attention is causal, by any of the keys under which others look for it."""
    stated = [config.get("is_causal")]
    if (both_ways := config.get("use_bidirectional_attention")) is not None:
        stated.append(not both_ways)
    if any("Bidirectional" in name for name in config.get("architectures", [])):
        stated.append(False)
    modes = {mode for mode in stated if mode is not None}
    if len(modes) > 1:
        raise ValueError(
            f"{path}: is_causal, use_bidirectional_attention and architectures contradict one "
            "another; pass causal=True or causal=False"
        )
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
    """The pooling, the folder of a Dense module and the dimension, by modules.json, if there is one.

    Raises ValueError for a module or an order of modules that is not built.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None, None, size
    modules = read_json(path)
    if not isinstance(modules, list) or not modules:
        raise ValueError(f"{path}: expected a list of modules, found {describe(modules)}")
    places: dict[str, Path] = {}
    for number, module in enumerate(modules, 1):
        if not isinstance(module, dict):
            raise ValueError(f"{path}: module {number}: expected an object, found {module!r:.60}")
        if problem := problem_with(module, _MODULE):
            raise ValueError(f"{path}: module {number}: {problem}")
        package, _, kind = module["type"].rpartition(".")
        if package.partition(".")[0] != "sentence_transformers" or kind in places:
            kind = module["type"]
        if [*places, kind] != [one for one in _KINDS if one in {*places, kind}]:
            expected = f"expected {', '.join(_KINDS)} in this order"
            raise ValueError(
                f"{path}: the module {module['type']} is not built here{_advice(kind)}; {expected}"
            )
        places[kind] = folder / module.get("path", "")
    if places.get("Transformer", folder) != folder:
        raise ValueError(f"{path}: expected the Transformer at the folder itself")
    pooling = None
    if "Pooling" in places:
        pooling = _read_pooling(places["Pooling"] / "config.json", unknown)
    dense = places.get("Dense")
    if dense is None:
        return pooling, None, size
    stated = _read(dense / "config.json", _DENSE, unknown)
    if stated.get("in_features") != size or "activation_function" not in stated:
        found = f"found {describe(stated.get('in_features'))}"
        raise ValueError(
            f"{dense / 'config.json'}: expected in_features {size} and the activation_function "
            f"{IDENTITY}, {found}"
        )
    return pooling, dense, stated["out_features"]


def _read_pooling(path: Path, unknown: list[str]) -> Pooling:
    """The mode in a new (`pooling_mode`) or old (six booleans) file."""
    if not path.is_file():
        raise ValueError(f"{path}: expected the settings of the Pooling module, found none")
    stated = _read(path, _POOLING, unknown)
    flags = [name for name in _FLAGS if stated.get(f"pooling_mode_{name}")]
    modes = stated.get("pooling_mode") or [name.removesuffix("_tokens") for name in flags]
    match [modes] if isinstance(modes, str) else modes or ["mean"]:
        case ["mean" | "lasttoken" as mode]:
            return mode
        case _:
            found = ", ".join(map(str, [modes] if isinstance(modes, str) else modes))
            raise ValueError(f"{path}: expected pooling mean or lasttoken, found {found}")


def write_settings(
    folder: Path, settings: Settings, size: int, *, dense: bool, adapter_base: str | None = None
) -> None:
    """Write the files that make the folder a sentence-transformers model, and a card for people.

    `size` is that of a hidden state; `adapter_base` names the base model if the folder holds only an
    adapter. The weights and settings of a Dense module are written with the decoder's.
    """
    kinds = [kind for kind in _KINDS if dense or kind != "Dense"]
    places = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
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
            for i, (path, kind) in enumerate(zip(places, kinds, strict=True))
        ],
        f"{places[1]}/config.json": {
            "word_embedding_dimension": size,
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
