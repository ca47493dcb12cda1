"""AdamW as MAR-style models are trained: no decay on biases, norms and embeddings; warm-up, constant, decay."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

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
    fused: Optional[bool] = None
    """AdamW as one kernel, equal but for rounding; left out: on CPUs and CUDA GPUs, unless precision is 16-mixed."""
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

    def fuses(self, parameters: Iterable[nn.Parameter], scaled: bool) -> bool:
        """Whether AdamW of these parameters is fused.

        Args:
            scaled: a GradScaler stands before the optimiser; Lightning cannot clip for a fused one then, whose step
                undoes the scaling itself (`_step_supports_amp_scaling`).

        Raises:
            V2FlowError: it is asked for, and gradients are scaled.
        """
        if scaled and self.fused:
            raise V2FlowError(
                "option optimizer.fused: true does not go with trainer.precision=16-mixed, whose scaled gradients "
                "could not be clipped; leave it out, or use bf16-mixed"
            )
        if self.fused is not None:
            return self.fused
        return not scaled and all(p.device.type in ("cpu", "cuda") for p in parameters)

    def factor(self, step: int, begin: float = 0.0, end: float = 1.0) -> float:
        """Learning rate at `step` as a share of the peak, for parameters that learn from the share `begin` of the
        training to the share `end`: zero outside, with a warm-up and a decay of their own inside."""
        first, last = begin * self.total_steps, end * self.total_steps
        if step < first or (end < 1 and step >= last):
            return 0.0
        warm = min((step - first + 1) / (self.warmup_steps + 1), 1.0)
        left = max(last - step, 0) / max(self.decay_share * (last - first), 1e-9)
        return warm * max(min(left, 1.0), 0.01 if self.decay_share else 1.0)


_GPT2_LINEAR = "Conv1D"  # a linear layer of transformers, which is not imported for tokenizers
Windows = dict[str, tuple[float, float]]


def parameter_groups(
    module: nn.Module, weight_decay: float, windows: Windows | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in groups, with and without decay, none left out.

    Args:
        windows: prefixes of parameter names and the shares of the training between which those parameters learn;
            the first prefix that fits counts. Each window has its two groups, under the key `window`.
    """
    windows = windows or {"": (0.0, 1.0)}
    decayed = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        if isinstance(part, (nn.Linear, nn.Conv2d)) or type(part).__name__ == _GPT2_LINEAR
        for name, _ in part.named_parameters(recurse=False)
        if name == "weight"
    }
    groups: dict[tuple[str, bool], dict[str, Any]] = {
        (prefix, decays): {"params": [], "weight_decay": weight_decay if decays else 0.0, "window": window}
        for prefix, window in windows.items()
        for decays in (True, False)
    }
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            prefix = next(p for p in windows if name.startswith(p))
            groups[prefix, name in decayed]["params"].append(parameter)
    # An empty group has no state, and a sharded checkpoint that has it cannot be read.
    return [group for group in groups.values() if group["params"]]


def configure_adamw(
    module: nn.Module, config: OptimizerConfig, windows: Windows | None = None, scaled: bool = False
) -> dict[str, Any]:
    """Lightning's answer to `configure_optimizers`: AdamW and a schedule that steps every optimiser step.

    Args:
        scaled: as of `OptimizerConfig.fuses`.
    """
    groups = parameter_groups(module, config.weight_decay, windows)
    fused = config.fuses((p for group in groups for p in group["params"]), scaled)
    # None where it is not: with False torch would leave its other fast way (foreach) as well.
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=True if fused else None
    )
    factors: list[Callable[[int], float]] = [
        partial(config.factor, begin=group["window"][0], end=group["window"][1]) for group in groups
    ]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
