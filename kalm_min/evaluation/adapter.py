"""An `Embedder` as mteb requires it: an encoder and a search in one object, for one task.

Texts are encoded once, at the full dimension, from which every Matryoshka dimension is cut.
Vectors go through a store on disk, so a corpus is never held in memory, and other processes may have
encoded it beforehand. `kalm_min.topk` searches, and mteb computes the scores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kalm_min.embedder import Embedder
from kalm_min.model import quantize
from kalm_min.topk import Ints, Vectors, on_grid
from kalm_min.topk import top_k as find_top_k
from kalm_min.vectors import StoredVectors, TextSet, cut_dimension

if TYPE_CHECKING:
    from datasets import Dataset

_QUERIES = 8192  # queries searched between two reports of progress
_SAMPLE = 4096  # texts on which int8 is calibrated

Report = Callable[[int, int, bool], None]
"""Called with the texts and characters done since the last call, and whether more are encoded next."""


@dataclass(eq=False)
class Adapter:
    """mteb's EncoderProtocol and SearchProtocol over an Embedder, at the dimension `dim`."""

    embedder: Embedder
    query_prompt: str = ""  # put before queries, and before every text of tasks without documents
    document_prompt: str = ""  # put before the documents of retrieval and reranking
    store: Path | None = None  # folder of this model's vectors with these settings; None: in memory
    report: Report = lambda *_: None

    def __post_init__(self) -> None:
        """Start with no text encoded, at the full dimension."""
        from mteb.models import ModelMeta

        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={"name": "kalm_min/evaluated", "revision": "0", "modalities": ["text"]}
        )
        self.dim, self.precision = self.embedder.dimension, "float32"
        self.hits: dict[str, dict[str, float]] = {}  # of the last search
        self._sample: Vectors | None = None  # what int8 is calibrated on
        self._encoded: dict[str, dict[str, Vectors]] = {"query": {}, "document": {}}
        # By id() of the corpus, which is kept alive so that no other object gets its id.
        self._corpora: dict[int, tuple[Dataset, StoredVectors]] = {}
        self._corpus_id = 0

    def encode(self, inputs: Any, *, prompt_type: object = None, **_: object) -> Vectors:
        """(n, dim) float32 unit vectors of the texts of a DataLoader, in their order.

        A text that this task has already encoded is not encoded again.
        """
        kind = "document" if prompt_type == "document" else "query"
        encoded, texts = self._encoded[kind], inputs.dataset["text"][:]
        new = [text for text in dict.fromkeys(texts) if text not in encoded]
        vectors = self._stored(lambda start, stop: new[start:stop], len(new), kind)[:]
        encoded.update(zip(new, vectors, strict=True))
        full = np.stack([encoded[text] for text in texts]) if texts else vectors
        return self._kept(full)

    def similarity(self, a: Any, b: Any) -> Tensor:
        """(n, m) cosine similarities of unit vectors."""
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a: Any, b: Any) -> Tensor:
        """(n,) cosine similarities of the rows of two sets of unit vectors."""
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(-1)

    def index(self, corpus: "Dataset", **_: object) -> None:
        """Encode the documents for `search`: a Dataset with id, text and optional title."""

        def read(start: int, stop: int) -> list[str]:
            """Title and text, joined as in mteb; a title may be empty or None."""
            part = corpus[start:stop]
            titles = part.get("title") or [""] * len(part["text"])
            pairs = zip(titles, part["text"], strict=True)
            return [f"{title or ''} {text}".strip() for title, text in pairs]

        self._corpus_id = id(corpus)
        if self._corpus_id not in self._corpora:
            self._corpora[id(corpus)] = corpus, self._stored(read, len(corpus), "document")

    def search(
        self,
        queries: "Dataset",
        *,
        task_metadata: Any,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **_: object,
    ) -> dict[str, dict[str, float]]:
        """The best documents of each query, or of its `top_ranked` ones: {id: {id: cosine}}."""
        # Only mteb knows how conversations and queries with instructions become texts.
        from mteb._create_dataloaders import create_dataloader
        from mteb.types import PromptType

        query = PromptType.query
        loader = create_dataloader(queries, task_metadata=task_metadata, prompt_type=query)
        vectors = self.encode(loader)  # (Q, dim)
        corpus, stored = self._corpora[self._corpus_id]
        documents, names = _View(stored, self._kept), corpus["id"][:]
        self.hits = hits = dict[str, dict[str, float]]()
        if not len(vectors) or not names:  # mteb drops queries without a relevant document
            return hits
        if top_ranked is not None:
            rows = {name: row for row, name in enumerate(names)}
            everything = documents[:]  # (N, dim)
            for name, vector in zip(queries["id"], vectors, strict=True):
                candidates = list(dict.fromkeys(top_ranked.get(name, ())))
                scores = everything[[rows[candidate] for candidate in candidates]] @ vector
                best = np.argsort(-scores, kind="stable")[:top_k]
                hits[name] = {candidates[i]: float(scores[i]) for i in best}
            return hits
        device = self.embedder.device
        for start in range(0, len(vectors), _QUERIES):
            part = slice(start, start + _QUERIES)
            found = find_top_k(vectors[part], documents, top_k, device=device, exact=False)
            lists = map(np.ndarray.tolist, found)
            for name, ids, scores in zip(queries["id"][part], *lists, strict=True):
                hits[name] = {names[i]: score for i, score in zip(ids, scores, strict=True)}
            self.report(0, 0, False)
        return hits

    def _kept(self, vectors: Vectors) -> Vectors:
        """What remains of (n, D) unit vectors once they are cut to `dim` and stored in `precision`.

        int8 and uint8 take the middle of a step; their ranges are those of the first texts that the
        task encodes, which are documents where there are any. Bits are +1 and -1.
        """
        vectors = cut_dimension(vectors, self.dim)
        if self.precision == "float32":
            return vectors
        if self.precision.endswith("binary"):
            bits = np.unpackbits(quantize(vectors, "ubinary"), axis=1, count=self.dim)
            kept = 2.0 * bits - 1
        else:
            assert self._sample is not None
            sample = cut_dimension(self._sample, self.dim)
            low, step = sample.min(0), np.ptp(sample, axis=0) / 255  # (dim,)
            kept = low + (quantize(vectors, "uint8", sample) + 0.5) * step
        return on_grid(kept / np.linalg.norm(kept, axis=1, keepdims=True))

    def _stored(
        self, read: Callable[[int, int], Sequence[str]], count: int, kind: str
    ) -> StoredVectors:
        """The vectors of texts at the full dimension, encoded if the store lacks them."""
        prompt = self.query_prompt if kind == "query" else self.document_prompt
        texts = TextSet.of(read, count, prompt)
        stored = StoredVectors(self.store, texts, self.embedder.dimension)
        missing = set(stored.missing())
        self.report(0, 0, True)
        for shard, (start, stop) in enumerate(pairwise(stored.cuts.tolist())):
            if shard in missing:
                stored.encode(shard, self.embedder, needs_disk=False)
            # As in the plan, count characters up to about the length that is encoded.
            sizes = np.minimum(texts.sizes[start:stop], 4 * self.embedder.max_length)
            self.report(stop - start, int(sizes.sum()), True)
        self.report(0, 0, False)
        self._sample = stored[:_SAMPLE] if self._sample is None else self._sample
        return stored


@dataclass(eq=False)
class _View:
    """Rows of vectors, each changed when it is read."""

    rows: StoredVectors
    change: Callable[[Vectors], Vectors]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: slice | Ints) -> Vectors:
        return self.change(self.rows[key])
