"""Files that are complete or absent, and readers whose errors name the file and the line.

Everything that a later run may read is written to a temporary sibling, synced to the disk and
renamed into place, so that a kill at any moment leaves either the old file or the new one, and so
do two writers at once. A folder that two runs must not share is `locked`.
"""

import csv
import difflib
import errno
import fcntl
import gzip
import hashlib
import io
import json
import os
import re
import reprlib
import secrets
import shutil
import socket
import time
import tomllib
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

AnyPath = str | os.PathLike[str]
Object = dict[str, Any]  # what JSON and TOML call an object and a table
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # some network file systems have none
BOM = b"\xef\xbb\xbf"  # a byte order mark, with which some programs begin UTF-8
# How files begin that are not UTF-8 text.
_FOREIGN = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "a .gz without that name"}
_SAVE = "; save the file as UTF-8"
_TABLES, _DEEPEST = (dict, list), 100  # what is nested in a JSON or TOML file, and how deep at most
_LONGEST_NAME = 240  # bytes; file systems allow 255, with the suffix
_MACHINE = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_OWNER = f"{_MACHINE}-{os.getpid()}"
_CHECKPOINT = {".safetensors", ".json", ".txt"}  # the files of a model that change its vectors


@contextmanager
def atomic_write(path: AnyPath, mode: str = "wb") -> Generator[IO[Any]]:
    """Open a temporary sibling of `path` for writing; rename it to `path` when the block succeeds.

    `mode` is "wb" or "w" (UTF-8, newlines written as given). Missing parent folders are made. On an
    exception, a kill or a full disk `path` is what it was before.
    """
    path, temporary = _sibling(path)
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    try:
        with temporary.open(mode.replace("w", "x"), encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def atomic_directory(path: AnyPath) -> Generator[Path]:
    """Make a temporary sibling folder; sync its files and put it at `path` when the block succeeds.

    A new `path` appears in one rename, complete or not at all. If `path` is an existing folder, the
    files are moved into it one by one, each complete; other files in it are left alone.
    """
    path, folder = _sibling(path)
    folder.mkdir()
    try:
        yield folder
        for entry in [*folder.rglob("*"), folder]:
            _sync(entry)
        _move(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _sync(path.parent)


@lru_cache
def sweep(folder: Path) -> None:
    """Delete what killed processes were writing in a folder, once, before this one's first write.

    The name of a temporary file holds the machine and the process that writes it; what nobody has
    written to for a day is of a process that was killed on any machine.
    """
    for path in folder.glob(".*.tmp"):
        if owner := re.fullmatch(r".*\.([0-9a-f]{8})-(\d{1,9})\.[0-9a-f]{16}\.tmp", path.name):
            with suppress(OSError):  # alive and of another user, or deleted by another process
                is_stale = time.time() - path.stat().st_mtime > 86_400
                try:
                    if owner[1] == _MACHINE:
                        os.kill(int(owner[2]), 0)
                except ProcessLookupError:
                    is_stale = True
                if is_stale:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def locked(folder: AnyPath) -> Generator[None]:
    """Keep other processes out of `folder`, which is made if missing, while the block runs.

    The kernel holds the lock (flock on `.lock` in it) and drops it when the process ends, in
    whatever way. Raises ValueError naming the process that holds it.
    """
    path = Path(folder) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = re.fullmatch(r"process \d+ on [\w.-]+", file.read(300))
            raise ValueError(
                f"{folder}: expected to be alone there, found {holder[0] if holder else 'a process'} "
                "at work; wait until it ends, or give another --output"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _move(source: Path, target: Path) -> None:
    if not target.is_dir():
        source.replace(target)
        return
    for entry in source.iterdir():
        _move(entry, target / entry.name)
    source.rmdir()


def _sibling(path: AnyPath) -> tuple[Path, Path]:
    """The path, its folder made if missing, and a new hidden name beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    return path, path.with_name(f".{path.name:.40}.{_OWNER}.{secrets.token_hex(8)}.tmp")


def _sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: AnyPath, text: str) -> None:
    """Write a UTF-8 text file, complete or not at all."""
    with atomic_write(path, "w") as file:
        file.write(text)


def write_json(path: AnyPath, value: object) -> None:
    """Write a JSON file with two-space indent, complete or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def open_bytes(path: AnyPath) -> Generator[IO[bytes]]:
    """Open a file for reading; of a .gz, what it holds. A torn, damaged or false .gz: ValueError."""
    path = Path(path)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield cast("IO[bytes]", file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected a complete gzip file, found: {error}") from error


def _decode(data: bytes, where: AnyPath) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        lines, at = data.count(b"\n"), data.count(b"\n", 0, error.start) + 1
        where = f"{where}:{at}" if lines and data[:2] not in _FOREIGN else where
        found = _FOREIGN.get(data[:2], f"{error.reason} (Latin-1?)")
        raise ValueError(f"{where}: expected UTF-8 text, found {found}{_SAVE}") from error


def read_text(path: AnyPath) -> str:
    """Read a file of UTF-8 text, with or without a byte order mark, or a .gz of such text.

    Raises ValueError, one sentence with the file's name, for anything else.
    """
    with open_bytes(path) as file:
        text = _decode(file.read().removeprefix(BOM), path)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}:{line}: expected UTF-8 text, found a NUL byte (UTF-16?)")
    return text


def read_lines(path: AnyPath) -> list[str]:
    """The lines of a text file without their ends, LF or CRLF, which alone end a line."""
    lines = read_text(path).split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def _parse(text: str, where: AnyPath, parser: Callable[[str], Any], expected: str) -> Any:
    try:
        return parser(text)
    except (ValueError, RecursionError) as error:  # also for 5,000 digits or deeply nested brackets
        found = str(error).replace("line 1 ", "").partition("; ")[0]
        found = "a NUL byte" if "\0" in text else found
        found = "Unexpected UTF-8 BOM" if text.startswith("\ufeff") else found
        if line := re.search(r"line (\d+)", found):
            where = f"{where}:{line[1]}"
        raise ValueError(f"{where}: expected {expected}, found {found}") from error


def _unique(pairs: list[tuple[str, object]]) -> Object:
    """An object of JSON. Of a key that stands twice in it, json.loads would drop one value."""
    if len(found := dict(pairs)) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {reprlib.repr(twice)} twice in one object")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def _read(path: AnyPath, parser: Callable[[str], Any], expected: str) -> Any:
    value = _parse(read_text(path), path, parser, expected)
    level: list[object] = [value]  # what is nested deeper than any program can walk is refused
    for _ in range(_DEEPEST):
        tables = [cast("Object | list[object]", one) for one in level if isinstance(one, _TABLES)]
        level = [x for one in tables for x in (one.values() if isinstance(one, dict) else one)]
    if any(isinstance(one, _TABLES) for one in level):
        raise ValueError(f"{path}: expected {expected}, found more than {_DEEPEST} nested levels")
    return value


def read_json(path: AnyPath) -> Any:
    """Read a JSON file. Raises ValueError with file and line for anything that is not JSON.

    NaN and Infinity are numbers here, since mteb writes them; schema.is_number refuses them.
    """
    return _read(path, _JSON.decode, "JSON")


def read_toml(path: AnyPath) -> Object:
    """Read a TOML file. Raises ValueError with file and line for anything that is not TOML."""
    return _read(path, _parse_toml, "TOML")


def _parse_toml(text: str) -> Object:
    # tomllib takes the square of a key's length, minutes for one of 50,000 parts.
    if re.search(rf"""(?<![\w"'-])(?:[\w"'-]+\s*\.\s*){{{_DEEPEST}}}""", text):
        raise ValueError(f"a key of more than {_DEEPEST} parts")
    return tomllib.loads(text)


def flatten(table: Object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every (dotted name, value) of a parsed TOML file."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flatten(cast("Object", value), f"{prefix}{key}.")
        else:
            yield prefix + key, value


def read_jsonl(path: AnyPath, problems: list[str] | None = None) -> Iterator[tuple[int, Object]]:
    """Yield (line number from 1, object) of a .jsonl or .jsonl.gz file, one line at a time.

    Blank lines are skipped. Raises ValueError with file:line for a line that is not a JSON object,
    or, with `problems`, appends the message to that list and continues with the next line. What is
    wrong with the whole file (see check_first_line) is always raised.
    """
    with open_bytes(path) as file:
        first = 0
        # Bytes, so that only \n ends a line: U+2028 inside a string must not.
        for number, line in enumerate(file, start=1):
            if not (line := line.removeprefix(BOM) if number == 1 else line).strip():
                continue
            if (first := first or number) == number:
                check_first_line(line, path)
            try:
                yield number, parse_object(line, f"{path}:{number}")
            except ValueError as error:
                if problems is None:
                    raise
                problems.append(str(error))


def read_table(path: AnyPath) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number from 1, cells) of a CSV or TSV file: first the columns' names, then rows.

    Cells are divided by the one of `,` `;` `|` and tab that the first line has most of, and may hold
    newlines if quoted. Blank lines are skipped. Raises ValueError with file:line for what is no
    table, and for columns of the same name.
    """
    csv.field_size_limit(2**31 - 1)
    text = read_text(path)
    head = text.partition("\n")[0]
    delimiter = "\t" if ".tsv" in Path(path).suffixes else max(",;\t|", key=head.count)
    rows, line = csv.reader(io.StringIO(text, ""), delimiter=delimiter, strict=True), 1
    try:
        for cells in rows:
            if line == 1 and len({*cells}) < len(cells):
                twice = next(one for one in cells if cells.count(one) > 1)
                raise ValueError(f"{path}: expected each column once, found {twice!r} twice")
            if cells:
                yield line, cells
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: expected a table, found: {error}") from error


def check_first_line(line: bytes, path: AnyPath) -> None:
    """Raise ValueError if the first line that is not blank shows that a file is no JSONL at all."""
    if found := _FOREIGN.get(line[:2]):
        raise ValueError(f"{path}: expected UTF-8 text, found {found}{_SAVE}")
    line, is_array = line.strip(), line.lstrip().startswith(b"[")
    if is_array or line == b"{":
        found = "one JSON array" if is_array else "an object over many lines"
        raise ValueError(
            f"{path}: expected a JSON object in each line, found {found}; write one object per line, "
            f"or convert it: kalm-min convert {path} --output FOLDER"
        )


def parse_object(line: bytes | str, where: AnyPath) -> Object:
    """Parse one line as a JSON object. Raises ValueError, beginning with `where` (file:line)."""
    text = _decode(line.rstrip(b"\r\n"), where) if isinstance(line, bytes) else line
    value = _parse(text, where, _JSON.decode, "a JSON object")
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return cast("Object", value)


def escape_name(name: str) -> str:
    """The name of a file, without its suffix, for a name from data: no two names share one.

    What would leave the folder, hide the file or be no character of a name is percent-encoded, and
    so is a "%" that would read as such a code; everything else stays. What is too long for a file
    system is cut and ends in "%7E" and its digest.
    """
    special = r"^\.|^R(?=EADME)|[/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]|%(?=[0-9A-Fa-f]{2})"
    escaped = re.sub(special, lambda found: "".join(map("%{:02X}".format, _bytes(found[0]))), name)
    if len(data := escaped.encode()) > _LONGEST_NAME:
        return f"{data[: _LONGEST_NAME - 20].decode('utf-8', 'ignore')}%7E{digest(name)[:16]}"
    return escaped


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # also of half a surrogate pair


def differences(stored: Mapping[str, object], current: Mapping[str, object]) -> str:
    """`key was X, is Y` for the first keys that differ, with long values cut; "" if none does."""
    keys = sorted(stored.keys() | current.keys())
    changed = [key for key in keys if stored.get(key) != current.get(key)][:5]
    was, now = (
        [json.dumps(one.get(key), default=str)[:40] for key in changed] for one in (stored, current)
    )
    return "; ".join(map("{} was {}, is {}".format, changed, was, now))


def in_words(names: Iterable[str]) -> str:
    """`a, b, c`: names from data in a sentence, quoted if they would break its line."""
    return ", ".join(one if one.isprintable() else repr(one) for one in names)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean NAME?)` with the known name nearest to `name`; empty if none is near."""
    names = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), names, n=1)
    return f" (did you mean {in_words([names[near[0]]])}?)" if near else ""


def hash_files(files: Iterable[tuple[str, Path]]) -> str:
    """A SHA-256 digest of (name, file) pairs: of names and files' bytes, in the order given."""
    state = hashlib.sha256()
    for name, path in files:
        with path.open("rb") as file:
            state.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return state.hexdigest()


def digest(*parts: str | bytes) -> str:
    """A SHA-256 digest (64 hexadecimal digits) of the parts, each preceded by its length."""
    state = hashlib.sha256()
    for part in parts:
        data = _bytes(part) if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def _model_folder(name: AnyPath) -> Path:
    path, name = Path(name).expanduser(), str(name)
    if path.is_dir():
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{name}: expected a model folder or a hub id org/name, found neither")
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the client raises a dozen types, none with one sentence
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name}: no such folder, and the hub gives none ({reason})") from error


def checkpoint_folders(path_or_hub_id: str | Path) -> list[Path]:
    """The folder of a model, or of an adapter and its base model, without importing torch.

    Raises ValueError if there is no such folder, or no config.json in the model's folder.
    """
    folders, where = [_model_folder(path_or_hub_id)], ""
    if (adapter := folders[0] / "adapter_config.json").is_file():
        base = str(parse_object(read_text(adapter), adapter).get("base_model_name_or_path"))
        beside, where = folders[0] / base, f"{adapter}: base_model_name_or_path: "
        try:
            is_beside = beside.is_dir() and not Path(base).is_dir()
            folders.append(_model_folder(beside if is_beside else base))
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}{error}") from error
    if not (folders[-1] / "config.json").is_file():
        inside = (folders[-1] / "final").glob("*config.json")
        hint = "".join({f" (did you mean {one.parent}?)" for one in inside})
        expected = "expected a model folder with config.json, found none"
        raise ValueError(f"{where}{folders[-1]}: {expected}{hint}")
    return folders


def hash_checkpoint(*folders: Path) -> str:
    """A digest of the weights, tokenizer and settings in the folders of a model and its modules."""
    return hash_files(
        (os.path.relpath(path, folder), path)
        for folder in folders
        for path in sorted({*folder.glob("*"), *folder.glob("[0-9]_*/*"), *_module_files(folder)})
        if path.suffix in _CHECKPOINT and path.is_file()
    )


def _module_files(folder: Path) -> Iterator[Path]:
    path = folder / "modules.json"  # may place them in other folders than is usual
    modules: object = read_json(path) if path.is_file() else []
    for module in cast("list[object]", modules) if isinstance(modules, list) else ():
        place = cast("Object", module).get("path") if isinstance(module, dict) else None
        if isinstance(place, str):
            yield from (folder / place).glob("*")


def text_hash(text: str) -> int:
    """A signed 64-bit hash of a text, the same on every machine and run (0 is never returned).

    Any two of n texts collide with a probability of about n^2 / 2^65: 3e-6 for 10 million.
    """
    code = hashlib.blake2b(_bytes(text), digest_size=8).digest()
    return int.from_bytes(code, "little", signed=True) or 1


def text_key(text: str) -> int:
    """`text_hash` that texts share if they differ only in case, white space or width (NFKC).

    By it, mining and held-out rows recognise duplicates; the masks of the loss compare exact texts.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return text_hash(" ".join(unicodedata.normalize("NFKC", folded).split()))
