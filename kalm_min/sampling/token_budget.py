"""Group texts of like length into batches of a bounded number of tokens.

There is no padding, so a batch costs its tokens; length sorting only keeps the longest sequence of
a batch (which sets the attention kernel's grid) close to the others.

Not here: tokenizing, and putting results back in order (the batches hold indices for that).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def token_budget_batches(lengths: Sequence[int], max_tokens: int) -> list[npt.NDArray[np.int64]]:
    """Cut the texts, longest first, into batches of at most `max_tokens` tokens.

    Args:
        lengths: tokens of each text, all positive.
        max_tokens: the budget of a batch. A single longer text is a batch of its own.

    Returns:
        Arrays of indices into `lengths`, none empty. Texts of equal length keep their order. There
        are as few batches as the order allows, and the fullest is as small as their number allows,
        so that no tiny batch is left for the end.
    """
    sizes = np.asarray(lengths, dtype=np.int64)  # (n,)
    assert sizes.ndim == 1 and (sizes > 0).all(), "every text needs at least one token"
    assert max_tokens > 0, "the token budget must be positive"
    if len(sizes) == 0:
        return []
    order = np.argsort(-sizes, kind="stable")  # (n,)
    ends = np.cumsum(sizes[order])  # (n,) tokens up to and with each text
    cuts = _cuts(ends, max_tokens)
    # The smallest budget that needs no more batches, by bisection.
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        tried = _cuts(ends, middle)
        if len(tried) <= len(cuts):
            cuts, high = tried, middle
        else:
            low = middle + 1
    return np.split(order, cuts[:-1])


def _cuts(ends: npt.NDArray[np.int64], budget: int) -> list[int]:
    """Where each batch ends (exclusive) when every batch is filled as far as the budget goes."""
    cuts: list[int] = []
    start = used = 0
    while start < len(ends):
        # At least one text: one that is longer than the budget goes alone.
        start = max(start + 1, int(np.searchsorted(ends, used + budget, side="right")))
        used = int(ends[start - 1])
        cuts.append(start)
    return cuts
