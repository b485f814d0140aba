"""Attention over packed sequences: one function, two ways to compute it.

T  packed tokens    H  query heads    K  key/value heads    E  head size

On CUDA in bfloat16 or float16 it is torch's own packed kernel. Elsewhere it is a loop of plain
scaled-dot-product attention over the sequences, which is also what the tests hold the kernel
against. Nothing else in the package may call either: the kernel's signature moved between torch
releases (`enable_gqa` is looked for, not assumed), and this is the one place to follow it.
"""

import inspect
from functools import cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
) -> Tensor:
    """Softmax attention in which every token sees only its own sequence, scaled by E^-0.5.

    Args:
        query: (T, H, E).
        key, value: (T, K, E); key head k serves query heads k*H/K to (k+1)*H/K - 1.
        cu_seqlens: (B + 1,) int32 boundaries.
        max_seqlen: the longest sequence.
        causal: True: a token sees itself and what stands before it. False: its whole sequence.

    Returns:
        (T, H, E), the dtype of `query`.
    """
    if query.is_cuda and query.dtype in {torch.bfloat16, torch.float16}:
        return _kernel(query, key, value, cu_seqlens, max_seqlen, causal=causal)
    return per_sequence_attention(query, key, value, cu_seqlens, causal=causal)


def per_sequence_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *, causal: bool
) -> Tensor:
    """The plain twin of the kernel: one call a run of equally long sequences; shapes as above."""
    runs = [(n, len(list(group))) for n, group in groupby(cu_seqlens.diff().tolist())]
    # Split once: the gradient of a split is one concatenation, that of a slice as long as the batch.
    sizes = [length * count for length, count in runs]
    parts = zip(runs, *(x.split(sizes) for x in (query, key, value)), strict=True)
    outputs = []
    for (length, _), *tensors in parts:
        q, k, v = (
            x.unflatten(0, (-1, length)).transpose(1, 2) for x in tensors
        )  # (n, H|K, length, E)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        outputs.append(mixed.transpose(1, 2).flatten(0, 1))  # (n * length, H, E)
    return torch.cat(outputs)  # (T, H, E)


@cache
def _kernel_takes_grouped_heads() -> bool:
    """torch 2.11 has no `enable_gqa`; 2.12 and later do."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
) -> Tensor:
    """torch's packed kernel; a window of (-1, 0) looks back without limit and never ahead."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0) if causal else (-1, -1)}
    if _kernel_takes_grouped_heads():
        options["enable_gqa"] = True
    else:
        repeats = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(repeats, dim=1)  # (T, H, E)
        value = value.repeat_interleave(repeats, dim=1)  # (T, H, E)
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    mixed = varlen_attn(query, key, value, *bounds, **options)
    assert isinstance(mixed, Tensor)  # a tuple only where auxiliary results are asked for
    return mixed
