"""Feature distances of a set of pictures and its reconstructions, with the real features cached on disk."""

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from v2flow.metrics.distances import FeatureSet, frechet_distance, kernel_distance
from v2flow.metrics.extractors import FeatureNetwork, efficientnet, inception, lpips
from v2flow.metrics.files import write_atomically
from v2flow.paths import cache_dir

log = logging.getLogger(__name__)

KID_MINIMUM = 3
"""Pictures from which on a kernel distance and its standard error exist."""


@dataclass
class FeatureNetworks:
    """The feature networks that this machine has, and why the others are missing.

    Attributes:
        networks: EfficientNet-Lite0, and Inception when its weights are there.
        lpips: the LPIPS network, or None.
        notes: figure name -> one line why it is absent.
    """

    networks: list[FeatureNetwork] = field(default_factory=list)
    lpips: nn.Module | None = None
    notes: dict[str, str] = field(default_factory=dict)


def load_networks(
    height: int, width: int, device: torch.device | str = "cpu", inception_weights: str | Path | None = None
) -> FeatureNetworks:
    """Loads every feature network there is for pictures of height x width; nothing is downloaded.

    They run on `device`, except for Metal, which has no fp64 for the figures: there on the CPU.

    Raises:
        V2FlowError: `inception_weights` was given but is not torch-fidelity's weights file.
    """
    device = torch.device("cpu") if torch.device(device).type == "mps" else device
    found = FeatureNetworks([efficientnet(max(height, width), device)])
    inception_or_reason = inception(inception_weights, device)
    if isinstance(inception_or_reason, str):
        found.notes["rfid"] = found.notes["kid-inception"] = inception_or_reason
    else:
        found.networks.append(inception_or_reason)
    lpips_or_reason = lpips(min(height, width), device)
    if isinstance(lpips_or_reason, str):
        found.notes["lpips"] = lpips_or_reason
    else:
        found.lpips = lpips_or_reason
    return found


def picture_digests(pictures: Tensor) -> list[bytes]:
    """SHA-256 of the shape and the pixels of each uint8 picture [B, 3, H, W]."""
    shape = repr(tuple(pictures.shape[1:])).encode()
    return [hashlib.sha256(shape + row.tobytes()).digest() for row in pictures.cpu().contiguous().numpy()]


def cached_features(
    network: FeatureNetwork, pictures: Tensor, digests: list[bytes], folder: Path | None
) -> Tensor:
    """Features of real pictures, kept on disk batch by batch under the hash of their content.

    The file is `IDENTITY/HASH-COUNTxHEIGHTxWIDTH.npy`: IDENTITY names extractor, resolution, weights and
    preprocessing, HASH is that of the pixels as evaluated (so another crop, size, order or picture is another
    file). A file that cannot be read is computed again; a folder that cannot be written to costs a warning
    only.

    Args:
        pictures: uint8 [B, 3, H, W].
        digests: :func:`picture_digests` of them.
        folder: None for `cache_dir()/features`.

    Returns:
        fp32 [B, d] on the device of the pictures.
    """
    if len(pictures) == 0:
        return network.features(pictures)
    content = hashlib.sha256(b"".join(digests)).hexdigest()[:32]
    count, _, height, width = pictures.shape
    folder = cache_dir() / "features" if folder is None else folder
    path = folder / network.identity / f"{content}-{count}x{height}x{width}.npy"
    try:
        rows = np.load(path, allow_pickle=False)
        if rows.shape == (count, network.dimension) and rows.dtype == np.float32:
            return torch.from_numpy(rows).to(pictures.device)
    except (OSError, ValueError, EOFError):
        pass
    features = network.features(pictures)
    try:
        write_atomically(path, lambda file: np.save(file, features.cpu().numpy()))
    except OSError as error:
        log.warning("real features are not cached: %s", error)
    return features


class FeatureDistances:
    """Feature distances between real pictures and their reconstructions in several decode modes.

    Reconstruction i belongs to picture i: the kernel distance's standard error jackknifes such pairs.
        `real_vs_real`
    compares the pictures at even positions with those at odd ones: what a perfect model of the data would
        score.
    """

    def __init__(
        self,
        networks: list[FeatureNetwork],
        modes: list[str],
        device: torch.device,
        folder: Path | None = None,
    ) -> None:
        self.networks = networks
        self.folder = folder
        self.real = [FeatureSet(network.dimension).to(device) for network in networks]
        self.modes = {
            mode: [FeatureSet(network.dimension).to(device) for network in networks] for mode in modes
        }

    def update(self, pictures: Tensor, digests: list[bytes], reconstructions: dict[str, Tensor]) -> None:
        """Adds uint8 pictures [B, 3, H, W] (no padding among them) and their reconstructions in each mode."""
        for position, network in enumerate(self.networks):
            self.real[position].update(cached_features(network, pictures, digests, self.folder))
            for mode, sets in self.modes.items():
                sets[position].update(network.features(reconstructions[mode]))

    def compute(self) -> tuple[dict[str, dict[str, float]], dict[str, float], dict[str, str]]:
        """Gathers over ranks: (mode -> figure -> value, the same for real against real, absent figure -> reason)."""
        figures: dict[str, dict[str, float]] = {mode: {} for mode in self.modes}
        baseline: dict[str, float] = {}
        notes: dict[str, str] = {}
        for position, network in enumerate(self.networks):
            real, real_statistics = self.real[position].collect()
            for mode, sets in self.modes.items():
                rows, statistics = sets[position].collect()
                figures[mode] |= kid_figures(network.kid, real, rows, paired=True)
                if len(real) >= network.frechet_minimum:
                    figures[mode][network.frechet] = frechet_distance(real_statistics, statistics)
            baseline |= kid_figures(network.kid, real[0::2], real[1::2], paired=False)
            if len(real) < KID_MINIMUM:
                notes[network.kid] = f"{len(real)} pictures: a kernel distance needs {KID_MINIMUM}"
            if len(real) < network.frechet_minimum:
                notes[network.frechet] = (
                    f"{len(real)} pictures: the Fréchet distance of {network.dimension} features is given from "
                    f"{network.frechet_minimum} pictures on"
                )
        return figures, baseline, notes


def kid_figures(name: str, real: Tensor, rows: Tensor, paired: bool, draws: int = 1) -> dict[str, float]:
    """`name`, `name_se` and for pairs `name_u` of features `[m, d]` and `[draws * n, d]`, see
    :func:`v2flow.metrics.distances.kernel_distance`; empty for too few pictures."""
    if min(len(real), len(rows)) < KID_MINIMUM:
        return {}
    distance = kernel_distance(real, rows, paired, draws)
    figures = {name: distance.value, f"{name}_se": distance.standard_error}
    return figures if distance.u_statistic is None else figures | {f"{name}_u": distance.u_statistic}
