"""Texts in, vectors out: a decoder, its tokenizer, and the settings that make it an embedder.

    text -> ids -> batches of `tokens_per_batch` tokens at most -> hidden states -> unit vectors

Attention mode, pooling, prompts, maximum length and the end-of-text rule belong to a checkpoint; a
wrong value raises no error and only lowers scores. They are read from the files that sentence-
transformers and transformers read, and written back (`model.folder`), so that a saved folder gives
the same vectors in all three. Modules such as a Dense layer are refused; remote code is never run.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm  # comes with tokenizers, through huggingface_hub

from kalm_min.files import atomic_directory
from kalm_min.model import Packed, Qwen2, load_model, pool, save_model, truncate
from kalm_min.model.lora import Adapter, load_adapter, merge, merged_state, save_adapter
from kalm_min.sampling import token_budget_batches
from kalm_min.settings import (
    KALM_TEMPLATE,
    Pooling,
    Settings,
    Similarity,
    check_template,
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
        kind = getattr(torch, kind, None) if isinstance(kind, str) else kind
        if dtype != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
            expected = 'a name like "float32" or "bfloat16"'
            raise ValueError(f"dtype: expected {expected}, found {dtype!r}")
        found = open_folder(path_or_hub_id, causal=causal, pooling=pooling, max_length=max_length)
        model = load_model(found.model, dtype=kind, device=device, dense=found.dense)
        if found.adapter:
            model = merge(model, load_adapter(model, found.adapter).config)
        rows = model.config.vocab_size
        tokenizer = Tokenizer.from_folder(found.tokenizer, found.end_of_text, rows)
        return cls(model, tokenizer, **asdict(found.settings))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the decoder computes."""
        return self.model.norm.weight.dtype

    def encode(
        self,
        texts: str | Sequence[str],
        prompt: str = "",
        truncate_dim: int | None = None,
        normalize_embeddings: bool = True,
        show_progress_bar: bool = False,
    ) -> Vectors:
        """Embed texts: (n, d) float32 in the order given; (d,) for a single text.

        `prompt` is put before every text. `truncate_dim` keeps that many leading coordinates
        (Matryoshka), which are then scaled to unit length. A text's vector does not depend on the
        other texts; equal texts are computed once. A text without tokens (empty, and no prompt)
        gives a zero vector, as mean pooling over nothing does in sentence-transformers.
        Raises ValueError naming a text that is not a string or not valid Unicode, or whose vector
        has NaN or infinity.
        """
        if isinstance(texts, str):
            return self.encode([texts], prompt, truncate_dim, normalize_embeddings)[0]
        check_texts([*texts, prompt])
        # Longest first: what does not fit in memory fails at once, not after an hour.
        unique = sorted(dict.fromkeys(texts), key=len, reverse=True)
        vectors = torch.zeros(len(unique), self.dimension)  # (unique texts, D)
        starts = range(0, len(unique), _WINDOW)
        windows = [unique[start : start + _WINDOW] for start in starts]
        tokenize = partial(self.tokenizer.encode, prompt=prompt, max_length=self.max_length)
        # A causal model reads the tokens of the prompt once for all texts. The last ones may merge
        # with the text; so only those that a following letter leaves unchanged are shared, by the
        # texts whose tokens begin with them. This depends on the text alone, as does its vector.
        alone, followed = tokenize(["", "a"]) if self.causal and prompt else ([], [])
        pairs = zip(alone, followed, strict=False)
        shared = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        size, longest = len(shared), len(shared) * (1 + _WORTH_SHARING)
        with tqdm(total=len(unique), unit="text", disable=not show_progress_bar) as bar:
            for start, sequences in zip(starts, prefetch(tokenize, windows), strict=True):
                groups: dict[bool, list[tuple[int, list[int]]]] = {True: [], False: []}
                for row, ids in enumerate(sequences, start):
                    sharing = size < len(ids) <= longest and ids[:size] == shared
                    groups[sharing] += [(row, ids[size * sharing :])] if ids else []
                for sharing, group in groups.items():
                    lengths = [len(ids) for _, ids in group]
                    for batch in token_budget_batches(lengths, self.tokens_per_batch):
                        rows, parts = zip(*(group[i] for i in batch), strict=True)
                        raw = self._embed([*parts], shared if sharing else [])
                        is_finite = torch.linalg.vector_norm(raw, dim=1).isfinite()
                        if not is_finite.all():
                            text = unique[rows[int(is_finite.int().argmin())]]
                            raise ValueError(self._not_finite(text, list(texts).index(text)))
                        vectors[[*rows]] = raw
                        bar.update(len(batch))
        vectors = truncate(vectors, truncate_dim, normalize=normalize_embeddings)
        index = {text: row for row, text in enumerate(unique)}
        return vectors.numpy()[[index[text] for text in texts]]

    def encode_query(self, texts: str | Sequence[str], **options: Any) -> Vectors:
        """`encode` with the checkpoint's query prompt; takes the same options."""
        return self.encode(texts, self.prompts["query"], **options)

    def encode_document(self, texts: str | Sequence[str], **options: Any) -> Vectors:
        """`encode` with the checkpoint's document prompt; takes the same options."""
        return self.encode(texts, self.prompts["document"], **options)

    def similarity(self, a: Vectors, b: Vectors) -> Vectors:
        """Cosine similarity of every row of a (n, d) with every row of b (m, d): (n, m) float32."""
        left, right = (truncate(torch.from_numpy(np.atleast_2d(x)), None) for x in (a, b))
        return (left @ right.T).numpy()

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

    def _not_finite(self, text: str, index: int) -> str:
        wide = self.dtype.itemsize >= 4
        hint = "the model's weights are damaged or too large" if wide else "try dtype float32"
        found = f"a vector with NaN or infinity in {str(self.dtype).removeprefix('torch.')}"
        return f"texts[{index}], {text[:60]!r}: the model gives {found}; {hint}"

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that this package, transformers and sentence-transformers open alike.

        transformers honours the attention mode of a bidirectional model from version 5.2 on; the
        folder makes sentence-transformers refuse older versions instead of attending causally. An
        adapter is merged into the written weights; in the model itself it stays separate.
        """
        with atomic_directory(path) as folder:
            self.write_files(folder)

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
        base = apart.base if apart else None
        config = self.model.config
        dense = config.dense is not None
        write_settings(folder, settings, config.hidden_size, dense=dense, adapter_base=base)


def pick_device(name: torch.device | str | None = None) -> torch.device:
    """The device of a name, with its number; for None the first GPU, else the CPU.

    Raises ValueError for what torch does not know or this machine does not have.
    """
    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        one = torch.ones(1, device=wanted)
        one.item()  # an absent device fails above, one that only plans ("meta") here
    except Exception as error:  # of five types; "No CUDA GPUs are available" is a RuntimeError
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(f"device: expected {' or '.join(here)}, found {str(name)!r}") from error
    return one.device


def fastest_safe_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if it is native (a product is then 7 to 9 times faster on a CPU), else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native and device.type in {"cpu", "cuda"} else torch.float32
