"""Overhead: hand-counted FLOPs and memory, times under a clock of our own, ratios, and modules left as they were."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core_toys import small_config
from torch import Tensor, nn

from v2flow.baselines.module import VQAutoencoderModule
from v2flow.baselines.vq_autoencoder import VQAutoencoderConfig
from v2flow.benchmark import subject
from v2flow.benchmark.overhead import Spread, measure_overhead, steps_for_minutes
from v2flow.benchmark.subject import peak_rise
from v2flow.config import CodecConfig, ResamplerConfig, VelocityConfig
from v2flow.errors import V2FlowError
from v2flow.training.module import ReconstructionModule
from v2flow.training.optimizer import OptimizerConfig
from v2flow.training.tokenizer_module import TokenizerModule

SIZE, BATCH = 8, 4
Loss = Callable[[nn.Module, Tensor], Tensor]


class Clock:
    """Seconds that pass only when a toy says so, and what the toys did."""

    now = 0.0
    calls: list[str]

    def __init__(self) -> None:
        self.calls = []

    def __deepcopy__(self, memo: Any) -> "Clock":
        return self

    def spend(self, what: str, seconds: float) -> None:
        self.calls.append(what)
        self.now += seconds


class ToyModel(nn.Module):
    """The interface of a tokenizer around a few layers."""

    num_tokens, codebook_size = 3, 7

    def __init__(self, layers: nn.Module, name: str, cost: float, clock: Clock) -> None:
        super().__init__()
        self.layers, self.name, self.cost, self.clock = layers, name, cost, clock
        self.config = SimpleNamespace(image_size=SIZE)

    def encode(self, images: Tensor) -> Tensor:
        assert images.shape == (BATCH, 3, SIZE, SIZE) and not self.training
        self.clock.spend(f"encode {self.name}", 2 * self.cost)
        return torch.zeros(len(images), self.num_tokens, dtype=torch.long)

    def decode(self, ids: Tensor, steps: int) -> None:
        assert ids.shape == (BATCH, 3) and int(ids.min()) >= 0 and int(ids.max()) < 7
        self.clock.spend(f"decode {self.name}", steps * self.cost)


class ToyModule(ReconstructionModule):
    """A module whose training loss is any function of its layers and the flat pictures `[B, 192]`."""

    def __init__(
        self, layers: nn.Module, loss: Loss, *, name: str = "toy", cost: float = 1.0,
        modes: dict[str, Any] | None = None, stages: dict[str, tuple[float, float]] | None = None,
        clock: Clock | None = None,
    ) -> None:  # fmt: skip
        super().__init__(OptimizerConfig(), seed=0)
        self.clock = clock or Clock()
        self.model: Any = ToyModel(layers, name, cost, self.clock)
        self.decode_modes = modes or {"one": {"steps": 1}}
        self.loss, self.stages, self.cost = loss, stages or {"all": (0.0, 1.0)}, cost

    def training_stages(self) -> dict[str, tuple[float, float]]:
        return self.stages

    def training_losses(
        self, images: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        assert self.model.training
        self.clock.spend(f"step at {progress:g}", self.cost * (1 + 8 * progress))
        return {"loss": self.loss(self.model.layers, images.flatten(1))}


PIXELS = 3 * SIZE * SIZE


def linear_loss(layers: nn.Module, x: Tensor) -> Tensor:
    return layers(x).square().mean()


def linear_toy(width: int = 16, **options: Any) -> ToyModule:
    return ToyModule(nn.Sequential(nn.Linear(PIXELS, width), nn.Linear(width, 5)), linear_loss, **options)


def measure(modules: dict[str, ReconstructionModule], rounds: int = 1, warmup: int = 0) -> dict[str, Any]:
    """On one thread: threads that wait for a busy machine's cores are slow."""
    return measure_overhead(modules, BATCH, rounds=rounds, warmup=warmup, threads=1)


def real_modules() -> dict[str, ReconstructionModule]:
    plain = VQAutoencoderConfig(
        image_size=16, codec=CodecConfig(patch_size=4), encoder=ResamplerConfig(width=16, depth=1, token_grid=[4, 2]),
        codebook_size=32, code_dim=8, width=16, heads=2, depth=2,
    )  # fmt: skip
    velocity = VelocityConfig(width=16, depth=1, heads=2, fine_width=8, alone=0.25)
    return {
        "VQ": VQAutoencoderModule(plain),
        "V2Flow": TokenizerModule(small_config(velocity=velocity)),
        "together": TokenizerModule(small_config()),
    }


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, Any], dict[str, Any]]:
    """The real modules' overhead, and their state before and after."""
    torch.manual_seed(7)
    modules = real_modules()
    modules["VQ"].model.quantizer.eval()
    before = state(modules)
    rows = measure(modules, rounds=3, warmup=1)
    return rows, {"before": before, "after": state(modules)}


def state(modules: dict[str, ReconstructionModule]) -> dict[str, Any]:
    return {
        "random": torch.get_rng_state(),
        "threads": torch.get_num_threads(),
        "weights": {
            f"{name}.{key}": value.clone()
            for name, module in modules.items()
            for key, value in [*module.named_parameters(), *module.named_buffers()]
        },
        "modes": [part.training for module in modules.values() for part in module.modules()],
        "grads": [p.grad is None for module in modules.values() for p in module.parameters()],
    }


# --- the real modules -------------------------------------------------------------------------------------------


def test_rows_are_plain_values_for_every_stage_and_mode(measured: Any) -> None:
    rows = measured[0]
    assert list(rows) == ["VQ", "V2Flow", "together"]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert {name: list(row["stages"]) for name, row in rows.items()} == {
        "VQ": ["all"], "V2Flow": ["tokens", "field"], "together": ["all"]
    }  # fmt: skip
    assert [s["share"] for s in rows["V2Flow"]["stages"].values()] == [0.75, 0.25]
    assert list(rows["V2Flow"]["decode_images_per_second"]) == ["one_step", "sampled"]
    for row in rows.values():
        assert (row["reference"], row["device"], row["threads"], row["rounds"]) == ("VQ", "cpu", 1, 3)
        spreads = [row["step_seconds"], row["encode_images_per_second"], row["step_time_ratio"]]
        spreads += [row["encode_speed_ratio"], *row["decode_images_per_second"].values()]
        spreads += [*row["decode_speed_ratio"].values(), *(s["step_seconds"] for s in row["stages"].values())]
        for spread in spreads:
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        for stage in row["stages"].values():
            assert stage["step_flops"] > 0 and stage["peak_memory_bytes"] > 4 * 4 * row["parameters"]


def test_parameters_and_stages_are_those_of_the_models(measured: Any) -> None:
    rows, modules = measured[0], real_modules()
    for name, module in modules.items():
        trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
        assert rows[name]["parameters"] == trainable < rows[name]["parameters_total"]
        assert rows[name]["parameters_ratio"] == trainable / rows["VQ"]["parameters"]
    stages = rows["V2Flow"]["stages"]
    tokens, field = (stages[name]["step_flops"] for name in ("tokens", "field"))
    assert rows["V2Flow"]["step_flops"] == pytest.approx(0.75 * tokens + 0.25 * field)
    # Neither kind of step does all that a step of everything together does.
    assert max(tokens, field) < rows["together"]["step_flops"]


def test_the_reference_is_exactly_one(measured: Any) -> None:
    row = measured[0]["VQ"]
    one = {"median": 1.0, "low": 1.0, "high": 1.0}
    assert row["parameters_ratio"] == row["step_flops_ratio"] == row["peak_memory_ratio"] == 1.0
    assert row["step_time_ratio"] == row["encode_speed_ratio"] == one
    assert row["decode_speed_ratio"] == {"one_step": one}


def test_modules_and_random_state_are_left_as_they_were(measured: Any) -> None:
    before, after = measured[1]["before"], measured[1]["after"]
    assert torch.equal(before["random"], after["random"])
    assert before["threads"] == after["threads"] and before["modes"] == after["modes"]
    assert all(before["grads"]) and all(after["grads"])
    assert False in before["modes"] and before["weights"].keys() == after["weights"].keys()
    assert all(torch.equal(value, after["weights"][name]) for name, value in before["weights"].items())


def test_flops_and_memory_repeat_themselves(measured: Any) -> None:
    again = measure(real_modules(), rounds=3)
    for name, row in measured[0].items():
        for key in ("step_flops", "peak_memory_bytes"):
            assert again[name][key] == row[key]


# --- counts by hand ---------------------------------------------------------------------------------------------


def test_flops_of_linear_layers_are_those_counted_by_hand() -> None:
    row = measure({"toy": linear_toy(width=16)})["toy"]
    first, second = 2 * BATCH * PIXELS * 16, 2 * BATCH * 16 * 5
    # Forward, the gradient of the weights, and that of the input where it has one.
    assert row["step_flops"] == 2 * first + 3 * second
    assert row["parameters"] == PIXELS * 16 + 16 + 16 * 5 + 5


def test_attention_is_counted_on_the_cpu_too() -> None:
    def attend(layers: Any, x: Tensor) -> Tensor:
        q = x.view(BATCH, 2, 24, 4) * layers.weight
        return F.scaled_dot_product_attention(q, q, q).mean()

    layers = nn.Linear(1, 1, bias=False)
    row = measure({"toy": ToyModule(layers, attend)})["toy"]
    assert row["step_flops"] == 3 * 2 * (2 * BATCH * 2 * 24 * 24 * 4)


def test_peak_of_tensors_of_known_size() -> None:
    def action() -> None:
        a = torch.zeros(1_000_000)
        b = a.double()
        del a
        c = torch.zeros(500_000)
        del b, c

    assert peak_rise(action, torch.device("cpu")) == pytest.approx(12e6, rel=0.01)


def test_peak_memory_is_what_is_kept_for_backward_and_what_stays() -> None:
    """At the start of backward: everything saved and the first gradient, beside weights and Adam's two means."""
    side, repeats = 400, 200

    def chain(layers: Any, x: Tensor) -> Tensor:
        h = x.repeat(1, repeats) * (layers.weight[:1] @ layers.weight[:, :1]).squeeze()
        for _ in range(4):
            h = h.tanh()
        return h.sum()

    toy = ToyModule(nn.Linear(side, side, bias=False), chain)
    row = measure({"toy": toy}, rounds=2)["toy"]
    activation, weights = 4 * BATCH * PIXELS * repeats, 4 * side * side
    # Saved are the repeated pictures and four results of tanh; then the last tanh's gradient is made.
    assert row["peak_memory_bytes"] == pytest.approx(6 * activation + 3 * weights, rel=0.01)


def test_peak_memory_of_wide_layers_is_what_the_optimiser_holds() -> None:
    """Weights, gradients and Adam's two means: a fused step needs no more."""
    toy = ToyModule(nn.Linear(PIXELS, 2000, bias=False), linear_loss)
    row = measure({"toy": toy})["toy"]
    assert row["peak_memory_bytes"] == pytest.approx(4 * 4 * PIXELS * 2000, rel=0.03)


# --- times ------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(subject, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_times_are_those_of_the_clock(clock: Clock) -> None:
    stages = {"tokens": (0.0, 0.75), "field": (0.75, 1.0)}
    modules = {
        "plain": linear_toy(clock=clock, name="plain", cost=1.0, modes={"one": {"steps": 1}}),
        "staged": linear_toy(
            clock=clock, name="staged", cost=2.0, modes={"ten": {"steps": 10}, "one": {"steps": 1}}, stages=stages
        ),
    }  # fmt: skip
    rows = measure(modules, rounds=3, warmup=1)
    plain, staged = rows["plain"], rows["staged"]
    assert plain["step_seconds"] == {"median": 5.0, "low": 5.0, "high": 5.0}
    # In the middle of each stage, at 0.375 and 0.875: 2·(1 + 8·progress) seconds.
    assert [s["step_seconds"]["median"] for s in staged["stages"].values()] == [8.0, 16.0]
    assert staged["step_seconds"]["median"] == 0.75 * 8 + 0.25 * 16 == 10.0
    assert staged["step_time_ratio"]["median"] == 2.0
    assert plain["encode_images_per_second"]["median"] == BATCH / 2
    assert staged["encode_speed_ratio"]["median"] == 0.5
    assert staged["decode_images_per_second"]["ten"]["median"] == BATCH / 20
    assert {mode: ratio["median"] for mode, ratio in staged["decode_speed_ratio"].items()} == {
        "ten": 1 / 20, "one": 1 / 2
    }  # fmt: skip


def test_rounds_go_through_the_rows_forwards_and_backwards(clock: Clock) -> None:
    modules = {name: linear_toy(clock=clock, name=name) for name in ("a", "b", "c")}
    measure(modules, rounds=2, warmup=1)
    order = "".join(call[-1] for call in clock.calls if call.startswith("encode"))
    assert order == "cba" + "abc" + "cba"


def test_ratios_are_taken_within_a_round(clock: Clock) -> None:
    """A machine that is ten times slower in one round of three changes no ratio."""

    class Slowing(Clock):
        def spend(self, what: str, seconds: float) -> None:
            rounds = sum(call.startswith("encode") for call in clock.calls) // 2
            clock.spend(what, seconds * (10.0 if rounds == 1 else 1.0))

    modules = {name: linear_toy(clock=Slowing(), name=name, cost=cost) for name, cost in (("a", 1), ("b", 3))}
    row = measure(modules, rounds=3)["b"]
    assert row["step_time_ratio"] == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert row["step_seconds"] == {"median": 15.0, "low": 15.0, "high": 82.5}


def test_the_spread_is_the_median_with_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_minutes_become_steps_of_the_mean_step(clock: Clock) -> None:
    stages = {"tokens": (0.0, 0.5), "field": (0.5, 1.0)}
    row = measure({"toy": linear_toy(clock=clock, stages=stages)})["toy"]
    assert row["step_seconds"]["median"] == (3 + 7) / 2
    assert steps_for_minutes(row, 10) == 120
    assert steps_for_minutes(row, 10.9) == 130
    assert steps_for_minutes(row, 10.9, multiple=7) == 126
    with pytest.raises(V2FlowError, match=r"minutes: expected time for at least 10 steps of 5 s, found 0.5"):
        steps_for_minutes(row, 0.5)


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "option rounds: expected at least 1, found 0"),
        ({"warmup": -1}, "option warmup"),
        ({"threads": 0}, "option threads"),
        ({"batch_size": 0}, "option batch_size"),
        ({"device": "meta"}, "option device: expected cpu or cuda, found meta"),
        ({"modules": {}}, "option modules: expected at least one row"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(V2FlowError, match=message):
        measure_overhead(**({"modules": {"toy": linear_toy()}, "batch_size": BATCH} | options))
