"""From a training folder and a model to the same folder with mined negatives.

A run indexes the texts of every task, encodes what the store lacks, searches, filters rows, chooses
negatives, writes task by task, and reports. Beside the data, <output>/.mining/tasks/ holds a record
per finished task; the store holds vectors (vectors.py) and neighbours (neighbours/<key>/<depth>/).

Each phase leaves files that are complete or absent and skips what exists, so the same command
resumes after a kill, and another choice of negatives encodes nothing. Work is distributed to the
processes in pieces that do not depend on their number; they wait for one another between phases.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, TextIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from kalm_min import files, vectors
from kalm_min.console import Progress, table
from kalm_min.data import TrainingData
from kalm_min.embedder import Embedder
from kalm_min.files import (
    atomic_write,
    digest,
    escape_name,
    read_json,
    read_text,
    write_json,
    write_text,
)
from kalm_min.mining import report
from kalm_min.mining.rules import KEPT, Bools, Scores, Selection, pair_scores, select
from kalm_min.mining.texts import TextIndex, index_task, open_pool, text_sets
from kalm_min.options import MiningConfig, Rules
from kalm_min.settings import fill_template
from kalm_min.topk import Ints, Neighbours, approximate_index, merge, recall, top_k
from kalm_min.training import distributed
from kalm_min.vectors import StoredVectors, TextSet

_LAYOUT = 2  # rises when the same settings give another output
_RECALL_QUERIES = 256
_QUERIES = 8192  # per file of neighbours
_NEIGHBOUR = np.dtype([("id", np.int64), ("score", np.float32)])
_ROWS = 8192  # whose negatives are read at a time

T = TypeVar("T")


class StoredNeighbours(NamedTuple):
    """The `depth` nearest documents of `size` queries, in files of _QUERIES queries each."""

    folder: Path  # its name is the number of neighbours per query in the files
    size: int
    depth: int

    def missing(self) -> list[slice]:
        """The queries of each file that does not exist or cannot be read."""
        starts = vectors.unreadable(range(0, self.size, _QUERIES), self._load)
        return [slice(start, min(start + _QUERIES, self.size)) for start in starts]

    def write(self, queries: slice, found: Neighbours) -> None:
        """Write one file."""
        pairs = np.empty(found.ids.shape, _NEIGHBOUR)
        pairs["id"], pairs["score"] = found
        vectors.write_array(self._path(queries.start), pairs)

    def read(self, numbers: Ints) -> tuple[Ints, Scores]:
        """(len(numbers), depth) ids (-1 for none) and scores of some queries."""
        pairs = np.empty((len(numbers), self.depth), _NEIGHBOUR)
        starts = numbers // _QUERIES * _QUERIES
        for start in np.unique(starts).tolist():
            chosen = starts == start
            pairs[chosen] = self._load(start)[numbers[chosen] - start, : self.depth]
        return np.ascontiguousarray(pairs["id"]), np.ascontiguousarray(pairs["score"])

    def _load(self, start: int) -> NDArray[np.void]:
        shape = (min(_QUERIES, self.size - start), int(self.folder.name))
        return vectors.read_array(self._path(start), shape, _NEIGHBOUR)

    def _path(self, start: int) -> Path:
        return self.folder / f"{start // _QUERIES:06d}.npy"


class _Task(NamedTuple):
    """A task. Its documents are the positives and, if it is its own corpus, the negatives."""

    text_index: TextIndex
    texts: list[TextSet]  # of queries, documents and corpus, with plain instructions as prompts
    vectors: list[StoredVectors]  # the same texts, encoded or not


class Miner:
    """A run on one of its processes. ValueErrors report in one sentence what a user can correct."""

    def __init__(self, config: MiningConfig, device: torch.device, stream: TextIO) -> None:
        """Open the data; `stream` shows progress."""
        self.config, self.device = config, device
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.stream = stream if self.rank == 0 else io.StringIO()
        self.work = config.output / ".mining"
        self.store = config.store or self.work
        self.data, self.pool = distributed.rank_zero_first(self._open_data)
        self.names = [escape_name(task) for task in self.data.task_names]
        self.made_with: dict[str, object] = {
            "layout": _LAYOUT,
            "rules": {field.name: getattr(config, field.name) for field in fields(Rules)},
            "index": config.index,
            "pool": self.pool and digest(self.pool.hashes.tobytes()),
        }
        self.manifests: dict[str, dict[str, object]] = {}  # of "scorer" and "model"
        self._task = lru_cache(maxsize=1)(self._open_task)

    def run(self) -> tuple[dict[str, int], list[str]]:
        """Mine every unfinished task; return totals over all rows, and remarks."""
        config, everything = self.config, range(len(self.names))
        if self.rank == 0:  # temporary files of killed runs
            for folder in (config.output, *self.work.glob("**/")):
                for torn in folder.glob(".*.tmp"):
                    torn.unlink()
        distributed.barrier()
        for number in self._share(everything, "read", "tasks"):
            self._read(number).save(self._path("index", number, "npz"))
        distributed.barrier()
        if config.scorer is not None:  # first, so that only one model is in memory at a time
            self._open_model(config.scorer, "scorer")
        embedder = self._open_model(config.model, "model")
        unfinished = [number for number in everything if not self._is_finished(number)]
        # A label-based task draws its positives and negatives anew in every epoch: it is copied.
        todo = [number for number in unfinished if not self.data.settings[number].label_based]
        finished = len(self.names) - len(unfinished)
        self.stream.write(f"{finished} of {len(self.names)} tasks are finished\n")
        distributed.barrier()  # no process writes before all have looked
        self._encode(todo, embedder, "encode", lambda number: self._task(number).vectors)
        self._search(todo)
        del embedder
        if config.scorer is not None:
            embedder = self._open_model(config.scorer, "scorer")
            self._encode(todo, embedder, "score", lambda n: self._to_score(n, self._choose(n))[0])
        for number in self._share(unfinished, "write", "tasks"):
            self._write(number)
        distributed.barrier()
        records = [read_json(self._path("tasks", number, "json")) for number in everything]
        tasks = {name: one["summary"] for name, one in zip(self.names, records, strict=True)}
        if self.rank == 0:
            names = [field.name for field in fields(Rules)] + ["pool", "scorer", "index"]
            settings = {name: getattr(config, name) for name in names}
            report.write(config.output, tasks, self.manifests["model"], settings)
            shutil.rmtree(self.work / "index", ignore_errors=True)
        return report.totals(tasks), report.remarks(tasks)

    def plan(self) -> str:
        """What a run would do, as a Markdown table, without writing anything.

        A task whose neighbours are all stored already shows how many rows the rules would keep.
        """
        self._open_model(self.config.model, "model")
        head = ["task", "rows", "queries", "documents", "corpus", "to encode", "to search", "kept"]
        rows: list[list[str]] = []
        for number, name in enumerate(self.data.task_names):
            if self.data.settings[number].label_based:
                rows.append([name, f"{self.data.task_sizes[number]:,}", *["copied"] * 6])
                continue
            task, kept = self._task(number), ""
            characters = {
                one.names[i]: int(one.texts.sizes[slice(*one.cuts[i : i + 2])].sum())
                for one in task.vectors
                for i in one.missing()
            }
            blocks = len(self._neighbours(number).missing())
            if not characters and not blocks:
                kept = f"{(self._choose(number).status == KEPT).sum():,}"
            sizes = [f"{len(one):,}" for one in (task.text_index, *task.vectors)]
            work = f"{sum(characters.values()) // 1000:,} kchar", f"{blocks} blocks"
            rows.append([name, *sizes, *work, kept])
        return table(head, rows, right=range(1, 8))

    def _open_data(self) -> tuple[TrainingData, TextSet | None]:
        """Open and check the data, the pool and the output folder."""
        config = self.config
        data = TrainingData(
            config.data,
            instruction=config.instruction,
            cache_dir=config.cache_dir,
            progress=self.stream,
        )
        _check_output(config.output, config.data, map(escape_name, data.task_names))
        return data, config.pool and open_pool(config.pool, config.cache_dir)

    def _open_model(self, model: str, name: str) -> Embedder:
        """Open a model; keep its manifest and check it against the folder of its vectors."""
        config = self.config
        dtype = None if config.dtype == "auto" else config.dtype
        load = partial(Embedder.from_pretrained, model, self.device, dtype)
        embedder = distributed.rank_zero_first(partial(load, max_length=config.max_length))
        folders = files.checkpoint_folders(model)
        checkpoint = files.hash_checkpoint(*folders) if self.rank == 0 else ""
        manifest = vectors.describe(embedder, distributed.gather_objects(checkpoint)[0])
        check = partial(vectors.check_manifest, self.store / name, manifest)
        distributed.rank_zero_first(partial(check, begin=not config.dry_run))
        self.manifests[name] = manifest
        return embedder

    def _encode(
        self,
        todo: Iterable[int],
        embedder: Embedder,
        title: str,
        vectors_of: Callable[[int], list[StoredVectors]],
    ) -> None:
        """Encode the missing shards, which are shared among the processes."""
        wanted: dict[str, tuple[int, int, int]] = {}
        for number in todo:
            for part, stored in enumerate(vectors_of(number)):
                for shard in stored.missing():
                    wanted.setdefault(stored.names[shard], (number, part, shard))
        distributed.barrier()  # no process encodes before all have looked
        opened = lru_cache(maxsize=1)(vectors_of)
        for number, part, shard in self._share(wanted.values(), title, "shards"):
            opened(number)[part].encode(shard, embedder)
        distributed.barrier()

    def _search(self, todo: Iterable[int]) -> None:
        """Find the neighbours of queries without stored ones; each process searches its span."""
        config, device = self.config, self.device
        work = {number: self._neighbours(number).missing() for number in todo}
        distributed.barrier()
        total = sum(map(len, work.values()))
        with Progress(total, "blocks", self.stream, title="search") as progress:
            for number in filter(work.get, work):
                all_queries, _, corpus = self._task(number).vectors
                stored, n = self._neighbours(number), len(corpus)
                measured = stored.folder / "recall.json"
                span = n * self.rank // self.world, n * (self.rank + 1) // self.world
                find = partial(top_k, documents=corpus, k=stored.depth, device=device)
                index = None
                if config.index is not None:
                    index = approximate_index(corpus, config.index, span)
                for block in work[number]:
                    queries = all_queries[block]
                    part = find(queries, backend=config.search, span=span, index=index)
                    found = merge(distributed.gather_objects(part), stored.depth)
                    if self.rank == 0 and index is not None and not measured.exists():
                        exact = find(queries[:_RECALL_QUERIES]).ids
                        share = recall(found.ids[: len(exact)], exact)
                        write_json(measured, {"recall": share, "queries": len(exact)})
                    if self.rank == 0:
                        stored.write(block, found)
                    progress.update(1, self.data.task_names[number])
        distributed.barrier()

    def _write(self, number: int) -> None:
        """Write all files of a task; its record, the mark of the end, is deleted first, written last."""
        output, data = self.config.output, self.config.data
        name, record, page = self.names[number], self._path("tasks", number, "json"), None
        if self.data.settings[number].label_based:
            index = self._index(number)
            rows = range(index.first, index.first + len(index))
            lines = (json.dumps(self.data.record(row), ensure_ascii=False) + "\n" for row in rows)
            summary = report.copied(len(index))
        else:
            index, (_, _, corpus), _ = self._task(number)
            selection = self._choose(number)
            summary = report.summarise(index, selection, len(corpus.hashes))
            measured = self._neighbours(number).folder / "recall.json"
            summary["recall"] = read_json(measured)["recall"] if measured.exists() else None
            page = report.examples(self.data, index, selection, corpus, summary)
            if self.config.scorer is not None:
                (queries, *others), pairs, masks = self._to_score(number, selection)
                scores = selection.positive_scores, selection.negative_scores
                for i, mask in enumerate(masks):
                    scores[i][mask] = pair_scores(queries, pairs[i][0], others[i], pairs[i][1])
            lines = _mined_lines(self.data, index, selection, corpus)
        record.unlink(missing_ok=True)
        path, settings = output / f"{name}.jsonl", output / f"{name}.toml"
        source = (data if data.is_dir() else data.parent) / f"{name}.toml"
        if summary["kept"]:
            with atomic_write(path, "w") as file:
                file.writelines(lines)
        else:
            path.unlink(missing_ok=True)  # an empty file is not a task
        if summary["kept"] and source.is_file():
            write_text(settings, read_text(source))
        else:
            settings.unlink(missing_ok=True)
        if page is not None:
            write_text(output / report.PAGES / f"{name}.md", f"# {name}\n\n{page}")
        write_json(record, {"made_with": self._made_with(number, index), "summary": summary})

    def _read(self, number: int) -> TextIndex:
        return index_task(self.data, number, with_negatives=self.pool is None)

    def _index(self, number: int) -> TextIndex:
        """The index read when the run began; a dry run, which writes nothing, reads it now."""
        if self.config.dry_run:
            return self._read(number)
        return TextIndex.load(self._path("index", number, "npz"))

    def _open_task(self, number: int) -> _Task:
        index = self._index(number)
        queries, documents = text_sets(self.data, index)
        corpus, settings = documents, self.data.settings[number]
        if self.pool is not None:
            instruction = settings.instruction
            if instruction is None:
                instruction = self.config.instruction or ""
            corpus = replace(self.pool, prompts=(instruction if settings.symmetric else "",))
        texts = [queries, documents, corpus]
        return _Task(index, texts, [self._vectors(one) for one in texts])

    def _vectors(self, texts: TextSet, name: str = "model") -> StoredVectors:
        """The vectors of texts by the model or the scorer, with instructions in its template."""
        template = str(self.manifests[name]["instruction_template"])
        dimension = int(str(self.manifests[name]["dimension"]))
        prompts = tuple(fill_template(template, x) for x in texts.prompts)
        return StoredVectors(self.store / name, replace(texts, prompts=prompts), dimension)

    def _neighbours(self, number: int) -> StoredNeighbours:
        """The stored lists of a task, long enough for the rules.

        A longer stored list is used, since it begins with the shorter one. (Those of an approximate
        index may not.)
        """
        config, (index, _, (queries, _, corpus)) = self.config, self._task(number)
        # Labelled answers take positions in the list; more than these (a class) may shorten it.
        hashes = np.repeat(index.queries["hash"][index.row_query], np.diff(index.starts))
        labelled = int(np.unique(hashes, return_counts=True)[1].max()) + 1
        depth = min(config.depth + min(labelled, config.depth + 100), len(corpus))
        key = digest(queries.key, corpus.key, str(config.index))[:32]
        folder = self.store / "model" / "neighbours" / key
        stored = sorted(int(entry.name) for entry in folder.glob("*") if entry.name.isdigit())
        for longer in stored if config.index is None else ():
            found = StoredNeighbours(folder / str(longer), len(queries), depth)
            if longer >= depth and not found.missing():
                return found
        return StoredNeighbours(folder / str(depth), len(queries), depth)

    def _choose(self, number: int) -> Selection:
        index, texts, (queries, documents, _) = self._task(number)
        read = self._neighbours(number).read
        return select(index, texts[2].hashes, queries, documents, read, self.config)

    def _to_score(
        self, number: int, selection: Selection
    ) -> tuple[list[StoredVectors], list[tuple[Ints, Ints]], list[Bools]]:
        """The pairs for the scorer: queries with positives, and with negatives.

        Returns its vectors of the queries, positives and negatives that are written, each once; the
        two that form each pair; and where the scores of the pairs belong in the selection.
        """
        index, texts, _ = self._task(number)
        kept = selection.status == KEPT
        row_of = np.repeat(np.arange(len(index)), np.diff(index.starts))  # (P,)
        masks = [kept[row_of], kept[:, None] & (selection.negatives >= 0)]  # (P,), (R, n)
        rows = np.concatenate([row_of[masks[0]], masks[1].nonzero()[0]])
        numbers = index.row_query[rows], index.positives[masks[0]], selection.negatives[masks[1]]
        unique = [np.unique(one) for one in numbers]
        queries, *others = map(np.searchsorted, unique, numbers)
        pairs = list(zip(np.split(queries, [len(others[0])]), others, strict=True))
        taken = zip(texts, unique, strict=True)
        return [self._vectors(text.take(some), "scorer") for text, some in taken], pairs, masks

    def _is_finished(self, number: int) -> bool:
        """Whether the output of a task exists, made from these rows with these settings."""
        path = self._path("tasks", number, "json")
        if not path.is_file():
            return False
        record = read_json(path)
        made_with = json.loads(json.dumps(self._made_with(number, self._index(number))))
        is_written = (self.config.output / f"{self.names[number]}.jsonl").is_file()
        return record["made_with"] == made_with and is_written == (record["summary"]["kept"] > 0)

    def _made_with(self, number: int, index: TextIndex) -> dict[str, object]:
        """Everything on which a task's output depends."""
        task = {"data": index.fingerprint, "settings": asdict(self.data.settings[number])}
        return self.made_with | self.manifests | task

    def _path(self, folder: str, number: int, suffix: str) -> Path:
        return self.work / folder / f"{self.names[number]}.{suffix}"

    def _share(self, items: Iterable[T], title: str, unit: str) -> Iterator[T]:
        """This process's share of some work; the first process shows its progress."""
        share = list(items)[self.rank :: self.world]
        with Progress(len(share), unit, self.stream, title=title) as progress:
            for item in share:
                yield item
                progress.update(1)


def _check_output(output: Path, data: Path, names: Iterable[str]) -> None:
    """Raise ValueError for a folder with data that this run would not replace, or its own input."""
    if output.resolve() in {data.resolve(), data.resolve().parent}:
        raise ValueError(f"{output}: expected another folder than that of the data")
    expected = {f"{name}{suffix}" for name in names for suffix in (".jsonl", ".toml")}
    if not (output / ".mining").is_dir():
        expected = set()
    for entry in sorted(output.iterdir()) if output.exists() else ():
        if not entry.name.startswith((".", "README")) and entry.name not in expected:
            raise ValueError(
                f"{output}: expected an empty folder or one that this data was mined into, "
                f"found {entry.name}"
            )


def _mined_lines(
    data: TrainingData, index: TextIndex, selection: Selection, corpus: TextSet
) -> Iterator[str]:
    """The kept rows with their new negatives and scores, otherwise unchanged."""

    def rounded(scores: Scores) -> list[float]:  # to the digits that float32 vectors justify
        return [round(score, 6) for score in scores.tolist()]

    kept = np.flatnonzero(selection.status == KEPT)
    for start in range(0, len(kept), _ROWS):
        rows = kept[start : start + _ROWS]
        needed = np.unique(selection.negatives[rows]).tolist()  # read once, in order
        texts = {number: corpus.read(number, number + 1)[0] for number in needed if number >= 0}
        for row in rows.tolist():
            record, chosen = data.record(index.first + row), selection.negatives[row] >= 0
            positives = slice(*index.starts[row : row + 2])
            mined = {
                "query": record["query"],
                "pos": record["pos"],
                "pos_scores": rounded(selection.positive_scores[positives]),
                "neg": [texts[number] for number in selection.negatives[row, chosen].tolist()],
                "neg_scores": rounded(selection.negative_scores[row, chosen]),
            }
            rest = {key: value for key, value in record.items() if key not in mined}
            yield json.dumps(mined | rest, ensure_ascii=False) + "\n"
