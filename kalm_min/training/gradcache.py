"""Gradient caching: the gradient of one large contrastive batch in the memory of a small one.

n  texts of this process's share of the batch    D  dimension

A contrastive loss couples all texts of a batch, but only through their vectors:

    1. embed all texts, chunk by chunk, without a graph               -> vectors (n, D)
    2. compute the loss and its gradient with respect to the vectors  -> g (n, D)
    3. embed each chunk again, with a graph, and send its rows of g back through it

The memory is that of one chunk for any n; the gradient is the same (Gao et al. 2021, "Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup"). Step 3 repeats step 1 exactly because
the decoder has no dropout. With one chunk, steps 1 and 3 are the same forward pass: plain backward.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from kalm_min.model import Packed


def cached_backward(
    embed: Callable[[Packed], Tensor],
    chunks: Sequence[Packed],
    rows: Sequence[np.ndarray],
    loss: Callable[[Tensor], Tensor],
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
    *,
    rounds: int | None = None,
    sharded: bool = False,
) -> Tensor:
    """Add the gradient of the loss of all vectors to the parameters; return the detached loss.

    Args:
        embed: (b, D) vectors of a packed chunk.
        chunks: the texts, packed.
        rows: for each chunk, the indices of its texts among all n.
        loss: a scalar of the (n, D) vectors. It may communicate: every process calls it once.
        no_sync: entered around every replay but the last, so that processes exchange parameter
            gradients once per step.
        rounds: the largest number of chunks of any process; by default that of this process. All
            processes use plain backward or none: a wrapped model may communicate in its forward
            pass, and so does the loss, and communication must have one order on all processes.
        sharded: every call of `embed` is collective, so all processes make `rounds` calls.
    """
    rounds = rounds or len(chunks)
    spare = rounds - len(chunks) if sharded else 0
    order = torch.from_numpy(np.concatenate(rows))
    if rounds == 1:
        vectors = embed(chunks[0])
        value = loss(vectors[order.argsort()])
        value.backward()
        return value.detach()
    with torch.no_grad():
        vectors = torch.cat([embed(chunk) for chunk in chunks])[order.argsort()]
        for _ in range(spare):
            embed(chunks[0])
    leaf = vectors.requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    gradients = leaf.grad[order].split([len(indices) for indices in rows])
    for number, (chunk, gradient) in enumerate(zip(chunks, gradients, strict=True), start=1):
        with nullcontext() if number == len(chunks) else no_sync():
            embed(chunk).backward(gradient)
    for _ in range(spare):
        (0 * embed(chunks[0])).sum().backward()
    return value.detach()
