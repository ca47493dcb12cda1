"""KID, its standard error and the Fréchet distance, against independent formulas."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from v2flow.errors import V2FlowError
from v2flow.metrics.distances import (
    FeatureSet,
    GaussianStatistics,
    frechet_distance,
    kernel_difference,
    kernel_distance,
    polynomial_kernel,
)


def features(count: int, seed: int, dimension: int = 24, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(1234)) / dimension**0.5
    return torch.randn(count, dimension, generator=generator) @ mix + shift


def statistics(rows: torch.Tensor) -> GaussianStatistics:
    collected = FeatureSet(rows.shape[1])
    for part in rows.split(37):
        collected.update(part)
    return collected.collect()[1]


def test_kid_is_torch_fidelitys_over_the_whole_set() -> None:
    x, y = features(1500, 0), features(1500, 1, shift=0.3)
    stock = kid_features_to_metric(x.double(), y.double(), kid_subsets=1, kid_subset_size=1500, verbose=False)
    for paired in (True, False):
        distance = kernel_distance(x, y, paired).value
        assert distance == pytest.approx(stock["kernel_inception_distance_mean"], rel=1e-9)
        assert distance > 0.05


@pytest.mark.parametrize("paired", [True, False])
def test_standard_error_is_the_jackknife_left_out_one_by_one(paired: bool) -> None:
    x, y = features(9, 2), features(9 if paired else 7, 3, shift=0.2)

    def estimate(a: torch.Tensor, b: torch.Tensor) -> float:
        return kernel_distance(a, b, paired=False).value

    if paired:
        expected = variance([estimate(without(x, i), without(y, i)) for i in range(9)])
    else:
        expected = variance([estimate(without(x, i), y) for i in range(9)])
        expected += variance([estimate(x, without(y, i)) for i in range(7)])
    assert kernel_distance(x, y, paired).standard_error == pytest.approx(math.sqrt(expected), rel=1e-6)


def kernel_mean(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Of groups of rows: the mean over pairs of groups of the mean over their rows."""
    return float(np.mean([polynomial_kernel(p.double(), q.double()).mean().item() for p, q in pairs]))


def plain_kid(x: torch.Tensor, groups: torch.Tensor, paired: bool = False) -> float:
    """Unbiased KID of x [m, d] and groups [n, draws, d], by plain sums over pairs of different groups."""
    rows = x[:, None]
    across = [(p, q) for i, p in enumerate(rows) for j, q in enumerate(groups) if not paired or i != j]
    within = [kernel_mean(list(itertools.permutations(each, 2))) for each in (rows, groups)]
    return sum(within) - 2 * kernel_mean(across)


def without(rows: torch.Tensor, i: int) -> torch.Tensor:
    return torch.cat([rows[:i], rows[i + 1 :]])


def variance(estimates: list[float]) -> float:
    return (len(estimates) - 1) * float(np.var(estimates))


def test_draws_of_one_group_are_not_compared_and_leave_together() -> None:
    x, y, draws = features(9, 2), features(21, 3, shift=0.2), 3
    groups = y.reshape(draws, 7, -1).transpose(0, 1)  # draw after draw
    expected = variance([plain_kid(without(x, i), groups) for i in range(9)])
    expected += variance([plain_kid(x, without(groups, i)) for i in range(7)])
    found = kernel_distance(x, y, paired=False, draws=draws)
    assert found.value == pytest.approx(plain_kid(x, groups), rel=1e-9)
    assert found.standard_error == pytest.approx(math.sqrt(expected), rel=1e-6)
    of_pairs = kernel_distance(features(7, 2), y, paired=True, draws=draws)
    assert of_pairs.u_statistic == pytest.approx(plain_kid(features(7, 2), groups, paired=True), rel=1e-9)
    with pytest.raises(ValueError, match="multiple of 2 rows"):
        kernel_distance(x, y, paired=False, draws=2)


@pytest.mark.parametrize("draws", [(1, 1), (3, 2)])
def test_a_difference_leaves_a_picture_out_with_what_is_made_of_it(draws: tuple[int, int]) -> None:
    x, near, far = features(6, 2), features(6 * draws[0], 3, shift=0.2), features(5 * draws[1], 4, shift=0.6)
    near_groups, far_groups = (
        rows.reshape(count, -1, rows.shape[1]).transpose(0, 1)
        for rows, count in zip((near, far), draws, strict=True)
    )

    def estimate(x: torch.Tensor, near: torch.Tensor, far: torch.Tensor) -> float:
        return plain_kid(x, far) - plain_kid(x, near, paired=True)

    expected = variance([estimate(without(x, i), without(near_groups, i), far_groups) for i in range(6)])
    expected += variance([estimate(x, near_groups, without(far_groups, i)) for i in range(5)])
    value, error = kernel_difference(x, near, far, draws)
    assert value == pytest.approx(estimate(x, near_groups, far_groups), rel=1e-9)
    assert error == pytest.approx(math.sqrt(expected), rel=1e-6)
    with pytest.raises(ValueError, match="rows made of x"):
        kernel_difference(x, near[1:], far)


def test_kid_is_unbiased() -> None:
    """Expectation over every sample of a small discrete world, worked out exactly, equals the true squared MMD."""
    worlds = [torch.tensor([[0.0, 0.0], [2.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])]
    true = sum(
        sign * polynomial_kernel(worlds[a].double(), worlds[b].double()).mean().item()
        for a, b, sign in ((0, 0, 1), (1, 1, 1), (0, 1, -2))
    )
    choices = list(itertools.product(range(2), repeat=3))
    estimates = [
        kernel_distance(worlds[0][list(left)], worlds[1][list(right)], paired=False).value
        for left in choices
        for right in choices
    ]
    assert np.mean(estimates) == pytest.approx(true, rel=1e-12)


def test_kid_of_pairs_is_unbiased_without_each_picture_beside_its_own_reconstruction() -> None:
    """The world holds three (picture, reconstruction) pairs; expectation over all samples of three pairs, exactly."""
    real = torch.tensor([[0.0, 0.0], [2.0, 1.0], [-1.0, 3.0]])
    made = real + torch.tensor([[0.1, 0.0], [0.0, -0.2], [0.3, 0.3]])
    kernels = [
        polynomial_kernel(a.double(), b.double()).mean().item()
        for a, b in ((real, real), (made, made), (real, made))
    ]
    true = kernels[0] + kernels[1] - 2 * kernels[2]
    results = [
        kernel_distance(real[list(chosen)], made[list(chosen)], paired=True)
        for chosen in itertools.product(range(3), repeat=3)
    ]
    assert np.mean([result.u_statistic for result in results]) == pytest.approx(true, rel=1e-10)
    assert np.mean([result.value for result in results]) < true - 0.1  # what pairs do to the other estimate


def test_kid_of_one_distribution_is_zero_within_its_spread() -> None:
    distances = np.array(
        [kernel_distance(features(60, 10 + i), features(60, 500 + i), False).value for i in range(60)]
    )
    assert abs(distances.mean()) < 4 * distances.std() / 60**0.5
    assert distances.min() < 0 < distances.max()


def test_standard_error_is_the_spread_over_samples() -> None:
    results = [
        kernel_distance(features(80, 10 + i), features(80, 500 + i, shift=0.5), False) for i in range(80)
    ]
    spread = float(np.std([result.value for result in results]))
    assert np.mean([result.standard_error for result in results]) == pytest.approx(spread, rel=0.25)


def test_two_pictures_are_too_few() -> None:
    with pytest.raises(V2FlowError, match="at least 3 pictures in each set, found 5 and 2"):
        kernel_distance(features(5, 0), features(2, 1), paired=False)


def test_frechet_of_two_dimensional_gaussians_by_hand() -> None:
    first = GaussianStatistics(
        torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double(), 10
    )
    second = GaussianStatistics(
        torch.tensor([4.0, -2.0]).double(), torch.diag(torch.tensor([1.0, 16.0])).double(), 10
    )
    # Means 25 apart; commuting covariances: (2 - 1)² + (3 - 4)².
    assert frechet_distance(first, second) == pytest.approx(27.0, abs=1e-12)
    # Rotated by 45 degrees against each other: tr(Σ1 Σ2)^½ from trace and determinant of the 2 x 2 product.
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]]).double() / 2**0.5
    turned = GaussianStatistics(second.mu, turn @ second.sigma @ turn.T, 10)
    product = first.sigma @ turned.sigma
    root = math.sqrt(product.trace().item() + 2 * math.sqrt(torch.linalg.det(product).item()))
    assert frechet_distance(first, turned) == pytest.approx(25 + 13 + 17 - 2 * root, abs=1e-10)


def test_frechet_matches_sqrtm_and_torch_fidelity() -> None:
    x, y = features(400, 4), features(300, 5, shift=0.25) * 1.3
    first, second = statistics(x), statistics(y)
    root = scipy.linalg.sqrtm(first.sigma.numpy() @ second.sigma.numpy()).real
    difference = (first.mu - second.mu).numpy()
    by_scipy = difference @ difference + np.trace(first.sigma.numpy() + second.sigma.numpy() - 2 * root)
    stock = fid_statistics_to_metric(*(fid_features_to_statistics(rows) for rows in (x, y)), verbose=False)
    found = frechet_distance(first, second)
    assert found == pytest.approx(by_scipy, abs=1e-6)
    assert found == pytest.approx(stock["frechet_inception_distance"], abs=1e-3)
    assert found > 0.5


def test_identical_sets_are_at_distance_zero_even_when_singular() -> None:
    rows = features(20, 6)  # fewer rows than dimensions
    assert frechet_distance(statistics(rows), statistics(rows)) == pytest.approx(0.0, abs=1e-6)
    assert kernel_distance(rows, rows, paired=True).u_statistic == pytest.approx(0.0, abs=1e-9)


def test_streamed_statistics_are_numpys() -> None:
    rows = features(200, 7, shift=30.0)
    found = statistics(rows)
    np.testing.assert_allclose(found.mu, rows.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.sigma, np.cov(rows.double().numpy(), rowvar=False), atol=1e-10)
    assert found.n == 200


def test_statistics_file_round_trip(tmp_path: Path) -> None:
    saved = statistics(features(50, 8))
    saved.save(tmp_path / "new" / "real.npz")
    loaded = GaussianStatistics.load(tmp_path / "new" / "real.npz")
    assert torch.equal(loaded.mu, saved.mu) and torch.equal(loaded.sigma, saved.sigma) and loaded.n == 50
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["real.npz"]


@pytest.mark.parametrize("content", [None, b"not a zip", b"PK\x03\x04cut"])
def test_bad_statistics_file_is_one_clear_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "real.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(V2FlowError, match="real.npz: expected an .npz file with mu, sigma and n") as caught:
        GaussianStatistics.load(path)
    assert "\n" not in str(caught.value)


def test_statistics_of_wrong_shape_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "real.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)), n=5)
    with pytest.raises(V2FlowError, match=r"expected mu \[d\], sigma \[d, d\] and a number n"):
        GaussianStatistics.load(tmp_path / "real.npz")
