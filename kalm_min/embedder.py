"""Texts in, vectors out: a decoder, its tokenizer, and the choices that make it an embedder.

Attention mode, pooling, prompts, maximum length and the end-of-text rule belong to a checkpoint: a
wrong one raises nothing and only lowers scores. They are read once, here, from the files that
sentence-transformers and transformers read, and written back on save, so that a saved folder gives
the same vectors in all three.

    text -> ids -> batches of at most `tokens_per_batch` tokens -> hidden states -> pool -> unit length

Not here: other model modules (a Dense layer after pooling, say) are refused, remote code is never run.
"""

import warnings
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm  # comes with tokenizers, through huggingface_hub

from kalm_min.files import atomic_directory, model_folder, read_json, write_json, write_text
from kalm_min.model import (
    Packed,
    Pooling,
    Qwen2,
    load_config,
    load_model,
    pool,
    save_model,
    truncate,
)
from kalm_min.model.lora import (
    ADAPTER_CONFIG,
    Adapter,
    load_adapter,
    merge,
    merged_state,
    read_adapter,
    save_adapter,
)
from kalm_min.sampling import token_budget_batches
from kalm_min.tokenizer import Tokenizer, check_texts, prefetch

KALM_TEMPLATE = "Instruct: {instruction} \n Query: "
"""A space before and after the newline: the form of the official code and of mteb (V1 section 1.6)."""

# Checkpoints whose config.json leaves the attention mode to remote code; from the V2 report.
_BIDIRECTIONAL = {
    "HIT-TMG/KaLM-embedding-multilingual-mini-instruct-v2",
    "KaLM-Embedding/KaLM-embedding-multilingual-mini-instruct-v2",
    "KaLM-Embedding/KaLM-embedding-multilingual-mini-instruct-v2.5",
    "HIT-TMG/KaLM-embedding-multilingual-mini-instruct-v2.5",
}
_WINDOW = 4096  # texts tokenised at a time, while the ones before are embedded
# Tokens of one forward. On a CPU about a cache-full is fastest (1024 to 2048 were, measured on two
# cores); a GPU wants enough rows to fill its products.
_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32_768}
# A text shares a prompt's tokens where its own are at most so many times as many: beyond that the
# attention, which must mask instead of skip, costs more than the rest saves.
_WORTH_SHARING = 8

Vectors = NDArray[np.float32]


class Embedder:
    """A text embedding model. Build one with `from_pretrained`."""

    def __init__(
        self,
        model: Qwen2,
        tokenizer: Tokenizer,
        *,
        causal: bool,
        pooling: Pooling = "mean",
        max_length: int = 512,
        prompts: dict[str, str] | None = None,
        instruction_template: str = KALM_TEMPLATE,
    ) -> None:
        """Join a decoder and a tokenizer.

        Args:
            model: the decoder; it is used where and in the dtype it is.
            tokenizer: its tokenizer, whose ids must all have a row in the embedding table.
            causal: the attention mode it was trained with.
            pooling: "mean" or "lasttoken".
            max_length: tokens kept of a text, prompt and end-of-text token included.
            prompts: texts put before queries and documents, by the names "query" and "document".
            instruction_template: how a task instruction becomes a prompt; holds "{instruction}".
        """
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the embedding table "
                f"{model.config.vocab_size} rows; they are not of one checkpoint"
            )
        if max_length < 1:
            raise ValueError(f"max_length: expected at least 1 token, found {max_length}")
        if pooling not in {"mean", "lasttoken"}:
            raise ValueError(f'pooling: expected "mean" or "lasttoken", found {pooling!r}')
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.causal = causal
        self.pooling: Pooling = pooling
        self.max_length = max_length
        self.prompts = {"query": "", "document": ""} | (prompts or {})
        self.instruction_template = instruction_template
        self.adapter: Adapter | None = None
        """Set while the model carries an adapter that is not merged (during training)."""
        self.tokens_per_batch = _TOKENS_PER_BATCH.get(self.device.type, 2048)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        causal: bool | None = None,
        pooling: Pooling | None = None,
        max_length: int | None = None,
    ) -> Self:
        """Load a folder, or a repository of the Hugging Face hub. An existing path never uses the network.

        A folder with an adapter (LoRA, in PEFT's files) is read over the base model it names: merged,
        and with the base's tokenizer and settings where the folder has none of its own.

        Args:
            path_or_hub_id: a folder with config.json, safetensors and tokenizer.json, or a hub id.
            device: None takes the first GPU, else the CPU.
            dtype: None takes bfloat16 where the device computes it natively, else float32; "auto"
                leaves the weights as they are stored.
            causal: None takes `is_causal` of config.json, else causal, Qwen2's own mode.
            pooling: None takes 1_Pooling/config.json, else mean.
            max_length: None takes the folder's, else the model's longest position.

        Raises:
            ValueError: one sentence for anything missing, damaged or not implemented.
        """
        folder = model_folder(path_or_hub_id)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None:
            dtype = fastest_safe_dtype(device)
        base, name = _base(folder, str(path_or_hub_id))
        home = {
            file: folder if (folder / file).is_file() else base
            for file in ("modules.json", "tokenizer.json")
        }
        side = _read_side_files(home["modules.json"])
        own_mode = side["causal"] if base != folder else None
        config = load_config(base)
        model = load_model(base, dtype=_torch_dtype(dtype), device=device)
        if base != folder:
            load_adapter(model, folder)
            merge(model)
        return cls(
            model,
            Tokenizer.from_folder(home["tokenizer.json"]),
            causal=_attention_mode(base, name, config.is_causal if own_mode is None else own_mode)
            if causal is None
            else causal,
            pooling=pooling or side["pooling"],
            max_length=max_length or side["max_length"] or config.max_position_embeddings,
            prompts=side["prompts"],
            instruction_template=side["instruction_template"],
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the decoder computes in."""
        return self.model.norm.weight.dtype

    @property
    def dimension(self) -> int:
        """Width of a full vector."""
        return self.model.config.hidden_size

    def encode(
        self,
        texts: str | Sequence[str],
        prompt: str = "",
        truncate_dim: int | None = None,
        normalize_embeddings: bool = True,
        show_progress_bar: bool = False,
    ) -> Vectors:
        """Embed texts.

        A text gives the same vector whatever it is encoded with. Equal texts are computed once. A
        text without a token (an empty one without prompt) gives a zero vector, as mean pooling over
        nothing does in sentence-transformers.

        Args:
            texts: one text or a sequence of them.
            prompt: put before every text.
            truncate_dim: keep this many leading coordinates (Matryoshka).
            normalize_embeddings: scale to unit length, after the truncation.
            show_progress_bar: draw a bar on the terminal.

        Returns:
            (n, d) float32 in the order given; (d,) for a single text.

        Raises:
            ValueError: naming the first text that is not a string or not valid Unicode.
        """
        if isinstance(texts, str):
            return self.encode([texts], prompt, truncate_dim, normalize_embeddings)[0]
        check_texts([*texts, prompt])
        unique = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        vectors = torch.zeros(len(unique), self.dimension)
        with tqdm(total=len(unique), unit="text", disable=not show_progress_bar) as bar:
            for rows, block in self._embed_unique(list(unique), prompt):
                vectors[rows] = block
                bar.update(len(rows))
        vectors = truncate(vectors, truncate_dim, normalize=normalize_embeddings)
        return vectors.numpy()[[unique[text] for text in texts]]

    def encode_query(self, texts: str | Sequence[str], **options: Any) -> Vectors:
        """`encode` with the checkpoint's query prompt."""
        return self.encode(texts, self.prompts["query"], **options)

    def encode_document(self, texts: str | Sequence[str], **options: Any) -> Vectors:
        """`encode` with the checkpoint's document prompt."""
        return self.encode(texts, self.prompts["document"], **options)

    def similarity(self, a: Vectors, b: Vectors) -> Vectors:
        """Cosine similarity of every row of a (n, d) with every row of b (m, d): (n, m) float32."""
        left, right = (truncate(torch.from_numpy(np.atleast_2d(x)), None) for x in (a, b))
        return (left @ right.T).numpy()

    def _embed_unique(self, texts: list[str], prompt: str) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (rows, (len(rows), D) raw vectors on the CPU), the longest texts first.

        Longest first: what does not fit in memory fails at once, not after an hour.
        """
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        windows = [order[start : start + _WINDOW] for start in range(0, len(order), _WINDOW)]
        shared = self._shared_prefix(prompt)

        def tokenized(window: list[int]) -> list[list[int]]:
            chosen = [texts[row] for row in window]
            return self.tokenizer.encode(chosen, prompt, max_length=self.max_length)

        for window, sequences in zip(windows, prefetch(tokenized, windows), strict=True):
            for prefix, places in _by_prefix(sequences, shared):
                own = [sequences[place][len(prefix) :] for place in places]
                for batch in token_budget_batches([*map(len, own)], self.tokens_per_batch):
                    rows = [window[places[i]] for i in batch]
                    yield rows, self._embed([own[i] for i in batch], prefix)

    def _shared_prefix(self, prompt: str) -> list[int]:
        """The tokens that a causal model needs to read once for all texts under `prompt`.

        The last tokens of a prompt may join with what follows; those that do not with one letter
        are taken, and a text that still begins otherwise does not share.
        """
        if not (self.causal and prompt):
            return []
        alone, followed = self.tokenizer.encode(["", "a"], prompt, max_length=self.max_length)
        pairs = zip(alone, followed, strict=False)
        return [token for token, other in takewhile(lambda pair: pair[0] == pair[1], pairs)]

    @torch.no_grad()  # not inference_mode: sharded parameters gathered in it could not train on
    def _embed(self, sequences: list[list[int]], prefix: list[int]) -> Tensor:
        """(B, D) raw float32 vectors on the CPU; halves the batch when the device's memory is full."""
        try:
            packed = Packed.from_sequences(sequences, self.device, prefix)
            hidden = self.model(packed, causal=self.causal)  # (T, D)
            return pool(hidden, packed.cu_seqlens, self.pooling, len(prefix)).cpu()
        except torch.OutOfMemoryError:
            if len(sequences) == 1:
                raise
        # Outside the handler, so that the failed tensors are gone before the next try.
        torch.cuda.empty_cache()
        self.tokens_per_batch = max(1, self.tokens_per_batch // 2)
        half = len(sequences) // 2
        parts = sequences[:half], sequences[half:]
        return torch.cat([self._embed(part, prefix) for part in parts])

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that this package, transformers and sentence-transformers open alike.

        transformers honours the attention mode of a bidirectional model from 5.2 on; the folder
        tells sentence-transformers to refuse an older one instead of reading causally. An adapter
        is merged into what is written; the model itself keeps it apart.
        """
        with atomic_directory(path) as folder:
            self.write_files(folder)

    def write_files(
        self, folder: Path, state: dict[str, Tensor] | None = None, *, merged: bool = True
    ) -> None:
        """`save_pretrained` into a folder that the caller makes complete or absent.

        Args:
            folder: exists.
            state: the weights, by name, where the model's own are spread over processes.
            merged: False writes an adapter by itself, naming its base.
        """
        state = self.model.state_dict() if state is None else state
        apart = self.adapter is not None and not merged
        if self.adapter and apart:
            # Without config.json: beside one, transformers takes the folder for a whole model.
            save_adapter(state, folder, self.adapter)
        else:
            if self.adapter:
                state = merged_state(state, self.adapter.config.scale)
            save_model(self.model, folder, causal=self.causal, state=state)
        self.tokenizer.save(folder, max_length=self.max_length)
        _write_side_files(folder, self, apart=apart)


def _by_prefix(
    sequences: list[list[int]], shared: list[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """(prefix, places of the sequences that have something after it), first those that share one.

    Which it is depends on a text alone, so that its vector does not depend on its company.
    """
    size, worth = len(shared), len(shared) * (1 + _WORTH_SHARING)
    shares = [size < len(ids) <= worth and ids[:size] == shared for ids in sequences]
    for prefix, wanted in ((shared, True), ([], False)):
        places = [i for i, ids in enumerate(sequences) if ids and shares[i] == wanted]
        if places:
            yield prefix, places


def _base(folder: Path, name: str) -> tuple[Path, str]:
    """Folder and name of the model whose weights are to be read: an adapter's base, or itself."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return folder, name
    base = read_adapter(folder).base
    try:
        return model_folder(base), base
    except ValueError as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path: {error}") from error


def _torch_dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """A torch dtype or its name; None for "auto"."""
    if dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f'dtype: expected a name like "float32" or "bfloat16", found {dtype!r}')
    return found


def fastest_safe_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is native (a product is then 7 to 9 times faster on a CPU), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return torch.bfloat16 if native else torch.float32


def _attention_mode(folder: Path, name: str, is_causal: bool | None) -> bool:
    """True for causal: what config.json says; else what is known of the checkpoint; else Qwen2's own."""
    if is_causal is not None:
        return is_causal
    if name in _BIDIRECTIONAL:
        return False
    if read_json(folder / "config.json").get("auto_map"):
        raise ValueError(
            f"{folder / 'config.json'}: the attention mode is left to remote code, which is never "
            "run; pass causal=False (KaLM v2 and v2.5) or causal=True"
        )
    return True


def _optional(path: Path) -> dict[str, Any]:
    """A JSON object, {} where the file is absent."""
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_side_files(folder: Path) -> dict[str, Any]:
    """What sentence-transformers' files say: causal, pooling, max_length, prompts, instruction_template."""
    modules = read_json(folder / "modules.json") if (folder / "modules.json").is_file() else []
    known = {"Transformer", "Pooling", "Normalize"}
    for module in modules:
        if module["type"].rsplit(".", 1)[-1] not in known:
            raise ValueError(f"{folder / 'modules.json'}: the module {module['type']} is not built")
    main = _optional(folder / "config_sentence_transformers.json")
    if main.get("default_prompt_name"):
        warnings.warn(
            f"{folder}: sentence-transformers would put the prompt {main['default_prompt_name']!r} "
            "before every text; here encode_query and encode_document use theirs, encode uses none",
            stacklevel=3,
        )
    prompts = {key: text for key, text in (main.get("prompts") or {}).items() if text is not None}
    if "passage" in prompts:
        prompts.setdefault("document", prompts["passage"])
    bert = _optional(folder / "sentence_bert_config.json")
    limit = bert.get("max_seq_length")
    return {
        "causal": (bert.get("config_args") or bert.get("config_kwargs") or {}).get("is_causal"),
        "pooling": _read_pooling(folder / "1_Pooling" / "config.json"),
        "max_length": limit or _tokenizer_limit(folder),
        "prompts": prompts,
        "instruction_template": main.get("instruction_template", KALM_TEMPLATE),
    }


def _tokenizer_limit(folder: Path) -> int | None:
    """`model_max_length`; transformers writes 10^30 for none."""
    limit = _optional(folder / "tokenizer_config.json").get("model_max_length")
    return limit if isinstance(limit, int) and limit < 10**9 else None


def _read_pooling(path: Path) -> Pooling:
    """The pooling mode of a new (`pooling_mode`) or old (six booleans) file; mean without a file."""
    settings = _optional(path)
    if not settings.get("include_prompt", True):
        raise ValueError(
            f"{path}: include_prompt false is not built, the prompt is pooled like text"
        )
    mode = settings.get("pooling_mode")
    if mode is None:
        prefix = "pooling_mode_"
        mode = [
            key.removeprefix(prefix).removesuffix("_tokens").replace("cls_token", "cls")
            for key, value in settings.items()
            if key.startswith(prefix) and value
        ] or ["mean"]
    modes = [mode] if isinstance(mode, str) else list(mode)
    if modes == ["mean"]:
        return "mean"
    if modes == ["lasttoken"]:
        return "lasttoken"
    raise ValueError(f"{path}: expected pooling mean or lasttoken, found {', '.join(modes)}")


def _write_side_files(folder: Path, embedder: Embedder, *, apart: bool) -> None:
    """The files that make the folder a sentence-transformers model, and a card for people.

    `apart`: the folder holds an adapter without its base.
    """
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    write_json(folder / "modules.json", modules)
    pooling = {f"pooling_mode_{mode}": False for mode in ("cls_token", "max_tokens")}
    pooling["pooling_mode_mean_tokens"] = embedder.pooling == "mean"
    pooling["pooling_mode_lasttoken"] = embedder.pooling == "lasttoken"
    pooling = {"word_embedding_dimension": embedder.dimension} | pooling | {"include_prompt": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    (folder / "2_Normalize").mkdir()
    bert: dict[str, Any] = {"max_seq_length": embedder.max_length, "do_lower_case": False}
    if apart:  # config.json is the base's, which may say otherwise
        bert["config_args"] = {"is_causal": embedder.causal}
    write_json(folder / "sentence_bert_config.json", bert)
    main: dict[str, Any] = {
        "prompts": embedder.prompts,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
        "instruction_template": embedder.instruction_template,
    }
    if not embedder.causal:
        reason = "older versions ignore is_causal in config.json and would attend causally"
        main["requirements"] = {"transformers": {"specifier": ">=5.2", "reason": reason}}
    write_json(folder / "config_sentence_transformers.json", main)
    write_text(folder / "README.md", _model_card(embedder, apart=apart))


def _model_card(embedder: Embedder, *, apart: bool) -> str:
    """What a person must know to use the vectors rightly."""
    base = f"\nA LoRA adapter on `{embedder.adapter.base}`.\n" if embedder.adapter and apart else ""
    mode = "causal" if embedder.causal else "bidirectional (transformers >= 5.2 only)"
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, kalm-embedding]
---

A text embedding model: {embedder.model.config.model_type}, {mode} attention, {embedder.pooling} pooling,
{embedder.dimension} dimensions, at most {embedder.max_length} tokens. Vectors are to be L2-normalised
(sentence-transformers does it from this folder). An instruction is put before a query as
`{embedder.instruction_template!r}`.
{base}"""
