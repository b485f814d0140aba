"""A JSONL file as a sequence: memory-mapped, opened in milliseconds, never read whole.

Where each record starts is found once, by a search for newlines at about the speed of the disk,
and kept as an array of offsets that is itself memory-mapped. A .gz file is decompressed once. Both
lie in a hidden folder `.kalm_min` beside the data or, where that cannot be written, in a cache
folder. Their names carry the size and modification time of the data, so they are never believed for
other content; they are written atomically, so a half-made one is never seen. Processes that build
the same one at once do the work twice and no harm.

Not here: what a record must hold (examples.py), and locking.
"""

import gzip
import mmap
import os
import re
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from kalm_min.files import atomic_write, parse_object, text_hash

Offsets = npt.NDArray[np.int64]

_LAYOUT = "v1"  # raised when what lies in the cache changes its form
_CHUNK = 1 << 22  # bytes searched at a time; fits the processor's cache


class JsonlFile:
    """The records of a .jsonl or .jsonl.gz file, by number.

    Only newlines end a line (U+2028 in a string does not), blank lines are skipped, and a carriage
    return at the end of a line is white space.

    Args:
        path: the file.
        cache_dir: where the index goes; by default `.kalm_min` beside the file or, failing that,
            `~/.cache/kalm_min`.

    Raises ValueError for an empty file, a broken .gz, or when no folder can take the index.
    """

    def __init__(
        self, path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None
    ) -> None:
        self.path = Path(path)
        self.cache_dir = cache_dir
        name = f"{self.path.name}.{_content_key(self.path)}"
        self._prefixes = [folder / name for folder in _cache_folders(self.path, cache_dir)]
        loaded = next(filter(None, (_load(self.path, prefix) for prefix in self._prefixes)), None)
        if loaded is None:
            loaded = _load(self.path, _build(self.path, self._prefixes))
        assert loaded, f"the index of {self.path} vanished while it was opened"
        self._data, index = loaded
        # Layout: start of each record, size of the data, gaps (see _write_index), number of gaps.
        split = len(index) - 1 - int(index[-1])
        self._starts, self._gaps = index[:split], index[split:-1]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Record i. Raises ValueError with file:line if it is not a JSON object."""
        i = range(len(self))[i]
        line = self._data[self._starts[i] : self._starts[i + 1]]
        return parse_object(line, self.location(i))

    def lines(self, start: int, stop: int) -> Iterator[bytes]:
        """The lines of records `start` to `stop` (exclusive) as they stand in the file."""
        starts = self._starts[start : stop + 1].tolist()
        return (self._data[begin:end] for begin, end in pairwise(starts))

    def location(self, i: int) -> str:
        """`path:line` of record i, lines counted from 1 as an editor does."""
        i = range(len(self))[i]
        return f"{self.path}:{i + 1 + bisect_right(self._gaps, i)}"

    def sidecar(self, suffix: str) -> Path:
        """A path in the cache for what else is derived from exactly this content of the file.

        Where it exists already, in whichever folder, or else where it can be written.
        """
        places = (_sidecar(prefix, suffix) for prefix in self._prefixes)
        there = next((place for place in places if place.exists()), None)
        return there or _sidecar(_writable(self.path, self._prefixes), suffix)


def _content_key(path: Path) -> str:
    """Changes when the file does, as far as its size and modification time tell."""
    stat = path.stat()
    if stat.st_size == 0:
        raise ValueError(f"{path}: expected at least one record, found an empty file")
    return f"{_LAYOUT}-{stat.st_size}-{stat.st_mtime_ns}"


def _cache_folders(path: Path, cache_dir: str | os.PathLike[str] | None) -> list[Path]:
    """The folders that may hold the index, the preferred one first."""
    parent = path.resolve().parent
    # Files of one name from different folders meet in a shared cache folder: tell them apart.
    apart = f"{parent.name}-{text_hash(str(parent)) & (2**64 - 1):016x}"
    if cache_dir is not None:
        return [Path(cache_dir) / apart]
    return [parent / ".kalm_min", Path.home() / ".cache" / "kalm_min" / apart]


def _writable(path: Path, prefixes: list[Path]) -> Path:
    """The first of `prefixes` whose folder exists or can be made, and can be written."""
    for prefix in prefixes:
        try:
            prefix.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(prefix.parent, os.W_OK):
            return prefix
    tried = " or ".join(str(prefix.parent) for prefix in prefixes)
    raise ValueError(f"{path}: its index cannot be written to {tried}; pass another cache folder")


def _sidecar(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{suffix}")


def _plain(path: Path, prefix: Path) -> Path:
    """The uncompressed file: `path` itself, or its copy in the cache."""
    return _sidecar(prefix, "jsonl") if path.suffix == ".gz" else path


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _load(path: Path, prefix: Path) -> tuple[mmap.mmap, Offsets] | None:
    """The mapped data and its index, or None unless both are there and fit one another."""
    try:
        data = _map(_plain(path, prefix))
        # As a plain array: np.memmap makes each look-up several times slower.
        index: Offsets = np.asarray(np.load(_sidecar(prefix, "index.npy"), mmap_mode="r"))
    except (OSError, ValueError, EOFError):
        return None
    if index.dtype != np.int64 or index.ndim != 1 or len(index) < 3:
        return None
    gaps = int(index[-1])
    fits = 0 <= gaps <= len(index) - 3 and int(index[-2 - gaps]) == len(data)
    return (data, index) if fits else None


def _build(path: Path, prefixes: list[Path]) -> Path:
    """Write the index (and the uncompressed copy), complete or not at all; drop outdated ones.

    Returns the one of `prefixes` that it was written to.
    """
    prefix = _writable(path, prefixes)
    if path.suffix == ".gz":
        _decompress(path, _plain(path, prefix))
    data = _map(_plain(path, prefix))
    with atomic_write(_sidecar(prefix, "index.npy")) as file:
        if not _write_index(file, data):
            raise ValueError(f"{path}: expected at least one record, found only blank lines")
        if not prefix.name.endswith(_content_key(path)):
            raise ValueError(f"{path}: the file changed while it was read; run again")
    outdated = re.compile(re.escape(path.name) + r"\.v\d+-\d+-\d+\..+")
    for entry in prefix.parent.iterdir():
        if outdated.fullmatch(entry.name) and not entry.name.startswith(f"{prefix.name}."):
            entry.unlink(missing_ok=True)
    return prefix


def _decompress(path: Path, target: Path) -> None:
    """Decompress a .gz file in pieces, so that it is never in memory whole."""
    with atomic_write(target) as copy, gzip.open(path, "rb") as file:
        try:
            shutil.copyfileobj(file, copy, _CHUNK)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: expected a complete gzip file, found: {error}") from error
        if copy.tell() == 0:
            raise ValueError(f"{path}: expected at least one record, found an empty file")


def _write_index(file: IO[bytes], data: mmap.mmap) -> int:
    """Write the offsets of all records as .npy, chunk by chunk; return the number of records.

    After the offsets come the size of the data, then the gaps (for each blank line the number of
    records before it, from which location() counts lines), then the number of gaps.
    """
    _write_header(file, 0)
    records, gaps = 0, [np.zeros(0, np.int64)]
    for starts, blank in _lines(data):
        file.write(starts[~blank].tobytes())
        gaps.append((records + np.cumsum(~blank))[blank])
        records += len(starts) - int(blank.sum())
    gap = np.concatenate(gaps)
    file.write(np.concatenate([[len(data)], gap, [len(gap)]]).astype(np.int64).tobytes())
    file.seek(0)
    _write_header(file, records + len(gap) + 2)
    return records


def _write_header(file: IO[bytes], length: int) -> None:
    # The length is known at the end only; numpy pads the header so that the number can grow.
    header = {"descr": "<i8", "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _lines(data: mmap.mmap) -> Iterator[tuple[Offsets, npt.NDArray[np.bool_]]]:
    """Yield, chunk by chunk, where lines start and which of them are blank."""
    view = np.frombuffer(data, dtype=np.uint8)
    for begin in range(0, len(view), _CHUNK):
        starts = np.flatnonzero(view[begin : begin + _CHUNK] == ord("\n")) + (begin + 1)
        if begin == 0:
            starts = np.insert(starts, 0, 0)
        if len(starts) and starts[-1] == len(view):
            starts = starts[:-1]
        blank = np.zeros(len(starts), dtype=np.bool_)
        # Few lines open with white space; only those can be blank.
        for k in np.flatnonzero(view[starts] <= ord(" ")):
            end = data.find(b"\n", starts[k])
            blank[k] = not data[starts[k] : end if end >= 0 else len(view)].strip()
        yield starts, blank
