"""What the tables of JSON and TOML files may hold: `Field`s, and readers that check against them.

`problem_with` describes the first violation as "expected ..., found ..."; the readers add the file
and the line. Lines of training data, settings of tasks, datasets for evaluation, side files of
checkpoints, manifests and results are declared as tables of fields beside the code that reads them.
"""

import json
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import TypeGuard, cast

from kalm_min.files import AnyPath, Object, did_you_mean, read_json, read_jsonl, read_toml

LISTED = 20  # problems shown; the rest are counted


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


def is_number(value: object, least: float = -1e30, most: float = 1e30) -> bool:
    """A number within bounds, by default those that float32 can compute with; not nan."""
    return isinstance(value, int | float) and not is_flag(value) and least <= value <= most


def is_whole(value: object, least: int = -(2**63), most: int = 2**64 - 1) -> TypeGuard[int]:
    """A whole number within bounds, by default those of 64 bits; not 1.0, true or false."""
    return isinstance(value, int) and is_number(value, least, most)


def is_label(value: object) -> bool:
    """The name or the number of a class."""
    return is_text(value) or is_whole(value)


def problem_with(
    record: Mapping[str, object], fields: Mapping[str, Field], *, extra: bool = False
) -> str | None:
    """The first violation ("expected ..., found ..."), or None. A null counts as absent.

    `extra` allows keys without a field.
    """
    for key, value in record.items():
        if (field := fields.get(key)) is None:
            if not extra:
                return f"expected the keys {', '.join(fields)}, found {describe(key)}"
        elif value is not None and (found := _misfit(value, field)):
            return f"expected {key!r} to be {field.expected}, found {found}"
    for key, field in fields.items():
        if field.required and record.get(key) is None:
            return f"expected {key!r} to be {field.expected}, found nothing"
    return None


def _misfit(value: object, field: Field) -> str | None:
    """What was found instead of a valid value or list; None if it is valid."""
    if field.items is None:
        return None if field.fits(value) else describe(value)
    if not isinstance(value, list) or (field.items and not value):
        return describe(cast("object", value))
    items = cast("list[object]", value)
    if len(items) < field.items:
        return f"{len(items)} items"
    if all(map(field.fits, items)):  # the usual case, fast
        return None
    number, item = next((n, item) for n, item in enumerate(items, 1) if not field.fits(item))
    return f"{describe(item)} as item {number}"


def describe(value: object) -> str:
    """A JSON or TOML value in a few words."""
    if isinstance(value, str):
        if not value.strip():
            return "an empty string"
        return reprlib.repr(value) if is_string(value) else "a string with half a surrogate pair"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    if is_number(value, -inf, inf) and not is_number(value):
        return "a number that is too large"
    return "nothing" if value is None else json.dumps(value, default=str)


def read_rows(
    path: AnyPath, fields: Mapping[str, Field], problems: list[str]
) -> Iterator[tuple[int, Object]]:
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


def read_settings(path: AnyPath, fields: Mapping[str, Field]) -> Object:
    """Read a TOML file of settings. Raises ValueError naming the file and what it may not hold."""
    settings = read_toml(path)
    for key in settings.keys() - fields.keys():
        near = did_you_mean(key, fields) or f"; the settings are {', '.join(fields)}"
        raise ValueError(f"{path}: expected a setting of a task, found {describe(key)}{near}")
    return _checked(path, settings, fields, extra=False)


def read_object(path: AnyPath, fields: Mapping[str, Field], *, extra: bool = False) -> Object:
    """Read a JSON file that holds an object. Raises ValueError, one sentence that names the file.

    A field that is null is left out of the object, so that `get` gives the default.
    """
    return _checked(path, read_json(path), fields, extra=extra)


def _checked(path: AnyPath, value: object, fields: Mapping[str, Field], *, extra: bool) -> Object:
    """The object, if it fits the fields."""
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {describe(value)}")
    record = cast("Object", value)
    if problem := problem_with(record, fields, extra=extra):
        raise ValueError(f"{path}: {problem}")
    return {key: one for key, one in record.items() if one is not None or key not in fields}
