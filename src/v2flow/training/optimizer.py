"""AdamW as MAR-style models are trained: no decay on biases, norms and embeddings; warm-up, constant, decay."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from v2flow.errors import V2FlowError


@dataclass
class OptimizerConfig:
    """Optimiser and learning-rate schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = 0.02
    """Decay of matrices; biases, norms and embeddings have none."""
    warmup_steps: int = 50
    """Steps of linear warm-up, counted in optimiser steps."""
    total_steps: int = 2000
    """Optimiser steps of the whole training; also the clock of the noise and temperature schedules."""
    decay_share: float = 0.3
    """Last share of the steps over which the rate falls linearly to a hundredth; 0 keeps it constant."""

    def __post_init__(self) -> None:
        if self.total_steps < 1 or self.warmup_steps < 0:
            raise V2FlowError(
                f"option optimizer: expected total_steps >= 1 and warmup_steps >= 0, "
                f"found {self.total_steps} and {self.warmup_steps}"
            )
        if not 0 <= self.decay_share <= 1:
            raise V2FlowError(
                f"option optimizer.decay_share: expected a share in [0, 1], found {self.decay_share}"
            )

    def factor(self, step: int) -> float:
        """Learning rate at `step` as a share of the peak."""
        warm = min((step + 1) / (self.warmup_steps + 1), 1.0)
        left = max(self.total_steps - step, 0) / max(self.decay_share * self.total_steps, 1e-9)
        return warm * max(min(left, 1.0), 0.01 if self.decay_share else 1.0)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups, with and without decay; none is left out."""
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    decayed = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        if isinstance(part, (nn.Linear, nn.Conv2d))
        for name, _ in part.named_parameters(recurse=False)
        if name == "weight"
    }
    return [
        {"params": [p for n, p in trainable.items() if n in decayed], "weight_decay": weight_decay},
        {"params": [p for n, p in trainable.items() if n not in decayed], "weight_decay": 0.0},
    ]


def configure_adamw(module: nn.Module, config: OptimizerConfig) -> dict[str, Any]:
    """Lightning's answer to `configure_optimizers`: AdamW and a schedule that steps every optimiser step."""
    optimizer = torch.optim.AdamW(
        parameter_groups(module, config.weight_decay), lr=config.lr, betas=(config.betas[0], config.betas[1])
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, config.factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
