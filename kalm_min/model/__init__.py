"""The decoder: packed tokens in, vectors out, and its weights on disk."""

from kalm_min.model.config import ModelConfig
from kalm_min.model.packed import Packed
from kalm_min.model.pooling import Pooling, pool, truncate
from kalm_min.model.qwen2 import Qwen2, initialise
from kalm_min.model.weights import load_config, load_model, save_model

__all__ = [
    "ModelConfig",
    "Packed",
    "Pooling",
    "Qwen2",
    "initialise",
    "load_config",
    "load_model",
    "pool",
    "save_model",
    "truncate",
]
