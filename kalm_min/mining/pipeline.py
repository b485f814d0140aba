"""From a training folder and a model to the same folder with mined negatives.

A run indexes the texts of every task, encodes what the store lacks, searches, filters rows, chooses
negatives, writes task by task, and reports. Each phase leaves files that are complete or absent and
skips what exists, so the same command resumes after a kill, and other rules encode nothing. Work is
distributed to the processes in pieces that do not depend on their number; they wait for one another
between phases. <output>/.mining/tasks/ holds a record of each finished task; the store holds vectors
(vectors.py) and neighbours (neighbours/<key>/<depth>/).
"""

import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import cached_property, lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TextIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from kalm_min import files, topk, vectors
from kalm_min.console import Progress, table
from kalm_min.data import TrainingData
from kalm_min.embedder import Embedder
from kalm_min.files import atomic_write, digest, read_json, write_json
from kalm_min.mining import report
from kalm_min.mining.rules import KEPT, Known, Labels, Scores, Selection, pair_scores, select
from kalm_min.mining.texts import STORED, Bools, TextIndex, index_task, open_pool, text_sets
from kalm_min.options import MiningConfig, Rules
from kalm_min.settings import fill_template
from kalm_min.topk import Ints, top_k
from kalm_min.training import distributed
from kalm_min.vectors import StoredRows, StoredVectors, TextSet

_LAYOUT = 5  # rises when the same settings give another output
_RECALL_QUERIES = 256
_QUERIES = 8192  # per file of neighbours, and
_LISTED = 1 << 22  # neighbours per file at most
_NEIGHBOUR = np.dtype([("id", np.int64), ("score", np.float32)])
_ROWS = 8192  # whose negatives are read at a time

T = TypeVar("T")
_Opener = Callable[[int], list[StoredVectors]]  # from the number of a task
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
    stored: StoredRows  # neighbours of the queries, found or not
    depth: int  # how many of each the rules need

    def neighbours(self, queries: slice | Ints) -> NDArray[np.void]:
        return self.stored[queries][:, : self.depth]


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
        self.manifests: dict[str, dict[str, object]] = {}  # of "scorer" and "model"
        self.prompts: dict[str, dict[str, str]] = {}  # those that they store
        self._task = lru_cache(maxsize=1)(self._open_task)
        self._choose = lru_cache(maxsize=1)(self._select)

    def run(self) -> tuple[dict[str, int], list[str]]:
        """Mine every unfinished task; return totals over all rows, and remarks."""
        config, everything = self.config, range(len(self.names))
        self._each("read tasks", everything, self._read)
        if config.scorer is not None:  # first, so that only one model is in memory at a time
            self._open_model(config.scorer, "scorer")
        embedder = self._open_model(config.model, "model")
        if config.index is not None:  # a wrong one fails now
            topk.approximate_index(np.empty((0, embedder.dimension), np.float32), config.index)
        looked = [n for n in everything[self.rank :: self.world] if not self._is_finished(n)]
        unfinished = sorted(chain(*distributed.gather_objects(looked)))
        # A label-based task draws its positives and negatives anew in every epoch: it is copied.
        todo = [number for number in unfinished if not self.data.settings[number].label_based]
        finished = len(everything) - len(unfinished)
        self.stream.write(f"{finished} of {len(everything)} tasks are finished\n")
        self._encode("encode", todo, embedder, lambda number: self._task(number).vectors)
        self._search(todo)
        del embedder
        if config.scorer is not None:
            embedder = self._open_model(config.scorer, "scorer")

            def to_score(number: int) -> list[StoredVectors]:
                return [one for _, _, *sides in self._to_score(number) for one, _ in sides]

            self._encode("score", todo, embedder, to_score)
        self._each("write tasks", unfinished, self._write)
        summaries = [read_json(self._path("tasks", n, "json"))["summary"] for n in everything]
        tasks = dict(zip(self.data.task_names, summaries, strict=True))
        if self.rank == 0:
            report.write(config, tasks, self.manifests["model"])
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
            task = self._task(number)
            sizes = [f"{len(one):,}" for one in (task.text_index, *task.vectors)]
            characters = {
                one.names[i]: int(one.texts.sizes[slice(*one.cuts[i : i + 2])].sum())
                for one in task.vectors
                for i in one.missing()
            }
            work = (
                f"{sum(characters.values()) // 1000:,} kchar",
                f"{len(task.stored.missing())} blocks",
            )
            is_known = not characters and not task.stored.missing()
            kept = f"{(self._choose(number).status == KEPT).sum():,}" if is_known else ""
            rows.append([name, *sizes, *work, kept])
        return table(head, rows, right=range(1, 8))

    def _open_data(self) -> tuple[TrainingData, TextSet | None, Ints]:
        """Open the data and the pool; refuse an output folder into which other data was mined."""
        config, cache = self.config, self.config.cache_dir
        data = TrainingData(
            config.data, instruction=config.instruction, cache_dir=cache, progress=self.stream
        )
        tasks = {files.escape_name(task) for task in data.task_names}
        for entry in sorted(config.output.glob("[!.]*")):
            is_task = entry.suffix in (".jsonl", ".toml") and entry.stem in tasks
            if not is_task and not entry.name.startswith("README"):
                raise ValueError(
                    f"{config.output}: expected an empty folder or one that this data was mined "
                    f"into, found {entry.name}"
                )
        if config.pool is None:
            return data, None, np.empty(0, np.int64)
        return data, *open_pool(config.pool, cache)

    def _open_model(self, model: str, name: str) -> Embedder:
        """Open a model; keep its manifest and check it against the folder of its vectors."""
        config = self.config
        dtype = None if config.dtype == "auto" else config.dtype
        load = partial(Embedder.from_pretrained, model, self.device, dtype)
        embedder = distributed.rank_zero_first(partial(load, max_length=config.max_length))
        checkpoint = ""
        if self.rank == 0:
            checkpoint = files.hash_checkpoint(*files.checkpoint_folders(model))
        manifest = vectors.describe(embedder, distributed.gather_objects(checkpoint)[0])
        check = partial(vectors.check_manifest, self.store / name, manifest)
        distributed.rank_zero_first(partial(check, begin=not config.dry_run))
        self.manifests[name], self.prompts[name] = manifest, embedder.prompts
        return embedder

    def _encode(self, title: str, todo: list[int], embedder: Embedder, opener: _Opener) -> None:
        """Encode the missing shards, which are shared among the processes."""
        wanted: dict[str, tuple[int, int, int]] = {}
        for number in todo:
            for part, stored in enumerate(opener(number)):
                for shard in stored.missing():
                    wanted.setdefault(stored.names[shard], (number, part, shard))
        distributed.barrier()  # no process encodes before all have looked
        opened = lru_cache(maxsize=1)(opener)

        def encode(shard: tuple[int, int, int]) -> None:
            opened(shard[0])[shard[1]].encode(shard[2], embedder)

        self._each(f"{title} shards", wanted.values(), encode)

    def _search(self, todo: list[int]) -> None:
        """Find the neighbours of queries without stored ones; each process searches its span."""
        work = {number: self._task(number).stored.missing() for number in todo}
        distributed.barrier()
        total = sum(map(len, work.values()))
        with Progress(total, "blocks", self.stream, title="search") as progress:
            for number in filter(work.get, work):
                task = self._task(number)
                queries, _, corpus = task.vectors
                n = len(corpus)
                span = n * self.rank // self.world, n * (self.rank + 1) // self.world
                index = None
                if self.config.index is not None:
                    with suppress(ValueError):  # too few texts to train it: an exact search
                        index = topk.approximate_index(corpus, self.config.index, span)
                for block in work[number]:
                    part = top_k(
                        queries[slice(*task.stored.cuts[block : block + 2])], corpus, task.depth,
                        device=self.device, backend=self.config.search, span=span, index=index,
                    )  # fmt: skip
                    found = topk.merge(distributed.gather_objects(part), task.depth)
                    if self.rank == 0:
                        task.stored.write(block, as_pairs(found))
                    progress.update(1, self.data.task_names[number])
        distributed.barrier()

    def _write(self, number: int) -> None:
        """Write the files of a task, then the record whose seal they fit."""
        name, data = self.names[number], self.config.data
        source = (data if data.is_dir() else data.parent) / f"{name}.toml"
        settings, page = [files.read_text(source)] if source.is_file() else [], []
        if self.data.settings[number].label_based:
            index = self._index(number)
            records = map(self.data.record, range(index.first, index.first + len(index)))
            summary = report.copied(len(index))
        else:
            task, selection = self._task(number), self._choose(number)
            described = self.data, task.text_index, selection, task.texts[2]
            summary, examples = report.summarise(*described, self.config)
            page = ["\n".join([f"# {report.escaped(name)}", "", *examples])]
            if self.config.index is not None:
                some, (queries, _, searched) = slice(0, _RECALL_QUERIES), task.vectors
                exact = top_k(queries[some], searched, task.depth, device=self.device).ids
                summary["recall"] = topk.recall(task.neighbours(some)["id"], exact)
            for scores, mask, *sides in self._to_score(number) if self.config.scorer else ():
                scores[mask] = pair_scores(*sides[0], *sides[1])
            records = _mined(*described, task.texts[1])
        lines: Iterable[str] = (json.dumps(one, ensure_ascii=False) + "\n" for one in records)
        if not summary["kept"]:  # an empty file is not a task
            lines = settings = []
        for path, content in zip(self._outputs(number), (lines, settings, page), strict=True):
            if content:
                with atomic_write(path, "w") as file:
                    file.writelines(content)
            else:
                path.unlink(missing_ok=True)
        record = {"summary": summary, "seal": self._seal(number, summary)}
        write_json(self._path("tasks", number, "json"), record)

    def _outputs(self, number: int) -> list[Path]:
        """The files of a task: rows, settings and page."""
        names = "{}.jsonl", "{}.toml", f"{report.PAGES}/{{}}.md"
        return [self.config.output / name.format(self.names[number]) for name in names]

    def _read(self, number: int) -> TextIndex:
        """Read a task; except in a dry run, which writes nothing, keep its index for the run."""
        as_corpus, keep = self.pool is None, self.config.keep_negatives
        index = index_task(self.data, number, as_corpus=as_corpus, keep=keep)
        if not self.config.dry_run:
            index.save(self._path("index", number, "npz"))
        return index

    def _index(self, number: int) -> TextIndex:
        path = self._path("index", number, "npz")
        return self._read(number) if self.config.dry_run else TextIndex.load(path)

    def _open_task(self, number: int) -> _Task:
        config, index, settings = self.config, self._index(number), self.data.settings[number]
        queries, documents = text_sets(self.data, index)
        corpus, keys = documents, index.documents["key"]
        if self.pool is not None:
            corpus, keys = self.pool, self.pool_keys
            if settings.symmetric:
                given = (settings.instruction, config.instruction, STORED["query"])
                prompt = next(text for text in given if text is not None)
                corpus = replace(corpus, prompts=(prompt,))
        texts, known = [queries, documents, corpus], self.labels.of(index.queries["key"])
        stored = [self._vectors(one) for one in texts]
        # Labelled texts take positions in the list; very many (a large class) may shorten it.
        depth = min(config.depth + min(known.most + 1, config.depth + 100), len(keys))
        key = digest(stored[0].key, stored[2].key, str(config.index))[:32]
        folder = self.store / "model" / "neighbours" / key
        widths = sorted(int(one.name) for one in folder.glob("*") if one.name.isdecimal())
        # A longer list begins with the shorter one, if no approximate index was searched.
        longer = [width for width in widths if width > depth and config.index is None]
        lists = [stored_neighbours(folder / str(n), len(queries.hashes)) for n in (depth, *longer)]
        found = next((one for one in lists if not one.missing()), lists[0])
        return _Task(index, texts, stored, keys, known, found, depth)

    @cached_property
    def labels(self) -> Labels:
        """Those of all tasks: a query's answers are known wherever it is mined."""
        return Labels.collect(map(self._index, range(len(self.names))))

    def _vectors(self, texts: TextSet, name: str = "model") -> StoredVectors:
        """The vectors of texts by the model or the scorer, with its template and stored prompts."""
        template = str(self.manifests[name]["instruction_template"])
        dimension = int(str(self.manifests[name]["dimension"]))
        stored = {STORED[kind]: self.prompts[name][kind] for kind in STORED}
        prompts = (stored[x] if x in stored else fill_template(template, x) for x in texts.prompts)
        return StoredVectors(self.store / name, replace(texts, prompts=tuple(prompts)), dimension)

    def _select(self, number: int) -> Selection:
        task = self._task(number)
        queries, documents, _ = task.vectors
        known = task.corpus, task.known
        return select(task.text_index, *known, queries, documents, task.neighbours, self.config)

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
            return record["seal"] == self._seal(number, record["summary"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return False  # absent or damaged

    def _seal(self, number: int, summary: report.Summary) -> str:
        """A digest of a task's summary and files, and of everything on which they depend."""
        config, index = self.config, self._index(number)
        known = self.labels.of(index.queries["key"])
        depends_on = [
            {"layout": _LAYOUT, "index": config.index, "data": index.fingerprint},
            {field.name: getattr(config, field.name) for field in fields(Rules)},
            self.manifests,
            self.prompts,
            asdict(self.data.settings[number]),
            digest(known.codes.tobytes(), known.classes.tobytes()),
            # The default instruction is that of the pool in a symmetric task.
            self.pool and digest(self.pool.hashes.tobytes(), config.instruction or ""),
        ]
        paths = [(path.name, path) for path in self._outputs(number) if path.is_file()]
        return digest(json.dumps([depends_on, summary]), files.hash_files(paths))

    def _path(self, folder: str, number: int, suffix: str) -> Path:
        return self.work / folder / f"{self.names[number]}.{suffix}"

    def _each(self, what: str, items: Iterable[T], action: Callable[[T], object]) -> None:
        """Do this process's share of some work, and wait for the others; an error ends all."""
        share, error, (title, unit) = list(items)[self.rank :: self.world], None, what.split()
        with Progress(len(share), unit, self.stream, title=title) as progress:
            try:
                for item in share:
                    action(item)
                    progress.update(1)
            except (ValueError, OSError) as found:
                error = found
        for found in filter(None, distributed.gather_objects(error)):
            raise found


def _mined(
    data: TrainingData, index: TextIndex, selection: Selection, corpus: TextSet, documents: TextSet
) -> Iterator[files.Object]:
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
            yield mined | {key: value for key, value in record.items() if key not in mined}
