"""Settings: frozen dataclasses, filled from defaults, then a TOML file, then command-line flags.

The dataclass is the full declaration: the name of a field is the flag (`data.cache_dir` is
`--data.cache-dir` and `[data] cache_dir`), its annotation the type, its default the default, and
`Annotated[type, "text"]` adds the help. Every error (an unknown name, a wrong type, a contradiction
found by a `__post_init__`) gives one sentence on stderr and exit code 2, before any other file is
read. Paths are relative to the working directory, also in a TOML file.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

from safetensors import SafetensorError

from kalm_min.console import printable
from kalm_min.files import did_you_mean, flatten, read_toml
from kalm_min.program import begin
from kalm_min.settings import SHORT_NAMES

Config = TypeVar("Config")
_List = list[object]
_HERE = Path(__file__).parent
_RECIPES = next(filter(Path.is_dir, (_HERE / "configs", _HERE.parent / "configs")), _HERE)
# A path that the user gave is wrong, which the same command does not change.
_NO_FILE = FileNotFoundError | FileExistsError | PermissionError
_WRONG_PATHS = _NO_FILE | NotADirectoryError | IsADirectoryError
# What `--help` and what error messages call a type.
_NAMES: dict[object, tuple[str, str]] = {
    str: ("TEXT", "a text"),
    int: ("INT", "an integer"),
    float: ("NUMBER", "a number"),
    Path: ("PATH", "a path"),
}


def run(
    config_class: type[Config],
    action: Callable[[Config], int],
    argv: list[str],
    *,
    program: str = "",
    loads: str = "",
    resumable: bool = False,
    **options: str,
) -> int:
    """The `main` of a command: parse, act, and report in one sentence what a user can correct.

    `program` is its name, by default that of the module of `action`; `loads` names a module that
    takes seconds to import, once the flags are right; `options` are those of `parse`. Returns the
    exit code: that of `action`, 2 for a ValueError or a wrong path, 1 for a disk that fails (with
    the output's path where the error has none), 130 for Ctrl-C, 143 for SIGTERM. With `resumable`,
    the last two sentences add that the same command continues.
    """
    typed = sys.argv[0].startswith("kalm-min ")
    program = sys.argv[0] if typed else program or action.__module__
    config = parse(config_class, argv, program=program, **options)
    kept = "; what was written is kept, the same command continues" if resumable else ""
    try:
        if loads:
            import_module(loads)
        begin()
        return action(config)
    except ValueError as error:
        return _report(program, str(error), 2)
    except (OSError, SafetensorError) as error:
        path = getattr(error, "filename", None) or getattr(config, "output", None)
        what = f"{path}: {getattr(error, 'strerror', None) or error}" if path else str(error)
        wrong = isinstance(error, _WRONG_PATHS)
        return _report(program, what if wrong else what + kept, 2 if wrong else 1)
    except KeyboardInterrupt as error:
        sys.stderr.write(f"interrupted{kept}\n" if _is_first_process() else "")
        return 128 + (error.args[0] if error.args else signal.SIGINT)


def _report(program: str, error: str, code: int) -> int:
    """Say why a command ends; return the exit code.

    Only the first process of a machine reports a wrong request, every one a failing disk. torchrun
    prints the sentence once more, at the end of its own error message.
    """
    sentence = printable(f"{program}: {error}")
    if code == 1 or _is_first_process():
        sys.stderr.write(f"{sentence}\n")
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"message": f"\n\n{sentence}", "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": details}), encoding="utf-8")
    return code


def parse(
    config_class: type[Config],
    argv: list[str],
    *,
    program: str,
    description: str = "",
    positional: str = "",
) -> Config:
    """Read a configuration: defaults, then a TOML file that may come first, then flags.

    Nested dataclasses are sections. `description` (default: the docstring of the dataclass) begins
    `--help`. `positional` names a setting whose values may come first without its flag. Exits with
    2 and one sentence on stderr on an error, 0 after `--help`.
    """
    options = {option.name: option for option in _options(config_class)}
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} [FILE.toml{positional and f' | {positional.upper()}'}] [--NAME VALUE ...]",
        description=description or config_class.__doc__,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=34),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    groups = dict[str, Any]()
    for option in options.values():
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        groups[option.group].add_argument(
            option.flag,
            dest=option.name,
            help=option.help.replace("%", "%%"),
            metavar=option.metavar,
            nargs=option.nargs,
            const="true" if option.nargs == "?" else None,
            action="append",
        )
    values = {name: one.default for name, one in options.items() if one.default is not MISSING}
    try:
        if argv and not (positional or argv[0].startswith("-") or argv[0].endswith(".toml")):
            recipes = {path.stem: str(path) for path in _RECIPES.glob("*.toml")}
            if argv[0] not in recipes:
                found = f"found {argv[0]!r}{did_you_mean(argv[0], recipes)}"
                raise ValueError(f"expected a .toml file, the name of a recipe or a flag, {found}")
            argv = [recipes[argv[0]], *argv[1:]]
        if argv and argv[0].endswith(".toml"):
            path, *argv = argv
            for name, value in flatten(read_toml(path)):
                if name not in options:
                    keys = [option.key for option in options.values()]
                    raise ValueError(f"{path}: {_unknown('key', _toml_key(name), keys)}")
                values[name] = options[name].read(value, f"{path}: {options[name].key}")
        elif argv and not re.match("-.", argv[0]):  # "-" is standard input
            argv = [options[positional].flag, *argv]
        # `--rank_range=x` is accepted for `--rank-range=x`.
        argv = [re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), one) for one in argv]
        given, rest = parser.parse_known_args(argv)
        if rest and not rest[0].startswith("-"):
            raise ValueError(f"expected a flag, found {rest[0]!r} (a TOML file comes first)")
        if rest:
            flags = [option.flag for option in options.values()]
            raise ValueError(_unknown("flag", rest[0].partition("=")[0], flags))
        for name, (value, *more) in vars(given).items():
            if more:  # of two, one would be ignored
                raise ValueError(f"{options[name].flag}: expected once, found it twice")
            values[name] = options[name].read(value, options[name].flag)
        if missing := [option.flag for name, option in options.items() if name not in values]:
            raise ValueError(f"{' and '.join(missing)} must be given (--help tells more)")
        return _build(config_class, values)
    except (ValueError, argparse.ArgumentError, OSError) as error:
        is_file = isinstance(error, OSError)
        sentence = f"{error.filename}: {error.strerror}" if is_file else str(error)
        raise SystemExit(_report(program, sentence.removeprefix("argument "), 2)) from error


def check_output(output: Path, *inputs: object, marks: Iterable[str] = ()) -> None:
    """Raise ValueError if a command cannot, or should not, write into the folder `output`.

    It must be writable, and neither be nor hold one of `inputs`, which would be overwritten. It is
    new or empty, or holds one of `marks`, by which an earlier run of the same command is known; the
    mark "." allows any folder.
    """
    there = next(one for one in (output, *output.absolute().parents) if one.exists())
    where = f"--output: {output}: expected"
    if not there.is_dir():
        raise ValueError(f"{where} a folder, but {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{where} to write there, but {there} is read-only")
    place = output.resolve()
    for path in [Path(str(one)) for one in inputs if one]:
        if path.exists() and place in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"{where} another folder than the input {path}")
    found = sorted(one.name for one in output.glob("[!.]*"))
    if found and not any((output / mark).exists() for mark in marks):
        raise ValueError(f"{where} a new or an empty folder, found {', '.join(found[:3])} in it")


def to_toml(config: object) -> str:
    """Write every setting of a configuration as TOML that `parse` reads back as an equal one.

    None is written as the text "none", which is how a file or a flag asks for it.
    """
    # A top-level key written after a table header would belong to that table.
    tables: dict[str, list[str]] = {"": []}
    for option in _options(type(config), config):
        section, _, key = option.name.rpartition(".")
        lines = tables.setdefault(section, [f"[{section}]\n"])
        lines.append(f"{key} = {_format(option.default)}\n")
    return "\n".join("".join(lines) for lines in tables.values() if lines)


def _is_first_process() -> bool:
    """Whether this is the only process, or the first one of this machine under torchrun."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class _Option:
    """A setting: its names, its help text, and how its value is read from text."""

    def __init__(self, name: str, kind: Any, default: object, text: str, group: str) -> None:
        self.name, self.key, self.flag = name, _toml_key(name), _flag(name)
        self.default, self.group = default, group
        words = re.sub(r'[][",]', "", _format(default)) or "nothing"
        self.help = f"{text} ({'required' if default is MISSING else f'default: {words}'})".strip()
        none = [None] if NoneType in get_args(kind) else []
        if none:
            kind = next(one for one in get_args(kind) if one is not NoneType)
        self.is_list, self.expected = get_origin(kind) is tuple, ""
        self.nargs: int | str | None = "?" if kind is bool else None
        if self.is_list:
            kind, *more = get_args(kind)
            self.nargs = "*" if more == [...] else 1 + len(more)
            self.expected = f"{'a list' if more == [...] else f'{self.nargs} values'}, each "
        # Words that stand for constants: the values of a Literal, true and false, none.
        constants: tuple[object, ...] = (True, False) if kind is bool else get_args(kind)
        self.constants = {str(one).lower(): one for one in (*constants, *none)}
        self.kind: Any = kind
        short, noun = _NAMES.get(kind, ("", ""))
        self.metavar = "|".join(filter(None, [short, *self.constants]))
        self.expected += " or ".join(filter(None, [noun, *self.constants]))

    def read(self, value: object, where: str) -> object:
        """Convert the words of a flag or a TOML value; a ValueError begins with `where`."""
        try:
            if not self.is_list:
                return self._read_one(value)
            if not isinstance(value, list) or self.nargs not in ("*", len(cast("_List", value))):
                raise ValueError
            return tuple(map(self._read_one, cast("_List", value)))
        except ValueError as error:
            raise ValueError(f"{where}: expected {self.expected}, found {value!r}") from error

    def _read_one(self, value: object) -> object:
        word = str(value)  # TOML's true is not an integer, though Python's True is
        if (constant := SHORT_NAMES.get(word.lower(), word.lower())) in self.constants:
            return self.constants[constant]
        is_text = self.kind in (str, Path)
        if self.kind not in _NAMES or (is_text and not isinstance(value, str)):
            raise ValueError
        result = self.kind(word)
        if result != result or (self.kind is Path and not word):  # NaN or an empty path
            raise ValueError
        return result


def _options(cls: Any, instance: object = None, prefix: str = "") -> Iterator[_Option]:
    """Every setting of a tree of dataclasses, with the values of `instance` as defaults."""
    title = (cls.__doc__ or "").partition("\n")[0].rstrip(".")
    group = f"[{prefix[:-1]}] {title}" if prefix else "settings"
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        kind, text = hints[field.name], ""
        if get_origin(kind) is Annotated:
            kind, text, *_ = get_args(kind)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        default = getattr(instance, field.name, default)
        if is_dataclass(kind):
            yield from _options(kind, default, f"{prefix}{field.name}.")
        else:
            yield _Option(prefix + field.name, kind, default, text, group)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _toml_key(name: str) -> str:
    section, _, key = name.rpartition(".")
    return f"[{section}] {key}" if section else key


def _unknown(noun: str, name: str, known: Iterable[str]) -> str:
    return f"unknown {noun} {name}{did_you_mean(name, known) or ' (--help lists them all)'}"


def _format(value: object) -> str:
    """A value as it is written in a TOML file."""
    if isinstance(value, tuple):
        items = map(_format, cast("tuple[object, ...]", value))
        return f"[{', '.join(items)}]"
    if isinstance(value, bool | int | float):
        return str(value).lower()
    word = "none" if value is None else str(value)
    # A TOML basic string is a JSON string, except that TOML requires DEL to be escaped.
    return json.dumps(word, ensure_ascii=False).replace("\x7f", "\\u007f")


def _build(cls: type[Config], values: dict[str, object], prefix: str = "") -> Config:
    """Construct the tree of dataclasses from dotted names."""
    arguments = {
        key: values[name] if (name := prefix + key) in values else _build(kind, values, f"{name}.")
        for key, kind in get_type_hints(cls).items()
    }
    try:
        return cls(**arguments)
    except ValueError as error:
        # A dataclass knows its fields, a person the flags: `name: ...`, and a_name in the text.
        names = [rf"^{key}(?=:)|\b{key}\b" if "_" in key else f"^{key}(?=:)" for key in arguments]
        flagged = re.sub("|".join(names), lambda name: _flag(prefix + name[0]), str(error))
        raise ValueError(flagged) from error
