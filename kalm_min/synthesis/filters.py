"""What is kept of an answer: filters that return the reason for which they reject, or "".

The report does not name its filters: these are ours.
"""

import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import cast

import numpy as np

from kalm_min.files import Object, text_hash
from kalm_min.schema import is_text

Texts = dict[str, list[str]]  # by key of the answer; a single text is a list of one
_LIMIT = 200_000  # characters of an answer
RUN = 5  # words
# Where words are not separated by spaces, each character is one.
_CHARS = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_MARKS = r"\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0dff"  # which \w leaves out
_WORD = re.compile(rf"[{_CHARS}]|(?:[^\W{_CHARS}]|[{_MARKS}])+")
_CONTROL = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ufffd]")
_REFUSAL = re.compile(
    r"\bas an? (ai|artificial intelligence|language model)\b|\bi('m| am) (sorry|unable to)\b|"
    r"\bi (cannot|can't|won't) (help|assist|comply|fulfil|provide|create|generate|write)\b|"
    r"作为(一个|一名|一款)?(ai|人工智能|大?语言模型)|我(无法|不能)(提供|满足|完成|协助|生成)",
    re.IGNORECASE,
)


@lru_cache(256)  # several filters look at a text
def words(text: str) -> Sequence[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


@lru_cache(256)
def runs(text: str, length: int = RUN) -> frozenset[str]:
    """All runs of so many words, in spaces; the whole text if it is shorter."""
    found = words(text)
    starts = range(max(1, len(found) - length + 1)) if found else ()
    return frozenset(f" {' '.join(found[i : i + length])} " for i in starts)


def parse(answer: Object, keys: Iterable[str]) -> tuple[Texts, str]:
    """The texts of a raw answer (see server.py), or the reason why there are none."""
    content = str(answer.get("content") or "").rpartition("</think>")[2].strip()
    if "error" in answer or not content:
        return {}, str(answer.get("error", "empty answer"))
    if answer.get("finish") == "length" or len(content) > _LIMIT:
        return {}, "answer cut off at its limit"
    try:  # what surrounds the object, such as a code fence, is ignored
        found = json.JSONDecoder().raw_decode(content, content.index("{"))[0]
    except (ValueError, RecursionError):
        return {}, "answer without JSON"
    texts: Texts = {}
    for key in keys:
        value, is_list = found.get(key), key.endswith("s")
        some = cast("list[object]", value if is_list and isinstance(value, list) else [value])
        if isinstance(value, list) != is_list or not all(isinstance(one, str) for one in some):
            return {}, "answer with other keys or types"
        texts[key] = [str(one).strip() for one in some]
    return texts, ""


def judge(text: str, span: Sequence[int], scripts: Collection[str]) -> str:
    """Judge a text by its form, its length in words, and its letters."""
    found = words(text)
    if not found or not is_text(text):
        return "empty text"
    if _CONTROL.search(text):
        return "control characters"
    if not span[0] <= len(found) <= span[1]:
        return "text too short" if len(found) < span[0] else "text too long"
    triples = [*zip(found, found[1:], found[2:], strict=False)]
    packed, size = len(zlib.compress(text.encode())), len(text.encode())
    if len({*triples}) < 0.6 * len(triples) or packed < size / 8 or re.search(r"(.)\1{11}", text):
        return "repeated text"
    letters = Counter(filter(str.isalpha, text[:500]))
    if sum(n for char, n in letters.items() if _script(char) in scripts) < 0.6 * letters.total():
        return "wrong language"
    return "refusal" if _REFUSAL.search(text) else ""


def find_leak(texts: Iterable[str], secrets: Iterable[str]) -> str:
    """Find runs of words in texts that the model should have kept to itself."""
    joined = " . ".join(f" {' '.join(words(text))} " for text in texts)
    return "persona or prompt in the text" if any(run in joined for run in secrets) else ""


def compare(query: str, positive: str, negatives: Sequence[str], copied: float) -> str:
    """Compare the texts of a sample with one another."""
    plain, joined, *others = (" ".join(words(text)) for text in (query, positive, *negatives))
    if plain in (joined, *others) or joined in others:
        return "equal texts in a sample"
    parts = [run for run in runs(query) if len(run.split()) == RUN]
    if sum(run in f" {joined} " for run in parts) > copied * len(parts):
        return "query copied in the positive"
    return ""


@lru_cache(1 << 14)
def _script(char: str) -> str:
    return unicodedata.name(char, "").partition(" ")[0]


class Seen:
    """The texts accepted so far, in 8 bytes per key."""

    def __init__(self) -> None:
        self._sorted, self._recent = np.zeros(1, np.int64), set[int]()

    def keys(self, kind: str, text: str) -> list[int]:
        """Hashes of the set of words; near duplicates of 12 words or more have one in common.

        A changed word changes at most two of the three parts into which words are sorted by hash.
        """
        parts = ["", "", ""]
        for word in (found := sorted({*words(text)})):
            parts[zlib.crc32(word.encode()) % 3] += f" {word}"
        few = [" ".join(found)] if len(found) < 12 else parts
        return [text_hash(f"{kind}{number}{part}") for number, part in enumerate(few)]

    def holds(self, keys: Sequence[int]) -> bool:
        """Whether a text with one of the keys was added."""
        at = np.searchsorted(self._sorted, keys).clip(max=len(self._sorted) - 1)
        return bool((self._sorted[at] == keys).any()) or not self._recent.isdisjoint(keys)

    def add(self, keys: Iterable[int]) -> None:
        """Add the keys of a text."""
        self._recent.update(keys)
        if len(self._recent) > 1 << 16:  # a set takes ten times the memory of an array
            self._sorted = np.union1d(self._sorted, np.fromiter(self._recent, np.int64))
            self._recent.clear()
