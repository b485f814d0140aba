"""Frozen dataclasses <- their defaults <- a TOML file <- flags on the command line.

The dataclass is the whole declaration: a field's name is the flag (`data.cache_dir` is
`--data.cache-dir` and `[data] cache_dir`), its annotation the type, its default the default, and the
string literal under it the help. Whatever is wrong (an unknown name, a type, a contradiction found
by a `__post_init__`) is one sentence on stderr and exit code 2, before anything has been read.

Not here: the dataclasses themselves, which live with the code they steer, and any setting filled in
later. Paths are relative to the working directory, in a TOML file too.
"""

import argparse
import ast
import difflib
import inspect
import json
import math
import re
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    NoReturn,
    TypeGuard,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

Config = TypeVar("Config")

_NOUNS = {
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    Path: "a path",
}
_METAVARS = {str: "TEXT", int: "INT", float: "NUMBER", bool: "true|false", Path: "PATH"}


def parse(config_class: type[Config], argv: list[str], *, program: str, description: str) -> Config:
    """Read a configuration: defaults, then an optional leading TOML file, then flags.

    Args:
        config_class: a dataclass; its nested dataclasses are the sections.
        argv: the arguments without the program's name, e.g. `["run.toml", "--data.path", "x"]`.
        program: the name that opens the usage line and the errors.
        description: one or two sentences for `--help`.

    Exits with code 2 and one sentence on stderr for what a person got wrong, 0 for `--help`.
    """
    options = {option.name: option for option in _options(config_class)}
    parser = _parser(config_class, options, program, description)
    try:
        values = {
            name: option.default
            for name, option in options.items()
            if option.default is not MISSING
        }
        if argv and not argv[0].startswith("-"):
            values |= _read_toml(argv[0], options)
            argv = argv[1:]
        values |= _read_flags(argv, parser, options)
        missing = [option.flag for name, option in options.items() if name not in values]
        if missing:
            raise _ConfigError(f"{' and '.join(missing)} must be given (--help tells more)")
        return _build(config_class, values)
    except _ConfigError as error:
        parser.exit(2, f"{program}: {error}\n")


def to_toml(config: object) -> str:
    """Write every setting of a configuration as TOML, such that `parse` reads it back equal.

    None is written as the text "none", which is how a file or a flag asks for it.
    """
    sections: dict[str, list[str]] = {}
    for option in _options(type(config), config):
        section, _, key = option.name.rpartition(".")
        lines = sections.setdefault(section, [])
        lines.append(f"{key} = {_toml_value(option.default)}\n")
    tables = [
        (f"[{section}]\n" if section else "") + "".join(lines)
        # A top-level key written after a table header would belong to that table.
        for section, lines in sorted(sections.items(), key=lambda item: item[0] != "")
    ]
    return "\n".join(tables)


class _ConfigError(ValueError):
    """A sentence for the person who wrote the configuration."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Replace argparse's usage dump by our one sentence."""
        raise _ConfigError(message.removeprefix("argument "))


@dataclass(frozen=True, slots=True)
class _Option:
    name: str  # dotted, e.g. "data.cache_dir"
    kind: Any  # its annotation
    default: Any  # MISSING if it must be given
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _place(name: str) -> str:
    """How a TOML file spells a dotted name."""
    section, _, key = name.rpartition(".")
    return f"[{section}] {key}" if section else key


def _options(cls: type, instance: object = None, prefix: str = "") -> Iterator[_Option]:
    """Every leaf of a tree of dataclasses; the defaults are those of `instance` where given."""
    hints, helps = get_type_hints(cls), _field_helps(cls)
    for field in _fields(cls):
        default = _default(field) if instance is None else getattr(instance, field.name)
        name, kind = prefix + field.name, hints[field.name]
        if _is_section(kind):
            nested = None if default is MISSING else default
            yield from _options(kind, nested, f"{name}.")
        else:
            yield _Option(name, kind, default, helps.get(field.name, ""))


def _fields(cls: Any) -> list[Field[Any]]:
    return [field for field in fields(cls) if field.init]


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _field_helps(cls: type) -> dict[str, str]:
    """The string literal right under each field, which Python itself throws away."""
    helps: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except OSError:  # No source at hand (an interactive session): help without sentences.
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, below in pairwise(body):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    helps[name] = " ".join(text.split())
                case _:
                    pass
    return helps


def _parser(
    config_class: type, options: dict[str, _Option], program: str, description: str
) -> _Parser:
    parser = _Parser(
        prog=program,
        usage=f"{program} [FILE.toml] [--NAME VALUE ...]",
        description=description,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    titles = dict(_sections(config_class))
    groups = {name: parser.add_argument_group(title) for name, title in titles.items()}
    for option in options.values():
        shown = "required" if option.default is MISSING else f"default: {_shown(option.default)}"
        groups[option.name.rpartition(".")[0]].add_argument(
            option.flag,
            dest=option.name,
            help=f"{option.help} ({shown})".strip().replace("%", "%%"),
            **_arity(option.kind),
        )
    return parser


def _sections(cls: type, prefix: str = "", title: str = "settings") -> Iterator[tuple[str, str]]:
    """(dotted name, heading) of each dataclass of the tree."""
    yield prefix, title
    for name, kind in get_type_hints(cls).items():
        if _is_section(kind):
            below = f"{prefix}.{name}" if prefix else name
            sentence = (inspect.getdoc(kind) or "").split("\n")[0]
            yield from _sections(kind, below, f"[{below}] {sentence}")


def _arity(kind: Any) -> dict[str, Any]:
    """How many words argparse gives an option, and what `--help` calls them."""
    inner = _without_none(kind)
    if get_origin(inner) is Literal:
        return {"metavar": "{" + ",".join(str(choice) for choice in get_args(inner)) + "}"}
    if get_origin(inner) in (tuple, list):
        items = get_args(inner)
        # "none" is a single word, so argparse can only count where None is not allowed.
        fixed = get_origin(inner) is tuple and Ellipsis not in items and inner is kind
        return {"nargs": len(items) if fixed else "+", "metavar": _METAVARS.get(items[0], "TEXT")}
    flag = {"nargs": "?", "const": "true"} if inner is bool else {}
    return {"metavar": _METAVARS[inner], **flag}


def _read_flags(argv: list[str], parser: _Parser, options: dict[str, _Option]) -> dict[str, Any]:
    given, rest = parser.parse_known_args([_dashed(word) for word in argv])
    for word in rest:
        if word.startswith("-"):
            name = word.partition("=")[0]
            raise _ConfigError(_unknown(name, name, options, "flag"))
        raise _ConfigError(f"expected a flag, found {word!r} (a TOML file comes first)")
    return {
        name: _checked(value, options[name], options[name].flag, text=True)
        for name, value in vars(given).items()
    }


def _dashed(word: str) -> str:
    """Accept `--rank_range=x` for `--rank-range=x`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _read_toml(path: str, options: dict[str, _Option]) -> dict[str, Any]:
    if not path.endswith(".toml"):
        raise _ConfigError(f"expected a .toml file or a flag, found {path!r}")
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        where = f"{path}:{line[1]}" if line else path
        raise _ConfigError(f"{where}: expected TOML, found an error: {error}") from error
    except UnicodeDecodeError as error:
        raise _ConfigError(f"{path}: expected UTF-8 text, found {error.reason}") from error
    return dict(_toml_values(tree, path, options))


def _toml_values(
    tree: dict[str, Any], path: str, options: dict[str, _Option], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = prefix + key
        is_section = any(option.startswith(f"{name}.") for option in options)
        if name in options:
            yield name, _checked(value, options[name], f"{path}: {_place(name)}", text=False)
        elif is_section and _is_table(value):
            yield from _toml_values(value, path, options, f"{name}.")
        elif is_section:
            raise _ConfigError(f"{path}: expected a table [{name}], found {name} = {value!r}")
        else:
            raise _ConfigError(f"{path}: {_unknown(name, _place(name), options, 'key')}")


def _unknown(name: str, spelled: str, options: dict[str, _Option], noun: str) -> str:
    """Say that a name is not known, and which known name is the nearest."""
    name = name.lstrip("-").replace("-", "_")
    last = {option.rpartition(".")[2]: option for option in options}
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if not near:
        near = [last[key] for key in difflib.get_close_matches(name.rpartition(".")[2], last, n=1)]
    if not near:
        return f"unknown {noun} {spelled} (--help lists them all)"
    nearest = options[near[0]].flag if noun == "flag" else _place(near[0])
    return f"unknown {noun} {spelled}, the nearest is {nearest}"


def _checked(value: Any, option: _Option, where: str, *, text: bool) -> Any:
    try:
        return _convert(value, option.kind, text=text)
    except ValueError as error:
        found = " ".join(value) if text and _is_list(value) else value
        raise _ConfigError(
            f"{where}: expected {_described(option.kind)}, found {found!r}"
        ) from error


def _convert(value: Any, kind: Any, *, text: bool) -> Any:
    """Turn the words of a flag (`text`) or a TOML value into `kind`. Raises a bare ValueError."""
    inner = _without_none(kind)
    if inner is not kind:
        word = value[0] if _is_list(value) and len(value) == 1 else value
        if isinstance(word, str) and word.lower() == "none":
            return None
    if get_origin(inner) is Literal:
        # Compared with its type: True is not the choice 1.
        choices = [one for one in get_args(inner) if value == (str(one) if text else one)]
        if not choices or not (text or type(value) is type(choices[0])):
            raise ValueError
        return choices[0]
    if get_origin(inner) in (tuple, list):
        return _convert_sequence(value, inner, text=text)
    return _convert_scalar(value, inner, text=text)


def _convert_sequence(value: Any, kind: Any, *, text: bool) -> Any:
    items = get_args(kind)
    if not _is_list(value):
        raise ValueError
    if get_origin(kind) is list or Ellipsis in items:
        items = items[:1] * len(value)
    if len(items) != len(value):
        raise ValueError
    converted = [_convert(one, item, text=text) for one, item in zip(value, items, strict=True)]
    return converted if get_origin(kind) is list else tuple(converted)


def _convert_scalar(value: Any, kind: type, *, text: bool) -> Any:
    if text and kind is bool:
        value = {"true": True, "false": False}.get(value.lower(), value)
    elif text and kind in (int, float):
        value = kind(value)
    elif kind is Path and isinstance(value, str) and value:
        value = Path(value)
    elif kind is float and type(value) is int:
        value = float(value)
    # bool is a subclass of int, but `batch_size = true` is a mistake.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError
    if isinstance(value, float) and math.isnan(value):
        raise ValueError
    return value


def _is_section(kind: Any) -> TypeGuard[type]:
    return is_dataclass(kind)


def _is_table(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _is_list(value: Any) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, list | tuple)


def _without_none(kind: Any) -> Any:
    """X of `X | None`; any other kind as it is."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    kinds = [one for one in get_args(kind) if one is not NoneType]
    assert len(kinds) == 1, f"a setting is one type, or that type or None, not {kind}"
    return kinds[0]


def _described(kind: Any) -> str:
    inner = _without_none(kind)
    if inner is not kind:
        return f"{_described(inner)} or none"
    items = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(str(choice) for choice in items)
    if get_origin(kind) is list or Ellipsis in items:
        return f"a list, each {_described(items[0])}"
    if get_origin(kind) is tuple:
        return f"{len(items)} values ({', '.join(_described(item) for item in items)})"
    return _NOUNS[kind]


def _shown(value: Any) -> str:
    """A default as one would type it on the command line."""
    if _is_list(value):
        return " ".join(_shown(item) for item in value) or "nothing"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    spelled = str(value)
    return spelled if re.fullmatch(r"\S+", spelled) else json.dumps(spelled, ensure_ascii=False)


def _toml_value(value: Any) -> str:
    if _is_list(value):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if value is None:
        return '"none"'
    if isinstance(value, bool | int | float):
        return str(value).lower()
    # A TOML basic string is a JSON string, but for DEL, which TOML wants escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _build(cls: Any, values: dict[str, Any], prefix: str = "") -> Any:
    """Construct the tree of dataclasses from dotted names."""
    arguments: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for field in _fields(cls):
        name, kind = prefix + field.name, hints[field.name]
        nested = _is_section(kind)
        arguments[field.name] = _build(kind, values, f"{name}.") if nested else values[name]
    try:
        return cls(**arguments)
    except _ConfigError:
        raise
    except ValueError as error:
        where = f"[{prefix.rstrip('.')}] " if prefix else ""
        raise _ConfigError(f"{where}{error}") from error
