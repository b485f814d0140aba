"""From a training folder and a model to the same folder with mined negatives.

    catalogue every task -> encode what the store lacks -> search -> judge and choose
         -> (score with another model) -> write task by task -> report

Each phase leaves files that are complete or absent and skips what is there, so the same command goes
on after a kill, and another choice of negatives encodes nothing. Work is dealt to the processes in
pieces that do not depend on how many there are; they meet between phases.

    <output>/<task>.jsonl, <task>.toml    the mined data
    <output>/README.md, README.png        the report
    <output>/.mining/                     the store, and a record of each finished task

Not here: the rules (negatives.py), the arguments of the command (mine.py).
"""

import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from kalm_min.data import TrainingData
from kalm_min.embedder import Embedder
from kalm_min.files import atomic_write, read_json, write_json
from kalm_min.mining import report
from kalm_min.mining.catalogue import (
    Catalogue,
    Read,
    catalogue_task,
    document_reader,
    open_pool,
    query_reader,
)
from kalm_min.mining.negatives import KEPT, Known, Rules
from kalm_min.mining.search import (
    ApproximateIndex,
    Neighbours,
    Rows,
    Span,
    recall,
    search,
    search_on_all_ranks,
)
from kalm_min.mining.selection import Selection, select
from kalm_min.mining.store import Side, Store, StoredNeighbours, describe
from kalm_min.progress import Progress
from kalm_min.training import distributed

_LAYOUT = 1  # raised when the same settings give another output
_RECALL_QUERIES = 256
_HELD = 1 << 28  # characters of a corpus that is read whole instead of text by text
_WRITTEN = ("query", "pos", "pos_scores", "neg", "neg_scores")

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

    number: int
    catalogue: Catalogue
    queries: Side
    documents: Side
    """Positives, and negatives where the task is its own corpus."""
    corpus: Side


class Miner:
    """A run on one of its processes. Anything a person can mend is a ValueError of one sentence."""

    def __init__(self, config: MiningConfig, device: torch.device, stream: TextIO) -> None:
        """Open the data and the model; `stream` shows progress."""
        self.config, self.device, self.stream = config, device, stream
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.work = config.output / ".mining"
        self.data = self._first(
            lambda: TrainingData.open(
                config.data,
                instruction=config.instruction,
                cache_dir=config.cache_dir,
                progress=stream if self.rank == 0 else None,
            )
        )
        self.names = [file_name(task) for task in self.data.task_names]
        check_output(config.output, config.data, self.names)
        pool = config.pool
        self.pool = self._first(lambda: open_pool(pool, config.cache_dir)) if pool else None
        self._pool_sides: dict[str, Side] = {}
        self.made_with: dict[str, Any] = {
            "layout": _LAYOUT,
            "rules": _rules(config),
            "index": config.index,
            "pool": self.pool and self.pool[0].fingerprint(),
        }

    def run(self) -> dict[str, int]:
        """Mine every task that is not finished; the sums of what became of all rows."""
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
        self._meet()  # nobody writes before everybody has looked
        self._encode(todo, embedder, "encode", self._sides)
        self._search(todo)
        for number in self._dealt(todo, "choose"):
            self._select(number)
        self._meet()
        if scorer is not None and self.config.scorer is not None:
            del embedder
            embedder, scorer = self._open_model(self.config.scorer, "scorer")
            self._encode(todo, embedder, "score", partial(self._scored_sides, scorer))
        for number in self._dealt(unfinished, "write"):
            if number in todo:
                self._write(number, scorer)
            else:
                self._copy(number)
        self._meet()
        return self._report()

    def plan(self) -> str:
        """What a run would do, as a Markdown table; nothing is written.

        A task whose neighbours are all there already shows what the rules would do to it.
        """
        _, self.store = self._open_model(self.config.model, "model")
        self.made_with["model"] = self.store.manifest
        head = ["task", "rows", "queries", "documents", "corpus", "to encode", "to search", "kept"]
        rows: list[list[str]] = []
        for number, name in enumerate(self.data.task_names):
            if self.data.settings[number].label_based:
                rows.append([name, f"{self.data.task_sizes[number]:,}", *["copied"] * 6])
                continue
            task = self._task(number)
            sides = [task.queries, task.documents, *([task.corpus] if self.pool else [])]
            kchar = sum(side.size(i) for side in sides for i in side.missing()) // 1000
            neighbours = self._neighbours(task)
            blocks = len(neighbours.missing())
            kept = "" if kchar or blocks else f"{(self._choose(task).fate == KEPT).sum():,}"
            sizes = (task.catalogue.size, len(task.queries), len(task.documents), len(task.corpus))
            work = [f"{kchar:,} kchar", f"{blocks} blocks", kept]
            rows.append([name, *(f"{size:,}" for size in sizes), *work])
        return report.table(head, rows)

    # ---- phases ----------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Sweep up after killed runs, and number every text of every task."""
        if self.rank == 0:
            for folder in (self.config.output, *self.work.glob("**/")):
                for torn in folder.glob(".*.tmp"):
                    torn.unlink()
        self._meet()
        for number in self._dealt(range(len(self.names)), "read"):
            self._read(number).save(self._path("catalogues", number, "npz"))
        self._meet()

    def _open_model(self, model: str, folder: str) -> tuple[Embedder, Store]:
        """A model and the store of its vectors."""
        config = self.config
        embedder = self._first(
            lambda: Embedder.from_pretrained(
                model,
                self.device,
                None if config.dtype == "auto" else config.dtype,
                max_length=config.max_length,
            )
        )
        mine = describe(embedder, model) if self.rank == 0 else None
        manifest = distributed.gather_objects(mine)[0]
        store = self._first(
            lambda: Store.open(
                (config.store or self.work) / folder, manifest, begin=not config.dry_run
            )
        )
        return embedder, store

    def _encode(
        self,
        todo: Iterable[int],
        embedder: Embedder,
        title: str,
        sides: Callable[[int], list[tuple[Side, Read]]],
    ) -> None:
        """Encode the shards that are missing; each process takes some."""
        wanted: dict[Path, tuple[int, int, int, int]] = {}
        for number in todo:
            for place, (side, _) in enumerate(sides(number)):
                if self.rank == 0:
                    side.describe()
                for shard in side.missing():
                    wanted.setdefault(
                        side.path(shard), (number, place, shard, side.size(shard) // 1000 + 1)
                    )
        self._meet()
        share = list(wanted.values())[self.rank :: self.world]
        with self._progress(sum(size for *_, size in share), "kchar", title) as progress:
            for number, group in groupby(share, key=lambda one: one[0]):
                opened = sides(number)
                for _, place, shard, size in group:
                    side, read = opened[place]
                    side.encode(shard, read, embedder)
                    progress.update(size, side.name)
        self._meet()

    def _search(self, todo: Iterable[int]) -> None:
        """Find the neighbours of every query that has none stored."""
        work = [(n, block) for n in todo for block in self._neighbours(self._task(n)).missing()]
        self._meet()
        with self._progress(len(work), "blocks", "search") as progress:
            for number, group in groupby(work, key=lambda one: one[0]):
                task = self._task(number)
                stored = self._neighbours(task)
                queries, corpus = task.queries.vectors(), task.corpus.vectors()
                depth = int(stored.folder.name)
                nearest = self._nearest(corpus, depth)
                for _, block in group:
                    part = queries[stored.bounds(block)]
                    found = search_on_all_ranks(part, corpus, depth, nearest)
                    if self.rank == 0:
                        self._measure(stored, part, corpus, found)
                        stored.write(block, found)
                    progress.update(1, self.data.task_names[number])
        self._meet()

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
            exact = search(sample, corpus, int(stored.folder.name), device=self.device)
            part = Neighbours(found.ids[: len(sample)], found.scores[: len(sample)])
            write_json(path, {"recall": recall(part, exact), "queries": len(sample)})

    def _select(self, number: int) -> None:
        selection = self._choose(self._task(number))
        selection.save(self._path("selections", number, "npz"))

    def _choose(self, task: _Task) -> Selection:
        return select(
            task.catalogue,
            task.corpus.texts.hashes,
            task.queries.vectors(),
            task.documents.vectors(),
            self._neighbours(task),
            self.config,
        )

    def _write(self, number: int, scorer: Store | None) -> None:
        """Write the file, the settings and the record of a task, in this order."""
        task = self._task(number)
        selection = Selection.load(self._path("selections", number, "npz"))
        written = selection if scorer is None else self._rescore(task, selection, scorer)
        read = self._corpus_texts(task)
        self._write_lines(number, _lines(self.data, task.catalogue, written, read))
        summary = report.summarise(self.data, task.catalogue, selection, read, len(task.corpus))
        found = self._neighbours(task).folder / "recall.json"
        summary["recall"] = read_json(found)["recall"] if found.exists() else None
        record = {"made_with": self._made_with(task.catalogue, number), "summary": summary}
        write_json(self._path("tasks", number, "json"), record)
        self._path("selections", number, "npz").unlink()

    def _copy(self, number: int) -> None:
        """Write a task that is not mined as it is."""
        catalogue = self._catalogue(number)
        rows = range(catalogue.first, catalogue.first + catalogue.size)
        self._write_lines(
            number, (json.dumps(self.data.record(row), ensure_ascii=False) + "\n" for row in rows)
        )
        record = {"made_with": self._made_with(catalogue, number)}
        write_json(
            self._path("tasks", number, "json"), record | {"summary": report.copied(len(rows))}
        )

    def _write_lines(self, number: int, lines: Iterable[str]) -> None:
        """Write the file of a task and the settings beside it; neither, if there is no line."""
        output = self.config.output / f"{self.names[number]}.jsonl"
        lines = iter(lines)
        first = next(lines, None)
        if first is None:  # An empty file is no task.
            output.unlink(missing_ok=True)
            output.with_name(f"{self.names[number]}.toml").unlink(missing_ok=True)
            return
        with atomic_write(output, "w") as file:
            file.write(first)
            for line in lines:
                file.write(line)
        settings = self._settings_file(number)
        if settings is not None:
            with atomic_write(output.with_name(f"{self.names[number]}.toml")) as file:
                file.write(settings.read_bytes())

    def _report(self) -> dict[str, int]:
        """Write the report over all tasks, old and new; the sums of what became of their rows."""
        records = [read_json(self._path("tasks", n, "json")) for n in range(len(self.names))]
        summaries = [record["summary"] for record in records]
        if self.rank == 0:
            facts = {"model": self.store.manifest, "rules": _rules(self.config)}
            facts |= {name: getattr(self.config, name) for name in ("pool", "scorer", "index")}
            report.write(self.config.output, self.data.task_names, summaries, facts)
            shutil.rmtree(self.work / "catalogues", ignore_errors=True)
        return report.totals(summaries)

    # ---- what the phases share -------------------------------------------------------------------

    def _task(self, number: int) -> _Task:
        """A task and its vectors."""
        name, catalogue = self.names[number], self._catalogue(number)
        queries = self.store.side(f"{name}.queries", catalogue.queries)
        documents = self.store.side(f"{name}.documents", catalogue.documents)
        corpus = self._pool_side(number) if self.pool else documents
        return _Task(number, catalogue, queries, documents, corpus)

    def _read(self, number: int) -> Catalogue:
        return catalogue_task(self.data, number, with_negatives=self.pool is None)

    def _catalogue(self, number: int) -> Catalogue:
        """As it was read when the run began; a dry run, which writes nothing, reads it now."""
        if self.config.dry_run:
            return self._read(number)
        return Catalogue.load(self._path("catalogues", number, "npz"))

    def _pool_side(self, number: int) -> Side:
        """The pool, under the task's instruction where passages have one."""
        assert self.pool is not None
        settings = self.data.settings[number]
        own = settings.instruction if settings.instruction is not None else self.config.instruction
        instruction = (own or "") if settings.symmetric else ""
        if instruction not in self._pool_sides:
            texts = replace(self.pool[0], instructions=(instruction,))
            name = f"pool.{len(self._pool_sides)}"
            self._pool_sides[instruction] = self.store.side(name, texts)
        return self._pool_sides[instruction]

    def _sides(self, number: int) -> list[tuple[Side, Read]]:
        """What the mining model encodes for a task, with readers."""
        task = self._task(number)
        sides = [
            (task.queries, query_reader(self.data)),
            (task.documents, document_reader(self.data)),
        ]
        return [*sides, (task.corpus, self.pool[1])] if self.pool else sides

    def _scored_sides(self, scorer: Store, number: int) -> list[tuple[Side, Read]]:
        """What the scorer encodes for a task: the texts of pairs that are written, nothing else."""
        task = self._task(number)
        selection = Selection.load(self._path("selections", number, "npz"))
        kept = selection.fate == KEPT
        negatives = selection.negatives[kept]
        name = self.names[number]
        parts = [
            ("queries", task.queries, query_reader(self.data), task.catalogue.row_query[kept]),
            (
                "positives",
                task.documents,
                document_reader(self.data),
                task.catalogue.positives[np.repeat(kept, np.diff(task.catalogue.starts))],
            ),
            (
                "negatives",
                task.corpus,
                self.pool[1] if self.pool else document_reader(self.data),
                negatives[negatives >= 0],
            ),
        ]
        return [
            (scorer.side(f"{name}.{part}", side.texts.take(np.unique(numbers))), read)
            for part, side, read, numbers in parts
        ]

    def _rescore(self, task: _Task, selection: Selection, scorer: Store) -> Selection:
        """The same selection with the scorer's scores; nan for rows that are not written."""
        kept = selection.fate == KEPT
        sides = [side for side, _ in self._scored_sides(scorer, task.number)]
        queries, positives, negatives = (side.vectors() for side in sides)
        row_query, of_positive = task.catalogue.row_query, np.diff(task.catalogue.starts)
        of_pairs = np.repeat(kept, of_positive)
        numbers = task.catalogue.positives[of_pairs]
        positive_scores = np.full_like(selection.positive_scores, np.nan)
        positive_scores[of_pairs] = _pair_scores(
            (queries, row_query[kept], np.repeat(row_query, of_positive)[of_pairs]),
            (positives, numbers, numbers),
        )
        there = kept[:, None] & (selection.negatives >= 0)  # (R, n)
        chosen = selection.negatives[there]
        negative_scores = np.full_like(selection.negative_scores, np.nan)
        negative_scores[there] = _pair_scores(
            (queries, row_query[kept], np.repeat(row_query, there.sum(1))),
            (negatives, chosen, chosen),
        )
        return replace(selection, positive_scores=positive_scores, negative_scores=negative_scores)

    def _corpus_texts(self, task: _Task) -> Callable[[int], str]:
        """Reads texts of the corpus by number; a corpus of ordinary size is read once, in order."""
        texts = task.corpus.texts
        read = self.pool[1] if self.pool else document_reader(self.data)

        def text(number: int) -> str:
            return read(int(texts.rows[number]), int(texts.slots[number]))

        if int(texts.sizes.sum()) > _HELD:
            return text
        return [text(number) for number in range(len(texts))].__getitem__

    def _neighbours(self, task: _Task) -> StoredNeighbours:
        """The stored lists of a task, long enough for the rules."""
        known = Known(task.catalogue).most
        # Known answers take places in the list; more than this of them (a class) may shorten it.
        depth = self.config.depth + min(known, self.config.depth + 100)
        depth = min(depth, len(task.corpus))
        return self.store.neighbours(task.queries, task.corpus, depth, self.config.index)

    def _finished(self, number: int) -> bool:
        """Whether the output of a task is there, made from these rows with these settings."""
        path = self._path("tasks", number, "json")
        if not path.is_file():
            return False
        record = read_json(path)
        catalogue = self._catalogue(number)
        output = self.config.output / f"{self.names[number]}.jsonl"
        return record["made_with"] == json.loads(
            json.dumps(self._made_with(catalogue, number))
        ) and output.is_file() == (record["summary"]["kept"] > 0)

    def _made_with(self, catalogue: Catalogue, number: int) -> dict[str, Any]:
        """All that a task's output depends on."""
        settings = asdict(self.data.settings[number])
        return self.made_with | {"data": catalogue.fingerprint, "settings": settings}

    def _settings_file(self, number: int) -> Path | None:
        """<task>.toml beside the data."""
        data = self.config.data
        path = (data if data.is_dir() else data.parent) / f"{self.data.task_names[number]}.toml"
        return path if path.is_file() else None

    def _path(self, folder: str, number: int, suffix: str) -> Path:
        """Where something of a task is kept."""
        return self.work / folder / f"{self.names[number]}.{suffix}"

    def _first(self, action: Callable[[], T]) -> T:
        """Do something on the first process, then on the others, which find what it left."""
        if self.rank != 0:
            distributed.barrier()
        result = action()
        if self.rank == 0:
            distributed.barrier()
        return result

    def _meet(self) -> None:
        distributed.barrier()

    def _dealt(self, tasks: Iterable[int], title: str) -> Iterator[int]:
        """This process's share of some tasks, shown as it goes."""
        share = list(tasks)[self.rank :: self.world]
        with self._progress(len(share), "tasks", title) as progress:
            for number in share:
                yield number
                progress.update(1, self.data.task_names[number])

    def _progress(self, total: int, unit: str, title: str) -> Progress:
        """Only the first process shows its share; the others' are as large."""
        return Progress(total, unit, self.stream if self.rank == 0 else _Nowhere(), title=title)

    def _say(self, text: str) -> None:
        if self.rank == 0:
            self.stream.write(text + "\n")
            self.stream.flush()


def file_name(task: str) -> str:
    """A name that a file may have, and that reading the folder again does not skip."""
    name = task.replace("/", "%2F")
    return f"%2E{name[1:]}" if name.startswith(".") else name.replace("README", "%52EADME")


def check_output(output: Path, data: Path, names: Iterable[str]) -> None:
    """Refuse an output folder with data in it that this run would not replace, or its own input."""
    if output.resolve() in {data.resolve(), data.resolve().parent}:
        raise ValueError(f"{output}: expected another folder than that of the data")
    if not output.exists():
        return
    expected = {f"{name}{suffix}" for name in names for suffix in (".jsonl", ".toml")}
    for entry in sorted(output.iterdir()):
        if entry.name.startswith((".", "README")):
            continue
        if entry.name not in expected or not (output / ".mining").is_dir():
            raise ValueError(
                f"{output}: expected an empty folder or one that this data was mined into, "
                f"found {entry.name}"
            )


def _rules(config: MiningConfig) -> dict[str, Any]:
    """The rules alone."""
    return {field.name: getattr(config, field.name) for field in fields(Rules)}


def _pair_scores(
    left: tuple[Rows, npt.NDArray[np.int64], npt.NDArray[np.int64]],
    right: tuple[Rows, npt.NDArray[np.int64], npt.NDArray[np.int64]],
) -> npt.NDArray[np.float32]:
    """Products of pairs; each side: vectors of np.unique(numbers encoded), those, and the wanted ones."""
    step = 8192
    scores = [np.zeros(0, np.float32)]
    (a, a_numbers, a_wanted), (b, b_numbers, b_wanted) = left, right
    rows_a = np.searchsorted(np.unique(a_numbers), a_wanted)
    rows_b = np.searchsorted(np.unique(b_numbers), b_wanted)
    for start in range(0, len(rows_a), step):
        part = slice(start, start + step)
        pairs = a[rows_a[part]].astype(np.float64), b[rows_b[part]].astype(np.float64)
        scores.append(np.einsum("pd,pd->p", *pairs).astype(np.float32))
    return np.concatenate(scores)


def _lines(
    data: TrainingData,
    catalogue: Catalogue,
    selection: Selection,
    text: Callable[[int], str],
) -> Iterator[str]:
    """The kept rows as they are, with their new negatives and scores."""
    for row in np.flatnonzero(selection.fate == KEPT).tolist():
        record = data.record(catalogue.first + row)
        positives = selection.positive_scores[catalogue.starts[row] : catalogue.starts[row + 1]]
        numbers = selection.negatives[row]
        scores = selection.negative_scores[row][numbers >= 0]
        mined = {
            "query": record["query"],
            "pos": record["pos"],
            "pos_scores": _numbers(positives),
            "neg": [text(number) for number in numbers[numbers >= 0].tolist()],
            "neg_scores": _numbers(scores),
        }
        rest = {key: value for key, value in record.items() if key not in _WRITTEN}
        yield json.dumps(mined | rest, ensure_ascii=False) + "\n"


def _numbers(scores: npt.NDArray[np.float32]) -> list[float]:
    """Scores with the digits that float32 vectors justify."""
    return [round(score, 6) for score in scores.tolist()]


class _Nowhere(io.StringIO):
    """A stream for what nobody is to see."""

    def write(self, text: str, /) -> int:
        return len(text)
