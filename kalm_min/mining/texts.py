"""The numbered texts of a task: one pass over its rows, after which everything is arrays.

    rows -> queries    (unique by instruction and text)
         -> documents  (unique by text: positives, then negatives, in order of appearance)
         -> the query and the documents of each row, and what the rows say about texts

A text is a 64-bit hash and the position (row, slot) where it can be read again, so a task of many
millions of rows is never a list of strings.
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
from kalm_min.files import Object, atomic_write, digest, text_hash, text_key
from kalm_min.schema import Field, is_text, problem_with
from kalm_min.topk import Ints
from kalm_min.vectors import TextSet

Table = NDArray[np.void]
Bools = NDArray[np.bool_]
# A text: hash and key without instruction, number of the instruction, where to read it (slot 0 is
# the query, followed by positives and negatives), characters with instruction.
TEXT = np.dtype([(x, np.int64) for x in ("hash", "key", "instruction", "row", "slot", "size")])
# In place of an instruction that neither the line, the task nor the run gives: the prompt that the
# model stores for queries or documents, as in training. No instruction begins with a NUL.
STORED = {"query": "\0query", "document": "\0document"}
_POOL = {"text": Field("a non-empty string of valid Unicode", is_text, required=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextIndex:
    """The texts of a task and how its R rows use them."""

    first: int  # number of its first row in TrainingData; its rows are consecutive
    instructions: tuple[str, ...]  # the distinct ones; "" for none, or one of STORED
    queries: Table  # (n,) of TEXT
    documents: Table  # (n,) of TEXT
    row_query: Ints  # (R,) the number of each row's query
    starts: Ints  # (R + 1,) row r has texts[starts[r] : starts[r + 1]]
    texts: Ints  # (P,) numbers of documents: a row's positives, then the negatives it keeps
    is_positive: Bools  # (P,)
    groups: Ints  # (R,) hash of the task and the class label; 0 for none
    labelled: int  # negatives in the lines
    symmetric: bool  # a query is an answer to its positives
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
            arrays = {name: one if one.ndim else one.item() for name, one in file.items()}
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
            size = len(instruction) + len(text)
            self._table.extend((code, text_key(text), prompt, row, slot, size))
        return number

    def table(self) -> Table:
        return np.frombuffer(self._table.tobytes(), TEXT)


def index_task(data: TrainingData, task: int, *, as_corpus: bool, keep: bool) -> TextIndex:
    """Read task number `task` once.

    Its negatives are documents too if it is its own corpus (`as_corpus`), or if its rows `keep`
    them. A document with several instructions (in a symmetric task) is encoded with the first.
    """
    first, symmetric = sum(data.task_sizes[:task]), data.settings[task].symmetric
    instructions: dict[str, int] = {}
    queries, documents = _UniqueTexts(instructions), _UniqueTexts(instructions)
    row_query, texts, is_positive, groups, hashes = (array("q") for _ in range(5))
    starts, labelled = array("q", [0]), 0
    for row in range(first, first + data.task_sizes[task]):
        record = data.record(row)
        # Without the negatives that a label-based task draws: none is used.
        example = data.example(row, epoch=0, seed=0, num_negatives=0)
        instruction = STORED["query"] if example.instruction is None else example.instruction
        group, of_documents = example.group, instruction if symmetric else STORED["document"]
        hashes.append(text_hash(json.dumps([record, instruction, of_documents])))
        query, *listed = _texts(record)
        row_query.append(queries.add(query, instruction, row, 0, apart=True))
        count = len(record.get("pos") or ())
        labelled += len(listed) - count
        listed = listed if as_corpus or keep else listed[:count]
        numbers = [documents.add(text, of_documents, row, i) for i, text in enumerate(listed, 1)]
        own = [*numbers[:count], *dict.fromkeys(numbers[count:] if keep else ())]
        texts.extend(own)
        is_positive.extend(number < count for number in range(len(own)))
        starts.append(len(texts))
        # With the task, since label "1" of one task is not label "1" of another.
        label = json.dumps([data.task_names[task], group])
        groups.append(0 if group is None else text_hash(label))
    return TextIndex(
        first=first,
        instructions=tuple(instructions),
        queries=queries.table(),
        documents=documents.table(),
        row_query=np.array(row_query),
        starts=np.array(starts),
        texts=np.array(texts),
        is_positive=np.array(is_positive, np.bool_),
        groups=np.array(groups),
        labelled=labelled,
        symmetric=symmetric,
        fingerprint=digest(hashes.tobytes()),
    )


def _texts(record: Object) -> list[str]:
    """The query, the positives and the negatives of a line."""
    return [record["query"], *(record.get("pos") or ()), *(record.get("neg") or ())]


def text_sets(data: TrainingData, index: TextIndex) -> list[TextSet]:
    """The queries and the documents of a task, with the plain instructions as prompts."""
    # The texts of a row are read together.
    texts = lru_cache(maxsize=1)(lambda row: _texts(data.record(row)))
    tables = (index.queries, index.documents)
    return [_text_set(one, index.instructions, lambda r, slot: texts(r)[slot]) for one in tables]


def open_pool(path: Path, cache_dir: Path | None = None) -> tuple[TextSet, Ints]:
    """The unique texts of a JSONL(.gz) file of {"text"}, and their keys.

    Raises ValueError with file:line for a line that holds no text.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        raise ValueError(f'{path}: expected a JSONL(.gz) file of {{"text"}} to mine, found {found}')
    file, unique = JsonlFile(path, cache_dir), _UniqueTexts({})
    for row in range(len(file)):
        record = file[row]
        if problem := problem_with(record, _POOL, extra=True):
            raise ValueError(f"{file.location(row)}: {problem}")
        unique.add(record["text"], STORED["document"], row, 0)
    table, prompts = unique.table(), (STORED["document"],)
    return _text_set(table, prompts, lambda row, slot: file[row]["text"]), table["key"].copy()


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
