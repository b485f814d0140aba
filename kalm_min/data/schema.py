"""What a line of training data and a settings file of a task may hold.

A wrong one is described as "expected ..., found ...", to which the caller adds the place.

Not here: reading the lines (jsonl.py) and what becomes of them (examples.py).
"""

import difflib
import json
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """What `<task>.toml` beside the data may set."""

    instruction: str | None = None
    """For lines without their own. "" means none, even where the run has a default."""
    symmetric: bool = False
    """Both sides are of one kind (similarity, duplicates): documents get the instruction too."""
    in_batch_negatives: bool = True
    """False: a query sees its own documents only."""
    label_based: bool = False
    """Positives are other texts of the line's group, negatives texts of other groups (labels.py);
    what the lines hold as "pos" and "neg" is not trained on, and "pos" may be absent."""
    weight: float = 1.0
    """How often an epoch takes each example; 0.5 is half of them, others in each epoch."""
    max_examples: int | None = None
    """An epoch takes at most so many, others in each epoch."""


def read_settings(path: Path) -> TaskSettings:
    """Read `<task>.toml`. Raises ValueError naming the file for anything it may not hold."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected TOML in UTF-8, found: {error}") from error
    for key, value in table.items():
        if key not in _SETTINGS:
            raise ValueError(f"{path}: expected a task setting, found {nearest(key, _SETTINGS)}")
        wanted, good = _SETTINGS[key]
        if not good(value):
            raise ValueError(f"{path}: expected {key!r} to be {wanted}, found {_found(value)}")
    return TaskSettings(**table)


def nearest(name: str, known: Iterable[str]) -> str:
    """An unknown name, and the known one that may have been meant."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"{name!r}; the nearest is {match[0]!r}" if match else repr(name)


def problem_with(record: dict[str, Any]) -> str | None:
    """What is wrong with a record ("expected ..., found ..."), or None. null is absence.

    A record with a group may have no positives: a label-based task draws them from the group.
    """
    for key, value in record.items():
        if key not in _RULES:
            return f"expected the keys {', '.join(_RULES)}, found {key!r}"
        wanted, good, many = _RULES[key]
        if value is not None and (found := _unlike(value, good, many)):
            return f"expected {key!r} to be {wanted}, found {found}"
    for key in ("query", "pos"):
        if not record.get(key) and not (key == "pos" and record.get("group") is not None):
            return f"expected {key!r} to be {_RULES[key][0]}, found {_found(record.get(key))}"
    for key in ("pos", "neg"):
        scores = record.get(f"{key}_scores")
        count = len(record.get(key) or ())
        if scores is not None and len(scores) != count:
            wanted = f"one number per {key!r}, {count}"
            return f"expected '{key}_scores' to hold {wanted}, found {len(scores)}"
    return None


def _unlike(value: object, good: Callable[[object], bool], many: bool) -> str | None:
    """What was found where a good value, or a list of many, was expected; None if it is one."""
    if not many:
        return None if good(value) else _found(value)
    if not isinstance(value, list):
        return _found(value)
    items = cast("list[object]", value)
    if all(map(good, items)):  # the usual case, fast
        return None
    number, item = next((n, item) for n, item in enumerate(items, start=1) if not good(item))
    return f"{_found(item)} as item {number}"


def _is_text(value: object) -> bool:
    """A string with something in it that UTF-8 can write (half a surrogate pair it cannot)."""
    if not isinstance(value, str) or not value or value.isspace():
        return False
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_number(value: object, least: float = -1e300) -> bool:
    """A finite number; the comparison is false for nan."""
    return isinstance(value, int | float) and not _is_flag(value) and least <= value < 1e300


def _is_label(value: object) -> bool:
    return _is_text(value) or (isinstance(value, int) and not isinstance(value, bool))


# What each key must be, the test of it, and whether it is a list of such values.
_RULES: dict[str, tuple[str, Callable[[object], bool], bool]] = {
    "query": ("a non-empty string", _is_text, False),
    "pos": ("a list of at least one non-empty string", _is_text, True),
    "neg": ("a list of non-empty strings", _is_text, True),
    "task": ("a non-empty string", _is_text, False),
    "instruction": ("a string", lambda value: value == "" or _is_text(value), False),
    "group": ("a non-empty string or a whole number", _is_label, False),
    "pos_scores": ("a list of numbers", _is_number, True),
    "neg_scores": ("a list of numbers", _is_number, True),
    "relevance": ("a number", _is_number, False),
}


KEYS = tuple(_RULES)
"""Of a line, in the usual order."""

# What each setting of a task must be, and the test of it.
_SETTINGS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "instruction": ("a string", lambda value: isinstance(value, str)),
    "symmetric": ("true or false", _is_flag),
    "in_batch_negatives": ("true or false", _is_flag),
    "label_based": ("true or false", _is_flag),
    "weight": ("a number, 0 or more", lambda value: _is_number(value, least=0)),
    "max_examples": (
        "a whole number, 1 or more",
        lambda value: isinstance(value, int) and _is_number(value, least=1),
    ),
}


def _found(value: object) -> str:
    """A JSON (or TOML) value in words."""
    if isinstance(value, str):
        if not value.strip():
            return "an empty string"
        return "a string" if _is_text(value) else "a string with half a surrogate pair"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    return "nothing" if value is None else json.dumps(value, default=str)
