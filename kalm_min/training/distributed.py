"""The process group, as functions that do nothing alone.

W  processes    n  rows of this process    N  rows of all processes    D  width

Every function here works without a process group too (one process, world size 1), so the same
training step runs on a laptop, in a unit test and on many nodes. How many nodes there are is
torchrun's business.
"""

import gc
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames both and warns at the old names, which 2.11 has alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_TIMEOUT = timedelta(minutes=30)  # a step's exchange that takes longer never ends
_PATIENCE = timedelta(days=7)  # one process may read data or write files for hours

# Processes that wait for one another do it on the CPU, apart from a step's exchanges and with more
# patience; a process that is gone ends the wait at once, its connections being closed.
_waiting: dist.ProcessGroup | None = None

T = TypeVar("T")


def start(environment: dict[str, str], device: torch.device) -> None:
    """Join the group that torchrun's variables describe; nothing happens without them."""
    global _waiting
    if "WORLD_SIZE" in environment:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT)
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        assert isinstance(group, dist.ProcessGroup), "every process is a member"
        _waiting = group


def stop() -> None:
    """Leave the group, if in one."""
    global _waiting
    if dist.is_initialized():
        _waiting = None
        gc.collect()  # wrapped models are reference cycles that hold on to the group's threads
        dist.destroy_process_group()


def hard_exit(code: int) -> NoReturn:
    """Exit; a process that was in a group does so without the interpreter's own ending.

    Caches of torch hold on to the group of a sharded model past `stop`, and its threads: one that
    wants the interpreter while it ends aborts the process, whose work was done.
    """
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_loss_of_peer(error: RuntimeError) -> bool:
    """Whether an exchange failed because another process, or the way to it, is gone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def local_device(environment: dict[str, str]) -> torch.device:
    """This process's own GPU, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(environment.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def rank() -> int:
    """This process's number, 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every process, however long it takes."""
    if dist.is_initialized():
        dist.barrier(_waiting)


def rank_zero_first(action: Callable[[], T]) -> T:
    """Do something on rank 0, then on the others, which find what it left (an index, say).

    What rank 0 refuses with a ValueError is refused on all.
    """
    result: list[T] = []
    refusal: ValueError | None = None
    if rank() == 0:
        try:
            result.append(action())
        except ValueError as error:
            refusal = error
    if refusal := gather_objects(refusal)[0]:
        raise refusal
    return result[0] if result else action()


def mean(value: Tensor) -> Tensor:
    """The mean over processes of a tensor of equal shape on each."""
    if world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / world_size()


def max_over_ranks(number: int, device: torch.device) -> int:
    """The largest number any process has: all decide alike."""
    if world_size() == 1:
        return number
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def gather_objects(value: object) -> list[Any]:
    """A small Python object of every process, by rank, however long one of them takes."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_waiting)
    return values


def row_counts(rows: int, device: torch.device) -> list[int]:
    """How many rows each process has, by rank."""
    if world_size() == 1:
        return [rows]
    counts = torch.empty(world_size(), dtype=torch.int64, device=device)
    _all_gather(counts, torch.tensor([rows], device=device))
    return counts.tolist()


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """The rows of all processes, by rank, with gradient.

    Args:
        rows: (n, ...) of this process.
        counts: `row_counts`, which may differ.

    Returns:
        (N, ...). The gradient of a row is the sum of what every process's loss gives it, so the
        mean of the processes' losses has exactly the gradient of one process with all rows. (A
        gather without gradient, or with the gradient of the local slice only, trains on a wrong
        direction or at 1/W of the scale.)
    """
    if world_size() == 1:
        return rows
    most = max(counts)
    padding = rows.new_zeros(most - len(rows), *rows.shape[1:])
    gathered = _GatherEqual.apply(torch.cat([rows, padding]))  # (W * most, ...)
    return torch.cat([gathered[i * most : i * most + n] for i, n in enumerate(counts)])  # (N, ...)


class _GatherEqual(torch.autograd.Function):
    """all_gather forward, reduce_scatter (sum) backward; every process has as many rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
        _all_gather(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        own = gradient.new_empty(gradient.shape[0] // world_size(), *gradient.shape[1:])
        _reduce_scatter(own, gradient.contiguous())
        return own


def describe() -> dict[str, Any]:
    """What a run's environment.json says of the group."""
    return {
        "world_size": world_size(),
        "backend": dist.get_backend() if dist.is_initialized() else None,
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }
