"""Training of the VQ autoencoder baseline under Lightning."""

from typing import Any

import torch
from torch import Tensor

from v2flow.baselines.vq_autoencoder import VQAutoencoder, VQAutoencoderConfig
from v2flow.training.module import ReconstructionModule
from v2flow.training.optimizer import OptimizerConfig


class VQAutoencoderModule(ReconstructionModule):
    """Trains the baseline with the same optimiser, data and clock as V2Flow.

    Args:
        autoencoder: what it is made of.
        optimizer: AdamW and its schedule.
        seed: seed of every random draw of the training.
    """

    def __init__(
        self,
        autoencoder: VQAutoencoderConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        self.decode_modes = {"one_step": {}}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: VQAutoencoder = VQAutoencoder(autoencoder)

    def setup(self, stage: str) -> None:
        self.model.follow_process_group()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        # The library replaces dead codes from torch's global generator.
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.step_generator(batch_idx).initial_seed())
            total, terms = self.model.losses(batch["image"])
        self.log_losses({"loss": total} | terms, "train", len(batch["image"]))
        return total

    def evaluation_losses(self, images: Tensor, batch_idx: int) -> dict[str, Tensor]:
        total, terms = self.model.losses(images)
        return {"loss": total} | terms
