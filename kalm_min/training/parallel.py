"""Distributes a finished model from outside: the model itself does not depend on processes.

Both strategies give the gradient of the mean of the processes' losses. Activation checkpointing and
the compilation of each layer come before either.
"""

import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from kalm_min.model import Qwen2
from kalm_min.options import ParallelConfig
from kalm_min.training import distributed


def wrap(model: Qwen2, config: ParallelConfig, *, bfloat16: bool = False) -> nn.Module:
    """Distribute, in place, a model whose parameters are the same on every process.

    Returns the module to call instead. With `bfloat16`, fsdp gathers and computes in bfloat16 and
    reduces gradients in float32; ddp leaves the precision to autocast. Raises ValueError if
    compilation is requested and there is no compiler.
    """
    model.gradient_checkpointing = config.gradient_checkpointing
    if config.compile:
        compiler = os.environ.get("CXX", "g++")  # torch's choice on a CPU; on CUDA triton compiles
        if next(model.parameters()).device.type == "cpu" and not shutil.which(compiler):
            raise ValueError(f"--parallel.compile: expected a C++ compiler, {compiler}, found none")
        for layer in model.layers:
            layer.compile(dynamic=True)  # lengths change from chunk to chunk
    if distributed.world_size() == 1:
        return model
    if config.strategy == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    # Inputs are not cast: the rotary tables must keep float32.
    dtypes = (torch.bfloat16, torch.float32) if bfloat16 else (None, None)
    policy = MixedPrecisionPolicy(*dtypes, cast_forward_inputs=False)
    for module in (*model.layers, model):
        fully_shard(module, mp_policy=policy)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether every forward pass of the model is collective."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Keep the gradients of backward passes inside local; the next one outside averages them all.

    Sharded models always reduce, since full gradients would need the memory that is saved.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (a collective call); others are returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, tensor: Tensor) -> Tensor:
    """The full `value` on the device of `tensor`, sharded as `tensor` is."""
    value = value.to(tensor.device)
    if not isinstance(tensor, DTensor) or value.dim() == 0:
        return value
    return distribute_tensor(value, tensor.device_mesh, tensor.placements)
