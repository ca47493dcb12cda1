"""One tokenizer on several domains: the figures are those of each domain alone, and mistakes name the domain."""

from pathlib import Path

import numpy as np
import pytest
import torch
from core_toys import pictures, small_config
from data_toys import encode, write_tar

from v2flow import V2FlowTokenizer
from v2flow.errors import V2FlowError
from v2flow.metrics.codebook import codebook_statistics
from v2flow.metrics.features import KID_MINIMUM
from v2flow.metrics.reconstruction import psnr_per_image
from v2flow.probes.domains import default_domains, evaluate_domains

MODES = {"one_step": {"steps": 1, "temperature": 0.0}, "sampled": {"steps": 2}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture(scope="module")
def tokenizer() -> V2FlowTokenizer:
    torch.manual_seed(0)
    return V2FlowTokenizer(small_config()).eval()


def _shards(folder: Path, images: np.ndarray, name: str = "test-000000.tar") -> str:
    """A shard of uint8 pictures [n, H, W, 3]."""
    return write_tar(folder / name, [(f"{i:04d}.png", encode(image)) for i, image in enumerate(images)])


def _uint8(count: int, seed: int, size: int = 16) -> np.ndarray:
    return pictures(count, seed, size).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_figures_of_each_domain_are_those_worked_out_directly(
    tokenizer: V2FlowTokenizer, tmp_path: Path
) -> None:
    images = {"smooth": _uint8(7, seed=1), "dark": _uint8(5, seed=2) // 4}
    shards = {name: _shards(tmp_path / name, value) for name, value in images.items()}
    found = evaluate_domains(tokenizer, shards, MODES, batch_size=4, device="cpu", features=False)
    assert list(found) == ["smooth", "dark"]
    for name, value in images.items():
        originals = torch.from_numpy(value).permute(0, 3, 1, 2).float() / 255
        ids = tokenizer.encode(originals)
        psnr = psnr_per_image(originals, tokenizer.decode(ids, **MODES["one_step"])).mean().item()
        figures = found[name]["modes"]["one_step"]
        assert found[name]["images"] == len(value)
        assert figures["psnr"] == pytest.approx(psnr, abs=1e-4)
        assert figures["psnr_pooled"] <= figures["psnr"] and -1 <= figures["ssim"] <= 1
        usage = codebook_statistics(torch.bincount(ids.flatten(), minlength=32))
        assert found[name]["codebook"] == {"size": 32} | usage
        assert found[name]["protocol"]["domain"] == found[name]["protocol"]["set"] == name
    assert found["smooth"]["modes"]["one_step"]["psnr"] != found["dark"]["modes"]["one_step"]["psnr"]


def test_a_domain_scores_the_same_in_any_company(tokenizer: V2FlowTokenizer, tmp_path: Path) -> None:
    first, second = (_shards(tmp_path / str(seed), _uint8(6, seed)) for seed in (1, 2))
    together = evaluate_domains(
        tokenizer, {"a": first, "b": [second]}, MODES, batch_size=4, device="cpu", features=False
    )
    alone = evaluate_domains(tokenizer, {"b": [second]}, MODES, batch_size=4, device="cpu", features=False)
    assert alone["b"] == together["b"]


def test_pictures_of_another_size_and_a_limit(tokenizer: V2FlowTokenizer, tmp_path: Path) -> None:
    shards = _shards(tmp_path / "large", _uint8(6, seed=3, size=40))
    found = evaluate_domains(tokenizer, {"large": shards}, MODES, limit=4, device="cpu", features=False)
    protocol = found["large"]["protocol"]
    assert found["large"]["images"] == protocol["limit"] == 4
    assert (protocol["height"], protocol["width"]) == (16, 16)


def test_kernel_distance_from_enough_pictures_on(tokenizer: V2FlowTokenizer, tmp_path: Path) -> None:
    shards = {
        "few": _shards(tmp_path / "few", _uint8(KID_MINIMUM - 1, seed=4)),
        "enough": _shards(tmp_path / "enough", _uint8(6, seed=5)),
    }
    modes = {"one_step": MODES["one_step"]}
    found = evaluate_domains(tokenizer, shards, modes, device="cpu")
    name = "kid-efficientnet-lite0"
    assert name not in found["few"]["modes"]["one_step"] and name in found["few"]["notes"]
    assert found["enough"]["modes"]["one_step"][f"{name}_se"] > 0
    assert name not in found["enough"]["notes"]


def test_mistakes_name_the_domain_before_anything_is_scored(
    tokenizer: V2FlowTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = _shards(tmp_path / "good", _uint8(3, seed=6))
    monkeypatch.setattr(tokenizer, "encode", lambda images: pytest.fail("a domain was scored"))
    with pytest.raises(V2FlowError, match=r"^domain lost: .*none"):
        evaluate_domains(tokenizer, {"good": good, "lost": str(tmp_path / "none-*.tar")}, MODES, device="cpu")
    with pytest.raises(V2FlowError, match="at least one domain"):
        evaluate_domains(tokenizer, {}, MODES)


def test_default_domains_are_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, shared = tmp_path / "data", tmp_path / "photographs"
    assert default_domains(root, shared) == {}
    image = _uint8(1, seed=7)
    for folder in (root / "openmoji", root / "domains" / "retina", shared / "cifar10"):
        _shards(folder, image)
        _shards(folder, image, "train-000000.tar")
    _shards(shared / "imagenet-sample", image, "val-000000.tar")
    _shards(root / "domains" / "faces", image, "val-000000.tar")  # no test shard
    expected = {
        "openmoji": str(root / "openmoji" / "test-*.tar"),
        "cifar10": str(shared / "cifar10" / "test-*.tar"),
        "imagenet": str(shared / "imagenet-sample" / "val-*.tar"),
        "retina": str(root / "domains" / "retina" / "test-*.tar"),
    }
    assert default_domains(root, shared) == expected
    monkeypatch.setenv("V2FLOW_DATA", str(shared))
    assert default_domains(root) == expected
    monkeypatch.delenv("V2FLOW_DATA")
    monkeypatch.chdir(tmp_path)
    assert "cifar10" not in default_domains(root)
    (tmp_path / "clone").mkdir()
    (tmp_path / "shared").mkdir()
    shared.rename(tmp_path / "shared" / "data")
    monkeypatch.chdir(tmp_path / "clone")
    assert default_domains(root)["cifar10"] == "../shared/data/cifar10/test-*.tar"
