"""Files that are complete or absent, and readers whose errors name the file and the line.

Everything that a later run may read is written to a temporary sibling, synced to the disk and
renamed into place, so that a kill at any moment leaves either the old file or the new one. Two
writers of one path do not tear it, and the last rename wins; a folder that two runs must not share
is `locked`.
"""

import difflib
import errno
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import tomllib
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

AnyPath = str | os.PathLike[str]
Object = dict[str, Any]  # what JSON and TOML call an object and a table
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # some network file systems have none
_CHECKPOINT = {".safetensors", ".json", ".txt"}  # the files of a model that change its vectors


@contextmanager
def atomic_write(path: AnyPath, mode: str = "wb") -> Generator[IO[Any]]:
    """Open a temporary sibling of `path` for writing; rename it to `path` when the block succeeds.

    Args:
        path: the file to create or replace. Missing parent folders are made.
        mode: "wb" or "w" (UTF-8, newlines written as given).

    On an exception, a kill or a full disk `path` is what it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    try:
        with os.fdopen(handle, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(_permissions(0o666))
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def atomic_directory(path: AnyPath) -> Generator[Path]:
    """Make a temporary sibling folder; sync its files and put it at `path` when the block succeeds.

    A new `path` appears in one rename, complete or not at all. If `path` is an existing folder, the
    files are moved into it one by one, each complete; other files in it are left alone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield folder
        folder.chmod(_permissions(0o777))
        for entry in [*folder.rglob("*"), folder]:
            _sync(entry)
        _move(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _sync(path.parent)


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
    """Rename `source` to `target`; if `target` is a folder, move each entry into it."""
    if not target.is_dir():
        source.replace(target)
        return
    for entry in source.iterdir():
        _move(entry, target / entry.name)
    source.rmdir()


def _permissions(full: int) -> int:
    """The bits of `full` that the user's umask allows (temporary files are created private)."""
    mask = os.umask(0)
    os.umask(mask)
    return full & ~mask


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


def parse_utf8(data: bytes, where: AnyPath, parser: Callable[[str], Any], expected: str) -> Any:
    """Parse UTF-8 bytes. A ValueError begins with `where`, a file or the file:line of one line."""
    try:
        return parser(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: expected UTF-8 text, found {error.reason}") from error
    except (ValueError, RecursionError) as error:  # also for 5,000 digits or deeply nested brackets
        found = "a NUL byte" if b"\0" in data else str(error).replace("line 1 ", "")
        if line := re.search(r"line (\d+)", found):
            where = f"{where}:{line[1]}"
        raise ValueError(f"{where}: expected {expected}, found {found}") from error


def read_json(path: AnyPath) -> Any:
    """Read a JSON file. Raises ValueError with file and line for anything that is not JSON."""
    return parse_utf8(Path(path).read_bytes(), path, json.loads, "JSON")


def read_toml(path: AnyPath) -> Object:
    """Read a TOML file. Raises ValueError with file and line for anything that is not TOML."""
    return parse_utf8(Path(path).read_bytes(), path, tomllib.loads, "TOML")


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
    or, with `problems`, appends the message to that list and continues with the next line.
    """
    path = Path(path)
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            # Bytes, so that only \n ends a line: U+2028 inside a string must not.
            for number, line in enumerate(file, start=1):
                try:
                    if line.strip():
                        yield number, parse_object(line, f"{path}:{number}")
                except ValueError as error:
                    if problems is None:
                        raise
                    problems.append(str(error))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: expected a complete gzip file, found: {error}") from error


def parse_object(line: bytes, where: str) -> Object:
    """Parse one line as a JSON object. Raises ValueError, beginning with `where` (file:line)."""
    value = parse_utf8(line.rstrip(b"\r\n"), where, json.loads, "a JSON object")
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return cast("Object", value)


def differences(stored: Mapping[str, object], current: Mapping[str, object]) -> str:
    """`key was X, is Y` for the first keys that differ, with long values cut; "" if none does."""
    keys = sorted(stored.keys() | current.keys())
    changed = [key for key in keys if stored.get(key) != current.get(key)]
    was, now = (
        [f"{json.dumps(one.get(key), default=str):.40}" for key in changed]
        for one in (stored, current)
    )
    parts = [f"{key} was {a}, is {b}" for key, a, b in zip(changed, was, now, strict=True)]
    return "; ".join(parts[:5])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean NAME?)` with the known name nearest to `name`; empty if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


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
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def _model_folder(name: AnyPath) -> Path:
    """The folder of a model: the path itself, or a snapshot of a repository of the hub."""
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
    folders = [_model_folder(path_or_hub_id)]
    if (adapter := folders[0] / "adapter_config.json").is_file():
        base = parse_object(adapter.read_bytes(), str(adapter)).get("base_model_name_or_path")
        try:
            folders.append(_model_folder(str(base)))
        except ValueError as error:
            raise ValueError(f"{adapter}: base_model_name_or_path: {error}") from error
    if not (folders[-1] / "config.json").is_file():
        raise ValueError(f"{folders[-1]}: expected a model folder with config.json, found none")
    return folders


def hash_checkpoint(*folders: Path) -> str:
    """A digest of the weights, tokenizer and settings in the folder of a model (adapter and base).

    Reads only the folders and their module folders (1_Pooling): others may hold results.
    """
    return hash_files(
        (path.relative_to(folder).as_posix(), path)
        for folder in folders
        for path in sorted([*folder.glob("*"), *folder.glob("[0-9]_*/*")])
        if path.suffix in _CHECKPOINT and path.is_file()
    )


def text_hash(text: str) -> int:
    """A signed 64-bit hash of a text, the same on every machine and run (0 is never returned).

    Any two of n texts collide with a probability of about n^2 / 2^65: 3e-6 for 10 million.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1
