"""A batch as sequences laid end to end, and one vector per sequence from its hidden states.

T  tokens of all sequences    B  sequences    P  tokens of a shared prefix    D  hidden size

A packed batch has no padding and no mask, only boundaries. Tokens with which all texts of a causal
batch begin (an instruction) never attend to what follows, so the batch may hold them once, before
the sequences; only attention and pooling handle them. Pooling, truncation and normalization are
implemented only here, so training, encoding and evaluation cannot disagree about them.
"""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kalm_min.settings import Pooling, Precision


class Packed(NamedTuple):
    """B sequences laid end to end."""

    input_ids: Tensor
    """(T,) int64 token ids."""
    positions: Tensor
    """(T,) int64 position of each token in its own text, from 0."""
    cu_seqlens: Tensor
    """(B + 1,) int32 boundaries: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1]."""
    max_seqlen: int
    """Length of the longest sequence."""
    prefix: int = 0
    """P: the first P tokens belong in front of every sequence, and cu_seqlens[0] is P."""
    key_rows: Tensor | None = None
    """With a prefix: int64 rows of its tokens, then of the tokens of each text, prefix included."""

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        prefix: Sequence[int] = (),
    ) -> "Packed":
        """Pack non-empty lists of token ids in the order given; `prefix` precedes each of them."""
        shared, lengths = len(prefix), [len(ids) for ids in sequences]
        assert lengths and min(lengths) > 0, "an empty sequence has no vector to pool"
        bounds = torch.tensor([*accumulate(lengths, initial=shared)], dtype=torch.int32)  # (B + 1,)
        input_ids = torch.tensor([*prefix, *chain.from_iterable(sequences)])  # (T,)
        rows = torch.arange(len(input_ids))  # (T,)
        positions = rows.clone()
        positions[shared:] -= torch.repeat_interleave(bounds[:-1] - shared, torch.tensor(lengths))
        tensors = [input_ids, positions, bounds]
        if shared:
            start, *rest = rows.split([shared, *lengths])
            tensors.append(torch.cat([start, *chain.from_iterable((start, text) for text in rest)]))
        input_ids, positions, bounds, *keys = (x.to(device, non_blocking=True) for x in tensors)
        return cls(input_ids, positions, bounds, max(lengths), shared, *keys)


def pool(hidden: Tensor, cu_seqlens: Tensor, mode: Pooling, prefix: int = 0) -> Tensor:
    """One vector per sequence: hidden (T, D) and boundaries (B + 1,) int32 to (B, D).

    "mean" is over all tokens, including the prompt and end-of-text token (KaLM). The `prefix`
    tokens before the first sequence belong to every sequence. No sequence is empty. The result is
    at least float32: a bfloat16 sum over 512 tokens would lose small values.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if mode == "lasttoken":
        return hidden[cu_seqlens[1:].long() - 1].to(wide)  # (B, D)
    shared, rest = hidden.to(wide).tensor_split([prefix])  # (P, D), (T - P, D)
    lengths = cu_seqlens.diff().long()  # (B,)
    sums = torch.segment_reduce(rest, "sum", lengths=lengths, axis=0) + shared.sum(0)  # (B, D)
    return sums / (prefix + lengths)[:, None]


def truncate(vectors: Tensor, dim: int | None, *, normalize: bool = True) -> Tensor:
    """The first `dim` coordinates (Matryoshka; None: all) of vectors (B, D), at unit length.

    A slice of a unit vector is shorter than 1, so it is normalized again; a zero vector stays zero.
    Raises ValueError if there are fewer coordinates.
    """
    if dim is not None and not 1 <= dim <= vectors.shape[-1]:
        raise ValueError(f"truncate_dim: expected 1 to {vectors.shape[-1]}, found {dim}")
    return F.normalize(vectors[..., :dim], dim=-1) if normalize else vectors[..., :dim]


def quantize(
    vectors: NDArray[np.floating], precision: Precision, ranges: NDArray[np.floating] | None = None
) -> NDArray[Any]:
    """Vectors (n, D) in fewer bits, by the byte as sentence-transformers' `quantize_embeddings`.

    "int8" and "uint8": (n, D), each coordinate's range in 256 equal steps. A range is from the
    minimum to the maximum in the rows of `ranges` (m, D): two rows, or vectors to calibrate by; by
    default the vectors themselves, but only equal ranges give vectors that can be compared.
    "binary" (as int8) and "ubinary" (as uint8): (n, ceil(D / 8)), the signs, eight in a byte.
    Raises ValueError for unknown precisions, ranges of another width, or one vector without them.
    """
    width = vectors.shape[-1]
    if precision not in get_args(Precision) or vectors.dtype.kind != "f":
        expected = f"{', '.join(get_args(Precision))} of float vectors"
        raise ValueError(f"precision: expected {expected}, found {precision!r} of {vectors.dtype}")
    if precision == "float32":
        return vectors
    if precision.endswith("binary"):
        packed = np.packbits(vectors > 0, axis=-1)
        return packed if precision == "ubinary" else (packed - 128).astype(np.int8)
    if ranges is not None and (ranges.ndim != 2 or ranges.shape[1] != width or not len(ranges)):
        raise ValueError(f"ranges: expected shape (2 or more, {width}), found {ranges.shape}")
    if ranges is None and vectors.size == width:
        raise ValueError(f"precision {precision}: one vector has no range, so ranges are needed")
    if not vectors.size:
        return vectors.astype(precision)
    known = vectors if ranges is None else ranges
    low, high = (edge(known, axis=0).astype(np.float32) for edge in (np.min, np.max))
    steps = (high - low) / 255
    levels = np.clip(np.floor((vectors - low) / np.where(steps == 0, 1, steps)), 0, 255)
    return (levels - 128 * (precision == "int8")).astype(precision)
