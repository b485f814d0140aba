"""A JSONL file as a sequence of records: memory-mapped, opened in milliseconds.

The start of each record is found once, in the pass that makes a digest of the content; a .gz file is
decompressed once. There is no locking: processes that do so at once do the work twice without harm.
A cache is used for a file of the same size, modification time and change time, which no program can
set back. Its checksum is compared at every opening (1 GB/s; the index of ten million lines is 80 MB),
the uncompressed copy of a .gz with its digest if it was touched after its index was written.
"""

import hashlib
import json
import mmap
import os
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kalm_min.files import (
    BOM,
    Object,
    atomic_write,
    check_first_line,
    digest,
    open_bytes,
    parse_object,
)

Ints = npt.NDArray[np.int64]

_LAYOUT = "v3"  # rises when the format of the cached files or the rules of checking.py change
_HASH = 16  # digits of the digests in their names
_CHUNK = 1 << 22  # bytes searched at a time; fits the processor's cache


class JsonlFile:
    """The records of a .jsonl or .jsonl.gz file, by number.

    Only newlines end a line (U+2028 in a string does not), blank lines are skipped, and a carriage
    return at the end of a line is white space. The index is kept in `cache_dir`, by default
    `.kalm_min` beside the file or, failing that, `~/.cache/kalm_min`.

    `digest` is the SHA-256 of the (uncompressed) content.

    Raises ValueError for an empty file, a broken .gz, one JSON array instead of lines, UTF-16, or if
    the index cannot be written anywhere.
    """

    digest: str

    def __init__(
        self, path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None
    ) -> None:
        self.path, self.cache_dir = Path(path), cache_dir
        self._name = self._content_name()
        parent = self.path.resolve().parent
        # Files with the same name from different folders share a cache folder.
        apart = f"{parent.name:.40}-{digest(str(parent))[:_HASH]}"
        beside = [parent / ".kalm_min", Path.home() / ".cache" / "kalm_min" / apart]
        self._folders = beside if cache_dir is None else [Path(cache_dir) / apart]
        if not any(map(self._load, self._folders)) and not self._load(self._build()):
            raise ValueError(f"{path}: its index was changed while it was opened; run again")
        check_first_line(next(self.lines(0, 1)), path)

    def __reduce__(self) -> tuple[object, ...]:
        return JsonlFile, (self.path, self.cache_dir)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, i: int) -> Object:
        """Record i. Raises ValueError with file:line if it is not a JSON object."""
        i = range(len(self))[i]
        return parse_object(self._data[self._starts[i] : self._starts[i + 1]], self.location(i))

    def lines(self, start: int, stop: int) -> Iterator[bytes]:
        """The raw lines of records `start` to `stop` (exclusive)."""
        starts = self._starts[start : stop + 1].tolist()
        return (self._data[begin:end] for begin, end in pairwise(starts))

    def location(self, i: int) -> str:
        """`path:line` of record i, lines counted from 1 as an editor does."""
        i = range(len(self))[i]
        return f"{self.path}:{i + 1 + bisect_right(self._blanks, i)}"

    def load(self, suffix: str) -> tuple[Ints, Object] | None:
        """What `save` wrote for exactly this content; None if it is absent or damaged."""
        caches = (_read_cache(folder / f"{self._name}.{suffix}") for folder in self._folders)
        return next((cache for cache in caches if cache is not None), None)

    def save(self, suffix: str, arrays: Iterable[Ints], note: dict[str, object]) -> None:
        """Keep arrays derived from this content, and what `note` holds after the last of them."""
        checksum = 0
        with atomic_write(self._writable() / f"{self._name}.{suffix}") as file:
            for array in arrays:
                part = np.ascontiguousarray(array, np.int64).data
                checksum = zlib.crc32(part, checksum)
                file.write(part)
            text = json.dumps(note).encode()
            end = text + len(text).to_bytes(8, "little")
            file.write(end + zlib.crc32(end, checksum).to_bytes(8, "little"))

    def _content_name(self) -> str:
        """A name that changes with every write to the file, and is not too long for a suffix."""
        stat = self.path.stat()
        if stat.st_size == 0:
            raise ValueError(f"{self.path}: expected at least one record, found an empty file")
        version = f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"
        hashes = [digest(part)[:_HASH] for part in (self.path.name, version)]
        return f"{self.path.name:.40}.{_LAYOUT}-{'-'.join(hashes)}"

    def _writable(self) -> Path:
        """The first folder that exists or can be made, and can be written."""
        for folder in self._folders:
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                if os.access(folder, os.W_OK):
                    return folder
        tried = f"its index cannot be written to {' or '.join(map(str, self._folders))}"
        raise ValueError(f"{self.path}: {tried}; pass another cache folder")

    def _map(self, folder: Path) -> mmap.mmap:
        """The uncompressed data: the file itself, or its copy in the cache."""
        path = folder / f"{self._name}.jsonl" if self.path.suffix == ".gz" else self.path
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _load(self, folder: Path) -> bool:
        """Map data and index; return False unless both are what was written."""
        path, copy = (folder / f"{self._name}.{suffix}" for suffix in ("index", "jsonl"))
        try:
            cache, data = _read_cache(path), self._map(folder)
        except (OSError, ValueError):
            return False
        if cache is None or len(data) != cache[1]["bytes"]:
            return False
        index, note = cache
        if self.path.suffix == ".gz" and copy.stat().st_ctime_ns >= path.stat().st_ctime_ns:
            if hashlib.sha256(data).hexdigest() != note["digest"]:
                return False
            with suppress(OSError):
                os.utime(path)  # so that the next one need not compare again
        self._data, self.digest, records = data, note["digest"], note["records"]
        self._starts, self._blanks = index[: records + 1], index[records + 1 :]
        return True

    def _build(self) -> Path:
        """Write the index (and the uncompressed copy), remove outdated ones, return the folder."""
        folder = self._writable()
        if self.path.suffix == ".gz":
            copy = folder / f"{self._name}.jsonl"
            with open_bytes(self.path) as file, atomic_write(copy) as out:
                shutil.copyfileobj(file, out, _CHUNK)  # in pieces, for any size
                if not out.tell():
                    raise ValueError(f"{self.path}: expected at least one record, found none")
        note: dict[str, object] = {}
        self.save("index", self._index(self._map(folder), note), note)
        any_version = self._name[:-_HASH]
        for entry in folder.iterdir():
            if entry.name.startswith(any_version) and not entry.name.startswith(self._name):
                entry.unlink(missing_ok=True)  # another process may be faster
        return folder

    def _index(self, data: mmap.mmap, note: dict[str, object]) -> Iterator[Ints]:
        """Each record's start, the data's size, and for each blank line the records before it.

        `note` gets the number of records, the size and the digest of the data.
        """
        records, blanks, state = 0, list[Ints](), hashlib.sha256()
        for number, (starts, blank) in enumerate(_lines(data)):
            state.update(data[number * _CHUNK : (number + 1) * _CHUNK])
            yield starts[~blank]
            blanks.append((records + np.cumsum(~blank))[blank])
            records += int((~blank).sum())
        if not records:
            raise ValueError(f"{self.path}: expected at least one record, found blank lines")
        if self._content_name() != self._name:
            raise ValueError(f"{self.path}: the file changed while it was read; run again")
        yield np.concatenate([[len(data)], *blanks])
        note |= {"records": records, "bytes": len(data), "digest": state.hexdigest()}


def _read_cache(path: Path) -> tuple[Ints, Object] | None:
    """The arrays, joined and memory-mapped, and the note; None unless all is as it was written."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return None
    if zlib.crc32(memoryview(data)[:-8]) != int.from_bytes(data[-8:], "little") or len(data) < 16:
        return None
    end = len(data) - 16 - int.from_bytes(data[-16:-8], "little")
    # A plain array, since np.memmap makes each look-up several times slower.
    return np.frombuffer(data, np.int64, end // 8), parse_object(data[end:-16], path)


def _lines(data: mmap.mmap) -> Iterator[tuple[Ints, npt.NDArray[np.bool_]]]:
    """Yield, chunk by chunk, where lines start and which of them are blank."""
    view = np.frombuffer(data, dtype=np.uint8)
    for begin in range(0, len(view), _CHUNK):
        starts = np.flatnonzero(view[begin : begin + _CHUNK] == ord("\n")) + (begin + 1)
        if begin == 0:
            starts = np.insert(starts, 0, len(BOM) if data[: len(BOM)] == BOM else 0)
        starts = starts[starts < len(view)]
        blank = np.zeros(len(starts), dtype=np.bool_)
        # Only lines that begin with white space, which are few, can be blank.
        for k in np.flatnonzero(view[starts] <= ord(" ")):
            end = data.find(b"\n", starts[k])
            blank[k] = not data[starts[k] : end if end >= 0 else len(view)].strip()
        yield starts, blank
