"""Two rows that cost nothing and that a tokenizer has to beat: the mean picture and the nearest training picture."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v2flow.errors import V2FlowError
from v2flow.metrics.features import cached_features, kid_figures, load_networks, picture_digests
from v2flow.metrics.reconstruction import ReconstructionMetrics, to_uint8

Batches = Iterable[Mapping[str, Any]]


def data_floors(
    train: Batches,
    evaluation: Batches,
    *,
    features: bool = True,
    inception_weights: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, float]]:
    """What scores without a tokenizer reach on a pair of sets.

    - `mean_image`: every picture is replaced by the mean of the training pictures (per pixel, rounded to 8
      bits).
    - `nearest_training_picture`: by the training picture nearest to it in 8-bit pixel space (L2, at
      evaluation size): the highest PSNR that copying can reach, and a measure of leakage between the splits.

    One process; the evaluation pictures are held in memory, the training pictures are streamed.

    Args:
        train, evaluation: batches {"image": [B, 3, H, W] in [0, 1], optional "valid": bool [B]}, all of one
            size.
        features: also compute the kernel distances.
        inception_weights: see :func:`v2flow.metrics.features.load_networks`.

    Returns:
        row name -> psnr, psnr_pooled, ssim and, with `features`, kid-efficientnet-lite0 with its standard
        error (and kid-inception where the weights are there).

    Raises:
        V2FlowError: a set without pictures, or two sets of different picture sizes.
    """
    batches = [part for part in (_valid_pictures(batch, device) for batch in evaluation) if len(part)]
    if not batches:
        raise V2FlowError("floors: the evaluation data held no picture; expected at least one")
    pictures = torch.cat(batches)
    mean, nearest = mean_and_nearest(train, pictures)
    rows = {
        "mean_image": _reconstruction_figures(pictures, mean[None].expand_as(pictures)),
        "nearest_training_picture": _reconstruction_figures(pictures, nearest),
    }
    height, width = pictures.shape[2:]
    for network in load_networks(height, width, device, inception_weights).networks if features else []:
        # Batch by batch, as the evaluator does: then both share one cache.
        real = torch.cat([cached_features(network, part, picture_digests(part), None) for part in batches])
        copies = network.features(mean[None]).expand_as(real)
        rows["mean_image"] |= kid_figures(network.kid, real, copies, paired=False)
        rows["nearest_training_picture"] |= kid_figures(
            network.kid, real, network.features(nearest), paired=True
        )
    return rows


def _valid_pictures(batch: Mapping[str, Any], device: torch.device | str) -> Tensor:
    pictures = to_uint8(batch["image"]).to(device)
    return pictures[batch["valid"].to(device)] if "valid" in batch else pictures


def _centred_rows(pictures: Tensor) -> Tensor:
    """uint8 [n, 3, H, W] to fp32 [n, 3·H·W] around 0, so that the products below lose little to rounding."""
    return pictures.flatten(1).float() / 255.0 - 0.5


def mean_and_nearest(train: Batches, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The mean training picture [3, H, W] and the nearest one for each picture [n, 3, H, W]; all uint8."""
    queries = _centred_rows(pictures)
    # |q - t|² = |q|² - 2 (q·t - |t|²/2): the largest bracket is the nearest picture.
    best = torch.full((len(pictures),), -torch.inf, device=pictures.device)
    nearest = torch.zeros_like(pictures)
    total = torch.zeros(pictures.shape[1:], dtype=torch.float64, device=pictures.device)
    count = 0
    for batch in train:
        candidates = _valid_pictures(batch, pictures.device)
        if len(candidates) == 0:
            continue
        if candidates.shape[1:] != pictures.shape[1:]:
            raise V2FlowError(
                f"floors: training pictures are {list(candidates.shape[1:])}, evaluation pictures "
                f"{list(pictures.shape[1:])}: load both at one size"
            )
        total += candidates.double().sum(0)
        count += len(candidates)
        rows = _centred_rows(candidates)
        value, index = (queries @ rows.T - rows.square().sum(1) / 2).max(1)
        better = value > best
        best = torch.where(better, value, best)
        nearest[better] = candidates[index[better]]
    if count == 0:
        raise V2FlowError("floors: the training data held no picture; expected at least one")
    return (total / count).round().to(torch.uint8), nearest


def _reconstruction_figures(pictures: Tensor, replacements: Tensor) -> dict[str, float]:
    metric = ReconstructionMetrics().to(pictures.device)
    for part, other in zip(pictures.split(256), replacements.split(256), strict=True):
        metric.update(part, other)
    return {name: value.item() for name, value in metric.compute().items() if name != "images"}
