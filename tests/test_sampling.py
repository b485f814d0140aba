"""TaskBatchSampler: what its docstring and the report's section on batching promise. Token budgets."""

import json
import random
import subprocess
import sys
from collections import Counter
from itertools import chain, islice, pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kalm_min.sampling import TaskBatchSampler, task_draws, token_budget_batches


@st.composite
def plans(draw):
    """Arguments of a sampler that has at least one batch."""
    world_size = draw(st.integers(1, 4))
    batch_size = world_size * draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(0, 60), min_size=1, max_size=6))
    assume(sum(sizes) >= batch_size)
    return {
        "task_sizes": sizes,
        "batch_size": batch_size,
        "homogeneous_ratio": draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
        "seed": draw(st.integers(0, 2**40)),
        "world_size": world_size,
    }


def one_epoch(plan, epoch=0, **changes):
    sampler = TaskBatchSampler(**{**plan, **changes})
    sampler.set_epoch(epoch)
    return list(sampler)


def joined(plan, epoch=0):
    """The global batches: the lists of all ranks, step by step, in rank order."""
    ranks = [one_epoch(plan, epoch, rank=rank) for rank in range(plan["world_size"])]
    return [list(chain(*parts)) for parts in zip(*ranks, strict=True)]


@st.composite
def weighted_plans(draw):
    """The same with draws per task: none, some, all, or several rounds of its examples."""
    plan = draw(plans())
    draws = [draw(st.integers(0, 3 * size)) for size in plan["task_sizes"]]
    assume(sum(draws) >= plan["batch_size"])
    return {**plan, "task_draws": draws}


any_plans = st.one_of(plans(), weighted_plans())


def task_of(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


@given(plans())
def test_partition(plan):
    """Every example at most once, and all of them but the remainder that fills no batch."""
    seen = [index for batch in joined(plan) for index in batch]
    total = sum(plan["task_sizes"])
    assert len(set(seen)) == len(seen) == total - total % plan["batch_size"]
    assert all(0 <= index < total for index in seen)


@given(weighted_plans())
def test_weighted_partition(plan):
    """An example comes as often as any other of its task, or once more; tasks get their draws."""
    sizes, draws = plan["task_sizes"], plan["task_draws"]
    seen = Counter(index for batch in joined(plan) for index in batch)
    left_out = sum(draws) % plan["batch_size"]
    assert seen.total() == sum(draws) - left_out
    first = 0
    for size, count in zip(sizes, draws, strict=True):
        times = [seen[first + i] for i in range(size)]
        first += size
        assert count - left_out <= sum(times) <= count
        assert not size or max(times) <= -(-count // size)
        assert not size or sum(count // size - n for n in times if n < count // size) <= left_out
    assert not seen or max(seen) < first


@given(any_plans)
def test_ranks_are_disjoint_and_equally_long(plan):
    """A rank with another number of steps or examples would hang or skew a collective."""
    ranks = [TaskBatchSampler(**plan, rank=rank) for rank in range(plan["world_size"])]
    lists = [list(sampler) for sampler in ranks]
    assert {len(steps) for steps in lists} == {len(ranks[0])}
    for parts in zip(*lists, strict=True):
        assert len({len(part) for part in parts}) == 1
        assert parts[0]
        if "task_draws" not in plan:
            assert len(set().union(*parts)) == sum(map(len, parts))


@given(any_plans)
def test_world_size_does_not_change_the_batches(plan):
    """One process and N processes see the same global batches in the same order."""
    assert one_epoch(plan, world_size=1) == joined(plan)


@given(plans())
def test_one_task_per_block_at_ratio_one(plan):
    """At ratio 1 only the blocks made of left-overs mix tasks, and they are as few as can be."""
    plan = {**plan, "homogeneous_ratio": 1.0}
    task = task_of(plan["task_sizes"])
    B = plan["batch_size"]
    pure = Counter()
    mixed = 0
    for batch in joined(plan):
        tasks = set(task[batch])
        if len(tasks) == 1 and len(batch) == B:
            pure[tasks.pop()] += 1
        else:
            mixed += 1
    rest = sum(size % B for size in plan["task_sizes"])
    assert mixed <= -(-rest // B)
    for number, size in enumerate(plan["task_sizes"]):
        assert pure[number] >= size // B


@given(plans(), st.sampled_from([0.25, 0.5, 0.75]))
def test_a_share_of_each_block_stays_with_its_task(plan, ratio):
    """With ratio r, B - int(B(1-r)) positions of a block come from one task, left-overs apart."""
    task = task_of(plan["task_sizes"])
    B = plan["batch_size"]
    kept = B - int(B * (1 - ratio))  # these ratios are exact in binary
    full = Counter()
    for batch in joined({**plan, "homogeneous_ratio": ratio}):
        first = set(task[batch[:kept]])
        if len(batch) == B and len(first) == 1:
            full[first.pop()] += 1
    for number, size in enumerate(plan["task_sizes"]):
        assert full[number] >= size // B


@pytest.mark.parametrize(
    ("batch_size", "ratio", "mixed"), [(10, 0.9, 1), (10, 0.7, 3), (100, 0.71, 29), (7, 0.9, 0)]
)
def test_mixed_positions_survive_rounding(batch_size, ratio, mixed):
    """10 * (1 - 0.9) is 0.99...98 in floating point and must count as one position."""
    sizes = [batch_size * 50] * 8
    task = task_of(sizes)
    plan = {"task_sizes": sizes, "batch_size": batch_size, "homogeneous_ratio": ratio}
    position_is_mixed = np.zeros(batch_size, bool)
    for batch in one_epoch(plan):
        position_is_mixed |= task[batch] != task[batch[0]]
    assert position_is_mixed.tolist() == [False] * (batch_size - mixed) + [True] * mixed


def test_ratio_zero_is_plain_random_sampling():
    """At ratio 0 a batch holds the tasks in proportion to their sizes."""
    sizes = [6000, 3000, 1000]
    task = task_of(sizes)
    batches = one_epoch({"task_sizes": sizes, "batch_size": 100, "homogeneous_ratio": 0.0})
    counts = np.array([np.bincount(task[batch], minlength=3) for batch in batches])
    assert counts.sum(0).tolist() == sizes
    # Hypergeometric: the standard deviations are about 4.9, 4.6 and 3.0.
    assert np.all(counts.std(0) < 7)
    assert np.all(abs(counts - [60, 30, 10]) < 30)


@given(plans(), st.integers(0, 5), st.integers(6, 9))
def test_epochs_differ(plan, one, other):
    """No two epochs are alike (the official sampler repeats the first one forever)."""
    assume(sum(plan["task_sizes"]) >= 40)
    assume(plan["batch_size"] > 1)
    assert joined(plan, one) != joined(plan, other)


@given(plans())
def test_seeds_differ(plan):
    """Another seed is another order."""
    assume(sum(plan["task_sizes"]) >= 40)
    assert joined(plan) != joined({**plan, "seed": plan["seed"] + 1})


@given(plans(), st.integers(0, 2**31))
def test_independent_of_global_random_state(plan, state):
    """Ranks whose global generators differ still agree; and the generators are left alone."""
    random.seed(state)
    np.random.seed(state % 2**32)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = one_epoch(plan)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
    random.seed(state + 1)
    np.random.seed((state + 1) % 2**32)  # noqa: NPY002
    assert one_epoch(plan) == first


@given(any_plans, st.data())
def test_resume_anywhere_is_the_uninterrupted_run(plan, data):
    """State saved after any step, through JSON, continues with the next one."""
    epoch = data.draw(st.integers(0, 3))
    rank = data.draw(st.integers(0, plan["world_size"] - 1))
    full = one_epoch(plan, epoch, rank=rank)
    step = data.draw(st.integers(0, len(full)))

    broken = TaskBatchSampler(**plan, rank=rank)
    broken.set_epoch(epoch)
    done = list(islice(broken, step))
    state = json.loads(json.dumps(broken.state_dict()))
    assert (state["epoch"], state["step"]) == (epoch, step)

    resumed = TaskBatchSampler(**plan, rank=rank)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.set_epoch(epoch)  # as a loop over epochs does
    assert done + list(resumed) == full
    assert resumed.state_dict()["step"] == len(full)
    assert list(resumed) == full
    resumed.set_epoch(epoch + 1)
    assert list(resumed) == one_epoch(plan, epoch + 1, rank=rank)


def test_resume_on_another_number_of_ranks():
    """The position counts global batches, so a run may resume on more ranks or fewer."""
    plan = {"task_sizes": [50, 70], "batch_size": 8, "seed": 3}
    full = one_epoch(plan)
    sampler = TaskBatchSampler(**plan)
    list(islice(sampler, 4))
    parts = []
    for rank in range(2):
        half = TaskBatchSampler(**plan, rank=rank, world_size=2)
        half.load_state_dict(sampler.state_dict())
        parts.append(list(half))
    assert [a + b for a, b in zip(*parts, strict=True)] == full[4:]


@pytest.mark.parametrize(
    "change",
    [
        {"task_sizes": [50, 71]},
        {"batch_size": 16},
        {"homogeneous_ratio": 0.5},
        {"seed": 4},
        {"task_draws": [50, 60]},
    ],
)
def test_resume_with_other_data_is_refused(change):
    """A checkpoint of other data or settings would silently repeat and skip examples."""
    plan = {"task_sizes": [50, 70], "batch_size": 8, "seed": 3}
    state = TaskBatchSampler(**plan).state_dict()
    with pytest.raises(ValueError, match=f"checkpoint was made with {next(iter(change))}"):
        TaskBatchSampler(**{**plan, **change}).load_state_dict(state)


@pytest.mark.parametrize("changed", [{"order_version": None}, {"drop_last": False}])
def test_resume_in_the_order_of_an_older_version_is_refused(changed):
    """Subsets were drawn otherwise before; all examples come in the order that they had."""
    sampler = TaskBatchSampler([50, 70], 8, task_draws=[50, 60])
    (key,) = changed
    with pytest.raises(ValueError, match=f"checkpoint was made with {key} {changed[key]}, this"):
        sampler.load_state_dict({**sampler.state_dict(), **changed})
    sampler = TaskBatchSampler([50, 70], 8)
    old = sampler.state_dict()
    del old["order_version"]
    sampler.load_state_dict(old)


def test_resume_past_the_end_is_refused():
    """A step that the epoch does not have is a damaged checkpoint."""
    sampler = TaskBatchSampler([20], 4)
    with pytest.raises(ValueError, match="step 6 of 5"):
        sampler.load_state_dict({**sampler.state_dict(), "step": 6})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 6, "world_size": 4}, "multiple of world_size"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 200}, "holds 120 examples and a batch takes 200"),
        ({"task_sizes": []}, "holds 0 examples and a batch takes 8"),
        ({"drop_last": False}, "drop_last must be True"),
        ({"homogeneous_ratio": 1.5}, "homogeneous_ratio"),
        ({"homogeneous_ratio": float("nan")}, "homogeneous_ratio"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0"),
        ({"seed": -1}, "seed"),
        ({"task_sizes": [50, -1, 70]}, "cannot draw -1 examples of task 1, which has -1"),
        ({"task_draws": [50]}, "one number for each of the 2 tasks, found 1"),
        ({"task_draws": [50, -1]}, "cannot draw -1 examples of task 1, which has 70"),
        ({"task_draws": [5, 2], "task_sizes": [70, 0]}, "cannot draw 2 examples of task 1"),
        ({"task_draws": [2, 1]}, "holds 3 examples and a batch takes 8"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    """Each wrong argument is reported in one sentence when the sampler is made."""
    with pytest.raises(ValueError, match=message):
        TaskBatchSampler(**{"task_sizes": [50, 70], "batch_size": 8, **arguments})


def test_every_task_order_is_equally_likely():
    """The shuffle is not biased: over epochs each example visits each position equally often."""
    sampler = TaskBatchSampler([4], 4)
    visits = np.zeros((4, 4), int)
    for epoch in range(2000):
        sampler.set_epoch(epoch)
        visits[next(iter(sampler)), range(4)] += 1
    assert abs(visits - 500).max() < 5 * np.sqrt(500 * 0.75)


def test_a_capped_task_shows_other_examples_each_epoch():
    """Subsets are uniform over epochs."""
    sampler = TaskBatchSampler([20, 30], 5, task_draws=[5, 30])
    seen = np.zeros(20, int)
    for epoch in range(2000):
        sampler.set_epoch(epoch)
        chosen = [index for batch in sampler for index in batch if index < 20]
        assert len(set(chosen)) == len(chosen) == 5
        seen[chosen] += 1
    assert abs(seen - 500).max() < 5 * np.sqrt(500 * 0.75)


def test_rounds_of_a_heavy_task_come_one_by_one():
    """Three rounds of a task are three shuffles: no example occurs twice in a batch."""
    batches = one_epoch({"task_sizes": [40], "batch_size": 8, "task_draws": [120]})
    assert len(batches) == 15
    assert all(len(set(batch)) == 8 for batch in batches)


sizes_of_tasks = st.lists(st.integers(0, 10**9), min_size=1, max_size=8)


@given(sizes_of_tasks, st.floats(0, 1))
def test_the_exponent_keeps_the_length_and_the_order(sizes, exponent):
    """Small tasks gain on large ones, none overtakes, and the epoch is as long as before."""
    draws = task_draws(sizes, size_exponent=exponent)
    assert abs(sum(draws) - sum(sizes)) <= len(sizes) + 1e-9 * sum(sizes)
    for size, count in zip(sizes, draws, strict=True):
        assert (count == 0) == (size == 0)
        for other, others in zip(sizes, draws, strict=True):
            assert size > other or count <= others
            assert not other or size < other or (count - 1) * other <= (others + 1) * size
    assert task_draws(sizes) == sizes
    some = [count for count in task_draws(sizes, size_exponent=0) if count]
    assert not some or max(some) == min(some)


@given(sizes_of_tasks, st.floats(0, 1), st.data())
def test_weights_and_bounds(sizes, exponent, data):
    """A weight multiplies, 0 leaves out, and no task passes its bound."""
    weights = [data.draw(st.sampled_from([0, 0.25, 1, 3])) for _ in sizes]
    bounds = [data.draw(st.sampled_from([None, 1, 1000])) for _ in sizes]
    capped = [min(size, bound or size) for size, bound in zip(sizes, bounds, strict=True)]
    plain = task_draws(capped, size_exponent=exponent)
    draws = task_draws(sizes, weights=weights, caps=bounds, size_exponent=exponent)
    for one, count, weight, bound in zip(plain, draws, weights, bounds, strict=True):
        if one == 0 or weight == 0:
            assert count == 0
        elif bound is None:
            assert abs(count - weight * one) <= 2 + weight
        else:
            assert 1 <= count <= bound
            assert count == bound or abs(count - weight * one) <= 2 + weight


def test_plan_stays_near_the_memory_of_its_indices():
    """An epoch of 4 million rows is planned with a peak below three arrays of its indices.

    A subset takes at most the memory of an epoch of all rows, and little where it is small.
    """
    program = """if True:
        import tracemalloc
        from kalm_min.sampling import TaskBatchSampler
        sampler = TaskBatchSampler({sizes}, 1024, homogeneous_ratio={ratio}, task_draws={draws})
        tracemalloc.start()
        next(iter(sampler))
        print(tracemalloc.get_traced_memory()[1] / (4 * 4_000_000))
    """
    every, small, half = ([160_000] * 25, None), ([2 * 10**8], [10**6]), ([4 * 10**6], [2 * 10**6])
    for ratio, (sizes, draws), most in (
        (0, every, 2.6),
        (0.5, every, 2.6),
        (1, every, 2.6),
        (0.5, small, 2.6),
        (0.5, half, 4.1),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program.format(ratio=ratio, sizes=sizes, draws=draws)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert float(done.stdout) < most


def test_no_torch():
    """Planning an epoch must not wait for torch, nor need it."""
    program = "import sys, kalm_min.sampling; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# ---- token budgets ----

lengths_lists = st.lists(st.integers(1, 40), max_size=60)
budgets = st.integers(1, 200)


@given(lengths_lists, budgets)
def test_partition_within_budget(lengths, budget):
    """Each text in exactly one batch; only a text longer than the budget exceeds it, alone."""
    batches = token_budget_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch)
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1


@given(lengths_lists, budgets)
def test_longest_first_and_stable(lengths, budget):
    """Texts come in order of decreasing length; those of equal length keep their order."""
    order = [int(i) for batch in token_budget_batches(lengths, budget) for i in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: -lengths[i])


@given(lengths_lists, budgets)
def test_as_few_and_as_even_as_the_order_allows(lengths, budget):
    """No cut of the same order has fewer batches, or as few with a smaller fullest batch."""
    batches = token_budget_batches(lengths, budget)
    ordered = sorted(lengths, reverse=True)

    def count(limit):
        """Batches when each is filled to the limit: the fewest there can be."""
        batches, room = 0, 0
        for length in ordered:
            if length > room:
                batches, room = batches + 1, limit
            room -= min(length, room)
        return batches

    assert len(batches) == count(budget)
    totals = [sum(lengths[i] for i in batch) for batch in batches if len(batch) > 1]
    if totals:
        assert count(max(totals) - 1) > len(batches)


def test_no_tiny_last_batch():
    """11 texts in room for 10 are 6 + 5, not 10 + 1."""
    assert [len(batch) for batch in token_budget_batches([10] * 11, 100)] == [6, 5]


def test_too_long_texts_go_alone():
    """A text above the budget is encoded all the same, by itself."""
    batches = token_budget_batches([5, 500, 5, 300], 100)
    assert [batch.tolist() for batch in batches] == [[1], [3], [0, 2]]


def test_nothing():
    """No texts, no batches."""
    assert token_budget_batches([], 10) == []


def test_zero_length_is_our_bug():
    """An empty sequence has no vector to pool; the caller must take it out before."""
    with pytest.raises(AssertionError, match="at least one token"):
        token_budget_batches([3, 0], 10)


def test_many_texts():
    """A hundred thousand texts take well under a second, and the batches are even."""
    lengths = np.random.default_rng(0).integers(1, 513, 100_000)
    batches = token_budget_batches(lengths.tolist(), 16_384)
    totals = [int(lengths[batch].sum()) for batch in batches]
    assert all(b.dtype == np.int64 for b in batches)
    assert max(totals) <= 16_384
    assert min(totals) > 8_192
    assert all(lengths[a].min() >= lengths[b].max() for a, b in pairwise(batches))


def test_an_epoch_is_bounded_by_the_data():
    """A weight of 10^9 costs a sentence, not memory, whatever the numbers."""
    for weight in (10**9, 1e200):
        draws = task_draws([10, 1000], weights=[weight, 1.0])
        with pytest.raises(ValueError, match="of at most 1,000 times the 1,010 examples"):
            TaskBatchSampler([10, 1000], 2, task_draws=draws)
    assert len(TaskBatchSampler([1], 2, task_draws=[1000])) == 500
