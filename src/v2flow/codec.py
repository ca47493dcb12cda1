"""Image codecs: pixels to latents of about unit scale and back.

A codec is frozen: it has no trainable parameters, stays in evaluation mode, and its weights are named, not stored,
in checkpoints.
"""

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from v2flow.arrays import AnyPictures, Latents
from v2flow.config import CodecConfig
from v2flow.downloads import downloads_refused, why_local
from v2flow.errors import V2FlowError, first_line


class ImageCodec(nn.Module):
    """Base of all codecs.

    Attributes:
        channels: channels C of a latent position.
        downsample: pixels a side of one latent position.
    """

    channels: int
    downsample: int

    def encode(self, images: AnyPictures) -> Latents:
        """Images `[B, 3, H, W]` in [0, 1] to latents `[B, C, H/downsample, W/downsample]`."""
        raise NotImplementedError

    def decode(self, latents: Latents) -> AnyPictures:
        """Latents to images `[B, 3, H, W]`; values may leave [0, 1] a little."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256 of the frozen weights, which no checkpoint holds; empty for a codec without any."""
        return ""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of pictures of this size.

        Raises:
            V2FlowError: a side that is not a multiple of `downsample`.
        """
        step = self.downsample
        if height % step or width % step or min(height, width) < step:
            near = max(round(height / step), 1) * step, max(round(width / step), 1) * step
            raise V2FlowError(
                f"image size {height}x{width}: this codec takes multiples of {step}; the nearest is {near[0]}x{near[1]}"
            )
        return self.channels, height // step, width // step


class PatchCodec(ImageCodec):
    """Pixel patches: (x − shift)·scale, unfolded in the order of `pixel_unshuffle` (channel, row, column)."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.downsample, self.scale, self.shift = config.patch_size, config.scale, config.shift
        self.channels = 3 * config.patch_size**2

    def encode(self, images: AnyPictures) -> Latents:
        """Pictures [B, 3, H, W] in [0, 1] to latents [B, 3·p², H/p, W/p] for patches of p pixels."""
        self.latent_shape(*images.shape[-2:])
        return F.pixel_unshuffle((images - self.shift) * self.scale, self.downsample)

    def decode(self, latents: Latents) -> AnyPictures:
        """Latents [B, 3·p², h, w] to pictures [B, 3, h·p, w·p]; exact inverse of `encode`."""
        return F.pixel_shuffle(latents, self.downsample) / self.scale + self.shift


class FrozenAutoencoder(ImageCodec):
    """A frozen diffusers autoencoder; takes pixels in [-1, 1], latents are multiplied by `scale`.

    The autoencoder is held, not registered as a part: no state_dict, checkpoint, optimiser or weight average of a
    module around it contains its weights, and copies of this codec share them. It follows the codec's device and
    dtype, and is always in evaluation mode.
    """

    def __init__(self, autoencoder: nn.Module, channels: int, downsample: int, scale: float) -> None:
        super().__init__()
        # Inside a tuple torch does not find it.
        self._held = (autoencoder.requires_grad_(False).eval(),)
        self._fingerprint: str | None = None
        self.channels, self.downsample, self.scale = channels, downsample, scale

    @property
    def autoencoder(self) -> Any:
        """The diffusers model."""
        return self._held[0]

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenAutoencoder":
        self.autoencoder._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenAutoencoder":
        return FrozenAutoencoder(self.autoencoder, self.channels, self.downsample, self.scale)

    def fingerprint(self) -> str:
        """SHA-256 of the autoencoder's weights."""
        if self._fingerprint is None:
            self._fingerprint = _hash_weights(self.autoencoder)
        return self._fingerprint

    @torch.no_grad()
    def encode(self, images: AnyPictures) -> Latents:
        """Pictures [B, 3, H, W] in [0, 1] to latents [B, C, h, w]; of a KL autoencoder the mode."""
        self.latent_shape(*images.shape[-2:])
        encoded = self.autoencoder.encode(images * 2 - 1)
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        return latents * self.scale

    @torch.no_grad()
    def decode(self, latents: Latents) -> AnyPictures:
        """Latents [B, C, h, w] to pictures [B, 3, H, W], about [0, 1] and not clamped."""
        return self.autoencoder.decode(latents / self.scale).sample / 2 + 0.5


def _hash_weights(module: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and values of a module's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.is_meta:
            return "meta"
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# The published architecture of the reference's DC-AE (32 latent channels, 32 pixels a position).
_DC_F32C32: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "upsample_block_type": "interpolate",
}


# The published architecture of Stable Diffusion's autoencoder (4 latent channels, 8 pixels a position).
_KL_F8: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
}


def build_codec(config: CodecConfig, weights: bool = True) -> ImageCodec:
    """The codec that the configuration names.

    Args:
        weights: false builds the architecture alone (for size estimates on the meta device).

    Raises:
        V2FlowError: no path given, or nothing that diffusers can load lies there.
    """
    if config.kind == "patch":
        return PatchCodec(config)
    from diffusers import AutoencoderDC, AutoencoderKL

    kind: Any = AutoencoderDC if config.kind == "dc" else AutoencoderKL
    architecture = _DC_F32C32 if config.kind == "dc" else _KL_F8
    autoencoder = _load(kind, config) if weights else kind(**architecture)
    blocks = autoencoder.config.get("encoder_block_out_channels") or autoencoder.config["block_out_channels"]
    return FrozenAutoencoder(
        autoencoder, autoencoder.config["latent_channels"], 2 ** (len(blocks) - 1), config.scale
    )


def _load(kind: Any, config: CodecConfig) -> Any:
    if config.path is None:
        raise V2FlowError(
            f"option codec.path: kind {config.kind!r} needs a folder or hub id of a {kind.__name__}"
        )
    try:
        return kind.from_pretrained(config.path, local_files_only=downloads_refused())
    except Exception as error:
        reason = first_line(error)
        raise V2FlowError(
            f"option codec.path: {config.path!r} is not a loadable {kind.__name__} ({reason}); "
            f"give a folder made by save_pretrained or a hub id that this machine can reach{why_local(config.path)}"
        ) from error
