"""The process group, as functions that also work without one.

W  processes    n  rows of this process    N  rows of all processes

A single process has rank 0 and world size 1, so the same step runs on a laptop, in a unit test and
on many nodes. torchrun starts the processes.
"""

import ctypes
import gc
import signal
import socket
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kalm_min import files
from kalm_min.files import AnyPath

# torch 2.13 renames both and warns about the old names, the only ones that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Processes wait for one another on the CPU, apart from a step's exchanges and with a longer timeout;
# the loss of a process ends the wait at once, because its connections close.
_wait_group: dist.ProcessGroup | None = None

T = TypeVar("T")


def start(environment: Mapping[str, str], device: torch.device) -> None:
    """Join the group that torchrun's variables describe; without them, do nothing."""
    global _wait_group
    if "WORLD_SIZE" in environment:
        _end_with_agent(environment)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))  # for a step's exchange
        # One process may read data or write files for hours.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        assert isinstance(group, dist.ProcessGroup), "every process is a member"
        _wait_group = group


def _end_with_agent(environment: Mapping[str, str]) -> None:
    """Make the kernel end this process with torchrun's agent, even one that is killed.

    Else it would go on beside its successor. Raises OSError if the agent is already gone.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in environment:
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The agent's store is up before the workers, which wait for it for half an hour.
        address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        try:
            socket.create_connection(address, timeout=60).close()
        except OSError as error:
            raise OSError(
                f"torchrun's agent, which started this process, is gone ({error})"
            ) from error


def stop() -> None:
    """Leave the group, if in one."""
    global _wait_group
    if dist.is_initialized():
        _wait_group = None
        gc.collect()  # wrapped models are reference cycles that keep the group's threads alive
        dist.destroy_process_group()


def is_loss_of_peer(error: RuntimeError) -> bool:
    """Whether an exchange failed because another process, or the connection to it, was lost."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def local_device(environment: Mapping[str, str]) -> torch.device:
    """The GPU of this process, or the CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(environment.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every process, however long it takes."""
    if dist.is_initialized():
        dist.barrier(_wait_group)


def gather_objects(value: T) -> list[T]:
    """A small Python object from every process, by rank, however long one of them takes."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=_wait_group)
    return values


def rank_zero_first(action: Callable[[], T]) -> T:
    """Call `action` on rank 0, then on the others, which find its result (an index, for example).

    A ValueError on rank 0 is raised on all ranks.
    """
    results: list[T] = []
    error: ValueError | None = None
    try:
        if rank() == 0:
            results.append(action())
    except ValueError as found:
        error = found
    if error := gather_objects(error)[0]:
        raise error
    return results[0] if results else action()


@contextmanager
def locked(folder: AnyPath) -> Generator[None]:
    """`files.locked`, held by rank 0 for all processes; its ValueError is raised on all."""
    with ExitStack() as held:
        lock = files.locked(folder)
        rank_zero_first(lambda: held.enter_context(lock) if rank() == 0 else None)
        yield


def mean(value: Tensor) -> Tensor:
    """The mean over processes of a tensor that has the same shape on each."""
    value = value.clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value / world_size()


def row_counts(rows: int, device: torch.device) -> list[int]:
    """The number of rows (or other items) of each process, by rank."""
    if world_size() == 1:
        return [rows]
    counts = torch.empty(world_size(), dtype=torch.int64, device=device)
    _all_gather(counts, torch.tensor([rows], device=device))
    return counts.tolist()


def max_over_ranks(number: int, device: torch.device) -> int:
    """The largest number on any process, so that all processes decide alike."""
    return max(row_counts(number, device))


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """The (n, ...) rows of each process, n from `row_counts`, to (N, ...) by rank, with gradient.

    The gradient of a row is the sum of its gradients from all processes' losses, so the mean of the
    losses has exactly the gradient of one process with all rows. (A gather without
    gradient, or with that of the local slice only, gives a wrong direction or 1/W of the scale.)
    """
    if world_size() == 1:
        return rows
    padding = rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])
    gathered = _GatherEqual.apply(torch.cat([rows, padding]))  # (W * max(counts), ...)
    blocks = gathered.split(max(counts))
    return torch.cat([block[:n] for block, n in zip(blocks, counts, strict=True)])  # (N, ...)


class _GatherEqual(torch.autograd.Function):
    """all_gather forward, reduce_scatter (sum) backward; every process has as many rows.

    torch 2.13 deprecates torch.distributed.nn.functional.all_gather in favour of a private
    function, which 2.11 does not have.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
        _all_gather(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients  # (W * n, ...)
        local = gradient.new_empty(gradient.shape[0] // world_size(), *gradient.shape[1:])
        _reduce_scatter(local, gradient.contiguous())
        return local  # (n, ...)
