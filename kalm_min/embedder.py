"""Texts in, vectors out: a decoder, its tokenizer, and the settings that make it an embedder.

    text -> ids -> batches of `tokens_per_batch` tokens at most -> hidden states -> unit vectors

Attention mode, pooling, prompts, maximum length and the end-of-text rule belong to a checkpoint; a
wrong value raises no error and only lowers scores. They are read from the files that sentence-
transformers and transformers read, and written back (`settings`), so that a saved folder gives the
same vectors in all three. Remote code is never run.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from functools import partial, reduce
from operator import attrgetter
from os.path import commonprefix
from pathlib import Path
from typing import Any, NoReturn, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm  # comes with tokenizers, through huggingface_hub

from kalm_min.files import atomic_directory, digest
from kalm_min.model import Packed, Qwen2, load_model, pool, quantize, save_model, truncate
from kalm_min.model.lora import Adapter, load_adapter, merge, merged_state, save_adapter
from kalm_min.sampling import token_budget_batches
from kalm_min.settings import (
    KALM_TEMPLATE,
    SHORT_NAMES,
    Opened,
    Pooling,
    Precision,
    Settings,
    Similarity,
    check_template,
    fill_template,
    open_folder,
    write_settings,
)
from kalm_min.tokenizer import Tokenizer, check_texts, prefetch

_WINDOW = 4096  # texts tokenised at a time, while the previous ones are embedded
# Tokens per forward pass. A CPU is fastest when they fit its cache (1024 to 2048, measured on two
# cores); a GPU needs enough rows to fill its matrix products.
_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32_768}
# A text shares the prompt's tokens if its other tokens are at most this many times as many. Beyond
# that, attention, which must mask instead of skip, costs more than sharing saves.
_WORTH_SHARING = 8

# Words of sentence-transformers and FlagEmbedding that `encode` refuses, and what to do instead.
_INSTEAD = dict.fromkeys(("device", "max_length"), "give it to from_pretrained") | {
    "convert_to_numpy": "convert_to_tensor=True gives one tensor of all vectors",
    "output_value": "only one vector per text is computed",
    "instruction": "give it to encode_query, or a complete prompt=...",
}
_DISTANCES = {"euclidean": 2.0, "manhattan": 1.0}

Rows = NDArray[Any] | Tensor | Sequence[NDArray[Any]] | Sequence[Sequence[float]]
Texts = str | Iterable[str]
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
        default_prompt_name: str | None = None,
        similarity_fn_name: Similarity = "cosine",
    ) -> None:
        """Combine a decoder, on its device and in its dtype, with its tokenizer and `Settings`.

        Raises ValueError if the tokenizer does not fit the decoder or a setting is not valid.
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
        self.model, self.tokenizer = model.eval(), tokenizer
        self.causal, self.max_length = causal, max_length
        self.pooling: Pooling = pooling
        self.prompts = {"query": "", "document": ""} | (prompts or {})
        self.instruction_template = check_template(instruction_template)
        self.default_prompt_name = default_prompt_name
        self.similarity_fn_name: Similarity = similarity_fn_name
        self.name = ""
        """The folder or hub id that the model was read from."""
        self._source: tuple[Opened, torch.dtype] | None = None
        self.adapter: Adapter | None = None
        """Set while the model carries an adapter that is not merged (during training)."""
        self.dimension = model.config.dense[0] if model.config.dense else model.config.hidden_size
        """Coordinates of a full vector."""
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
        """Load a folder or a repository of the Hugging Face hub; a folder never uses the network.

        The default `device` is the first GPU, else the CPU. The default `dtype` is bfloat16 if the
        device computes it natively, else float32; "auto" keeps the dtype of the file. `causal`,
        `pooling` and `max_length` (tokens) replace what the folder states; `settings.open_folder` says
        what holds where it states nothing.

        An adapter folder (LoRA, in PEFT's format) is merged into the base model that it names; the
        tokenizer and settings are those of the base where the folder has none.
        Raises ValueError, one sentence, for anything missing, damaged or not implemented.
        """
        device = pick_device(device)
        kind = fastest_safe_dtype(device) if dtype is None else dtype
        kind = None if kind == "auto" else pick_dtype(kind)
        found = open_folder(path_or_hub_id, causal=causal, pooling=pooling, max_length=max_length)
        model = _load(found)
        stored, rows = model.norm.weight.dtype, model.config.vocab_size
        model = model.to(device=device, dtype=kind)
        tokenizer = Tokenizer.from_folder(found.tokenizer, found.end_of_text, rows)
        try:
            embedder = cls(model, tokenizer, **asdict(found.settings))
        except ValueError as error:
            raise ValueError(f"{path_or_hub_id}: {error}") from error
        embedder.name, embedder._source = str(path_or_hub_id), (found, stored)
        return embedder

    def __repr__(self) -> str:
        size = sum(x.numel() for x in self.model.parameters())
        mode = "causal" if self.causal else "bidirectional"
        return (
            f"Embedder({self.name!r}: {self.model.config.model_type}, {size:,} parameters, "
            f"{self.dimension} dimensions, {mode} attention, {self.pooling} pooling, at most "
            f"{self.max_length} tokens, {str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the decoder computes."""
        return self.model.norm.weight.dtype

    def get_sentence_embedding_dimension(self) -> int:
        """`dimension`, by sentence-transformers' name."""
        return self.dimension

    def encode(
        self,
        texts: Texts,
        prompt: str | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = True,
        show_progress_bar: bool = False,
        *,
        prompt_name: str | None = None,
        precision: Precision = "float32",
        batch_size: int | None = None,
        convert_to_tensor: bool = False,
        **others: object,
    ) -> Vectors:
        """Embed texts: (n, d) float32 in the order given; (d,) for a single text.

        `texts` are any ordered collection or iterator of strings. Before each comes `prompt`, else
        the stored prompt `prompt_name`, else the folder's default prompt, if it names one.
        `truncate_dim` keeps that many leading coordinates (Matryoshka), which are then scaled to
        unit length. `precision`: see `quantize`. `batch_size` bounds a forward pass to so many
        texts of the maximum length, `tokens_per_batch` always. `convert_to_tensor` gives a tensor
        on the model's device. mteb calls this with a DataLoader.

        A text has the same vector alone and among others: up to rounding in float32, to the bit in
        bfloat16 on a CPU that computes it natively. Equal texts are computed once. A text without
        tokens (empty, and no prompt) gives a zero vector or the bias of a Dense module, as in
        sentence-transformers.
        Raises ValueError naming a text that is not a string or not valid Unicode, or whose vector
        has NaN or infinity.
        """
        if task := others.pop("task_metadata", None):
            loader = cast("Iterable[dict[str, list[str]]]", texts)
            texts = [text for batch in loader for text in batch["text"]]
            prompt_name = self._mteb_prompt(task, others.pop("prompt_type", None)) or prompt_name
            others = {word: x for word, x in others.items() if not word.startswith("hf_")}
        same = {  # what these words may say, since it is so anyway
            "convert_to_numpy": (True, not convert_to_tensor),
            "device": (None, self.device, str(self.device), self.device.type),
            "output_value": ("sentence_embedding",),
        }
        for word, value in others.items():
            if value not in same.get(word, ()):
                hint = _INSTEAD.get(word, "there is no such option")
                raise ValueError(f"encode({word}={value!r}): {hint}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1 text, found {batch_size}")
        name = self.default_prompt_name if prompt_name is None else prompt_name
        if prompt is None and name is not None:
            if name not in self.prompts:
                known = ", ".join(self.prompts)
                raise ValueError(f"prompt_name: expected one of {known}, found {name!r}")
            prompt = self.prompts[name]
        prompt = "" if prompt is None else prompt
        check_texts([prompt], "prompt")
        listed = check_texts([texts] if isinstance(texts, str) else texts)
        # Longest first: what does not fit in memory fails at once, not after an hour.
        unique = sorted(dict.fromkeys(listed), key=len, reverse=True)
        limit = None if batch_size is None else batch_size * self.max_length
        with tqdm(total=len(unique), unit="text", disable=not show_progress_bar) as bar:
            vectors = self._encode(unique, prompt, limit, bar)
        index = {text: row for row, text in enumerate(unique)}
        vectors = truncate(vectors, truncate_dim, normalize=normalize_embeddings)
        found = quantize(vectors.numpy()[[index[text] for text in listed]], precision)
        found = found[0] if isinstance(texts, str) else found
        result = torch.from_numpy(found).to(self.device) if convert_to_tensor else found
        return cast("Vectors", result)  # typed as by default

    def encode_query(
        self,
        texts: Texts,
        prompt: str | None = None,
        *,
        instruction: str | None = None,
        **options: Any,
    ) -> Vectors:
        """`encode` with a task instruction in the checkpoint's template, else its query prompt."""
        if instruction is not None and prompt is None:
            prompt = fill_template(self.instruction_template, instruction)
        options.setdefault("prompt_name", "query")
        return self.encode(texts, prompt, **options)

    def encode_document(self, texts: Texts, prompt: str | None = None, **options: Any) -> Vectors:
        """`encode` with the checkpoint's document prompt; takes the same options."""
        options.setdefault("prompt_name", "document")
        return self.encode(texts, prompt, **options)

    def similarity(self, a: Rows, b: Rows) -> Vectors:
        """`similarity_fn_name` of every row of a (n, D) with every row of b (m, D): (n, m) float32.

        Cosine unless the folder says otherwise; distances are negative. Two single vectors give a
        number. Any kind of numbers is computed with in float32.
        """
        left, right = self._compared(a), self._compared(b)
        order = _DISTANCES.get(self.similarity_fn_name)
        scores = left @ right.T if order is None else -torch.cdist(left, right, order)
        return scores.numpy()[(0, 0) if np.ndim(a) == np.ndim(b) == 1 else ...]

    def similarity_pairwise(self, a: Rows, b: Rows) -> Vectors:
        """`similarity` of each row of a (n, D) with the same row of b (n, D): (n,) float32."""
        left, right = self._compared(a), self._compared(b)
        if order := _DISTANCES.get(self.similarity_fn_name):
            return -torch.linalg.vector_norm(left - right, order, dim=-1).numpy()
        return (left * right).sum(-1).numpy()

    def _compared(self, rows: Rows) -> Tensor:
        """(n, D) float32 on the CPU, at unit length for the cosine."""
        is_array = not isinstance(rows, Tensor)
        tensor = torch.from_numpy(np.require(rows, np.float32, "W")) if is_array else rows
        tensor = torch.atleast_2d(tensor.detach().to("cpu", torch.float32))
        return truncate(tensor, None, normalize=self.similarity_fn_name == "cosine")

    def _mteb_prompt(self, task: object, prompt_type: object) -> str | None:
        """The name of the stored prompt that mteb would take with sentence-transformers, if any."""
        name, kind = attrgetter("name", "type")(task)
        side = getattr(prompt_type, "value", None)  # of retrieval and reranking alone
        names = (f"{name}-{side}", name, f"{kind}-{side}", kind, side)
        return next((name for name in names if name in self.prompts), None)

    @property
    def mteb_model_meta(self) -> object:
        """The name by which mteb keeps results, and a digest of what the vectors depend on."""
        from mteb.models import ModelMeta

        vectors = self.encode(["", "a", "one dog ran far from its house"], prompt="")
        settings = json.dumps([self.prompts, self.default_prompt_name, self.max_length])
        known = {"revision": digest(settings, vectors.tobytes())[:16], "modalities": ["text"]}
        known |= {"name": f"kalm_min/{Path(self.name).name or 'embedder'}"}
        return ModelMeta.create_empty(overwrites=known)

    def _encode(
        self, texts: list[str], prompt: str, limit: int | None, bar: "tqdm[NoReturn]"
    ) -> Tensor:
        """(n, D) raw float32 vectors on the CPU, in forward passes of at most `limit` tokens."""
        # What no token is pooled to: zeros, to which a Dense module adds its bias.
        bias = getattr(self.model.dense, "bias", None)
        bias = torch.zeros(self.dimension) if bias is None else bias.detach()
        bias = getattr(bias, "full_tensor", bias.clone)()  # of sharded weights, together
        vectors = bias.float().cpu().repeat(len(texts), 1)
        starts = range(0, len(texts), _WINDOW)
        windows = [texts[start : start + _WINDOW] for start in starts]
        tokenize = partial(self.tokenizer.encode, prompt=prompt, max_length=self.max_length)
        # A causal model reads the tokens of the prompt once for all texts. The last ones may merge
        # with the text; so only those that a following letter leaves unchanged are shared, by the
        # texts whose tokens begin with them. This depends on the text alone, as does its vector.
        pair = tokenize(["", "a"]) if self.causal and prompt else [[]]
        shared = [*commonprefix(pair)]  # noqa: RUF071 -- ids, not paths
        size, longest = len(shared), len(shared) * (1 + _WORTH_SHARING)
        for start, sequences in zip(starts, prefetch(tokenize, windows), strict=True):
            bar.update(sequences.count([]))
            share = [size < len(ids) <= longest and ids[:size] == shared for ids in sequences]
            for prefix in ([], shared) if shared else ([],):
                group = [i for i, x in enumerate(share) if sequences[i] and x == bool(prefix)]
                parts = [sequences[i][len(prefix) :] for i in group]
                budget = min(self.tokens_per_batch, limit or self.tokens_per_batch)
                for batch in token_budget_batches([*map(len, parts)], budget):
                    rows = [start + group[i] for i in batch]
                    found = self._embed([parts[i] for i in batch], prefix)
                    is_finite = torch.linalg.vector_norm(found, dim=1).isfinite()
                    if not is_finite.all():
                        text = texts[rows[int(is_finite.int().argmin())]]
                        raise ValueError(
                            f"{text[:60]!r}: the model gives this text a vector with NaN or infinity "
                            f"in {self.dtype}; try dtype float32, or check the model's weights"
                        )
                    vectors[rows] = found
                    bar.update(len(rows))
        return vectors

    @torch.no_grad()  # not inference_mode: sharded parameters gathered in it could not be trained
    def _embed(self, sequences: list[list[int]], prefix: list[int]) -> Tensor:
        """(B, D) raw float32 vectors on the CPU; halves the batch if the device's memory is full."""
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
        return torch.cat([self._embed(x, prefix) for x in (sequences[:half], sequences[half:])])

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | str | None = None) -> None:
        """Write a folder that this package, transformers and sentence-transformers open alike.

        Without `dtype`, weights are written as exactly as they are known: those that have not
        changed since they were read are written as their folder holds them, which is read again
        if the model computes in another dtype.

        transformers honours the attention mode of a bidirectional model from version 5.2 on; the
        folder makes sentence-transformers refuse older versions instead of attending causally. An
        adapter is merged into the written weights; in the model itself it stays separate.
        """
        with atomic_directory(path) as folder:
            self.write_files(folder, self._exact_weights(dtype))

    def _exact_weights(self, dtype: torch.dtype | str | None) -> dict[str, Tensor]:
        state = self.model.state_dict()
        if dtype is not None:
            return {name: x.to(pick_dtype(dtype)) for name, x in state.items()}
        if self._source and self._source[1] != self.dtype:
            stored = _load(self._source[0]).state_dict()
            pairs = ((name, x, stored.get(name, x)) for name, x in state.items())
            state = {name: y if torch.equal(y.to(x), x) else x for name, x, y in pairs}
            widest = reduce(torch.promote_types, (x.dtype for x in state.values()))
            state = {name: x.to(widest) for name, x in state.items()}
        return state

    def write_files(
        self, folder: Path, state: dict[str, Tensor] | None = None, *, merged: bool = True
    ) -> None:
        """`save_pretrained` into an existing folder that the caller makes complete or absent.

        `state` holds the weights, by name, if the model's are distributed over processes.
        `merged=False` writes only the adapter and the name of its base.
        """
        state = self.model.state_dict() if state is None else state
        apart = None if merged else self.adapter
        if apart:
            # With a config.json, transformers would take the folder for a complete model.
            save_adapter(state, folder, apart)
        else:
            state = merged_state(state, self.adapter.config) if self.adapter else state
            save_model(self.model, folder, causal=self.causal, state=state)
        self.tokenizer.save(folder, max_length=self.max_length)
        settings = Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})
        config, base = self.model.config, apart.base if apart else None
        is_dense = config.dense is not None
        write_settings(folder, settings, config.hidden_size, dense=is_dense, adapter_base=base)


def _load(found: Opened) -> Qwen2:
    """The decoder in the dtype of its files, with an adapter merged into it."""
    model = load_model(found.model, dtype=None, dense=found.dense)
    return merge(model, load_adapter(model, found.adapter).config) if found.adapter else model


def pick_device(name: torch.device | str | None = None) -> torch.device:
    """The device of a name, with its number; for None the first GPU, else the CPU.

    Raises ValueError for what torch does not know or this machine does not have.
    """
    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        one = torch.ones(1, device=default if name is None else name)
        one.item()  # an absent device fails above, one that only plans ("meta") here
    except Exception as error:  # of five types; "No CUDA GPUs are available" is a RuntimeError
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(f"device: expected {' or '.join(here)}, found {str(name)!r}") from error
    return one.device


def pick_dtype(name: torch.dtype | str) -> torch.dtype:
    """The dtype of a name, such as "float32" or "bf16". Raises ValueError for any other word."""
    kind = getattr(torch, SHORT_NAMES.get(name, name), None) if isinstance(name, str) else name
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point or kind.itemsize == 1:
        expected = "a name like float32, bfloat16 or float16"
        raise ValueError(f"dtype: expected {expected}, found {str(name)!r}")
    return kind


def fastest_safe_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if it is native (a product is then 7 to 9 times faster on a CPU), else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native and device.type in {"cpu", "cuda"} else torch.float32
