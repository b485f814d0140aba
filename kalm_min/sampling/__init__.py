"""Which examples form a batch, which texts share a forward: arithmetic on integers, no torch."""

from kalm_min.sampling.task_batches import TaskBatchSampler, task_draws
from kalm_min.sampling.token_budget import token_budget_batches

__all__ = ["TaskBatchSampler", "task_draws", "token_budget_batches"]
