"""Semi-homogeneous task batching (KaLM-Embedding V1, section on data batching).

Each task is shuffled and cut into blocks of the global batch; the left-overs of all tasks are
joined, shuffled and cut into mixed blocks. With homogeneous ratio r the last int(B(1-r)) places of every
block are pooled over all blocks, shuffled and dealt back. Then the order of the blocks is shuffled.

The order of an epoch is a pure function of (sizes, batch size, ratio, seed, epoch). Every rank
computes all of it and takes its slice of each block, so ranks agree without talking. An epoch is
planned as one array of indices (4 bytes each below 2^31 rows) at a peak of about two such arrays.

How often an epoch visits each task is the caller's to say (`task_draws`): all examples once unless
told otherwise, a subset that changes each epoch, or whole rounds and a subset.

Not here: reading examples, anything of torch or of a process group.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.integer[Any]]

_PART = 1 << 20  # rows among which a subset is drawn at a time; bounds the memory
_MOST = 10**9  # rows of which numpy can share out a subset


def task_draws(
    task_sizes: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    most: Sequence[int | None] | None = None,
    size_exponent: float = 1.0,
) -> list[int]:
    """How many examples an epoch takes of each task.

    In proportion to weight * size^exponent. At exponent 1 that is every example `weight` times; at
    0 equally many of each task; between them small tasks gain and large ones lose, at temperature
    1 / exponent. The exponent alone does not change the length of the epoch; weights do, in the open.

    Args:
        task_sizes: number of examples of each task.
        weights: of each task, not negative; 0 leaves it out. 1 by default.
        most: examples of each task that an epoch takes at most, None for no bound. A bounded task
            also counts as one of that size, lest it swell the others.
        size_exponent: from 0 to 1.

    Returns:
        One number a task, at least 1 unless its size or weight is 0.
    """
    assert 0 <= size_exponent <= 1, "the exponent is from 0 to 1"
    assert all(weight >= 0 for weight in weights or ()), "weights are not negative"
    bounds = [math.inf if bound is None else bound for bound in most or [None] * len(task_sizes)]
    sizes = [min(size, bound) for size, bound in zip(task_sizes, bounds, strict=True)]
    powers = [size**size_exponent if size else 0.0 for size in sizes]
    scale = sum(sizes) / sum(powers) if size_exponent != 1 and any(sizes) else 1.0
    shares = [
        weight * power * scale
        for weight, power in zip(weights or [1.0] * len(sizes), powers, strict=True)
    ]
    return [
        int(min(max(1, round(share)), bound)) if share else 0
        for share, bound in zip(shares, bounds, strict=True)
    ]


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
        task_draws: examples an epoch takes of each task; None takes each once. Below the size of
            the task they are a random subset, above it every example is taken size by size, each
            round shuffled alone, and the remainder is a subset.

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
        task_draws: Sequence[int] | None = None,
    ) -> None:
        self.task_sizes = [int(size) for size in task_sizes]
        self.task_draws = [int(n) for n in (self.task_sizes if task_draws is None else task_draws)]
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
        self._check_draws()
        if len(self) == 0:
            total = sum(self.task_draws)
            smallest = self.batch_size if self.drop_last else self.world_size
            raise ValueError(
                f"an epoch has no batch: the data holds {total} examples and a batch takes "
                f"{smallest}; lower the batch size"
                + (" or set drop_last to False" if self.drop_last else "")
            )

    def _check_draws(self) -> None:
        if len(self.task_draws) != len(self.task_sizes):
            raise ValueError(
                f"task_draws must hold a number for each of the {len(self.task_sizes)} tasks, "
                f"found {len(self.task_draws)}"
            )
        for number, (size, draws) in enumerate(zip(self.task_sizes, self.task_draws, strict=True)):
            if draws < 0 or (draws and not size):
                raise ValueError(f"cannot draw {draws} examples of task {number}, which has {size}")
            if size >= _MOST and draws % size:
                raise ValueError(
                    f"task {number} has {size} examples, and a part of them can be drawn of fewer "
                    f"than {_MOST} only; split it in two tasks"
                )

    def __len__(self) -> int:
        """Steps of an epoch, equal on every rank."""
        whole, rest = divmod(sum(self.task_draws), self.batch_size)
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
        sizes, draws = self.task_sizes, self.task_draws
        if mixed == self.batch_size and draws == sizes:
            # Every place is dealt anew: the tasks no longer matter, and one shuffle will do.
            sizes = draws = [sum(sizes)]
        order = _cut(sizes, draws, self.batch_size, rng)
        if mixed == self.batch_size and draws != sizes:
            rng.shuffle(order)
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
            if state.get(key) != mine:
                raise ValueError(
                    f"cannot resume: the checkpoint was made with {key} {state.get(key)}, "
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
            "task_draws": None if self.task_draws == self.task_sizes else self.task_draws,
            "batch_size": self.batch_size,
            "homogeneous_ratio": self.homogeneous_ratio,
            "seed": self.seed,
            "drop_last": self.drop_last,
        }


def _cut(
    sizes: Sequence[int], draws: Sequence[int], batch_size: int, rng: np.random.Generator
) -> Indices:
    """Draw and shuffle each task; return the whole blocks of all tasks, then the left-overs."""
    total, last = sum(draws), sum(sizes)
    order: Indices = np.empty(total, dtype=np.int32 if last < 2**31 else np.int64)
    whole: list[Indices] = []
    rest: list[Indices] = []
    first = end = 0
    for size, count in zip(sizes, draws, strict=True):
        start, cut, end = end, end + count - count % batch_size, end + count
        _draw(order[start:end], first, size, rng)
        first += size
        whole.append(order[start:cut])
        rest.append(order[cut:end])
    left_over = np.concatenate(rest)
    rng.shuffle(left_over)
    return np.concatenate([*whole, left_over])


def _draw(places: Indices, first: int, size: int, rng: np.random.Generator) -> None:
    """Fill `places` with rows of a task, first to first + size: whole rounds, then a subset."""
    rounds = len(places) // size * size if size else 0
    for start in range(0, rounds, size or 1):
        turn = places[start : start + size]
        turn[:] = np.arange(first, first + size, dtype=places.dtype)
        rng.shuffle(turn)
    if rounds < len(places):
        _draw_subset(places[rounds:], first, size, rng)
        rng.shuffle(places[rounds:])


def _draw_subset(places: Indices, first: int, size: int, rng: np.random.Generator) -> None:
    """Fill `places` with distinct rows of a task, every subset being equally likely.

    How many fall into each part of the task is drawn first, then which: the memory is that of the
    indices and of one part, however large the task.
    """
    starts = range(0, size, _PART)
    parts = [min(_PART, size - start) for start in starts]
    # "count" would hold every row; "marginals" is exact as well.
    counts = rng.multivariate_hypergeometric(parts, len(places), method="marginals").tolist()
    end = 0
    for start, part, some in zip(starts, parts, counts, strict=True):
        begin, end = end, end + some
        places[begin:end] = rng.choice(part, some, replace=False, shuffle=False) + (first + start)


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
