"""Losses of the baselines on decoded pixels, beside the squared error: perceptual (LPIPS) and adversarial."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from v2flow.baselines.adversarial import Adversary, adaptive_weight
from v2flow.errors import V2FlowError


@dataclass
class PixelLossConfig:
    """Weights of the losses on pixels; with both at 0 there are none."""

    perceptual: float = 0.0
    """Weight of the LPIPS distance (AlexNet) between pictures and reconstructions; needs its weights file."""
    adversarial: float = 0.0
    """Weight of the adversarial loss, on top of the adaptive weight of VQGAN, which makes 1 mean: as strong as the
    other losses."""
    adversarial_start: int = 0
    """Training step at which the discriminator starts to learn and to be heard."""
    adversarial_ramp: int = 500
    """Steps over which the adversarial weight then rises from 0, or the reconstruction would suffer at once."""
    discriminator_lr: float = 2e-4
    """Learning rate of the discriminator's AdamW, constant."""
    discriminator_width: int = 64
    """Channels of the discriminator's first layer."""
    discriminator_depth: int = 2
    """Times that the discriminator halves the picture: 1 judges patches of 16 px, 2 of 34 px, 3 of 70 px."""

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("perceptual", self.perceptual >= 0, "a weight >= 0"),
            ("adversarial", self.adversarial >= 0, "a weight >= 0"),
            ("adversarial_start", self.adversarial_start >= 0, "a step >= 0"),
            ("adversarial_ramp", self.adversarial_ramp >= 0, "a number of steps >= 0"),
            ("discriminator_lr", self.discriminator_lr > 0, "a rate > 0"),
            ("discriminator_width", self.discriminator_width > 0 and self.discriminator_width % 8 == 0,
             "a multiple of 8"),
            ("discriminator_depth", self.discriminator_depth >= 1, "at least 1"),
        ):  # fmt: skip
            if not holds:
                raise V2FlowError(
                    f"option pixel_losses.{name}: expected {expected}, found {getattr(self, name)!r}"
                )

    @property
    def active(self) -> bool:
        """Whether there is anything to compute."""
        return self.perceptual > 0 or self.adversarial > 0

    def ramp(self, step: int) -> float:
        """Share of the adversarial weight at a training step, in [0, 1]."""
        if not self.adversarial or step < self.adversarial_start:
            return 0.0
        return min((step - self.adversarial_start + 1) / (self.adversarial_ramp + 1), 1.0)


class PixelLosses:
    """The networks behind the losses. No `torch.nn.Module`: what holds it does not own their weights, and its copies
    share them.

    Args:
        image_size: the side of the pictures.
        seed: of the discriminator's first weights.

    Raises:
        V2FlowError: the LPIPS weights are not there, or pictures too small for one of the networks.
    """

    def __init__(self, config: PixelLossConfig, image_size: int, device: torch.device, seed: int) -> None:
        self.config = config
        self.lpips = _lpips(image_size, device) if config.perceptual else None
        self.adversary: Adversary | None = None
        if config.adversarial:
            self.adversary = Adversary(
                image_size, config.discriminator_width, config.discriminator_depth, config.discriminator_lr,
                device, seed,
            )  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> "PixelLosses":
        return self

    def __call__(
        self, images: Tensor, pixels: Tensor, error: Tensor, last_layer: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What to add to the loss, and its terms; the discriminator takes a step of its own first.

        Args:
            images: originals `[B, 3, H, W]` in [0, 1].
            pixels: their reconstructions, with gradient.
            error: the squared error, a scalar.
            last_layer: the weight that all of `pixels` went through last.
            step: the training step.
        """
        extra, terms = torch.zeros_like(error), {}
        if self.lpips is not None:
            with torch.autocast(images.device.type, enabled=False):
                terms["perceptual"] = self.lpips(pixels, images, normalize=True).mean()
            extra = extra + self.config.perceptual * terms["perceptual"]
        ramp = self.config.ramp(step)
        if self.adversary is not None and ramp:
            terms["discriminator"] = self.adversary.step(images, pixels)
            terms["adversarial"] = self.adversary.loss(pixels)
            weight = adaptive_weight(error + extra, terms["adversarial"], last_layer)
            terms["adaptive_weight"] = weight
            extra = extra + self.config.adversarial * ramp * weight * terms["adversarial"]
        return extra, terms


def _lpips(image_size: int, device: torch.device) -> nn.Module:
    from v2flow.metrics.extractors import lpips

    network = lpips(image_size, device)
    if isinstance(network, str):
        raise V2FlowError(f"option pixel_losses.perceptual: {network}, or set it to 0")
    return network
