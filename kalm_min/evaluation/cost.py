"""What a task will cost, from statistics alone: what is encoded once, and seconds on one card.

A text is counted once in a column, and only up to the length that is encoded. The seconds are those
of a 0.5B model on its authors' cards: fitted to the 67 leaf tasks of MTEB(eng, v1) as their results
record them (correlation 0.97), without mteb's own search. Only their proportions matter: a run
measures how fast its devices are.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_SECONDS = 3.0  # for any task: loading and scoring
_SECONDS_PER_CHARACTER = 2.0e-6
_SECONDS_PER_TEXT = 400e-6
_SECONDS_OF_TYPE = {"Classification": 10.0}  # ten logistic regressions
_MAX_TOKENS = 512  # where a model's own limit is not known yet
_CHARACTERS_PER_TOKEN = 4.0
_DENSE = {"cmn", "zho", "yue", "jpn", "kor"}
_CHARACTERS_PER_TOKEN_DENSE = 1.5


@dataclass(frozen=True, slots=True)
class Cost:
    """What is encoded, once each."""

    characters: int = 0
    texts: int = 0
    document_characters: int = 0
    """Those of corpora, which other workers may encode."""
    documents: int = 0

    def seconds(self, kind: str) -> float:
        """Estimated, on one device."""
        work = self.characters * _SECONDS_PER_CHARACTER + self.texts * _SECONDS_PER_TEXT
        return _SECONDS + work + _SECONDS_OF_TYPE.get(kind, 0.0)

    def corpus_seconds(self) -> float:
        """The part of `seconds` that can be done elsewhere."""
        characters = self.document_characters * _SECONDS_PER_CHARACTER
        return characters + self.documents * _SECONDS_PER_TEXT


def from_statistics(
    parts: Iterable[Mapping[str, Any]],
    *,
    max_length: int | None,
    languages: Iterable[str],
    most_texts: int | None = None,
) -> Cost:
    """The cost of a task.

    Args:
        parts: mteb's descriptive statistics of each split and subset that is evaluated.
        max_length: tokens kept of a text.
        languages: ISO 639-3 codes; Chinese, Japanese and Korean put more into a character.
        most_texts: a task that samples encodes no more than these.
    """
    per_token = _CHARACTERS_PER_TOKEN_DENSE if _DENSE & set(languages) else _CHARACTERS_PER_TOKEN
    longest = (max_length or _MAX_TOKENS) * per_token
    total = {"texts": 0.0, "characters": 0.0, "documents": 0.0, "document_characters": 0.0}
    for part in parts:
        for name, column in part.items():
            if not isinstance(column, dict) or not column.get("total_text_length"):
                continue
            average = column["average_text_length"] or 1
            texts = column.get("unique_texts") or column["total_text_length"] / average
            texts = min(texts, most_texts or texts)
            characters = texts * min(average, longest)
            total["texts"] += texts
            total["characters"] += characters
            if name.startswith("documents"):
                total["documents"] += texts
                total["document_characters"] += characters
    return Cost(**{name: round(value) for name, value in total.items()})
