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
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple, TextIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from kalm_min import files, topk, vectors
from kalm_min.console import Progress, table
from kalm_min.data import TrainingData
from kalm_min.embedder import Embedder
from kalm_min.files import atomic_write, digest, read_json, write_json, write_text
from kalm_min.mining import report
from kalm_min.mining.rules import KEPT, Known, Labels, Scores, Selection, pair_scores, select
from kalm_min.mining.texts import Bools, TextIndex, index_task, open_pool, text_sets
from kalm_min.options import MiningConfig, Rules
from kalm_min.settings import fill_template
from kalm_min.topk import Ints, top_k
from kalm_min.training import distributed
from kalm_min.vectors import StoredRows, StoredVectors, TextSet

_LAYOUT = 3  # rises when the same settings give another output
_RECALL_QUERIES = 256
_QUERIES = 8192  # per file of neighbours, and
_LISTED = 1 << 22  # neighbours per file at most
_NEIGHBOUR = np.dtype([("id", np.int64), ("score", np.float32)])
_ROWS = 8192  # whose negatives are read at a time

T = TypeVar("T")
# Scores, where they belong, and both sides of each pair: vectors, and numbers of their rows.
_Scored = tuple[Scores, Bools, tuple[StoredVectors, Ints], tuple[StoredVectors, Ints]]


def stored_neighbours(folder: Path, size: int) -> StoredRows:
    """The neighbours of `size` queries, as many of each as the folder's name says."""
    width = int(folder.name)
    step = max(1, min(_QUERIES, _LISTED // width))
    names = [f"{number:06d}.npy" for number in range(-(-size // step))]
    return StoredRows(folder, names, np.append(np.arange(0, size, step), size), width, _NEIGHBOUR)


def as_pairs(found: topk.Neighbours) -> NDArray[np.void]:
    """(Q, k) neighbours as they are stored."""
    pairs = np.empty(found.ids.shape, _NEIGHBOUR)
    pairs["id"], pairs["score"] = found
    return pairs


class _Task(NamedTuple):
    """A task. Its documents are the positives and, if it is its own corpus, the negatives."""

    text_index: TextIndex
    texts: list[TextSet]  # of queries, documents and corpus, with plain instructions as prompts
    vectors: list[StoredVectors]  # the same texts, encoded or not
    corpus: Ints  # keys of the corpus
    known: Known


class Miner:
    """A run on one of its processes. ValueErrors report in one sentence what a user can correct."""

    def __init__(self, config: MiningConfig, device: torch.device, stream: TextIO) -> None:
        """Open the data; `stream` shows progress."""
        self.config, self.device = config, device
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.stream = stream if self.rank == 0 else io.StringIO()
        self.work = config.output / ".mining"
        self.store = config.store or self.work
        if config.index is not None or config.search == "faiss":
            topk.import_faiss()  # or fail now
        self.data, self.pool, self.pool_keys = distributed.rank_zero_first(self._open_data)
        self.names = [files.escape_name(task) for task in self.data.task_names]
        self.made_with: dict[str, object] = {
            "layout": _LAYOUT,
            "rules": {field.name: getattr(config, field.name) for field in fields(Rules)},
            "index": config.index,
            "pool": self.pool and digest(self.pool.hashes.tobytes()),
        }
        self.manifests: dict[str, dict[str, object]] = {}  # of "scorer" and "model"
        self._task = lru_cache(maxsize=1)(self._open_task)
        self._choose = lru_cache(maxsize=1)(self._select)

    def run(self) -> tuple[dict[str, int], list[str]]:
        """Mine every unfinished task; return totals over all rows, and remarks."""
        config, everything = self.config, range(len(self.names))
        if self.rank == 0:  # temporary files of killed runs
            for torn in config.output.rglob(".*.tmp"):
                torn.unlink()
        distributed.barrier()

        def read(number: int) -> None:
            self._read(number).save(self._path("index", number, "npz"))

        self._each(read, everything, "read", "tasks")
        if config.scorer is not None:  # first, so that only one model is in memory at a time
            self._open_model(config.scorer, "scorer")
        embedder = self._open_model(config.model, "model")
        if config.index is not None:  # a wrong one fails now
            topk.approximate_index(np.empty((0, embedder.dimension), np.float32), config.index)
        looked = [n for n in everything[self.rank :: self.world] if self._is_finished(n)]
        finished = {number for some in distributed.gather_objects(looked) for number in some}
        unfinished = [number for number in everything if number not in finished]
        # A label-based task draws its positives and negatives anew in every epoch: it is copied.
        todo = [number for number in unfinished if not self.data.settings[number].label_based]
        self.stream.write(f"{len(finished)} of {len(everything)} tasks are finished\n")
        self._encode(todo, embedder, "encode", lambda number: self._task(number).vectors)
        self._search(todo)
        del embedder
        if config.scorer is not None:
            embedder = self._open_model(config.scorer, "scorer")

            def to_score(number: int) -> list[StoredVectors]:
                return [one for _, _, *sides in self._to_score(number) for one, _ in sides]

            self._encode(todo, embedder, "score", to_score)
        self._each(self._write, unfinished, "write", "tasks")
        records = [read_json(self._path("tasks", number, "json")) for number in everything]
        summaries = (record["summary"] for record in records)
        tasks = dict(zip(self.data.task_names, summaries, strict=True))
        if self.rank == 0:
            names = [*(field.name for field in fields(Rules)), "pool", "scorer", "index"]
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
            blocks = len(self._neighbours(number)[0].missing())
            if not characters and not blocks:
                kept = f"{(self._choose(number).status == KEPT).sum():,}"
            sizes = [f"{len(one):,}" for one in (task.text_index, *task.vectors)]
            work = f"{sum(characters.values()) // 1000:,} kchar", f"{blocks} blocks"
            rows.append([name, *sizes, *work, kept])
        return table(head, rows, right=range(1, 8))

    def _open_data(self) -> tuple[TrainingData, TextSet | None, Ints]:
        """Open and check the data, the pool and the output folder."""
        config = self.config
        data = TrainingData(
            config.data,
            instruction=config.instruction,
            cache_dir=config.cache_dir,
            progress=self.stream,
        )
        _check_output(config.output, config.data, map(files.escape_name, data.task_names))
        if config.pool is None:
            return data, None, np.empty(0, np.int64)
        return data, *open_pool(config.pool, config.cache_dir)

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

        def encode(shard: tuple[int, int, int]) -> None:
            opened(shard[0])[shard[1]].encode(shard[2], embedder)

        self._each(encode, wanted.values(), title, "shards")

    def _search(self, todo: Iterable[int]) -> None:
        """Find the neighbours of queries without stored ones; each process searches its span."""
        work = {number: self._neighbours(number)[0].missing() for number in todo}
        distributed.barrier()
        total = sum(map(len, work.values()))
        with Progress(total, "blocks", self.stream, title="search") as progress:
            for number in filter(work.get, work):
                queries, _, corpus = self._task(number).vectors
                (stored, depth), n = self._neighbours(number), len(corpus)
                span = n * self.rank // self.world, n * (self.rank + 1) // self.world
                find = partial(top_k, documents=corpus, k=depth, device=self.device)
                index = None
                if self.config.index is not None:
                    with suppress(ValueError):  # too few texts to train it: an exact search
                        index = topk.approximate_index(corpus, self.config.index, span)
                for block in work[number]:
                    asked = queries[slice(*stored.cuts[block : block + 2])]
                    part = find(asked, backend=self.config.search, span=span, index=index)
                    found = topk.merge(distributed.gather_objects(part), depth)
                    if self.rank == 0:
                        stored.write(block, as_pairs(found))
                    progress.update(1, self.data.task_names[number])
        distributed.barrier()

    def _write(self, number: int) -> None:
        """Write all files of a task; its record, the mark of the end, is deleted first, written last."""
        name, data, page = self.names[number], self.config.data, ""
        if self.data.settings[number].label_based:
            index = self._index(number)
            rows = range(index.first, index.first + len(index))
            lines = (json.dumps(self.data.record(row), ensure_ascii=False) + "\n" for row in rows)
            summary = report.copied(len(index))
        else:
            index, (_, documents, corpus), (queries, _, found), *_ = self._task(number)
            selection = self._choose(number)
            summary = report.summarise(index, selection, len(corpus.hashes), self.config)
            if self.config.index is not None:
                (stored, depth), some = self._neighbours(number), slice(0, _RECALL_QUERIES)
                exact = top_k(queries[some], found, depth, device=self.device).ids
                summary["recall"] = topk.recall(stored[some][:, :depth]["id"], exact)
            page = f"# {report.escaped(name)}\n\n"
            page += report.examples(self.data, index, selection, corpus, summary)
            for scores, mask, *sides in self._to_score(number) if self.config.scorer else ():
                scores[mask] = pair_scores(*sides[0], *sides[1])
            lines = _mined_lines(self.data, index, selection, documents, corpus)
        source = (data if data.is_dir() else data.parent) / f"{name}.toml"
        record, (path, *others) = self._path("tasks", number, "json"), self._outputs(number)
        record.unlink(missing_ok=True)
        if summary["kept"]:
            with atomic_write(path, "w") as file:
                file.writelines(lines)
        else:
            path.unlink(missing_ok=True)  # an empty file is not a task
        settings = files.read_text(source) if summary["kept"] and source.is_file() else ""
        for path, text in zip(others, (settings, page), strict=True):
            if text:
                write_text(path, text)
            else:
                path.unlink(missing_ok=True)
        made_with = self._made_with(number)
        seal = self._seal(number, made_with, summary)
        write_json(record, {"made_with": made_with, "summary": summary, "seal": seal})

    def _outputs(self, number: int) -> list[Path]:
        """The files of a task: rows, settings and page."""
        name = self.names[number]
        names = f"{name}.jsonl", f"{name}.toml", f"{report.PAGES}/{name}.md"
        return [self.config.output / one for one in names]

    def _read(self, number: int) -> TextIndex:
        as_corpus, keep = self.pool is None, self.config.keep_negatives
        return index_task(self.data, number, as_corpus=as_corpus, keep=keep)

    def _index(self, number: int) -> TextIndex:
        """The index read when the run began; a dry run, which writes nothing, reads it now."""
        if self.config.dry_run:
            return self._read(number)
        return TextIndex.load(self._path("index", number, "npz"))

    def _open_task(self, number: int) -> _Task:
        index = self._index(number)
        queries, documents = text_sets(self.data, index)
        corpus, keys, settings = documents, index.documents["key"], self.data.settings[number]
        if self.pool is not None:
            instruction = settings.instruction
            if instruction is None:
                instruction = self.config.instruction or ""
            corpus = replace(self.pool, prompts=(instruction if settings.symmetric else "",))
            keys = self.pool_keys
        texts, known = [queries, documents, corpus], self.labels.of(index.queries["key"])
        return _Task(index, texts, [self._vectors(one) for one in texts], keys, known)

    @cached_property
    def labels(self) -> Labels:
        """Those of all tasks: a query's answers are known wherever it is mined."""
        return Labels.collect(map(self._index, range(len(self.names))))

    def _vectors(self, texts: TextSet, name: str = "model") -> StoredVectors:
        """The vectors of texts by the model or the scorer, with instructions in its template."""
        template = str(self.manifests[name]["instruction_template"])
        dimension = int(str(self.manifests[name]["dimension"]))
        prompts = tuple(fill_template(template, x) for x in texts.prompts)
        return StoredVectors(self.store / name, replace(texts, prompts=prompts), dimension)

    def _neighbours(self, number: int) -> tuple[StoredRows, int]:
        """The stored lists of a task, and how many neighbours of each the rules need.

        A longer stored list is used, since it begins with the shorter one. (Those of an approximate
        index may not.)
        """
        config, (_, _, (queries, _, corpus), _, known) = self.config, self._task(number)
        # Labelled answers take positions in the list; more than these (a class) may shorten it.
        depth = min(config.depth + min(known.most + 1, config.depth + 100), len(corpus))
        key = digest(queries.key, corpus.key, str(config.index))[:32]
        folder = self.store / "model" / "neighbours" / key
        stored = sorted(int(entry.name) for entry in folder.glob("*") if entry.name.isdecimal())
        for longer in stored if config.index is None else ():
            if longer >= depth:
                found = stored_neighbours(folder / str(longer), len(queries))
                if not found.missing():
                    return found, depth
        return stored_neighbours(folder / str(depth), len(queries)), depth

    def _select(self, number: int) -> Selection:
        index, _, (queries, documents, _), corpus, known = self._task(number)
        stored, depth = self._neighbours(number)

        def neighbours(numbers: Ints) -> NDArray[np.void]:
            return stored[numbers][:, :depth]

        return select(index, corpus, known, queries, documents, neighbours, self.config)

    def _to_score(self, number: int) -> list[_Scored]:
        """What the scorer scores: kept rows' queries with their own texts, and with negatives."""
        index, (queries, documents, corpus), *_ = self._task(number)
        selection = self._choose(number)
        kept, row_of = selection.status == KEPT, np.repeat(range(len(index)), np.diff(index.starts))
        own, mined = kept[row_of] & selection.is_kept, kept[:, None] & (selection.negatives >= 0)
        found: list[_Scored] = []
        for scores, mask, rows, texts, numbers in (
            (selection.scores, own, row_of[own], documents, index.texts),
            (selection.negative_scores, mined, mined.nonzero()[0], corpus, selection.negatives),
        ):
            pairs = (queries, index.row_query[rows]), (texts, numbers[mask])
            unique = [(some, *np.unique(one, return_inverse=True)) for some, one in pairs]
            left, right = ((self._vectors(a.take(b), "scorer"), c) for a, b, c in unique)
            found.append((scores, mask, left, right))
        return found

    def _is_finished(self, number: int) -> bool:
        """Whether the output of a task is whole, made from these rows with these settings."""
        try:
            record = read_json(self._path("tasks", number, "json"))
            seal = self._seal(number, self._made_with(number), record["summary"])
            return record["seal"] == seal
        # Absent or damaged: the task is mined again.
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return False

    def _seal(self, number: int, made_with: dict[str, object], summary: report.Summary) -> str:
        """A digest of a record and of the files that it is about."""
        paths = [(path.name, path) for path in self._outputs(number) if path.is_file()]
        return digest(json.dumps([made_with, summary]), files.hash_files(paths))

    def _made_with(self, number: int) -> dict[str, object]:
        """Everything on which a task's output depends."""
        index = self._index(number)
        known = self.labels.of(index.queries["key"])
        task: dict[str, object] = {
            "data": index.fingerprint,
            "settings": asdict(self.data.settings[number]),
            "known": digest(known.codes.tobytes(), known.classes.tobytes()),
        }
        return self.made_with | self.manifests | task

    def _path(self, folder: str, number: int, suffix: str) -> Path:
        return self.work / folder / f"{self.names[number]}.{suffix}"

    def _each(
        self, action: Callable[[T], object], items: Iterable[T], title: str, unit: str
    ) -> None:
        """Do this process's share of some work, and wait for the others; an error ends all."""
        share, error = list(items)[self.rank :: self.world], None
        with Progress(len(share), unit, self.stream, title=title) as progress:
            try:
                for item in share:
                    action(item)
                    progress.update(1)
            except (ValueError, OSError) as found:
                error = found
        for found in filter(None, distributed.gather_objects(error)):
            raise found


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
    data: TrainingData, index: TextIndex, selection: Selection, documents: TextSet, corpus: TextSet
) -> Iterator[str]:
    """The kept rows with their negatives and scores, otherwise unchanged."""

    def rounded(scores: Scores) -> list[float]:  # to the digits that float32 vectors justify
        return [round(score, 6) for score in scores.tolist()]

    kept = np.flatnonzero(selection.status == KEPT)
    for start in range(0, len(kept), _ROWS):
        rows = kept[start : start + _ROWS]
        needed = np.unique(selection.negatives[rows]).tolist()  # read once, in order
        texts = {number: corpus.read(number, number + 1)[0] for number in needed if number >= 0}
        for row in rows.tolist():
            record, chosen = data.record(index.first + row), selection.negatives[row] >= 0
            own = np.arange(*index.starts[row : row + 2])
            positives = own[index.is_positive[own]]
            negatives = own[selection.is_kept[own] & ~index.is_positive[own]]
            again = [documents.read(n, n + 1)[0] for n in index.texts[negatives].tolist()]
            scores = selection.scores[negatives], selection.negative_scores[row, chosen]
            mined = {
                "query": record["query"],
                "pos": record["pos"],
                "pos_scores": rounded(selection.scores[positives]),
                "neg": again + [texts[n] for n in selection.negatives[row, chosen].tolist()],
                "neg_scores": rounded(np.concatenate(scores)),
            }
            rest = {key: value for key, value in record.items() if key not in mined}
            yield json.dumps(mined | rest, ensure_ascii=False) + "\n"
