"""How far generated pictures are from real ones, as sets (KID) and each from its caption's own picture."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from v2flow.metrics.distances import kernel_difference
from v2flow.metrics.extractors import FeatureNetwork
from v2flow.metrics.features import KID_MINIMUM, kid_figures
from v2flow.metrics.floors import mean_and_nearest
from v2flow.metrics.reconstruction import psnr_per_image
from v2flow.t2i.metrics.rows import GENERATED, MARGINAL, RECONSTRUCTED, SHUFFLED, UNTRAINED, WORDS

CONTROLS = (WORDS, MARGINAL, UNTRAINED)
"""Rows whose pictures do not know the captions."""
OWN = (GENERATED, RECONSTRUCTED)
"""Rows whose picture i is made of the real one, or for its caption."""


def distance_rows(
    real: Tensor, rows: Mapping[str, Tensor], networks: Iterable[FeatureNetwork], order: Tensor,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Row name -> figures: `kid-…` with `_se` (and the unbiased `_u` for OWN), and `pair-…` with `_se`.

    `pair-…` is the mean cosine between the features of a picture and of the real picture of its caption, both less
    the real pictures' mean feature: 1 for the same picture, near 0 for any other one. KID compares sets, so it is the
    same for `captions_shuffled` (generated pictures in another order, up to the standard error) as for `generated`;
    `pair-…` tells the two apart. `kid-…_above_generated`, with `_se`, says how much farther a row without the captions'
    meaning is than `generated` by its `_u`. `real_vs_real` is one half of the real pictures against the other.

    Args:
        real: uint8 `[n, 3, H, W]`.
        rows: uint8 `[n, 3, H, W]` each, picture i made for the caption of `real[i]`; with several draws of a row, all
            captions once, then all once more, and so on.
        order: permutation `[n]`, see `shuffled_order`.
        device: where the networks are.
    """
    figures: dict[str, dict[str, float]] = {}
    for network in networks:
        truth = network.features(real.to(device))
        features = {name: network.features(pictures.to(device)) for name, pictures in rows.items()}
        if GENERATED in features:
            drawn = features[GENERATED].unflatten(0, (-1, len(truth)))
            features[SHUFFLED] = drawn[:, order.to(device)].flatten(0, 1)
        pair = network.kid.replace("kid-", "pair-")
        for name, found in features.items():
            row = figures.setdefault(name, {})
            draws = len(found) // len(truth)
            row |= kid_figures(network.kid, truth, found, paired=name in OWN, draws=draws)
            row |= pair_similarity(pair, truth, found)
            if name in CONTROLS and GENERATED in features and len(truth) >= KID_MINIMUM:
                near = features[GENERATED]
                above, error = kernel_difference(truth, near, found, (len(near) // len(truth), draws))
                row |= {f"{network.kid}_above_generated": above, f"{network.kid}_above_generated_se": error}
        half = kid_figures(network.kid, truth[0::2], truth[1::2], paired=False)
        figures["real_vs_real"] = figures.get("real_vs_real", {}) | half
    return figures


def pair_similarity(name: str, real: Tensor, rows: Tensor) -> dict[str, float]:
    """Mean cosine of features `[n, d]` and `[draws * n, d]`, and its standard error over real pictures; empty for fewer
    than 2."""
    if len(real) < 2:
        return {}
    centre = real.double().mean(0)
    drawn = rows.double().unflatten(0, (-1, len(real)))
    cosines = torch.cosine_similarity(real.double() - centre, drawn - centre, dim=-1).mean(0)
    return {name: cosines.mean().item(), f"{name}_se": cosines.std().item() / math.sqrt(len(cosines))}


def nearest_training_pictures(train: Iterable[Mapping[str, Any]], pictures: Tensor) -> tuple[Tensor, float]:
    """The training picture nearest to each picture in pixels, uint8 `[n, 3, H, W]`, and the mean PSNR to it in dB.

    Memorised pictures have a high one.

    Args:
        train: batches {"image": [B, 3, H, W] in [0, 1] or uint8}.
        pictures: uint8 `[n, 3, H, W]`.

    Raises:
        V2FlowError: no training picture, or one of another size.
    """
    _, nearest = mean_and_nearest(train, pictures)
    return nearest, psnr_per_image(pictures, nearest).mean().item()
