"""Texts in, vectors out: a decoder, its tokenizer, and the settings that make it an embedder.

    text -> ids -> batches of at most `tokens_per_batch` tokens -> hidden states -> pool -> unit length

Attention mode, pooling, prompts, maximum length and the end-of-text rule belong to a checkpoint: a
wrong one raises nothing and only lowers scores. They are read once, from the files that
sentence-transformers and transformers read, and written back on save (`model.folder`), so that a
saved folder gives the same vectors in all three. Other model modules, such as a Dense layer after
pooling, are refused; remote code is never run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from itertools import takewhile
from pathlib import Path
from typing import Self, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm  # comes with tokenizers, through huggingface_hub

from kalm_min.files import atomic_directory, checkpoint_folders
from kalm_min.model import Packed, Pooling, Qwen2, load_model, pool, save_model, truncate
from kalm_min.model.folder import KALM_TEMPLATE, Settings, read_settings, write_settings
from kalm_min.model.lora import (
    Adapter,
    load_adapter,
    merge,
    merged_state,
    read_adapter,
    save_adapter,
)
from kalm_min.sampling import token_budget_batches
from kalm_min.tokenizer import Tokenizer, check_texts, prefetch

_WINDOW = 4096  # texts tokenised at a time, while the ones before are embedded
# Tokens of one forward. On a CPU about a cache-full is fastest (1024 to 2048 were, measured on two
# cores); a GPU wants enough rows to fill its products.
_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32_768}
# A text shares a prompt's tokens where the rest of it is at most so many times as long: beyond that
# the attention, which must mask instead of skip, costs more than sharing saves.
_WORTH_SHARING = 8

Vectors = NDArray[np.float32]


class EncodeOptions(TypedDict, total=False):
    """What `encode` takes besides texts and prompt."""

    truncate_dim: int | None
    normalize_embeddings: bool
    show_progress_bar: bool


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
        """Join a decoder, used where and in the dtype it is, and its tokenizer.

        The keywords are documented where they are read: `model.folder.Settings`. Raises ValueError
        where the tokenizer is not the decoder's or a setting has no meaning.
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
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        kind = fastest_safe_dtype(device) if dtype is None else kind
        if dtype != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
            raise ValueError(
                f'dtype: expected a name like "float32" or "bfloat16", found {dtype!r}'
            )
        folders = checkpoint_folders(path_or_hub_id)  # of an adapter, its base's too
        folder, base = folders[0], folders[-1]
        name = str(path_or_hub_id) if folder == base else read_adapter(folder).base
        with_settings, with_tokenizer = (
            folder if (folder / file).is_file() else base
            for file in ("modules.json", "tokenizer.json")
        )
        model = load_model(base, dtype=kind, device=device)
        if folder != base:
            model = merge(model, load_adapter(model, folder))
        given = {"causal": causal, "pooling": pooling, "max_length": max_length}
        settings = read_settings(with_settings, base, name, model.config, given)
        return cls(model, Tokenizer.from_folder(with_tokenizer), **asdict(settings))

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
        """Coordinates of a full vector."""
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
        vectors = torch.zeros(len(unique), self.dimension)  # (unique texts, D)
        with tqdm(total=len(unique), unit="text", disable=not show_progress_bar) as bar:
            for rows, block in self._embed_unique(list(unique), prompt):
                vectors[rows] = block
                bar.update(len(rows))
        vectors = truncate(vectors, truncate_dim, normalize=normalize_embeddings)
        return vectors.numpy()[[unique[text] for text in texts]]

    def encode_query(self, texts: str | Sequence[str], **options: Unpack[EncodeOptions]) -> Vectors:
        """`encode` with the checkpoint's query prompt."""
        return self.encode(texts, self.prompts["query"], **options)

    def encode_document(
        self, texts: str | Sequence[str], **options: Unpack[EncodeOptions]
    ) -> Vectors:
        """`encode` with the checkpoint's document prompt."""
        return self.encode(texts, self.prompts["document"], **options)

    def similarity(self, a: Vectors, b: Vectors) -> Vectors:
        """Cosine similarity of every row of a (n, d) with every row of b (m, d): (n, m) float32."""
        left, right = (truncate(torch.from_numpy(np.atleast_2d(x)), None) for x in (a, b))
        return (left @ right.T).numpy()

    def _embed_unique(self, texts: list[str], prompt: str) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (rows, (len(rows), D) raw vectors on the CPU), the longest texts first.

        Longest first: what does not fit in memory fails at once, not after an hour. Whether a text
        shares the tokens of the prompt depends on itself alone, and so does its vector.
        """
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        windows = [order[start : start + _WINDOW] for start in range(0, len(order), _WINDOW)]
        shared = self._shared_prefix(prompt)
        size, longest = len(shared), len(shared) * (1 + _WORTH_SHARING)

        def tokenize(window: list[int]) -> list[list[int]]:
            chosen = [texts[row] for row in window]
            return self.tokenizer.encode(chosen, prompt, max_length=self.max_length)

        for window, sequences in zip(windows, prefetch(tokenize, windows), strict=True):
            sharing = [size < len(ids) <= longest and ids[:size] == shared for ids in sequences]
            for prefix in (shared, []) if shared else ([],):
                chosen = [
                    (row, ids[len(prefix) :])
                    for row, ids, shares in zip(window, sequences, sharing, strict=True)
                    if ids and shares == bool(prefix)
                ]
                lengths = [len(ids) for _, ids in chosen]
                for batch in token_budget_batches(lengths, self.tokens_per_batch):
                    vectors = self._embed([chosen[i][1] for i in batch], prefix)
                    yield [chosen[i][0] for i in batch], vectors

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
        adapter, config = self.adapter, self.model.config
        if adapter and not merged:
            # Without config.json: beside one, transformers takes the folder for a complete model.
            save_adapter(state, folder, adapter)
        else:
            state = merged_state(state, adapter.config) if adapter else state
            save_model(self.model, folder, causal=self.causal, state=state)
        self.tokenizer.save(folder, max_length=self.max_length)
        settings = Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})
        base = adapter.base if adapter and not merged else None
        write_settings(folder, settings, config, adapter_base=base)


def fastest_safe_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is native (a product is then 7 to 9 times faster on a CPU), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return torch.bfloat16 if native else torch.float32
