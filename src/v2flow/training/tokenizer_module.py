"""Training of the V2Flow tokenizer under Lightning."""

from typing import Any, Optional

import torch
from torch import Tensor

from v2flow.config import TokenizerConfig
from v2flow.decode_modes import read_modes
from v2flow.tokenizer import TokenizerLosses, V2FlowTokenizer
from v2flow.training.compilation import compile_parts
from v2flow.training.module import ReconstructionModule, seeded_generator
from v2flow.training.optimizer import OptimizerConfig, configure_adamw


class TokenizerModule(ReconstructionModule):
    """Trains codec latents -> soft tokens -> visual ids -> latents end to end.

    Args:
        tokenizer: what the tokenizer is made of.
        optimizer: AdamW and its schedule.
        decode_modes: ways to decode that the metrics compare; default: one step, and ten Euler steps.
        seed: seed of every random draw of the training.
        compile: run encoder, decoder and velocity field of the training under torch.compile; what cannot be compiled is
            named in a warning and runs as without. Results change by rounding.
    """

    def __init__(
        self,
        tokenizer: TokenizerConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),
        decode_modes: Optional[dict[str, dict[str, Any]]] = None,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer, seed)
        self._to_compile = compile
        modes = decode_modes or {"one_step": {"steps": 1, "temperature": 0.0}, "sampled": {"steps": 10}}
        self.decode_modes = read_modes(modes, "experiment")
        # The first weights depend on the seed alone, whatever was drawn before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: V2FlowTokenizer = V2FlowTokenizer(tokenizer)
        for options in self.decode_modes.values():
            self.model.decode_settings(options)

    def training_stages(self) -> dict[str, tuple[float, float]]:
        """Shares of the training in which tokens and mean learn, and then the velocity field alone."""
        alone = self.model.config.velocity.alone
        return {"tokens": (0.0, 1 - alone), "field": (1 - alone, 1.0)} if alone else super().training_stages()

    def training_losses(
        self, images: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Terms for pictures [B, 3, H, W] in [0, 1]; `loss` is what is minimised."""
        return self._terms(self.model.losses(images, progress, generator))

    def latent_losses(
        self, latents: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The same terms for cached codec latents [B, C, h, w]."""
        return self._terms(self.model.latent_losses(latents, progress, generator))

    @staticmethod
    def _terms(losses: TokenizerLosses) -> dict[str, Tensor]:
        return {
            "loss": losses.total, "mean": losses.mean, "flow": losses.flow, "commitment": losses.commitment,
            "token_entropy": losses.entropy, "soft_hard_agreement": losses.agreement,
        }  # fmt: skip

    def on_train_start(self) -> None:
        """Compiles, where that is asked for, what has not been yet."""
        if not self._to_compile:
            return
        self._to_compile = False
        # Not the look-up in the vocabulary: its tiles are in memory of their own, its noise from many generators.
        # Dynamic only where each batch has another number of positions: inductor fails on symbolic sizes of the others.
        encoder, field = self.model.resampler.encoder, self.model.head.field
        compile_parts({"resampler.encoder": encoder}, dynamic=False)
        compile_parts({"decoder": self.model.decoder}, dynamic=True)
        compile_parts({"head.field": field}, dynamic=not field.joint)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss; on several ranks every parameter gets a gradient, if only zero."""
        loss = super().training_step(batch, batch_idx)
        if self.trainer.world_size == 1:
            return loss
        # Every parameter takes part in every step: ranks would wait for the gradients of those that do not learn.
        return loss + 0.0 * sum(p.sum() for p in self.model.parameters())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What does not learn now is left without the zero gradient of `training_step`, as on one rank: AdamW would
        count its steps, and take the first that matters for a late one."""
        rates = [group["lr"] for group in optimizer.param_groups]
        if self.trainer.world_size == 1 or not any(rates):
            return
        for group in optimizer.param_groups:
            if not group["lr"]:
                for parameter in group["params"]:
                    parameter.grad = None

    def configure_optimizers(self) -> Any:
        """AdamW with a schedule for each stage's parameters; see `configure_adamw`."""
        windows = self.model.windows()
        return configure_adamw(self.model, self.optimizer_config, windows, self.scales_gradients)

    def evaluation_losses(self, images: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Terms for held-out pictures, as at the end of the training, with noise seeded by batch and rank."""
        generator = seeded_generator(self.device, self.seed, batch_idx, self.global_rank)
        losses = self.model.losses(images, 1.0, generator)
        return {
            "loss": losses.total, "mean": losses.mean, "flow": losses.flow,
            "token_entropy": losses.entropy, "soft_hard_agreement": losses.agreement,
        }  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """What a checkpoint has to agree with, the vocabulary by its SHA-256."""
        return super().describe() | {"vocabulary_sha256": self.model.vocabulary_sha256}
