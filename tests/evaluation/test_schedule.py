"""The schedule: everything is done once, slices before their task, and nobody waits for long."""

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_min.evaluation.plan import EvaluationConfig, find_tasks
from kalm_min.evaluation.schedule import BLOCK, Schedule, Work


def simulate(works, devices):
    """Run the schedule by a clock: (makespan, jobs in the order they ended)."""
    schedule, clock = Schedule(works, devices), 0.0
    busy, ended, free = [], [], list(range(devices))
    while not schedule.is_empty() or busy:
        while free and (job := schedule.next()):
            heapq.heappush(busy, (clock + job.seconds, free.pop(), job.task, job.part or (), job))
        clock, device, _, _, job = heapq.heappop(busy)
        free.append(device)
        ended.append(job)
        schedule.done(job)
    return clock, ended


@st.composite
def some_works(draw):
    works = []
    for number in range(draw(st.integers(1, 12))):
        seconds = draw(st.floats(1, 1000))
        share = draw(st.sampled_from([0.0, 0.5, 0.99]))
        blocks, corpus = draw(st.integers(1, 200)), draw(st.sampled_from(["", "", "a", "b"]))
        works.append(Work(f"t{number}", seconds, share * seconds, blocks, corpus))
    return works


@given(works=some_works(), devices=st.integers(1, 9))
def test_every_task_is_run_once_after_its_slices(works, devices):
    _, ended = simulate(works, devices)
    runs = [job.task for job in ended if job.part is None]
    assert sorted(runs) == sorted(work.name for work in works)
    for place, job in enumerate(ended):
        if job.part is not None:
            assert ended.index(next(j for j in ended if j.task == job.task and not j.part)) > place
            assert [j.part for j in ended if j.task == job.task].count(job.part) == 1
    for name in {job.task for job in ended if job.part}:
        (count,) = {job.part[1] for job in ended if job.part and job.task == name}
        assert {job.part[0] for job in ended if job.part and job.task == name} == set(range(count))


def test_the_longest_task_does_not_decide():
    """Promise: one corpus larger than all the rest is spread over the devices."""
    works = [Work("wide", 1000.0, 990.0, 200), *(Work(f"t{i}", 10.0) for i in range(40))]
    total = sum(work.seconds for work in works)
    assert simulate(works, 4)[0] < 1.1 * total / 4
    whole = [Work("wide", 1000.0), *works[1:]]
    assert simulate(whole, 4)[0] == 1000


def test_tasks_over_one_corpus_encode_it_once():
    works = [Work("a", 100.0, 95.0, 1, "same"), Work("b", 101.0, 95.0, 1, "same")]
    span, ended = simulate(works, 2)
    assert [job.task for job in ended] == ["b", "a"]
    assert span < 110


def test_a_job_that_was_not_finished_is_next():
    schedule = Schedule([Work("a", 2.0), Work("b", 1.0)], 1)
    job = schedule.next()
    schedule.again(job)
    assert schedule.next() == job
    assert [left.task for left in schedule.left()] == ["b"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("devices", [4, 8])
def test_mteb_in_english_takes_its_share(mteb, devices):
    """Promise: within 5 % of the work divided by the devices, slices of MSMARCO and its like included."""
    tasks, _, _ = find_tasks(EvaluationConfig(model="none", benchmark=("MTEB(eng, v1)",)))
    works = [
        Work(task.name, task.characters, task.corpus_characters, task.documents // BLOCK)
        for task in tasks
    ]
    needed = sum(work.seconds for work in works)
    assert simulate(works, devices)[0] < 1.05 * needed / devices
