"""An `Embedder` in the shape mteb asks for: an encoder and a search in one object.

Every text of a task is encoded once, at full width; each Matryoshka dimension is cut from that and
scaled back to unit length. Corpora are never held whole: a search walks blocks and keeps, on the
device and for all dimensions at once, the best so far. mteb's own search would do it with a Python
heap per query; the rankings are the same. With a store, vectors outlive the task, and other processes
may encode parts of the corpus beforehand.

Not here: scores (`scoring`, mteb). One adapter serves one task.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kalm_min import shards
from kalm_min.embedder import Embedder
from kalm_min.evaluation.scoring import Ranking, rows_of

BLOCK = 50_000  # documents of a corpus encoded and searched at a time
_QUERIES = 1024  # queries compared with a slice at a time: 0.2 GB of scores
_PAIRS = 65_536  # queries compared with a candidate each at a time

Vectors = NDArray[np.float32]


class Adapter:
    """mteb's EncoderProtocol and SearchProtocol over an Embedder, for one task."""

    def __init__(
        self,
        embedder: Embedder,
        *,
        query_prompt: str = "",
        document_prompt: str = "",
        dims: Sequence[int] = (),
        store: Path | None = None,
        report: Callable[[int, int], None] = lambda texts, characters: None,
    ) -> None:
        """Wrap a model for one task.

        Args:
            embedder: the model.
            query_prompt: put before queries, and before every text of tasks without two sides.
            document_prompt: put before the documents of retrieval and reranking.
            dims: the dimensions that will be asked for; the full one if none is given.
            store: folder of shards of this model with these settings; vectors are taken from there
                and put there.
            report: called with the texts and characters done since the last call.
        """
        from mteb.models import ModelMeta

        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={"name": "kalm_min/evaluated", "revision": "0", "modalities": ["text"]}
        )
        self.dims = tuple(dims) or (embedder.dimension,)
        self.dim = self.dims[0]
        self._embedder = embedder
        self._prompts = {"query": query_prompt, "document": document_prompt}
        self._store, self._report = store, report
        self._vectors: dict[str, dict[str, Vectors]] = {"query": {}, "document": {}}
        self._corpus: Any = None
        # By place in the task, queries and corpus (held, so that its id stays its own).
        self._rankings: dict[tuple[Any, ...], dict[int, Ranking]] = {}
        self._corpora: list[Any] = []

    def encode(self, inputs: Any, *, prompt_type: Any = None, **_: Any) -> Vectors:
        """(n, dim) float32 unit vectors of a DataLoader's texts, in their order."""
        side = "document" if prompt_type == "document" else "query"
        return _cut(
            torch.from_numpy(self._encode(inputs.dataset["text"][:], side)), self.dim
        ).numpy()

    def similarity(self, a: Any, b: Any) -> Tensor:
        """(n, m) cosine similarities of unit vectors."""
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a: Any, b: Any) -> Tensor:
        """(n,) cosine similarities of rows."""
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(-1)

    def index(self, corpus: Any, **_: Any) -> None:
        """Take the documents to search: a Dataset with id, text and perhaps title."""
        self._corpus = corpus

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        top_ranked: dict[str, list[str]] | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """Find the best documents of each query: {query id: {document id: cosine}}."""
        place = (hf_split, hf_subset)
        ranking = self.rank(
            queries,
            self._corpus,
            place=place,
            task_metadata=task_metadata,
            top_k=top_k,
            top_ranked=top_ranked,
        )
        names = self._corpus["id"][:]
        return {
            query: {names[row]: score for row, score in zip(rows, scores, strict=True) if row >= 0}
            for query, rows, scores in zip(
                queries["id"], ranking.rows.tolist(), ranking.scores.tolist(), strict=True
            )
        }

    def rank(
        self,
        queries: Any,
        corpus: Any,
        *,
        place: tuple[str, str],
        task_metadata: Any,
        top_k: int,
        top_ranked: dict[str, list[str]] | None,
    ) -> Ranking:
        """The best documents of each query at the present dimension.

        With `top_ranked` only those candidates are ranked. The first call ranks for every
        dimension; calls for the other dimensions look it up.
        """
        # The only place where a query may be a conversation or carry an instruction of its own.
        from mteb._create_dataloaders import create_dataloader
        from mteb.types import PromptType

        names = queries["id"][:]
        key = (*place, id(corpus), top_k, top_ranked is None, hash(tuple(names)))
        if key not in self._rankings:
            loader: Any = create_dataloader(
                queries, task_metadata=task_metadata, prompt_type=PromptType.query
            )
            full = torch.from_numpy(self._encode(loader.dataset["text"][:], "query"))  # (Q, D)
            self._corpora.append(corpus)
            if top_ranked is None:
                self._rankings[key] = self._search(full, corpus, top_k)
            else:
                lists = [list(dict.fromkeys(top_ranked.get(name, []))) for name in names]
                self._rankings[key] = self._rerank(full, corpus, lists, top_k)
        return self._rankings[key][self.dim]

    def encode_slice(self, corpus: Any, number: int, count: int) -> None:
        """Put the vectors of one of `count` slices of a corpus into the store: every so many blocks."""
        for start in range(number * BLOCK, len(corpus), count * BLOCK):
            self._embed(_document_texts(corpus[start : start + BLOCK]), "document")

    def _search(self, full: Tensor, corpus: Any, top_k: int) -> dict[int, Ranking]:
        """Per dimension the best `top_k` documents of each query."""
        device = self._embedder.device
        queries = {dim: _cut(full.to(device), dim).split(_QUERIES) for dim in self.dims}
        best: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        # One for all products: fresh memory of this size costs a quarter of the product's time.
        scratch = full.new_empty(min(len(full), _QUERIES) * min(len(corpus), BLOCK), device=device)
        for start in range(0, len(corpus), BLOCK):
            texts = _document_texts(corpus[start : start + BLOCK])
            documents = torch.from_numpy(self._embed(texts, "document")).to(device)  # (S, D)
            for dim in self.dims:
                slice_ = _cut(documents, dim)  # (S, dim)
                for number, block in enumerate(queries[dim]):
                    scores = scratch[: len(block) * len(slice_)].view(len(block), len(slice_))
                    torch.mm(block, slice_.T, out=scores)  # (q, S)
                    scores, rows = scores.topk(min(top_k, len(slice_)))
                    found = best.get((dim, number))
                    best[dim, number] = _merge(found, (scores, rows + start), top_k)

        def joined(dim: int, part: int) -> Any:
            blocks = [best[dim, number][part].cpu() for number in range(len(queries[dim]))]
            return torch.cat(blocks).numpy()

        return {dim: Ranking(joined(dim, 0), joined(dim, 1)) for dim in self.dims}

    def _rerank(
        self, full: Tensor, corpus: Any, candidates: list[list[str]], top_k: int
    ) -> dict[int, Ranking]:
        """Per dimension the best `top_k` of each query's candidates."""
        names = [name for names in candidates for name in names]  # (P,) pairs of all queries
        rows = torch.from_numpy(rows_of(names, corpus["id"][:]))  # (P,)
        counts = torch.tensor([len(names) for names in candidates])  # (Q,)
        owners = torch.repeat_interleave(torch.arange(len(counts)), counts)  # (P,)
        places = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[owners]  # (P,)
        vectors = torch.from_numpy(self._encode(_document_texts(corpus[:]), "document"))
        size = (len(counts), int(counts.max()) if len(counts) else 0)
        found: dict[int, Ranking] = {}
        for dim in self.dims:
            queries, documents = _cut(full, dim), _cut(vectors, dim)
            scores = torch.full(size, -torch.inf)  # (Q, most candidates)
            for part in torch.arange(len(rows)).split(_PAIRS):
                of = owners[part]
                scores[of, places[part]] = (queries[of] * documents[rows[part]]).sum(-1)
            table = torch.full(size, -1)
            table[owners, places] = rows
            scores, order = scores.topk(min(top_k, size[1]))
            found[dim] = Ranking(scores.numpy(), table.gather(1, order).numpy())
        return found

    def _encode(self, texts: list[str], side: str) -> Vectors:
        """(n, D) raw unit vectors; a text that this task has shown before is not encoded again."""
        known = self._vectors[side]
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known.update(zip(new, self._embed(new, side), strict=True))
        return np.stack([known[text] for text in texts]) if texts else self._embed([], side)

    def _embed(self, texts: list[str], side: str) -> Vectors:
        """(n, D) unit vectors, shard by shard: found in the store, or encoded.

        The same shards with a store and without: what is encoded together decides the last bits.
        """
        vectors = np.empty((len(texts), self._embedder.dimension), np.float32)
        for place, name in shards.split(texts, self._prompts[side]):
            part = texts[place]
            vectors[place] = self._shard(part, side, name)
            self._report(len(part), sum(map(len, part)))
        return vectors

    def _shard(self, texts: list[str], side: str, name: str) -> Vectors:
        path = self._store / name if self._store else None
        if path:
            with suppress(OSError, ValueError):  # absent, or damaged: encode it (again)
                return shards.read(path, (len(texts), self._embedder.dimension))
        vectors = self._embedder.encode(texts, self._prompts[side])
        if not np.isfinite(vectors).all():
            raise ValueError(
                f"the model gives vectors with NaN or infinity in {self._embedder.dtype}; "
                "try --dtype float32"
            )
        if path:
            try:
                shards.write(path, vectors)
            except OSError as error:  # a full disk: they are encoded again where they are needed
                sys.stderr.write(f"{path} was not kept: {error}\n")
        return vectors


def _cut(vectors: Tensor, dim: int) -> Tensor:
    """The first `dim` coordinates (n, dim) of unit vectors, scaled to unit length; zeros stay zero."""
    return vectors if dim == vectors.shape[1] else F.normalize(vectors[:, :dim], dim=-1)


def _document_texts(documents: dict[str, list[str]]) -> list[str]:
    """Title and text in one, joined as mteb joins them."""
    titles = documents.get("title") or [""] * len(documents["text"])
    pairs = zip(titles, documents["text"], strict=True)
    return [f"{title} {text}".strip() if title else text.strip() for title, text in pairs]


def _merge(
    a: tuple[Tensor, Tensor] | None, b: tuple[Tensor, Tensor], top_k: int
) -> tuple[Tensor, Tensor]:
    """The best `top_k` of two sets of (scores, rows), each (q, at most top_k)."""
    if a is None:
        return b
    scores, rows = (torch.cat(pair, dim=1) for pair in zip(a, b, strict=True))
    scores, order = scores.topk(min(top_k, scores.shape[1]))
    return scores, rows.gather(1, order)
