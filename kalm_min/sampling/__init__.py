"""Which examples form a batch, which texts share a forward: arithmetic on integers, no torch."""

from kalm_min.sampling.task_batches import TaskBatchSampler
from kalm_min.sampling.token_budget import token_budget_batches

__all__ = ["TaskBatchSampler", "token_budget_batches"]
