"""The loss of a batch from its vectors, tile by tile: any number of candidates in bounded memory.

B  queries of this process    N  documents of all processes    Q  queries of all    D  width
W  Matryoshka widths, rising  M  documents a query brought, its positive first, padded
b, n  queries and candidates of a tile

    -log p = log(1 + exp(z - s(q, d+) / t)),    z = log sum_n exp(s(q, d_n) / t) over the negatives

The sum over n is one over tiles of n: a tile gives the logarithm of its part, (W, b), and where not
all scores fit into memory it is computed again in backward. On a CPU a tile also stays in the cache:
4 MiB of scores a width are written and read there, not in memory that is fresh each time.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kalm_min.losses import (
    ABSENT,
    Documents,
    Mixes,
    Prefixes,
    Queries,
    candidate_masks,
    contrastive_rows,
    cosines_of,
    distillation_rows,
    log_sum,
    mixed_cosines,
    paired_cosines,
    prefixes,
)

_CACHED = 1 << 20  # pairs of a tile on a CPU
_REASONS = ("foreign", "positive", "query", "group", "margin")
LEDGER = (
    *("hard", "in_batch", "cross_device"),
    *("query_query", "document_document", "mixed"),
    *(f"masked_{reason}" for reason in _REASONS),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The loss of a step; the defaults are those of the public fine-tuning script."""

    temperature: float = 0.01
    """Divides the cosine."""
    gamma: float = 0.0
    """Exponent of the focal weight (1 - p)^gamma; 0 is plain InfoNCE, 0.5 is the V2 report's."""
    matryoshka_dims: tuple[int, ...] = ()
    """Leading widths that are trained to stand alone; none trains the full width only."""
    matryoshka_weights: tuple[float, ...] = ()
    """One a width; the report's are 1, 0.3, 0.2, 0.1, 0.1."""
    mixing: bool = False
    """Add two synthetic negatives a query, mixed from its own (V2)."""
    distillation_weight: float = 0.0
    """Share of the KL term against teacher scores in the data; 0.7 is the V2.5 report's."""
    distillation_temperature: float = 0.05
    """Divides student and teacher scores in the KL term."""
    memory_gib: float = 1.0
    """What the scores may take beside the vectors; those of larger batches are computed again in backward."""
    mask_false_negatives: bool = True
    """Documents whose text is a known positive of the query, or the query, are no negatives."""
    false_negative_margin: float | None = None
    """Nor are documents whose cosine exceeds the positive's by more than this; Qwen3's is 0.1."""
    query_negatives: bool = False
    """The other queries of the batch are negatives of a query too."""
    document_negatives: bool = False
    """A query's negatives are negatives of its positive too."""

    def __post_init__(self) -> None:
        """Refuse what cannot be computed."""
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected more than 0, found {self.temperature}")
        if self.gamma < 0:
            raise ValueError(f"gamma: expected 0 or more, found {self.gamma}")
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(
                f"distillation_weight: expected 0 to 1, found {self.distillation_weight}"
            )
        if self.distillation_temperature <= 0 or self.memory_gib <= 0:
            raise ValueError("distillation_temperature and memory_gib must be more than 0")
        if self.false_negative_margin is not None and not self.mask_false_negatives:
            raise ValueError("false_negative_margin: expected mask_false_negatives to be true")
        if len(set(self.matryoshka_dims)) != len(self.matryoshka_dims):
            raise ValueError("matryoshka_dims: expected each width once")
        if len(self.matryoshka_dims) != len(self.matryoshka_weights):
            raise ValueError(
                f"matryoshka_weights: expected one for each of the {len(self.matryoshka_dims)} "
                f"matryoshka_dims, found {len(self.matryoshka_weights)}"
            )


class Own(NamedTuple):
    """The documents that each query brought, its positive first, padded with it."""

    rows: Tensor
    """(B, M) int64 among all documents."""
    present: Tensor
    """(B, M) bool, False for padding."""
    teacher: Tensor
    """(B, M) the teacher's scores."""
    pair: Tensor
    """(B, 2) int64, see `Mixes`."""
    share: Tensor
    """(B,), see `Mixes`."""


class Rows(NamedTuple):
    """The queries of this process and all that they are compared with."""

    queries: Tensor
    """(B, D)."""
    documents: Tensor
    """(N, D)."""
    labels: Tensor
    """(B,) int64 row of each query's positive."""
    asked: Queries
    known: Documents
    own: Own
    everyone: tuple[Tensor, Documents] | None = None
    """The queries of all processes as candidates: (Q, D), and what is known of them."""


class Block(NamedTuple):
    """Queries of a tile."""

    queries: Prefixes
    positives: Prefixes
    asked: Queries
    labels: Tensor
    """(b,) rows of the positives among the documents."""
    bound: Tensor
    """(b,) a document with a higher cosine at the full width is no negative."""


class Tile(NamedTuple):
    """Candidates of a tile."""

    vectors: Prefixes
    known: Documents
    first: int
    """Row of the first one among all."""
    are_queries: bool


def batch_loss(rows: Rows, config: LossConfig) -> tuple[Tensor, dict[str, float]]:
    """The mean loss over the queries, and the sums of `LEDGER`, in about `config.memory_gib`."""
    dims = sorted(config.matryoshka_dims or (rows.queries.shape[1],))
    weights = dict(zip(config.matryoshka_dims, config.matryoshka_weights, strict=True))
    height, width, fits = _tile_shape(rows, len(dims), config)
    blocks = list(_blocks(rows, height, dims, config))
    sides = [(rows.documents, rows.known, False)]
    sides += [] if rows.everyone is None else [(*rows.everyone, True)]
    mine = rows.asked.numbers[0], rows.asked.numbers[-1]
    ledger = torch.zeros(len(LEDGER), dtype=torch.int64, device=rows.queries.device)
    sums: list[list[Tensor]] = [[] for _ in blocks]  # (1 or 2, W, b) of each tile
    # Tile by tile, so that backward is done with one before it begins the next.
    for tile in (tile for side in sides for tile in _tiles(*side, width, dims)):
        for block, parts in zip(blocks, sums, strict=True):
            given = (block, tile, mine, config)
            found, counts = _tile(*given) if fits else _again_in_backward(*given)
            parts.append(found)
            ledger += counts
    z = torch.cat([torch.cat(parts).logsumexp(0) for parts in sums], dim=1)  # (W, B)
    pairs = [paired_cosines(block.queries, block.positives) for block in blocks]
    similarity = torch.cat(pairs, dim=1)  # (W, B)
    if config.mixing:
        mixed = _mixed(rows, dims)  # (W, B, 2)
        z = torch.logaddexp(z, log_sum(mixed, config.temperature))
        ledger[LEDGER.index("mixed")] = (mixed[-1] > ABSENT).sum()
    losses = contrastive_rows(similarity / config.temperature, z, gamma=config.gamma)  # (W, B)
    if a := config.distillation_weight:
        losses = (1 - a) * losses + a * _gap(rows, dims, config.distillation_temperature)
    scale = losses.new_tensor([weights.get(dim, 1.0) for dim in dims])
    value = (scale @ losses).mean()
    return value, dict(zip(LEDGER, ledger.tolist(), strict=True))


def _tile_shape(rows: Rows, widths: int, config: LossConfig) -> tuple[int, int, bool]:
    """Queries and candidates of a tile, and whether all tiles together fit into the memory.

    Measured (benchmarks/loss_memory.py): about 12 float32 numbers a pair and width in backward.
    """
    sides = 1 + config.document_negatives
    pairs = max(1, int(config.memory_gib * 2**30 / (sides * (48 * widths + 16))))
    candidates = len(rows.documents) + (0 if rows.everyone is None else len(rows.everyone[0]))
    fits = len(rows.queries) * candidates <= pairs
    if not rows.queries.is_cuda:
        pairs = min(pairs, _CACHED)
    height = min(len(rows.queries), math.isqrt(pairs))
    return height, pairs // height, fits


def _blocks(rows: Rows, height: int, dims: Sequence[int], config: LossConfig) -> Iterator[Block]:
    """The queries, so many at a time."""
    positives = rows.documents[rows.labels]  # (B, D)
    margin = math.inf if config.false_negative_margin is None else config.false_negative_margin
    facts = zip(*(fact.split(height) for fact in rows.asked), strict=True)
    columns = (column.split(height) for column in (rows.queries, positives, rows.labels))
    for query, positive, labels, asked in zip(*columns, facts, strict=True):
        pair = prefixes(query, dims), prefixes(positive, dims)
        with torch.no_grad():
            bound = paired_cosines(*pair)[-1] + margin  # (b,)
        yield Block(*pair, Queries(*asked), labels, bound)


def _tiles(
    vectors: Tensor, known: Documents, are_queries: bool, width: int, dims: Sequence[int]
) -> Iterator[Tile]:
    """Candidates, so many at a time."""
    facts = zip(*(fact.split(width) for fact in known), strict=True)
    for number, (part, about) in enumerate(zip(vectors.split(width), facts, strict=True)):
        yield Tile(prefixes(part, dims), Documents(*about), number * width, are_queries)


def _tile(
    block: Block, tile: Tile, mine: tuple[Tensor, Tensor], config: LossConfig
) -> tuple[Tensor, Tensor]:
    """((1 or 2, W, b) logarithms of this tile's part of the sum, the ledger's counts over it).

    A query's negatives are negatives of its positive too, where asked for: the report's sum has
    neither these nor other queries; the public code has them as an option, and so have GTE and Qwen3.
    """
    labels = block.asked.numbers if tile.are_queries else block.labels
    cosines = cosines_of(block.queries, tile.vectors)  # W of (b, n), the widest last
    close = None if tile.are_queries else (cosines[-1].detach(), block.bound)
    masks = candidate_masks(block.asked, tile.known, labels, first=tile.first, close=close)
    if not config.mask_false_negatives:
        masks = {name: found & (name == "foreign") for name, found in masks.items()}
    numbers = torch.arange(len(tile.known.hashes), device=labels.device) + tile.first  # (n,)
    none = labels[:, None] == numbers  # (b, n)
    for found in masks.values():
        none |= found
    every = [cosines]
    counts = dict.fromkeys(LEDGER, labels.new_zeros(()))
    count = (~none).sum()
    if tile.are_queries:
        counts["query_query"] = count
    else:
        own = block.asked.numbers[:, None] == tile.known.owners  # (b, n)
        here = (tile.known.owners >= mine[0]) & (tile.known.owners <= mine[1])  # (n,)
        hard, near = (own & ~none).sum(), (here & ~none).sum()
        counts |= {"hard": hard, "in_batch": near - hard, "cross_device": count - near}
        counts |= {f"masked_{reason}": masks[reason].sum() for reason in masks}
        if config.document_negatives:
            every.append(cosines_of(block.positives, tile.vectors))
            counts["document_document"] = count
    found = [
        torch.stack([log_sum(c.masked_fill(none, ABSENT), config.temperature) for c in widths])
        for widths in every
    ]
    return torch.stack(found), torch.stack(list(counts.values()))


def _again_in_backward(*given: Any) -> tuple[Tensor, Tensor]:
    """`_tile`, of which only the inputs are kept."""
    return checkpoint(_tile, *given, use_reentrant=False, preserve_rng_state=False)


def _mixed(rows: Rows, dims: Sequence[int]) -> Tensor:
    """(W, B, 2) cosines of each query with the mixes of its own negatives."""
    own, present, _, pair, share = rows.own
    mixes = Mixes(own[:, 1:], present[:, 1:], pair, share)
    negatives = rows.documents[mixes.own]  # (B, M - 1, D)
    return torch.stack(
        [mixed_cosines(rows.queries[:, :dim], negatives[:, :, :dim], mixes) for dim in dims]
    )


def _gap(rows: Rows, dims: Sequence[int], temperature: float) -> Tensor:
    """(W, B) divergence from the teacher over each query's own documents."""
    own, present, teacher, *_ = rows.own
    documents = prefixes(rows.documents[own], dims)  # (B, M, D)
    similarity = paired_cosines(prefixes(rows.queries[:, None], dims), documents)  # (W, B, M)
    return distillation_rows(similarity, teacher, present, temperature=temperature)
