"""The masked decoder: what it may read, how masks are drawn, how positions are revealed."""

import math

import pytest
import torch
from torch import Tensor

from v2flow.config import DecoderConfig
from v2flow.errors import V2FlowError
from v2flow.masked_decoder import MaskedAutoregressiveDecoder, cosine_schedule, draw_mask, token_above

TOKEN_DIM, CHANNELS, WIDTH, LATENT_GRID = 6, 5, 16, (8, 8)
POSITIONS = 64
PREFIXES = ("aligned", "attend")


def make_decoder(prefix: str = "aligned", token_grid=(8, 8), **options) -> MaskedAutoregressiveDecoder:
    torch.manual_seed(0)
    config = DecoderConfig(width=WIDTH, heads=2, encoder_depth=2, decoder_depth=2, prefix=prefix, **options)
    return MaskedAutoregressiveDecoder(TOKEN_DIM, token_grid, CHANNELS, LATENT_GRID, config)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, latents and a mask with 40 masked positions, other ones in each of 2 pictures."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.nn.functional.normalize(torch.randn(2, 64, TOKEN_DIM, generator=g), dim=-1)
    latents = torch.randn(2, POSITIONS, CHANNELS, generator=g)
    mask = torch.rand(2, POSITIONS, generator=g).argsort(1) < 40
    return tokens, latents, mask


@pytest.mark.parametrize("prefix", PREFIXES)
def test_masked_latents_are_never_read(prefix: str, batch) -> None:
    tokens, latents, mask = batch
    decoder = make_decoder(prefix)
    expected = decoder(tokens, latents, mask)
    hidden = latents.masked_fill(mask[..., None], float("nan"))
    assert torch.equal(decoder(tokens, hidden, mask), expected)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_visible_latents_and_tokens_are_read(prefix: str, batch) -> None:
    tokens, latents, mask = batch
    decoder = make_decoder(prefix)
    expected = decoder(tokens, latents, mask)
    visible = int((~mask[0]).nonzero()[3])
    other = latents.clone()
    other[0, visible] += 1
    changed = (decoder(tokens, other, mask) - expected).abs().amax(-1)
    assert (changed[0][mask[0]] > 1e-6).all(), "masked positions do not see a visible one"
    assert (changed[1] < 1e-6).all(), "pictures of a batch influence each other"
    moved = decoder(tokens.roll(1, dims=1), latents, mask)
    assert ((moved - expected).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("prefix", PREFIXES)
def test_visible_latents_keep_their_places(prefix: str, batch) -> None:
    """Swapping two visible latents is another picture: each stands for its own position."""
    tokens, latents, mask = batch
    decoder = make_decoder(prefix)
    a, b = (~mask[0]).nonzero().flatten()[:2].tolist()
    swapped = latents.clone()
    swapped[0, [a, b]] = latents[0, [b, a]]
    assert not torch.allclose(decoder(tokens, swapped, mask)[0], decoder(tokens, latents, mask)[0], atol=1e-5)


def test_the_encoder_knows_the_places_of_visible_latents(batch) -> None:
    """Without decoder blocks what is visible reaches masked positions through the encoded tokens alone."""
    tokens, latents, mask = batch
    torch.manual_seed(0)
    config = DecoderConfig(width=WIDTH, heads=2, encoder_depth=2, decoder_depth=0)
    decoder = MaskedAutoregressiveDecoder(TOKEN_DIM, (8, 8), CHANNELS, LATENT_GRID, config)
    a, b = (~mask[0]).nonzero().flatten()[[0, -1]].tolist()
    swapped = latents.clone()
    swapped[0, [a, b]] = latents[0, [b, a]]
    changed = (decoder(tokens, swapped, mask) - decoder(tokens, latents, mask)).abs().amax(-1)
    assert (changed[0][mask[0]] > 1e-5).all()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("token_grid", [(8, 8), (8, 4), (4, 4)])
@pytest.mark.parametrize("masked", [64, 1, 0])
def test_any_number_of_tokens_and_masked_positions(prefix: str, token_grid, masked: int, batch) -> None:
    decoder = make_decoder(prefix, token_grid)
    tokens, latents, _ = batch
    tokens = tokens[:, : token_grid[0] * token_grid[1]]
    mask = torch.arange(POSITIONS).expand(2, -1) < masked
    condition = decoder(tokens, latents, mask)
    assert condition.shape == (2, POSITIONS, WIDTH)
    assert condition.isfinite().all()
    assert condition.std(1).min() > 1e-3, "positions are not told apart"


@pytest.mark.parametrize("prefix", PREFIXES)
def test_null_replaces_the_tokens_of_its_pictures_only(prefix: str, batch) -> None:
    tokens, latents, mask = batch
    decoder = make_decoder(prefix)
    null = torch.tensor([True, False])
    condition = decoder(tokens, latents, mask, null)
    assert torch.equal(decoder(tokens.flip(1), latents, mask, null)[0], condition[0]), (
        "null still reads the tokens"
    )
    torch.testing.assert_close(condition[1], decoder(tokens, latents, mask)[1])
    assert not torch.allclose(condition[0], decoder(tokens, latents, mask)[0], atol=1e-4)


def testtoken_above_by_hand() -> None:
    assert token_above((2, 2), (4, 4)).view(4, 4).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
    assert token_above((2, 1), (2, 3)).tolist() == [0, 0, 0, 1, 1, 1]
    assert token_above((8, 4), (8, 8)).view(8, 8)[3].tolist() == [12, 12, 13, 13, 14, 14, 15, 15]
    assert token_above((3, 3), (3, 3)).tolist() == list(range(9))


def test_aligned_gives_each_position_thetoken_above_it() -> None:
    """Without attention in either stack a token reaches exactly the positions of its own cell."""
    torch.manual_seed(0)
    config = DecoderConfig(width=WIDTH, heads=2, encoder_depth=0, decoder_depth=0)
    decoder = MaskedAutoregressiveDecoder(TOKEN_DIM, (4, 4), CHANNELS, LATENT_GRID, config)
    tokens, latents = torch.randn(1, 16, TOKEN_DIM), torch.zeros(1, POSITIONS, CHANNELS)
    mask = torch.ones(1, POSITIONS).bool()
    other = tokens.clone()
    other[0, 6] += 1  # second row, third column of the 4×4 grid
    changed = (decoder(tokens, latents, mask) - decoder(other, latents, mask))[0].abs().amax(-1) > 1e-6
    assert changed.nonzero().flatten().tolist() == [20, 21, 28, 29]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_checkpointing_gives_equal_gradients(prefix: str, batch) -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        decoder = make_decoder(prefix, checkpointing=checkpointing).train()
        seen: list[int] = []
        decoder.encoder.blocks[0].register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        # A plain mean of squares is constant after the final norm: weigh the outputs at random.
        weights = torch.randn(2, POSITIONS, WIDTH, generator=torch.Generator().manual_seed(2))
        (decoder(*batch) * weights).mean().backward()
        gradients.append({name: p.grad for name, p in decoder.named_parameters() if p.grad is not None})
        calls.append(len(seen))
    assert calls == [1, 2], "activations are recomputed in backward, and only with the option"
    assert gradients[0].keys() == gradients[1].keys()
    assert sum(g.abs().max() > 1e-6 for g in gradients[0].values()) > 40
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_checkpointing_does_nothing_in_evaluation(batch) -> None:
    decoder = make_decoder(checkpointing=True).eval()
    seen: list[int] = []
    decoder.decoder.blocks[0].register_forward_pre_hook(lambda *_: seen.append(1))
    decoder(*batch).square().mean().backward()
    assert len(seen) == 1


# --- masks ------------------------------------------------------------------------------------------------------


def draw_counts(config: DecoderConfig, positions: int, draws: int, batch: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(0)
    masks = [draw_mask(batch, positions, config, g, torch.device("cpu"))[0] for _ in range(draws)]
    return torch.stack([m.sum(1) for m in masks])


def test_masks_of_a_batch_have_one_count_and_different_places() -> None:
    g = torch.Generator().manual_seed(3)
    for _ in range(50):
        mask, _ = draw_mask(8, POSITIONS, DecoderConfig(full_mask_share=0.0), g, torch.device("cpu"))
        assert mask.dtype == torch.bool and mask.shape == (8, POSITIONS)
        count = mask.sum(1)
        assert (count == count[0]).all()
        if count[0] < POSITIONS - 2:
            assert len({tuple(row.tolist()) for row in mask}) > 1


def test_masked_places_are_uniform() -> None:
    g = torch.Generator().manual_seed(3)
    config = DecoderConfig(full_mask_share=0.0, mask_ratio=[0.5, 1e-4, 0.4])
    share = draw_mask(4000, 10, config, g, torch.device("cpu"))[0].float().mean(0)
    # 4,000 draws: standard error 0.008. A ratio of 0.5001 masks 6 of 10 positions.
    assert ((share - share.mean()).abs() < 0.035).all()


def test_masked_count_is_the_ratio_rounded_up() -> None:
    # 64·0.49 = 31.4 and 10·0.49 = 4.9
    config = DecoderConfig(full_mask_share=0.0, mask_ratio=[0.49, 1e-6, 0.4])
    assert draw_counts(config, 64, 5).unique().tolist() == [32]
    assert draw_counts(config, 10, 5).unique().tolist() == [5]


def test_mask_ratios_follow_the_truncated_normal() -> None:
    """Reference recipe: N(1, 0.25) truncated to [0.7, 1], no extra share of full masks."""
    stats = pytest.importorskip("scipy.stats")
    ratio = draw_counts(DecoderConfig(full_mask_share=0.0), 2000, 1500)[:, 0].double() / 2000
    assert ratio.min() >= 0.7 and ratio.max() <= 1.0
    expected = stats.truncnorm(-0.3 / 0.25, 0.0, loc=1.0, scale=0.25)
    assert stats.kstest(ratio.numpy(), expected.cdf).statistic < 1.63 / math.sqrt(1500)  # p = 0.01


def test_full_masks_have_their_share() -> None:
    # At 2,000 positions a truncated normal hits the full mask in 0.2 % of the batches on its own.
    for share in (0.0, 0.5, 1.0):
        full = (draw_counts(DecoderConfig(full_mask_share=share), 2000, 800)[:, 0] == 2000).double().mean()
        assert abs(float(full) - share) < 0.06, share


def test_masks_depend_on_the_generator_alone() -> None:
    config = DecoderConfig()
    a, _ = draw_mask(4, 16, config, torch.Generator().manual_seed(5), torch.device("cpu"))
    torch.manual_seed(99)
    b, _ = draw_mask(4, 16, config, torch.Generator().manual_seed(5), torch.device("cpu"))
    assert torch.equal(a, b)


# --- the reveal schedule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [*range(1, 33), 49, 64, 100, 256, 1024])
def test_cosine_schedule_strictly_falls_to_zero(positions: int) -> None:
    for iterations in range(1, positions + 1):
        counts = [positions, *cosine_schedule(iterations, positions)]
        assert len(counts) == iterations + 1 and counts[-1] == 0
        assert all(a > b for a, b in zip(counts, counts[1:], strict=False)), (iterations, positions, counts)


def test_cosine_schedule_by_hand() -> None:
    # 64·cos(π/2·k/4) = 59.1, 45.3, 24.5, 0
    assert cosine_schedule(4, 64) == [59, 45, 24, 0]
    assert cosine_schedule(1, 64) == [0]
    assert cosine_schedule(4, 4) == [3, 2, 1, 0]


def test_options_are_checked() -> None:
    with pytest.raises(V2FlowError, match="decoder.heads.*divisor of width 192.*found 5"):
        DecoderConfig(heads=5)
    with pytest.raises(V2FlowError, match="decoder.mask_ratio.*found"):
        DecoderConfig(mask_ratio=[1.0, 0.25])
    for ratio in ([0.7, 0, 0.7], [2.0, 0.1, 0.7], [0.1, 0.01, 0.7], [1.0, math.nan, 0.7]):
        with pytest.raises(V2FlowError, match=r"decoder.mask_ratio.*0 < minimum <= mean <= 1"):
            DecoderConfig(mask_ratio=ratio)
    with pytest.raises(V2FlowError, match="decoder.width: expected a multiple of 4, found 198"):
        DecoderConfig(width=198)
    with pytest.raises(V2FlowError, match="decoder.null_probability.*found 1.0"):
        DecoderConfig(null_probability=1.0)
    with pytest.raises(V2FlowError, match="decoder.full_mask_share.*found -0.1"):
        DecoderConfig(full_mask_share=-0.1)
