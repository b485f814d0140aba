"""What rows and settings may hold: tables of `Field`s, and the check against them.

`problem_with` describes the first violation as "expected ..., found ...", to which the caller adds
file and line. This module declares a line of training data (LINE) and the settings of a task
(TaskSettings). Datasets for evaluation declare their own tables and use the same check.
"""

import json
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeGuard, cast, get_type_hints

from kalm_min.files import did_you_mean, read_jsonl, read_toml

LISTED = 20  # problems shown; the rest are counted

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Field:
    """What the value of a key must be."""

    expected: str  # in words: "a list of numbers"
    fits: Callable[[object], bool]  # for the value, or for each item of a list
    items: int | None = None  # the minimum number of items of a list; None for a single value
    required: bool = False


def is_string(value: object) -> TypeGuard[str]:
    """A string that UTF-8 can encode, unlike half a surrogate pair, which JSON can contain."""
    return isinstance(value, str) and (
        value.isascii() or value.encode("utf-8", "ignore").decode() == value
    )


def is_text(value: object) -> bool:
    """A string that holds more than white space."""
    return is_string(value) and value != "" and not value.isspace()


def is_flag(value: object) -> bool:
    """True or false, not 0 or 1."""
    return isinstance(value, bool)


def is_number(value: object, least: float = -1e300) -> bool:
    """A finite number of at least `least`; the comparison is false for nan."""
    return isinstance(value, int | float) and not is_flag(value) and least <= value < 1e300


def is_label(value: object) -> bool:
    """The name or the number of a class."""
    return is_text(value) or (isinstance(value, int) and not is_flag(value))


_FLAG = Field("true or false", is_flag)
LINE = {  # the keys of a line of training data, in the usual order
    "query": Field("a non-empty string", is_text, required=True),
    "pos": Field("a list of at least one non-empty string", is_text, items=0),
    "neg": Field("a list of non-empty strings", is_text, items=0),
    "task": Field("a non-empty string", is_text),
    "instruction": Field("a string", is_string),
    "group": Field("a non-empty string or a whole number", is_label),
    "pos_scores": Field("a list of numbers", is_number, items=0),
    "neg_scores": Field("a list of numbers", is_number, items=0),
    "relevance": Field("a number", is_number),
}


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """What `<task>.toml` beside the data may set."""

    # For lines without an instruction. "" means none, even if the run has a default.
    instruction: Annotated[str | None, LINE["instruction"]] = None
    # Queries and documents are of one kind (similarity, duplicates): both get the instruction.
    symmetric: Annotated[bool, _FLAG] = False
    # False: the candidates of a query are only the documents of its line.
    in_batch_negatives: Annotated[bool, _FLAG] = True
    # Positives are other texts of the line's group, negatives texts of other groups;
    # what the lines hold as "pos" and "neg" is not trained on, and "pos" may be absent.
    label_based: Annotated[bool, _FLAG] = False
    # How often an epoch takes each example; 0.5 is half of them, a new half in each epoch.
    weight: Annotated[float, Field("a number, 0 or more", lambda v: is_number(v, least=0))] = 1.0
    # The maximum number of examples per epoch, a new subset in each epoch.
    max_examples: Annotated[
        int | None,
        Field("a whole number, 1 or more", lambda v: isinstance(v, int) and is_number(v, least=1)),
    ] = None


SETTINGS: dict[str, Field] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(TaskSettings, include_extras=True).items()
}


def problem_with(
    record: Mapping[str, object], fields: Mapping[str, Field], *, extra: bool = False
) -> str | None:
    """The first violation ("expected ..., found ..."), or None. A null counts as absent.

    `extra` allows keys without a field.
    """
    for key, value in record.items():
        if (field := fields.get(key)) is None:
            if not extra:
                return f"expected the keys {', '.join(fields)}, found {key!r}"
        elif value is not None and (found := _misfit(value, field)):
            return f"expected {key!r} to be {field.expected}, found {found}"
    for key, field in fields.items():
        if field.required and record.get(key) is None:
            return f"expected {key!r} to be {field.expected}, found nothing"
    return None


def _misfit(value: object, field: Field) -> str | None:
    """What was found instead of a valid value or list; None if it is valid."""
    if field.items is None:
        return None if field.fits(value) else _describe(value)
    if not isinstance(value, list) or (field.items and not value):
        return _describe(cast("object", value))
    items = cast("list[object]", value)
    if len(items) < field.items:
        return f"{len(items)} items"
    if all(map(field.fits, items)):  # the usual case, fast
        return None
    number, item = next((n, item) for n, item in enumerate(items, 1) if not field.fits(item))
    return f"{_describe(item)} as item {number}"


def _describe(value: object) -> str:
    """A JSON or TOML value in words."""
    if isinstance(value, str):
        if not value.strip():
            return "an empty string"
        return reprlib.repr(value) if is_string(value) else "a string with half a surrogate pair"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    return "nothing" if value is None else json.dumps(value, default=str)


def problem_with_line(record: Row) -> str | None:
    """What is wrong with a line of training data, or None.

    A line with a group may have no positives: a label-based task draws them from the group.
    """
    if problem := problem_with(record, LINE):
        return problem
    if not record.get("pos") and record.get("group") is None:
        return f"expected 'pos' to be {LINE['pos'].expected}, found {_describe(record.get('pos'))}"
    for key in ("pos", "neg"):
        scores, texts = record.get(f"{key}_scores"), record.get(key) or ()
        if scores is not None and len(scores) != len(texts):
            wanted = f"one number per {key!r}, {len(texts)}"
            return f"expected '{key}_scores' to hold {wanted}, found {len(scores)}"
    return None


def read_rows(
    path: Path, fields: Mapping[str, Field], problems: list[str]
) -> Iterator[tuple[int, Row]]:
    """Yield (line number, row) for each good row of a .jsonl or .jsonl.gz file.

    For each other row `file:line: expected ..., found ...` is appended to `problems`.
    """
    for number, row in read_jsonl(path, problems):
        if problem := problem_with(row, fields, extra=True):
            problems.append(f"{path}:{number}: {problem}")
        else:
            yield number, row


def list_problems(count: int, noun: str, problems: Sequence[str]) -> str:
    """`30 bad rows, the first 20:` and the first problems, one per line."""
    first = f", the first {LISTED}" if count > LISTED else ""
    return "\n  ".join([f"{count} {noun}{'s' if count > 1 else ''}{first}:", *problems[:LISTED]])


def read_settings(path: Path, fields: Mapping[str, Field]) -> Row:
    """Read a TOML file of settings. Raises ValueError naming the file and what it may not hold."""
    settings = read_toml(path)
    for key in settings.keys() - fields.keys():
        near = did_you_mean(key, fields) or f"; the settings are {', '.join(fields)}"
        raise ValueError(f"{path}: expected a setting of a task, found {key!r}{near}")
    if problem := problem_with(settings, fields):
        raise ValueError(f"{path}: {problem}")
    return settings
