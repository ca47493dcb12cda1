"""Planning: FLOPs and memory of a step against real steps and hand counts, and what strategies make of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core_toys import small_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from v2flow.baselines.module import VQAutoencoderModule
from v2flow.baselines.vq_autoencoder import VQAutoencoderConfig
from v2flow.benchmark.subject import Subject, peak_rise
from v2flow.config import CodecConfig, DecoderConfig, ResamplerConfig, VelocityConfig, VocabularyConfig
from v2flow.errors import V2FlowError
from v2flow.planning.estimate import LAUNCH_SECONDS, step_seconds, with_communication
from v2flow.planning.hardware import DEVICES, find_hardware, override, this_cpu
from v2flow.planning.language_models import language_model_config, vocabulary_shape
from v2flow.planning.ledger import Ledger
from v2flow.planning.memory import (
    Sizes,
    Traffic,
    ddp_memory,
    ddp_traffic,
    fsdp_memory,
    fsdp_traffic,
    sizes_of,
)
from v2flow.planning.parts import parameters_by_part
from v2flow.planning.step import ADAMW_PASSES, StepCost, step_costs, trained_bytes
from v2flow.planning.training import Training, tokenizer_training
from v2flow.planning.without_weights import make_fake
from v2flow.training.module import ReconstructionModule
from v2flow.training.tokenizer_module import TokenizerModule

CPU = torch.device("cpu")
BATCH = 32


def staged_module() -> TokenizerModule:
    velocity = VelocityConfig(width=32, depth=1, heads=2, fine_width=8, alone=0.25, draws=2)
    decoder = DecoderConfig(width=32, heads=2, encoder_depth=1, decoder_depth=1, full_mask_share=0.0)
    return TokenizerModule(small_config(velocity=velocity, decoder=decoder))


def baseline_module() -> VQAutoencoderModule:
    encoder = ResamplerConfig(width=16, depth=1, token_grid=[4, 2])
    config = VQAutoencoderConfig(
        image_size=16, codec=CodecConfig(patch_size=4), encoder=encoder, codebook_size=32, code_dim=8, width=32,
        heads=2, depth=2,
    )  # fmt: skip
    return VQAutoencoderModule(config)


def toy_training(layers: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], width: int) -> Training:
    """Of any layers, on batches `[B, width]` of ones."""
    mode = FakeTensorMode()
    make_fake(layers, mode)

    def on_ones(stage: str, batch_size: int, draw: int) -> Tensor:
        return loss(layers, torch.ones(batch_size, width))

    return Training(layers, mode, {"all": (0.0, 1.0)}, on_ones, blocks=[])


def plain_loss(layers: nn.Module, x: Tensor) -> Tensor:
    return layers(x).square().mean()


# --- one step ---------------------------------------------------------------------------------------------------


def test_flops_of_linear_layers_are_those_counted_by_hand() -> None:
    training = toy_training(nn.Sequential(nn.Linear(192, 16), nn.Linear(16, 5)), plain_loss, 192)
    cost = step_costs(training, BATCH, bf16=False)["all"]
    first, second = 2 * BATCH * 192 * 16, 2 * BATCH * 16 * 5
    # Forward, the gradient of the weights, and that of the input where it has one.
    assert cost.flops == 2 * first + 3 * second
    assert cost.backward == pytest.approx((first + 2 * second) / cost.flops)
    assert trained_bytes(training.model) == 4 * (192 * 16 + 16 + 16 * 5 + 5)


def test_products_in_place_and_attention_count() -> None:
    a, b, q = torch.ones(8, 4), torch.ones(4, 6), torch.ones(2, 3, 10, 8, requires_grad=True)
    with Ledger() as ledger:
        torch.zeros(8, 6).addmm_(a, b)
    assert ledger.flops == 2 * 8 * 4 * 6
    with Ledger() as ledger:
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert ledger.flops == 3 * 2 * (2 * 2 * 3 * 10 * 10 * 8)


def test_traffic_is_what_operators_read_and_write() -> None:
    x, y = torch.ones(1000), torch.ones(1000)
    with Ledger() as ledger:
        (x + y).view(10, 100).t()
    assert (ledger.traffic, ledger.operators) == (3 * 4000, 1)


def test_adamw_moves_as_many_bytes_as_a_plan_counts() -> None:
    layer = nn.Linear(500, 400, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    with Ledger() as ledger:
        optimizer.step()
    assert ledger.traffic == pytest.approx(ADAMW_PASSES * 4 * 500 * 400, rel=0.15)


@pytest.mark.parametrize("make", [staged_module, baseline_module])
def test_a_step_on_fake_tensors_costs_what_a_real_one_does(make: Callable[[], ReconstructionModule]) -> None:
    """FLOPs to the last one, masks drawn alike; peak memory within 25 %."""
    torch.manual_seed(0)
    subject = Subject(make(), BATCH, CPU)
    for stage in subject.stages:  # the optimiser's state of all of them is there at the end of a training
        subject.step(stage, 0)
    training = tokenizer_training(make())
    costs = step_costs(training, BATCH, bf16=False)
    sizes = sizes_of(training, ema=False)
    assert list(costs) == list(subject.stages)
    for stage, cost in costs.items():
        assert cost.flops == subject.flops(stage, 0)
        estimated = ddp_memory(sizes, cost.activations, devices=1).total
        assert estimated == pytest.approx(subject.peak_memory(stage, 1), rel=0.25)
        assert cost.activations > 3 * trained_bytes(training.model), "not a matter of weights alone"


def test_saved_activations_are_those_that_autograd_saves() -> None:
    """Alive at the end of forward is what hooks on saved tensors see, each storage once, without parameters."""
    layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64), nn.Tanh())
    seen: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in layers.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = plain_loss(layers, torch.ones(BATCH, 64))
    saved = sum(seen.values()) + loss.nbytes
    cost = step_costs(toy_training(layers, plain_loss, 64), BATCH, bf16=False)["all"]
    assert cost.saved == saved


def test_recomputation_saves_memory_for_flops() -> None:
    layers = nn.Sequential(
        *(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(6))
    )

    def again(layers: Any, x: Tensor) -> Tensor:
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x.square().mean()

    real = peak_rise(lambda: again(layers, torch.ones(512, 64)).backward(), CPU)
    plain, recomputed = (
        step_costs(toy_training(layers, loss, 64), 512, bf16=False)["all"] for loss in (plain_loss, again)
    )
    # Of each layer the first product runs again: what follows it, backward does not need.
    assert recomputed.flops == plain.flops + 6 * 2 * 512 * 64 * 256
    assert recomputed.activations < 0.5 * plain.activations
    assert recomputed.activations + trained_bytes(layers) == pytest.approx(real, rel=0.25)


def test_autocast_halves_what_products_save() -> None:
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    full, half = (
        step_costs(toy_training(layers, plain_loss, 64), 4096, bf16=bf16)["all"] for bf16 in (False, True)
    )
    assert half.saved == pytest.approx(full.saved / 2, rel=0.15)
    assert half.flops == full.flops


def test_a_plan_leaves_the_random_state_alone_and_repeats_itself() -> None:
    training = tokenizer_training(staged_module())
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (step_costs(training, 4, bf16=False) for _ in range(2))
    assert first == second
    assert torch.equal(before, torch.get_rng_state())


def test_a_step_that_needs_data_is_refused() -> None:
    training = toy_training(nn.Linear(8, 8), lambda layers, x: layers(x)[layers(x) > 0].sum(), 8)
    with pytest.raises(V2FlowError, match="stage all: expected a step whose shapes need no data"):
        step_costs(training, 4, bf16=False)


def test_parts_add_up() -> None:
    module = staged_module()
    parts = parameters_by_part(module.model)
    assert sum(part["trained"] for part in parts.values()) == sum(p.numel() for p in module.parameters())
    assert sum(part["buffers"] for part in parts.values()) == sum(b.numel() for b in module.buffers())
    assert {"resampler", "decoder", "head.field", "head.mean", "visual_vocabulary"} <= set(parts)


# --- strategies -------------------------------------------------------------------------------------------------


SIZES = Sizes(trained=800, whole=100, frozen=80, buffers=50, averaged=810, block=200, root=40, reduced=10)


def test_ddp_keeps_a_whole_copy_everywhere() -> None:
    alone, many = (ddp_memory(SIZES, 1000, devices) for devices in (1, 8))
    # Weights, gradients, two means, average, frozen, activations.
    assert alone.total == 880 + 800 + 1600 + 810 + 150 + 1000
    assert many.total == alone.total + 800, "the buckets"


def test_fsdp_shares_out_what_is_not_kept_whole() -> None:
    found = fsdp_memory(SIZES, 1000, 8)
    assert found.total == (880 + 800 + 1600 + 810) / 8 + 150 + 3 * 200 + 2 * 40 + 1000
    assert fsdp_memory(SIZES, 1000, 1).total == ddp_memory(SIZES, 1000, 1).total


def test_bytes_on_the_links() -> None:
    assert ddp_traffic(SIZES, 4, False) == Traffic(behind=1.5 * 800, before=50 + 1.5 * 10)
    assert ddp_traffic(SIZES, 4, True) == Traffic(behind=1.5 * 800, before=1.5 * 10)
    assert fsdp_traffic(SIZES, 4) == Traffic(behind=0.75 * (2 * 880 + 800), before=1.5 * 10)
    assert ddp_traffic(SIZES, 1, False) == fsdp_traffic(SIZES, 1) == Traffic(0, 0)


def test_sizes_are_those_of_the_module() -> None:
    module = staged_module()
    trained = 4 * sum(p.numel() for p in module.parameters())
    state = sum(4 * x.numel() for x in module.state_dict().values())
    sizes = sizes_of(tokenizer_training(staged_module()), ema=True)
    assert (sizes.trained, sizes.whole, sizes.frozen) == (trained, 0, 0)
    assert sizes.averaged == state, "codebooks are copied, tables shared"
    assert sizes.buffers > sizes.averaged - sizes.trained
    assert sizes.reduced == 4 * (32 * 16 + 32)
    assert 0 < sizes.block < sizes.trained and sizes.block + sizes.root < sizes.trained


# --- devices and time -------------------------------------------------------------------------------------------


def cost(**changes: float) -> StepCost:
    figures: dict[str, Any] = {
        "share": 1.0, "flops": 2e12, "backward": 2 / 3, "traffic": 1e9, "operators": 10, "saved": 0, "activations": 0
    }  # fmt: skip
    return StepCost(**(figures | changes))


def test_a_step_takes_as_long_as_its_slowest_part() -> None:
    h100 = DEVICES["h100"]
    products = step_seconds(cost(), h100, bf16=True, utilisation=0.5)
    assert products.compute == pytest.approx(2e12 / (0.5 * 989e12)) and products.limit == "products"
    moved = step_seconds(cost(traffic=1e12), h100, bf16=True, utilisation=0.5)
    assert moved.compute == pytest.approx(1e12 / 3350e9) and moved.limit == "memory traffic"
    launched = step_seconds(cost(operators=10000), h100, bf16=True, utilisation=0.5)
    assert launched.compute == 10000 * LAUNCH_SECONDS and launched.limit == "kernel launches"
    assert step_seconds(cost(), h100, bf16=False, utilisation=0.5).products > 10 * products.products


def test_a_cpu_does_one_after_the_other() -> None:
    cpu = this_cpu(tflops=0.1, memory_bandwidth=10)
    assert step_seconds(cost(), cpu, bf16=False, utilisation=1.0).compute == pytest.approx(20 + 0.1)
    assert cpu.memory_gb > 0


def test_communication_hides_behind_backward_or_is_waited_for() -> None:
    seconds = step_seconds(cost(flops=989e12), DEVICES["h100"], bf16=True, utilisation=1.0)
    hidden = with_communication(seconds, Traffic(behind=50e9, before=0), bandwidth=100e9, hidden=0.6)
    assert (hidden.exposed, hidden.communication, hidden.step) == (0, 0.5, 1.0)
    waited = with_communication(seconds, Traffic(behind=160e9, before=40e9), bandwidth=100e9, hidden=0.6)
    assert waited.exposed == pytest.approx(1.0 + 0.4) and waited.step == pytest.approx(2.4)
    assert waited.limit == "communication"


@pytest.mark.parametrize(
    ("name", "near"), [("H100x", "h100"), ("a100", "a100-40gb"), ("rtx-4090", "rtx4090")]
)
def test_an_unknown_device_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(
        V2FlowError, match=rf"--device: unknown device '{name}'; did you mean {near}\? known: v100, "
    ):
        find_hardware(name)


def test_figures_of_a_device_can_be_others() -> None:
    changed = override(DEVICES["h100"], memory_gb=60, network_bandwidth=None)
    assert (changed.memory_gb, changed.network_bandwidth) == (60, 50)
    with pytest.raises(V2FlowError, match="option --tflops: expected a positive number, found -1"):
        override(DEVICES["h100"], bf16_tflops=-1)


# --- sizes without weights --------------------------------------------------------------------------------------


def test_language_models_are_known_without_their_weights(tmp_path: Any) -> None:
    gemma = language_model_config("gemma3-270m")
    assert (gemma.vocab_size, gemma.hidden_size, gemma.num_hidden_layers) == (262144, 640, 18)
    assert language_model_config("gemma3-270m", layers=6).num_hidden_layers == 6
    assert language_model_config("some/where/Llama-2-7b-hf").hidden_size == 4096
    assert language_model_config("gpt2-style:tiny").n_embd == 64
    language_model_config("gpt2-style:tiny").save_pretrained(tmp_path)
    assert language_model_config(str(tmp_path)).n_embd == 64
    with pytest.raises(V2FlowError, match="its weights are not needed, but its config.json is"):
        language_model_config("no/such/model")


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"source": "gemma3-270m", "size": 2048}, (2048, 640)),
        ({"source": "wordllama", "size": None}, (32000, 256)),
        ({"source": "random", "size": 60, "dim": 16}, (60, 16)),
        ({"source": "checkpoints/Llama-2-7b-hf", "size": None}, (32000, 4096)),
    ],
)
def test_vocabularies_are_known_without_their_rows(options: dict[str, Any], shape: tuple[int, int]) -> None:
    assert vocabulary_shape(VocabularyConfig(**options)) == shape


def test_shared_tensors_stay_shared_on_fake_ones() -> None:
    with torch.device("meta"):
        pair = nn.ModuleList([nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)])
        pair[1].weight = pair[0].weight
    make_fake(pair, FakeTensorMode())
    assert pair[1].weight is pair[0].weight and pair[0].weight.device == CPU
    assert len(list(pair.parameters())) == 1
