"""Losses: pure functions of vectors, labels and masks."""

from kalm_min.losses.info_nce import info_nce
from kalm_min.losses.masking import Documents, Queries, candidate_masks
from kalm_min.losses.matryoshka import matryoshka

__all__ = ["Documents", "Queries", "candidate_masks", "info_nce", "matryoshka"]
