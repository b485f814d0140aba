"""Rotary position embedding, split-half convention.

T  packed tokens    H  heads    E  head size

Two layouts are in use. Qwen2 rotates the pairs (x_i, x_{i + E/2}), so the angles are laid out twice
as [f, f]; the interleaved layout of pairs (x_{2i}, x_{2i+1}) would give other vectors from the same
weights. Only differences of positions matter.
"""

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position.

    Args:
        positions: (T,) integers.
        head_dim: E, even.
        theta: base of the frequencies theta^(-2i/E).

    Returns:
        cos, sin: (T, 1, E) float32, ready to meet (T, H, E). float32 whatever the model's type:
        bfloat16 cannot hold a position above 256 exactly.
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
