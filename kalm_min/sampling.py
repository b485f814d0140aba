"""Which examples form a batch and which texts share a forward pass: integer arithmetic, no torch.

Semi-homogeneous task batching (KaLM-Embedding V1, section on data batching): each task is shuffled
and cut into blocks of the global batch; the left-overs of all tasks are joined, shuffled and cut
into mixed blocks. With homogeneous ratio r the last int(B(1-r)) positions of every block are pooled
over all blocks, shuffled and distributed again. Then the order of the blocks is shuffled.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int32 | np.int64]
_MOST = 2**62  # examples of a task in an epoch that can be counted
_ROUNDS = 1000  # an epoch has at most so many of the data: a typing error costs no memory


def task_draws(
    task_sizes: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    caps: Sequence[int | None] | None = None,
    size_exponent: float = 1.0,
) -> list[int]:
    """How many examples an epoch takes of each task: in proportion to weight * size^exponent.

    Args:
        task_sizes: (T,) the number of examples of each task.
        weights: (T,) not negative, by default 1; 0 leaves the task out. They change the length of
            the epoch; the exponent does not.
        caps: (T,) the maximum number of examples per epoch; None for no maximum. A capped task also
            counts as one of that size, so that it does not enlarge the others.
        size_exponent: 1 takes every example `weight` times, 0 equally many of each task; between
            the two, small tasks gain and large ones lose, with temperature 1 / exponent.

    Returns (T,) numbers, at least 1 unless the size or the weight is 0.
    """
    assert 0 <= size_exponent <= 1, "the exponent is from 0 to 1"
    factors = weights or [1.0] * len(task_sizes)
    assert min(factors, default=0) >= 0, "weights are not negative"
    bounds = [math.inf if cap is None else cap for cap in caps or [None] * len(task_sizes)]
    sizes = [min(size, bound) for size, bound in zip(task_sizes, bounds, strict=True)]
    powers = [size**size_exponent if size else 0.0 for size in sizes]
    scale = sum(sizes) / sum(powers) if size_exponent != 1 and any(sizes) else 1.0
    return [
        int(min(max(1, round(min(weight * power * scale, _MOST))), bound))
        if weight and power
        else 0
        for weight, power, bound in zip(factors, powers, bounds, strict=True)
    ]


@dataclass(eq=False)
class TaskBatchSampler:
    """Iterate over this rank's global example indices, one list per training step.

    Example i of task t has the global index sum(task_sizes[:t]) + i. Concatenating the lists of all
    ranks in rank order gives the global batch, whatever the number of ranks: every rank computes
    the order of the epoch (4 bytes per index below 2^31 rows, at a peak of about two such arrays)
    and takes its slice of each block. Examples that fill no global batch are left out, different
    ones in each epoch. Raises ValueError for arguments that contradict each other.
    """

    task_sizes: Sequence[int]
    batch_size: int  # the global batch, over all ranks; a multiple of `world_size`
    _: KW_ONLY
    # The share of a block that stays with one task: 1 is one task per block, 0 random sampling.
    homogeneous_ratio: float = 1.0
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    drop_last: bool = True  # only True is supported: all batches are equally large
    # The examples an epoch takes of each task; None takes each once. Fewer than the task has
    # are a random subset; more are rounds of all its examples, each round shuffled by itself, and
    # a subset as the remainder.
    task_draws: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self.task_sizes = sizes = [int(size) for size in self.task_sizes]
        self.draws = [int(n) for n in (sizes if self.task_draws is None else self.task_draws)]
        self.epoch = 0
        self._first = 0  # where the next iteration starts; not 0 only after load_state_dict
        self._step = 0  # batches of this epoch handed out so far
        batch, ranks, draws = self.batch_size, max(1, self.world_size), self.draws
        for name, holds, expected in (
            ("batch_size", batch >= 1, "at least 1"),
            ("rank", 0 <= self.rank < self.world_size, "from 0 to world_size - 1"),
            ("batch_size", batch % ranks == 0, f"a multiple of world_size {ranks}"),
            ("homogeneous_ratio", 0.0 <= self.homogeneous_ratio <= 1.0, "from 0 to 1"),
            ("seed", self.seed >= 0, "at least 0"),
            ("drop_last", self.drop_last, "True, since all batches are equally large"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {expected}, found {getattr(self, name)}")
        if len(draws) != len(sizes):
            expected = f"one number for each of the {len(sizes)} tasks, found {len(draws)}"
            raise ValueError(f"task_draws must hold {expected}")
        for task, (size, count) in enumerate(zip(sizes, draws, strict=True)):
            if count < 0 or (count and not size):
                raise ValueError(f"cannot draw {count} examples of task {task}, which has {size}")
        if sum(draws) > _ROUNDS * sum(sizes):
            raise ValueError(
                f"expected an epoch of at most {_ROUNDS:,} times the {sum(sizes):,} examples of the "
                f"data, found {sum(draws):,}; lower the weights of tasks, and train more epochs"
            )
        if len(self) == 0:
            raise ValueError(
                f"an epoch has no batch: with its tasks' weights the data holds {sum(draws)} "
                f"examples and a batch takes {batch}; lower the batch size, or raise a weight"
            )

    def __len__(self) -> int:
        """Steps of an epoch, equal on every rank."""
        return sum(self.draws) // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of `epoch`, from its start; a no-op for the current epoch.

        Thus a loop that sets the epoch before iterating does not undo load_state_dict.
        """
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, found {epoch}")
        if epoch != self.epoch:
            self.epoch, self._first, self._step = epoch, 0, 0

    def __iter__(self) -> Iterator[list[int]]:
        """Yield one list of global indices per step, from the loaded step or from the start."""
        first, self._first = self._first, 0
        self._step = first
        order, blocks = self._plan()
        share = self.batch_size // self.world_size
        for step in range(first, len(self)):
            start = int(blocks[step]) * self.batch_size + self.rank * share
            self._step = step + 1
            yield order[start : start + share].tolist()

    def _plan(self) -> tuple[Indices, npt.NDArray[np.int64]]:
        """The indices of the epoch, block after block, and the order of the blocks."""
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(self.epoch,)))
        # Rounded because 10 * (1 - 0.9) is 0.99...98, which int() would take to 0.
        mixed = int(round(self.batch_size * (1.0 - self.homogeneous_ratio), 6))
        sizes, draws = self.task_sizes, self.draws
        if mixed == self.batch_size and draws == sizes:
            # Every position is drawn again: the tasks no longer matter, and one shuffle is enough.
            sizes = draws = [sum(sizes)]
        order = _draw_tasks(sizes, draws, self.batch_size, rng)
        if mixed == self.batch_size and draws != sizes:
            rng.shuffle(order)
        order = order[: len(self) * self.batch_size]
        if 0 < mixed < self.batch_size:
            last = order.reshape(-1, self.batch_size)[:, -mixed:]  # (steps, mixed)
            pool = last.flatten()
            rng.shuffle(pool)
            last[:] = pool.reshape(-1, mixed)
        return order, rng.permutation(len(self))

    def state_dict(self) -> dict[str, object]:
        """The position in the data, JSON-ready: `step` batches of `epoch` have been handed out.

        A consumer that prefetches is behind this position and should overwrite "step" with its own
        count. The number of ranks is not part of the state: a run may resume on more or fewer.
        """
        takes_all = self.draws == self.task_sizes
        return {
            "epoch": self.epoch,
            "step": self._step,
            "task_sizes": self.task_sizes,
            "task_draws": None if takes_all else self.draws,
            "batch_size": self.batch_size,
            "homogeneous_ratio": self.homogeneous_ratio,
            "seed": self.seed,
            # Version 1 drew different subsets and supported drop_last = False.
            "order_version": None if takes_all else 2,
            "drop_last": True,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next iteration continue from `state`.

        Raises ValueError when the state belongs to other data or settings: the order would differ.
        """
        epoch, step = state["epoch"], state["step"]
        for key, current in self.state_dict().items():
            if key not in ("epoch", "step") and state.get(key) != current:
                raise ValueError(
                    f"cannot resume: the checkpoint was made with {key} {state.get(key)}, "
                    f"this run has {current}; the order of the data would differ"
                )
        if epoch < 0 or not 0 <= step <= len(self):
            raise ValueError(f"cannot resume at step {step} of {len(self)} in epoch {epoch}")
        self.epoch, self._first, self._step = epoch, step, step


def _draw_tasks(
    sizes: Sequence[int], draws: Sequence[int], batch_size: int, rng: np.random.Generator
) -> Indices:
    """Draw and shuffle each task; return the full blocks of all tasks, then the left-overs."""
    dtype = np.int32 if sum(sizes) < 2**31 else np.int64
    order: Indices = np.empty(sum(draws), dtype)
    full, rest = list[Indices](), list[Indices]()
    first = end = 0  # where the task's rows begin, and its draws in `order`
    for size, count in zip(sizes, draws, strict=True):
        drawn = order[end : end + count]
        for start in range(0, count, size or 1):
            part = drawn[start : start + size]
            if len(part) == size:  # a round of all rows
                part[:] = np.arange(first, first + size, dtype=dtype)
                rng.shuffle(part)
            else:  # numpy takes at most 8 bytes per row of the task for this
                part[:] = rng.choice(size, len(part), replace=False) + first
        first, end = first + size, end + count
        full.append(drawn[: count - count % batch_size])
        rest.append(drawn[count - count % batch_size :])
    left_over = np.concatenate(rest)
    rng.shuffle(left_over)
    return np.concatenate([*full, left_over])


def token_budget_batches(lengths: Sequence[int], max_tokens: int) -> list[npt.NDArray[np.int64]]:
    """Cut the texts, longest first, into batches of at most `max_tokens` tokens.

    Batches are packed, so the cost of a batch is its tokens. Sorting by length only keeps the
    longest sequence of a batch (which sets the attention kernel's grid) close to the others.

    Args:
        lengths: (n,) tokens of each text, all positive.
        max_tokens: the budget of a batch. A single longer text is a batch by itself.

    Returns arrays of indices into `lengths`, none empty; equal lengths keep their order. There are
    as few batches as the order allows, and the fullest is as small as their number allows.
    """
    sizes = np.asarray(lengths, dtype=np.int64)  # (n,)
    assert (sizes > 0).all(), "every text needs at least one token"
    assert max_tokens > 0, "the token budget must be positive"
    order = np.argsort(-sizes, kind="stable")  # (n,)
    ends = [0, *accumulate(sizes[order].tolist())]  # tokens before each text, and of all

    def cut(budget: int) -> list[int]:
        """The (exclusive) end of each batch when every batch is filled up to the budget."""
        cuts, end = list[int](), 0
        while end < len(order):
            # At least one text: a text longer than the budget is alone in its batch.
            end = max(end + 1, bisect_right(ends, ends[end] + budget) - 1)
            cuts.append(end)
        return cuts

    if len(sizes) == 0:
        return []
    # The smallest budget that needs no more batches.
    fewest = len(cut(max_tokens))
    budget = 1 + bisect_left(range(1, max_tokens), -fewest, key=lambda b: -len(cut(b)))
    return np.split(order, cut(budget)[:-1])
