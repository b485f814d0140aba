"""The Qwen2 decoder as a function of packed tokens; with q/k norms and no bias it is Qwen3.

T  packed tokens    D  model width    F  feed-forward width
H  query heads      K  key/value heads      E  head size

    h = embed(ids)
    for each layer:   h += o_proj(attention(norm(h)))
                      h += down_proj(silu(gate_proj(norm(h))) * up_proj(norm(h)))
    h = norm(h)

Parameter names are Hugging Face's, so the state dict is the checkpoint file. There is no output
head, no cache, no dropout: an embedder reads every text once. Without dropout a second forward of
the same tokens gives the same values, which is what gradient caching rests on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kalm_min.model.attention import packed_attention
from kalm_min.model.config import ModelConfig
from kalm_min.model.packed import Packed
from kalm_min.model.rotary import rotary_tables, rotate

_CACHED_ROWS = 512  # of the feed-forward at a time on a CPU, so that its width stays in the cache


class Linear(nn.Linear):
    """Left unfilled: the weights come from a file or from `initialise`.

    torch's own draws, thrown away, would cost a second of imports on the meta device.
    """

    def reset_parameters(self) -> None:
        """Nothing."""


class Embedding(nn.Embedding):
    """Left unfilled, like `Linear`."""

    def reset_parameters(self) -> None:
        """Nothing."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., size); same shape and dtype.

        The square is taken in float32 at least: in bfloat16 it would keep 8 bits.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_width, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, key_width, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, key_width, bias=config.qkv_bias)
        self.o_proj = Linear(query_width, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], packed: Packed, *, causal: bool
    ) -> Tensor:
        """Mix the tokens of each sequence: (T, D) to (T, D)."""
        heads = (-1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, heads)), *rotary)  # (T, H, E)
        k = rotate(self.k_norm(self.k_proj(x).unflatten(-1, heads)), *rotary)  # (T, K, E)
        v = self.v_proj(x).unflatten(-1, heads)  # (T, K, E)
        bounds = (packed.cu_seqlens, packed.max_seqlen, packed.prefix)
        mixed = packed_attention(q, k, v, *bounds, causal=causal)  # (T, H, E)
        return self.o_proj(mixed.flatten(-2))  # (T, D)


class MLP(nn.Module):
    """The gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (T, F) inside
        if x.is_cuda:
            return self._in_place(x)
        # Even parts: a product of a few left-over rows would take another kernel and round otherwise.
        parts = -(-len(x) // _CACHED_ROWS)
        return torch.cat([self._in_place(part) for part in x.chunk(parts)])

    def _in_place(self, x: Tensor) -> Tensor:
        """The same without a graph, in half the memory."""
        return self.down_proj(F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each on a normalised input and added to the stream."""

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
    """The whole decoder, without an output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        """Keep only each layer's input for backward, and compute the layer again there."""

    def forward(self, packed: Packed, *, causal: bool) -> Tensor:
        """Hidden states after the last norm.

        Args:
            packed: B sequences of T tokens in all.
            causal: True: a token sees itself and what stands before it. False: its whole sequence.

        Returns:
            (T, D), what transformers calls `last_hidden_state`.
        """
        hidden = self.embed_tokens(packed.input_ids)  # (T, D)
        rotary = rotary_tables(packed.positions, self.config.head_dim, self.config.rope_theta)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(
                    layer, hidden, rotary, packed, causal=causal, use_reentrant=False
                )
            else:
                hidden = layer(hidden, rotary, packed, causal=causal)
        return self.norm(hidden)


def initialise(model: Qwen2, seed: int) -> None:
    """Fill a fresh decoder as transformers does: N(0, initializer_range), biases 0, norms 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                # Drawn on the CPU in float32, so that a seed means the same on every device.
                draw = torch.empty(parameter.shape).normal_(generator=generator)
                parameter.copy_(draw * model.config.initializer_range)
