"""Velocity fields: what each output may depend on, and the AdaLN form written out plainly."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from v2flow.config import VelocityConfig
from v2flow.errors import V2FlowError
from v2flow.velocity import TimestepEmbedding, build_field

CHANNELS, WIDTH, GRID = 8, 8, (2, 3)
POSITIONS = 6
FIELDS = {
    "per_position": {"kind": "per_position"},
    "joint": {"kind": "joint", "fine_patch": 1},
    "joint with convolutions": {"kind": "joint", "fine_patch": 2, "fine_width": 8},
}
JOINT = list(FIELDS)[1:]


def make_field(kind: str, randomised: bool = True):
    torch.manual_seed(0)
    field = build_field(CHANNELS, WIDTH, GRID, VelocityConfig(width=16, depth=2, heads=4, **FIELDS[kind]))
    if randomised:
        with torch.no_grad():
            for parameter in field.parameters():
                parameter.normal_(std=0.3)
    return field


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, POSITIONS, CHANNELS, generator=g),
        "t": torch.rand(2, 1, generator=g).expand(2, POSITIONS).clone(),
        "condition": torch.randn(2, POSITIONS, WIDTH, generator=g),
        "known": torch.zeros(2, POSITIONS).bool(),
    }


def changed_positions(field, inputs: dict[str, Tensor], **other: Tensor) -> list[int]:
    """Positions of the first picture whose output differs under other inputs; the second must never differ."""
    with torch.no_grad():
        difference = (field(**inputs) - field(**(inputs | other))).abs().amax(-1)
    assert (difference[1] < 1e-6).all(), "pictures of a batch influence each other"
    return (difference[0] > 1e-5).nonzero().flatten().tolist()


def bumped(x: Tensor, position: int | slice, by: float = 1.0) -> Tensor:
    x = x.clone()
    x[0, position] += by
    return x


@pytest.mark.parametrize("kind", FIELDS)
def test_starts_at_zero(kind: str, inputs) -> None:
    field = make_field(kind, randomised=False)
    assert (field(**inputs) == 0).all()
    field(**inputs).sum().backward()
    gradients = [p.grad.abs().max() for p in field.parameters() if p.grad is not None]
    assert max(gradients) > 0, "nothing can be learned from a zero gradient"


@pytest.mark.parametrize("name", ["x", "condition"])
def test_per_position_sees_its_own_position_only(name: str, inputs) -> None:
    field = make_field("per_position")
    assert changed_positions(field, inputs, **{name: bumped(inputs[name], 3)}) == [3]


def test_per_position_sees_its_own_time(inputs) -> None:
    field = make_field("per_position")
    assert changed_positions(field, inputs, t=bumped(inputs["t"], 4, 0.1)) == [4]


def test_per_position_takes_any_number_of_positions(inputs) -> None:
    field = make_field("per_position")
    part = {name: value[:, [4, 1]] for name, value in inputs.items()}
    torch.testing.assert_close(field(**part), field(**inputs)[:, [4, 1]])


@pytest.mark.parametrize("name", ["x", "condition"])
@pytest.mark.parametrize("kind", JOINT)
def test_joint_sees_every_position(kind: str, name: str, inputs) -> None:
    field = make_field(kind)
    assert changed_positions(field, inputs, **{name: bumped(inputs[name], 3)}) == list(range(POSITIONS))


@pytest.mark.parametrize("kind", JOINT)
def test_joint_depends_on_time_place_and_what_is_known(kind: str, inputs) -> None:
    field = make_field(kind)
    everywhere = list(range(POSITIONS))
    assert changed_positions(field, inputs, t=bumped(inputs["t"], slice(None), 0.1)) == everywhere
    known = inputs["known"].clone()
    known[0, 2] = True
    assert changed_positions(field, inputs, known=known) == everywhere
    # The same content elsewhere is another picture: permuting the inputs does not just permute the outputs.
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    permuted = {name: value[:, order] for name, value in inputs.items()}
    assert not torch.allclose(field(**permuted), field(**inputs)[:, order], atol=1e-4)


def test_per_position_against_plain_adaln(inputs) -> None:
    """out = W·(LN(h)(1+scale)+shift), h ← h + gate·MLP(LN(h)(1+scale)+shift), modulations from SiLU(t + condition)."""
    field = make_field("per_position")

    def norm(h: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def linear(layer, h: Tensor) -> Tensor:
        return h @ layer.weight.T + layer.bias

    half = torch.arange(64)
    angles = 1000 * inputs["t"][..., None] * 10000 ** (-half / 64)
    features = torch.cat([angles.cos(), angles.sin()], -1)
    time = linear(field.time.mlp[2], F.silu(linear(field.time.mlp[0], features)))
    control = F.silu(time + linear(field.condition, inputs["condition"]))
    h = linear(field.inputs, inputs["x"])
    for block in field.blocks:
        shift, scale, gate = linear(block.modulation, control).split(16, -1)
        inner = linear(block.mlp[0], norm(h) * (1 + scale) + shift)
        h = h + gate * linear(block.mlp[2], F.gelu(inner, approximate="tanh"))
    shift, scale = linear(field.modulation, control).split(16, -1)
    expected = linear(field.output, norm(h) * (1 + scale) + shift)
    torch.testing.assert_close(field(**inputs), expected, atol=1e-4, rtol=1e-4)


def test_nearby_times_are_told_apart_under_bf16() -> None:
    """bf16 has 8 bits: t=0.998 and t=0.9995 would be one, and angles of up to 1000 noise, were they not fp32."""
    torch.manual_seed(0)
    embedding = TimestepEmbedding(32)
    t = torch.tensor([0.998, 0.9995])
    with torch.autocast("cpu", torch.bfloat16):
        low = embedding(t).float()
    exact = embedding(t)
    torch.testing.assert_close(low, exact, atol=0.02, rtol=0.05)
    assert (exact[0] - exact[1]).abs().max() > 0.05


@pytest.mark.parametrize("kind", FIELDS)
def test_every_parameter_takes_part(kind: str, inputs) -> None:
    field = make_field(kind)
    inputs["known"][:, 0] = True
    field(**inputs).square().sum().backward()
    assert [n for n, p in field.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_options_are_checked() -> None:
    with pytest.raises(V2FlowError, match="velocity.width: expected a multiple of 4, found 198"):
        VelocityConfig(width=198)
    with pytest.raises(V2FlowError, match="velocity.heads.*divisor of width 16.*found 3"):
        VelocityConfig(kind="joint", width=16, heads=3)
    assert VelocityConfig(kind="per_position", width=16, heads=3).heads == 3  # unused there
    with pytest.raises(V2FlowError, match="velocity.draws.*found 0"):
        VelocityConfig(draws=0)
    with pytest.raises(V2FlowError, match="velocity.start_share.*found 1.5"):
        VelocityConfig(start_share=1.5)
