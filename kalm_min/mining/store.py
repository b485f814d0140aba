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
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np

from kalm_min import shards
from kalm_min.embedder import Embedder
from kalm_min.files import checkpoint_folders, hash_checkpoint, read_json, text_hash, write_json
from kalm_min.mining.catalogue import Ints, Read, Texts
from kalm_min.mining.nominees import Vectors
from kalm_min.mining.search import Neighbours, on_grid

_LAYOUT = 1  # raised when shards are cut or named in another way
_QUERIES = 8192  # in a file of neighbours
_NEIGHBOUR = np.dtype([("id", np.int64), ("score", np.float32)])


def describe(embedder: Embedder, model: str) -> dict[str, Any]:
    """Everything that vectors depend on besides their texts, for the manifest.

    Args:
        embedder: the opened model.
        model: the folder or hub id it was opened from.
    """
    return {
        "layout": _LAYOUT,
        "checkpoint": hash_checkpoint(*checkpoint_folders(model)),
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

    def neighbours(
        self, queries: "Side", corpus: "Side", depth: int, index: str | None
    ) -> "StoredNeighbours":
        """The `depth` neighbours of the queries in the corpus, found or not.

        A longer list that is there already is taken: it begins with the shorter one. (Those of an
        approximate index may not.)
        """
        key = _digest(f"{_LAYOUT} {queries.key} {corpus.key} {index}".encode())
        folder = self.folder / "neighbours" / key
        there = [int(entry.name) for entry in folder.glob("*") if entry.name.isdigit()]
        for longer in sorted(number for number in there if number >= depth and index is None):
            found = StoredNeighbours(folder / str(longer), len(queries), depth)
            if not found.missing():
                return found
        return StoredNeighbours(folder / str(depth), len(queries), depth)


class Side:
    """The texts of one side of a task, in a store."""

    def __init__(self, store: Store, name: str, texts: Texts, read: Read) -> None:
        self.store, self.name, self.texts, self.read = store, name, texts, read
        self.cuts = texts.cuts()
        template = store.manifest["instruction_template"]
        self._prompts = [
            template.format(instruction=instruction) if instruction else ""
            for instruction in texts.instructions
        ]
        codes = np.array([text_hash(prompt) for prompt in self._prompts], np.int64)
        both = np.stack([codes[texts.table["prompt"]], texts.hashes], axis=1)  # (n, 2)
        self._names = [_digest(both[start:end].tobytes()) for start, end in pairwise(self.cuts)]
        self.key = _digest("".join(self._names).encode())
        """Of all the texts and prompts, in order."""

    def __len__(self) -> int:
        return len(self.texts)

    def text(self, number: int) -> str:
        """A text, without its prompt."""
        place = self.texts.table[number]
        return self.read(int(place["row"]), int(place["slot"]))

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.store.folder / "shards" / f"{self._names[shard]}.npy"

    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        return [shard for shard in range(len(self._names)) if not self.path(shard).is_file()]

    def size(self, shard: int) -> int:
        """Characters in a shard."""
        return int(self.texts.table["size"][self.cuts[shard] : self.cuts[shard + 1]].sum())

    def encode(self, shard: int, embedder: Embedder) -> None:
        """Encode a shard and write it. What is encoded together is always the same texts."""
        numbers = range(int(self.cuts[shard]), int(self.cuts[shard + 1]))
        prompts = self.texts.table["prompt"]
        texts = [self._prompts[prompts[number]] + self.text(number) for number in numbers]
        shards.write(self.path(shard), on_grid(embedder.encode(texts)))

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
            shape = (int(self._cuts[shard + 1] - self._cuts[shard]), self.shape[1])
            vectors = shards.read(self._paths[shard], shape, np.dtype(np.float32))
            rows[order[part]] = vectors[ordered[part] - self._cuts[shard]]
        return rows


class StoredNeighbours:
    """The `depth` neighbours of Q queries, in files of _QUERIES queries each, complete or absent.

    The folder's name is how many neighbours the files hold.
    """

    def __init__(self, folder: Path, queries: int, depth: int) -> None:
        self.folder, self.queries, self.depth = folder, queries, depth

    def bounds(self, block: int) -> slice:
        """The queries of a block."""
        return slice(block * _QUERIES, min((block + 1) * _QUERIES, self.queries))

    def missing(self) -> list[int]:
        """The blocks that are not there yet."""
        count = -(-self.queries // _QUERIES)
        return [block for block in range(count) if not self._path(block).is_file()]

    def write(self, block: int, found: Neighbours) -> None:
        """Write the neighbours of a block."""
        pairs = np.empty(found.ids.shape, _NEIGHBOUR)
        pairs["id"], pairs["score"] = found
        shards.write(self._path(block), pairs)

    def __getitem__(self, numbers: Ints) -> tuple[Ints, Vectors]:
        """(len(numbers), depth) ids, -1 for none, and scores of some queries."""
        pairs = np.empty((len(numbers), self.depth), _NEIGHBOUR)
        blocks = numbers // _QUERIES
        for block in np.unique(blocks).tolist():
            here, bounds = blocks == block, self.bounds(block)
            shape = (bounds.stop - bounds.start, int(self.folder.name))
            there = shards.read(self._path(block), shape, _NEIGHBOUR)[:, : self.depth]
            pairs[here] = there[numbers[here] - bounds.start]
        return np.ascontiguousarray(pairs["id"]), np.ascontiguousarray(pairs["score"])

    def _path(self, block: int) -> Path:
        return self.folder / f"{block:06d}.npy"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _short(value: object) -> str:
    """A value as a sentence can hold it: hashes are cut."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
