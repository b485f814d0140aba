"""Vectors on disk: each text encoded once, in shards that are complete or absent.

    <store>/manifest.json            whose vectors these are: checkpoint, dtype, maximum length, ...
    <store>/sides/<task>.<side>.json  instructions and shards of one side of a task
    <store>/shards/<name>.npy         (n, D) float32, unit length, on the grid of search.py
    <store>/neighbours/<key>/<depth>/  what a search found, by blocks of queries

A shard is named by the hash of its texts and their prompts, so it is found again whatever task, run
or number of processes asks for it, and a changed data set costs the shards that changed. A kill
costs at most the shards being encoded. Shards that nothing asks for any more stay until the folder
is deleted.

Not here: which texts there are (catalogue.py).
"""

import hashlib
from pathlib import Path
from typing import Any, Self

import numpy as np

from kalm_min.embedder import Embedder
from kalm_min.files import atomic_write, read_json, text_hash, write_json
from kalm_min.mining.catalogue import Ints, Read, Texts
from kalm_min.mining.search import Neighbours, Vectors, on_grid

_LAYOUT = 1  # raised when shards are cut or named in another way
_QUERIES = 8192  # in a file of neighbours
_HASHED = {".safetensors", ".json"}  # the files of a checkpoint that change its vectors


def describe(embedder: Embedder, model: str) -> dict[str, Any]:
    """Everything that vectors depend on besides their texts, for the manifest.

    Args:
        embedder: the opened model.
        model: the folder or hub id it was opened from.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = [f"*{suffix}" for suffix in _HASHED]
        folder = Path(snapshot_download(model, allow_patterns=patterns, local_files_only=True))
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*"), *folder.glob("[0-9]_*/*")]):
        if path.suffix in _HASHED and path.is_file():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
            digest.update(path.relative_to(folder).as_posix().encode() + content)
    return {
        "layout": _LAYOUT,
        "checkpoint": digest.hexdigest(),
        "dtype": str(embedder.dtype).removeprefix("torch."),
        "max_length": embedder.max_length,
        "causal": embedder.causal,
        "pooling": embedder.pooling,
        "instruction_template": embedder.instruction_template,
        "dimension": embedder.dimension,
    }


class Store:
    """The vectors of one model."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: Path, manifest: dict[str, Any], *, begin: bool = True) -> Self:
        """Open the store of the model that `manifest` describes, or begin one.

        Raises ValueError naming what differs where the folder holds another model's vectors.
        """
        path = folder / "manifest.json"
        if path.is_file():
            there: dict[str, Any] = read_json(path)
            different = [
                f"{key} {_short(there.get(key))} there, {_short(manifest.get(key))} here"
                for key in sorted(there.keys() | manifest.keys())
                if there.get(key) != manifest.get(key)
            ]
            if different:
                raise ValueError(
                    f"{folder} holds the vectors of another model ({'; '.join(different)}); "
                    "give another --store, or delete the folder"
                )
        elif begin:
            write_json(path, manifest)
        return cls(folder, manifest)

    def side(self, name: str, texts: Texts) -> "Side":
        """The vectors of some texts, encoded or not."""
        return Side(self, name, texts)

    def neighbours(
        self, queries: "Side", corpus: "Side", depth: int, index: str | None
    ) -> "StoredNeighbours":
        """The neighbours of the queries in the corpus, found or not, at least `depth` of each.

        A longer list that is there already is taken: it begins with the shorter one.
        """
        parts = f"{_LAYOUT} {queries.key} {corpus.key} {index}"
        folder = (
            self.folder / "neighbours" / hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()
        )
        there = [int(entry.name) for entry in folder.glob("*") if entry.name.isdigit()]
        for longer in sorted(number for number in there if number >= depth):
            found = StoredNeighbours(folder / str(longer), len(queries))
            if not found.missing():
                return found
        return StoredNeighbours(folder / str(depth), len(queries))


class Side:
    """The texts of one side of a task, in a store."""

    def __init__(self, store: Store, name: str, texts: Texts) -> None:
        self.store, self.name, self.texts = store, name, texts
        self.cuts = texts.cuts()
        template = store.manifest["instruction_template"]
        self._prompts = [
            template.format(instruction=instruction) if instruction else ""
            for instruction in texts.instructions
        ]
        codes = np.array([text_hash(prompt) for prompt in self._prompts], np.int64)
        both = np.stack([codes[texts.prompts], texts.hashes], axis=1)  # (n, 2)
        self._names = [
            hashlib.blake2b(both[start:end].tobytes(), digest_size=16).hexdigest()
            for start, end in zip(self.cuts[:-1].tolist(), self.cuts[1:].tolist(), strict=True)
        ]
        every = hashlib.blake2b("".join(self._names).encode(), digest_size=16)
        self.key = every.hexdigest()
        """Of all the texts and prompts, in order."""

    def __len__(self) -> int:
        return len(self.texts)

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.store.folder / "shards" / f"{self._names[shard]}.npy"

    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        return [shard for shard in range(len(self._names)) if not self.path(shard).is_file()]

    def size(self, shard: int) -> int:
        """Characters in a shard."""
        return int(self.texts.sizes[self.cuts[shard] : self.cuts[shard + 1]].sum())

    def encode(self, shard: int, read: Read, embedder: Embedder) -> None:
        """Encode a shard and write it. What is encoded together is always the same texts."""
        numbers = range(int(self.cuts[shard]), int(self.cuts[shard + 1]))
        rows, slots = self.texts.rows, self.texts.slots
        prompts = self.texts.prompts
        texts = [self._prompts[prompts[i]] + read(int(rows[i]), int(slots[i])) for i in numbers]
        with atomic_write(self.path(shard)) as file:
            np.save(file, on_grid(embedder.encode(texts)), allow_pickle=False)

    def describe(self) -> None:
        """Write, for people, which instructions and shards the side has."""
        write_json(
            self.store.folder / "sides" / f"{self.name}.json",
            {
                "instructions": self.texts.instructions,
                "texts": len(self),
                "shards": self._names,
            },
        )

    def vectors(self) -> "StoredVectors":
        """All of them; every shard is there."""
        paths = [self.path(shard) for shard in range(len(self._names))]
        return StoredVectors(paths, self.cuts, self.store.manifest["dimension"])


class StoredVectors:
    """(n, D) float32 in files, as search.Rows: read when asked for, nothing kept."""

    def __init__(self, paths: list[Path], cuts: Ints, dimension: int) -> None:
        self._paths, self._cuts = paths, cuts
        self.shape = (int(cuts[-1]), dimension)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | Ints) -> Vectors:
        """The rows of a slice without step, or those numbered by an array in any order."""
        numbers = np.arange(*key.indices(len(self))) if isinstance(key, slice) else key
        rows = np.empty((len(numbers), self.shape[1]), np.float32)
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        bounds = np.searchsorted(ordered, self._cuts)
        for shard in np.flatnonzero(np.diff(bounds)).tolist():
            part = slice(bounds[shard], bounds[shard + 1])
            rows[order[part]] = self._shard(shard)[ordered[part] - self._cuts[shard]]
        return rows

    def _shard(self, shard: int) -> Vectors:
        path = self._paths[shard]
        expected = (int(self._cuts[shard + 1] - self._cuts[shard]), self.shape[1])
        try:
            # Mapped for the moment only: what stays mapped counts as memory.
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: expected vectors, found {error}; delete it") from error
        if vectors.shape != expected or vectors.dtype != np.float32:
            raise ValueError(
                f"{path}: expected {expected} float32, found {vectors.shape} {vectors.dtype}; "
                "delete it and run again"
            )
        return vectors


class StoredNeighbours:
    """The neighbours of Q queries in files of _QUERIES queries each: float32 scores, complete or absent."""

    def __init__(self, folder: Path, queries: int) -> None:
        self.folder, self.queries = folder, queries

    def bounds(self, block: int) -> slice:
        """The queries of a block."""
        return slice(block * _QUERIES, min((block + 1) * _QUERIES, self.queries))

    def missing(self) -> list[int]:
        """The blocks that are not there yet."""
        count = -(-self.queries // _QUERIES)
        return [block for block in range(count) if not self._path(block).is_file()]

    def write(self, block: int, found: Neighbours) -> None:
        """Write the neighbours of a block."""
        with atomic_write(self._path(block)) as file:
            np.savez(file, ids=found.ids, scores=found.scores.astype(np.float32))

    def __getitem__(self, numbers: Ints) -> tuple[Ints, Vectors]:
        """(len(numbers), K) ids and scores of some queries."""
        blocks = numbers // _QUERIES
        ids: Ints | None = None
        scores: Vectors | None = None
        for block in np.unique(blocks).tolist():
            with np.load(self._path(block), allow_pickle=False) as file:
                part_ids, part_scores = file["ids"], file["scores"]
            if ids is None or scores is None:
                shape = (len(numbers), part_ids.shape[1])
                ids, scores = np.empty(shape, np.int64), np.empty(shape, np.float32)
            here = blocks == block
            ids[here] = part_ids[numbers[here] - block * _QUERIES]
            scores[here] = part_scores[numbers[here] - block * _QUERIES]
        assert ids is not None
        assert scores is not None
        return ids, scores

    def _path(self, block: int) -> Path:
        return self.folder / f"{block:06d}.npz"


def _short(value: object) -> str:
    """A value as a sentence can hold it: hashes are cut."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
