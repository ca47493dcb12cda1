"""What only a CUDA GPU can show; `make test-gpu`."""

import time

import pytest
import torch
from core_toys import pictures

from v2flow.config import TokenizerConfig, VocabularyConfig
from v2flow.tokenizer import V2FlowTokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def trained() -> V2FlowTokenizer:
    """A tokenizer of the CPU experiments' size after a few steps on smooth pictures."""
    torch.manual_seed(0)
    model = V2FlowTokenizer(TokenizerConfig(vocabulary=VocabularyConfig(source="random", size=512))).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = pictures(16, size=32).cuda()
    for _ in range(50):
        optimizer.zero_grad()
        model.losses(images).total.backward()
        optimizer.step()
    return model.eval()


def test_bf16_decoding_agrees_with_fp32(trained: V2FlowTokenizer) -> None:
    ids = trained.encode(pictures(16, size=32).cuda())
    low = trained.decode(ids, torch.Generator().manual_seed(0), steps=8).cpu()
    high = trained.cpu().decode(ids.cpu(), torch.Generator().manual_seed(0), steps=8)
    trained.cuda()
    assert -10 * (low - high).square().mean().log10() >= 35


def test_ids_agree_with_the_cpu(trained: V2FlowTokenizer) -> None:
    images = pictures(16, size=32)
    ids = trained.encode(images.cuda()).cpu()
    assert torch.equal(ids, trained.cpu().encode(images))
    trained.cuda()


def test_the_compiled_field_gives_the_same_velocity(trained: V2FlowTokenizer) -> None:
    field = trained.head.field
    x = torch.randn(4, 64, 48, device="cuda")
    t = torch.full((4, 64), 0.5, device="cuda")
    condition = torch.randn(4, 64, trained.config.decoder.width, device="cuda")
    known = torch.zeros(4, 64, dtype=torch.bool, device="cuda")
    with torch.no_grad():
        expected, found = (f(x, t, condition, known) for f in (field, torch.compile(field)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_training_step_is_faster_than_on_the_cpu(trained: V2FlowTokenizer) -> None:
    """Not a benchmark: a ratio far from any doubt shows that the step really runs on the GPU."""

    def seconds(device: str) -> float:
        model, images = trained.to(device), pictures(32, size=32).to(device)
        for timed in (False, True):
            start = time.perf_counter()
            model.losses(images).total.backward()
            if device == "cuda":
                torch.cuda.synchronize()
            if timed:
                return time.perf_counter() - start
        raise AssertionError

    assert seconds("cpu") > 2 * seconds("cuda")
