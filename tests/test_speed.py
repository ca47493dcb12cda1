"""benchmarks/speed.py: its arithmetic under a clock of our own, the literal step, and a smoke run."""

import copy
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_toys import pictures, small_config
from torch import Tensor, nn

from v2flow.benchmark import subject
from v2flow.benchmark.subject import count_flops
from v2flow.config import to_dict
from v2flow.errors import V2FlowError
from v2flow.flow import draw_timesteps
from v2flow.masked_decoder import draw_mask
from v2flow.planning import rates
from v2flow.probes.frontier import LITERAL
from v2flow.tokenizer import V2FlowTokenizer
from v2flow.training.module import seeded_generator
from v2flow.training.tokenizer_module import TokenizerModule
from v2flow.vocabulary_logits import GumbelNoise

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import speed
import vocabulary_attention
from speed_parts import hooks, operators, reference, reference_worker, report, scaling, vocabulary
from speed_parts.literal import Draws, draw_all, literal_loss, reference_recipe
from speed_parts.options import CPU
from speed_parts.turns import PRODUCT_FLOPS, take_turns

BATCH, POSITIONS, CHANNELS = 3, 16, 48


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for a busy machine's cores are slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- arithmetic -------------------------------------------------------------------------------------------------


class Clock:
    """Half a second passes between any two looks at it, and what the toys spend."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.5
        return self.now


def test_rates_ratios_and_shares_under_a_fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    for module in (subject, rates):
        monkeypatch.setattr(module, "time", clock)
    calls: list[str] = []

    def spend(name: str, seconds: float) -> None:
        calls.append(name)
        clock.now += seconds

    ways = {"a": lambda draw: spend("a", 1.5 + 2 * draw), "b": lambda draw: spend("b", 0.5)}
    turns = take_turns(ways, rounds=3, prepare={"b": lambda: spend("before b", 100.0)})
    assert [name for name in calls if name != "before b"] == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert all(calls[i + 1] == "b" for i, name in enumerate(calls) if name == "before b")
    assert calls.count("before b") == 4, "not timed"
    # a takes 2, 4, 6 s, b 1 s, and a matrix product half a second
    assert turns.seconds["a"] == [2.0, 4.0, 6.0]
    assert turns.ratio("a", "b") == {"median": 4.0, "low": 3.0, "high": 5.0}
    assert turns.products()["median"] == PRODUCT_FLOPS / 0.5 == 2 * 2 * rates.SIDE**3
    row = turns.row("a", flops=PRODUCT_FLOPS)
    assert row["seconds"] == {"median": 4.0, "low": 3.0, "high": 5.0}
    assert row["flops_per_second"]["median"] == PRODUCT_FLOPS / 4
    assert row["of_products"]["median"] == 0.125, "half a second's work in four"


def test_hooks_shares_under_a_fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(hooks, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    found = hooks.hook_costs(TokenizerModule(small_config()), pictures(2), steps=3)
    # A step is one look at the clock and two for each of six hooks of three callbacks.
    assert found["step_seconds"]["median"] == 37
    assert {name: cost["share"]["median"] for name, cost in found["callbacks"].items()} == {
        "HealthCallback": 6 / 37, "EMACallback": 6 / 37, "RunProgressBar": 6 / 37
    }  # fmt: skip
    ema = found["callbacks"]["EMACallback"]["device_reads"]
    assert ema["ema.py:_average"] == 1 and sum(ema.values()) == 3, "its own and two of AveragedModel's"
    assert found["callbacks"]["HealthCallback"]["device_reads"] == {"health.py:_on_every_rank": 1}
    assert found["callbacks"]["RunProgressBar"]["device_reads"] == {}


def test_exponents_are_those_of_powers() -> None:
    x = [1, 2, 4, 16]
    found = scaling.exponent(x, [3 * value**1.7 for value in x])
    assert found["exponent"] == pytest.approx(1.7) and found["last"] == pytest.approx(1.7)
    assert found["r2"] == pytest.approx(1.0)
    bent = scaling.exponent([1, 2, 4], [1, 1, 4])  # by hand: slope of (0, 0), (1, 0), (2, 2) in log2
    assert bent["exponent"] == pytest.approx(1.0) and bent["last"] == pytest.approx(2.0)
    assert bent["r2"] == pytest.approx(0.75)


def test_useful_flops_are_those_of_the_whole_matrix() -> None:
    tokens, entries, width, keys = 512, 2048, 8, 4
    shapes = ((2, 256, keys), (entries, keys), (entries, width), (2, 256, width))
    q, k, e, up = (torch.randn(*shape) for shape in shapes)
    useful = vocabulary.useful_flops(tokens, entries, width, keys)

    def counted(budget: float) -> int:
        return count_flops(lambda: vocabulary_attention.attend(q, k, e, up, noise=0.0, budget=budget))

    assert counted(1e9) == useful
    again = 2 * tokens * entries * keys  # tiles compute their logits once more for the gradients
    assert counted(1.0) == pytest.approx(useful + again, rel=1e-3), "products in place count as well"


# --- the literal step -------------------------------------------------------------------------------------------


def recipe() -> V2FlowTokenizer:
    """A tokenizer of the reference's recipe whose field is not zero."""
    torch.manual_seed(1)
    model = V2FlowTokenizer(reference_recipe(small_config())).train()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(0, 0.3)
    return model


def replayed(model: V2FlowTokenizer, latents: Tensor, g: torch.Generator) -> Draws:
    """The package's draws of a step, and others at positions that it does not draw for."""
    config = model.config
    noise = GumbelNoise.draw(1.0, g)
    gumbel = noise.add_to(torch.zeros(BATCH * model.num_tokens, len(model.resampler.table)))
    mask, _ = draw_mask(BATCH, POSITIONS, config.decoder, g, CPU)
    null = torch.rand(BATCH, generator=g) < config.decoder.null_probability
    masked = int(mask[0].sum())
    assert masked < POSITIONS, "some positions are visible: choose another seed"
    index = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :masked]
    times, everywhere = [], []
    for _ in range(config.velocity.draws):
        t = draw_timesteps((BATCH, masked), config.velocity, g, CPU)
        eps = torch.randn(BATCH, masked, CHANNELS, generator=g)
        times.append(torch.full((BATCH, POSITIONS), 0.5).scatter(1, index, t))
        places = index[..., None].expand_as(eps)
        everywhere.append(torch.randn(BATCH, POSITIONS, CHANNELS).scatter(1, places, eps))
    gumbel = gumbel.view(BATCH, model.num_tokens, -1)
    return Draws(gumbel, mask, null, torch.cat(times), torch.cat(everywhere))


@pytest.mark.parametrize("seed", [0, 2])
def test_the_literal_step_has_the_packages_loss_and_gradients(seed: int) -> None:
    model = recipe()
    other = copy.deepcopy(model)
    latents = model.codec.encode(pictures(BATCH))
    losses = model.latent_losses(latents, 0.5, seeded_generator(CPU, seed))
    losses.total.backward()
    literal = literal_loss(other, latents, replayed(other, latents, seeded_generator(CPU, seed)))
    literal.backward()
    torch.testing.assert_close(literal, losses.total, rtol=1e-5, atol=1e-6)
    for (name, ours), its in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (ours.grad is None) == (its.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(its.grad, ours.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert torch.equal(model.visual_vocabulary.counts, other.visual_vocabulary.counts)


def test_the_literal_steps_own_draws_are_at_every_position() -> None:
    model = recipe()
    draws = draw_all(model, model.codec.encode(pictures(BATCH)), seeded_generator(CPU, 0))
    assert draws.gumbel.shape == (BATCH, 8, 60) and draws.noise.shape == (4 * BATCH, POSITIONS, CHANNELS)
    assert draws.times.shape == (4 * BATCH, POSITIONS) and draws.mask.shape == (BATCH, POSITIONS)
    assert abs(float(draws.gumbel.mean()) - 0.5772) < 0.1 and abs(float(draws.gumbel.std()) - 1.283) < 0.1
    assert literal_loss(model, model.codec.encode(pictures(BATCH)), draws).isfinite()


# --- classes of operations --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::convolution_backward", "convolutions"),
        ("aten::native_layer_norm_backward", "normalisation"),
        ("aten::_softmax_backward_data", "pointwise and reductions"),
        ("aten::gelu_backward", "pointwise and reductions"),
        ("aten::add_", "pointwise and reductions"),
        ("aten::exponential_", "random numbers"),
        ("aten::copy_", "data movement"),
        ("aten::_foreach_add_", "pointwise and reductions"),
        ("autograd::engine::evaluate_function: MmBackward0", "other"),
    ],
)
def test_operators_have_their_class(name: str, kind: str) -> None:
    assert operators.class_of(name) == kind


def test_shares_are_of_what_ran() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 14 * 14, 4))
    optimizer = torch.optim.AdamW(layers.parameters())

    def step() -> None:
        layers(torch.ones(2, 3, 16, 16)).square().mean().backward()
        optimizer.step()

    shares = operators.operator_shares(step)
    assert sum(shares.values()) == pytest.approx(1.0)
    for kind in ("convolutions", "matrix products", operators.OPTIMISER, operators.OUTSIDE):
        assert shares[kind] > 0, kind
    assert shares["attention"] == shares["normalisation"] == 0
    forward = operators.operator_shares(lambda: layers(torch.ones(2, 3, 16, 16)))
    assert forward[operators.OPTIMISER] == 0


def test_reads_of_the_device_are_counted_where_they_are() -> None:
    with operators.DeviceReads() as reads:
        assert float(torch.ones(())) + torch.ones(2).sum().item() == 3
        draw_mask(2, 4, small_config().decoder, seeded_generator(CPU, 0), CPU)
    assert reads.count >= 2 and reads.where["elsewhere"] == 2


# --- the paper's size -------------------------------------------------------------------------------------------


def test_another_form_shares_the_weights() -> None:
    model = recipe().eval()
    other = reference_worker._with_weights_of(model, model.config)
    ids = torch.arange(16).view(2, 8)
    options: dict[str, Any] = {"steps": 2, "iterations": 2, "guidance": 2.0}
    pairs = [m.decode(ids, seeded_generator(CPU, 0), **options) for m in (model, other)]
    assert torch.equal(*pairs) and pairs[0].std() > 0
    shared = zip(model.parameters(), other.parameters(), strict=True)
    assert all(a is b for a, b in shared)


def test_flops_of_many_steps_are_extrapolated_exactly() -> None:
    model = recipe().eval()
    ids = torch.arange(8)[None]

    def run(**changes: Any) -> None:
        model.decode(ids, seeded_generator(CPU, 0), **{**LITERAL, "steps": 5, **changes})

    assert reference_worker._decode_flops(run, {**LITERAL, "steps": 5}) == count_flops(run) > 0


def test_what_does_not_fit_is_refused_by_its_own_process() -> None:
    config = small_config()
    config.decoder.width = 16384  # a projection of 3 GB
    job = {"job": "train", "tokenizer": to_dict(config), "memory_gb": 2.0, "rounds": 1, "steps": 1}
    found = reference._run(job)
    assert found["error"].startswith("does not fit into 2 GB: ") and found["peak_rss_bytes"] < 2 * 2**30


# --- the script -------------------------------------------------------------------------------------------------


def same(a: float, b: float) -> bool:
    return a == pytest.approx(b, rel=1e-9)


def check_row(row: dict[str, Any], products: float) -> None:
    """Of one round: rates are FLOPs over seconds, and shares are rates over that of matrix products."""
    assert row["flops"] > 0 and row["seconds"]["median"] > 0
    rate = row["flops"] / row["seconds"]["median"]
    assert same(row["flops_per_second"]["median"], rate)
    assert same(row["of_products"]["median"], rate / products)


def check_parts(parts: dict[str, Any]) -> None:
    step, data, paper = parts["step"], parts["data"], parts["reference"]
    for part in (step, data):
        for row in part["rows"].values():
            check_row(row, part["products_flops_per_second"]["median"])
    seconds = [row["seconds"]["median"] for row in step["rows"].values()]
    assert same(step["literal_to_shipped"]["median"], seconds[2] / seconds[0])
    assert same(step["literal_to_recipe"]["median"], seconds[2] / seconds[1])
    for row in step["rows"].values():
        assert same(sum(row["shares"].values()), 1.0) and row["peak_memory_bytes"] > 16 * row["parameters"]
    literal, ours = (step["rows"][n] for n in ("reference's recipe, literal", "reference's recipe"))
    assert literal["flops"] > ours["flops"] and literal["parameters"] == ours["parameters"]
    shards, cached = (row["seconds"]["median"] for row in data["rows"].values())
    assert same(data["shards_to_cached"]["median"], shards / cached) and data["workers"] == 1
    # Batches of four: the one in memory; in warm-up and round four that the worker had ready, and two trained on.
    assert data["epochs"] == (1 + 2 * (4 + 2)) / 4
    check_row(paper["train"], paper["train"]["products_flops_per_second"]["median"])
    assert paper["train"]["optimizer"] == "AdamW"
    assert (
        paper["train"]["peak_rss_bytes"]
        > paper["train"]["resident_bytes"]
        > 16 * paper["train"]["parameters"]
    )
    rows = paper["decode"]["rows"]
    assert list(rows)[:3] == ["literal", "package", "package, reusing form"] and "fast" in rows
    for row in rows.values():
        assert same(
            row["to_literal"]["median"], row["seconds"]["median"] / rows["literal"]["seconds"]["median"]
        )
    assert paper["decode"]["largest_difference"] < 1e-4
    for row in parts["vocabulary"]["rows"]:
        rate = row["products_flops_per_second"]
        assert same(row["tiles"]["of_products"], row["flops"] / row["tiles"]["seconds"] / rate)
    for found in parts["scaling"]["axes"].values():
        points = found["points"]
        assert len(points) >= 4 and points[0]["step_flops"] < points[-1]["step_flops"]
        fit = scaling.exponent([p["value"] for p in points], [p["step_bytes"] for p in points])
        assert found["exponents"]["step_bytes"] == fit
        for p in points:
            rate = found["products_flops_per_second"]
            assert same(p["of_products"], p["step_flops"] / p["step_seconds"]["median"] / rate)
            decoding = p["decode_flops"] / p["decode_seconds"]["median"]
            assert same(p["decode_of_products"], decoding / rate)
            assert p["decode_seconds"]["low"] <= p["decode_seconds"]["median"] <= p["decode_seconds"]["high"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_smoke_run_of_all_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "speed.json"
    words = ["--smoke", "--rounds", "1", "--out", str(out), "--report"]
    assert speed.main(words) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(out.read_text()) and list(document["parts"]) == list(speed.PARTS)
    for part in document["parts"].values():
        assert part["setting"]["smoke"] and part["command"][2:] == words and part["machine"]["torch"]
    check_parts(document["parts"])
    text = (tmp_path / "README.md").read_text()
    assert all(f"## {title}" in text for title, _ in report.SECTIONS.values()) and "say nothing" in text
    for name in ("scaling-time.svg", "scaling-memory.svg"):
        assert f"]({name})" in text and "\\](" not in text
        assert "exponent" in "".join(ElementTree.parse(tmp_path / name).getroot().itertext())

    monkeypatch.setattr(speed, "PARTS", dict.fromkeys(speed.PARTS, lambda _: pytest.fail("measured again")))
    assert speed.main(words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == document
    assert speed.main([*words, "--rounds", "2"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "part step: expected rounds=2, found a measurement with 1; use --again" in error
    monkeypatch.setitem(speed.PARTS, "data", lambda options: {"rounds": options.rounds})
    assert speed.main([*words[:-1], "--rounds", "2", "--parts", "data", "--again"]) == 0
    parts = json.loads(out.read_text())["parts"]
    assert parts["data"]["rounds"] == 2 and parts["step"] == document["parts"]["step"]


def test_goals_are_reached_or_not() -> None:
    step = {
        "rows": {"shipped": {"of_products": {"median": 0.46}}}, "literal_to_shipped": {"median": 1.4},
        "literal_to_recipe": {"median": 1.5},
    }  # fmt: skip
    data = {"shards_to_cached": {"median": 1.06}}
    size = {"entries": 9, "dim": 640, "key_dim": 640, "tiles_to_matrix": {"seconds": 1.3, "extra_bytes": 0.2}}
    rows = report.goals(
        {"step": step, "data": data, "vocabulary": {"rows": [size, {**size, "key_dim": 512}]}}
    )
    assert [row[-1] for row in rows] == ["yes", "no", "yes", "no", "no", "yes", "no", "no"]
    step["rows"]["shipped"]["of_products"]["median"] = 0.44
    assert report.goals({"step": step})[0][1:] == ["≥ 0.45", "0.44", "no"]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "other.json"
    out.write_text('{"parts": [1]}')
    for words, message in (
        (["--rounds", "0"], "option --rounds: expected at least 1, found 0"),
        ([], "expected a document of this script"),
    ):
        assert speed.main(["--smoke", "--out", str(out), *words]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error


def test_another_files_parts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"parts": {"step": {}}}')
    with pytest.raises(V2FlowError, match="expected parts with their settings"):
        speed.read_document(tmp_path / "a.json")
