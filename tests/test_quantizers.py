"""The library's quantizers behind one interface: ids and codes agree, all of equal bits, each one learns."""

import math
from typing import get_args

import pytest
import torch
from core_toys import pictures
from test_baseline import psnr, vq_config

from v2flow.baselines.quantizers import Kind, Quantizer, fsq_levels
from v2flow.baselines.vq_autoencoder import VQAutoencoder
from v2flow.errors import V2FlowError

KINDS = get_args(Kind)


def make(kind: str, size: int = 64) -> Quantizer:
    torch.manual_seed(0)
    return Quantizer(vq_config(quantizer=kind, codebook_size=size))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_look_up_the_codes_that_were_used(kind: str) -> None:
    quantizer = make(kind).eval()
    x = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(1))
    codes, ids, loss = quantizer(x)
    assert codes.shape == x.shape and ids.shape == (3, 50) and ids.dtype == torch.long and loss.ndim == 0
    assert ids.min() >= 0 and ids.max() < 64 and len(ids.unique()) > 8
    torch.testing.assert_close(quantizer.lookup(ids), codes, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_id_has_a_code_of_its_own(kind: str) -> None:
    """All of them carry log2(K) bits: rows of a benchmark compare."""
    codes = make(kind).eval().lookup(torch.arange(64).reshape(1, 64))[0]
    assert codes.shape == (64, 8)
    distances = torch.cdist(codes, codes) + torch.eye(64)
    assert distances.min() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_is_learned_from_its_ids(kind: str) -> None:
    torch.manual_seed(0)
    model = VQAutoencoder(vq_config(width=32, codebook_size=64, quantizer=kind)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    images = pictures(4)
    for _ in range(100):
        optimizer.zero_grad()
        total, terms = model.losses(images)
        total.backward()
        optimizer.step()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    ids = model.encode(images)
    assert torch.equal(model.encode(images.flip(0)), ids.flip(0))
    assert psnr(model.decode(ids), images) > 20
    assert psnr(model.decode(ids.roll(1, 0)), images) < 15


def test_levels_by_hand() -> None:
    assert fsq_levels(1024) == [4] * 5 and fsq_levels(512) == [4, 4, 4, 8] and fsq_levels(8) == [8]
    assert all(math.prod(fsq_levels(2**b)) == 2**b for b in range(2, 20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": "fsq", "codebook_size": 1000}, "power of two .*found 1000; 1024 is the nearest"),
        ({"quantizer": "rvq", "codebook_size": 512}, "square .*found 512; 529 is the nearest"),
        ({"quantizer": "pq"}, "option quantizer: expected one of vq, .*found 'pq'"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(V2FlowError, match=message):
        vq_config(**options)
