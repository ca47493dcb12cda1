"""Ids in single precision, and again in double where two codes are nearly as near."""

import pytest
import torch
from core_toys import pictures, small_config
from torch import Tensor

import v2flow.encoding
from v2flow.config import ResamplerConfig
from v2flow.encoding import double_ids, encode_ids, nearest_codes, soft_tokens
from v2flow.tokenizer import V2FlowTokenizer
from v2flow.vocabulary_attention import SoftDistribution

RESAMPLERS = {
    "keys": {},
    "linear": {"readout": "linear"},
    "none": {"readout": "none", "key_dim": 6},
    "in tiles": {"memory_budget_mb": 1},
    "hard": {"readout": "linear", "hard": True},
    "patches alone": {"depth": 0, "token_grid": [4, 4]},
}


def small_model(**options: object) -> V2FlowTokenizer:
    torch.manual_seed(0)
    given = {"width": 16, "depth": 1, "token_grid": [4, 2], "key_dim": 8} | options
    model = V2FlowTokenizer(small_config(resampler=ResamplerConfig(**given))).eval()
    latents = model.codec.encode(pictures(64, seed=5))
    tokens = model.resampler(latents, described=0).embeddings.detach().flatten(0, 1)
    model.visual_vocabulary.codes.copy_(
        torch.nn.functional.normalize(tokens[:: len(tokens) // 32][:32], dim=-1)
    )
    return model


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens were computed in double precision, call by call."""
    counts: list[int] = []

    def counting(
        resampler: object, latents: Tensor, dtype: torch.dtype, **options: object
    ) -> SoftDistribution:
        found = soft_tokens(resampler, latents, dtype, **options)
        if dtype == torch.float64:
            counts.append(found.embeddings[..., 0].numel())
        return found

    monkeypatch.setattr(v2flow.encoding, "soft_tokens", counting)
    return counts


@pytest.mark.parametrize("name", RESAMPLERS)
def test_ids_are_those_of_double_precision(name: str, recomputed: list[int]) -> None:
    model = small_model(**RESAMPLERS[name])
    latents = model.codec.encode(pictures(96, seed=7))
    codes = model.visual_vocabulary.codes
    ids = encode_ids(model.resampler, codes, latents)
    assert sum(recomputed) == 96 * 8 if name == "hard" else sum(recomputed) < 24
    assert torch.equal(ids, double_ids(model.resampler, codes, latents)) and len(ids.unique()) > 5


def test_equal_patches_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tokens without convolutions one of each kind; the ids are those of all."""
    model = small_model(depth=0, token_grid=[4, 4])
    images = pictures(8, seed=7)
    images[:, :, :8] = 1.0  # the upper half is white
    images[4:] = images[:4]
    latents, codes = model.codec.encode(images), model.visual_vocabulary.codes
    computed: list[int] = []

    def counting(*words: object, **options: object) -> SoftDistribution:
        found = soft_tokens(*words, **options)  # type: ignore[arg-type]
        computed.append(found.embeddings[..., 0].numel())
        return found

    with monkeypatch.context() as patch:
        patch.setattr(v2flow.encoding, "soft_tokens", counting)
        ids = encode_ids(model.resampler, codes, latents)
    assert computed[0] == 1 + 4 * 8 and torch.equal(ids, double_ids(model.resampler, codes, latents))
    assert len(ids.unique()) > 5 and torch.equal(ids[4:], ids[:4]) and len(ids[:, :8].unique()) == 1


def test_a_token_between_two_codes_is_computed_in_double(recomputed: list[int]) -> None:
    model = small_model()
    latents = model.codec.encode(pictures(40, seed=8))
    token = soft_tokens(model.resampler, latents, torch.float64, described=0).embeddings[3, 5]
    direction = torch.nn.functional.normalize(token, dim=0)
    aside = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    aside = torch.nn.functional.normalize(aside - (aside @ direction) * direction, dim=0)
    # Two codes on either side of the token, the second nearer by less than single precision can tell.
    codes = torch.randn(32, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    codes[7], codes[2] = direction + 0.3 * aside, direction - 0.3 * (1 - 1e-9) * aside
    codes = torch.nn.functional.normalize(codes, dim=-1)
    for order in (torch.arange(40), torch.arange(39, -1, -1)):
        recomputed.clear()
        ids = encode_ids(model.resampler, codes, latents[order])
        assert ids[order == 3][0, 5] == 2
        assert 1 <= sum(recomputed) < 10


def test_the_lead_is_over_the_second_code() -> None:
    codes = torch.eye(3)
    ids, lead = nearest_codes(torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]]), codes)
    assert ids.tolist() == [[1, 2]] and lead[0].tolist() == pytest.approx([0.2, 1.0])
    ids, lead = nearest_codes(torch.ones(1, 2, 3), codes[:1])
    assert ids.tolist() == [[0, 0]] and (lead > 1).all()
    ids, lead = nearest_codes(torch.ones(1, 1, 3), codes[[0, 0, 0]])
    assert ids.tolist() == [[0]] and lead.tolist() == [[0.0]]


def test_ids_and_soft_tokens_agree() -> None:
    model = small_model()
    images = pictures(48, seed=9)
    assert torch.equal(model.encode(images), model.encode(images, return_soft=True).ids)
