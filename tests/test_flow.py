"""Rectified-flow loss, its preconditioning, and sampling, against plain references."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from v2flow.config import DecoderConfig, VelocityConfig
from v2flow.decoding import DecodeOptions, draw_latents
from v2flow.errors import V2FlowError
from v2flow.flow import FlowHead, draw_timesteps
from v2flow.masked_decoder import MaskedAutoregressiveDecoder, Prefix, cosine_schedule
from v2flow.samplers import SOLVERS

BATCH, CHANNELS, WIDTH, GRID = 3, 4, 8, (3, 4)
POSITIONS = GRID[0] * GRID[1]
TARGETS = ("residual", "x0", "velocity")
KINDS = ("per_position", "joint")
FIELDS = {
    "per_position": {"kind": "per_position"},
    "joint": {"kind": "joint", "fine_patch": 1},
    "joint with convolutions": {"kind": "joint", "fine_patch": 2, "fine_width": 4},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_head(randomised: bool = True, kind: str = "joint", **options) -> FlowHead:
    """A head whose zero-initialised layers are given weights as well, or nothing would depend on anything."""
    config = VelocityConfig(width=8, depth=2, heads=2, **FIELDS[kind], **options)
    head = FlowHead(CHANNELS, WIDTH, GRID, config).eval()
    if randomised:
        g = generator(7)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
            head.residual_std.copy_(torch.rand(CHANNELS, generator=g) + 0.5)
    return head


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Latents, conditions and a mask with 7 masked positions in every row."""
    g = generator(1)
    latents = torch.randn(BATCH, POSITIONS, CHANNELS, generator=g)
    condition = torch.randn(BATCH, POSITIONS, WIDTH, generator=g)
    mask = torch.rand(BATCH, POSITIONS, generator=g).argsort(1) < 7
    return latents, condition, mask


class Field(nn.Module):
    """A closed-form field in the place of the network."""

    def __init__(self, function, joint: bool = False) -> None:
        super().__init__()
        self.function, self.joint = function, joint

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, known: Tensor) -> Tensor:
        return self.function(x, t[..., None], condition)


# --- the loss ---------------------------------------------------------------------------------------------------


def plain_error(
    head: FlowHead, x0: Tensor, c: Tensor, t: float, eps: Tensor, output: Tensor
) -> tuple[float, float]:
    """Summed squared errors (mean, flow) of one position, from the equations in flow.py."""
    target, std = head.config.target, head.residual_std
    if target == "velocity":
        return 0.0, float((output - (eps - x0)).square().sum())
    if target == "x0":
        skip = head.mean(c) if head.mean is not None else 0.0
        return 0.0, min(1 / t**2, head.config.weight_cap) * float((skip + output - x0).square().sum())
    mean = head.mean(c)
    r = (x0 - mean) / std
    s = math.sqrt((1 - t) ** 2 + t**2)
    f = (t * r - (1 - t) * eps) / s
    return float((x0 - mean).square().sum()), float(((output - f) * std).square().sum())


@torch.no_grad()
def plain_loss(head: FlowHead, latents: Tensor, condition: Tensor, mask: Tensor, g: torch.Generator):
    """The same draws as the head's, one picture and one position at a time."""
    joint, draws = head.config.kind == "joint", head.config.draws
    mean_sum = flow_sum = 0.0
    count = int(mask[0].sum())
    for _ in range(draws):
        places = POSITIONS if joint else count
        t = draw_timesteps((BATCH, 1 if joint else count), head.config, g, torch.device("cpu"))
        noise = torch.randn(BATCH, places, CHANNELS, generator=g)
        for b in range(BATCH):
            chosen = [i for i in range(POSITIONS) if mask[b, i]]
            data = latents[b]
            if head.config.target == "residual":
                data = (latents[b] - head.mean(condition[b])) / head.residual_std
            if joint:
                x = data.clone()
                for i in chosen:
                    x[i] = (1 - t[b, 0]) * data[i] + t[b, 0] * noise[b, i]
                out = head.field(x[None], t[b].expand(1, POSITIONS), condition[b : b + 1], ~mask[b : b + 1])[
                    0
                ]
            for k, i in enumerate(chosen):
                time, eps = (t[b, 0], noise[b, i]) if joint else (t[b, k], noise[b, k])
                if joint:
                    output = out[i]
                else:
                    x = (1 - time) * data[i] + time * eps
                    output = head.field(
                        x.view(1, 1, -1),
                        time.view(1, 1),
                        condition[b, i].view(1, 1, -1),
                        torch.zeros(1, 1).bool(),
                    )[0, 0]
                mean, flow = plain_error(head, latents[b, i], condition[b, i], float(time), eps, output)
                mean_sum, flow_sum = mean_sum + mean, flow_sum + flow
    return mean_sum / (draws * BATCH * count * CHANNELS), flow_sum / (draws * BATCH * count * CHANNELS)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", FIELDS)
def test_loss_against_a_plain_loop(kind: str, target: str, draws: int, batch) -> None:
    head = make_head(kind=kind, target=target, draws=draws, weight=0.5)
    mean, flow = plain_loss(head, *batch, generator(2))
    with torch.no_grad():
        loss = head.loss(*batch, generator(2))
    assert float(loss.mean) == pytest.approx(mean, rel=1e-4, abs=1e-7)
    assert float(loss.flow) == pytest.approx(flow, rel=1e-4)
    assert float(loss.total) == pytest.approx(mean + 0.5 * flow, rel=1e-4)


def test_x0_without_skip_has_no_linear_path(batch) -> None:
    head = make_head(kind="per_position", target="x0", skip=False)
    assert head.mean is None
    mean, flow = plain_loss(head, *batch, generator(2))
    with torch.no_grad():
        assert float(head.loss(*batch, generator(2)).flow) == pytest.approx(flow, rel=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_only_masked_positions_count(target: str, batch) -> None:
    """Visible latents are context: as targets they have no part, in value or in gradient."""
    latents, condition, mask = batch
    head = make_head(kind="per_position", target=target)
    latents, condition = latents.requires_grad_(), condition.requires_grad_()
    loss = head.loss(latents, condition, mask, generator()).total
    loss.backward()
    assert (latents.grad[~mask] == 0).all() and (condition.grad[~mask] == 0).all()
    assert (latents.grad[mask] != 0).any(-1).all()
    other = torch.where(mask[..., None], latents, latents + 10).detach()
    assert torch.equal(head.loss(other, condition, mask, generator()).total, loss)
    assert not torch.equal(head.loss(latents.detach() + 10, condition, mask, generator()).total, loss)


@pytest.mark.parametrize("target", TARGETS)
def test_joint_targets_are_masked_positions_only(target: str, batch) -> None:
    """A joint field may read visible latents; with one that does not, they leave no trace in the loss."""
    latents, condition, mask = batch
    head = make_head(kind="joint", target=target)
    head.field = Field(lambda x, t, c: torch.zeros_like(x), joint=True)
    other = torch.where(mask[..., None], latents, latents + 10)
    a, b = (head.loss(x, condition, mask, generator()).total for x in (latents, other))
    assert torch.equal(a, b)


def test_joint_field_is_given_clean_visible_latents(batch) -> None:
    latents, condition, mask = batch
    head, seen = make_head(kind="joint", target="velocity"), []
    head.field = Field(lambda x, t, c: (seen.append((x, t)), torch.zeros_like(x))[1], joint=True)
    head.loss(latents, condition, mask, generator())
    x, t = seen[0]
    assert torch.equal(x[~mask], latents[~mask])
    assert (x[mask] != latents[mask]).any(-1).all()
    assert (t == t[:, :1]).all(), "one timestep a picture"


def test_the_flow_does_not_train_the_mean(batch) -> None:
    """The residual is taken to a detached mean, or the mean would be pulled to make the residual easy."""
    head = make_head(kind="per_position", target="residual")
    (gradient,) = torch.autograd.grad(
        head.loss(*batch, generator()).flow, head.mean.weight, allow_unused=True
    )
    assert gradient is None


# --- preconditioning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("t", [1.0, 0.7, 0.5, 0.02])
def test_a_perfect_output_gives_the_velocity(target: str, t: float, batch) -> None:
    """Whatever the network's output means, with the true one v = ε − x_0 (in units of the flow)."""
    latents, condition, mask = batch
    head = make_head(kind="per_position", target=target)
    eps = torch.randn(latents.shape, generator=generator(3))
    r = head.normalise(latents, condition)
    s = math.sqrt((1 - t) ** 2 + t**2)
    perfect = {
        "residual": lambda: (t * r - (1 - t) * eps) / s,
        "x0": lambda: latents - head.mean(condition),
        "velocity": lambda: eps - latents,
    }[target]()
    head.field = Field(lambda x, t, c: perfect)
    times = torch.full(mask.shape, t)
    x = (1 - t) * r + t * eps
    velocity = head.velocity(x, times, condition, mask)
    torch.testing.assert_close(velocity, eps - r, atol=5e-5 if t > 0.1 else 5e-4, rtol=1e-4)
    # The same output is what the loss asks for: draws exactly at t leave no error.
    if t == 1.0:
        loss = head.loss(latents, condition, torch.ones_like(mask), generator())
        if target == "x0":
            assert loss.flow.item() < 1e-10


@pytest.mark.parametrize("t", [0.05, 0.5, 0.95, 1.0])
def test_the_residual_target_has_unit_variance(t: float) -> None:
    """A zero output then costs the residual's variance at every t, so no t dominates."""
    share, logit = (1.0, 0.0) if t == 1.0 else (0.0, math.log(t / (1 - t)))
    head = make_head(kind="per_position", start_share=share, logit_mean=logit, logit_std=1e-4)
    head.field = Field(lambda x, t, c: torch.zeros_like(x))
    condition = torch.zeros(200, POSITIONS, WIDTH)
    unit = torch.randn(200, POSITIONS, CHANNELS, generator=generator(4))
    latents = head.to_latents(unit, condition)
    with torch.no_grad():
        loss = head.loss(latents, condition, torch.ones(200, POSITIONS).bool(), generator(5))
    variance = float(head.residual_std.square().mean())
    assert float(loss.flow) == pytest.approx(variance, rel=0.05)
    assert float(loss.mean) == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize("target", TARGETS)
def test_normalise_and_its_inverse(target: str, batch) -> None:
    latents, condition, _ = batch
    head = make_head(kind="joint", target=target)
    torch.testing.assert_close(head.to_latents(head.normalise(latents, condition), condition), latents)
    if target == "residual":
        assert not torch.allclose(head.normalise(latents, condition), latents)


def test_residual_scale_follows_masked_residuals_in_training_only(batch) -> None:
    """The rms of the masked residuals: a plain mean over the first batches, then a running one of rate 0.02."""
    latents, condition, mask = batch
    head = make_head(kind="per_position")
    before = head.residual_std.clone()
    head.loss(latents, condition, mask, generator())
    head.train()
    with torch.no_grad():
        head.loss(latents, condition, mask, generator())
    assert torch.equal(head.residual_std, before), "changed in evaluation or without gradients"
    g, variances, expected = generator(8), [], torch.zeros(())
    for step in range(60):
        latents = torch.randn(latents.shape, generator=g) * (1 + step)
        variances.append((latents - head.mean(condition))[mask].square().mean(0).detach())
        head.loss(latents, condition, mask, generator())
        expected = torch.stack(variances).mean(0) if step < 50 else 0.98 * expected + 0.02 * variances[-1]
        torch.testing.assert_close(head.residual_std, expected.sqrt(), rtol=1e-4, atol=1e-5)


# --- timesteps --------------------------------------------------------------------------------------------------


def test_timestep_distribution() -> None:
    config = VelocityConfig(start_share=0.1, logit_mean=0.4, logit_std=0.8)
    t = draw_timesteps((200_000,), config, generator(), torch.device("cpu"))
    assert t.min() > 0 and t.max() == 1
    assert float((t == 1).float().mean()) == pytest.approx(0.1, abs=0.003)
    rest = t[t < 1]
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        z = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(q))
        assert float(rest.quantile(q)) == pytest.approx(float(torch.sigmoid(0.4 + 0.8 * z)), abs=0.005)
    again = draw_timesteps((200_000,), config, generator(), torch.device("cpu"))
    assert torch.equal(t, again)


# --- drawing ----------------------------------------------------------------------------------------------------

MEAN, STD = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([0.3, 1.0, 0.4, 2.0])


def gaussian_head(kind: str, target: str) -> FlowHead:
    """A head with the closed-form output for latents ~ N(MEAN, STD²), whatever the condition."""
    head = make_head(False, kind=kind, target=target)
    if head.mean is not None:
        nn.init.zeros_(head.mean.weight)
        head.mean.bias.data = MEAN.clone() if target == "residual" else torch.zeros(CHANNELS)
    head.residual_std.copy_(STD if target == "residual" else torch.ones(CHANNELS))

    def output(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        if target == "residual":
            return torch.zeros_like(x)  # E[F | r_t] of a unit normal residual
        variance = ((1 - t) * STD).square() + t.square()
        shift = x - (1 - t) * MEAN
        data, noise = MEAN + (1 - t) * STD.square() / variance * shift, t / variance * shift
        return data if target == "x0" else noise - data

    head.field = Field(output, joint=kind == "joint")
    return head


def make_decoder() -> MaskedAutoregressiveDecoder:
    torch.manual_seed(0)
    config = DecoderConfig(width=WIDTH, heads=2, encoder_depth=1, decoder_depth=1)
    return MaskedAutoregressiveDecoder(6, GRID, CHANNELS, GRID, config).eval()


@torch.no_grad()
def draw(head: FlowHead, batch: int, seed: int = 0, decoder: Any = None, **options) -> Tensor:
    tokens = torch.randn(batch, POSITIONS, 6, generator=generator(9))
    decoder = decoder if decoder is not None else make_decoder()
    return draw_latents(decoder, head, tokens, POSITIONS, CHANNELS, DecodeOptions(**options), generator(seed))


@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_samples_of_a_known_gaussian(solver: str, kind: str, target: str, iterations: int) -> None:
    steps = 200 if solver == "euler" else 40
    x = draw(gaussian_head(kind, target), 500, steps=steps, solver=solver, iterations=iterations).flatten(
        0, 1
    )
    # 6,000 samples: standard errors are STD/77 of the mean and 0.9 % of the standard deviation.
    torch.testing.assert_close(x.mean(0), MEAN, rtol=0, atol=0.08)
    torch.testing.assert_close(x.std(0) / STD, torch.ones(CHANNELS), rtol=0, atol=0.05)
    correlation = torch.corrcoef(x.T) - torch.eye(CHANNELS)
    assert correlation.abs().max() < 0.06


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_scales_the_start(kind: str) -> None:
    options = {"steps": 30, "solver": "heun"}
    x = draw(gaussian_head(kind, "velocity"), 500, temperature=0.5, **options).flatten(0, 1)
    torch.testing.assert_close(x.std(0) / STD, torch.full((CHANNELS,), 0.5), rtol=0, atol=0.03)
    frozen = draw(gaussian_head(kind, "residual"), 4, temperature=0.0, **options)
    torch.testing.assert_close(frozen, MEAN.expand_as(frozen))


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("target", TARGETS)
def test_draws_depend_on_the_generator_alone(kind: str, target: str) -> None:
    options = {"steps": 3, "iterations": 3}
    a = draw(make_head(kind=kind, target=target), 2, **options)
    torch.manual_seed(123)
    torch.rand(5)
    assert torch.equal(draw(make_head(kind=kind, target=target), 2, **options), a)
    assert not torch.allclose(draw(make_head(kind=kind, target=target), 2, seed=1, **options), a)


class Recorder:
    """Keeps what every AR iteration gives to the decoder."""

    def __init__(self) -> None:
        self.decoder, self.calls = make_decoder(), []
        self.read_tokens = self.decoder.read_tokens

    def conditions(self, prefix: Prefix, latents: Tensor, mask: Tensor) -> Tensor:
        self.calls.append((latents.clone(), mask.clone()))
        return self.decoder.conditions(prefix, latents, mask)


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("iterations", [1, 3, 12, 50])
def test_iterations_reveal_each_position_once(kind: str, iterations: int) -> None:
    recorder = Recorder()
    x = draw(make_head(kind=kind), BATCH, decoder=recorder, steps=2, iterations=iterations)
    used = min(iterations, POSITIONS)
    masked = [mask.sum(1).tolist() for _, mask in recorder.calls]
    assert masked == [[n] * BATCH for n in [POSITIONS, *cosine_schedule(used, POSITIONS)][:-1]]
    for (_, earlier), (latents, mask) in zip(recorder.calls, recorder.calls[1:], strict=False):
        assert not (mask & ~earlier).any(), "a visible position was masked again"
        assert torch.equal(latents[~mask], x[~mask]), "a visible latent was changed later"
    assert x.isfinite().all() and (x != 0).all()


class KnownField(nn.Module):
    """A joint field that keeps what it is shown of the known positions."""

    joint = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, known: Tensor) -> Tensor:
        self.seen.append((x.clone(), known.clone()))
        return 0.5 * x


def test_a_joint_field_sees_clean_known_positions_at_every_step() -> None:
    """As in training: revealed latents stay at their clean values while the others are integrated."""
    head, field = make_head(target="velocity"), KnownField()
    head.field = field
    x = draw(head, BATCH, steps=3, iterations=4)
    assert len(field.seen) == 12
    counts = [int(known[0].sum()) for _, known in field.seen]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] > 0
    for shown, known in field.seen:
        assert torch.equal(shown[known], x[known])


def test_later_iterations_read_earlier_ones() -> None:
    """Four iterations are more than four independent parts of one."""
    head = make_head(kind="per_position")
    assert not torch.allclose(draw(head, BATCH, iterations=4), draw(head, BATCH, iterations=1))


# --- guidance ---------------------------------------------------------------------------------------------------


def conditions() -> tuple[Tensor, Tensor]:
    """Conditions of a fully masked batch with its tokens and with the null embedding."""
    decoder, tokens = make_decoder(), torch.randn(BATCH, POSITIONS, 6, generator=generator(9))
    latents, mask = torch.zeros(BATCH, POSITIONS, CHANNELS), torch.ones(BATCH, POSITIONS).bool()
    with torch.no_grad():
        return decoder(tokens, latents, mask), decoder(tokens, latents, mask, torch.ones(BATCH).bool())


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_of_the_velocity(kind: str) -> None:
    """One step with a field that is an image of the condition: x = ε − (v_0 + g (v − v_0))."""
    head = make_head(kind=kind, target="velocity")
    head.field = Field(lambda x, t, c: c[..., :CHANNELS], joint=kind == "joint")
    with_tokens, without = (c[..., :CHANNELS] for c in conditions())
    x = draw(head, BATCH, temperature=0.0, guidance=2.5)
    torch.testing.assert_close(x, -(without + 2.5 * (with_tokens - without)), atol=1e-5, rtol=1e-5)
    plain = draw(head, BATCH, temperature=0.0)
    torch.testing.assert_close(plain, -with_tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_of_a_residual_keeps_the_mean(kind: str) -> None:
    """One step with F an image of the condition: r = F_0 + g (F − F_0) from x=0, added to the conditional mean."""
    head = make_head(kind=kind, target="residual")
    head.field = Field(lambda x, t, c: c[..., :CHANNELS], joint=kind == "joint")
    with_tokens = conditions()[0]
    with torch.no_grad():
        mean, null = head.mean(with_tokens), head.null_condition[:CHANNELS]
    x = draw(head, BATCH, temperature=0.0, guidance=2.5)
    residual = null + 2.5 * (with_tokens[..., :CHANNELS] - null)
    torch.testing.assert_close(x, mean + head.residual_std * residual.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_null_hides_the_condition_from_the_field_only(kind: str) -> None:
    """Pictures under null give the field no gradient to their conditions, and all of them count in the mean."""
    head, latents = make_head(kind=kind, target="residual"), torch.randn(2, POSITIONS, CHANNELS)
    condition = torch.randn(2, POSITIONS, WIDTH, requires_grad=True)
    loss = head.loss(
        latents, condition, torch.ones(2, POSITIONS).bool(), generator(), null=torch.tensor([True, False])
    )
    flow = torch.autograd.grad(loss.flow, condition, retain_graph=True)[0]
    assert (flow[0] == 0).all() and (flow[1] != 0).any()
    mean = torch.autograd.grad(loss.mean, condition, retain_graph=True)[0]
    assert (mean[0] != 0).any() and (mean[1] != 0).any()
    assert torch.autograd.grad(loss.flow, head.null_condition)[0].abs().sum() > 0


def test_guidance_schedules() -> None:
    linear = DecodeOptions(guidance=3.0, guidance_schedule="linear", iterations=4)
    assert [linear.guidance_at(k, 4) for k in range(4)] == [1.5, 2.0, 2.5, 3.0]
    constant = DecodeOptions(guidance=3.0, iterations=4)
    assert [constant.guidance_at(k, 4) for k in range(4)] == [3.0] * 4


def test_linear_guidance_reaches_its_end_with_more_iterations_than_positions() -> None:
    """Fifty iterations over 12 positions are twelve, and the last of those has the full scale."""
    head = make_head(kind="per_position")
    options = {"guidance": 3.0, "guidance_schedule": "linear"}
    assert torch.equal(
        draw(head, 2, iterations=50, **options), draw(head, 2, iterations=POSITIONS, **options)
    )


def test_linear_guidance_is_weaker_before_the_end() -> None:
    head = make_head(kind="per_position")
    one = {"guidance": 3.0, "steps": 2}
    assert torch.equal(draw(head, 2, guidance_schedule="linear", **one), draw(head, 2, **one))
    several = one | {"iterations": 4}
    assert not torch.allclose(draw(head, 2, guidance_schedule="linear", **several), draw(head, 2, **several))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "option steps: .* found 0"),
        ({"iterations": 0}, "option iterations: .* found 0"),
        ({"temperature": -0.1}, "option temperature: .* found -0.1"),
        ({"temperature": math.nan}, "option temperature: expected a finite number, found nan"),
        ({"guidance": math.inf}, "option guidance: expected a finite number, found inf"),
        ({"timestep_shift": math.inf}, "option timestep_shift: expected a finite number, found inf"),
        ({"solver": "rk4"}, "option solver: .* found 'rk4'"),
        ({"guidance_schedule": "cosine"}, "option guidance_schedule: .* found 'cosine'"),
        ({"timestep_shift": -1.0}, "option timestep_shift: .* found -1.0"),
        ({"guidance_interval": [0.7, 0.3]}, "option guidance_interval: .* found .0.7, 0.3"),
        ({"guidance_interval": [0.5]}, "option guidance_interval: .* found .0.5"),
    ],
)
def test_decode_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(V2FlowError, match=message):
        DecodeOptions(**options)


# --- it learns --------------------------------------------------------------------------------------------------


class ConstantCondition:
    def read_tokens(self, tokens: Tensor, null: Tensor | None = None) -> Tensor:
        return tokens

    def conditions(self, prefix: Tensor, latents: Tensor, mask: Tensor) -> Tensor:
        return torch.ones(*latents.shape[:2], WIDTH)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_learns_two_modes(kind: str, target: str) -> None:
    """Latents that are +1 or −1 given the same condition: samples find both modes, the mean lies between."""
    torch.manual_seed(0)
    grid = (1, 2)
    config = VelocityConfig(target=target, width=32, depth=1, heads=2, draws=2, **FIELDS[kind])
    head = FlowHead(1, WIDTH, grid, config).train()
    optimiser = torch.optim.Adam(head.parameters(), lr=6e-3)
    condition, g = torch.ones(64, 2, WIDTH), generator(6)
    mask = torch.ones(64, 2).bool()
    for _ in range(200):
        # Both positions of a picture have the same sign.
        latents = (torch.randint(2, (64, 1, 1), generator=g) * 2.0 - 1).expand(64, 2, 1)
        loss = head.loss(latents, condition, mask, g).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    head.eval()
    decoder = ConstantCondition()
    with torch.no_grad():
        options = DecodeOptions(steps=20, solver="heun")
        x = draw_latents(decoder, head, torch.zeros(200, 2, 4), 2, 1, options, generator())[..., 0]
        one = draw_latents(decoder, head, torch.zeros(200, 2, 4), 2, 1, DecodeOptions(), generator())
    assert ((x.abs() - 1).abs() < 0.3).float().mean() > 0.85
    assert 0.3 < (x > 0).float().mean() < 0.7
    assert one.abs().mean() < 0.3, "one step from noise is the conditional mean"
    agree = (x[:, 0] * x[:, 1] > 0).float().mean()
    # Only a joint field can know that the two positions belong together.
    assert agree > 0.9 if kind == "joint" else agree < 0.7
