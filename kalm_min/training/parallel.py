"""Distribution applied to a finished model, from outside.

The model knows nothing of processes; here it is wrapped so that parameter gradients are averaged
over them during backward.
"""

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kalm_min.training import distributed


def wrap(model: nn.Module) -> nn.Module:
    """Data-parallel over the process group; the model itself where there is none.

    Every process starts with rank 0's parameters.
    """
    if distributed.world_size() == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Backward passes inside leave the gradients where they are; the next one outside averages all."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
