"""Model soup: one model whose every parameter is the weighted mean of several models'.

Fine-tuned checkpoints of one ancestor lie in one basin, and their mean is often better than each of
them (Wortsman et al. 2022; LM-Cocktail, Xiao et al. 2023; the first versions of the KaLM V2 report,
which give neither number nor weights of the checkpoints).

Not here: which checkpoints may be mixed; `python -m kalm_min.soup` looks at that.
"""

from collections.abc import Sequence

import torch

from kalm_min.model.qwen2 import Qwen2

_BLOCK = 2**22  # numbers averaged at a time: 32 MiB a model in float64


@torch.no_grad()
def average(models: Sequence[Qwen2], weights: Sequence[float]) -> None:
    """Make the first model the weighted mean of all, in place, in its own dtype.

    Sums are taken in float64, block by block: beside the models no memory is needed, and models whose
    weights are views of their files stay on the disk, but for the first.

    Args:
        models: of one shape, on one device.
        weights: one a model.
    """
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        assert all(parameter.shape == parameters[0].shape for parameter in parameters)
        for blocks in zip(*(p.view(-1).split(_BLOCK) for p in parameters), strict=True):
            mean = torch.zeros_like(blocks[0], dtype=torch.float64)
            for weight, block in zip(weights, blocks, strict=True):
                mean.add_(block.double(), alpha=weight)
            blocks[0].copy_(mean)
