"""The numbered texts of a task: one pass over its rows, after which everything is arrays.

    rows -> queries    (unique by instruction and text)
         -> documents  (unique by text: positives, then negatives, in order of appearance)
         -> the query and the positives of each row

A text is a 64-bit hash and the position (row, slot) where it can be read again, so a task of many
millions of rows is never a list of strings. The numbers are a function of the data alone.
"""

import json
from array import array
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kalm_min.data import JsonlFile, TrainingData
from kalm_min.files import atomic_write, digest, text_hash
from kalm_min.schema import Field, is_text, problem_with
from kalm_min.topk import Ints
from kalm_min.vectors import TextSet

Table = NDArray[np.void]
# A text: hash without instruction, number of the instruction, where to read it (slot 0 is the
# query, followed by positives and negatives), characters with instruction.
TEXT = np.dtype([(name, np.int64) for name in ("hash", "instruction", "row", "slot", "size")])
_POOL = {"text": Field("a non-empty string of valid Unicode", is_text, required=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextIndex:
    """The texts of a task and how its R rows use them."""

    first: int  # number of its first row in TrainingData; its rows are consecutive
    instructions: tuple[str, ...]  # the distinct ones; "" for none
    queries: Table  # (n,) of TEXT
    documents: Table  # (n,) of TEXT
    row_query: Ints  # (R,) the number of each row's query
    starts: Ints  # (R + 1,) row r has positives[starts[r] : starts[r + 1]]
    positives: Ints  # (P,) numbers of documents
    groups: Ints  # (R,) hash of the class label; 0 for none
    fingerprint: str  # a digest of every row, which changes with anything in the task

    def __len__(self) -> int:
        return len(self.row_query)

    def save(self, path: Path) -> None:
        """Write an .npz file, complete or not at all."""
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays["instructions"] = json.dumps(self.instructions)
        with atomic_write(path) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> "TextIndex":
        """Read a file that `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            arrays = dict[str, Any](file)
        for name in ("first", "fingerprint", "instructions"):
            arrays[name] = arrays[name].item()
        arrays["instructions"] = tuple(json.loads(arrays["instructions"]))
        return cls(**arrays)


class _UniqueTexts:
    """Collects unique texts in order of appearance."""

    def __init__(self, instructions: dict[str, int]) -> None:
        self._numbers: dict[int, int] = {}
        self._instructions, self._table = instructions, array("q")

    def add(self, text: str, instruction: str, row: int, slot: int, *, apart: bool = False) -> int:
        """Return the text's number; `apart` separates equal texts with different instructions."""
        code = text_hash(text)
        prompt = self._instructions.setdefault(instruction, len(self._instructions))
        number = self._numbers.setdefault(code + (prompt << 64 if apart else 0), len(self._numbers))
        if number == len(self._table) // len(TEXT.names or ()):
            self._table.extend((code, prompt, row, slot, len(instruction) + len(text)))
        return number

    def table(self) -> Table:
        return np.frombuffer(self._table.tobytes(), TEXT)


def index_task(data: TrainingData, task: int, *, with_negatives: bool) -> TextIndex:
    """Read task number `task` once; its negatives are documents too if it is its own corpus.

    A document that occurs with several instructions in a symmetric task is encoded with the first
    of them.
    """
    first = sum(data.task_sizes[:task])
    instructions: dict[str, int] = {}
    queries, documents = _UniqueTexts(instructions), _UniqueTexts(instructions)
    row_query, positives, groups, starts, hashes = (array("q") for _ in range(5))
    starts.append(0)
    for row in range(first, first + data.task_sizes[task]):
        example = data[row]
        instruction = example.instruction or ""
        of_documents = instruction if example.symmetric else ""
        hashes.append(text_hash(json.dumps([data.record(row), instruction, of_documents])))
        row_query.append(queries.add(example.query, instruction, row, 0, apart=True))
        texts = example.positives + (example.negatives if with_negatives else ())
        numbers = [documents.add(text, of_documents, row, i) for i, text in enumerate(texts, 1)]
        positives.extend(numbers[: len(example.positives)])
        starts.append(len(positives))
        groups.append(0 if example.group is None else text_hash(json.dumps(example.group)))
    return TextIndex(
        first=first,
        instructions=tuple(instructions),
        queries=queries.table(),
        documents=documents.table(),
        row_query=np.array(row_query),
        starts=np.array(starts),
        positives=np.array(positives),
        groups=np.array(groups),
        fingerprint=digest(hashes.tobytes()),
    )


def text_sets(data: TrainingData, index: TextIndex) -> list[TextSet]:
    """The queries and the documents of a task, with the plain instructions as prompts."""

    @lru_cache(maxsize=1)  # the texts of a row are read together
    def texts(row: int) -> tuple[str, ...]:
        example = data[row]
        return (example.query, *example.positives, *example.negatives)

    tables = (index.queries, index.documents)
    return [
        _text_set(one, index.instructions, lambda row, slot: texts(row)[slot]) for one in tables
    ]


def open_pool(path: Path, cache_dir: Path | None = None) -> TextSet:
    """The unique texts of a JSONL(.gz) file of {"text"}. Raises ValueError with file:line."""
    file, unique = JsonlFile(path, cache_dir), _UniqueTexts({})
    for row in range(len(file)):
        record = file[row]
        if problem := problem_with(record, _POOL, extra=True):
            raise ValueError(f"{file.location(row)}: {problem}")
        unique.add(record["text"], "", row, 0)
    return _text_set(unique.table(), ("",), lambda row, slot: file[row]["text"])


def _text_set(
    table: Table, instructions: tuple[str, ...], read: Callable[[int, int], str]
) -> TextSet:
    """The texts of a table of TEXT, each of which read(row, slot) returns."""
    rows_and_slots = table[["row", "slot"]]
    return TextSet(
        hashes=table["hash"],
        sizes=table["size"],
        prompts=instructions,
        prompt_ids=table["instruction"],
        read=lambda start, stop: [read(*at) for at in rows_and_slots[start:stop].tolist()],
    )
