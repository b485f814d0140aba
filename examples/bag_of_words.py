"""The baseline that a learned model should beat: TF-IDF over words, with identifiers split into words.

mteb scores it like the models, on the same sets. Its weights come from the evaluation texts
themselves, which no model gets to see.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer  # comes with mteb
from standard_library import words

from kalm_min.evaluation.local import build_task, find_datasets, read_dataset


class BagOfWords:
    """mteb's EncoderProtocol over TF-IDF vectors."""

    def __init__(self, texts: list[str]) -> None:
        """Weight each word by how few of the `texts` contain it."""
        from mteb.models import ModelMeta

        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={"name": "examples/bag-of-words", "revision": "1", "modalities": ["text"]}
        )
        vectorizer = TfidfVectorizer(
            analyzer=words,  # pyright: ignore[reportArgumentType] -- a function is allowed
            sublinear_tf=True,
        )
        self._weights = vectorizer.fit(texts)

    def encode(self, inputs: Any, **_: Any) -> NDArray[np.float32]:
        """(n, words) unit vectors of a DataLoader's texts."""
        return self._weights.transform(inputs.dataset["text"][:]).toarray().astype(np.float32)

    def similarity(self, a: Any, b: Any) -> NDArray[np.float32]:
        """(n, m) cosine similarities of unit vectors."""
        return a @ b.T

    def similarity_pairwise(self, a: Any, b: Any) -> NDArray[np.float32]:
        """(n,) cosine similarities of rows."""
        return (a * b).sum(-1)


def scores(folder: Path) -> dict[str, float]:
    """The main score, times 100, of every dataset in a folder."""
    import mteb
    from datasets import disable_progress_bars

    disable_progress_bars()
    found: dict[str, float] = {}
    for dataset in find_datasets(folder):
        assert dataset.folder
        _, parts = read_dataset(dataset.folder, [])
        rows = [row for part in parts.values() for row in part]
        columns = ("text", "sentence1", "sentence2")
        model: Any = BagOfWords(
            [row[column] for row in rows for column in columns if column in row]
        )
        results = mteb.evaluate(
            model, build_task(dataset.folder), cache=None, show_progress_bar=False
        )
        found[dataset.name] = 100 * results.task_results[0].get_score()
    return found
