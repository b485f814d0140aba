"""The one batch type: sequences laid end to end, without padding.

T  tokens of all sequences together     B  sequences     P  tokens of a shared prefix

A padded batch needs a mask that every later step must honour; a packed one needs only the
boundaries, and the work done is the work asked for.

Where all texts begin alike (queries under one instruction) and the model is causal, that beginning
never sees what follows, so it is the same in all of them. It then stands in the batch once, before
the sequences: only attention and pooling have to know.
"""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """B sequences laid end to end."""

    input_ids: Tensor
    """(T,) int64 token ids."""
    positions: Tensor
    """(T,) int64 place of each token in its own text, from 0."""
    cu_seqlens: Tensor
    """(B + 1,) int32 boundaries: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1]."""
    max_seqlen: int
    """Length of the longest sequence."""
    prefix: int = 0
    """P: the first P tokens stand before every sequence, and cu_seqlens[0] is P."""

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        prefix: Sequence[int] = (),
    ) -> "Packed":
        """Pack lists of token ids, none of them empty, in the order given.

        Args:
            sequences: of each text, what follows the prefix.
            device: where to.
            prefix: token ids that every text begins with.
        """
        shared, lengths = len(prefix), [len(ids) for ids in sequences]
        assert lengths and min(lengths) > 0, "an empty sequence has no vector to pool"
        bounds = torch.tensor([*accumulate(lengths, initial=shared)], dtype=torch.int32)  # (B + 1,)
        input_ids = torch.tensor([*prefix, *chain.from_iterable(sequences)])  # (T,)
        positions = torch.arange(len(input_ids))  # (T,)
        positions[shared:] -= torch.repeat_interleave(bounds[:-1] - shared, torch.tensor(lengths))
        return cls(
            input_ids.to(device, non_blocking=True),
            positions.to(device, non_blocking=True),
            bounds.to(device, non_blocking=True),
            max(lengths),
            shared,
        )
