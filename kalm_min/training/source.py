"""Where training starts: a checkpoint, or a fresh decoder of given sizes.

The settings that make a decoder an embedder (attention mode, pooling, maximum length, template) are
the run's own where given, else the checkpoint's; they are written into the result.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from kalm_min.embedder import KALM_TEMPLATE, Embedder
from kalm_min.model import ModelConfig, Pooling, Qwen2, initialise
from kalm_min.model.lora import ADAPTER_CONFIG, Adapter, LoRAConfig, add_adapter, load_adapter
from kalm_min.tokenizer import Tokenizer

_ROWS = 64  # a vocabulary is rounded up to a multiple of this: odd sizes are slow on a GPU


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """Either `path`, or `tokenizer` and sizes."""

    path: str | None = None
    """Checkpoint to start from: a folder or a hub id."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json, for a fresh model of the sizes below."""
    hidden_size: int = 256
    """Width of a fresh model."""
    intermediate_size: int = 1024
    """Feed-forward width of a fresh model."""
    num_hidden_layers: int = 4
    """Layers of a fresh model."""
    num_attention_heads: int = 4
    """Query heads of a fresh model."""
    num_key_value_heads: int = 2
    """Key/value heads of a fresh model."""
    initializer_range: float = 0.02
    """Standard deviation of a fresh model's weights."""
    init_seed: int = 0
    """Of a fresh model's weights, or a fresh adapter's."""
    causal: bool | None = None
    """Attention mode; none keeps the checkpoint's (a fresh model is bidirectional, as in V2)."""
    pooling: Pooling | None = None
    """mean or lasttoken; none keeps the checkpoint's (mean for a fresh model)."""
    max_length: int = 512
    """Tokens kept of a text, instruction included."""
    instruction_template: str | None = None
    """How an instruction becomes a prompt, with {instruction}; none keeps the checkpoint's."""

    def __post_init__(self) -> None:
        """Exactly one of the two ways."""
        if (self.path is None) == (self.tokenizer is None):
            raise ValueError(
                "give either path, a checkpoint to start from, or tokenizer, the folder of a "
                "tokenizer for a fresh model"
            )
        if self.instruction_template and "{instruction}" not in self.instruction_template:
            raise ValueError("instruction_template: expected {instruction} in it, found none")


def open_model(
    source: ModelSource,
    resume: Path | None,
    device: torch.device,
    lora: LoRAConfig | None = None,
) -> Embedder:
    """The embedder a run starts or goes on with, float32 weights on `device`."""
    if lora is not None and lora.rank:
        return _adapted(source, resume, device, lora)
    if resume is not None:
        return Embedder.from_pretrained(resume, device, torch.float32)
    if source.tokenizer is not None:
        return _fresh(source, device)
    return _checkpoint(source, device)


def _checkpoint(source: ModelSource, device: torch.device) -> Embedder:
    """The checkpoint of `path`, under the run's own settings."""
    assert source.path is not None
    embedder = Embedder.from_pretrained(
        source.path, device, torch.float32, source.causal, source.pooling, source.max_length
    )
    if source.instruction_template is not None:
        embedder.instruction_template = source.instruction_template
    return embedder


def _adapted(
    source: ModelSource, resume: Path | None, device: torch.device, lora: LoRAConfig
) -> Embedder:
    """The checkpoint, frozen, under the adapter of `resume`, or a fresh one, which changes nothing."""
    if source.path is None:
        raise ValueError("lora: expected model.path, a checkpoint to adapt; a fresh model has none")
    folder = Path(source.path).expanduser()
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{folder}: an adapter cannot be the base of another; save it merged first, "
            "with Embedder.from_pretrained(...).save_pretrained(...)"
        )
    embedder = _checkpoint(source, device)
    embedder.adapter = Adapter(lora, str(folder.resolve()) if folder.is_dir() else source.path)
    if resume is None:
        add_adapter(embedder.model, lora, source.init_seed)
    else:
        load_adapter(embedder.model, resume)
    return embedder


def _fresh(source: ModelSource, device: torch.device) -> Embedder:
    """A random decoder; the weights depend on `init_seed` alone."""
    assert source.tokenizer is not None
    tokenizer = Tokenizer.from_folder(source.tokenizer)
    config = ModelConfig(
        vocab_size=-(-tokenizer.vocab_size // _ROWS) * _ROWS,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=source.hidden_size // source.num_attention_heads,
        max_position_embeddings=max(512, source.max_length),
        initializer_range=source.initializer_range,
    )
    model = Qwen2(config)
    initialise(model, source.init_seed)
    return Embedder(
        model.to(device),
        tokenizer,
        causal=bool(source.causal),
        pooling=source.pooling or "mean",
        max_length=source.max_length,
        instruction_template=source.instruction_template or KALM_TEMPLATE,
    )
