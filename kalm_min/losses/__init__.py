"""Losses: pure functions of embeddings, labels and masks; they know nothing of processes."""

from kalm_min.losses.distillation import distillation
from kalm_min.losses.info_nce import MASKED_LOGIT, info_nce
from kalm_min.losses.masking import ContrastiveBatch, count_pairs, non_candidates
from kalm_min.losses.matryoshka import matryoshka
from kalm_min.losses.mixing import mixed_cosines

__all__ = [
    "MASKED_LOGIT",
    "ContrastiveBatch",
    "count_pairs",
    "distillation",
    "info_nce",
    "matryoshka",
    "mixed_cosines",
    "non_candidates",
]
