"""Losses: pure functions of embeddings, labels and masks, independent of processes."""

from kalm_min.losses.info_nce import info_nce as info_nce
from kalm_min.losses.info_nce import matryoshka as matryoshka
from kalm_min.losses.masking import ContrastiveBatch as ContrastiveBatch
from kalm_min.losses.masking import count_pairs as count_pairs
from kalm_min.losses.masking import non_candidates as non_candidates
from kalm_min.losses.v2 import distillation as distillation
from kalm_min.losses.v2 import mixed_cosines as mixed_cosines
