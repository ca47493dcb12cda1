"""Attention over a vocabulary: tiles of it against the whole matrix written out, noise, descriptions and memory."""

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from v2flow.benchmark.subject import peak_rise
from v2flow.errors import V2FlowError
from v2flow.vocabulary_attention import MATRICES, SoftDistribution, vocabulary_attention
from v2flow.vocabulary_logits import BLOCK, GumbelNoise, Logits
from v2flow.vocabulary_tiles import SLACK, Tiling, fit_tiles, tiled_attention

# Two blocks of tokens and three of entries, the last of each cut off.
BATCH, TOKENS, ENTRIES, KEY_DIM, DIM = 2, 100, 1100, 6, 7
AMPLE = 1e6


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_logits(dtype: torch.dtype = torch.float64, bias: bool = False, **options) -> Logits:
    queries, keys = normal(BATCH, TOKENS, KEY_DIM), 0.5 * normal(ENTRIES, KEY_DIM, seed=1)
    queries, keys = queries.to(dtype), keys.to(dtype)
    return Logits(queries, keys, normal(ENTRIES, seed=2, dtype=dtype) if bias else None, **options)


def tight(logits: Logits) -> float:
    """A budget in MB that holds the smallest tiles, and not the matrix."""
    item = logits.queries.dtype.itemsize
    block = math.prod(BLOCK["cpu"])
    budget = 2 * block * item + (0 if logits.noise is None else block * (4 + item))
    assert MATRICES * BATCH * TOKENS * ENTRIES * item > budget
    return budget / 2**20


def reference(logits: Logits, values: Tensor, hard: bool = False, top: int = 1) -> SoftDistribution:
    """All of it written out, for all tokens."""
    scores = torch.einsum("bnd,vd->bnv", logits.queries, logits.keys)
    scores = scores if logits.bias is None else scores + logits.bias
    if logits.noise is not None:
        noise = replace(logits.noise, amplitude=1.0).add_to(torch.zeros(BATCH * TOKENS, ENTRIES))
        scores = scores + logits.noise.amplitude * noise.view(BATCH, TOKENS, ENTRIES).to(scores.dtype)
    shares = (scores / logits.temperature).softmax(-1)
    mixture = shares
    if hard:
        mixture = F.one_hot(shares.argmax(-1), ENTRIES) + shares - shares.detach()
    shares = shares.detach()
    falling = shares.sort(dim=-1, descending=True, stable=True)
    return SoftDistribution(
        torch.einsum("bnv,vd->bnd", mixture, values),
        torch.distributions.Categorical(probs=shares).entropy(),
        falling.indices[..., :top],
        falling.values[..., :top],
    )


def gradients(soft: SoftDistribution, logits: Logits, *others: Tensor) -> list[Tensor]:
    wanted = [x for x in (logits.queries, logits.keys, logits.bias, *others) if x is not None]
    weights = normal(*soft.embeddings.shape, seed=3, dtype=soft.embeddings.dtype)
    return list(torch.autograd.grad(soft.embeddings, wanted, weights))


def leaves(logits: Logits) -> Logits:
    bias = None if logits.bias is None else logits.bias.clone().requires_grad_()
    queries, keys = logits.queries.clone().requires_grad_(), logits.keys.clone().requires_grad_()
    return replace(logits, queries=queries, keys=keys, bias=bias)


# --- against the matrix written out -----------------------------------------------------------------------------

CASES = [
    {},
    {"bias": True},
    {"temperature": 0.6},
    {"noise": GumbelNoise(5, 0.8)},
    {"bias": True, "temperature": 1.7, "noise": GumbelNoise(6, 1.3)},
]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("options", CASES)
def test_values_and_gradients(options: dict, hard: bool, dtype: torch.dtype, tolerance: float) -> None:
    exact = {"atol": tolerance, "rtol": tolerance}
    values = normal(ENTRIES, DIM, seed=4, dtype=dtype)
    logits = leaves(make_logits(dtype, **options))
    expected = reference(logits, values, hard, top=6)
    backward = gradients(expected, logits)
    for budget in (AMPLE, tight(logits)):
        found = vocabulary_attention(logits, values, hard, top=6, memory_budget_mb=budget)
        torch.testing.assert_close(found.embeddings, expected.embeddings, **exact)
        torch.testing.assert_close(found.entropy, expected.entropy, **exact)
        torch.testing.assert_close(found.probabilities, expected.probabilities, **exact)
        assert torch.equal(found.words, expected.words)
        if hard:
            assert torch.equal(found.embeddings, values[found.words[..., 0]])
        assert not any(x.requires_grad for x in (found.entropy, found.probabilities))
        for gradient, other in zip(gradients(found, logits), backward, strict=True):
            torch.testing.assert_close(gradient, other, **exact)


@pytest.mark.parametrize("budget", [AMPLE, None])
def test_gradients_to_the_values(budget: float | None) -> None:
    logits, values = make_logits(bias=True), normal(ENTRIES, DIM, seed=4).requires_grad_()
    expected = torch.autograd.grad(reference(logits, values).embeddings.square().sum(), values)[0]
    soft = vocabulary_attention(logits, values, memory_budget_mb=budget or tight(logits))
    found = torch.autograd.grad(soft.embeddings.square().sum(), values)[0]
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_gradients_against_differences() -> None:
    inputs = [normal(7, 3), normal(10, 3, seed=1), normal(10, 2, seed=2), normal(10, seed=3)]

    def attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return tiled_attention(Logits(queries, keys, bias), values, Tiling(3, 4, described=2))[0]

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("shape", [(3, 1100), (200, 5), (30, 77), (64, 512), (200, 1100), (999, 9999)])
def test_tiles_of_any_shape(shape: tuple[int, int]) -> None:
    logits, values = leaves(make_logits(bias=True)), normal(ENTRIES, DIM, seed=4)
    expected = reference(logits, values, top=3)
    embeddings, *description = tiled_attention(logits.flat(), values, Tiling(*shape, described=70, top=3))
    torch.testing.assert_close(
        embeddings.view(BATCH, TOKENS, DIM), expected.embeddings, atol=1e-10, rtol=1e-10
    )
    for found, other in zip(
        description, (expected.entropy, expected.words, expected.probabilities), strict=True
    ):
        torch.testing.assert_close(found, other.flatten(0, 1)[:70], atol=1e-10, rtol=1e-10)
    tiled = replace(expected, embeddings=embeddings.view(BATCH, TOKENS, DIM))
    for found, other in zip(gradients(tiled, logits), gradients(expected, logits), strict=True):
        torch.testing.assert_close(found, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-3)])
@pytest.mark.parametrize("order", [1, -1])
def test_large_logits_that_rise_or_fall(order: int, dtype: torch.dtype, tolerance: float) -> None:
    """Every tile's maximum is far above (or below) that of the tiles before, with an offset that would overflow."""
    rise = torch.linspace(-900, -900 + 40 * SLACK, ENTRIES, dtype=dtype)
    rise = order * (rise + normal(ENTRIES, seed=5, dtype=dtype))
    logits, values = leaves(replace(make_logits(dtype), bias=rise)), normal(ENTRIES, DIM, seed=4, dtype=dtype)
    expected = reference(logits, values, top=4)
    found = tiled_attention(logits.flat(), values, Tiling(90, 100, BATCH * TOKENS, 4))
    soft = SoftDistribution(*(x.unflatten(0, (BATCH, TOKENS)) for x in found))
    for name in ("embeddings", "entropy", "probabilities"):
        torch.testing.assert_close(
            getattr(soft, name), getattr(expected, name), atol=tolerance, rtol=tolerance
        )
    for gradient, other in zip(gradients(soft, logits), gradients(expected, logits), strict=True):
        torch.testing.assert_close(gradient, other, atol=10 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("budget", [AMPLE, None])
def test_half_precision_is_computed_in_single(budget: float | None) -> None:
    single = make_logits(torch.float32)
    low = leaves(single.to(torch.bfloat16))
    values = normal(ENTRIES, DIM, seed=4, dtype=torch.bfloat16)
    found = vocabulary_attention(low, values, memory_budget_mb=budget or 1.25)
    assert found.embeddings.dtype == found.entropy.dtype == torch.float32
    expected = reference(low.to(torch.float32), values.float())
    torch.testing.assert_close(found.embeddings, expected.embeddings, atol=1e-5, rtol=1e-5)
    for gradient, other in zip(gradients(found, low), gradients(expected, low), strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, other, atol=1e-3, rtol=1e-2)


def test_gradients_are_taken_outside_of_autocast() -> None:
    logits, values = leaves(make_logits(torch.float32)), normal(ENTRIES, DIM, seed=4, dtype=torch.float32)
    soft = vocabulary_attention(logits, values, memory_budget_mb=tight(logits))
    expected = gradients(soft, logits)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(vocabulary_attention(logits, values, memory_budget_mb=tight(logits)), logits)
    for gradient, other in zip(found, expected, strict=True):
        assert torch.equal(gradient, other)


def test_compiled() -> None:
    """The matrix is one graph; tiles are left to run as they are."""
    values = normal(ENTRIES, DIM, seed=4)
    logits = leaves(make_logits())
    expected = vocabulary_attention(logits, values)
    for budget in (AMPLE, tight(logits)):

        def attend(queries: Tensor, keys: Tensor, budget: float = budget) -> Tensor:
            return vocabulary_attention(Logits(queries, keys), values, memory_budget_mb=budget).embeddings * 2

        compiled = torch.compile(attend, backend="eager", fullgraph=budget == AMPLE)
        doubled = compiled(logits.queries, logits.keys)
        torch.testing.assert_close(doubled / 2, expected.embeddings, atol=1e-10, rtol=1e-10)
        soft = replace(expected, embeddings=doubled / 2)
        wanted = gradients(vocabulary_attention(logits, values), logits)
        for found, other in zip(gradients(soft, logits), wanted, strict=True):
            torch.testing.assert_close(found, other, atol=1e-10, rtol=1e-10)


# --- descriptions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [AMPLE, None])
@pytest.mark.parametrize("hard", [False, True])
def test_only_what_is_wanted_is_described(hard: bool, budget: float | None) -> None:
    logits, values = make_logits(), normal(ENTRIES, DIM, seed=4)
    budget = budget or tight(logits)
    expected = reference(logits, values, hard, top=ENTRIES)
    for described, top in ((None, 3), (1, 1), (0, 2), (5, 0), (1, 10 * ENTRIES)):
        soft = vocabulary_attention(logits, values, hard, described, top, budget)
        torch.testing.assert_close(soft.embeddings, expected.embeddings, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(soft.entropy, expected.entropy[:described], atol=1e-10, rtol=1e-10)
        assert torch.equal(soft.words, expected.words[:described, :, :top])
        torch.testing.assert_close(soft.probabilities, expected.probabilities[:described, :, :top])
    torch.testing.assert_close(soft.dense(ENTRIES)[:, :, 17:19], logits.whole().softmax(-1)[:1, :, 17:19])
    with pytest.raises(
        V2FlowError, match=f"probabilities of all {ENTRIES} words, found 2; ask for top={ENTRIES}"
    ):
        vocabulary_attention(logits, values, top=2, memory_budget_mb=budget).dense(ENTRIES)


@pytest.mark.parametrize("budget", [AMPLE, None])
def test_equal_words(budget: float | None) -> None:
    """Every entry five times, in all tiles: the first is the most probable, and no word is named twice."""
    logits = make_logits()
    # Multiples of 2^-16: products and their sums are exact in double precision, in whatever order.
    queries, keys = ((x * 2**16).round() / 2**16 for x in (logits.queries, logits.keys[:220]))
    logits = Logits(queries, keys.repeat(5, 1))
    values = normal(ENTRIES, DIM, seed=4)
    shares = logits.whole().softmax(-1)
    soft = vocabulary_attention(logits, values, memory_budget_mb=budget or tight(logits))
    assert (soft.words < 220).all() and torch.equal(soft.words[..., 0], shares[..., :220].argmax(-1))
    soft = vocabulary_attention(logits, values, top=8, memory_budget_mb=budget or tight(logits))
    torch.testing.assert_close(soft.probabilities, shares.topk(8).values)
    torch.testing.assert_close(shares.gather(-1, soft.words), soft.probabilities)
    assert (soft.words.sort(-1).values.diff(dim=-1) > 0).all()
    one_entry = shares.topk(1).indices % 220
    assert (soft.words[..., :5] % 220 == one_entry).all()


# --- noise ------------------------------------------------------------------------------------------------------


def test_noise_is_gumbel() -> None:
    noise = GumbelNoise(1, 1.0).add_to(torch.zeros(1024, 4096))
    assert abs(noise.mean().item() - 0.57722) < 0.003  # standard error 0.0006
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.01  # standard error 0.002
    at = torch.linspace(-2, 8, 41)
    distribution = noise.flatten().sort().values
    found = torch.searchsorted(distribution, at) / len(distribution)
    torch.testing.assert_close(found, torch.exp(-torch.exp(-at)), atol=1.5e-3, rtol=0)
    assert torch.equal(GumbelNoise(1, 2.0).add_to(torch.zeros(1024, 4096)), 2 * noise)


def test_noise_of_blocks_tokens_entries_and_draws_is_unrelated() -> None:
    rows, columns = BLOCK["cpu"]

    def blocks(seed: int) -> Tensor:
        noise = GumbelNoise(seed, 1.0).add_to(torch.zeros(4 * rows, 4 * columns))
        return noise.view(4, rows, 4, columns).transpose(1, 2).reshape(16, rows * columns)

    # 496 pairs of 65,536 numbers: standard error 0.0039.
    pairs = torch.cat([blocks(7), blocks(8)]).corrcoef()[~torch.eye(32, dtype=torch.bool)]
    assert pairs.abs().max() < 0.02
    tokens = blocks(7).view(16, rows, columns)[3].corrcoef()
    assert tokens[~torch.eye(rows, dtype=torch.bool)].abs().max() < 5.5 / columns**0.5
    entries = blocks(7).view(16, rows, columns).transpose(0, 1).reshape(rows, -1).T[:600].corrcoef()
    assert entries[~torch.eye(600, dtype=torch.bool)].abs().max() < 5.5 / rows**0.5


def test_noise_is_the_same_in_any_tiles_and_precision() -> None:
    noise = GumbelNoise(3, 0.7)
    whole = noise.add_to(torch.zeros(300, 1300))
    for row in (0, 128, 256):
        for column in (0, 512, 1024):
            part = whole[row : row + 256, column : column + 1024]
            assert torch.equal(noise.add_to(torch.zeros(part.shape), row, column), part)
    torch.testing.assert_close(noise.add_to(torch.zeros(300, 1300).double()).float(), whole)


def test_noise_depends_on_the_generator_alone() -> None:
    draws = torch.Generator().manual_seed(4)
    seeds = [GumbelNoise.draw(1.0, draws).seed for _ in range(3)]
    torch.manual_seed(0)
    again = [GumbelNoise.draw(1.0, draws.manual_seed(4)).seed]
    assert again == seeds[:1] and len(set(seeds)) == 3
    logits, values = make_logits(noise=GumbelNoise(seeds[0], 1.0)), normal(ENTRIES, DIM, seed=4)
    first, second = (vocabulary_attention(logits, values, memory_budget_mb=tight(logits)) for _ in range(2))
    assert torch.equal(first.embeddings, second.embeddings)
    other = replace(logits, noise=GumbelNoise(seeds[1], 1.0))
    assert not torch.equal(vocabulary_attention(other, values).words, first.words)


def test_noisy_choices_follow_the_softmax() -> None:
    """argmax(logits + Gumbel noise) is a draw from softmax(logits), in tiles too: chi-square of 12,800 draws."""
    draws, entries = 12800, 600
    keys = normal(entries, 3)
    queries = normal(3, seed=1).expand(1, draws, 3)
    expected = (0.4 * queries[0, 0] @ keys.T).softmax(-1) * draws
    assert expected.min() > 5
    for amplitude, follows in ((1.0, True), (0.5, False)):
        logits = Logits(0.4 * queries, keys, noise=GumbelNoise(2, amplitude))
        soft = vocabulary_attention(logits, normal(entries, 2), memory_budget_mb=4)
        counts = soft.words.flatten().bincount(minlength=entries)
        chi_square = ((counts - expected).square() / expected).sum()
        # 599 degrees of freedom: 712 is passed once in a thousand.
        assert (chi_square < 712) == follows, chi_square


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [None, GumbelNoise(0, 1.0)])
@pytest.mark.parametrize("budget", [1.5, 4.0, 32.0])
def test_memory_stays_within_the_budget(budget: float, noise: GumbelNoise | None) -> None:
    """Forward and backward of a matrix of 8 MB, in tiles at the first two budgets."""
    inputs = [normal(4, 128, 8, dtype=torch.float32), normal(4096, 8, seed=1, dtype=torch.float32)]
    inputs, values = [x.requires_grad_() for x in inputs], normal(4096, 4, seed=4, dtype=torch.float32)
    upstream = normal(4, 128, 4, dtype=torch.float32)

    def attend() -> list[Tensor]:
        soft = vocabulary_attention(
            Logits(*inputs, noise=noise), values, described=1, memory_budget_mb=budget
        )
        return [soft.embeddings, *torch.autograd.grad(soft.embeddings, inputs, upstream)]

    returned = sum(x.nbytes for x in attend())
    small = 2**16  # statistics of rows and tiles
    peak = peak_rise(attend, torch.device("cpu")) - returned
    assert peak <= budget * 2**20 + small
    if budget < 32:
        assert peak > 0.4 * min(budget, 8) * 2**20, "a budget is there to be used"
    assert (peak >= 2 * 8 * 2**20) == (budget == 32), "the matrix where it fits"


def test_tiles_fit_the_budget_and_the_blocks() -> None:
    values = torch.empty(50_000, 64, device="meta")
    for budget in (2**20, 3 * 2**20, 2**24, 2**30):
        for tokens in (100, 129, 5000):
            tiling = fit_tiles(tokens, values, torch.float32, budget, True)
            assert tiling.tokens == tokens or tiling.tokens % BLOCK["cpu"][0] == 0
            assert tiling.entries % BLOCK["cpu"][1] == 0
            assert 8 * tiling.tokens * tiling.entries < budget


def test_a_budget_too_small_names_the_smallest() -> None:
    logits, values = make_logits(), normal(ENTRIES, DIM, seed=4)
    with pytest.raises(
        V2FlowError, match=r"memory_budget_mb: expected at least 1, for tiles.*found 0.5$"
    ) as error:
        vocabulary_attention(logits, values, memory_budget_mb=0.5)
    assert "\n" not in str(error.value)
    assert vocabulary_attention(logits, values, memory_budget_mb=1).embeddings.isfinite().all()
    with pytest.raises(V2FlowError, match="expected at least"):
        vocabulary_attention(logits, values, memory_budget_mb=0.99)


def test_the_benchmark_reports_both_ways(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "vocabulary_attention.py"
    spec = importlib.util.spec_from_file_location("vocabulary_attention_benchmark", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    options = [
        "--sizes",
        "4096x8",
        "--tokens",
        "512",
        "--key-dims",
        "4",
        "--budget-mb",
        "1",
        "--repeats",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["vocabulary_attention.py", *options])
    script.main()
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["matrix"]["extra_bytes"] > 2 * 512 * 4096 * 4 > 10 * row["tiles"]["extra_bytes"]
    assert row["tiles_to_matrix"]["extra_bytes"] < 0.1 and row["largest_relative_difference"] < 1e-5
