"""The assembled tokenizer: what encode and decode promise."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from core_toys import pictures, small_config
from torch import Tensor

from v2flow.config import (
    CodecConfig,
    DecoderConfig,
    ResamplerConfig,
    TokenizerConfig,
    VelocityConfig,
    VisualVocabularyConfig,
    VocabularyConfig,
)
from v2flow.decoding import decode_options
from v2flow.errors import V2FlowError
from v2flow.llm import LLMVocabulary
from v2flow.tokenizer import V2FlowTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> V2FlowTokenizer:
    """A tokenizer after a few steps: its codes are tokens of pictures, its outputs are not zero."""
    torch.manual_seed(0)
    model = V2FlowTokenizer(small_config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(15):
        loss = model.losses(pictures(8, step), generator=torch.Generator().manual_seed(step)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return pictures(12, seed=100)


@pytest.fixture(scope="module")
def ids(tokenizer: V2FlowTokenizer, images: Tensor) -> Tensor:
    return tokenizer.encode(images)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    yield
    torch.set_num_threads(before)


# --- encode -----------------------------------------------------------------------------------------------------


def test_ids(tokenizer: V2FlowTokenizer, ids: Tensor) -> None:
    assert tokenizer.num_tokens == 8 and tokenizer.codebook_size == 32
    assert ids.shape == (12, 8) and ids.dtype == torch.long
    assert ids.min() >= 0 and ids.max() < 32
    assert ids.unique().numel() > 5, "the other tests would prove nothing on constant ids"


def test_encode_twice_in_other_batches_and_orders(
    tokenizer: V2FlowTokenizer, images: Tensor, ids: Tensor
) -> None:
    assert torch.equal(tokenizer.encode(images), ids)
    for size in (1, 5, 7):
        assert torch.equal(torch.cat([tokenizer.encode(part) for part in images.split(size)]), ids)
    order = torch.randperm(12, generator=generator())
    assert torch.equal(tokenizer.encode(images[order]), ids[order])


def test_encode_with_another_number_of_threads(
    tokenizer, images: Tensor, ids: Tensor, two_threads: None
) -> None:
    assert torch.equal(tokenizer.encode(images), ids)


def test_encode_in_training_mode_and_back(tokenizer: V2FlowTokenizer, images: Tensor, ids: Tensor) -> None:
    tokenizer.config.resampler.noise = [1.0, 1.0]  # noise of the training must not reach encode
    try:
        assert torch.equal(tokenizer.train().encode(images), ids)
        assert torch.equal(tokenizer.eval().encode(images), ids)
    finally:
        tokenizer.config.resampler.noise = [0.0, 0.0]
        tokenizer.eval()


def test_encode_under_autocast(tokenizer: V2FlowTokenizer, images: Tensor, ids: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), ids)


def test_encode_of_other_strides_and_precisions(
    tokenizer: V2FlowTokenizer, images: Tensor, ids: Tensor
) -> None:
    assert torch.equal(tokenizer.encode(images.contiguous(memory_format=torch.channels_last)), ids)
    assert torch.equal(tokenizer.encode(images.double()), ids)


SCRIPT = """
import sys, torch
from v2flow.tokenizer import V2FlowTokenizer
torch.set_num_threads(2)
folder = sys.argv[1]
tokenizer = V2FlowTokenizer.from_pretrained(folder)
images = torch.load(folder + "/images.pt", weights_only=True)
ids = tokenizer.encode(images)
out = {"ids": ids}
for name, options in {"one": {"steps": 1, "temperature": 0.0}, "many": {"steps": 4, "iterations": 3}}.items():
    out[name] = tokenizer.decode(ids, torch.Generator().manual_seed(3), **options)
torch.save(out, folder + "/out.pt")
"""


def test_a_new_process_gives_the_same_ids_and_pictures(
    tokenizer: V2FlowTokenizer, images: Tensor, ids: Tensor, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    torch.save(images, tmp_path / "images.pt")
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "2", "PATH": ""}
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], check=True, env=environment)
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(out["ids"], ids)
    one = tokenizer.decode(ids, generator(3), steps=1, temperature=0.0)
    many = tokenizer.decode(ids, generator(3), steps=4, iterations=3)
    # Sums of another number of threads may differ in the last bits; pictures have 8.
    torch.testing.assert_close(out["one"], one, atol=1e-5, rtol=0)
    torch.testing.assert_close(out["many"], many, atol=1e-4, rtol=0)


def test_encode_and_decode_leave_every_tensor_alone(tokenizer: V2FlowTokenizer, images: Tensor) -> None:
    before = {
        name: value.clone() for name, value in [*tokenizer.named_buffers(), *tokenizer.named_parameters()]
    }
    for mode in (True, False):
        tokenizer.train(mode)
        tokenizer.decode(tokenizer.encode(images), steps=2, iterations=2)
    for name, value in [*tokenizer.named_buffers(), *tokenizer.named_parameters()]:
        assert torch.equal(before[name], value), name


def test_modes_of_submodules_are_put_back(tokenizer: V2FlowTokenizer, images: Tensor, ids: Tensor) -> None:
    tokenizer.train()
    tokenizer.decoder.eval()
    tokenizer.resampler.encoder.eval()
    modes = {name: part.training for name, part in tokenizer.named_modules()}
    assert len(set(modes.values())) == 2
    tokenizer.encode(images)
    tokenizer.decode(ids)
    with pytest.raises(V2FlowError):
        tokenizer.encode(images[:, :, :5])
    assert {name: part.training for name, part in tokenizer.named_modules()} == modes
    tokenizer.eval()


def test_gradients_and_precision_settings_are_left_alone(tokenizer: V2FlowTokenizer, images: Tensor) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        rec = tokenizer.decode(tokenizer.encode(images.clone().requires_grad_()))
        assert not rec.requires_grad
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.is_grad_enabled()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_soft_tokens(tokenizer: V2FlowTokenizer, images: Tensor, ids: Tensor) -> None:
    soft = tokenizer.encode(images, return_soft=True)
    assert torch.equal(soft.ids, ids)
    assert soft.embeddings.shape == (12, 8, 16) and soft.words.shape == soft.probabilities.shape == (12, 8, 5)
    assert (soft.probabilities.diff(dim=-1) <= 0).all()
    with torch.no_grad():
        full = tokenizer.resampler(tokenizer.codec.encode(images), top=60)
    torch.testing.assert_close(soft.embeddings, full.embeddings, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(soft.entropy, full.entropy, atol=1e-4, rtol=1e-4)
    dense = full.dense(60)
    assert torch.equal(soft.words[..., 0], dense.argmax(-1))
    torch.testing.assert_close(soft.probabilities, dense.gather(-1, soft.words), atol=1e-6, rtol=1e-4)
    # The quantiser looks at the direction of the embeddings: the nearest code is the id.
    similarity = torch.nn.functional.normalize(soft.embeddings, dim=-1) @ tokenizer.visual_vocabulary.codes.T
    assert torch.equal(similarity.argmax(-1), ids)
    everything = tokenizer.encode(images[:2], return_soft=True, top_words=10_000)
    assert everything.words.shape[-1] == len(tokenizer.words) == 60
    torch.testing.assert_close(everything.probabilities.sum(-1), torch.ones(2, 8))


def test_encode_refuses_other_shapes(tokenizer: V2FlowTokenizer) -> None:
    for shape in ((1, 3, 20, 16), (1, 1, 16, 16), (3, 16, 16)):
        with pytest.raises(V2FlowError, match=r"images: expected shape \[B, 3, 16, 16\], found \[") as error:
            tokenizer.encode(torch.zeros(shape))
        assert "\n" not in str(error.value)


# --- decode -----------------------------------------------------------------------------------------------------

MODES = [
    {},
    {"steps": 5, "solver": "heun"},
    {"steps": 5, "iterations": 3, "solver": "multistep", "timestep_shift": 3.0},
    {"steps": 2, "iterations": 4, "guidance": 2.0, "guidance_schedule": "linear"},
]


@pytest.mark.parametrize("options", MODES)
def test_decode_with_a_seed_is_reproducible(tokenizer: V2FlowTokenizer, ids: Tensor, options: dict) -> None:
    rec = tokenizer.decode(ids, generator(1), **options)
    assert rec.shape == (12, 3, 16, 16) and rec.dtype == torch.float32
    assert rec.min() >= 0 and rec.max() <= 1
    torch.manual_seed(5)
    assert torch.equal(tokenizer.decode(ids, generator(1), **options), rec)
    assert torch.equal(tokenizer.train().decode(ids, generator(1), **options), rec)
    assert not torch.equal(tokenizer.eval().decode(ids, generator(2), **options), rec)


def test_decode_at_temperature_zero_has_one_result(tokenizer: V2FlowTokenizer, ids: Tensor) -> None:
    options = {"steps": 1, "temperature": 0.0}
    assert torch.equal(
        tokenizer.decode(ids, generator(1), **options), tokenizer.decode(ids, generator(2), **options)
    )


def test_decode_depends_on_ids_and_on_each_picture_s_own(tokenizer: V2FlowTokenizer, ids: Tensor) -> None:
    options = {"steps": 1, "temperature": 0.0}
    rec = tokenizer.decode(ids, **options)
    other = ids.clone()
    other[0] = (ids[0] + 1) % 32
    changed = (tokenizer.decode(other, **options) - rec).abs().amax((1, 2, 3))
    assert changed[0] > 1e-4 and (changed[1:] < 1e-5).all()


def test_guidance_and_iterations_act(tokenizer: V2FlowTokenizer, ids: Tensor) -> None:
    plain = tokenizer.decode(ids, generator(1), steps=2)
    for options in ({"guidance": 3.0}, {"iterations": 4}, {"temperature": 0.5}, {"timestep_shift": 3.0}):
        assert not torch.allclose(
            tokenizer.decode(ids, generator(1), steps=2, **options), plain, atol=1e-4
        ), options


def test_reconstruct_is_decode_of_encode(tokenizer: V2FlowTokenizer, images: Tensor, ids: Tensor) -> None:
    assert torch.equal(
        tokenizer.reconstruct(images, generator(), steps=2), tokenizer.decode(ids, generator(), steps=2)
    )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((1, 8), 32), r"ids: expected values from 0 to 31, found 32 to 32"),
        (torch.full((1, 8), -1), r"ids: expected values from 0 to 31, found -1 to -1"),
        (torch.zeros(1, 7).long(), r"ids: expected integers of shape \[B, 8\], found torch.int64 \[1, 7\]"),
        (torch.zeros(8).long(), r"ids: expected integers of shape \[B, 8\]"),
        (torch.zeros(1, 8), r"ids: expected integers of shape \[B, 8\], found torch.float32"),
    ],
)
def test_decode_refuses_other_ids(tokenizer: V2FlowTokenizer, bad: Tensor, message: str) -> None:
    with pytest.raises(V2FlowError, match=message) as error:
        tokenizer.decode(bad)
    assert "\n" not in str(error.value)


def test_decode_takes_other_integers(tokenizer: V2FlowTokenizer, ids: Tensor) -> None:
    assert torch.equal(tokenizer.decode(ids.int(), generator()), tokenizer.decode(ids, generator()))


def test_empty_batches(tokenizer: V2FlowTokenizer) -> None:
    ids = tokenizer.encode(torch.zeros(0, 3, 16, 16))
    assert ids.shape == (0, 8) and ids.dtype == torch.long
    assert tokenizer.decode(ids).shape == (0, 3, 16, 16)
    assert tokenizer.decode(ids, steps=2, iterations=3, guidance=2.0).shape == (0, 3, 16, 16)


def test_unknown_decode_options(tokenizer: V2FlowTokenizer, ids: Tensor) -> None:
    with pytest.raises(V2FlowError, match="decode option 'step': unknown; expected one of steps, iterations"):
        tokenizer.decode(ids, step=3)
    with pytest.raises(V2FlowError, match="option solver: .* found 'ddim'"):
        tokenizer.decode(ids, solver="ddim")
    assert decode_options({"steps": 3}).steps == 3


# --- assembly ---------------------------------------------------------------------------------------------------


def test_the_table_is_in_no_state(tokenizer: V2FlowTokenizer) -> None:
    """Frozen rows are stored once in an exported folder and never in a checkpoint."""
    assert "resampler.table" not in tokenizer.state_dict()
    assert not any(value.shape == (60, 16) for value in tokenizer.state_dict().values())
    assert tokenizer.vocabulary.table.shape == (60, 16)


@pytest.mark.parametrize("center", [True, False])
def test_the_table_is_centred_for_the_resampler_only(center: bool) -> None:
    config = small_config()
    config.vocabulary.center = center
    rows = torch.randn(60, 16, generator=generator()) + 3
    model = V2FlowTokenizer(config, LLMVocabulary.from_table(rows, [str(i) for i in range(60)], "random"))
    assert torch.equal(model.vocabulary.table, rows)
    torch.testing.assert_close(model.resampler.table, rows - rows.mean(0) if center else rows)


VARIANTS = {
    "per position, velocity": {"velocity": VelocityConfig(kind="per_position", width=16, depth=1, target="velocity")},
    "per position, x0": {"velocity": VelocityConfig(kind="per_position", width=16, depth=1, target="x0", draws=2)},
    "joint without convolutions": {"velocity": VelocityConfig(width=16, depth=1, heads=2, fine_patch=1)},
    "mean on the fine grid": {"velocity": VelocityConfig(width=16, depth=1, heads=2, fine_width=8, mean_depth=1)},
    "attend": {"decoder": DecoderConfig(width=16, heads=2, encoder_depth=1, decoder_depth=1, prefix="attend")},
    "linear, hard, noisy": {
        "resampler": ResamplerConfig(width=16, depth=1, token_grid=[2, 2], readout="linear", hard=True,
                                     noise=[1.0, 0.1], temperature=[1.0, 0.5])
    },
    "no vocabulary": {"resampler": ResamplerConfig(width=16, depth=1, token_grid=[2, 2], readout="none", key_dim=6)},
    "patches of 2": {"codec": CodecConfig(patch_size=2),
                     "velocity": VelocityConfig(width=16, depth=1, heads=2, fine_patch=2, fine_width=8)},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_trains_and_decodes(variant: str) -> None:
    torch.manual_seed(0)
    model = V2FlowTokenizer(small_config(**VARIANTS[variant])).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    totals = []
    for step in range(30):
        losses = model.losses(pictures(8), progress=step / 30, generator=generator(step))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        totals.append(losses.total.item())
    assert sum(totals[-5:]) < 0.9 * sum(totals[:5]), totals
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    ids = model.encode(pictures(4))
    assert torch.equal(model.encode(pictures(4)), ids)
    assert model.decode(ids, generator(), steps=2, iterations=2, guidance=1.5).isfinite().all()


def test_guidance_that_was_not_trained_is_refused() -> None:
    decoder = DecoderConfig(width=16, heads=2, encoder_depth=1, decoder_depth=1, null_probability=0.0)
    model = V2FlowTokenizer(small_config(decoder=decoder))
    ids = model.encode(pictures(1))
    assert model.decode(ids).isfinite().all()
    with pytest.raises(V2FlowError, match="option guidance: expected 1, found 1.5"):
        model.decode(ids, guidance=1.5)


def test_a_memory_budget_changes_nothing() -> None:
    """The same losses and gradients, ids and words where the logits over the vocabulary are computed in tiles."""
    found = []
    for budget in (256.0, 1.0):
        torch.manual_seed(0)
        resampler = ResamplerConfig(width=16, depth=1, token_grid=[4, 4], key_dim=8, memory_budget_mb=budget)
        vocabulary = VocabularyConfig(source="random", size=1500, dim=16)
        model = V2FlowTokenizer(small_config(resampler=resampler, vocabulary=vocabulary)).train()
        losses = model.losses(pictures(12), 0.1, generator())
        losses.total.backward()
        soft = model.encode(pictures(12), return_soft=True)
        assert torch.equal(model.encode(pictures(12)), soft.ids)
        found.append((losses, soft, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (losses, soft, gradients), (others, other_soft, other_gradients) = found
    for name, value in vars(losses).items():
        torch.testing.assert_close(getattr(others, name), value, atol=1e-6, rtol=1e-5)
    assert torch.equal(other_soft.ids, soft.ids) and torch.equal(other_soft.words, soft.words)
    torch.testing.assert_close(other_soft.entropy, soft.entropy)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, atol=1e-5, rtol=1e-3)


def test_tokens_without_a_vocabulary_have_no_words() -> None:
    resampler = ResamplerConfig(width=16, depth=1, token_grid=[2, 2], readout="none", key_dim=6)
    model = V2FlowTokenizer(small_config(resampler=resampler))
    soft = model.encode(pictures(3), return_soft=True)
    assert soft.words.shape == soft.probabilities.shape == (3, 4, 0) and soft.embeddings.shape == (3, 4, 6)
    assert torch.equal(soft.ids, model.encode(pictures(3)))


@pytest.mark.parametrize("progress", [0.0, 0.59, 0.6, 1.0])
def test_a_field_that_learns_alone(progress: float) -> None:
    """Tokens and means learn before it and not beside it; the codebook's statistics stand still as well."""
    torch.manual_seed(0)
    velocity = VelocityConfig(width=16, depth=1, heads=2, fine_width=8, mean_depth=1, alone=0.4)
    model = V2FlowTokenizer(small_config(velocity=velocity)).train()
    buffers = {n: b.clone() for n, b in model.visual_vocabulary.named_buffers()}
    losses = model.losses(pictures(8), progress, generator())
    losses.total.backward()
    learning = {n for n, p in model.named_parameters() if p.grad is not None}
    field = {n for n, _ in model.named_parameters() if n.startswith(("head.field.", "head.null_condition"))}
    others = {n for n, _ in model.named_parameters()} - field
    alone = progress >= 0.6
    assert learning == (field if alone else others)
    assert (losses.flow > 0) == alone and losses.mean > 0
    kept = [torch.equal(b, buffers[n]) for n, b in model.visual_vocabulary.named_buffers()]
    assert all(kept) if alone else not any(kept)
    field_window = (0.6, 1.0)
    assert model.windows() == {
        "head.field.": field_window, "head.null_condition": field_window, "": (0.0, 0.6)
    }  # fmt: skip


def test_losses_are_bit_equal_for_equal_seeds() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        model = V2FlowTokenizer(small_config()).train()
        torch.rand(7)
        losses = model.losses(pictures(4), 0.3, generator(9))
        losses.total.backward()
        runs.append([losses.total, losses.mean, losses.flow, losses.ids, model.resampler.key.grad])
        torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_losses_refuse_other_shapes(tokenizer: V2FlowTokenizer) -> None:
    with pytest.raises(V2FlowError, match="images: expected shape"):
        tokenizer.losses(torch.zeros(1, 3, 8, 8))


def test_contradictions_are_refused_before_any_work() -> None:
    with pytest.raises(V2FlowError, match="resampler.token_grid: 8x8 tokens need .* found 4x4"):
        V2FlowTokenizer(small_config(resampler=ResamplerConfig(token_grid=[8, 8])))
    with pytest.raises(V2FlowError, match="fine_patch") as error:
        V2FlowTokenizer(small_config(codec=CodecConfig(patch_size=2)))
    assert "\n" not in str(error.value)


def test_reference_configuration_on_the_meta_device() -> None:
    """The paper's sizes: DC-AE latents of 1024 px, LLaMA-2's table, K=16,384; no memory is touched."""
    config = TokenizerConfig(
        image_size=1024,
        codec=CodecConfig(kind="dc", path=None, scale=0.41407),
        resampler=ResamplerConfig(width=512, depth=4, token_grid=[32, 32], readout="linear", noise=[1.0, 1.0]),
        visual_vocabulary=VisualVocabularyConfig(size=16384, decay=0.8),
        decoder=DecoderConfig(width=1024, heads=16, encoder_depth=16, decoder_depth=16, prefix="attend",
                              full_mask_share=0.0, checkpointing=True),
        velocity=VelocityConfig(kind="per_position", width=1536, depth=8, target="velocity", draws=4,
                                start_share=0.0),
    )  # fmt: skip
    with torch.device("meta"):
        table = torch.empty(32000, 4096)
        model = V2FlowTokenizer(config, LLMVocabulary.from_table(table, ["word"] * 32000, "llama-2-7b"))
    assert all(value.is_meta for value in [*model.parameters(), *model.buffers()])
    assert model.num_tokens == 1024 and model.codebook_size == 16384 and model.latent_grid == (32, 32)
    assert model.visual_vocabulary.codes.shape == (16384, 4096)
    assert model.head.residual_std.shape == (32,)
    # 32 blocks of 12·1024² weights are 403 million; the field and the resampler come on top.
    count = sum(p.numel() for n, p in model.named_parameters() if n.startswith("decoder."))
    assert count == pytest.approx(32 * 12 * 1024**2, rel=0.03)
