"""The one batch type: sequences laid end to end, without padding.

T  tokens of all sequences together     B  sequences

A padded batch needs a mask that every later step must honour; a packed one needs only the
boundaries, and the work done is the work asked for.
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
    """(T,) int64 place of each token in its own sequence, from 0."""
    cu_seqlens: Tensor
    """(B + 1,) int32 boundaries: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1]."""
    max_seqlen: int
    """Length of the longest sequence."""

    @classmethod
    def from_sequences(
        cls, sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> "Packed":
        """Pack lists of token ids, none of them empty, in the order given."""
        lengths = [len(ids) for ids in sequences]
        assert lengths and min(lengths) > 0, "an empty sequence has no vector to pool"
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)  # (B + 1,)
        input_ids = torch.tensor(list(chain.from_iterable(sequences)))  # (T,)
        starts = torch.repeat_interleave(bounds[:-1], torch.tensor(lengths))  # (T,)
        positions = torch.arange(len(input_ids)) - starts  # (T,)
        return cls(
            input_ids.to(device, non_blocking=True),
            positions.to(device, non_blocking=True),
            bounds.to(device, non_blocking=True),
            max(lengths),
        )
