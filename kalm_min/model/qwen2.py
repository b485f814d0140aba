"""The Qwen2 decoder as a function of packed tokens; with q/k norms and no bias it is Qwen3.

T  packed tokens    D  hidden size    F  feed-forward size
H  query heads      K  key/value heads      E  head size

    h = embed(ids)
    for each layer:   h += o_proj(attention(norm(h)))
                      h += down_proj(silu(gate_proj(norm(h))) * up_proj(norm(h)))
    h = norm(h);  with a Dense module:  h = dense(h)

Parameter names are Hugging Face's, so the state dict is the checkpoint file. There is no output
head, cache or dropout, so that a second forward pass gives the same values (gradient caching).
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kalm_min.model.attention import packed_attention
from kalm_min.model.packed import Packed
from kalm_min.schema import problem_with
from kalm_min.settings import FIELDS

_CACHED_ROWS = 512  # rows of the feed-forward layer at a time on a CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes and constants of a Qwen2 or Qwen3 decoder, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0
    """0 stands for hidden_size / num_attention_heads."""
    model_type: Literal["qwen2", "qwen3"] = "qwen2"
    """"qwen2" (bias on q, k, v) or "qwen3" (no bias, RMSNorm on each query and key head)."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 32_768
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    """Like the token ids, only kept for `config.json`: an embedder has no output head."""
    bos_token_id: object = None
    eos_token_id: object = None
    pad_token_id: object = None
    dense: tuple[int, bool] | None = None
    """Size of the output, and whether there is a bias, of a Dense module (not in `config.json`)."""

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that no decoder can have."""
        values = asdict(self) | {"head_dim": self.head_dim or None}
        if problem := problem_with(values, FIELDS["config.json"], extra=True):
            raise ValueError(problem)
        divisible = [("num_attention_heads", "num_key_value_heads")]
        divisible += [] if self.head_dim else [("hidden_size", "num_attention_heads")]
        for name, divisor in divisible:
            if getattr(self, name) % (number := getattr(self, divisor)):
                raise ValueError(f"{name} must be a multiple of {divisor} {number}")
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for rotary, found {head_dim}")
        object.__setattr__(self, "head_dim", head_dim)


class _Uninitialised(nn.Module):
    def reset_parameters(self) -> None:
        """Leave it to a file or `initialise`: torch's draws would cost a second even on "meta"."""


class Linear(_Uninitialised, nn.Linear):
    """A linear map, left uninitialised."""


class Embedding(_Uninitialised, nn.Embedding):
    """A table of embeddings, left uninitialised."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., size); squares are in at least float32, since bfloat16 keeps 8 bits."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, 1, E) of positions (T,) times the frequencies theta^(-2i/E).

    Qwen2 rotates the pairs (x_i, x_{i + E/2}), so the angles are laid out twice as [f, f]; the
    interleaved layout of pairs (x_{2i}, x_{2i+1}) would give other vectors from the same weights.
    Both are float32 in every model: bfloat16 cannot hold a position above 256 exactly.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim  # (E/2,)
    angles = positions.float()[:, None] * theta**-exponents  # (T, E/2)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)  # (T, 1, E)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head of x (T, H, E) by its token's angles; same shape and dtype."""
    first, second = x.chunk(2, dim=-1)  # (T, H, E/2) each
    turned = torch.cat([-second, first], dim=-1)  # (T, H, E)
    return (x * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, bias = config.head_dim, config.model_type == "qwen2"
        query_size = config.num_attention_heads * self.head_dim
        key_size = config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = Linear(config.hidden_size, key_size, bias=bias)
        self.v_proj = Linear(config.hidden_size, key_size, bias=bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=False)
        self.q_norm, self.k_norm = (
            nn.Identity() if bias else RMSNorm(self.head_dim, config.rms_norm_eps) for _ in "qk"
        )

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], packed: Packed, *, causal: bool
    ) -> Tensor:
        """Mix the tokens of each sequence: (T, D) to (T, D)."""
        heads = (-1, self.head_dim)
        v = self.v_proj(x).unflatten(-1, heads)  # (T, K, E)
        # Back to the dtype of v: under autocast the norms give float32.
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, heads)), *rotary).to(v)  # (T, H, E)
        k = rotate(self.k_norm(self.k_proj(x).unflatten(-1, heads)), *rotary).to(v)  # (T, K, E)
        mixed = packed_attention(q, k, v, packed, causal=causal)  # (T, H, E)
        return self.o_proj(mixed.flatten(-2))  # (T, D)


class MLP(nn.Module):
    """The gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) to (T, D). Without a graph: in place and, on a CPU, in parts that fit the cache."""
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (T, F) inside
        # Even parts: a product of few left-over rows would use another kernel and round differently.
        outputs: list[Tensor] = []
        for part in x.chunk(1 if x.is_cuda else -(-len(x) // _CACHED_ROWS)):
            gated = F.silu(self.gate_proj(part), inplace=True).mul_(self.up_proj(part))
            outputs.append(self.down_proj(gated))
        return torch.cat(outputs)


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each on a normalized input and added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], packed: Packed, *, causal: bool
    ) -> Tensor:
        """(T, D) to (T, D)."""
        normed = self.input_layernorm(hidden)
        hidden = hidden + self.self_attn(normed, rotary, packed, causal=causal)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Qwen2(nn.Module):
    """The decoder, without an output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # sentence-transformers applies it to the pooled vector. A linear map commutes with both
        # poolings; as a part of the decoder it is trained, sharded and saved like the rest.
        size, bias = config.dense or (0, False)
        self.dense = Linear(config.hidden_size, size, bias=bias) if size else nn.Identity()
        self.gradient_checkpointing = False
        """Keep only each layer's input for the backward pass, which computes the layer again."""

    def forward(self, packed: Packed, *, causal: bool) -> Tensor:
        """Hidden states after the last norm (transformers' `last_hidden_state`) and Dense, (T, D).

        A token attends to itself and what precedes it if `causal`, else to its full sequence.
        """
        hidden = self.embed_tokens(packed.input_ids)  # (T, D)
        rotary = rotary_tables(packed.positions, self.config.head_dim, self.config.rope_theta)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            run = partial(checkpoint, layer, use_reentrant=False) if recompute else layer
            hidden = run(hidden, rotary, packed, causal=causal)  # (T, D)
        return self.dense(self.norm(hidden))


def initialise(model: Qwen2, seed: int) -> None:
    """Fill a fresh decoder as transformers does: N(0, initializer_range), biases 0, norms 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(name.endswith("norm.weight"))
            else:
                # Drawn on the CPU in float32, so that a seed means the same on every device.
                draw = torch.empty(parameter.shape).normal_(generator=generator)
                parameter.copy_(draw * model.config.initializer_range)
