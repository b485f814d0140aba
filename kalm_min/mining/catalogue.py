"""Which texts a task holds, by number: one pass over its rows, after which everything is arrays.

    rows -> queries    (unique by instruction and text)
         -> documents  (unique by text: positives, then negatives, in order of appearance)
         -> which query and which positives each row has

A text is a 64-bit hash and a place (row, slot) where it can be read again, so that a task of many
millions of rows is some arrays, never a list of strings. The numbers are a function of the data
alone: not of the model, of the number of processes, or of what was mined before.

R  rows    n  unique texts    P  positives of all rows
Not here: prompts as text, which depend on the model (store.py).
"""

import hashlib
import json
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kalm_min.data import JsonlFile, TrainingData
from kalm_min.files import atomic_write, text_hash
from kalm_min.shards import cuts

Ints = npt.NDArray[np.int64]
Read = Callable[[int, int], str]
"""(row, slot) -> the text that stands there."""

_SURROGATE = re.compile("[\ud800-\udfff]")

_FIELDS = ("hash", "prompt", "row", "slot", "size")
TEXT = np.dtype([(name, np.int64) for name in _FIELDS])
"""Of a text: hash without instruction, number of the instruction, where to read it (slot 0 is the
query, then come positives and negatives), characters."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Unique texts of one side."""

    table: npt.NDArray[np.void]
    """(n,) of TEXT."""
    instructions: tuple[str, ...]
    """The different ones; "" is none."""

    def __len__(self) -> int:
        return len(self.table)

    @property
    def hashes(self) -> Ints:
        """Of the texts, (n,)."""
        return self.table["hash"]

    def take(self, numbers: Ints) -> "Texts":
        """Some of them, in the order given."""
        return Texts(self.table[numbers], self.instructions)

    def fingerprint(self) -> str:
        """Of the texts, in order."""
        return hashlib.blake2b(self.hashes.tobytes(), digest_size=16).hexdigest()

    def cuts(self) -> Ints:
        """(shards + 1,) bounds of the shards: texts cuts[i] to cuts[i + 1] are shard i."""
        return cuts(self.hashes, self.table["size"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """The texts of a task and how its rows use them."""

    first: int
    """Number of its first row in TrainingData; its rows follow one another."""
    queries: Texts
    documents: Texts
    row_query: Ints
    """(R,) number of each row's query."""
    starts: Ints
    """(R + 1,) row r has positives[starts[r] : starts[r + 1]]."""
    positives: Ints
    """(P,) numbers of documents."""
    groups: Ints
    """(R,) hash of the class label; 0 is none."""
    fingerprint: str
    """Of every row, whole: changes when anything in the task does."""

    @property
    def size(self) -> int:
        """R."""
        return len(self.row_query)

    def save(self, path: Path) -> None:
        """Write an .npz file, complete or not at all."""
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        sides: list[Texts] = [arrays[side] for side in ("queries", "documents")]
        arrays |= {"queries": sides[0].table, "documents": sides[1].table}
        instructions = json.dumps([side.instructions for side in sides])
        with atomic_write(path) as file:
            np.savez(file, instructions=np.array(instructions), **arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        instructions = json.loads(str(arrays.pop("instructions")))
        for side, own in zip(("queries", "documents"), instructions, strict=True):
            arrays[side] = Texts(arrays[side], tuple(own))
        first, fingerprint = int(arrays.pop("first")), str(arrays.pop("fingerprint"))
        return cls(first=first, fingerprint=fingerprint, **arrays)


class _Gathered:
    """Collects unique texts in order of appearance."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.instructions: dict[str, int] = {}
        self.table = array("q")

    def add(self, text: str, instruction: str, row: int, slot: int, *, apart: bool = False) -> int:
        """The text's number; `apart` tells equal texts with different instructions apart."""
        code = text_hash(text)
        prompt = self.instructions.setdefault(instruction, len(self.instructions))
        number = self.numbers.setdefault(code + (prompt << 64 if apart else 0), len(self.numbers))
        if number * len(_FIELDS) == len(self.table):
            self.table.extend((code, prompt, row, slot, len(instruction) + len(text)))
        return number

    def texts(self) -> Texts:
        return Texts(np.frombuffer(self.table.tobytes(), TEXT), tuple(self.instructions))


def catalogue_task(data: TrainingData, task: int, *, with_negatives: bool) -> Catalogue:
    """Read a task once.

    Args:
        data: the opened data.
        task: its number in data.task_names.
        with_negatives: whether the negatives of the rows are documents too, as where a task is its
            own corpus; with a pool only the positives are.

    A document that several rows of a symmetric task bring under different instructions is encoded
    with the first one's.
    """
    first = sum(data.task_sizes[:task])
    queries, documents = _Gathered(), _Gathered()
    row_query, positives, groups, starts = array("q"), array("q"), array("q"), array("q", [0])
    digest = hashlib.blake2b(digest_size=16)
    for row in range(first, first + data.task_sizes[task]):
        example = data[row]
        instruction = example.instruction or ""
        inner = instruction if example.symmetric else ""
        digest.update(json.dumps([data.record(row), instruction, inner]).encode())
        row_query.append(queries.add(example.query, instruction, row, 0, apart=True))
        texts = example.positives + (example.negatives if with_negatives else ())
        numbers = [
            documents.add(text, inner, row, slot) for slot, text in enumerate(texts, start=1)
        ]
        positives.extend(numbers[: len(example.positives)])
        starts.append(len(positives))
        groups.append(0 if example.group is None else text_hash(example.group))
    return Catalogue(
        first=first,
        queries=queries.texts(),
        documents=documents.texts(),
        row_query=np.array(row_query, np.int64),
        starts=np.array(starts, np.int64),
        positives=np.array(positives, np.int64),
        groups=np.array(groups, np.int64),
        fingerprint=digest.hexdigest(),
    )


def text_reader(data: TrainingData) -> Read:
    """Reads a text again; the row read last is kept, as its texts come together."""
    last: list[Any] = [-1, ()]

    def read(row: int, slot: int) -> str:
        if last[0] != row:
            example = data[row]
            last[:] = row, (example.query, *example.positives, *example.negatives)
        return last[1][slot]

    return read


def open_pool(path: Path, cache_dir: Path | None = None) -> tuple[Texts, Read]:
    """The unique texts of a JSONL(.gz) file with the key "text", and their reader.

    Raises ValueError with file:line for a line without a text in it.
    """
    file, gathered = JsonlFile(path, cache_dir), _Gathered()
    for row in range(len(file)):
        text = file[row].get("text")
        if not isinstance(text, str) or not text.strip() or _SURROGATE.search(text):
            raise ValueError(
                f'{file.location(row)}: expected the key "text" with a non-empty string of valid '
                f"Unicode, found {ascii(text) if 'text' in file[row] else 'none'}"
            )
        gathered.add(text, "", row, 0)
    return gathered.texts(), lambda row, slot: file[row]["text"]
