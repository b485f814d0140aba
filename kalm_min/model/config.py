"""The shape of a decoder, read from and written to a Hugging Face `config.json`.

Reads the spellings of transformers 4 (`rope_theta`, `torch_dtype`) and 5 (`rope_parameters`,
`dtype`), and refuses with one sentence whatever the decoder of this package does not compute:
a wrong guess here raises nothing later, it only lowers scores.

Not here: attention mode, pooling and prompts as resolved for one checkpoint; `embedder` does that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# What transformers fills in where a config is silent: (qwen2, qwen3).
_DEFAULT_THETA = 10_000.0
_DEFAULT_QWEN3_HEAD_DIM = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes and constants of a Qwen2 or Qwen3 decoder, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "qwen2"
    """"qwen2" (bias on q, k, v) or "qwen3" (no bias, RMSNorm on each query and key head)."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 32_768
    tie_word_embeddings: bool = True
    """Only carried along for `config.json`: an embedder has no output head."""
    initializer_range: float = 0.02
    is_causal: bool | None = None
    """None where the file does not say."""
    token_ids: tuple[tuple[str, Any], ...] = ()
    """(key, value) of bos_token_id, eos_token_id and pad_token_id where the file has them."""

    def __post_init__(self) -> None:
        """Refuse sizes no decoder can have."""
        for name in (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            _positive(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for rotary, found {self.head_dim}")

    @property
    def qk_norm(self) -> bool:
        """Whether each query and key head is normalised before the rotation (Qwen3)."""
        return self.model_type == "qwen3"

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections carry a bias (Qwen2)."""
        return self.model_type == "qwen2"

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], where: str = "config.json") -> "ModelConfig":
        """Read a parsed `config.json`; `where` opens the ValueError for what is missing or unknown."""
        try:
            _refuse_unimplemented(hf)
            if missing := [name for name in _REQUIRED if name not in hf]:
                raise ValueError(f"the keys {', '.join(missing)} are missing")
            for name in _REQUIRED:
                _positive(name, hf[name])
            heads = hf["num_attention_heads"]
            return cls(
                **{name: hf[name] for name in _REQUIRED},
                num_key_value_heads=hf.get("num_key_value_heads") or heads,
                head_dim=_head_dim(hf),
                model_type=hf["model_type"],
                rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
                rope_theta=float(_rope(hf).get("rope_theta", hf.get("rope_theta", _DEFAULT_THETA))),
                max_position_embeddings=hf.get("max_position_embeddings", 32_768),
                tie_word_embeddings=hf.get("tie_word_embeddings", False),
                initializer_range=hf.get("initializer_range", 0.02),
                is_causal=_optional_bool(hf, "is_causal"),
                token_ids=tuple(
                    (key, hf[key])
                    for key in ("bos_token_id", "eos_token_id", "pad_token_id")
                    if hf.get(key) is not None
                ),
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def to_hf(self, *, dtype: str, causal: bool) -> dict[str, Any]:
        """The `config.json` that transformers 4 and 5 read; `is_causal` is honoured from 5.2 on.

        Args:
            dtype: "float32", "bfloat16" or "float16", as stored in the weights file.
            causal: the attention mode in use, which replaces `is_causal`.
        """
        names = {"qwen2": "Qwen2Model", "qwen3": "Qwen3Model"}
        return {
            "architectures": [names[self.model_type]],
            "model_type": self.model_type,
            **{name: getattr(self, name) for name in _REQUIRED},
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "use_cache": False,
            "is_causal": causal,
            "torch_dtype": dtype,
            **dict(self.token_ids),
        }


def _positive(name: str, value: object) -> None:
    """Raise unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, found {value!r}")


def _head_dim(hf: Mapping[str, Any]) -> int:
    """The explicit head size, else the architecture's rule."""
    if hf.get("head_dim") is not None:
        return hf["head_dim"]
    if hf["model_type"] == "qwen3":
        return _DEFAULT_QWEN3_HEAD_DIM
    if hf["hidden_size"] % hf["num_attention_heads"]:
        raise ValueError(
            f"hidden_size {hf['hidden_size']} must be a multiple of num_attention_heads "
            f"{hf['num_attention_heads']} where head_dim is not given"
        )
    return hf["hidden_size"] // hf["num_attention_heads"]


def _rope(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings of transformers 5 (`rope_parameters`) or 4 (`rope_scaling`), or {}."""
    return hf.get("rope_parameters") or hf.get("rope_scaling") or {}


def _optional_bool(hf: Mapping[str, Any], key: str) -> bool | None:
    """A boolean, or None where the key is absent or null."""
    value = hf.get(key)
    if value is None or isinstance(value, bool):
        return value
    raise ValueError(f"{key}: expected true or false, found {value!r}")


def _refuse_unimplemented(hf: Mapping[str, Any]) -> None:
    """Raise for every setting that would change the function and that the decoder does not compute."""
    if hf.get("model_type") not in {"qwen2", "qwen3"}:
        raise ValueError(f"model_type: expected qwen2 or qwen3, found {hf.get('model_type')!r}")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act: expected silu, found {hf['hidden_act']!r}")
    kind = _rope(hf).get("rope_type", _rope(hf).get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type: only unscaled rotary embeddings are built, found {kind!r}")
    if hf.get("quantization_config"):
        raise ValueError("quantization_config: quantised weights cannot be read, use the original")
    if hf["model_type"] == "qwen3" and hf.get("attention_bias"):
        raise ValueError("attention_bias: Qwen3 with biases is not built")
    layers = hf.get("num_hidden_layers", 0)
    kinds = hf.get("layer_types") or []
    if any(kind != "full_attention" for kind in kinds) or (
        not kinds
        and hf.get("use_sliding_window")
        and hf.get("sliding_window") is not None
        and hf.get("max_window_layers", 0) < layers
    ):
        raise ValueError("sliding-window attention is in use and is not built")
