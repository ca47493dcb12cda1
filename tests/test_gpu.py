"""What only a CUDA GPU can show; `make test-gpu`."""

import time
from pathlib import Path

import pytest
import torch
from core_toys import pictures
from data_toys import numbered_shards

from v2flow.config import DecoderConfig, TokenizerConfig, VocabularyConfig
from v2flow.data.batches import SampleReader, TrainBatches
from v2flow.data.loaders import TrainLoader
from v2flow.data.shards import open_shards
from v2flow.masked_decoder import draw_mask
from v2flow.tokenizer import V2FlowTokenizer
from v2flow.vocabulary_logits import GumbelNoise

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


def test_masks_and_seeds_are_drawn_without_waiting_for_the_device() -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = [draw_mask(4, 64, DecoderConfig(), generator, torch.device("cuda")) for _ in range(3)]
        seeds = {GumbelNoise.draw(1.0, generator).seed for _ in range(3)}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seeds) == 3
    for mask, masked in drawn:
        assert mask.is_cuda and (mask.sum(1) == masked).all()


def test_training_batches_are_in_pinned_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "cache"))
    reader = SampleReader(open_shards(numbered_shards(tmp_path / "shards", [4]), progress=False), 8)
    (batch,) = TrainLoader(TrainBatches(reader, seed=0), batch_size=4)
    assert batch["image"].is_pinned() and batch["image"].dtype == torch.float


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
