"""An `Embedder` in the shape mteb asks for: an encoder and a search in one object, for one task.

Texts are encoded once, at the full dimension; vectors of every Matryoshka dimension are cut from those.
Vectors go through a store on disk, so a corpus is never held in memory, and other processes may have
encoded it beforehand. `kalm_min.topk` searches, and mteb computes the scores.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kalm_min.embedder import Embedder
from kalm_min.topk import Vectors
from kalm_min.topk import top_k as find_top_k
from kalm_min.vectors import StoredVectors, TextSet, cut_dimension

if TYPE_CHECKING:
    from datasets import Dataset

_QUERIES = 8192  # searched between two reports of progress


class Adapter:
    """mteb's EncoderProtocol and SearchProtocol over an Embedder, at the dimension `dim`."""

    def __init__(
        self,
        embedder: Embedder,
        *,
        query_prompt: str = "",
        document_prompt: str = "",
        store: Path | None = None,
        report: Callable[[int, int], None] = lambda texts, characters: None,
    ) -> None:
        """Wrap a model for one task.

        Args:
            embedder: the model.
            query_prompt: put before queries, and before every text of tasks without documents.
            document_prompt: put before the documents of retrieval and reranking.
            store: folder of the vectors of this model with these settings; None: in memory.
            report: called with the texts and characters done since the last call.
        """
        from mteb.models import ModelMeta

        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={"name": "kalm_min/evaluated", "revision": "0", "modalities": ["text"]}
        )
        self.dim = embedder.dimension
        self._embedder, self._store, self._report = embedder, store, report
        self._prompts = {"query": query_prompt, "document": document_prompt}
        self._known: dict[str, dict[str, Vectors]] = {"query": {}, "document": {}}
        # By id() of the corpus, which is kept so that no other object gets its id.
        self._corpora: dict[int, tuple[Dataset, StoredVectors]] = {}
        self._corpus_id = 0

    def encode(self, inputs: Any, *, prompt_type: object = None, **_: object) -> Vectors:
        """(n, dim) float32 unit vectors of the texts of a DataLoader, in their order.

        A text that this task has encoded before is not encoded again.
        """
        kind = "document" if prompt_type == "document" else "query"
        known, texts = self._known[kind], inputs.dataset["text"][:]
        new = [text for text in dict.fromkeys(texts) if text not in known]
        vectors = self._stored(lambda start, stop: new[start:stop], len(new), kind)[:]
        known.update(zip(new, vectors, strict=True))
        full = np.stack([known[text] for text in texts]) if texts else vectors
        return cut_dimension(full, self.dim)

    def similarity(self, a: Any, b: Any) -> Tensor:
        """(n, m) cosine similarities of unit vectors."""
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a: Any, b: Any) -> Tensor:
        """(n,) cosine similarities of the rows of two sets of unit vectors."""
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(-1)

    def index(self, corpus: "Dataset", **_: object) -> None:
        """Encode the documents that `search` looks at: a Dataset with id, text and perhaps title.

        What the store or this object already has is not encoded again.
        """
        self._corpus_id = id(corpus)
        if self._corpus_id not in self._corpora:
            stored = self._stored(
                lambda start, stop: _document_texts(corpus[start:stop]), len(corpus), "document"
            )
            self._corpora[self._corpus_id] = corpus, stored

    def search(
        self,
        queries: "Dataset",
        *,
        task_metadata: Any,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **_: object,
    ) -> dict[str, dict[str, float]]:
        """The best documents of each query: {query id: {document id: cosine}}.

        With `top_ranked`, only those candidates are ranked.
        """
        # Only mteb knows how a conversation, or a query with an instruction, becomes a text.
        from mteb._create_dataloaders import create_dataloader
        from mteb.types import PromptType

        query = PromptType.query
        loader = create_dataloader(queries, task_metadata=task_metadata, prompt_type=query)
        vectors = self.encode(loader)  # (Q, dim)
        corpus, stored = self._corpora[self._corpus_id]
        documents, names = stored.cut(self.dim), corpus["id"][:]
        hits: dict[str, dict[str, float]] = {}
        if top_ranked is not None:
            rows = {name: row for row, name in enumerate(names)}
            everything = documents[:]  # (N, dim)
            for name, vector in zip(queries["id"], vectors, strict=True):
                candidates = list(dict.fromkeys(top_ranked.get(name, ())))
                scores = everything[[rows[candidate] for candidate in candidates]] @ vector
                best = np.argsort(-scores, kind="stable")[:top_k]
                hits[name] = {candidates[i]: float(scores[i]) for i in best}
            return hits
        for start in range(0, len(vectors), _QUERIES):
            part = slice(start, start + _QUERIES)
            found = find_top_k(
                vectors[part], documents, top_k, device=self._embedder.device, exact=False
            )
            for name, ids, scores in zip(
                queries["id"][part], *map(np.ndarray.tolist, found), strict=True
            ):
                hits[name] = {names[i]: score for i, score in zip(ids, scores, strict=True)}
            self._report(0, 0)
        return hits

    def _stored(
        self, read: Callable[[int, int], Sequence[str]], count: int, kind: str
    ) -> StoredVectors:
        """The vectors of texts at the full dimension, encoded where the store lacks them."""
        texts = TextSet.of(read, count, self._prompts[kind])
        stored = StoredVectors(self._store, texts, self._embedder.dimension)
        missing = set(stored.missing())
        for shard, (start, stop) in enumerate(pairwise(stored.cuts.tolist())):
            if shard in missing:
                stored.encode(shard, self._embedder, needs_disk=False)
            # Counted as the plan counts: up to about the length that is encoded.
            sizes = np.minimum(texts.sizes[start:stop], 4 * self._embedder.max_length)
            self._report(stop - start, int(sizes.sum()))
        return stored


def _document_texts(documents: Mapping[str, Sequence[str]]) -> list[str]:
    """Title and text in one, joined as mteb joins them. A title may be empty, None or absent."""
    titles = documents.get("title") or [""] * len(documents["text"])
    pairs = zip(titles, documents["text"], strict=True)
    return [f"{title} {text}".strip() if title else text.strip() for title, text in pairs]
