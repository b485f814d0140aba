"""Vectors of texts on disk: files that are complete or absent, each named by what it holds.

A corpus is cut after texts that their own hash chooses, so that another corpus with the same texts,
or the same one with a few texts more, has the same shards but for those that changed. A shard's name
is the hash of its texts and their prompt; a folder of shards belongs to one model and its settings.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kalm_min.files import atomic_write, text_hash

Ints = npt.NDArray[np.int64]

# A shard ends after a text whose hash is divisible by _MEAN, so that an added or removed text moves
# the bounds of its own shard only; and before it gets larger than what a kill may cost.
_MEAN = 1024
_LONGEST = 4096  # texts
_LARGEST = 1 << 20  # characters


def cuts(hashes: Ints, sizes: Ints) -> Ints:
    """(shards + 1,) bounds: texts cuts[i] to cuts[i + 1] are shard i.

    Args:
        hashes: (n,) of the texts.
        sizes: (n,) their characters.
    """
    natural = [*(np.flatnonzero(hashes % _MEAN == 0) + 1).tolist(), len(hashes)]
    total = np.concatenate([[0], np.cumsum(sizes)])
    bounds = [0]
    for end in natural:
        while bounds[-1] < end:
            start = bounds[-1]
            fits = int(np.searchsorted(total, total[start] + _LARGEST, side="right")) - 1
            bounds.append(min(end, start + _LONGEST, max(fits, start + 1)))
    return np.array(bounds, np.int64)


def split(texts: Sequence[str], prompt: str) -> Iterator[tuple[slice, str]]:
    """(place, file name) of every shard of some texts that are said after `prompt`."""
    hashes = np.array([text_hash(text) for text in texts], np.int64)
    sizes = np.array([len(text) for text in texts], np.int64)
    said = text_hash(prompt).to_bytes(8, "little", signed=True)
    for start, end in pairwise(cuts(hashes, sizes).tolist()):
        content = said + hashes[start:end].tobytes()
        yield slice(start, end), hashlib.blake2b(content, digest_size=16).hexdigest() + ".npy"


def write(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an .npy file, complete or not at all."""
    with atomic_write(path) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array)  # np.save would report a full disk as so many items not written


def read(path: Path, shape: tuple[int, ...], dtype: Any = np.float32) -> npt.NDArray[Any]:
    """An .npy file, mapped for the moment only: what stays mapped counts as memory.

    Raises OSError if it is not there, ValueError for anything but such an array.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        found = f"{array.shape} {array.dtype}"
    except (ValueError, EOFError) as error:
        array, found = None, str(error)
    if array is None or array.shape != shape or array.dtype != dtype:
        expected = f"{shape} {np.dtype(dtype)}"
        raise ValueError(f"{path}: expected {expected}, found {found}; delete it and run again")
    return array
