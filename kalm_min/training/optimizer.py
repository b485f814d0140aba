"""AdamW and the linear schedule of the public recipe.

The learning rate is a pure function of the step, so nothing about it needs saving.
"""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW; the defaults are those of the public fine-tuning script (paper notes, section 1.2)."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    warmup_ratio: float = 0.1
    """Share of all steps over which the rate rises from 0 to its peak."""
    weight_decay: float = 0.0
    """Decay of weight matrices; biases and norms never decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients of all parameters together are scaled down to this length."""

    def __post_init__(self) -> None:
        """Refuse values that cannot train."""
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate: expected more than 0, found {self.learning_rate}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio: expected 0 to 1, found {self.warmup_ratio}")
        if self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm: expected more than 0, found {self.max_grad_norm}")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, matrices with weight decay and vectors without."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
    )


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """The rate of update `step` (from 0) of `total`: Hugging Face's linear schedule with warm-up."""
    warmup = round(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * step / warmup
    return config.learning_rate * (total - step) / max(1, total - warmup)
