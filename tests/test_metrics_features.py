"""Feature networks: EfficientNet-Lite0 under torch-fidelity, Inception and LPIPS when there, the feature cache."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.models import alexnet
from torchvision.models._meta import _IMAGENET_CATEGORIES

from v2flow.errors import V2FlowError
from v2flow.metrics import extractors
from v2flow.metrics.distances import FeatureSet, frechet_distance, kernel_distance
from v2flow.metrics.extractors import FeatureNetwork, efficientnet, inception
from v2flow.metrics.features import FeatureDistances, cached_features, load_networks, picture_digests
from v2flow.metrics.reconstruction import to_uint8


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return efficientnet(32)


@pytest.fixture(scope="module")
def photographs(shared_data: Path) -> torch.Tensor:
    """The first 48 CIFAR-10 test pictures, uint8 [48, 3, 32, 32]."""
    pictures = []
    with tarfile.open(shared_data / "cifar10" / "test-000000.tar") as tar:
        for member in tar:
            if member.name.endswith(".jpg") and len(pictures) < 48:
                file = tar.extractfile(member)
                assert file is not None
                pictures.append(np.array(Image.open(io.BytesIO(file.read())).convert("RGB")))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def blurred(photographs: torch.Tensor) -> torch.Tensor:
    return to_uint8(torch.nn.functional.avg_pool2d(photographs / 255.0, 3, 1, 1))


def write_folder(folder: Path, pictures: torch.Tensor) -> str:
    folder.mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{index:03d}.png")
    return str(folder)


def test_same_figures_as_stock_torch_fidelity_on_folders(
    tmp_path: Path, network: FeatureNetwork, photographs: torch.Tensor, blurred: torch.Tensor
) -> None:
    stock = torch_fidelity.calculate_metrics(
        input1=write_folder(tmp_path / "real", photographs),
        input2=write_folder(tmp_path / "made", blurred),
        feature_extractor="efficientnet-lite0-128",
        fid=True, kid=True, kid_subsets=1, kid_subset_size=48, cuda=False, save_cpu_ram=True, cache=False,
        verbose=False,
    )  # fmt: skip
    real, made = network.features(photographs), network.features(blurred)
    collected = []
    for rows in (real, made):
        collected.append(FeatureSet(network.dimension))
        collected[-1].update(rows)
    frechet = frechet_distance(collected[0].collect()[1], collected[1].collect()[1])
    distance = kernel_distance(real, made, paired=True).value
    assert distance == pytest.approx(stock["kernel_inception_distance_mean"], abs=1e-3)
    assert frechet == pytest.approx(stock["frechet_inception_distance"], rel=1e-3)
    assert distance > 0.05 and frechet > 10


def test_noise_is_far_and_the_pictures_themselves_are_not(
    network: FeatureNetwork, photographs: torch.Tensor
) -> None:
    noise = torch.randint(
        0, 256, photographs.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    distances = FeatureDistances([network], ["same", "noise"], torch.device("cpu"))
    distances.update(photographs, picture_digests(photographs), {"same": photographs, "noise": noise})
    figures, real_vs_real, notes = distances.compute()
    assert figures["same"]["kid-efficientnet-lite0_u"] == pytest.approx(0.0, abs=1e-9)
    assert figures["noise"]["kid-efficientnet-lite0"] > 1.0
    assert abs(real_vs_real["kid-efficientnet-lite0"]) < 4 * real_vs_real["kid-efficientnet-lite0_se"]
    assert "rfd-efficientnet-lite0" not in figures["noise"]
    assert (
        notes["rfd-efficientnet-lite0"].startswith("48 pictures")
        and "2560" in notes["rfd-efficientnet-lite0"]
    )


def test_frechet_appears_at_2560_pictures(network: FeatureNetwork) -> None:
    distances = FeatureDistances([network], ["near"], torch.device("cpu"))
    rows = torch.randn(2560, 1280, generator=torch.Generator().manual_seed(1))
    distances.real[0].update(rows)
    distances.modes["near"][0].update(rows + 0.1)
    figures, _, notes = distances.compute()
    assert figures["near"]["rfd-efficientnet-lite0"] == pytest.approx(0.1**2 * 1280, rel=1e-3)
    assert notes == {}


def test_the_network_recognises_photographs(shared_data: Path) -> None:
    """Its own classifier on top of the features names most pictures: preprocessing and weights fit together."""
    pictures, labels = [], []
    with tarfile.open(shared_data / "imagenet-sample" / "val-000000.tar") as tar:
        members = {member.name: member for member in tar.getmembers()[:64]}
        for name in members:
            caption = tar.extractfile(members[name.replace(".jpg", ".txt")]).read().decode()  # type: ignore[union-attr]
            word = caption.strip().removeprefix("a photo of ")
            if name.endswith(".jpg") and _IMAGENET_CATEGORIES.count(word) == 1:
                labels.append(_IMAGENET_CATEGORIES.index(word))
                file = tar.extractfile(members[name])
                assert file is not None
                pictures.append(np.array(Image.open(file).convert("RGB")))
    network = efficientnet(256)
    features = network.features(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))
    found = network.network.network._fc(features).argmax(1)  # type: ignore[union-attr, operator]
    right = (found == torch.tensor(labels)).float().mean().item()
    assert len(labels) >= 24 and right > 0.65


def test_resolution_follows_the_size_of_the_pictures() -> None:
    assert [efficientnet(size).resolution for size in (32, 64, 65, 256)] == [128, 128, 224, 224]
    assert efficientnet(64).identity == "efficientnet-lite0-128-57934424-v1"


def test_extractor_wants_8_bit_pictures(network: FeatureNetwork) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        network.features(torch.rand(1, 3, 32, 32))
    assert network.features(torch.zeros(0, 3, 32, 32, dtype=torch.uint8)).shape == (0, 1280)


def test_cache_is_named_by_content_and_survives_damage(
    tmp_path: Path, network: FeatureNetwork, photographs: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = photographs[:4]
    first = cached_features(network, pictures, picture_digests(pictures), tmp_path)
    (file,) = tmp_path.rglob("*.npy")
    assert file.parent.name == network.identity and file.name.endswith("-4x32x32.npy")
    np.save(file, first.numpy() + 1)
    read = cached_features(network, pictures, picture_digests(pictures), tmp_path)
    assert torch.equal(read, first + 1)  # it is really read
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(cached_features(network, pictures, picture_digests(pictures), tmp_path), first)
    same_first = torch.cat([pictures[:1], photographs[10:13]])
    for other in (
        same_first,
        photographs[:3],
        photographs[:4].flip(0),
        photographs[:4, :, :24, :24],
        pictures // 2,
    ):
        cached_features(network, other, picture_digests(other), tmp_path)
    assert len(list(tmp_path.rglob("*.npy"))) == 6
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "elsewhere"))
    cached_features(network, pictures, picture_digests(pictures), None)
    assert len(list((tmp_path / "elsewhere" / "features").rglob("*.npy"))) == 1


def test_a_cache_that_cannot_be_written_is_only_a_warning(
    tmp_path: Path, network: FeatureNetwork, photographs: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    pictures = photographs[:2]
    found = cached_features(network, pictures, picture_digests(pictures), tmp_path / "file")
    assert torch.equal(found, network.features(pictures))
    assert "not cached" in caplog.text


def test_without_weights_the_notes_say_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = load_networks(32, 32)
    assert [network.kid for network in found.networks] == ["kid-efficientnet-lite0"] and found.lpips is None
    assert "weights-inception-2015-12-05-6726825d.pth not found: download https://" in found.notes["rfid"]
    assert "alexnet-owt-7be5be79.pth not found: download https://" in found.notes["lpips"]
    assert "smaller than" in load_networks(16, 16).notes["lpips"]
    assert not any("\n" in note for note in found.notes.values())


def test_foreign_inception_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(V2FlowError, match="inception_weights: weights file .* not found"):
        inception(path)
    path.write_bytes(b"cut short")
    with pytest.raises(V2FlowError, match="damaged or another file .*expected 6726825d"):
        inception(path)


class _RandomInception(FeatureExtractorInceptionV3):
    def load_state_dict(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        return None


def test_inception_figures_are_stock_torch_fidelitys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: torch.Tensor, blurred: torch.Tensor
) -> None:
    """With random weights under a name that carries their hash, since the real ones cannot be downloaded here."""
    torch.save({}, tmp_path / "empty.pth")
    torch.manual_seed(0)
    stock = _RandomInception(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth")
    )
    torch.save(stock.state_dict(), tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(extractors, "INCEPTION_FILE", f"weights-{digest}.pth")
    network = inception(tmp_path / "weights.pth")
    assert isinstance(network, FeatureNetwork)
    distances = FeatureDistances([network], ["blur"], torch.device("cpu"), tmp_path / "cache")
    distances.update(photographs[:5], picture_digests(photographs[:5]), {"blur": blurred[:5]})
    figures, _, notes = distances.compute()
    rows = [stock(pictures)[0] for pictures in (photographs[:5], blurred[:5])]
    assert figures["blur"]["kid-inception"] == pytest.approx(
        kernel_distance(*rows, paired=True).value, rel=1e-3
    )
    assert "4096" in notes["rfid"]


def test_lpips_is_used_when_its_weights_are_in_the_hub_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / extractors.LPIPS_FILE
    file.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), file)
    assert "damaged or another file" in load_networks(32, 32).notes["lpips"]
    monkeypatch.setattr(extractors, "weights_problem", lambda path, name: None if path == file else "none")
    network = load_networks(32, 32).lpips
    assert network is not None
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    distances = network(images, images.flip(0), normalize=True).flatten()
    assert len(distances) == 2 and (distances > 0).all()
    assert network(images, images, normalize=True).abs().max() == 0
