"""Pictures, captions and histograms for loggers that show them, TensorBoard's and W&B's; others are passed over."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from v2flow.encoding import soft_tokens
from v2flow.metrics.evaluator import ReconstructionEvaluator
from v2flow.tokenizer import HEALTH_PICTURES, V2FlowTokenizer, inference

MAP_SIDE = 256
"""Smaller maps of the codebook are enlarged by a whole factor to at least so many pixels."""
UNUSED, NO_CODE = (0, 0, 0), (255, 255, 255)
SCALE = ((59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Colours of used codes, from one use to the most: blue, green, yellow, each lighter than the one before."""


def takes_pictures(trainer: Trainer) -> bool:
    """Whether one of the trainer's loggers shows pictures; the same on every rank."""
    return any(isinstance(logger, (TensorBoardLogger, WandbLogger)) for logger in trainer.loggers)


@rank_zero_only
def log_picture(trainer: Trainer, tag: str, picture: Tensor, captions: Sequence[str] = ()) -> None:
    """Shows a picture, uint8 [3, H, W], and what is written to it: beneath the picture, or as the text TAG_captions."""
    captions = [" ".join(caption.split()) for caption in captions]
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, picture.cpu(), trainer.global_step)
            if captions:
                text = "\n".join(f"{number}. {caption}" for number, caption in enumerate(captions, 1))
                logger.experiment.add_text(f"{tag}_captions", text, trainer.global_step)
        elif isinstance(logger, WandbLogger):
            image = Image.fromarray(picture.cpu().permute(1, 2, 0).contiguous().numpy())
            words = {"caption": ["; ".join(captions)]} if captions else {}
            logger.log_image(tag, [image], trainer.global_step, **words)


@rank_zero_only
def log_histogram(trainer: Trainer, tag: str, values: Tensor) -> None:
    """Shows how values, of any shape, are distributed; nothing without values."""
    if not values.numel():
        return
    values = values.detach().flatten().float().cpu()
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram(tag, values, trainer.global_step)
        elif isinstance(logger, WandbLogger):
            import wandb

            histogram: Any = wandb.Histogram(values.tolist())
            logger.log_metrics({tag: histogram}, trainer.global_step)


def tile(rows: Sequence[Tensor]) -> Tensor:
    """One picture uint8 [3, R·H, n·W] of R rows of n pictures, each uint8 [n, 3, H, W]; short rows end in white."""
    width = max(len(row) for row in rows)
    lines = []
    for row in rows:
        filler = row.new_full((width - len(row), *row.shape[1:]), 255)
        lines.append(torch.cat(list(torch.cat([row, filler])), dim=2))
    return torch.cat(lines, dim=1)


def usage_map(counts: Tensor) -> Tensor:
    """How often each code was used, `counts` [K], as a nearly square picture uint8 [3, H, W].

    Code 0 is at the top left, the others follow row by row. A code that was never used is black; the others go from
    blue through green to yellow by the logarithm of their count, the most used one yellow. Squares beyond K are white.
    """
    counts = counts.double().cpu()
    columns = math.ceil(math.sqrt(len(counts)))
    rows = math.ceil(len(counts) / columns)
    anchors = torch.tensor(SCALE, dtype=torch.float64)
    logarithms = counts.clamp_min(1).log()
    place = logarithms / logarithms.max().clamp_min(1e-9) * (len(anchors) - 1)
    below = place.long().clamp_max(len(anchors) - 2)
    colours = torch.tensor(NO_CODE, dtype=torch.float64).repeat(rows * columns, 1)
    colours[: len(counts)] = torch.lerp(anchors[below], anchors[below + 1], (place - below)[:, None])
    colours[: len(counts)][counts == 0] = torch.tensor(UNUSED, dtype=torch.float64)
    picture = colours.round().to(torch.uint8).unflatten(0, (rows, columns)).permute(2, 0, 1)
    factor = math.ceil(MAP_SIDE / columns)
    return picture.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def code_counts(evaluator: ReconstructionEvaluator) -> Tensor:
    """How often each code was chosen so far, [K], summed over the ranks; every rank must call it."""
    with evaluator.codebook.sync_context():
        return evaluator.codebook.counts.clone()


class TokenEntropies:
    """Entropies of the tokens' distributions over the words, in nats, of the first pictures of a validation.

    Args:
        pictures: how many pictures of this process are looked at.
    """

    def __init__(self, pictures: int) -> None:
        self.left = pictures
        self._parts: list[Tensor] = []

    @torch.no_grad()
    def update(self, model: Any, batch: Mapping[str, Any]) -> None:
        """Looks at a batch {"image": [B, 3, H, W] in [0, 1], optional "valid": bool [B]}.

        A model without such distributions, as a baseline or with readout=none, has no entropies.
        """
        if (
            not self.left
            or not isinstance(model, V2FlowTokenizer)
            or model.config.resampler.readout == "none"
        ):
            return
        images: Tensor = batch["image"]
        if "valid" in batch:
            images = images[batch["valid"].to(images.device)]
        images = images[: self.left]
        self.left -= len(images)
        with inference(model), torch.autocast(images.device.type, enabled=False):
            for part in images.split(HEALTH_PICTURES):  # a few at a time: the description takes memory
                if len(part):
                    latents = model.codec.encode(part.float())
                    soft = soft_tokens(model.resampler, latents, torch.float32, described=None)
                    self._parts.append(soft.entropy.flatten().cpu())

    def values(self) -> Tensor:
        """The entropies so far, [tokens]."""
        return torch.cat(self._parts) if self._parts else torch.empty(0)
