"""A JSONL file as a sequence of records: memory-mapped, opened in milliseconds.

The start of each record is found once, by a search for newlines at about the speed of the disk,
and kept in a memory-mapped array of offsets. A .gz file is decompressed once. Both are kept in a
hidden folder `.kalm_min` beside the data or, where that cannot be written, in a cache folder. Their
names carry the size and modification time of the data, so they are never used for other content.
There is no locking: processes that build the same index at once do the work twice without harm.
"""

import mmap
import os
import re
import shutil
from bisect import bisect_right
from collections.abc import Iterator
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
    open_bytes,
    parse_object,
    text_hash,
)

Ints = npt.NDArray[np.int64]

_LAYOUT = "v2"  # rises when the format of the cached files changes
_CHUNK = 1 << 22  # bytes searched at a time; fits the processor's cache


class JsonlFile:
    """The records of a .jsonl or .jsonl.gz file, by number.

    Only newlines end a line (U+2028 in a string does not), blank lines are skipped, and a carriage
    return at the end of a line is white space. The index is kept in `cache_dir`, by default
    `.kalm_min` beside the file or, failing that, `~/.cache/kalm_min`.

    Raises ValueError for an empty file, a broken .gz, or if the index cannot be written anywhere.
    """

    def __init__(
        self, path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None
    ) -> None:
        self.path, self.cache_dir = Path(path), cache_dir
        self._name = self._content_name()
        parent = self.path.resolve().parent
        # Files with the same name from different folders share a cache folder.
        apart = f"{parent.name}-{text_hash(str(parent)) & (2**64 - 1):016x}"
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

    def sidecar(self, suffix: str) -> Path:
        """A path for data derived from exactly this content: an existing or a writable one."""
        paths = [folder / f"{self._name}.{suffix}" for folder in self._folders]
        return next(filter(Path.exists, paths), None) or self._writable() / paths[0].name

    def _content_name(self) -> str:
        """A name that changes whenever the file's size or modification time changes."""
        stat = self.path.stat()
        if stat.st_size == 0:
            raise ValueError(f"{self.path}: expected at least one record, found an empty file")
        return f"{self.path.name}.{_LAYOUT}-{stat.st_size}-{stat.st_mtime_ns}"

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
        copy = folder / f"{self._name}.jsonl"
        with (copy if self.path.suffix == ".gz" else self.path).open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _load(self, folder: Path) -> bool:
        """Map data and index; return False unless both exist and match."""
        try:
            data = self._map(folder)
            # As a plain array, since np.memmap makes each look-up several times slower.
            index: Ints = np.asarray(np.memmap(folder / f"{self._name}.index", np.int64, mode="r"))
        except (OSError, ValueError):
            return False
        split = len(index) - 1 - int(index[-1])
        if not 2 <= split < len(index) or index[split - 1] != len(data):
            return False
        self._data, self._starts, self._blanks = data, index[:split], index[split:-1]
        return True

    def _build(self) -> Path:
        """Write the index (and the uncompressed copy), remove outdated ones, return the folder.

        The index holds the start of each record, the size of the data, the number of records before
        each blank line, and the number of blank lines.
        """
        folder = self._writable()
        if self.path.suffix == ".gz":
            with (
                open_bytes(self.path) as file,
                atomic_write(folder / f"{self._name}.jsonl") as out,
            ):
                shutil.copyfileobj(file, out, _CHUNK)  # in pieces, for any size
                if not out.tell():
                    raise ValueError(f"{self.path}: expected at least one record, found none")
        data = self._map(folder)
        records, blanks = 0, list[Ints]()
        with atomic_write(folder / f"{self._name}.index") as file:
            for starts, blank in _lines(data):
                starts[~blank].tofile(file)
                blanks.append((records + np.cumsum(~blank))[blank])
                records += int((~blank).sum())
            if not records:
                raise ValueError(f"{self.path}: expected at least one record, found blank lines")
            if self._content_name() != self._name:
                raise ValueError(f"{self.path}: the file changed while it was read; run again")
            tail = [[len(data)], *blanks, [sum(map(len, blanks))]]
            np.concatenate(tail).astype(np.int64).tofile(file)
        outdated = re.compile(re.escape(self.path.name) + r"\.v\d+-\d+-\d+\..+")
        for entry in folder.iterdir():
            if outdated.fullmatch(entry.name) and not entry.name.startswith(f"{self._name}."):
                entry.unlink(missing_ok=True)
        return folder


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
