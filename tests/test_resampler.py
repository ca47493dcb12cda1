"""The resampler: distributions over the vocabulary, their noise, temperature and read-outs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from v2flow.config import ResamplerConfig
from v2flow.errors import V2FlowError
from v2flow.resampler import VisualVocabularyResampler
from v2flow.vocabulary_attention import MATRICES, SoftDistribution

CHANNELS, VOCABULARY, DIM = 5, 12, 6
READOUTS = ("keys", "linear")


def make_resampler(token_grid=(2, 2), table: Tensor | None = None, **options) -> VisualVocabularyResampler:
    torch.manual_seed(0)
    if table is None:
        table = torch.randn(VOCABULARY, DIM, generator=torch.Generator().manual_seed(1))
    config = ResamplerConfig(
        **{"width": 8, "depth": 1, "key_dim": 4, "token_grid": list(token_grid), **options}
    )
    return VisualVocabularyResampler(CHANNELS, config, table).eval()


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(3, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(2))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def probabilities(resampler: VisualVocabularyResampler, *arguments) -> Tensor:
    """All probabilities, `[B, N, V]`."""
    entries = len(resampler.table)
    return resampler(*arguments, top=entries).dense(entries)


@pytest.mark.parametrize("readout", READOUTS)
def test_probabilities_and_expected_embeddings(readout: str, latents: Tensor) -> None:
    resampler = make_resampler(readout=readout)
    soft = resampler(latents, top=VOCABULARY)
    dense = soft.dense(VOCABULARY)
    assert dense.shape == (3, 4, VOCABULARY) and soft.embeddings.shape == (3, 4, DIM)
    assert (dense >= 0).all()
    torch.testing.assert_close(dense.sum(-1), torch.ones(3, 4))
    for b in range(3):
        for n in range(4):
            shares = dense[b, n].tolist()
            expected = sum(share * row for share, row in zip(shares, resampler.table, strict=True))
            torch.testing.assert_close(soft.embeddings[b, n], expected, atol=1e-5, rtol=1e-5)


def test_keys_are_cosines_times_scale(latents: Tensor) -> None:
    resampler = make_resampler(scale=7.0)
    features = resampler.encoder(latents)
    query = features @ resampler.query.weight.T + resampler.query.bias
    keys = resampler.table @ resampler.key
    logits = 7.0 * torch.einsum(
        "bnd,vd->bnv", query / query.norm(dim=-1, keepdim=True), keys / keys.norm(dim=-1, keepdim=True)
    )
    torch.testing.assert_close(probabilities(resampler, latents), logits.softmax(-1))


def test_first_keys_are_whitened() -> None:
    """Keys of a table whose directions differ in scale by a thousand spread over all directions alike."""
    table = torch.randn(400, DIM, generator=generator(3)) * torch.logspace(0, 3, DIM)
    resampler = make_resampler(table=table, key_dim=DIM)
    keys = (table - table.mean(0)) @ resampler.key
    torch.testing.assert_close(keys.T @ keys / 400, torch.eye(DIM), atol=1e-3, rtol=0)


def test_key_width_is_at_most_the_table_s() -> None:
    assert make_resampler(key_dim=100).query.out_features == DIM


@pytest.mark.parametrize("readout", READOUTS)
def test_entropy(readout: str, latents: Tensor) -> None:
    resampler = make_resampler(readout=readout)
    expected = torch.distributions.Categorical(probs=probabilities(resampler, latents)).entropy()
    torch.testing.assert_close(resampler(latents).entropy, expected)
    if readout == "keys":
        resampler.config.scale = 1e4
        assert resampler(latents).entropy.abs().max() < 1e-6


# --- noise and temperature --------------------------------------------------------------------------------------


def test_no_noise_in_evaluation(latents: Tensor) -> None:
    resampler = make_resampler(noise=[1.0, 1.0])
    before = torch.random.get_rng_state()
    assert torch.equal(probabilities(resampler, latents, 0.0), probabilities(resampler, latents, 0.0))
    assert torch.equal(torch.random.get_rng_state(), before)
    resampler.train()
    assert not torch.equal(probabilities(resampler, latents, 0.0), probabilities(resampler, latents, 0.0))


def centred_logs(probabilities: Tensor) -> Tensor:
    logs = probabilities.log()
    return logs - logs.mean(-1, keepdim=True)


def test_noise_falls_linearly_to_its_end(latents: Tensor) -> None:
    resampler = make_resampler(noise=[1.0, 0.0], schedule_end=0.5, scale=2.0)
    clean = centred_logs(probabilities(resampler, latents))
    resampler.train()

    def noise(progress: float) -> Tensor:
        return centred_logs(probabilities(resampler, latents, progress, generator(4))) - clean

    full = noise(0.0)
    assert full.std() > 0.5
    torch.testing.assert_close(noise(0.25), full / 2, atol=1e-4, rtol=1e-4)
    for progress in (0.5, 0.75, 1.0):
        assert (noise(progress).abs() < 1e-5).all(), "noise must be gone before the end"


def test_temperature_schedule(latents: Tensor) -> None:
    resampler = make_resampler(temperature=[2.0, 0.5], schedule_end=0.8)
    end = centred_logs(probabilities(resampler, latents, 1.0))
    torch.testing.assert_close(
        centred_logs(probabilities(resampler, latents, 0.0)), end / 4, atol=1e-4, rtol=1e-4
    )
    half = centred_logs(probabilities(resampler, latents, 0.4))  # temperature 1.25
    torch.testing.assert_close(half, end * 0.4, atol=1e-4, rtol=1e-4)


def test_noisy_choices_follow_the_softmax(latents: Tensor) -> None:
    """argmax(logits + Gumbel noise) is a draw from softmax(logits): chi-square of 4,000 draws a token."""
    resampler = make_resampler(noise=[1.0, 1.0], scale=2.0)
    draws, picture = 4000, latents[:1]
    expected = probabilities(resampler, picture)[0].detach() * draws
    resampler.train()
    soft = resampler(picture.expand(draws, -1, -1, -1), 0.0, generator(5))
    counts = F.one_hot(soft.words[..., 0], VOCABULARY).sum(0)
    assert expected.min() > 20
    chi_square = ((counts - expected).square() / expected).sum(-1)
    # 11 degrees of freedom: 31.3 is passed once in a thousand.
    assert (chi_square < 31.3).all(), chi_square
    resampler.config.noise = [0.3, 0.3]
    soft = resampler(picture.expand(draws, -1, -1, -1), 0.0, generator(5))
    counts = F.one_hot(soft.words[..., 0], VOCABULARY).sum(0)
    assert (((counts - expected).square() / expected).sum(-1) > 31.3).all(), "weaker noise is no draw"


def test_noise_depends_on_the_generator_alone(latents: Tensor) -> None:
    resampler = make_resampler(noise=[1.0, 1.0]).train()
    a = probabilities(resampler, latents, 0.0, generator(6))
    torch.manual_seed(77)
    assert torch.equal(probabilities(resampler, latents, 0.0, generator(6)), a)
    assert not torch.equal(probabilities(resampler, latents, 0.0, generator(7)), a)


# --- straight-through -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readout", READOUTS)
def test_hard_is_one_hot_forward_and_soft_backward(readout: str, latents: Tensor) -> None:
    soft_one, hard_one = make_resampler(readout=readout), make_resampler(readout=readout, hard=True)
    weights = torch.randn(3, 4, DIM, generator=generator(8))
    gradients = []
    for resampler in (soft_one, hard_one):
        out = resampler(latents)
        (out.embeddings * weights).sum().backward()
        gradients.append({name: p.grad for name, p in resampler.named_parameters()})
    rows = hard_one.table[probabilities(hard_one, latents).argmax(-1)]
    torch.testing.assert_close(out.embeddings, rows, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(probabilities(hard_one, latents), probabilities(soft_one, latents))
    assert max(float(g.abs().max()) for g in gradients[0].values()) > 1e-3
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("readout", READOUTS)
def test_every_parameter_is_trained_and_the_table_is_not(readout: str, latents: Tensor) -> None:
    resampler = make_resampler(readout=readout).train()
    (resampler(latents).embeddings * torch.randn(DIM, generator=generator(9))).sum().backward()
    assert [n for n, p in resampler.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert not resampler.table.requires_grad
    assert "table" not in resampler.state_dict()


# --- memory -----------------------------------------------------------------------------------------------------


def make_wide_resampler(**options) -> VisualVocabularyResampler:
    """192 tokens over 1,100 entries: a matrix of 0.8 MB, for which 2 MB are too little."""
    assert MATRICES * 192 * 1100 * 4 > 2 * 2**20
    table = torch.randn(1100, DIM, generator=generator(11))
    return make_resampler((8, 8), table, **options)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize(
    "options", [{}, {"noise": [1.0, 1.0]}, {"temperature": [0.5, 0.5], "noise": [0.3, 0.0]}, {"hard": True}]
)
def test_the_budget_changes_nothing_but_rounding(readout: str, options: dict) -> None:
    latents = torch.randn(3, CHANNELS, 8, 8, generator=generator(2))
    weights = torch.randn(3, 64, DIM, generator=generator(8))

    def run(budget: float) -> tuple[SoftDistribution, dict[str, Tensor]]:
        resampler = make_wide_resampler(readout=readout, memory_budget_mb=budget, **options).train()
        soft = resampler(latents, 0.1, generator(3), described=2, top=3)
        (soft.embeddings * weights).sum().backward()
        return soft, {name: p.grad for name, p in resampler.named_parameters()}

    (whole, gradients), (tiled, others) = run(256.0), run(2.0)
    assert whole.words.shape == (2, 64, 3) and torch.equal(tiled.words, whole.words)
    for name in ("embeddings", "entropy", "probabilities"):
        torch.testing.assert_close(getattr(tiled, name), getattr(whole, name), atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-4, rtol=1e-4)


def test_a_budget_too_small_is_refused_before_any_work() -> None:
    with pytest.raises(V2FlowError, match=r"resampler.memory_budget_mb: expected at least 1, .*, found 0.5$"):
        make_wide_resampler(memory_budget_mb=0.5)
    with pytest.raises(V2FlowError, match="expected at least 1.75, "):
        make_wide_resampler(memory_budget_mb=1.7, noise=[1.0, 0.0])
    resampler = make_wide_resampler(memory_budget_mb=1.75, noise=[1.0, 0.0]).double().train()
    latents = torch.randn(3, CHANNELS, 8, 8, generator=generator(2)).double()
    assert resampler(latents, 0.0, generator(3)).embeddings.isfinite().all()


# --- precision and pooling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("readout", READOUTS)
def test_softmax_is_fp32_under_autocast(readout: str, latents: Tensor) -> None:
    resampler = make_resampler(readout=readout)
    with torch.autocast("cpu", torch.bfloat16):
        soft = resampler(latents, top=VOCABULARY)
        assert torch.is_autocast_enabled("cpu")
    dense = soft.dense(VOCABULARY)
    assert dense.dtype == soft.embeddings.dtype == soft.entropy.dtype == torch.float32
    torch.testing.assert_close(dense.sum(-1), torch.ones(3, 4), atol=1e-6, rtol=0)
    torch.testing.assert_close(soft.embeddings, dense @ resampler.table, atol=1e-6, rtol=1e-6)
    # Given the encoder's features, the read-out is the same as without autocast.
    with torch.autocast("cpu", torch.bfloat16):
        features = resampler.encoder(latents).float()
    torch.testing.assert_close(dense, resampler._logits(features).whole().softmax(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("token_grid", [(8, 8), (8, 4), (4, 4)])
def test_pooling_to_fewer_tokens(token_grid: tuple[int, int]) -> None:
    """64, 32 or 16 tokens, row by row: without spatial mixing a latent reaches its own token alone."""
    resampler = make_resampler(token_grid, depth=0)
    latents = torch.randn(1, CHANNELS, 8, 8, generator=generator(10))
    base = probabilities(resampler, latents)
    assert base.shape[1] == math.prod(token_grid)
    for row, column in ((0, 0), (5, 2), (7, 7)):
        other = latents.clone()
        other[0, :, row, column] += torch.arange(CHANNELS)
        changed = (probabilities(resampler, other) - base)[0].abs().amax(-1) > 1e-6
        token = (row * token_grid[0] // 8) * token_grid[1] + column * token_grid[1] // 8
        assert changed.nonzero().flatten().tolist() == [token]


def test_neighbours_are_seen_through_convolutions() -> None:
    resampler = make_resampler((8, 8), depth=1)
    latents = torch.randn(1, CHANNELS, 8, 8, generator=generator(10))
    other = latents.clone()
    other[0, :, 4, 4] += torch.arange(CHANNELS)
    changed = (probabilities(resampler, other) - probabilities(resampler, latents))[0].abs().amax(-1).view(
        8, 8
    ) > 1e-7
    # One block before and one after the pooling: two 3×3 convolutions reach two positions far.
    assert changed[2:7, 2:7].all() and changed.sum() == 25


def test_options_are_checked() -> None:
    for options, message in (
        ({"token_grid": [8]}, r"resampler.token_grid.*found \[8\]"),
        ({"depth": -1}, "resampler.depth.*found"),
        ({"temperature": [1.0, 0.0]}, "resampler.temperature.*found"),
        ({"noise": [-1.0, 0.0]}, "resampler.noise.*found"),
        ({"schedule_end": 0.0}, "resampler.schedule_end.*found 0.0"),
        ({"memory_budget_mb": 0.0}, "resampler.memory_budget_mb.*found 0.0"),
    ):
        with pytest.raises(V2FlowError, match=message):
            ResamplerConfig(**options)
