"""Training of the baselines under Lightning."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from v2flow.baselines.autoencoder import Autoencoder, AutoencoderConfig
from v2flow.baselines.pixel_losses import PixelLossConfig, PixelLosses
from v2flow.baselines.titok import TiTokAutoencoder, TiTokConfig
from v2flow.baselines.vq_autoencoder import VQAutoencoder, VQAutoencoderConfig
from v2flow.errors import V2FlowError
from v2flow.training.module import ReconstructionModule
from v2flow.training.optimizer import OptimizerConfig


class AutoencoderModule(ReconstructionModule):
    """Trains a baseline with the same optimiser, data and clock as V2Flow.

    Args:
        kind: class of the model.
        autoencoder: what it is made of.
        optimizer: AdamW and its schedule.
        seed: seed of every random draw of the training.
        pixel_losses: losses on decoded pixels; none by default. The discriminator takes one step a batch, whatever
            `accumulate_grad_batches` is.

    Raises:
        V2FlowError: pixel losses that this codec has no gradient for, or an adversarial loss that would never start.
    """

    def __init__(
        self, kind: Callable[[Any], Autoencoder], autoencoder: AutoencoderConfig, optimizer: OptimizerConfig, seed: int,
        pixel_losses: PixelLossConfig,
    ) -> None:  # fmt: skip
        super().__init__(optimizer, seed)
        if pixel_losses.active and autoencoder.codec.kind != "patch":
            raise V2FlowError(
                f"option pixel_losses: expected codec.kind=patch, found {autoencoder.codec.kind!r}, "
                "which passes no gradient from pixels to latents; set both weights to 0"
            )
        if pixel_losses.adversarial and pixel_losses.adversarial_start >= optimizer.total_steps:
            raise V2FlowError(
                f"option pixel_losses.adversarial_start: expected a step before total_steps={optimizer.total_steps}, "
                f"found {pixel_losses.adversarial_start}"
            )
        self.decode_modes = {"one_step": {}}
        self.pixel_losses = pixel_losses
        self._pixels: PixelLosses | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: Autoencoder = kind(autoencoder)

    @property
    def needs_pictures(self) -> str | None:
        """The option that compares pixels, or None if cached latents will do."""
        return "option pixel_losses" if self.pixel_losses.active else None

    def setup(self, stage: str) -> None:
        """Synchronises the quantiser over ranks, and loads the networks of the pixel losses before training."""
        super().setup(stage)
        self.model.follow_process_group()
        if stage == "fit":
            self._pixel_networks(self.trainer.strategy.root_device)

    def _pixel_networks(self, device: torch.device) -> PixelLosses | None:
        """Made once, when they are first needed: scoring a model needs none of them."""
        if self._pixels is None and self.pixel_losses.active:
            self._pixels = PixelLosses(self.pixel_losses, self.model.config.image_size, device, self.seed)
        return self._pixels

    def training_stages(self) -> dict[str, tuple[float, float]]:
        """Two stages where the adversarial loss starts late: a step costs more from then on."""
        begin = self.pixel_losses.adversarial_start / self.optimizer_config.total_steps
        if not self.pixel_losses.adversarial or not begin:
            return super().training_stages()
        return {"reconstruction": (0.0, begin), "adversarial": (begin, 1.0)}

    def training_losses(
        self, images: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Terms for pictures [B, 3, H, W] in [0, 1]; `loss` is what is minimised."""
        with self.global_draws(generator):  # the library replaces dead codes from them
            total, terms, latents = self.model(images)
        networks = self._pixel_networks(images.device)
        if networks is None:
            return {"loss": total} | terms
        pixels = self.model.codec.decode(latents.float())
        step = round(progress * self.optimizer_config.total_steps)
        extra, more = networks(images, pixels, terms["mean"], self.model.output.weight, step)
        return {"loss": total + extra} | terms | more

    def latent_losses(
        self, latents: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The same terms for cached codec latents [B, C, h, w], without the losses on pixels."""
        with self.global_draws(generator):
            total, terms, _ = self.model.reconstruct_latents(latents)
        return {"loss": total} | terms

    def evaluation_losses(self, images: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Terms for held-out pictures; losses on pixels other than the mean are left out."""
        total, terms = self.model.losses(images)
        return {"loss": total} | terms

    def describe(self) -> dict[str, Any]:
        """What a checkpoint has to agree with, the pixel losses included."""
        losses = self.pixel_losses if self.pixel_losses.active else PixelLossConfig()
        return super().describe() | {"pixel_losses": asdict(losses)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the discriminator and its optimiser beside the model."""
        super().on_save_checkpoint(checkpoint)
        if self._pixels is not None and self._pixels.adversary is not None:
            checkpoint["adversary"] = self._pixels.adversary.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the discriminator and its optimiser."""
        if "v2flow" in checkpoint:  # older ones do not say that they had none
            checkpoint["v2flow"].setdefault("pixel_losses", asdict(PixelLossConfig()))
        super().on_load_checkpoint(checkpoint)
        if self._pixels is not None and self._pixels.adversary is not None:
            self._pixels.adversary.load_state_dict(checkpoint["adversary"])


class VQAutoencoderModule(AutoencoderModule):
    """Trains the VQ autoencoder.

    Args:
        autoencoder: what it is made of.
        optimizer: AdamW and its schedule.
        seed: seed of every random draw of the training.
        pixel_losses: losses on decoded pixels; none by default.
    """

    def __init__(
        self,
        autoencoder: VQAutoencoderConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),
        seed: int = 0,
        pixel_losses: PixelLossConfig = PixelLossConfig(),
    ) -> None:
        super().__init__(VQAutoencoder, autoencoder, optimizer, seed, pixel_losses)


class TiTokModule(AutoencoderModule):
    """Trains the one-dimensional tokenizer.

    Args:
        autoencoder: what it is made of.
        optimizer: AdamW and its schedule.
        seed: seed of every random draw of the training.
        pixel_losses: losses on decoded pixels; none by default.
    """

    def __init__(
        self,
        autoencoder: TiTokConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),
        seed: int = 0,
        pixel_losses: PixelLossConfig = PixelLossConfig(),
    ) -> None:
        super().__init__(TiTokAutoencoder, autoencoder, optimizer, seed, pixel_losses)
