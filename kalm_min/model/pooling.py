"""From hidden states of tokens to one vector a sequence.

T  packed tokens    B  sequences    P  tokens of a shared prefix    D  model width

Pooling, truncation and normalisation are here and nowhere else, so that training, encoding and
evaluation cannot disagree about them.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Pooling = Literal["mean", "lasttoken"]
"""sentence-transformers' names."""


def pool(hidden: Tensor, cu_seqlens: Tensor, mode: Pooling, prefix: int = 0) -> Tensor:
    """One vector a sequence.

    Args:
        hidden: (T, D).
        cu_seqlens: (B + 1,) int32 boundaries; no sequence is empty.
        mode: "mean" over all tokens, prompt and end-of-text included (KaLM), or "lasttoken".
        prefix: P, tokens before the first sequence that belong to all of them.

    Returns:
        (B, D), float32 at least: a bfloat16 sum over 512 tokens would lose the small ones.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if mode == "lasttoken":
        return hidden[cu_seqlens[1:].long() - 1].to(wide)  # (B, D)
    shared, own = hidden.to(wide).tensor_split([prefix])  # (P, D), (T - P, D)
    lengths = cu_seqlens.diff().long()  # (B,)
    sums = torch.segment_reduce(own, "sum", lengths=lengths, axis=0) + shared.sum(0)  # (B, D)
    return sums / (prefix + lengths)[:, None]


def truncate(vectors: Tensor, dim: int | None, *, normalize: bool = True) -> Tensor:
    """The first `dim` coordinates (Matryoshka), then unit length; a zero vector stays zero.

    Args:
        vectors: (B, D).
        dim: None keeps all; otherwise 1 to D.
        normalize: False returns the plain slice.

    Returns:
        (B, dim). A slice of a unit vector is shorter than 1, so it is normalised again.
    """
    if dim is not None:
        if not 1 <= dim <= vectors.shape[-1]:
            raise ValueError(f"truncate_dim: expected 1 to {vectors.shape[-1]}, found {dim}")
        vectors = vectors[..., :dim]
    return F.normalize(vectors, dim=-1) if normalize else vectors
