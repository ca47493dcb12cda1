"""What every LightningModule shares: optimiser, clock, random draws, what a checkpoint says of itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from v2flow.config import to_dict
from v2flow.data.latents import check_source, source_of
from v2flow.errors import V2FlowError
from v2flow.training.data_module import ShardDataModule
from v2flow.training.optimizer import OptimizerConfig, configure_adamw

_MASK = (1 << 63) - 1
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def seeded_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator that depends on `key` alone, such as (seed, step, rank, purpose)."""
    state = 0x9E3779B97F4A7C15
    for part in key:
        # splitmix64, so that neighbouring keys give unrelated streams.
        state = (state + (part & _MASK) * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
        state ^= state >> 31
    return torch.Generator(device).manual_seed(state & _MASK)


def valid_rows(valid: Tensor) -> tuple[Tensor, int]:
    """Rows `[n]` of an evaluation batch that are not filling, of `valid` bool `[B]`, and their number.

    At least one row, so that every rank logs: of filling alone the first, and 0, so that it counts for nothing.
    """
    rows = valid.nonzero().squeeze(1)
    return (rows if len(rows) else rows.new_zeros(1)), len(rows)


def valid_images(batch: dict[str, Any]) -> tuple[Tensor, int]:
    """The pictures of an evaluation batch, those of `valid_rows` where it says which are filling."""
    images: Tensor = batch["image"]
    if "valid" not in batch:
        return images, len(images)
    rows, count = valid_rows(batch["valid"])
    return images[rows], count


class SeededModule(LightningModule):
    """Base of all modules: a clock in optimiser steps, draws that depend on (seed, step, batch, rank), AdamW, and
    checkpoints that say what they belong to.

    Attributes:
        model: what is trained.
        free_options: names of entries of `describe` that may change at a resume: where things lie or how memory is
            used, not what the weights mean.
    """

    model: nn.Module
    free_options: frozenset[str] = frozenset()

    def __init__(self, optimizer: OptimizerConfig, seed: int) -> None:
        super().__init__()
        self.optimizer_config = optimizer
        self.seed = seed

    @property
    def progress(self) -> float:
        """Share of the training's steps done, in [0, 1]."""
        return min(self.global_step / self.optimizer_config.total_steps, 1.0)

    def step_generator(self, batch_idx: int) -> torch.Generator:
        """Source of this step's draws, keyed by (seed, step, batch, rank): nothing to save for a resume."""
        return seeded_generator(self.device, self.seed, self.global_step, batch_idx, self.global_rank)

    @contextmanager
    def global_draws(self, generator: torch.Generator) -> Iterator[None]:
        """Keys the draws that libraries make from torch's global generator, such as dropout; it is put back after."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(generator.initial_seed())
            yield

    def log_losses(self, terms: dict[str, Tensor], stage: str, batch_size: int) -> None:
        """Log scalar terms as `stage/name`; the total goes to the progress bar.

        Args:
            batch_size: weight of these terms in the mean over batches and, outside training, over ranks; it may be 0.
        """
        shared = stage != "train"
        # Lightning divides the sum of the weights by the number of ranks, in whole numbers: they have to be multiples.
        weight = batch_size * self.trainer.world_size if shared else batch_size
        for name, value in terms.items():
            self.log(
                f"{stage}/{name}",
                value.detach(),
                batch_size=weight,
                prog_bar=name == "loss",
                sync_dist=shared,
            )

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up; see `configure_adamw`."""
        return configure_adamw(self.model, self.optimizer_config, scaled=self.scales_gradients)

    @property
    def scales_gradients(self) -> bool:
        """Whether a GradScaler stands before the optimiser; never without a trainer, where a step is measured."""
        trainer = self._trainer
        return trainer is not None and getattr(trainer.precision_plugin, "scaler", None) is not None

    def describe(self) -> dict[str, Any]:
        """Plain values that rebuild the model from a checkpoint, and the hashes of what the checkpoint leaves out."""
        raise NotImplementedError

    def initialise_from(self, path: str) -> None:
        """Take the weights of a checkpoint or exported folder (`--init-from`), and nothing else of it."""
        from v2flow.training.checkpoint import initialise_from

        initialise_from(self.model, path)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a resumed run has to agree with."""
        checkpoint["v2flow"] = self.describe()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compares the checkpoint's description with this experiment.

        Raises:
            V2FlowError: not a checkpoint of v2flow, or of another model.
        """
        saved, own = checkpoint.get("v2flow"), self.describe()
        if saved is None:
            raise V2FlowError(
                "checkpoint: not one of v2flow's (no entry 'v2flow'); expected a file made by `v2flow fit`"
            )
        difference = _first_difference("", saved, own, self.free_options)
        if difference is not None:
            raise V2FlowError(f"checkpoint: {difference}; resume with the same experiment")


class ReconstructionModule(SeededModule):
    """Base of the modules that train something with `encode` and `decode`.

    Attributes:
        model: the tokenizer itself; has `encode(images)`, `decode(ids, …)`, `codebook_size`, `num_tokens`.
        decode_modes: name of a way to decode -> keyword arguments of `model.decode`.
    """

    decode_modes: dict[str, dict[str, Any]]
    free_options = frozenset(
        {
            "config.codec.path",
            "config.vocabulary.source",
            "config.decoder.checkpointing",
            "config.resampler.memory_budget_mb",
        }
    )

    def training_stages(self) -> dict[str, tuple[float, float]]:
        """Kinds of training steps, and the shares of the training between which steps are of that kind."""
        return {"all": (0.0, 1.0)}

    def training_losses(
        self, images: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Loss terms of a training step on pictures `[B, 3, H, W]` in [0, 1]; `loss` is what is minimised.

        Needs no trainer, so that a step can be measured without one.

        Args:
            progress: share of the training's steps done, in [0, 1].
            generator: source of every random draw.
        """
        raise NotImplementedError

    def latent_losses(
        self, latents: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """`training_losses` of pictures whose codec latents `[B, C, h, w]` are at hand."""
        raise NotImplementedError

    @property
    def needs_pictures(self) -> str | None:
        """What makes training need the pictures themselves; None if their latents do."""
        return None

    def setup(self, stage: str) -> None:
        """Refuse what this model cannot be trained with, before anything is trained.

        Raises:
            V2FlowError: latents of another codec, a loss on pixels, a precision other than single or mixed, or a
                strategy that shards.
        """
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise V2FlowError(
                f"option trainer.strategy: {type(self).__name__} is not sharded, only text-to-image models are; use ddp"
            )
        if self.trainer.precision not in _PRECISIONS:
            raise V2FlowError(
                f"option trainer.precision: expected one of {', '.join(_PRECISIONS)}, found "
                f"{self.trainer.precision}: codebook and latents are kept in single precision"
            )
        data = getattr(self.trainer, "datamodule", None)
        form = data.latents if stage == "fit" and isinstance(data, ShardDataModule) else None
        if form is None:
            return
        if self.needs_pictures is not None:
            raise V2FlowError(
                f"option data.train: found cached latents, but {self.needs_pictures} needs pictures; name shards of "
                "pictures"
            )
        model: Any = self.model
        config = model.config
        check_source(form.source, source_of(config.codec, model.codec, config.image_size))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Logs the terms of a batch of pictures or cached latents and returns the loss."""
        cached = "latents" in batch
        inputs: Tensor = batch["latents" if cached else "image"]
        losses: Any = self.latent_losses if cached else self.training_losses
        terms = losses(inputs, self.progress, self.step_generator(batch_idx))
        self.log_losses(terms, "train", len(inputs))
        return terms["loss"]

    def evaluation_losses(self, images: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Loss terms of pictures `[B, 3, H, W]`, the same at every call; `loss` is their total."""
        raise NotImplementedError

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Logs the terms of a batch, padding left out."""
        images, count = valid_images(batch)
        self.log_losses(self.evaluation_losses(images, batch_idx), "val", count)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Logs the terms of a batch, padding left out."""
        images, count = valid_images(batch)
        self.log_losses(self.evaluation_losses(images, batch_idx), "test", count)

    def describe(self) -> dict[str, Any]:
        """Plain values that rebuild the model from a checkpoint, and the hashes of what the checkpoint leaves out."""
        model: Any = self.model
        return {
            "model": type(model).__name__,
            "config": to_dict(model.config),
            "codec_sha256": model.codec.fingerprint(),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the decode modes."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["v2flow"]["decode_modes"] = self.decode_modes


def _first_difference(name: str, saved: Any, own: Any, free: frozenset[str]) -> str | None:
    """The first option of this experiment that the checkpoint was not trained with."""
    if name in free or saved == own:
        return None
    if isinstance(saved, dict) and isinstance(own, dict):
        inner = (
            _first_difference(f"{name}.{key}".lstrip("."), saved.get(key), own[key], free) for key in own
        )
        return next((found for found in inner if found is not None), None)
    return f"{name} is {saved!r} in the checkpoint and {own!r} in this experiment"
