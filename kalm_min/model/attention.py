"""Attention over packed sequences: one function, two ways to compute it.

T  packed tokens    B  sequences    P  tokens of a shared prefix
H  query heads      K  key/value heads      E  head size

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
    prefix: int = 0,
    *,
    causal: bool,
) -> Tensor:
    """Softmax attention in which every token sees only its own text, scaled by E^-0.5.

    Args:
        query: (T, H, E).
        key, value: (T, K, E); key head k serves query heads k*H/K to (k+1)*H/K - 1.
        cu_seqlens: (B + 1,) int32 boundaries.
        max_seqlen: the longest sequence.
        prefix: P, tokens that stand before every sequence; only with `causal`.
        causal: True: a token sees itself and what stands before it. False: its whole sequence.

    Returns:
        (T, H, E), the dtype of `query`.
    """
    assert causal or not prefix, "tokens of a shared prefix must not see what follows them"
    if query.is_cuda and query.dtype in {torch.bfloat16, torch.float16}:
        return _kernel(query, key, value, cu_seqlens, max_seqlen, prefix, causal=causal)
    return per_sequence_attention(query, key, value, cu_seqlens, prefix, causal=causal)


def per_sequence_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, prefix: int = 0, *, causal: bool
) -> Tensor:
    """The plain twin of the kernel: one call a run of equally long sequences; shapes as above."""
    runs = [(n, len(list(group))) for n, group in groupby(cu_seqlens.diff().tolist())]
    if prefix:
        runs.insert(0, (prefix, 1))
    # Split once: the gradient of a split is one concatenation, that of a slice as long as the batch.
    sizes = [length * count for length, count in runs]
    parts = zip(runs, *(x.split(sizes) for x in (query, key, value)), strict=True)
    outputs, before = [], None
    for (length, count), *tensors in parts:
        q, k, v = (
            x.unflatten(0, (-1, length)).transpose(1, 2) for x in tensors
        )  # (n, H|K, length, E)
        mask = None
        if before is not None:
            k, v = (
                torch.cat([shared.expand(count, -1, -1, -1), own], dim=2)
                for shared, own in zip(before, (k, v), strict=True)
            )  # (n, K, P + length, E)
            mask = torch.ones(length, prefix + length, dtype=torch.bool, device=q.device)
            mask = mask.tril(prefix)
        elif prefix:
            before = k, v  # (1, K, P, E) each
        mixed = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal and mask is None, enable_gqa=True
        )
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
    prefix: int,
    *,
    causal: bool,
) -> Tensor:
    """torch's packed kernel; a window of (-1, 0) looks back without limit and never ahead.

    Where a text has more keys than queries, the queries are its last tokens.
    """
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0) if causal else (-1, -1)}
    if _kernel_takes_grouped_heads():
        options["enable_gqa"] = True
    else:
        repeats = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(repeats, dim=1)  # (T, H, E)
        value = value.repeat_interleave(repeats, dim=1)  # (T, H, E)
    cu_keys = cu_seqlens
    if prefix:
        rows, cu_keys = rows_with_prefix(cu_seqlens, prefix, len(query))
        key, value = key[rows], value[rows]  # (T + B * P, H|K, E)
        cu_seqlens = F.pad(cu_seqlens, (1, 0))  # the prefix is the first text
    bounds = (cu_seqlens, cu_keys, max(max_seqlen, prefix), prefix + max_seqlen)
    mixed = varlen_attn(query, key, value, *bounds, **options)
    assert isinstance(mixed, Tensor)  # a tuple only where auxiliary results are asked for
    return mixed


def rows_with_prefix(cu_seqlens: Tensor, prefix: int, total: int) -> tuple[Tensor, Tensor]:
    """The rows of every text's keys, the prefix written out before each sequence.

    Args:
        cu_seqlens: (B + 1,) int32 boundaries from P on.
        prefix: P, tokens before the first sequence.
        total: T.

    Returns:
        (T + B * P,) rows of the packed tokens, of the prefix itself and then of each text, and
        their (B + 2,) int32 boundaries.
    """
    texts = torch.arange(len(cu_seqlens), device=cu_seqlens.device)  # (B + 1,)
    bounds = F.pad(cu_seqlens + texts * prefix, (1, 0)).int()  # (B + 2,)
    count = total + (len(texts) - 1) * prefix  # known here: asking the device for it would wait
    text = torch.repeat_interleave(texts, bounds.diff(), output_size=count)  # (T + B * P,)
    place = torch.arange(count, device=cu_seqlens.device) - bounds[text]  # in its own text
    own = F.pad(cu_seqlens[:-1], (1, 0)) - prefix  # where place 0 of each text would stand
    return torch.where(place < prefix, place, place + own[text]), bounds
