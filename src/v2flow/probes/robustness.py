"""Quality against a growing share of wrong tokens: a generator that writes them will make mistakes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from v2flow.baselines.autoencoder import Autoencoder
from v2flow.decode_modes import takes_generator
from v2flow.errors import V2FlowError
from v2flow.evaluate import FOLDER_MODES, evaluate_model
from v2flow.probes.findings import Batches, Findings, ProbeSettings
from v2flow.tokenizer import V2FlowTokenizer

SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_CHUNK = 1024  # rows of the matrix of distances that exist at a time


def measure_robustness(
    model: Any, loader: Batches, shares: Sequence[float] = SHARES, settings: ProbeSettings | None = None
) -> Findings:
    """Scores reconstructions from ids of which a share was replaced; V2Flow's by its conditional mean.

    Each token is wrong with probability `share`, independently, from noise that is the same for all shares: the wrong
    positions of a share contain those of every smaller one, with the same wrong ids.

    Args:
        model: any tokenizer with `encode`, `decode` and `codebook_size`.
        shares: in [0, 1].

    Returns:
        `random` (uniformly random other ids) and, where the tokenizer has codes, `near` (the id of the nearest other
        code: near misses): lists of {share, psnr, psnr_pooled, ssim}. Without codes a note says so.

    Raises:
        V2FlowError: no picture, or a share outside [0, 1].
    """
    settings = settings or ProbeSettings()
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise V2FlowError(f"option shares: expected numbers from 0 to 1, found {list(shares)}")
    codes = codes_of(model)
    kinds = ["random"] if codes is None else ["random", "near"]
    points = {f"{kind} {share:g}": {"kind": kind, "share": share} for kind in kinds for share in shares}
    mistaken = MistakenTokenizer(model, codes)
    result = evaluate_model(
        mistaken, loader, points, seed=settings.seed, features=False, progress=settings.progress
    )
    figures = {
        kind: [{"share": share} | result["modes"][f"{kind} {share:g}"] for share in shares] for kind in kinds
    }
    notes = {} if codes is not None else {"near": f"the codes of {type(model).__name__} are not known"}
    return Findings(figures, notes, result["protocol"] | {"decode": mistaken.options})


def codes_of(model: Any) -> Tensor | None:
    """The codes `[K, D]` that a tokenizer's ids stand for; None where they are not known."""
    if isinstance(model, V2FlowTokenizer):
        return model.visual_vocabulary.codes
    if isinstance(model, Autoencoder):
        with torch.no_grad():
            ids = torch.arange(model.codebook_size, device=model.output.weight.device)
            return model.quantizer.lookup(ids[None])[0]
    return None


def nearest_other(codes: Tensor) -> Tensor:
    """For each of the codes `[K, D]` the id of the other code at the smallest distance, `[K]` long."""
    codes = codes.detach().double()
    nearest = []
    for first in range(0, len(codes), _CHUNK):
        distances = torch.cdist(codes[first : first + _CHUNK], codes)
        rows = torch.arange(len(distances), device=codes.device)
        distances[rows, first + rows] = torch.inf
        nearest.append(distances.argmin(1))
    return torch.cat(nearest)


class MistakenTokenizer(nn.Module):
    """A tokenizer whose `decode` first replaces a share of the ids.

    Args:
        model: the tokenizer.
        codes: `[K, D]`, for near misses.
    """

    def __init__(self, model: Any, codes: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.codebook_size: int = model.codebook_size
        self.near = None if codes is None else nearest_other(codes)
        self.options = FOLDER_MODES["one_step"] if isinstance(model, V2FlowTokenizer) else {}
        self.takes_generator = takes_generator(model)

    def encode(self, images: Tensor) -> Tensor:
        """Ids `[B, N]` of pictures `[B, 3, H, W]`."""
        ids: Tensor = self.model.encode(images)
        return ids

    def decode(self, ids: Tensor, generator: torch.Generator, kind: str, share: float) -> Tensor:
        """Pictures `[B, 3, H, W]` of ids `[B, N]` with mistakes; the noise of decoding stays what it is without."""
        noise = {"generator": generator} if self.takes_generator else {}
        wrong = self.replace(ids, generator.initial_seed(), kind, share)
        pictures: Tensor = self.model.decode(wrong, **noise, **self.options)
        return pictures

    def replace(self, ids: Tensor, seed: int, kind: str, share: float) -> Tensor:
        """Ids `[B, …]` of which a share is replaced: by `random` other ids, or by the nearest (`near`)."""
        draws = torch.Generator().manual_seed(seed ^ 0x5DEECE66D)  # another stream than the decoding noise
        wrong = (torch.rand(ids.shape, generator=draws) < share).to(ids.device)
        if kind == "near":
            assert self.near is not None
            other = self.near.to(ids.device)[ids]
        else:
            other = torch.randint(1, self.codebook_size, ids.shape, generator=draws).to(ids.device)
            other = (ids + other) % self.codebook_size
        return torch.where(wrong, other, ids)
