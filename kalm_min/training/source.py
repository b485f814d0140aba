"""Where training starts: a checkpoint, or a fresh decoder of given sizes.

The settings that make a decoder an embedder (attention mode, pooling, maximum length, template) are
those of the run where given, else the checkpoint's; they are written into the result.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch

from kalm_min.embedder import Embedder
from kalm_min.model import ModelConfig, Pooling, Qwen2, initialise
from kalm_min.model.lora import ADAPTER_CONFIG, Adapter, LoRAConfig, add_adapter, load_adapter
from kalm_min.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """The model to start from: either `path`, or `tokenizer` and sizes of a fresh one."""

    path: Annotated[str | None, "Checkpoint to start from: a folder or a hub id."] = None
    tokenizer: Annotated[Path | None, "Folder of a tokenizer, to train a fresh model with."] = None
    hidden_size: Annotated[int, "Dimension of a fresh model's hidden states and vectors."] = 256
    intermediate_size: Annotated[int, "Dimension of a fresh model's feed-forward layers."] = 1024
    num_hidden_layers: Annotated[int, "Layers of a fresh model."] = 4
    num_attention_heads: Annotated[int, "Query heads of a fresh model."] = 4
    num_key_value_heads: Annotated[int, "Key/value heads of a fresh model."] = 2
    initializer_range: Annotated[float, "Standard deviation of a fresh model's weights."] = 0.02
    init_seed: Annotated[int, "Seed of a fresh model's weights, or of a fresh adapter's."] = 0
    causal: Annotated[
        bool | None, "Causal attention; none: the checkpoint's, bidirectional for a fresh model."
    ] = None
    pooling: Annotated[Pooling | None, "none: the checkpoint's, mean for a fresh model."] = None
    max_length: Annotated[int, "Maximum number of tokens per text, instruction included."] = 512
    instruction_template: Annotated[
        str | None, "Turns an {instruction} into a prompt; none: the checkpoint's."
    ] = None

    def __post_init__(self) -> None:
        """Validate option combinations."""
        if (self.path is None) == (self.tokenizer is None):
            raise ValueError(
                "give either path, a checkpoint to start from, or tokenizer, the folder of a "
                "tokenizer for a fresh model"
            )
        if self.instruction_template and "{instruction}" not in self.instruction_template:
            raise ValueError("instruction_template: expected {instruction} in it, found none")


def open_model(
    source: ModelSource, resume: Path | None, device: torch.device, lora: LoRAConfig | None = None
) -> Embedder:
    """The embedder that a run starts with, or resumes from a checkpoint: float32 on `device`.

    With LoRA it is the checkpoint of `source`, frozen, under the adapter of `resume` or a fresh
    one, which changes nothing. Raises ValueError for what cannot be trained or opened.
    """
    lora = lora if lora is not None and lora.rank else None
    if resume is not None and lora is None:
        return Embedder.from_pretrained(resume, device, torch.float32)
    if source.path is not None:
        embedder = Embedder.from_pretrained(
            source.path, device, torch.float32, source.causal, source.pooling, source.max_length
        )
    elif lora is not None:
        raise ValueError(
            "--lora.rank: expected --model.path, a checkpoint to adapt; a fresh model has none"
        )
    else:
        assert source.tokenizer is not None
        tokenizer = Tokenizer.from_folder(source.tokenizer)
        config = ModelConfig(
            vocab_size=-(-tokenizer.vocab_size // 64) * 64,  # odd numbers of rows are slow on a GPU
            max_position_embeddings=max(512, source.max_length),
            # The sizes, which have the same names.
            **{k: v for k, v in asdict(source).items() if k in ModelConfig.__dataclass_fields__},
        )
        model = Qwen2(config)
        initialise(model, source.init_seed)
        embedder = Embedder(
            model.to(device),
            tokenizer,
            causal=bool(source.causal),
            pooling=source.pooling or "mean",
            max_length=source.max_length,
        )
    if source.instruction_template is not None:
        embedder.instruction_template = source.instruction_template
    if lora is not None and source.path is not None:
        folder = Path(source.path).expanduser()
        if (folder / ADAPTER_CONFIG).is_file():
            raise ValueError(
                f"{folder}: an adapter cannot be the base of another; save it merged first, "
                "with Embedder.from_pretrained(...).save_pretrained(...)"
            )
        embedder.adapter = Adapter(lora, str(folder.resolve()) if folder.is_dir() else source.path)
        if resume is None:
            add_adapter(embedder.model, lora, source.init_seed)
        else:
            load_adapter(embedder.model, resume)
    return embedder
