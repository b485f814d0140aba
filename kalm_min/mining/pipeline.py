"""From a training folder and a model to the same folder with mined negatives.

    catalogue every task -> encode what the store lacks -> search
         -> (score with another model) -> judge, choose, write task by task -> report

Each phase leaves files that are complete or absent and skips what is there, so the same command goes
on after a kill, and another choice of negatives encodes nothing. Work is dealt to the processes in
pieces that do not depend on how many there are; they meet between phases.

Not here: the rules (negatives.py), the files (store.py, output.py), the arguments (mine.py).
"""

import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO, TypeVar

import numpy as np
import torch

from kalm_min.console import Progress
from kalm_min.data import TrainingData
from kalm_min.embedder import Embedder
from kalm_min.files import read_json, write_json, write_text
from kalm_min.mining import output, report
from kalm_min.mining.catalogue import Catalogue, Ints, Texts, catalogue_task, open_pool, text_reader
from kalm_min.mining.negatives import KEPT, Known, Rules
from kalm_min.mining.nominees import Rows, Span
from kalm_min.mining.search import (
    ApproximateIndex,
    Neighbours,
    recall,
    search,
    search_on_all_ranks,
)
from kalm_min.mining.selection import Selection, pair_scores, select, with_scores
from kalm_min.mining.store import Side, Store, StoredNeighbours, describe
from kalm_min.training import distributed

_LAYOUT = 1  # raised when the same settings give another output
_RECALL_QUERIES = 256

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class MiningConfig(Rules):
    """Mine hard negatives."""

    model: str
    """Model that embeds: a folder or a hub id."""
    data: Path
    """Training data: a JSONL(.gz) file, or a folder in which every file or sub-folder is a task."""
    output: Path
    """Folder of the mined data."""
    pool: Path | None = None
    """JSONL(.gz) file with "text" in every line to take negatives from; none: each task's own texts."""
    instruction: str | None = None
    """Put before the queries of tasks and lines that have no instruction of their own."""
    scorer: str | None = None
    """Model whose scores are written, for distillation; none: those of the mining model."""
    store: Path | None = None
    """Folder of the vectors; none: inside the output folder."""
    search: Literal["torch", "faiss"] = "torch"
    """Who searches. Both find the same."""
    index: str | None = None
    """Approximate search with a faiss factory string, e.g. "IVF4096,Flat;nprobe=64"."""
    max_length: int | None = None
    """Tokens kept of a text, instruction included; none: the model's own limit."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; none: each process its own GPU, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the model computes in; auto is bfloat16 where native, else float32."""
    cache_dir: Path | None = None
    """Where line indices of the data are kept; none keeps them beside the data."""
    dry_run: bool = False
    """Say what there is to do, and do nothing."""


class _Task(NamedTuple):
    """A task with its vectors, encoded or not."""

    catalogue: Catalogue
    queries: Side
    documents: Side
    """Positives, and negatives where the task is its own corpus."""
    corpus: Side

    @property
    def sides(self) -> tuple[Side, ...]:
        """Each once."""
        return tuple(dict.fromkeys((self.queries, self.documents, self.corpus)))


class Miner:
    """A run on one of its processes. Anything a person can mend is a ValueError of one sentence."""

    def __init__(self, config: MiningConfig, device: torch.device, stream: TextIO) -> None:
        """Open the data; `stream` shows progress."""
        self.config, self.device, self.stream = config, device, stream
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.work = config.output / ".mining"
        self.data, self.pool = distributed.rank_zero_first(self._open_data)
        self._pools: dict[str, Side] = {}
        self.names = [output.file_name(task) for task in self.data.task_names]
        self.made_with: dict[str, Any] = {
            "layout": _LAYOUT,
            "rules": self._rules(),
            "index": config.index,
            "pool": self.pool and self.pool[0].fingerprint(),
        }

    def run(self) -> tuple[dict[str, int], list[str]]:
        """Mine every task that is not finished; sums over all rows, and what deserves a look."""
        self._prepare()
        scorer = None
        if self.config.scorer is not None:  # before the other, so that one model is held at a time
            scorer = self._open_model(self.config.scorer, "scorer")[1]
            self.made_with["scorer"] = scorer.manifest
        embedder, self.store = self._open_model(self.config.model, "model")
        self.made_with["model"] = self.store.manifest
        unfinished = [number for number in range(len(self.names)) if not self._finished(number)]
        # A label-based task draws its positives and negatives anew in every epoch: it goes as it is.
        todo = [number for number in unfinished if not self.data.settings[number].label_based]
        self._say(f"{len(self.names) - len(unfinished)} of {len(self.names)} tasks are finished")
        distributed.barrier()  # nobody writes before everybody has looked
        self._encode(todo, embedder, "encode", lambda number: self._task(number).sides)
        self._search(todo)
        del embedder
        if scorer is not None and self.config.scorer is not None:
            embedder, store = self._open_model(self.config.scorer, "scorer")
            self._encode(todo, embedder, "score", lambda number: self._scored_sides(number, store))
        for number in self._dealt(unfinished, "write"):
            if number in todo:
                self._mine(number, scorer)
            else:
                self._copy(number)
        distributed.barrier()
        return self._report()

    def plan(self) -> str:
        """What a run would do, as a Markdown table; nothing is written.

        A task whose neighbours are all there already shows what the rules would do to it.
        """
        self.store = self._open_model(self.config.model, "model")[1]
        head = ["task", "rows", "queries", "documents", "corpus", "to encode", "to search", "kept"]
        rows: list[list[str]] = []
        for number, name in enumerate(self.data.task_names):
            if self.data.settings[number].label_based:
                rows.append([name, f"{self.data.task_sizes[number]:,}", *["copied"] * 6])
                continue
            task = self._task(number)
            kchar = sum(side.size(i) for side in task.sides for i in side.missing()) // 1000
            blocks = len(self._neighbours(task).missing())
            kept = "" if kchar or blocks else f"{(self._choose(task).fate == KEPT).sum():,}"
            sizes = (task.catalogue.size, len(task.queries), len(task.documents), len(task.corpus))
            work = [f"{kchar:,} kchar", f"{blocks} blocks", kept]
            rows.append([name, *(f"{size:,}" for size in sizes), *work])
        return report.table(head, rows)

    # ---- phases ----------------------------------------------------------------------------------

    def _open_data(self) -> tuple[TrainingData, tuple[Texts, Any] | None]:
        """The data and the pool, checked, and the output folder, which must not hold anything else."""
        config = self.config
        data = TrainingData(
            config.data,
            instruction=config.instruction,
            cache_dir=config.cache_dir,
            progress=self.stream if self.rank == 0 else None,
        )
        output.check_output(config.output, config.data, map(output.file_name, data.task_names))
        return data, config.pool and open_pool(config.pool, config.cache_dir)

    def _prepare(self) -> None:
        """Sweep up after killed runs, and number every text of every task."""
        if self.rank == 0:
            for folder in (self.config.output, *self.work.glob("**/")):
                for torn in folder.glob(".*.tmp"):
                    torn.unlink()
        distributed.barrier()
        for number in self._dealt(range(len(self.names)), "read"):
            self._read(number).save(self._path("catalogues", number, "npz"))
        distributed.barrier()

    def _open_model(self, model: str, folder: str) -> tuple[Embedder, Store]:
        """A model and the store of its vectors."""
        config = self.config
        dtype = None if config.dtype == "auto" else config.dtype

        def opened() -> Embedder:
            return Embedder.from_pretrained(model, self.device, dtype, max_length=config.max_length)

        embedder = distributed.rank_zero_first(opened)
        manifest = distributed.gather_objects(
            describe(embedder, model) if self.rank == 0 else None
        )[0]
        place = (config.store or self.work) / folder
        store = distributed.rank_zero_first(
            lambda: Store.open(place, manifest, begin=not config.dry_run)
        )
        return embedder, store

    def _encode(
        self,
        todo: Iterable[int],
        embedder: Embedder,
        title: str,
        sides: Callable[[int], Iterable[Side]],
    ) -> None:
        """Encode the shards that are missing; each process takes some."""
        wanted: dict[Path, tuple[int, int, int, int]] = {}
        for number in todo:
            for place, side in enumerate(sides(number)):
                if self.rank == 0:
                    side.describe()
                for shard in side.missing():
                    size = side.size(shard) // 1000 + 1
                    wanted.setdefault(side.path(shard), (number, place, shard, size))
        distributed.barrier()  # nobody encodes before everybody has looked
        share = list(wanted.values())[self.rank :: self.world]
        with self._progress(sum(size for *_, size in share), "kchar", title) as progress:
            for number, group in groupby(share, key=lambda one: one[0]):
                opened = tuple(sides(number))
                for _, place, shard, size in group:
                    opened[place].encode(shard, embedder)
                    progress.update(size, opened[place].name)
        distributed.barrier()

    def _search(self, todo: Iterable[int]) -> None:
        """Find the neighbours of every query that has none stored."""
        work = [(n, block) for n in todo for block in self._neighbours(self._task(n)).missing()]
        distributed.barrier()
        with self._progress(len(work), "blocks", "search") as progress:
            for number, group in groupby(work, key=lambda one: one[0]):
                task = self._task(number)
                stored = self._neighbours(task)
                queries, corpus = task.queries.vectors(), task.corpus.vectors()
                nearest = self._nearest(corpus, stored.depth)
                for _, block in group:
                    part = queries[stored.bounds(block)]
                    found = search_on_all_ranks(part, corpus, stored.depth, nearest)
                    if self.rank == 0:
                        self._measure(stored, part, corpus, found)
                        stored.write(block, found)
                    progress.update(1, self.data.task_names[number])
        distributed.barrier()

    def _nearest(self, corpus: Rows, depth: int) -> Callable[[Rows, Span], Neighbours]:
        """How this run searches a span of a corpus."""
        if self.config.index is None:
            return lambda queries, span: search(
                queries, corpus, depth, backend=self.config.search, device=self.device, span=span
            )
        span = (len(corpus) * self.rank // self.world, len(corpus) * (self.rank + 1) // self.world)
        index = ApproximateIndex(corpus, self.config.index, span)
        return lambda queries, _: index.nearest(queries, depth)

    def _measure(
        self, stored: StoredNeighbours, queries: Rows, corpus: Rows, found: Neighbours
    ) -> None:
        """Keep how much of the truth an approximate index finds, measured on its first queries."""
        path = stored.folder / "recall.json"
        if self.config.index is not None and not path.exists():
            sample = queries[:_RECALL_QUERIES]
            exact = search(sample, corpus, stored.depth, device=self.device)
            part = Neighbours(found.ids[: len(sample)], found.scores[: len(sample)])
            write_json(path, {"recall": recall(part, exact), "queries": len(sample)})

    def _mine(self, number: int, scorer: Store | None) -> None:
        """Choose the negatives of a task and write it."""
        task = self._task(number)
        selection = self._choose(task)
        written = selection if scorer is None else self._rescored(number, task, selection, scorer)
        summary = report.summarise(task.catalogue, selection, len(task.corpus))
        found = self._neighbours(task).folder / "recall.json"
        summary["recall"] = read_json(found)["recall"] if found.exists() else None
        page = report.examples(self.data, task.catalogue, selection, task.corpus.text, summary)
        lines = output.mined_lines(self.data, task.catalogue, written, task.corpus)
        self._write(number, task.catalogue, lines, summary, page)

    def _copy(self, number: int) -> None:
        """Write a task that is not mined as it is."""
        catalogue = self._catalogue(number)
        rows = range(catalogue.first, catalogue.first + catalogue.size)
        lines = output.copied_lines(self.data, rows)
        self._write(number, catalogue, lines, report.copied(len(rows)), None)

    def _write(
        self,
        number: int,
        catalogue: Catalogue,
        lines: Iterator[str],
        summary: report.Summary,
        page: str | None,
    ) -> None:
        """Write all files of a task; its record, which says that it is finished, goes first and comes last."""
        folder, name, data = self.config.output, self.names[number], self.config.data
        record = self._path("tasks", number, "json")
        record.unlink(missing_ok=True)
        settings = (data if data.is_dir() else data.parent) / f"{self.data.task_names[number]}.toml"
        output.write_task(folder / f"{name}.jsonl", lines, settings)
        if page is not None:
            write_text(folder / report.PAGES / f"{name}.md", f"# {name}\n\n{page}")
        made_with = self._made_with(catalogue, number)
        write_json(record, {"made_with": made_with, "summary": summary})

    def _report(self) -> tuple[dict[str, int], list[str]]:
        """Write the report over all tasks, old and new; sums and remarks."""
        records = [read_json(self._path("tasks", n, "json")) for n in range(len(self.names))]
        tasks = dict(zip(self.names, (record["summary"] for record in records), strict=True))
        if self.rank == 0:
            facts = {"model": self.store.manifest, "rules": self._rules()}
            facts |= {name: getattr(self.config, name) for name in ("pool", "scorer", "index")}
            report.write(self.config.output, tasks, facts)
            shutil.rmtree(self.work / "catalogues", ignore_errors=True)
        return report.totals(tasks), report.remarks(tasks)

    # ---- what the phases share -------------------------------------------------------------------

    def _task(self, number: int) -> _Task:
        """A task and its vectors."""
        name, catalogue, read = self.names[number], self._catalogue(number), text_reader(self.data)
        queries = Side(self.store, f"{name}.queries", catalogue.queries, read)
        documents = Side(self.store, f"{name}.documents", catalogue.documents, read)
        if self.pool is None:
            return _Task(catalogue, queries, documents, documents)
        settings = self.data.settings[number]
        own = settings.instruction if settings.instruction is not None else self.config.instruction
        instruction = own or "" if settings.symmetric else ""
        if instruction not in self._pools:  # by the instruction its texts are encoded with
            texts = Texts(self.pool[0].table, (instruction,))
            side = Side(self.store, f"pool.{len(self._pools)}", texts, self.pool[1])
            self._pools[instruction] = side
        return _Task(catalogue, queries, documents, self._pools[instruction])

    def _read(self, number: int) -> Catalogue:
        return catalogue_task(self.data, number, with_negatives=self.pool is None)

    def _catalogue(self, number: int) -> Catalogue:
        """As it was read when the run began; a dry run, which writes nothing, reads it now."""
        if self.config.dry_run:
            return self._read(number)
        return Catalogue.load(self._path("catalogues", number, "npz"))

    def _choose(self, task: _Task) -> Selection:
        return select(
            task.catalogue,
            task.corpus.texts.hashes,
            task.queries.vectors(),
            task.documents.vectors(),
            self._neighbours(task),
            self.config,
        )

    def _neighbours(self, task: _Task) -> StoredNeighbours:
        """The stored lists of a task, long enough for the rules."""
        known = Known(task.catalogue).most
        # Known answers take places in the list; more than this of them (a class) may shorten it.
        depth = self.config.depth + min(known, self.config.depth + 100)
        depth = min(depth, len(task.corpus))
        return self.store.neighbours(task.queries, task.corpus, depth, self.config.index)

    def _scored(
        self, number: int, task: _Task, selection: Selection, scorer: Store
    ) -> list[tuple[Side, Ints]]:
        """What the scorer encodes, the texts of pairs that are written, and the places of each pair's.

        The queries' places are those of the positives' pairs, then those of the negatives'.
        """
        catalogue = task.catalogue
        of_positives, rows, of_negatives, more_rows = selection.pairs(catalogue)
        parts = (
            ("queries", task.queries, catalogue.row_query[np.concatenate([rows, more_rows])]),
            ("positives", task.documents, catalogue.positives[of_positives]),
            ("negatives", task.corpus, selection.negatives[of_negatives]),
        )
        scored: list[tuple[Side, Ints]] = []
        for part, side, numbers in parts:
            unique, places = np.unique(numbers, return_inverse=True)
            name = f"{self.names[number]}.{part}"
            scored.append((Side(scorer, name, side.texts.take(unique), side.read), places))
        return scored

    def _scored_sides(self, number: int, scorer: Store) -> list[Side]:
        task = self._task(number)
        return [side for side, _ in self._scored(number, task, self._choose(task), scorer)]

    def _rescored(self, number: int, task: _Task, selection: Selection, scorer: Store) -> Selection:
        """The same selection with the scorer's scores."""
        scored = self._scored(number, task, selection, scorer)
        queries, positives, negatives = (side.vectors() for side, _ in scored)
        asked, answers, more = (places for _, places in scored)
        split = len(answers)
        return with_scores(
            selection,
            task.catalogue,
            pair_scores(queries, asked[:split], positives, answers),
            pair_scores(queries, asked[split:], negatives, more),
        )

    def _finished(self, number: int) -> bool:
        """Whether the output of a task is there, made from these rows with these settings."""
        path = self._path("tasks", number, "json")
        if not path.is_file():
            return False
        record = read_json(path)
        made_with = json.loads(json.dumps(self._made_with(self._catalogue(number), number)))
        there = (self.config.output / f"{self.names[number]}.jsonl").is_file()
        return record["made_with"] == made_with and there == (record["summary"]["kept"] > 0)

    def _made_with(self, catalogue: Catalogue, number: int) -> dict[str, Any]:
        """All that a task's output depends on."""
        settings = asdict(self.data.settings[number])
        return self.made_with | {"data": catalogue.fingerprint, "settings": settings}

    def _rules(self) -> dict[str, Any]:
        return {field.name: getattr(self.config, field.name) for field in fields(Rules)}

    def _path(self, folder: str, number: int, suffix: str) -> Path:
        """Where something of a task is kept."""
        return self.work / folder / f"{self.names[number]}.{suffix}"

    def _dealt(self, tasks: Iterable[int], title: str) -> Iterator[int]:
        """This process's share of some tasks, shown as it goes."""
        share = list(tasks)[self.rank :: self.world]
        with self._progress(len(share), "tasks", title) as progress:
            for number in share:
                yield number
                progress.update(1, self.data.task_names[number])

    def _progress(self, total: int, unit: str, title: str) -> Progress:
        """Only the first process shows its share; the others' are as large."""
        stream = self.stream if self.rank == 0 else io.StringIO()
        return Progress(total, unit, stream, title=title)

    def _say(self, text: str) -> None:
        if self.rank == 0:
            self.stream.write(text + "\n")
            self.stream.flush()
