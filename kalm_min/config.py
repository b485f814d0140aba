"""Frozen dataclasses <- their defaults <- a TOML file <- flags on the command line.

The dataclass is the full declaration: the name of a field is the flag (`data.cache_dir` is
`--data.cache-dir` and `[data] cache_dir`), its annotation the type, its default the default, and
`Annotated[type, "text"]` adds the help. Whatever is wrong (an unknown name, a type, a contradiction
found by a `__post_init__`) is one sentence on stderr and exit code 2, before any other file is read.
Paths are relative to the working directory, in a TOML file too. The dataclasses themselves live
with the code that they configure.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import NoneType
from typing import (
    Annotated,
    Literal,
    TypeGuard,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from kalm_min.files import did_you_mean, read_toml

Config = TypeVar("Config")

# What `--help` and what error messages call a type.
_SCALARS: dict[object, tuple[str, str]] = {
    str: ("TEXT", "a text"),
    int: ("INT", "an integer"),
    float: ("NUMBER", "a number"),
    bool: ("true|false", "true or false"),
    Path: ("PATH", "a path"),
}


def run(
    config_class: type[Config],
    action: Callable[[Config], int],
    argv: list[str],
    *,
    program: str,
    resumable: bool = False,
    **options: str,
) -> int:
    """The `main` of a command: parse, act, and report what a person can mend in one sentence.

    Args:
        config_class, argv, program, options: what `parse` takes.
        action: does the work and returns the exit code.
        resumable: let messages say that the same command continues after Ctrl-C or a full disk.

    Returns the exit code: that of `action`, 2 for a ValueError or a wrong path, 1 for any other
    OSError, 130 for Ctrl-C. A request is wrong on all processes alike, so under torchrun only the
    first one of each machine reports it; any process reports a disk that fails.
    """
    config = parse(config_class, argv, program=program, **options)
    kept = "; what was written is kept, the same command continues" if resumable else ""
    try:
        return action(config)
    except ValueError as error:
        code, sentence = 2, f"{program}: {error}"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        code, sentence = 2, f"{program}: {what}"
    except OSError as error:
        code, sentence = 1, f"{program}: {error}{kept}"
    except KeyboardInterrupt:
        code, sentence = 130, f"interrupted{kept}"
    if code == 1 or _is_first_process():
        sys.stderr.write(f"{sentence}\n")
    return code


def parse(
    config_class: type[Config],
    argv: list[str],
    *,
    program: str,
    description: str = "",
    positional: str = "",
) -> Config:
    """Read a configuration: defaults, then an optional leading TOML file, then flags.

    Args:
        config_class: a dataclass; its nested dataclasses are the sections.
        argv: the arguments without the program's name, e.g. `["run.toml", "--data.path", "x"]`.
        program: the name that opens the usage line and the errors.
        description: one or two sentences for `--help`; by default the docstring of the dataclass.
        positional: a setting whose flag may be left out where its values come first.

    Exits with code 2 and one sentence on stderr for what a person got wrong, 0 for `--help`.
    """
    settings = {setting.name: setting for setting in _settings(config_class)}
    options = {name: one for name, one in settings.items() if not _is_section(one.kind)}
    parser = _parser(settings, program, description or config_class.__doc__ or "", positional)
    try:
        values = {n: one.default for n, one in options.items() if one.default is not MISSING}
        if argv and argv[0].endswith(".toml"):
            values |= _from_toml(read_toml(argv[0]), argv[0], settings)
            argv = argv[1:]
        elif argv and not argv[0].startswith("-"):
            if not positional:
                raise ValueError(f"expected a .toml file or a flag, found {argv[0]!r}")
            argv = [options[positional].flag, *argv]
        values |= _from_flags(argv, parser, options)
        missing = [option.flag for name, option in options.items() if name not in values]
        if missing:
            raise ValueError(f"{' and '.join(missing)} must be given (--help tells more)")
        return _build(config_class, values, settings)
    except (ValueError, argparse.ArgumentError) as error:
        sentence = str(error).removeprefix("argument ")
        parser.exit(2, f"{program}: {sentence}\n" if _is_first_process() else None)


def to_toml(config: object) -> str:
    """Write every setting of a configuration as TOML, such that `parse` reads it back equal.

    None is written as the text "none", which is how a file or a flag asks for it.
    """
    # A top-level key written after a table header would belong to that table.
    tables: dict[str, list[str]] = {"": []}
    for setting in _settings(type(config), config):
        section, _, key = setting.name.rpartition(".")
        if _is_section(setting.kind):
            tables[setting.name] = [f"[{setting.name}]\n"]
        else:
            tables[section].append(f"{key} = {_format(setting.default, toml=True)}\n")
    return "\n".join("".join(lines) for lines in tables.values() if lines)


def _is_first_process() -> bool:
    """Whether this is the only process, or the first one of this machine under torchrun."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@dataclass(frozen=True, slots=True)
class _Setting:
    name: str  # dotted, e.g. "data.cache_dir"
    kind: object  # its type; a dataclass for a section
    default: object  # MISSING if it must be given
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _settings(cls: type, instance: object = None, prefix: str = "") -> Iterator[_Setting]:
    """Every field of a tree of dataclasses, a section before its fields.

    The defaults are the values of `instance` where it is given.
    """
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        kind, text = hints[field.name], ""
        if get_origin(kind) is Annotated:
            kind, text = get_args(kind)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        default = getattr(instance, field.name, default)
        name = prefix + field.name
        if _is_section(kind):
            yield _Setting(name, kind, default, (kind.__doc__ or "").split("\n")[0])
            yield from _settings(kind, default, f"{name}.")
        else:
            yield _Setting(name, kind, default, text)


def _is_section(kind: object) -> TypeGuard[type]:
    return is_dataclass(kind)


def _parser(
    settings: dict[str, _Setting], program: str, description: str, positional: str
) -> argparse.ArgumentParser:
    first = f"FILE.toml | {positional.upper()}" if positional else "FILE.toml"
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} [{first}] [--NAME VALUE ...]",
        description=description,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=34),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    groups = {"": parser.add_argument_group("settings")}
    for name, setting in settings.items():
        if _is_section(setting.kind):
            groups[name] = parser.add_argument_group(f"[{name}] {setting.help}")
            continue
        required = setting.default is MISSING
        note = "(required)" if required else f"(default: {_format(setting.default, toml=False)})"
        metavar, _, nargs = _describe(setting.kind)
        groups[name.rpartition(".")[0]].add_argument(
            setting.flag,
            dest=name,
            help=f"{setting.help} {note}".strip().replace("%", "%%"),
            metavar=metavar,
            nargs=nargs,
            const="true" if nargs == "?" else None,
        )
    return parser


def _describe(kind: object) -> tuple[str, str, int | str | None]:
    """What `--help` calls a type, what an error calls it, and how many words argparse gives it."""
    inner, items = _without_none(kind)
    or_none = "" if inner is kind else " or none"
    origin = get_origin(inner)
    if origin is Literal:
        choices = [str(item) for item in items]
        return "{" + ",".join(choices) + "}", " or ".join(choices) + or_none, None
    if Ellipsis in items:
        metavar, noun, _ = _describe(items[0])
        return metavar, f"a list, each {noun}{or_none}", "+"
    if origin is tuple:
        metavar, nouns = _describe(items[0])[0], [_describe(item)[1] for item in items]
        # "none" is a single word, so argparse can only count where None is not allowed.
        count = len(items) if inner is kind else "+"
        return metavar, f"{len(items)} values ({', '.join(nouns)}){or_none}", count
    metavar, noun = _SCALARS[inner]
    return metavar, noun + or_none, "?" if inner is bool else None


def _without_none(kind: object) -> tuple[object, tuple[object, ...]]:
    """X of `X | None`, or else the type itself, and the arguments of its brackets."""
    if NoneType in get_args(kind):
        (kind,) = (one for one in get_args(kind) if one is not NoneType)
    return kind, get_args(kind)


def _from_flags(
    argv: list[str], parser: argparse.ArgumentParser, options: dict[str, _Setting]
) -> dict[str, object]:
    # `--rank_range=x` is accepted for `--rank-range=x`.
    dashed = [re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in argv]
    given, rest = parser.parse_known_args(dashed)
    for word in rest:
        if not word.startswith("-"):
            raise ValueError(f"expected a flag, found {word!r} (a TOML file comes first)")
        flags = [option.flag for option in options.values()]
        raise ValueError(_unknown("flag", word.partition("=")[0], flags))
    values: dict[str, object] = {}
    for name, value in vars(given).items():
        found = " ".join(map(str, value)) if _is_list(value) else value
        values[name] = _checked(value, options[name].kind, options[name].flag, found)
    return values


def _from_toml(
    table: dict[str, object], path: str, settings: dict[str, _Setting], prefix: str = ""
) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in table.items():
        name = prefix + key
        if name not in settings:
            raise ValueError(
                f"{path}: {_unknown('key', _toml_key(name), map(_toml_key, settings))}"
            )
        kind = settings[name].kind
        if not _is_section(kind):
            values[name] = _checked(value, kind, f"{path}: {_toml_key(name)}", value)
        elif isinstance(value, dict):
            section = cast("dict[str, object]", value)
            values |= _from_toml(section, path, settings, f"{name}.")
        else:
            raise ValueError(f"{path}: expected a table [{name}], found {name} = {value!r}")
    return values


def _toml_key(name: str) -> str:
    section, _, key = name.rpartition(".")
    return f"[{section}] {key}" if section else key


def _unknown(noun: str, name: str, known: Iterable[str]) -> str:
    return f"unknown {noun} {name}{did_you_mean(name, known) or ' (--help lists them all)'}"


def _is_list(value: object) -> TypeGuard[list[object] | tuple[object, ...]]:
    return isinstance(value, list | tuple)


def _checked(value: object, kind: object, where: str, found: object) -> object:
    try:
        return _convert(value, kind)
    except ValueError as error:
        raise ValueError(f"{where}: expected {_describe(kind)[1]}, found {found!r}") from error


def _convert(value: object, kind: object) -> object:
    """Turn the words of a flag or a TOML value into `kind`. Raises a bare ValueError."""
    inner, items = _without_none(kind)
    if inner is not kind and (value == ["none"] or str(value).lower() == "none"):
        return None
    origin = get_origin(inner)
    if origin is tuple:
        if not _is_list(value):
            raise ValueError
        kinds = items[:1] * len(value) if Ellipsis in items else items
        return tuple(_convert(one, item) for one, item in zip(value, kinds, strict=True))
    if inner is str or inner is Path:
        if not isinstance(value, str) or (inner is Path and not value):
            raise ValueError
        return inner(value)
    # As a word: TOML's true is no integer, though Python's True is one.
    word = str(value)
    if inner is int or inner is float:
        number = inner(word)
        if number != number:
            raise ValueError
        return number
    choices = {str(item): item for item in items} or {"true": True, "false": False}
    word = word if origin is Literal else word.lower()
    if word not in choices:
        raise ValueError
    return choices[word]


def _format(value: object, *, toml: bool) -> str:
    """A value as it stands in a TOML file, or as one would type it on the command line."""
    if _is_list(value):
        items = [_format(item, toml=toml) for item in value]
        return f"[{', '.join(items)}]" if toml else " ".join(items) or "nothing"
    if isinstance(value, bool | int | float):
        return str(value).lower()
    word = "none" if value is None else str(value)
    # A TOML basic string is a JSON string, but for DEL, which TOML wants escaped.
    quoted = json.dumps(word, ensure_ascii=False).replace("\x7f", "\\u007f")
    return quoted if toml or not re.fullmatch(r"\S+", word) else word


def _build(
    cls: type[Config], values: dict[str, object], settings: dict[str, _Setting], section: str = ""
) -> Config:
    """Construct the tree of dataclasses from dotted names."""
    arguments: dict[str, object] = {}
    for name, setting in settings.items():
        parent, _, key = name.rpartition(".")
        if parent == section and _is_section(setting.kind):
            arguments[key] = _build(setting.kind, values, settings, name)
        elif parent == section:
            arguments[key] = values[name]
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"[{section}] {error}" if section else str(error)) from error
