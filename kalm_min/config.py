"""Frozen dataclasses <- their defaults <- a TOML file <- flags on the command line.

The dataclass is the whole declaration: the name of a field is the flag (`data.cache_dir` is
`--data.cache-dir` and `[data] cache_dir`), its annotation the type, its default the default, and
`Annotated[type, "text"]` adds the help. Whatever is wrong (an unknown name, a type, a contradiction
found by a `__post_init__`) is one sentence on stderr and exit code 2, before any other file is read.

Not here: the dataclasses themselves, which live with the code that they configure, and settings
filled in later. Paths are relative to the working directory, in a TOML file too.
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
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeGuard,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from kalm_min.files import did_you_mean, read_toml

Config = TypeVar("Config")

# What help and error messages call a type.
_NAMES: dict[object, tuple[str, str]] = {
    str: ("TEXT", "a text"),
    int: ("INT", "an integer"),
    float: ("NUMBER", "a number"),
    bool: ("true|false", "true or false"),
    Path: ("PATH", "a path"),
}
# Errors of the operating system that say that the request names a wrong path.
_WRONG_PATH = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def run(
    config_class: type[Config],
    action: Callable[[Config], int],
    argv: list[str],
    *,
    program: str,
    description: str = "",
    positional: str | None = None,
    resumable: bool = False,
) -> int:
    """The `main` of a command: parse, act, and report what a person can mend in one sentence.

    Args:
        config_class, argv, program, description, positional: as for `parse`.
        action: does the work and returns the exit code.
        resumable: whether the same command continues after an interruption or a full disk; the
            message then says so.

    Returns the exit code: that of `action`, 2 for a ValueError or a wrong path, 1 for any other
    OSError, 130 for Ctrl-C. A request is wrong on all processes alike, so under torchrun only the
    first one of each machine reports it; any process reports a disk that fails.
    """
    config = parse(
        config_class, argv, program=program, description=description, positional=positional
    )
    kept = "; what was written is kept, the same command continues" if resumable else ""
    try:
        return action(config)
    except ValueError as error:
        code, sentence = 2, f"{program}: {error}"
    except _WRONG_PATH as error:
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
    positional: str | None = None,
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
    parser = _parser(settings, program, description or config_class.__doc__ or "", positional)
    options = {name: one for name, one in settings.items() if not is_dataclass(one.kind)}
    try:
        values = {n: one.default for n, one in options.items() if one.default is not MISSING}
        if argv and argv[0].endswith(".toml"):
            values |= _from_toml(read_toml(argv[0]), argv[0], settings)
            argv = argv[1:]
        elif argv and not argv[0].startswith("-"):
            if positional is None:
                raise ValueError(f"expected a .toml file or a flag, found {argv[0]!r}")
            argv = [options[positional].flag, *argv]
        values |= _from_flags(argv, parser, options)
        missing = [option.flag for name, option in options.items() if name not in values]
        if missing:
            raise ValueError(f"{' and '.join(missing)} must be given (--help tells more)")
        return _build(config_class, values)
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
        if is_dataclass(setting.kind):
            tables[setting.name] = [f"[{setting.name}]\n"]
        else:
            tables[section].append(f"{key} = {_toml_value(setting.default)}\n")
    return "\n".join("".join(lines) for lines in tables.values() if lines)


def _is_first_process() -> bool:
    """Whether this is the only process, or the first one of this machine under torchrun."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@dataclass(frozen=True, slots=True)
class _Setting:
    name: str  # dotted, e.g. "data.cache_dir"
    kind: object  # its annotation; a dataclass for a section
    default: object  # MISSING if it must be given
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def key(self) -> str:
        """How a TOML file spells it."""
        section, _, key = self.name.rpartition(".")
        return f"[{section}] {key}" if section else key


def _settings(cls: type, instance: object = None, prefix: str = "") -> Iterator[_Setting]:
    """Every field of a tree of dataclasses, sections before their fields.

    The defaults are the values of `instance` where given.
    """
    for name, kind, text, default in _fields(cls):
        if instance is not None:
            default = getattr(instance, name)
        if _is_section(kind):
            yield _Setting(prefix + name, kind, default, (kind.__doc__ or "").split("\n")[0])
            nested = None if default is MISSING else default
            yield from _settings(kind, nested, f"{prefix}{name}.")
        else:
            yield _Setting(prefix + name, kind, default, text)


def _fields(cls: Any) -> Iterator[tuple[str, object, str, object]]:
    """(name, type, help, default) of each field of a dataclass, inherited ones too."""
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        kind, text = hints[field.name], ""
        if get_origin(kind) is Annotated:
            kind, text = get_args(kind)
        factory = field.default_factory
        yield field.name, kind, text, field.default if factory is MISSING else factory()


def _is_section(kind: object) -> TypeGuard[type]:
    return is_dataclass(kind)


def _is_list(value: object) -> TypeGuard[list[object] | tuple[object, ...]]:
    return isinstance(value, list | tuple)


def _is_table(value: object) -> TypeGuard[dict[str, object]]:
    return isinstance(value, dict)


def _parser(
    settings: dict[str, _Setting], program: str, description: str, positional: str | None
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
        default = setting.default
        shown = "required" if default is MISSING else f"default: {_shown(default)}"
        groups[name.rpartition(".")[0]].add_argument(
            setting.flag,
            dest=name,
            help=f"{setting.help} ({shown})".strip().replace("%", "%%"),
            **_arity(setting.kind),
        )
    return parser


def _arity(kind: object) -> dict[str, Any]:
    """How many words argparse gives an option, and what `--help` calls them."""
    inner = _without_none(kind)
    origin, items = get_origin(inner), get_args(inner)
    if origin is Literal:
        return {"metavar": "{" + ",".join(map(str, items)) + "}"}
    if origin in (tuple, list):
        # "none" is a single word, so argparse can only count where None is not allowed.
        fixed = origin is tuple and Ellipsis not in items and inner is kind
        return {"nargs": len(items) if fixed else "+", "metavar": _NAMES[items[0]][0]}
    metavar = _NAMES[inner][0]
    return {"metavar": metavar, **({"nargs": "?", "const": "true"} if inner is bool else {})}


def _from_flags(
    argv: list[str], parser: argparse.ArgumentParser, options: dict[str, _Setting]
) -> dict[str, object]:
    # `--rank_range=x` is accepted for `--rank-range=x`.
    dashed = [re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in argv]
    given, rest = parser.parse_known_args(dashed)
    for word in rest:
        if word.startswith("-"):
            name = word.partition("=")[0]
            raise ValueError(_unknown("flag", name, [one.flag for one in options.values()]))
        raise ValueError(f"expected a flag, found {word!r} (a TOML file comes first)")
    return {
        name: _checked(value, options[name].kind, options[name].flag, text=True)
        for name, value in vars(given).items()
    }


def _from_toml(
    table: dict[str, object], path: str, settings: dict[str, _Setting], prefix: str = ""
) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in table.items():
        setting = settings.get(prefix + key)
        if setting is None:
            known = [one.key for one in settings.values() if not is_dataclass(one.kind)]
            unknown = _Setting(prefix + key, None, None, "")
            raise ValueError(f"{path}: {_unknown('key', unknown.key, known)}")
        if not is_dataclass(setting.kind):
            where = f"{path}: {setting.key}"
            values[setting.name] = _checked(value, setting.kind, where, text=False)
        elif _is_table(value):
            values |= _from_toml(value, path, settings, f"{setting.name}.")
        else:
            name = setting.name
            raise ValueError(f"{path}: expected a table [{name}], found {name} = {value!r}")
    return values


def _unknown(noun: str, name: str, known: Iterable[str]) -> str:
    return f"unknown {noun} {name}{did_you_mean(name, known) or ' (--help lists them all)'}"


def _checked(value: object, kind: object, where: str, *, text: bool) -> object:
    try:
        return _convert(value, kind, text=text)
    except ValueError as error:
        found = " ".join(map(str, value)) if text and _is_list(value) else value
        raise ValueError(f"{where}: expected {_format_kind(kind)}, found {found!r}") from error


def _convert(value: object, kind: object, *, text: bool) -> object:
    """Turn the words of a flag (`text`) or a TOML value into `kind`. Raises a bare ValueError."""
    inner = _without_none(kind)
    word = value[0] if _is_list(value) and len(value) == 1 else value
    if inner is not kind and isinstance(word, str) and word.lower() == "none":
        return None
    origin, items = get_origin(inner), get_args(inner)
    if origin is Literal:
        # Compared with its type: True is not the choice 1.
        for choice in items:
            if value == str(choice) if text else (value, type(value)) == (choice, type(choice)):
                return choice
        raise ValueError
    if origin in (tuple, list):
        if not _is_list(value):
            raise ValueError
        kinds = items[:1] * len(value) if origin is list or Ellipsis in items else items
        converted = (_convert(one, item, text=text) for one, item in zip(value, kinds, strict=True))
        return tuple(converted) if origin is tuple else list(converted)
    if isinstance(value, str):
        if inner is Path and value:
            value = Path(value)
        elif text and inner is bool:
            value = {"true": True, "false": False}.get(value.lower())
        elif text and inner is int:
            value = int(value)
        elif text and inner is float:
            value = float(value)
    elif inner is float and type(value) is int:
        value = float(value)
    # bool is a subclass of int, but `batch_size = true` is a mistake; so is a number that is nan.
    is_kind = isinstance(inner, type) and isinstance(value, inner)
    if not is_kind or (isinstance(value, bool) and inner is not bool) or value != value:
        raise ValueError
    return value


def _without_none(kind: object) -> object:
    """X of `X | None`; any other type as it is."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    kinds = [one for one in get_args(kind) if one is not NoneType]
    assert len(kinds) == 1, f"a setting has one type, or that type or None, not {kind}"
    return kinds[0]


def _format_kind(kind: object) -> str:
    inner, items = _without_none(kind), get_args(kind)
    if inner is not kind:
        return f"{_format_kind(inner)} or none"
    if get_origin(kind) is Literal:
        return " or ".join(map(str, items))
    if get_origin(kind) is list or Ellipsis in items:
        return f"a list, each {_format_kind(items[0])}"
    if get_origin(kind) is tuple:
        return f"{len(items)} values ({', '.join(map(_format_kind, items))})"
    return _NAMES[kind][1]


def _shown(value: object) -> str:
    """A default as one would type it on the command line."""
    if _is_list(value):
        return " ".join(map(_shown, value)) or "nothing"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    word = str(value)
    return word if re.fullmatch(r"\S+", word) else json.dumps(word, ensure_ascii=False)


def _toml_value(value: object) -> str:
    if _is_list(value):
        return f"[{', '.join(map(_toml_value, value))}]"
    if value is None:
        return '"none"'
    if isinstance(value, bool | int | float):
        return str(value).lower()
    # A TOML basic string is a JSON string, but for DEL, which TOML wants escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _build(cls: type[Config], values: dict[str, object], prefix: str = "") -> Config:
    """Construct the tree of dataclasses from dotted names."""
    arguments: dict[str, object] = {
        name: _build(kind, values, f"{prefix}{name}.")
        if _is_section(kind)
        else values[prefix + name]
        for name, kind, *_ in _fields(cls)
    }
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"[{prefix[:-1]}] {error}" if prefix else str(error)) from error
