"""Solvers against known and foreign solutions."""

import math
from typing import get_args

import pytest
import torch

from v2flow.cli import build_parser
from v2flow.decoding import DecodeOptions
from v2flow.errors import V2FlowError
from v2flow.samplers import SOLVERS, Solver, euler_step, heun_step, multistep_step, solve, timesteps


def gaussian_mixture_velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """Exact velocity of the flow to two Gaussians (weights 0.3 and 0.7): smooth and nonlinear in x."""
    means, stds = torch.tensor([-1.5, 1.0]).double(), torch.tensor([0.4, 0.6]).double()
    weights = torch.tensor([0.3, 0.7]).double()
    x = x[..., None]
    variance = (1 - t) ** 2 * stds**2 + t**2
    shift = x - (1 - t) * means
    share = (weights.log() - 0.5 * variance.log() - shift**2 / (2 * variance)).softmax(-1)
    data, noise = means + (1 - t) * stds**2 / variance * shift, t / variance * shift
    return (share * (noise - data)).sum(-1)


@pytest.fixture(scope="module")
def start() -> torch.Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact(start: torch.Tensor, first: float, last: float) -> torch.Tensor:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    path = torchdiffeq.odeint(
        lambda t, x: gaussian_mixture_velocity(x, float(t)), start, torch.tensor([first, last]).double(),
        method="dopri5", rtol=1e-10, atol=1e-10,
    )  # fmt: skip
    return path[-1]


def measured_order(solver: str, start: torch.Tensor, first: float, last: float) -> float:
    """Slope of the logarithmic error when the step is halved twice."""
    solution, steps, errors = exact(start, first, last), (40, 80, 160), []
    for n in steps:
        times = [first + (last - first) * i / n for i in range(n + 1)]
        errors.append(
            float((solve(gaussian_mixture_velocity, start, times, solver) - solution).square().mean().sqrt())
        )
    return math.log2(errors[0] / errors[-1]) / math.log2(steps[-1] / steps[0])


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("multistep", 2)])
def test_order(solver: str, order: int, start: torch.Tensor) -> None:
    """Away from the ends halving the step divides the error by 2 to the order."""
    slope = measured_order(solver, start, 0.9, 0.1)
    assert abs(slope - order) < 0.2, f"{solver}: slope {slope:.2f}"


@pytest.mark.parametrize("solver", ["heun", "multistep"])
def test_order_from_noise_to_data(solver: str, start: torch.Tensor) -> None:
    """The first-order steps at t=1 and t=0 cost the second order no more than a logarithm."""
    slope = measured_order(solver, start, 1.0, 0.0)
    assert 1.5 < slope < 2.3, f"{solver}: slope {slope:.2f}"


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers against NumPy 2
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_multistep_agrees_with_diffusers(steps: int, shift: float) -> None:
    """Second-order multistep DPM-Solver++ on the timesteps of diffusers' flow-sigma scheduler."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift, solver_order=2,
        lower_order_final=True, final_sigmas_type="zero", algorithm_type="dpmsolver++",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    times = [float(s) for s in scheduler.sigmas]
    x = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(1))
    ours = solve(lambda x, t: gaussian_mixture_velocity(x, t).float(), x, times, "multistep")
    theirs = x
    for i, t in enumerate(scheduler.timesteps):
        v = gaussian_mixture_velocity(theirs, times[i]).float()
        theirs = scheduler.step(v, t, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_second_multistep_step_by_hand() -> None:
    """0.9 -> 0.6 -> 0.3 in the formula of the paper: D + (D - D_last) / (2 r), r the ratio of log-SNR steps."""

    def log_snr(t: float) -> float:
        return math.log((1 - t) / t)

    x0, v0, v1 = 1.3, 0.4, -0.2
    d0 = x0 - 0.9 * v0
    x1 = 0.6 / 0.9 * x0 + (0.4 - 0.1 * 0.6 / 0.9) * d0
    d1 = x1 - 0.6 * v1
    r = (log_snr(0.6) - log_snr(0.9)) / (log_snr(0.3) - log_snr(0.6))
    x2 = 0.3 / 0.6 * x1 + (0.7 - 0.4 * 0.3 / 0.6) * (d1 + (d1 - d0) / (2 * r))
    values = {0.9: v0, 0.6: v1}
    ours = solve(lambda x, t: torch.full_like(x, values[t]), torch.tensor([x0]), [0.9, 0.6, 0.3], "multistep")
    assert ours.item() == pytest.approx(x2, abs=1e-6)


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_first_and_last_steps_are_finite(solver: str, steps: int) -> None:
    """log-SNR is infinite at both ends; a straight path must nevertheless be followed exactly."""
    data, noise = torch.tensor([0.5, -2.0]), torch.tensor([1.0, 3.0])
    seen = []

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return noise - data

    x = solve(velocity, noise, timesteps(steps), solver)
    assert min(seen) > 0, "the field of a data-predicting network is singular at t=0"
    torch.testing.assert_close(x, data, atol=1e-5, rtol=0)


def test_one_step_is_the_same_in_every_solver(start: torch.Tensor) -> None:
    ends = [solve(gaussian_mixture_velocity, start, timesteps(1), s) for s in SOLVERS]
    torch.testing.assert_close(ends[1], ends[0])
    torch.testing.assert_close(ends[2], ends[0])


@pytest.mark.parametrize("step", [euler_step, heun_step, multistep_step])
def test_steps_are_pure(step, start: torch.Tensor) -> None:
    """Repeating a step with the same arguments repeats its result and leaves the state alone."""
    before = start.clone()
    _, history = step(gaussian_mixture_velocity, start, 0.9, 0.7, None)
    a, _ = step(gaussian_mixture_velocity, start, 0.7, 0.4, history)
    step(gaussian_mixture_velocity, start + 1, 0.5, 0.2, None)
    b, _ = step(gaussian_mixture_velocity, start, 0.7, 0.4, history)
    assert torch.equal(a, b)
    assert torch.equal(start, before)


def test_evaluations_per_step() -> None:
    """The cost the documentation promises: one evaluation a step, two for Heun but its last."""
    for solver, expected in {"euler": 4, "multistep": 4, "heun": 7}.items():
        times: list[float] = []
        solve(lambda x, t, times=times: (times.append(t), x)[1], torch.ones(2), timesteps(4), solver)
        assert len(times) == expected, solver


def test_half_precision_velocities_are_summed_in_fp32(start: torch.Tensor) -> None:
    x = solve(lambda x, t: (x * 1e-3).bfloat16(), start.float(), timesteps(200))
    exact = start.float()
    for _ in range(200):
        exact = exact - (exact * 1e-3).bfloat16().float() / 200
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, exact, atol=1e-6, rtol=1e-6)


def test_timesteps_by_hand() -> None:
    assert timesteps(4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    # s·t / (1 + (s − 1)·t) with s=3: 2.25/2.5, 1.5/2, 0.75/1.5.
    assert timesteps(4, shift=3.0) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert timesteps(1, shift=3.0) == [1, 0]


def test_bad_options() -> None:
    velocity = gaussian_mixture_velocity
    with pytest.raises(
        V2FlowError, match="option solver: expected one of euler, heun, multistep, found 'rk4'"
    ):
        solve(velocity, torch.zeros(1), timesteps(1), "rk4")
    with pytest.raises(V2FlowError, match="option steps: .* found 0"):
        timesteps(0)
    with pytest.raises(V2FlowError, match="option timestep_shift: .* found 0"):
        timesteps(3, 0.0)


def test_a_new_solver_is_an_option_everywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An entry in SOLVERS is all that it needs, in Python and on the command line."""
    assert get_args(Solver) == tuple(SOLVERS)
    words = ["decode", "CHECKPOINT", "ids.npz", "--out", "pictures", "--solver", "midpoint"]
    with pytest.raises(V2FlowError, match=r"--solver: invalid choice: 'midpoint' .*euler.*heun.*multistep"):
        build_parser().parse_args(words)
    monkeypatch.setitem(SOLVERS, "midpoint", euler_step)
    assert DecodeOptions(solver="midpoint").solver == "midpoint"
    assert build_parser().parse_args(words).solver == "midpoint"
    with pytest.raises(SystemExit):
        build_parser().parse_args(["reconstruct", "--help"])
    assert "euler, heun, multistep, midpoint" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(V2FlowError, match="option solver: expected one of euler, .*, midpoint, found 'rk4'"):
        DecodeOptions(solver="rk4")
