"""From a training folder and a model to the same folder with mined negatives.

    index every task's texts -> encode what the store lacks -> search
         -> (score with another model) -> judge, choose, write task by task -> report

    <output>/<task>.jsonl, <task>.toml         the mined data
    <output>/README.md, .png, README.tasks/    the report
    <output>/.mining/tasks/<task>.json         the record of a finished task
    <store>/model/, <store>/scorer/            vectors (vectors.py)
    <store>/model/neighbours/<key>/<depth>/    what a search found, by blocks of queries

Each phase leaves files that are complete or absent and skips what is there, so the same command
resumes after a kill, and another choice of negatives encodes nothing. Work is distributed to the
processes in pieces that do not depend on how many there are; they meet between phases.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TextIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from kalm_min.console import Progress, table
from kalm_min.data import TrainingData
from kalm_min.embedder import Embedder
from kalm_min.files import (
    atomic_write,
    checkpoint_folders,
    digest,
    hash_checkpoint,
    read_json,
    write_json,
    write_text,
)
from kalm_min.mining import report
from kalm_min.mining.rules import KEPT, Labels, Rules, Scores, Selection, pair_scores, select
from kalm_min.mining.texts import TextIndex, Texts, index_task, open_pool, reader
from kalm_min.topk import ApproximateIndex, Ints, Neighbours, Rows, merge, recall, top_k
from kalm_min.training import distributed
from kalm_min.vectors import (
    StoredVectors,
    TextSet,
    check_manifest,
    describe,
    read_array,
    unreadable,
    write_array,
)

_LAYOUT = 2  # raised when the same settings give another output
_RECALL_QUERIES = 256
_QUERIES = 8192  # per file of neighbours
_NEIGHBOUR = np.dtype([("id", np.int64), ("score", np.float32)])
_ROWS = 8192  # whose negatives are read at a time

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class MiningConfig(Rules):
    """Mine hard negatives."""

    model: Annotated[str, "Model that embeds: a folder or a hub id."]
    data: Annotated[Path, "Training data: a JSONL(.gz) file, or a folder of tasks."]
    output: Annotated[Path, "Folder of the mined data."]
    pool: Annotated[
        Path | None, 'JSONL(.gz) file of {"text"} to take negatives from; none: each task\'s texts.'
    ] = None
    instruction: Annotated[
        str | None, "Put before the queries of tasks and lines without an instruction."
    ] = None
    scorer: Annotated[
        str | None, "Model whose scores are written, for distillation; none: the mining model's."
    ] = None
    store: Annotated[Path | None, "Folder of the vectors; none: inside the output folder."] = None
    search: Annotated[Literal["torch", "faiss"], "Search library. Both find the same."] = "torch"
    index: Annotated[
        str | None, 'Approximate search with a faiss factory string: "IVF4096,Flat;nprobe=64".'
    ] = None
    max_length: Annotated[
        int | None, "Tokens kept of a text, instruction included; none: the model's own limit."
    ] = None
    device: Annotated[str | None, "cpu, cuda, ...; none: a GPU per process, else the CPU."] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        "What the model computes in; auto is bfloat16 where native, else float32.",
    ] = "auto"
    cache_dir: Annotated[Path | None, "Folder of the line indices; none: beside the data."] = None
    dry_run: Annotated[bool, "Print what there is to do, and do nothing."] = False


class _Store(NamedTuple):
    """The folder of a model's vectors."""

    folder: Path
    manifest: dict[str, object]

    def vectors(self, texts: Texts) -> StoredVectors:
        template, dimension = (self.manifest[x] for x in ("instruction_template", "dimension"))
        return StoredVectors(self.folder, texts.set(str(template)), int(str(dimension)))


@dataclass(frozen=True, slots=True)
class StoredNeighbours:
    """The `depth` nearest documents of `size` queries, in files of _QUERIES queries each.

    The folder's name is how many neighbours the files hold.
    """

    folder: Path
    size: int
    depth: int

    def missing(self) -> list[slice]:
        """The queries of each file that does not exist, or cannot be read."""
        starts = unreadable(range(0, self.size, _QUERIES), self._load)
        return [slice(start, min(start + _QUERIES, self.size)) for start in starts]

    def write(self, queries: slice, found: Neighbours) -> None:
        """Write one file."""
        pairs = np.empty(found.ids.shape, _NEIGHBOUR)
        pairs["id"], pairs["score"] = found
        write_array(self._path(queries.start), pairs)

    def read(self, numbers: Ints) -> tuple[Ints, Scores]:
        """(len(numbers), depth) ids, -1 for none, and scores of some queries."""
        pairs = np.empty((len(numbers), self.depth), _NEIGHBOUR)
        starts = numbers // _QUERIES * _QUERIES
        for start in np.unique(starts).tolist():
            is_here = starts == start
            pairs[is_here] = self._load(start)[numbers[is_here] - start, : self.depth]
        return np.ascontiguousarray(pairs["id"]), np.ascontiguousarray(pairs["score"])

    def _load(self, start: int) -> NDArray[np.void]:
        shape = (min(_QUERIES, self.size - start), int(self.folder.name))
        return read_array(self._path(start), shape, _NEIGHBOUR)

    def _path(self, start: int) -> Path:
        return self.folder / f"{start // _QUERIES:06d}.npy"


@dataclass(frozen=True, slots=True)
class _Task:
    """A task; of its queries, documents and corpus the texts, and the vectors, encoded or not.

    The documents are the positives, and the negatives where the task is its own corpus.
    """

    index: TextIndex
    texts: tuple[Texts, Texts, Texts]
    vectors: tuple[StoredVectors, StoredVectors, StoredVectors]


class Miner:
    """A run on one of its processes. Anything a person can mend is a ValueError of one sentence."""

    def __init__(self, config: MiningConfig, device: torch.device, stream: TextIO) -> None:
        """Open the data; `stream` shows progress."""
        self.config, self.device = config, device
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.stream = stream if self.rank == 0 else io.StringIO()
        self.work = config.output / ".mining"
        self.data, self.pool = distributed.rank_zero_first(self._open_data)
        self._pools: dict[tuple[str, ...], StoredVectors] = {}
        self.names = [_file_name(task) for task in self.data.task_names]
        self.made_with: dict[str, object] = {
            "layout": _LAYOUT,
            "rules": {field.name: getattr(config, field.name) for field in fields(Rules)},
            "index": config.index,
            "pool": self.pool and digest(self.pool.table["hash"].tobytes()),
        }

    def run(self) -> tuple[dict[str, int], list[str]]:
        """Mine every task that is not finished; sums over all rows, and what deserves a look."""
        config = self.config
        if self.rank == 0:  # temporary files of killed runs
            for folder in (config.output, *self.work.glob("**/")):
                for torn in folder.glob(".*.tmp"):
                    torn.unlink()
        distributed.barrier()
        for number in self._share(range(len(self.names)), "read", "tasks"):
            self._read(number).save(self._path("index", number, "npz"))
        distributed.barrier()
        scorer = None
        if config.scorer is not None:  # before the other, so that one model is held at a time
            scorer = self._open_model(config.scorer, "scorer")[1]
            self.made_with["scorer"] = scorer.manifest
        embedder, self.store = self._open_model(config.model, "model")
        self.made_with["model"] = self.store.manifest
        unfinished = [number for number in range(len(self.names)) if not self._is_finished(number)]
        # A label-based task draws its positives and negatives anew in every epoch: it is copied.
        todo = [number for number in unfinished if not self.data.settings[number].label_based]
        finished = len(self.names) - len(unfinished)
        self.stream.write(f"{finished} of {len(self.names)} tasks are finished\n")
        distributed.barrier()  # nobody writes before everybody has looked
        self._encode(todo, embedder, "encode", lambda number: self._task(number).vectors)
        self._search(todo)
        del embedder
        if scorer is not None and config.scorer is not None:
            embedder = self._open_model(config.scorer, "scorer")[0]
            self._encode(
                todo, embedder, "score", lambda number: self._scored(self._task(number), scorer)[0]
            )
        for number in self._share(unfinished, "write", "tasks"):
            self._write(number, scorer)
        distributed.barrier()
        records = [read_json(self._path("tasks", n, "json")) for n in range(len(self.names))]
        tasks = dict(zip(self.names, (record["summary"] for record in records), strict=True))
        if self.rank == 0:
            names = [field.name for field in fields(Rules)] + ["pool", "scorer", "index"]
            settings = {name: getattr(config, name) for name in names}
            report.write(config.output, tasks, self.store.manifest, settings)
            shutil.rmtree(self.work / "index", ignore_errors=True)
        return report.totals(tasks), report.remarks(tasks)

    def plan(self) -> str:
        """What a run would do, as a Markdown table; nothing is written.

        A task whose neighbours are all stored already shows how many rows the rules would keep.
        """
        self.store = self._open_model(self.config.model, "model")[1]
        head = ["task", "rows", "queries", "documents", "corpus", "to encode", "to search", "kept"]
        rows: list[list[str]] = []
        for number, name in enumerate(self.data.task_names):
            if self.data.settings[number].label_based:
                rows.append([name, f"{self.data.task_sizes[number]:,}", *["copied"] * 6])
                continue
            task = self._task(number)
            shards = {v.names[i]: v.characters(i) for v in task.vectors for i in v.missing()}
            blocks = len(self._neighbours(task).missing())
            kept = "" if shards or blocks else f"{(self._choose(task).status == KEPT).sum():,}"
            sizes = [f"{len(one):,}" for one in (task.index, *task.vectors)]
            work = [f"{sum(shards.values()) // 1000:,} kchar", f"{blocks} blocks", kept]
            rows.append([name, *sizes, *work])
        return table(head, rows, right=range(1, 8))

    # ---- phases ----------------------------------------------------------------------------------

    def _open_data(self) -> tuple[TrainingData, Texts | None]:
        """The data and the pool, checked, and the output folder, which must not hold anything else."""
        config = self.config
        data = TrainingData(
            config.data,
            instruction=config.instruction,
            cache_dir=config.cache_dir,
            progress=self.stream,
        )
        _check_output(config.output, config.data, map(_file_name, data.task_names))
        return data, config.pool and open_pool(config.pool, config.cache_dir)

    def _open_model(self, model: str, name: str) -> tuple[Embedder, _Store]:
        """A model and the store of its vectors."""
        config = self.config
        dtype = None if config.dtype == "auto" else config.dtype
        embedder = distributed.rank_zero_first(
            lambda: Embedder.from_pretrained(
                model, self.device, dtype, max_length=config.max_length
            )
        )
        is_first = self.rank == 0
        checkpoint = hash_checkpoint(*checkpoint_folders(model)) if is_first else ""
        manifest = describe(embedder, distributed.gather_objects(checkpoint)[0])
        folder = (config.store or self.work) / name
        distributed.rank_zero_first(
            lambda: check_manifest(folder, manifest, begin=not config.dry_run)
        )
        return embedder, _Store(folder, manifest)

    def _encode(
        self,
        todo: Iterable[int],
        embedder: Embedder,
        title: str,
        vectors_of: Callable[[int], tuple[StoredVectors, ...]],
    ) -> None:
        """Encode the shards that are missing; each process takes some."""
        wanted: dict[str, tuple[int, int, int]] = {}
        for number in todo:
            for part, vectors in enumerate(vectors_of(number)):
                for shard in vectors.missing():
                    wanted.setdefault(vectors.names[shard], (number, part, shard))
        distributed.barrier()  # nobody encodes before everybody has looked
        last, opened = -1, ()
        for number, part, shard in self._share(wanted.values(), title, "shards"):
            if number != last:
                last, opened = number, vectors_of(number)
            opened[part].encode(shard, embedder)
        distributed.barrier()

    def _search(self, todo: Iterable[int]) -> None:
        """Find the neighbours of every query that has none stored; each process searches its span."""
        config = self.config
        work = {n: blocks for n in todo if (blocks := self._neighbours(self._task(n)).missing())}
        distributed.barrier()
        total = sum(map(len, work.values()))
        with Progress(total, "blocks", self.stream, title="search") as progress:
            for number, blocks in work.items():
                task = self._task(number)
                all_queries, _, corpus = task.vectors
                stored = self._neighbours(task)
                k, n = stored.depth, len(corpus)
                span = n * self.rank // self.world, n * (self.rank + 1) // self.world
                find = partial(
                    top_k, documents=corpus, device=self.device, backend=config.search, span=span
                )
                if config.index is not None:
                    find = ApproximateIndex(corpus, config.index, span).top_k
                for block in blocks:
                    queries = all_queries[block]
                    found = merge(distributed.gather_objects(find(queries, k=k)), k)
                    if self.rank == 0:
                        self._measure_recall(stored, queries, corpus, found)
                        stored.write(block, found)
                    progress.update(1, self.data.task_names[number])
        distributed.barrier()

    def _measure_recall(
        self, stored: StoredNeighbours, queries: Rows, corpus: Rows, found: Neighbours
    ) -> None:
        """Keep the recall of an approximate index, measured on its first queries."""
        path = stored.folder / "recall.json"
        if self.config.index is not None and not path.exists():
            sample = queries[:_RECALL_QUERIES]
            exact = top_k(sample, corpus, stored.depth, device=self.device)
            part = Neighbours(found.ids[: len(sample)], found.scores[: len(sample)])
            write_json(path, {"recall": recall(part, exact), "queries": len(sample)})

    def _write(self, number: int, scorer: _Store | None) -> None:
        """Write all files of a task. Its record says that it is finished: it goes first and comes last."""
        name, output, data = self.names[number], self.config.output, self.config.data
        record, page = self._path("tasks", number, "json"), None
        if self.data.settings[number].label_based:
            index = self._index(number)
            rows = range(index.first, index.first + len(index))
            lines = (json.dumps(self.data.record(row), ensure_ascii=False) + "\n" for row in rows)
            summary = report.copied(len(index))
        else:
            task = self._task(number)
            index, corpus, selection = task.index, task.vectors[2].texts, self._choose(task)
            written = selection if scorer is None else self._rescored(task, selection, scorer)
            measured = self._neighbours(task).folder / "recall.json"
            summary = report.summarise(index, selection, len(task.vectors[2]))
            summary["recall"] = read_json(measured)["recall"] if measured.exists() else None
            page = report.examples(self.data, index, selection, corpus, summary)
            lines = _mined_lines(self.data, index, written, corpus)
        record.unlink(missing_ok=True)
        settings = (data if data.is_dir() else data.parent) / f"{self.data.task_names[number]}.toml"
        _write_task(output / f"{name}.jsonl", lines, settings)
        if page is not None:
            write_text(output / report.PAGES / f"{name}.md", f"# {name}\n\n{page}")
        write_json(record, {"made_with": self._made_with(index, number), "summary": summary})

    # ---- what the phases share -------------------------------------------------------------------

    def _read(self, number: int) -> TextIndex:
        return index_task(self.data, number, with_negatives=self.pool is None)

    def _index(self, number: int) -> TextIndex:
        """As it was read when the run began; a dry run, which writes nothing, reads it now."""
        if self.config.dry_run:
            return self._read(number)
        return TextIndex.load(self._path("index", number, "npz"))

    def _task(self, number: int) -> _Task:
        index, read = self._index(number), reader(self.data)
        queries = Texts(index.queries, index.instructions, read)
        documents = Texts(index.documents, index.instructions, read)
        vectors = self.store.vectors(queries), self.store.vectors(documents)
        if self.pool is None:
            return _Task(index, (queries, documents, documents), (*vectors, vectors[1]))
        settings, instruction = self.data.settings[number], self.config.instruction
        if settings.instruction is not None:
            instruction = settings.instruction
        pool = self.pool._replace(instructions=(instruction or "" if settings.symmetric else "",))
        if pool.instructions not in self._pools:
            self._pools[pool.instructions] = self.store.vectors(pool)
        corpus = self._pools[pool.instructions]
        return _Task(index, (queries, documents, pool), (*vectors, corpus))

    def _neighbours(self, task: _Task) -> StoredNeighbours:
        """The stored lists of a task, long enough for the rules.

        A longer list that is stored already is taken: it begins with the shorter one. (Those of an
        approximate index may not.)
        """
        config, (queries, _, corpus) = self.config, task.vectors
        labelled = Labels(task.index).max_per_query
        # Labelled answers take positions in the list; more than this of them (a class) may shorten it.
        depth = min(config.depth + min(labelled, config.depth + 100), len(corpus))
        key = digest(queries.key, corpus.key, str(config.index))[:32]
        folder = self.store.folder / "neighbours" / key
        stored = sorted(int(entry.name) for entry in folder.glob("*") if entry.name.isdigit())
        for longer in stored if config.index is None else ():
            found = StoredNeighbours(folder / str(longer), len(queries), depth)
            if longer >= depth and not found.missing():
                return found
        return StoredNeighbours(folder / str(depth), len(queries), depth)

    def _choose(self, task: _Task) -> Selection:
        queries, documents, corpus = task.vectors
        read = self._neighbours(task).read
        return select(task.index, corpus.texts.hashes, queries, documents, read, self.config)

    def _scored(
        self, task: _Task, scorer: _Store
    ) -> tuple[tuple[StoredVectors, ...], tuple[Ints, ...]]:
        """The scorer's vectors of the queries, positives and negatives that are written, each once.

        And the number of each pair's text among them: the pairs with positives, then those with
        negatives.
        """
        index, selection = task.index, self._choose(task)
        of_positives, rows, of_negatives, more_rows = selection.pairs(index)
        numbers = (
            index.row_query[np.concatenate([rows, more_rows])],
            index.positives[of_positives],
            selection.negatives[of_negatives],
        )
        unique, inverse = zip(
            *(np.unique(one, return_inverse=True) for one in numbers), strict=True
        )
        texts = zip(task.texts, unique, strict=True)
        return tuple(scorer.vectors(one.take(taken)) for one, taken in texts), inverse

    def _rescored(self, task: _Task, selection: Selection, scorer: _Store) -> Selection:
        """The same selection with the scorer's scores."""
        (queries, positives, negatives), (asking, answers, others) = self._scored(task, scorer)
        split = len(answers)
        return selection.with_scores(
            task.index,
            pair_scores(queries, asking[:split], positives, answers),
            pair_scores(queries, asking[split:], negatives, others),
        )

    def _is_finished(self, number: int) -> bool:
        """Whether the output of a task exists, made from these rows with these settings."""
        path = self._path("tasks", number, "json")
        if not path.is_file():
            return False
        record = read_json(path)
        made_with = json.loads(json.dumps(self._made_with(self._index(number), number)))
        is_written = (self.config.output / f"{self.names[number]}.jsonl").is_file()
        return record["made_with"] == made_with and is_written == (record["summary"]["kept"] > 0)

    def _made_with(self, index: TextIndex, number: int) -> dict[str, object]:
        """All that a task's output depends on."""
        settings = asdict(self.data.settings[number])
        return self.made_with | {"data": index.fingerprint, "settings": settings}

    def _path(self, folder: str, number: int, suffix: str) -> Path:
        return self.work / folder / f"{self.names[number]}.{suffix}"

    def _share(self, items: Iterable[T], title: str, unit: str) -> Iterator[T]:
        """This process's share of some work. The first process shows its own; the others' are as large."""
        share = list(items)[self.rank :: self.world]
        with Progress(len(share), unit, self.stream, title=title) as progress:
            for item in share:
                yield item
                progress.update(1)


# ---- the mined folder ----------------------------------------------------------------------------


def _file_name(task: str) -> str:
    """A name that a file may have, and that reading the folder again does not skip."""
    name = task.replace("/", "%2F")
    return f"%2E{name[1:]}" if name.startswith(".") else name.replace("README", "%52EADME")


def _check_output(output: Path, data: Path, names: Iterable[str]) -> None:
    """Refuse an output folder with data in it that this run would not replace, or its own input."""
    if output.resolve() in {data.resolve(), data.resolve().parent}:
        raise ValueError(f"{output}: expected another folder than that of the data")
    expected = {f"{name}{suffix}" for name in names for suffix in (".jsonl", ".toml")}
    for entry in sorted(output.iterdir()) if output.exists() else ():
        if entry.name.startswith((".", "README")):
            continue
        if entry.name not in expected or not (output / ".mining").is_dir():
            raise ValueError(
                f"{output}: expected an empty folder or one that this data was mined into, "
                f"found {entry.name}"
            )


def _write_task(path: Path, lines: Iterator[str], settings: Path) -> None:
    """Write the file of a task, and its settings beside it; neither, if there is no line."""
    first = next(lines, None)
    copy = path.with_suffix(".toml")
    if first is None:  # An empty file is no task.
        path.unlink(missing_ok=True)
    else:
        with atomic_write(path, "w") as file:
            file.write(first)
            file.writelines(lines)
    if first is None or not settings.is_file():
        copy.unlink(missing_ok=True)
    else:
        write_text(copy, settings.read_text(encoding="utf-8"))


def _mined_lines(
    data: TrainingData, index: TextIndex, selection: Selection, corpus: TextSet
) -> Iterator[str]:
    """The kept rows as they are, with their new negatives and scores."""
    kept = np.flatnonzero(selection.status == KEPT)
    for start in range(0, len(kept), _ROWS):
        rows = kept[start : start + _ROWS]
        needed = np.unique(selection.negatives[rows]).tolist()  # read once, in order
        texts = {number: corpus.read(number, number + 1)[0] for number in needed if number >= 0}
        for row in rows.tolist():
            record = data.record(index.first + row)
            is_found = selection.negatives[row] >= 0
            positives = slice(*index.starts[row : row + 2])
            mined = {
                "query": record["query"],
                "pos": record["pos"],
                "pos_scores": _rounded(selection.positive_scores[positives]),
                "neg": [texts[number] for number in selection.negatives[row][is_found].tolist()],
                "neg_scores": _rounded(selection.negative_scores[row][is_found]),
            }
            rest = {key: value for key, value in record.items() if key not in mined}
            yield json.dumps(mined | rest, ensure_ascii=False) + "\n"


def _rounded(scores: Scores) -> list[float]:
    """Scores with the digits that float32 vectors justify."""
    return [round(score, 6) for score in scores.tolist()]
