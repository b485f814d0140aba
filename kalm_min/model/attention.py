"""Attention over packed sequences: one function, two ways to compute it.

T  packed tokens    B  sequences    P  tokens of a shared prefix
H  query heads      K  key/value heads      E  head size

On CUDA in bfloat16 or float16 it is torch's packed kernel, elsewhere a loop of plain scaled-dot-
product attention, which is also the oracle of the kernel's tests. No other module calls the kernel.
"""

from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from kalm_min.model.packed import Packed


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, *, causal: bool
) -> Tensor:
    """Softmax attention in which every token sees only its own text, scaled by E^-0.5.

    query (T, H, E), key and value (T, K, E) to (T, H, E) in the dtype of `query`; key head k serves
    query heads k*H/K to (k+1)*H/K - 1. `packed` says where the sequences are. A token attends
    to itself and what precedes it if `causal` (needed for a shared prefix), else to its sequence.
    """
    prefix, cu_queries, cu_keys = packed.prefix, packed.cu_seqlens, packed.cu_seqlens
    if packed.key_rows is not None:
        assert causal, "tokens of a shared prefix must not see what follows them"
        key, value = key[packed.key_rows], value[packed.key_rows]  # (T + B * P, K, E)
        # The prefix is the first text; its keys come before the keys of every other text.
        shift = torch.arange(len(cu_keys), dtype=torch.int32, device=cu_keys.device) * prefix
        cu_queries, cu_keys = F.pad(cu_queries, (1, 0)), F.pad(cu_keys + shift, (1, 0))
    if not (query.is_cuda and query.dtype in {torch.bfloat16, torch.float16}):
        return per_sequence_attention(query, key, value, cu_queries, cu_keys, causal=causal)
    from torch.nn.attention.varlen import varlen_attn

    if torch.__version__ < "2.12":  # its kernel needs one key head per query head
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))  # (.., H, E)
        attend = varlen_attn
    else:
        attend = partial(varlen_attn, enable_gqa=True)
    longest = (max(packed.max_seqlen, prefix), prefix + packed.max_seqlen)
    window = (-1, 0 if causal else -1)  # unlimited to the left; nothing or unlimited to the right
    bounds = (cu_queries, cu_keys, *longest)
    mixed = attend(query, key, value, *bounds, window_size=window)
    assert isinstance(mixed, Tensor)  # a tuple only where auxiliary results are requested
    return mixed


def per_sequence_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_queries: Tensor, cu_keys: Tensor, *, causal: bool
) -> Tensor:
    """The function of the kernel in plain torch: one call per run of equally long sequences.

    If a sequence has more keys than queries, the queries are its last tokens.
    """
    lengths = zip(cu_queries.diff().tolist(), cu_keys.diff().tolist(), strict=True)
    runs = [(*length, len(list(group))) for length, group in groupby(lengths)]
    # Split once: the gradient of a split is one concatenation; a slice's is batch-long.
    queries = query.split([n * count for n, _, count in runs])
    keys, values = (x.split([m * count for _, m, count in runs]) for x in (key, value))
    outputs: list[Tensor] = []
    for (n, m, count), *parts in zip(runs, queries, keys, values, strict=True):
        # (count, heads, ., E) each
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in parts)
        mask = None if n == m else torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        mixed = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal and mask is None, enable_gqa=True
        )
        outputs.append(mixed.transpose(1, 2).flatten(0, 1))  # (count * n, H, E)
    return torch.cat(outputs)  # (T, H, E)
