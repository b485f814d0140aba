"""Who does what next: longest task first, corpora too large for one device cut into slices.

    Schedule(works, devices) -> next() -> job -> done(job) or again(job) ... until it is empty

A slice is a part of a corpus that any device encodes into the store; the task itself runs when its
slices are done and finds their vectors there. Tasks over the same corpus follow one another: the
second finds nearly everything. Pure arithmetic, so that a benchmark can simulate a whole run.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 50_000  # documents of a corpus encoded and searched at a time; mteb's own number
_WIDE = 0.5  # of a device's fair share: a task that is larger is cut
_SLICES = 10  # of a fair share, so that what is left over at the end is small
_LEFT = 0.02  # of a corpus's cost remains where its vectors are read and searched


@dataclass(frozen=True, slots=True)
class Work:
    """A task as the schedule sees it."""

    name: str
    seconds: float
    corpus_seconds: float = 0.0
    """The part of `seconds` that slices can take over."""
    blocks: int = 1
    """Of its corpus, BLOCK documents each: slices are made of whole ones."""
    corpus: str = ""
    """Works of the same corpus share its vectors; "" is nobody's."""


@dataclass(frozen=True, slots=True)
class Job:
    """Something for one device to do."""

    task: str
    seconds: float
    part: tuple[int, int] | None = None
    """(number, count): encode that slice of the corpus; None: run the task."""


class Schedule:
    """Jobs in the order they are to be started, and which of them still wait for others."""

    def __init__(self, works: Sequence[Work], devices: int) -> None:
        """Cut and order; `devices` work at the same time."""
        fair = sum(work.seconds for work in works) / max(1, devices)
        ready: list[Job] = []
        self._waits: dict[str, set[Job]] = {}
        self._jobs: dict[str, Job] = {}
        self.stored: dict[str, str] = {}
        """Tasks whose vectors go through a store -> the task that gives it its name."""
        owners: dict[str, list[Job]] = {}
        for work in sorted(works, key=lambda work: -work.seconds):
            first = owners.get(work.corpus) if work.corpus else None
            slices = [] if first else _cut(work, fair, devices)
            rest = work.seconds
            if slices or first:
                rest -= (1 - _LEFT) * work.corpus_seconds
            job = self._jobs[work.name] = Job(work.name, rest)
            self._waits[work.name] = set(first or slices)
            ready += slices if slices else [] if first else [job]
            alike = [other.name for other in works if work.corpus and other.corpus == work.corpus]
            if slices or len(alike) > 1:
                self.stored[work.name] = min(alike, default=work.name)
            if not first:
                owners[work.corpus] = slices or [job]
        # Slices count as equally long, so that a corpus is done, and its vectors gone, before the next.
        slice_ = fair / _SLICES
        self._ready = deque(sorted(ready, key=lambda job: -(slice_ if job.part else job.seconds)))
        self.jobs = len(self._ready) + sum(map(bool, self._waits.values()))
        """How many there are."""

    def next(self) -> Job | None:
        """What a free device is to do; None while there is nothing, perhaps only for now."""
        return self._ready.popleft() if self._ready else None

    def again(self, job: Job) -> None:
        """A job was not finished: it is the next one."""
        self._ready.appendleft(job)

    def done(self, job: Job) -> None:
        """A job is over, well or badly: what waited only for it is next."""
        for name, waits in self._waits.items():
            if job in waits:
                waits.remove(job)
                if not waits:
                    self._ready.appendleft(self._jobs[name])

    def left(self) -> list[Job]:
        """Tasks that are ready or wait, not those handed out."""
        waiting = [self._jobs[name] for name, waits in self._waits.items() if waits]
        return [job for job in self._ready if job.part is None] + waiting

    def seconds_left(self) -> float:
        """Estimated, of every job not handed out."""
        waiting = [self._jobs[name] for name, waits in self._waits.items() if waits]
        return sum(job.seconds for job in [*self._ready, *waiting])

    def is_empty(self) -> bool:
        """Whether nothing is left to hand out, now or later."""
        return not self._ready and not any(self._waits.values())


def _cut(work: Work, fair: float, devices: int) -> list[Job]:
    """The slices of a task; none if it is small enough, or its corpus is."""
    if devices < 2 or work.seconds <= _WIDE * fair or work.blocks < 2:
        return []
    wanted = round(work.corpus_seconds / fair * _SLICES)
    count = max(2, min(work.blocks, wanted))
    return [Job(work.name, work.corpus_seconds / count, (i, count)) for i in range(count)]
