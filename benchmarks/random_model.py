"""A random Qwen2 of the 0.5B shape with a real tokenizer, which the benchmarks measure."""

from pathlib import Path

from kalm_min import Embedder
from kalm_min.model import ModelConfig, Qwen2, initialise
from kalm_min.tokenizer import Tokenizer


def build(
    tokenizer: Path, *, layers: int = 24, causal: bool = True, max_length: int = 512
) -> Embedder:
    """Build a model of Qwen2-0.5B's sizes (24 layers by default) in float32 on the CPU."""
    config = ModelConfig(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=131_072,
    )
    model = Qwen2(config)
    initialise(model, seed=0)
    return Embedder(model, Tokenizer.from_folder(tokenizer), causal=causal, max_length=max_length)
