"""8-bit rounding, PSNR two ways, SSIM, and codebook use."""

import math

import pytest
import torch
from skimage.metrics import structural_similarity

from v2flow.metrics import CodebookUsage, ReconstructionMetrics, codebook_statistics, psnr_per_image, to_uint8


def pictures(count: int, seed: int, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def noisy(images: torch.Tensor, amplitude: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(99))
    return (images + amplitude * noise).clamp(0, 1)


def figures(metric: ReconstructionMetrics) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def test_rounding_is_clamped_and_half_to_even() -> None:
    values = torch.tensor(
        [-1.0, 0.0, 0.5 / 255, 1.5 / 255, 2.5 / 255, 254.5 / 255, 1.0, 7.0, math.nan, math.inf]
    )
    assert to_uint8(values.double()).tolist() == [0, 0, 0, 2, 2, 254, 255, 255, 0, 255]


def test_every_8_bit_value_survives_the_round_trip() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(values / 255.0), values)
    assert torch.equal(to_uint8(values), values)


def test_psnr_and_pooled_psnr_of_a_hand_worked_case() -> None:
    images = torch.zeros(2, 3, 8, 8)
    reconstructions = images.clone()
    reconstructions[0] += 5 / 255  # mse 25
    reconstructions[1, 0] += 30 / 255  # one channel of three: mse 300
    metric = ReconstructionMetrics()
    metric.update(images, reconstructions)
    found = figures(metric)
    single = [10 * math.log10(255**2 / 25), 10 * math.log10(255**2 / 300)]
    assert psnr_per_image(images, reconstructions).tolist() == pytest.approx(single, abs=1e-12)
    assert found["psnr"] == pytest.approx(sum(single) / 2, abs=1e-12)
    assert found["psnr_pooled"] == pytest.approx(10 * math.log10(255**2 / 162.5), abs=1e-12)


def test_errors_below_half_a_step_vanish_and_psnr_is_capped() -> None:
    images = to_uint8(pictures(3, seed=0)) / 255.0
    metric = ReconstructionMetrics()
    metric.update(images, images + 0.4 / 255)
    assert figures(metric) == {"psnr": 60.0, "psnr_pooled": 60.0, "ssim": pytest.approx(1.0), "images": 3}


def test_ssim_matches_scikit_image() -> None:
    """The same window (Gaussian, sigma 1.5, 11 taps).

    Where the padding convention reaches, the pictures are equal and SSIM is 1; scikit-image leaves out those
    5 pixels on each side, so its mean over 38 x 38 is turned into one over 48 x 48.
    """
    images, other = to_uint8(pictures(1, seed=1, size=48)), to_uint8(pictures(1, seed=1, size=48))
    other[:, :, 12:36, 12:36] = to_uint8(noisy(pictures(1, seed=1, size=48), 0.3))[:, :, 12:36, 12:36]
    metric = ReconstructionMetrics()
    metric.update(images, other)
    inner = structural_similarity(
        *(x[0].permute(1, 2, 0).numpy() for x in (images, other)), channel_axis=2, data_range=255,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip
    expected = (inner * 38**2 + 48**2 - 38**2) / 48**2
    assert figures(metric)["ssim"] == pytest.approx(expected, abs=1e-4)
    assert expected < 0.95


def test_padding_counts_in_nothing() -> None:
    images, reconstructions = pictures(6, seed=2), noisy(pictures(6, seed=2), 0.1)
    plain, padded = ReconstructionMetrics(), ReconstructionMetrics()
    plain.update(images, reconstructions)
    for start in (0, 4):
        part, other = images[start : start + 4], reconstructions[start : start + 4]
        missing = 4 - len(part)
        valid = torch.tensor([True] * len(part) + [False] * missing)
        filler = torch.zeros(missing, 3, 16, 16)
        padded.update(torch.cat([part, filler]), torch.cat([other, filler + 0.7]), valid)
    padded.update(images[:2], reconstructions[:2], torch.zeros(2, dtype=torch.bool))
    assert figures(padded) == pytest.approx(figures(plain), rel=1e-6)
    assert figures(padded)["images"] == 6


def test_codebook_of_a_hand_worked_case() -> None:
    metric = CodebookUsage(8)
    metric.update(torch.tensor([[0, 0], [3, 5]]))
    metric.update(torch.tensor([[7, 7], [1, 1]]), valid=torch.tensor([False, False]))
    assert metric.compute() == {"usage": 3 / 8, "perplexity": pytest.approx(2 * math.sqrt(2))}
    assert codebook_statistics(torch.ones(16)) == {"usage": 1.0, "perplexity": pytest.approx(16.0)}
    assert codebook_statistics(torch.zeros(4)) == {"usage": 0.0, "perplexity": 0.0}


def test_ids_outside_the_codebook_are_refused() -> None:
    with pytest.raises(ValueError, match="0..8 do not fit a codebook of 8"):
        CodebookUsage(8).update(torch.tensor([[0, 8]]))
