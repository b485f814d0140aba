"""Vectors of texts on disk: files that are complete or absent, each named by what it holds.

A corpus is cut after texts that their own hash chooses, so that another corpus with the same texts,
or the same one with a few texts more, has the same shards but for those that changed. A shard's name
is the hash of its texts and their prompt; a folder of shards belongs to one model and its settings.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kalm_min.files import atomic_write, text_hash

Vectors = npt.NDArray[np.float32]
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


def write(path: Path, vectors: Vectors) -> None:
    """Write (n, D) vectors, complete or not at all."""
    with atomic_write(path) as file:
        np.save(file, vectors, allow_pickle=False)


def read(path: Path, shape: tuple[int, int]) -> Vectors:
    """(n, D) vectors, mapped from the file. Raises OSError, or ValueError for anything else there."""
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except EOFError as error:
        raise ValueError(f"{path}: expected vectors, found an empty file") from error
    if vectors.shape != shape or vectors.dtype != np.float32:
        raise ValueError(
            f"{path}: expected {shape} float32, found {vectors.shape} {vectors.dtype}; delete it"
        )
    return vectors
