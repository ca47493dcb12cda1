"""Reconstruction error on 8-bit pictures: psnr, psnr_pooled and ssim."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure

PSNR_CAP_DB = 60.0
"""PSNR of a picture equal to its original; no PSNR is reported above it."""


def to_uint8(images: Tensor) -> Tensor:
    """Rounds pictures to 8 bits: clamp to [0, 1], times 255, round half to even, uint8.

    Every metric and every saved picture goes through this one function, so that all of them see the same
    pixels.

    Args:
        images: floating point [..., 3, H, W], nominally in [0, 1]; NaN counts as 0. uint8 is returned as it
            is.

    Returns:
        uint8 tensor of the same shape.
    """
    if images.dtype == torch.uint8:
        return images
    return torch.nan_to_num(images.float(), nan=0.0).clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8)


def squared_error_per_image(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean squared error of each picture in 8-bit steps squared: two [B, 3, H, W] to fp64 [B], from exact integers."""
    difference = to_uint8(images).int() - to_uint8(reconstructions).int()
    return difference.square().flatten(1).sum(1).double() / difference[0].numel()


def psnr_from_mse(mse: Tensor) -> Tensor:
    """PSNR in dB of 8-bit mean squared errors (peak 255), capped at 60 dB."""
    return (10.0 * torch.log10(255.0**2 / mse)).clamp(max=PSNR_CAP_DB)


def psnr_per_image(images: Tensor, reconstructions: Tensor) -> Tensor:
    """PSNR in dB of each picture after 8-bit rounding, capped at 60 dB: two [B, 3, H, W] to fp64 [B]."""
    return psnr_from_mse(squared_error_per_image(images, reconstructions))


class ReconstructionMetrics(Metric):
    """psnr, psnr_pooled and ssim of reconstructions, summed in fp64 and reduced over ranks.

    - `psnr`: the mean over pictures of the PSNR of each, on 8-bit values, capped at 60 dB. Targets refer to
      it.
    - `psnr_pooled`: the PSNR of the mean squared error over all pictures (same rounding, same cap). The two
      differ by several dB when errors are unequal.
    - `ssim`: the mean over pictures of torchmetrics' SSIM (11 x 11 Gaussian window of sigma 1.5, data range
      1) on the 8-bit values divided by 255.
    """

    full_state_update = False
    psnr_sum: Tensor
    mse_sum: Tensor
    ssim_sum: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("psnr_sum", "mse_sum", "ssim_sum", "images"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, reconstructions: Tensor, valid: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            images: originals [B, 3, H, W], floating point in [0, 1] or uint8; all batches of one size.
            reconstructions: the same shape.
            valid: bool [B]; pictures where it is False (padding) count in nothing.
        """
        images, reconstructions = to_uint8(images), to_uint8(reconstructions)
        if valid is not None:
            images, reconstructions = images[valid], reconstructions[valid]
        if len(images) == 0:
            return
        mse = squared_error_per_image(images, reconstructions)
        # bf16 autocast, if a caller has it on, must not reach the window means: their variances cancel.
        with torch.autocast(images.device.type, enabled=False):
            ssim = structural_similarity_index_measure(
                reconstructions.float() / 255.0, images.float() / 255.0, data_range=1.0, reduction="none"
            )
        assert isinstance(ssim, Tensor)
        self.psnr_sum += psnr_from_mse(mse).sum()
        self.mse_sum += mse.sum()
        self.ssim_sum += ssim.double().sum()
        self.images += len(images)

    def compute(self) -> dict[str, Tensor]:
        """The three figures and the number of `images`, fp64 scalars; NaN when no picture was valid."""
        return {
            "psnr": self.psnr_sum / self.images,
            "psnr_pooled": psnr_from_mse(self.mse_sum / self.images),
            "ssim": self.ssim_sum / self.images,
            "images": self.images,
        }
