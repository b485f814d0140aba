"""Semi-homogeneous task batching (KaLM-Embedding V1, section on data batching).

Each task is shuffled and cut into blocks of the global batch; the left-overs of all tasks are
joined, shuffled and cut into mixed blocks. With homogeneous ratio r the last int(B(1-r)) places of every
block are pooled over all blocks, shuffled and dealt back. Then the order of the blocks is shuffled.

The order of an epoch is a pure function of (sizes, batch size, ratio, seed, epoch). Every rank
computes all of it and takes its slice of each block, so ranks agree without talking. An epoch is
planned as one array of indices (4 bytes each below 2^31 rows) at a peak of about two such arrays.

Not here: reading examples, weights per task, anything of torch or of a process group.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.integer[Any]]


class TaskBatchSampler:
    """Iterate over this rank's global example indices, one list per training step.

    Example i of task t has the global index sum(task_sizes[:t]) + i. Concatenating the lists of all
    ranks in rank order gives the global batch, whatever the number of ranks.

    Args:
        task_sizes: number of examples of each task.
        batch_size: the global batch, over all ranks; a multiple of `world_size`.
        homogeneous_ratio: share of a block that stays with one task. 1 is one task per block, 0 is
            plain random sampling.
        seed: not negative. The same on every rank, like all arguments but `rank`.
        rank: this process.
        world_size: number of processes.
        drop_last: leave out the total % batch_size examples that fill no block (different ones each
            epoch). False yields them as a last, shorter batch, of which only the remainder over
            world_size is left out: ranks must take equal shares.

    Raises ValueError for arguments that contradict each other.
    """

    def __init__(
        self,
        task_sizes: Sequence[int],
        batch_size: int,
        *,
        homogeneous_ratio: float = 1.0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ) -> None:
        self.task_sizes = [int(size) for size in task_sizes]
        self.batch_size = batch_size
        self.homogeneous_ratio = homogeneous_ratio
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.epoch = 0
        self._first = 0  # where the next iteration starts; not 0 only after load_state_dict
        self._step = 0  # batches of this epoch handed out so far
        self._check()

    def _check(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {self.batch_size}")
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank must be from 0 to world_size - 1, found rank {self.rank} "
                f"of world_size {self.world_size}"
            )
        if self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size is the batch over all ranks and must be a multiple of world_size, "
                f"found batch_size {self.batch_size} with world_size {self.world_size}"
            )
        if not 0.0 <= self.homogeneous_ratio <= 1.0:
            raise ValueError(
                f"homogeneous_ratio must be from 0 to 1, found {self.homogeneous_ratio}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, found {self.seed}")
        if any(size < 0 for size in self.task_sizes):
            raise ValueError(f"task_sizes must not be negative, found {min(self.task_sizes)}")
        if len(self) == 0:
            total = sum(self.task_sizes)
            smallest = self.batch_size if self.drop_last else self.world_size
            raise ValueError(
                f"an epoch has no batch: the data holds {total} examples and a batch takes "
                f"{smallest}; lower the batch size"
                + (" or set drop_last to False" if self.drop_last else "")
            )

    def __len__(self) -> int:
        """Steps of an epoch, equal on every rank."""
        whole, rest = divmod(sum(self.task_sizes), self.batch_size)
        return whole + (not self.drop_last and rest >= self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of `epoch`, from its start; a no-op for the current epoch.

        So a loop that sets the epoch before iterating does not undo load_state_dict.
        """
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, found {epoch}")
        if epoch != self.epoch:
            self.epoch = epoch
            self._first = self._step = 0

    def __iter__(self) -> Iterator[list[int]]:
        """Yield one list of global indices per step, from the loaded step or from the start."""
        first, self._first = self._first, 0
        self._step = first
        order, blocks = self._plan()
        for step in range(first, len(self)):
            start = int(blocks[step]) * self.batch_size
            # Only the last block can be short, and only without drop_last.
            share = min(self.batch_size, len(order) - start) // self.world_size
            start += self.rank * share
            self._step = step + 1
            yield order[start : start + share].tolist()

    def _plan(self) -> tuple[Indices, Indices]:
        """The epoch: indices, block after block, and the order in which the blocks are visited."""
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(self.epoch,)))
        # Rounded because 10 * (1 - 0.9) is 0.99...98, which int() would take to 0.
        mixed = int(round(self.batch_size * (1.0 - self.homogeneous_ratio), 6))
        # At ratio 0 every place is dealt anew: the tasks no longer matter, and one shuffle will do.
        sizes = self.task_sizes if mixed < self.batch_size else [sum(self.task_sizes)]
        order = _cut(sizes, self.batch_size, rng)
        whole = len(order) // self.batch_size
        if self.drop_last:
            order = order[: whole * self.batch_size]
        if 0 < mixed < self.batch_size:
            _mix(order, self.batch_size, mixed, rng)
        blocks = rng.permutation(whole)
        if not self.drop_last:
            blocks = np.append(blocks, whole)  # the short block stays last
        return order, blocks

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, JSON-ready: `step` batches of `epoch` have been handed out.

        A consumer that prefetches is behind this place and should overwrite "step" with its own
        count. The number of ranks is not part of it: a run may resume on more or fewer.
        """
        return {"epoch": self.epoch, "step": self._step, **self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration continue from `state`.

        Raises ValueError when the state belongs to other data or settings: the order would differ.
        """
        for key, mine in self._fingerprint().items():
            if state[key] != mine:
                raise ValueError(
                    f"cannot resume: the checkpoint was made with {key} {state[key]}, "
                    f"this run has {mine}; the order of the data would differ"
                )
        epoch, step = state["epoch"], state["step"]
        if epoch < 0 or not 0 <= step <= len(self):
            raise ValueError(f"cannot resume at step {step} of {len(self)} in epoch {epoch}")
        self.epoch = epoch
        self._first = self._step = step

    def _fingerprint(self) -> dict[str, Any]:
        """What the order depends on, besides the epoch."""
        return {
            "task_sizes": self.task_sizes,
            "batch_size": self.batch_size,
            "homogeneous_ratio": self.homogeneous_ratio,
            "seed": self.seed,
            "drop_last": self.drop_last,
        }


def _cut(sizes: Sequence[int], batch_size: int, rng: np.random.Generator) -> Indices:
    """Shuffle each task; return the whole blocks of all tasks, then the shuffled left-overs."""
    total = sum(sizes)
    order: Indices = np.arange(total, dtype=np.int32 if total < 2**31 else np.int64)
    whole: list[Indices] = []
    rest: list[Indices] = []
    end = 0
    for size in sizes:
        start, cut, end = end, end + size - size % batch_size, end + size
        rng.shuffle(order[start:end])
        whole.append(order[start:cut])
        rest.append(order[cut:end])
    left_over = np.concatenate(rest)
    rng.shuffle(left_over)
    return np.concatenate([*whole, left_over])


def _mix(order: Indices, batch_size: int, mixed: int, rng: np.random.Generator) -> None:
    """Pool the last `mixed` places of every block, shuffle, and deal them back, in place.

    A short last block takes part with those of the places that it has.
    """
    blocks = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    short = order[blocks.size :]
    kept = batch_size - mixed
    pool = np.concatenate([blocks[:, kept:].ravel(), short[kept:]])
    rng.shuffle(pool)
    dealt = len(blocks) * mixed
    blocks[:, kept:] = pool[:dealt].reshape(-1, mixed)
    short[kept:] = pool[dealt:]
