"""Losses: pure functions of vectors, labels and masks."""

from kalm_min.losses.cosines import (
    ABSENT,
    Prefixes,
    cosines,
    cosines_of,
    log_sum,
    paired_cosines,
    prefixes,
)
from kalm_min.losses.distillation import distillation_rows
from kalm_min.losses.info_nce import contrastive_rows, info_nce
from kalm_min.losses.masking import Documents, Queries, candidate_masks
from kalm_min.losses.matryoshka import matryoshka
from kalm_min.losses.mixing import Mixes, mixed_cosines

__all__ = [
    "ABSENT",
    "Documents",
    "Mixes",
    "Prefixes",
    "Queries",
    "candidate_masks",
    "contrastive_rows",
    "cosines",
    "cosines_of",
    "distillation_rows",
    "info_nce",
    "log_sum",
    "matryoshka",
    "mixed_cosines",
    "paired_cosines",
    "prefixes",
]
