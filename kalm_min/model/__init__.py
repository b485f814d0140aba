"""The decoder: packed tokens in, hidden states and vectors out, and its folder on disk."""

from kalm_min.model.folder import load_config, load_model, save_model
from kalm_min.model.packed import Packed, pool, quantize, truncate
from kalm_min.model.qwen2 import ModelConfig, Qwen2, initialise

__all__ = ["ModelConfig", "Packed", "Qwen2", "initialise", "load_config"]
__all__ += ["load_model", "pool", "quantize", "save_model", "truncate"]
