"""Distances between two sets of feature vectors: the unbiased polynomial MMD (KID) and the Fréchet distance."""

import math
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from v2flow.errors import V2FlowError
from v2flow.metrics.files import write_atomically

KERNEL_CHUNK = 1024
"""Rows of the kernel matrix that exist at a time."""


@dataclass(frozen=True)
class KernelSums:
    """Sums of the kernel matrix of two sets X [m, d] and Y [n, d], enough for the MMD and its jackknife.

    With several draws of Y, n is the number of its groups, and k(x, y) is the mean over a group's draws.

    Attributes:
        xx: row sums of k(X, X) without the diagonal, [m] fp64.
        yy: row sums of k(Y, Y) without the diagonal, [n] fp64.
        xy_rows: row sums of k(X, Y), [m] fp64.
        xy_columns: column sums of k(X, Y), [n] fp64.
        xy_pairs: k(x_i, y_i), [m] fp64, or None when m is not n.
    """

    xx: Tensor
    yy: Tensor
    xy_rows: Tensor
    xy_columns: Tensor
    xy_pairs: Tensor | None


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """The cubic kernel (x·y/d + 1)^3 of KID (Bińkowski et al. 2018, section 4): [m, d], [n, d] to [m, n]."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def kernel_sums(x: Tensor, y: Tensor, draws: int = 1) -> KernelSums:
    """Sums of the kernel matrices of x [m, d] and y [draws * n, d] in fp64, by blocks of rows."""
    x, y = x.double(), y.double()
    rows = []
    columns = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    for chunk in x.split(KERNEL_CHUNK):
        block = polynomial_kernel(chunk, y)
        rows.append(block.sum(1))
        columns += block.sum(0)
    grouped = y.unflatten(0, (draws, -1))
    pairs = ((x * grouped).sum(-1) / x.shape[1] + 1.0).pow(3).mean(0) if len(x) == grouped.shape[1] else None
    within = _row_sums_without_diagonal(y)
    if draws > 1:  # two draws of one caption are not independent
        own = torch.stack([_row_sums_without_diagonal(group).sum() for group in grouped.transpose(0, 1)])
        within = (within.unflatten(0, (draws, -1)).sum(0) - own) / draws**2
    columns = columns.unflatten(0, (draws, -1)).mean(0)
    return KernelSums(_row_sums_without_diagonal(x), within, torch.cat(rows) / draws, columns, pairs)


def _row_sums_without_diagonal(x: Tensor) -> Tensor:
    sums = torch.cat([polynomial_kernel(chunk, x).sum(1) for chunk in x.split(KERNEL_CHUNK)])
    return sums - (x.square().sum(1) / x.shape[1] + 1.0) ** 3


@dataclass(frozen=True)
class KernelDistance:
    """KID of two sets of features.

    Attributes:
        value: torch-fidelity's estimate, unbiased for independent sets.
        standard_error: of `value`.
        u_statistic: for paired sets, the estimate that leaves out k(x_i, y_i), which is the unbiased one
            there; else None.
    """

    value: float
    standard_error: float
    u_statistic: float | None


def kernel_distance(x: Tensor, y: Tensor, paired: bool, draws: int = 1) -> KernelDistance:
    """KID: the estimate of the squared MMD under the cubic kernel, over the whole of both sets.

    `value` equals torch-fidelity's `kernel_inception_distance_mean` with one subset that holds every picture.
    For independent sets it has the same expectation for any number of pictures, and may come out slightly
    negative. A
    picture and its own reconstruction are not independent: k(x_i, y_i) then lowers `value` by
    2/n · (mean k(x_i, y_i) − mean k(x_i, y_j)), as it does in torch-fidelity (by 0.006 to 0.009 for good
    reconstructions of 1,000 CIFAR-10 pictures); `u_statistic` is free of that, and 0 for identical sets.

    The standard error is the delete-one jackknife, exact and without random subsets. With `paired` picture i
    leaves both sets together; otherwise the two sets are jackknifed separately and the variances add.

    Args:
        x, y: features [m, d] and [draws * n, d].
        paired: row i of `y` is made from row i of `x`, or for its caption; needs m = n.
        draws: `y` holds so many rows of each group, as of a caption: all groups once, then all once more, and so on.
            A group's rows are not compared with each other, and leave together (the delete-one-group jackknife).

    Raises:
        V2FlowError: fewer than three pictures in a set (the jackknife of an unbiased estimate needs three).
        ValueError: rows of y that `draws` does not divide, or paired sets of two sizes.
    """
    if len(y) % draws:
        raise ValueError(f"expected a multiple of {draws} rows for {draws} draws, found {len(y)}")
    if min(len(x), len(y) // draws) < 3:
        raise V2FlowError(
            f"KID needs at least 3 pictures in each set, found {len(x)} and {len(y) // draws}: add pictures"
        )
    sums = kernel_sums(x, y, draws)
    if not paired:
        without_x, without_y = _left_out(sums)
        error = math.sqrt(_jackknife_variance(without_x) + _jackknife_variance(without_y))
        return KernelDistance(_estimate(sums), error, None)
    m, n = len(x), len(y)
    if sums.xy_pairs is None:
        raise ValueError(f"paired sets must be of one size, found {m} and {n}")
    between = sums.xy_rows.sum()
    left_between = between - sums.xy_rows - sums.xy_columns + sums.xy_pairs
    variance = _jackknife_variance(
        _without_each(sums.xx) + _without_each(sums.yy) - 2 * left_between / (m - 1) ** 2
    )
    return KernelDistance(_estimate(sums), math.sqrt(variance), _u_statistic(sums, sums.xy_pairs))


def kernel_difference(
    x: Tensor, near: Tensor, far: Tensor, draws: tuple[int, int] = (1, 1)
) -> tuple[float, float]:
    """KID of x and `far` less KID of x and `near`, both unbiased, and the standard error of that difference.

    Both distances are of the same pictures x, and much of what each does not know is the same for both: the jackknife
    leaves a picture of x out of both at once, together with what is made of it in `near`, and `far` by itself.

    Args:
        x, near, far: features [m, d], [draws * m, d] and [draws * o, d]. Row i of `near` is made from x_i or for its
            caption, so k(x_i, y_i) is left out; `far` knows nothing of x.
        draws: of `near` and of `far`, see :func:`kernel_distance`.

    Raises:
        ValueError: another number of rows in `near` than draws of each row of x.
    """
    near_sums, far_sums = kernel_sums(x, near, draws[0]), kernel_sums(x, far, draws[1])
    pairs, m = near_sums.xy_pairs, len(x)
    if pairs is None:
        raise ValueError(f"expected {draws[0]} x {m} rows made of x, found {len(near)}")
    between = (near_sums.xy_rows - pairs).sum()
    left = between - near_sums.xy_rows - near_sums.xy_columns + 2 * pairs
    without_near = _without_each(near_sums.xx) + _without_each(near_sums.yy) - 2 * left / ((m - 1) * (m - 2))
    without_x, without_far = _left_out(far_sums)
    variance = _jackknife_variance(without_x - without_near) + _jackknife_variance(without_far)
    return _estimate(far_sums) - _u_statistic(near_sums, pairs), math.sqrt(variance)


def _estimate(sums: KernelSums) -> float:
    m, n = len(sums.xx), len(sums.yy)
    return (_within(sums.xx) + _within(sums.yy) - 2 * sums.xy_rows.sum() / (m * n)).item()


def _u_statistic(sums: KernelSums, pairs: Tensor) -> float:
    """The estimate without k(x_i, y_i), the `pairs` [m]."""
    m = len(pairs)
    between = (sums.xy_rows - pairs).sum()
    return (_within(sums.xx) + _within(sums.yy) - 2 * between / (m * (m - 1))).item()


def _left_out(sums: KernelSums) -> tuple[Tensor, Tensor]:
    """The estimate without each of x `[m]`, and without each of y `[n]`, both up to what is the same for all."""
    m, n, between = len(sums.xx), len(sums.yy), sums.xy_rows.sum()
    without_x = _without_each(sums.xx) - 2 * (between - sums.xy_rows) / ((m - 1) * n)
    without_y = _without_each(sums.yy) - 2 * (between - sums.xy_columns) / (m * (n - 1))
    return without_x, without_y


def _within(rows: Tensor) -> Tensor:
    """Mean of the kernel within a set, of its row sums without the diagonal `[n]`."""
    return rows.sum() / (len(rows) * (len(rows) - 1))


def _without_each(rows: Tensor) -> Tensor:
    """That mean without each picture of the set, `[n]`."""
    return (rows.sum() - 2 * rows) / ((len(rows) - 1) * (len(rows) - 2))


def _jackknife_variance(estimates: Tensor) -> float:
    return (len(estimates) - 1) * estimates.var(correction=0).item()


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean [d], covariance [d, d] (n - 1 in the denominator) and number of a set of features; fp64."""

    mu: Tensor
    sigma: Tensor
    n: int

    def save(self, path: str | Path) -> None:
        """Writes `mu`, `sigma` and `n` to an .npz file, atomically."""
        mu, sigma = self.mu.cpu().numpy(), self.sigma.cpu().numpy()
        write_atomically(Path(path), lambda file: np.savez(file, mu=mu, sigma=sigma, n=np.int64(self.n)))

    @classmethod
    def load(cls, path: str | Path) -> "GaussianStatistics":
        """Reads what :meth:`save` wrote.

        Raises:
            V2FlowError: the file is missing, is no .npz file, or its arrays are not statistics.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                mu, sigma, n = (torch.from_numpy(np.asarray(arrays[key])) for key in ("mu", "sigma", "n"))
        except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile) as error:
            raise V2FlowError(
                f"statistics file {path}: expected an .npz file with mu, sigma and n, found {type(error).__name__}: "
                "write it again with GaussianStatistics.save"
            ) from error
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or n.ndim != 0:
            shapes = f"mu {tuple(mu.shape)}, sigma {tuple(sigma.shape)}, n {tuple(n.shape)}"
            raise V2FlowError(
                f"statistics file {path}: expected mu [d], sigma [d, d] and a number n, found {shapes}"
            )
        return cls(mu.double(), sigma.double(), int(n))


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """Fréchet distance ‖μ1 − μ2‖² + tr(Σ1 + Σ2 − 2 (Σ1 Σ2)^½) of two Gaussians (Heusel et al. 2017, eq. 6).

    The trace of the root is the sum of the roots of the eigenvalues of Σ1^½ Σ2 Σ1^½, which is symmetric: no
    complex intermediate and no failure on a singular covariance.
    """
    values, vectors = torch.linalg.eigh(first.sigma)
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    trace_root = torch.linalg.eigvalsh(root @ second.sigma @ root).clamp(min=0.0).sqrt().sum()
    difference = first.mu - second.mu
    distance = difference @ difference + first.sigma.trace() + second.sigma.trace() - 2 * trace_root
    return distance.item()


class FeatureSet(Metric):
    """The features of one set of pictures: all rows for the MMD, and streamed fp64 moments for the Fréchet
    distance.

    Both are reduced over ranks in :meth:`collect`; ranks stay in order, so two sets filled batch by batch
    alike stay paired row by row.
    """

    full_state_update = False
    rows: list[Tensor]
    total: Tensor
    outer: Tensor
    count: Tensor

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.add_state("total", default=torch.zeros(dimension, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state(
            "outer", default=torch.zeros(dimension, dimension, dtype=torch.float64), dist_reduce_fx="sum"
        )
        self.add_state("count", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Adds features [B, d]; B may be 0, and must be on a rank without pictures so that the gather has its shape."""
        self.rows.append(features.float())
        features = features.double()
        self.total += features.sum(0)
        self.outer += features.T @ features
        self.count += len(features)

    def compute(self) -> dict[str, Tensor]:
        """All `rows` [n, d] fp32, their mean `mu` [d], covariance `sigma` [d, d] and number `n`."""
        mu = self.total / self.count
        sigma = (self.outer - self.count * torch.outer(mu, mu)) / (self.count - 1).clamp(min=1)
        return {"rows": dim_zero_cat(self.rows), "mu": mu, "sigma": sigma, "n": self.count}

    def collect(self) -> tuple[Tensor, GaussianStatistics]:
        """The rows and the statistics of :meth:`compute`."""
        found = self.compute()
        return found["rows"], GaussianStatistics(found["mu"], found["sigma"], int(found["n"]))
