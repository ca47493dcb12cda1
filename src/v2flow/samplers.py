"""Solvers of dx/dt = v(x, t) from t=1 (noise) to t=0 (data).

Each solver is a pure step: `(velocity, x, t0, t1, history) -> (x, history)`; nothing is kept between calls but
what the step returns. Sums are in fp32 whatever the velocity's precision.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from v2flow.arrays import State
from v2flow.errors import V2FlowError

Velocity = Callable[[State, float], State]


class History(NamedTuple):
    """What a multistep solver remembers: the last data prediction and the log-SNR it was made at."""

    data: State
    log_snr: float


Step = Callable[[Velocity, State, float, float, History | None], tuple[State, History | None]]


def euler_step(
    velocity: Velocity, x: State, t0: float, t1: float, history: History | None
) -> tuple[State, History | None]:
    """First order: x + (t1 − t0)·v."""
    return x + (t1 - t0) * velocity(x, t0).float(), None


def heun_step(
    velocity: Velocity, x: State, t0: float, t1: float, history: History | None
) -> tuple[State, History | None]:
    """Second order, two evaluations; Euler on the last step, where the field is not evaluated at t=0."""
    v0 = velocity(x, t0).float()
    guess = x + (t1 - t0) * v0
    if t1 <= 0:
        return guess, None
    return x + (t1 - t0) / 2 * (v0 + velocity(guess, t1).float()), None


def multistep_step(
    velocity: Velocity, x: State, t0: float, t1: float, history: History | None
) -> tuple[State, History | None]:
    """DPM-Solver++ of second order, one evaluation, in flow form (α=1−t, σ=t, λ=log α/σ).

    λ is infinite at t=1 and t=0: those steps are first order (Lu et al. 2022, eq. for 2M, data prediction).
    """
    data = x - t0 * velocity(x, t0).float()
    current = History(data, _log_snr(t0))
    ratio = t1 / t0
    if history is not None and t1 > 0 and math.isfinite(history.log_snr):
        step, last = _log_snr(t1) - current.log_snr, current.log_snr - history.log_snr
        data = data + (step / (2 * last)) * (data - history.data)
    return ratio * x + ((1 - t1) - (1 - t0) * ratio) * data, current


def _log_snr(t: float) -> float:
    if t <= 0 or t >= 1:
        return math.inf if t <= 0 else -math.inf
    return math.log((1 - t) / t)


MAX_STEPS = 10_000
"""A checkpoint names its own ways to decode: more steps than anybody waits for are a mistake or meant to hang."""
SOLVERS: dict[str, Step] = {"euler": euler_step, "heun": heun_step, "multistep": multistep_step}
"""All there are: options and the command line take their names from here."""

if TYPE_CHECKING:
    Solver = str  # a type checker cannot look into a dictionary
else:
    Solver = Literal[tuple(SOLVERS)]


def timesteps(steps: int, shift: float = 1.0) -> list[float]:
    """`steps + 1` times from 1 to 0; shift s maps t to s·t/(1 + (s−1)·t), so s > 1 dwells on noise."""
    if steps < 1:
        raise V2FlowError(f"option steps: expected at least 1, found {steps}")
    if steps > MAX_STEPS:
        raise V2FlowError(f"option steps: expected at most {MAX_STEPS}, found {steps}")
    if shift <= 0:
        raise V2FlowError(f"option timestep_shift: expected a positive number, found {shift}")
    uniform = [1 - i / steps for i in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in uniform]


def solve(velocity: Velocity, x: State, times: list[float], solver: str = "euler") -> State:
    """Integrate from `times[0]` to `times[-1]`.

    Args:
        velocity: `(x, t) -> v` with the shape of x.
        x: state at `times[0]`, any shape.
        times: falling times in [0, 1].
        solver: one of `SOLVERS`.
    """
    if solver not in SOLVERS:
        raise V2FlowError(f"option solver: expected one of {', '.join(SOLVERS)}, found {solver!r}")
    step, history = SOLVERS[solver], None
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    for t0, t1 in zip(times[:-1], times[1:], strict=True):
        x, history = step(velocity, x, t0, t1, history)
    return x
