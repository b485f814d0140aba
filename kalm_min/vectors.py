"""Vectors of texts on disk: each text encoded once, in shards that are complete or absent.

    <folder>/manifest.json       whose vectors these are: checkpoint, dtype, maximum length, ...
    <folder>/shards/<name>.npy   (n, D) float32, unit length, on the grid of topk.py

A text set is cut into shards after texts that their own hash chooses, and a shard is named by the
hashes of its texts and prompts: any task or process finds it again, and a changed data set costs
only the shards that changed, a kill only those being encoded.
"""

import hashlib
import io
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kalm_min.embedder import Embedder
from kalm_min.files import atomic_write, differences, digest, text_hash, write_json
from kalm_min.schema import read_object
from kalm_min.topk import Ints, Vectors, on_grid

_LAYOUT = 2  # rises when shards are cut, named or encoded differently

# A shard ends before it gets larger than what a kill may cost, and after a text whose hash is
# divisible by _MEAN, so that an added or removed text changes only its own shard.
_MEAN = 1024
_LONGEST = 4096  # texts
_LARGEST = 1 << 20  # characters
_DIGEST = 32  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSet:
    """n texts that can be read again by position, so that a large corpus is never in memory."""

    hashes: Ints  # (n,) `text_hash` of the texts, without prompts
    sizes: Ints  # (n,) characters
    prompts: tuple[str, ...]  # the distinct prompts that are put before texts
    prompt_ids: Ints  # (n,) the position in `prompts` of each text's prompt
    read: Callable[[int, int], Sequence[str]]  # texts start to stop, without prompts

    @classmethod
    def of(cls, read: Callable[[int, int], Sequence[str]], count: int, prompt: str = "") -> Self:
        """Read `count` texts once, in blocks, and keep their hashes and sizes."""
        hashes, sizes, ids = np.zeros((3, count), np.int64)
        for start in range(0, count, _LONGEST):
            stop = min(start + _LONGEST, count)
            texts = read(start, stop)
            hashes[start:stop] = [text_hash(text) for text in texts]
            sizes[start:stop] = [len(text) for text in texts]
        return cls(hashes=hashes, sizes=sizes, prompts=(prompt,), prompt_ids=ids, read=read)

    def take(self, numbers: Ints) -> "TextSet":
        """Some of the texts, in the order given."""
        return replace(
            self,
            hashes=self.hashes[numbers],
            sizes=self.sizes[numbers],
            prompt_ids=self.prompt_ids[numbers],
            read=lambda start, stop: [self.read(n, n + 1)[0] for n in numbers[start:stop].tolist()],
        )


def cuts(hashes: Ints, sizes: Ints) -> Ints:
    """(shards + 1,) bounds of the shards of texts with (n,) hashes and sizes in characters."""
    natural = [*(np.flatnonzero(hashes % _MEAN == 0) + 1).tolist(), len(hashes)]
    total = np.concatenate([[0], np.cumsum(sizes)])
    bounds = [0]
    for end in natural:
        while bounds[-1] < end:
            start = bounds[-1]
            fits = int(np.searchsorted(total, total[start] + _LARGEST, side="right")) - 1
            bounds.append(min(end, start + _LONGEST, max(fits, start + 1)))
    return np.array(bounds, np.int64)


def describe(embedder: Embedder, checkpoint: str) -> dict[str, object]:
    """Everything that vectors depend on besides their texts, for the manifest."""
    names = ("max_length", "causal", "pooling", "instruction_template", "dimension")
    dtype = str(embedder.dtype).removeprefix("torch.")
    settings: dict[str, object] = {name: getattr(embedder, name) for name in names}
    # The ids that close every text.
    [settings["end_of_text"]] = embedder.tokenizer.encode([""], max_length=8)
    return {"layout": _LAYOUT, "checkpoint": checkpoint, "dtype": dtype, **settings}


def check_manifest(folder: Path, manifest: Mapping[str, object], *, begin: bool = True) -> None:
    """Create the manifest of a folder, or raise ValueError if it is of another model."""
    path = folder / "manifest.json"
    if path.is_file():
        if changed := differences(read_object(path, {}, extra=True), manifest):
            expected = f"{folder} holds the vectors of another model ({changed})"
            raise ValueError(f"{expected}; give another --store, or delete the folder")
    elif (folder / "shards").exists():  # which are written after it
        expected = f"{path}: expected to find there whose vectors these are"
        raise ValueError(f"{expected}, found nothing; delete the folder")
    elif begin:
        write_json(path, manifest)


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an .npy file, complete or not at all, with a digest of the array after it."""
    with atomic_write(path) as file:
        file.write(_header(array.shape, array.dtype))
        file.write(array)  # np.save would report a full disk as a number of items not written
        file.write(hashlib.sha256(array.data).digest())


def read_array(
    path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], *, check: bool = False
) -> NDArray[Any]:
    """Read an .npy file, mapped only briefly, since mapped pages count as memory.

    Raises OSError if it does not exist, and ValueError if it is not the expected array. Every byte
    is read with `check`, once per process and file.
    """
    header, stat = _header(shape, dtype), path.stat()
    size = len(header) + math.prod(shape) * dtype.itemsize + _DIGEST
    if stat.st_size != size or not _is_whole(path, header, stat.st_mtime_ns, check):
        expected = f"{path}: expected {shape} {dtype}"
        raise ValueError(f"{expected}, found other content; run again to replace it")
    return np.memmap(path, dtype, "r", len(header), shape)


@lru_cache(1 << 20)
def _is_whole(path: Path, header: bytes, _: int, check: bool) -> bool:
    """Whether a file, changed at some time, has this header and, if checked, its array's digest."""
    with path.open("rb") as file:
        data = file.read(-1 if check else len(header))
    is_as_digested = hashlib.sha256(data[len(header) : -_DIGEST]).digest() == data[-_DIGEST:]
    return data.startswith(header) and (is_as_digested or not check)


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """What an .npy file begins with; that of a foreign file is compared with it and not parsed."""
    file, descr = io.BytesIO(), np.lib.format.dtype_to_descr(dtype)
    settings = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, settings)
    return file.getvalue()


class StoredRows:
    """Rows of `width` items each, as `topk.Rows`, in files: read from them when needed.

    Reading a row of a missing file raises FileNotFoundError: first write what is `missing`.
    """

    def __init__(
        self, folder: Path | None, names: list[str], cuts: Ints, width: int, dtype: np.dtype[Any]
    ) -> None:
        """File i of `names` holds rows cuts[i] to cuts[i + 1]; None: all are kept in memory."""
        self.folder, self.names, self.cuts = folder, names, cuts
        self._width, self._dtype = width, dtype
        self._in_memory: dict[int, NDArray[Any]] = {}

    def __len__(self) -> int:
        return int(self.cuts[-1])

    def missing(self) -> list[int]:
        """The files that do not exist or are damaged, which must be written (again)."""
        found: list[int] = []
        for number in range(len(self.names)):
            try:
                self._part(number, check=True)
            except (OSError, ValueError):
                found.append(number)
        return found

    def write(self, number: int, rows: NDArray[Any], *, needs_disk: bool = True) -> None:
        """Write a file. A full disk raises OSError; without needs_disk, rows stay in memory then."""
        self._in_memory[number] = rows
        if self.folder is None:
            return
        path = self.folder / self.names[number]
        try:
            write_array(path, rows)
            del self._in_memory[number]
        except OSError as error:
            if needs_disk:
                raise
            sys.stderr.write(f"{path} was not kept: {error}\n")

    def __getitem__(self, key: slice | Ints) -> NDArray[Any]:
        """The rows of a slice without a step, or those in an array of numbers in any order."""
        numbers = np.arange(*key.indices(len(self))) if isinstance(key, slice) else key
        rows = np.empty((len(numbers), self._width), self._dtype)
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        bounds = np.searchsorted(ordered, self.cuts)
        for part in np.flatnonzero(np.diff(bounds)).tolist():
            some = slice(bounds[part], bounds[part + 1])
            rows[order[some]] = self._part(part)[ordered[some] - self.cuts[part]]
        return rows

    def _part(self, number: int, *, check: bool = False) -> NDArray[Any]:
        """All rows of a file."""
        if number in self._in_memory:
            return self._in_memory[number]
        if self.folder is None:
            raise FileNotFoundError(f"rows of part {number} do not exist")
        shape = int(self.cuts[number + 1] - self.cuts[number]), self._width
        return read_array(self.folder / self.names[number], shape, self._dtype, check=check)


class StoredVectors(StoredRows):
    """(n, D) float32 vectors of a text set."""

    def __init__(self, folder: Path | None, texts: TextSet, dimension: int) -> None:
        """Find the shards of `texts` in a folder; without a folder, vectors are kept in memory."""
        self.texts = texts
        bounds = cuts(texts.hashes, texts.sizes)
        codes = np.array([text_hash(prompt) for prompt in texts.prompts], np.int64)
        pairs = np.stack([codes[texts.prompt_ids], texts.hashes], axis=1)  # (n, 2)
        parts = [pairs[start:stop].tobytes() for start, stop in pairwise(bounds.tolist())]
        names = [f"shards/{digest(part)[:32]}.npy" for part in parts]
        super().__init__(folder, names, bounds, dimension, np.dtype(np.float32))
        self.key = digest(*names)[:32]  # a digest of all texts and prompts, in order

    def encode(self, shard: int, embedder: Embedder, *, needs_disk: bool = True) -> None:
        """Encode a shard and write it; its texts are always encoded together."""
        start, stop = self.cuts[shard : shard + 2].tolist()
        texts, prompt_ids = self.texts.read(start, stop), self.texts.prompt_ids[start:stop]
        vectors = np.empty((stop - start, self._width), np.float32)
        for number in np.unique(prompt_ids).tolist():
            rows = np.flatnonzero(prompt_ids == number)
            chosen = [texts[row] for row in rows.tolist()]
            vectors[rows] = embedder.encode(chosen, self.texts.prompts[number])
        self.write(shard, on_grid(vectors), needs_disk=needs_disk)


def cut_dimension(vectors: Vectors, dim: int) -> Vectors:
    """(n, dim) vectors cut to their first coordinates, at unit length, on the grid (Matryoshka)."""
    if dim == vectors.shape[1]:
        return vectors
    vectors = vectors[:, :dim]
    norms = np.sqrt(np.square(vectors, dtype=np.float64).sum(1, keepdims=True))
    return on_grid(vectors / np.where(norms > 0, norms, 1))
