"""benchmarks/token_locality.py: by hand, and on tokenizers with and without a context."""

import json
import sys
from math import log
from pathlib import Path

import pytest
import torch
from core_toys import small_config
from data_toys import encode, write_tar

from v2flow.config import ResamplerConfig
from v2flow.tokenizer import V2FlowTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import token_locality


def test_figures_by_hand() -> None:
    """Patch a gets the ids 0, 0, 1, 1 and patch b always 2; c occurs once and says nothing."""
    found = token_locality.locality([0, 0, 1, 1, 2, 2, 3], [*[b"a"] * 4, b"b", b"b", b"c"])
    assert found["given_patch"] == pytest.approx(4 / 6 * log(2)) and found["most_frequent_id"] == 4 / 6
    assert found["repeated_tokens"] == 6 and found["patches"] == 3 and found["ids"] == 4
    shares = [2 / 7, 2 / 7, 2 / 7, 1 / 7]
    assert found["entropy"] == pytest.approx(-sum(p * log(p) for p in shares))


def test_patches_are_the_pixels_of_the_grid_row_by_row() -> None:
    picture = torch.arange(3 * 16 * 16).remainder(251).to(torch.uint8).reshape(1, 3, 16, 16)
    cells = token_locality.patches(picture, (4, 4))
    assert len(cells) == 16 and cells[6] == picture[0, :, 4:8, 8:12].contiguous().numpy().tobytes()


@pytest.mark.parametrize("depth", [0, 2])
def test_without_convolutions_equal_patches_get_equal_ids(
    depth: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures of two colours on a grid of patches: few different patches in many surroundings."""
    draws = torch.Generator().manual_seed(0)
    members = []
    for index in range(12):
        cells = torch.randint(0, 2, (4, 4, 1), generator=draws).mul(200).expand(4, 4, 3)
        pixels = cells.repeat_interleave(4, 0).repeat_interleave(4, 1).to(torch.uint8)
        members.append((f"{index:03d}.png", encode(pixels.numpy())))
    shards = write_tar(tmp_path / "test-000000.tar", members)
    torch.manual_seed(0)
    config = small_config(resampler=ResamplerConfig(width=16, depth=depth, token_grid=[4, 4], key_dim=8))
    V2FlowTokenizer(config).save_pretrained(tmp_path / "tokenizer")
    token_locality.main([str(tmp_path / "tokenizer"), "--data", shards])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]
    assert found["tokens"] == 12 * 16 and found["patches"] == 2 and found["resampler"]["depth"] == depth
    assert found["given_patch"] == 0 if depth == 0 else found["given_patch"] > 0.5
