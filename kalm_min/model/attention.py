"""Attention over packed sequences: one function, two ways to compute it.

T  packed tokens    B  sequences    P  tokens of a shared prefix
H  query heads      K  key/value heads      E  head size

On CUDA in bfloat16 or float16 it is torch's packed kernel. Elsewhere it is a loop of plain
scaled-dot-product attention over the sequences, which is also the oracle of the kernel's tests.
No other module calls the kernel: its signature moved between torch releases.
"""

import inspect
from functools import cache, partial
from itertools import groupby

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
        causal: True: a token sees itself and what precedes it. False: its full sequence.

    Returns:
        (T, H, E), the dtype of `query`.
    """
    assert causal or not prefix, "tokens of a shared prefix must not see what follows them"
    cu_keys, max_keys = cu_seqlens, prefix + max_seqlen
    if prefix:
        rows, cu_keys = rows_with_prefix(cu_seqlens, prefix, len(query))
        key, value = key[rows], value[rows]  # (T + B * P, K, E)
        cu_seqlens = F.pad(cu_seqlens, (1, 0))  # the prefix is the first text
    if not (query.is_cuda and query.dtype in {torch.bfloat16, torch.float16}):
        return per_sequence_attention(query, key, value, cu_seqlens, cu_keys, causal=causal)
    from torch.nn.attention.varlen import varlen_attn

    # A window of (-1, 0) looks back without limit and never ahead.
    attend = partial(varlen_attn, window_size=(-1, 0) if causal else (-1, -1))
    if _kernel_takes_grouped_heads():
        attend = partial(attend, enable_gqa=True)
    else:
        repeats = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(repeats, dim=1)  # (T + B * P, H, E)
        value = value.repeat_interleave(repeats, dim=1)  # (T + B * P, H, E)
    bounds = (cu_seqlens, cu_keys, max(max_seqlen, prefix), max_keys)
    mixed = attend(query, key, value, *bounds)
    assert isinstance(mixed, Tensor)  # a tuple only where auxiliary results are requested
    return mixed


def per_sequence_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    *,
    causal: bool,
) -> Tensor:
    """What the kernel computes, in plain torch: one call per run of equally long sequences.

    Where a sequence has more keys than queries, its queries are its last tokens.
    """
    lengths = zip(cu_queries.diff().tolist(), cu_keys.diff().tolist(), strict=True)
    runs = [(*length, len(list(group))) for length, group in groupby(lengths)]
    # Split once: the gradient of a split is one concatenation, that of a slice as long as the batch.
    queries = query.split([n * count for n, _, count in runs])
    keys, values = (x.split([m * count for _, m, count in runs]) for x in (key, value))
    outputs: list[Tensor] = []
    for (n, m, count), q, k, v in zip(runs, queries, keys, values, strict=True):
        q = q.unflatten(0, (count, n)).transpose(1, 2)  # (count, H, n, E)
        k, v = (x.unflatten(0, (count, m)).transpose(1, 2) for x in (k, v))  # (count, K, m, E)
        mask = None if n == m else torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        mixed = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal and mask is None, enable_gqa=True
        )
        outputs.append(mixed.transpose(1, 2).flatten(0, 1))  # (count * n, H, E)
    return torch.cat(outputs)  # (T, H, E)


@cache
def _kernel_takes_grouped_heads() -> bool:
    """torch 2.11 has no `enable_gqa`; 2.12 and later do."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


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
    count = total + (len(texts) - 1) * prefix  # computed here: asking the device for it would wait
    text = torch.repeat_interleave(texts, bounds.diff(), output_size=count)  # (T + B * P,)
    position = torch.arange(count, device=cu_seqlens.device) - bounds[text]  # in its own text
    start = F.pad(cu_seqlens[:-1], (1, 0)) - prefix  # the row of position 0 of each text
    return torch.where(position < prefix, position, position + start[text]), bounds
