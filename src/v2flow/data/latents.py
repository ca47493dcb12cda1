"""Shards of codec latents: pictures and their mirror images, encoded once for the training of stage 1.

Samples are KEY.safetensors beside the picture's own txt, json and cls. It holds one tensor `latents` [M, C, h, w], the
picture's latents and behind them those of its mirror image (M = 1 without), and names the codec in its metadata.
Shard i of a split has the samples of its i-th shard of pictures, so that both are trained on in the same order. In the
manifest the place of the safetensors member stands where that of the picture would.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from v2flow.codec import ImageCodec
from v2flow.config import CodecConfig
from v2flow.data.batches import Reader
from v2flow.data.decode import BadSampleError
from v2flow.data.manifest import FIELDS, MANIFEST
from v2flow.data.shard_names import folder_of
from v2flow.data.shards import ShardSet, folder_manifest
from v2flow.errors import V2FlowError

DTYPES = {"fp16": ("F16", torch.float16), "bf16": ("BF16", torch.bfloat16), "fp32": ("F32", torch.float32)}
"""Name of a way to store latents -> its name in safetensors, and in torch."""
MAX_HEADER = 4096
"""Most bytes of a member beside its tensor; ours have about 400."""
MEMBER = "safetensors"
PLACE = FIELDS.index("image")


@dataclass(frozen=True)
class LatentSource:
    """The codec that latents belong to, and the pictures' size.

    Attributes:
        codec: its kind.
        codec_sha256: of its frozen weights, see `ImageCodec.fingerprint`.
        channels: see `ImageCodec`.
        downsample: see `ImageCodec`.
        scale: see `CodecConfig`.
        shift: see `CodecConfig`.
        image_size: side of the square pictures in pixels.
    """

    codec: str
    codec_sha256: str
    channels: int
    downsample: int
    scale: float
    shift: float
    image_size: int


_MEANINGS = {
    "codec": "the codec's kind is",
    "image_size": "the image size is",
    "downsample": "the patch size, or pixels a latent, is",
    "channels": "the number of latent channels is",
    "scale": "the codec's scale is",
    "shift": "the codec's shift is",
    "codec_sha256": "the SHA-256 of the codec's weights is",
}


def source_of(config: CodecConfig, codec: ImageCodec, image_size: int) -> LatentSource:
    """What latents of this codec say of it.

    Raises:
        V2FlowError: a size that the codec does not take.
    """
    codec.latent_shape(image_size, image_size)
    scale, shift = float(config.scale), float(config.shift)
    weights = codec.fingerprint()
    return LatentSource(config.kind, weights, codec.channels, codec.downsample, scale, shift, image_size)


def check_source(found: LatentSource, expected: LatentSource) -> None:
    """Refuse latents of another codec than the experiment's.

    Raises:
        V2FlowError: what differs.
    """
    for name, what in _MEANINGS.items():
        if getattr(found, name) != getattr(expected, name):
            stored, wanted = (str(getattr(source, name))[:12] or "none" for source in (found, expected))
            raise V2FlowError(
                f"option data.train: {what} {stored} in the cached latents and {wanted} in the experiment; name the "
                "codec that encoded them, or encode the pictures again with `v2flow data latents`"
            )


@dataclass(frozen=True)
class LatentFormat:
    """How latents are stored.

    Attributes:
        codec_name: `patch`, or the last part of the autoencoder's path or hub id; for people.
        source: the codec.
        dtype: a key of `DTYPES`.
        flip: whether mirror images are there.
    """

    codec_name: str
    source: LatentSource
    dtype: str
    flip: bool

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """Views of a picture M, channels C, rows h and columns w."""
        side = self.source.image_size // self.source.downsample
        return 1 + self.flip, self.source.channels, side, side

    @cached_property
    def size(self) -> int:
        """Bytes of the tensor."""
        return int(np.prod(self.shape)) * DTYPES[self.dtype][1].itemsize

    def facts(self) -> dict[str, Any]:
        """Plain values for a manifest; the inverse of `stored_format`."""
        return {"codec_name": self.codec_name, **asdict(self.source), "dtype": self.dtype, "flip": self.flip}

    def pack(self, latents: Tensor) -> bytes:
        """A safetensors file of latents [M, C, h, w], any floating type, on the CPU.

        Raises:
            V2FlowError: values that the type cannot hold.
        """
        stored = latents.to(DTYPES[self.dtype][1]).contiguous()
        if not stored.isfinite().all():
            raise V2FlowError(
                f"latents beyond the range of {self.dtype}; choose another dtype or codec scale"
            )
        checksum = zlib.crc32(stored.view(torch.uint8).numpy().data)
        # One entry: safetensors writes several in any order, and the same latents are to give the same bytes.
        return save({"latents": stored}, {"v2flow": json.dumps({**self.facts(), "crc32": checksum})})

    def unpack(self, data: bytes) -> np.ndarray:
        """The latents as they are stored, [M, C, h, w]; bf16 as int16. Only the header is parsed, as JSON.

        Raises:
            BadSampleError: not whole, or not what this format says.
        """
        start = 8 + int.from_bytes(data[:8], "little")
        try:
            header = json.loads(data[8 : min(start, MAX_HEADER)])
            facts = json.loads(header.pop("__metadata__")["v2flow"])
            checksum = facts.pop("crc32")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadSampleError("latents: not a safetensors file of `v2flow data latents`") from error
        tensor = {"dtype": DTYPES[self.dtype][0], "shape": list(self.shape), "data_offsets": [0, self.size]}
        if facts != self.facts() or header != {"latents": tensor}:
            raise BadSampleError("latents: of another codec, type or shape than the manifest says")
        if len(data) != start + self.size or zlib.crc32(data[start:]) != checksum:
            raise BadSampleError("latents: cut short or damaged, the checksum is wrong")
        dtype = {"fp16": "<f2", "bf16": "<i2", "fp32": "<f4"}[self.dtype]
        return np.frombuffer(data, dtype, offset=start).reshape(self.shape)


def stored_format(shards: ShardSet) -> LatentFormat | None:
    """How the latents in shards are stored, as their manifests say; None for shards of anything else.

    Raises:
        V2FlowError: latents beside other shards, or of two kinds.
    """
    folders = {"" if shard.name.startswith("pipe:") else folder_of(shard.name) for shard in shards.shards}
    builds = {folder: folder_manifest(folder)[0] if folder else {} for folder in sorted(folders)}
    formats = {folder: _format_of(folder, build) for folder, build in builds.items()}
    if len(set(formats.values())) > 1:
        first, second = list(formats)[:2]
        raise V2FlowError(
            f"{second}: its shards and those of {first} are not cached latents of one codec and type; "
            "name shards of one kind"
        )
    return next(iter(formats.values()), None)


def _format_of(folder: str, build: Mapping[str, Any]) -> LatentFormat | None:
    if build.get("kind") != "latents":
        return None
    try:
        source = LatentSource(**{field.name: build[field.name] for field in fields(LatentSource)})
        for field in fields(LatentSource):
            value, kind = build[field.name], (int, float) if field.type is float else field.type
            if not isinstance(value, kind):  # type: ignore[arg-type]
                raise TypeError(f"{field.name} is {value!r:.40}")
        form = LatentFormat(build["codec_name"], source, build["dtype"], bool(build["flip"]))
        if form.size <= 0 or not isinstance(form.codec_name, str):
            raise ValueError("no size or name")
    except (KeyError, ValueError, TypeError, ArithmeticError) as error:
        raise V2FlowError(
            f"{folder}/{MANIFEST}: expected what `v2flow data latents` says of latents, found something else "
            f"({type(error).__name__}: {error}); build them again"
        ) from error
    return form


class LatentReader(Reader):
    """Reads cached latents of centre crops.

    Args:
        form: how they are stored.
        captions: see `Reader`.
    """

    def __init__(self, shards: ShardSet, form: LatentFormat, captions: bool = False) -> None:
        super().__init__(shards, captions)
        self.form = form
        for shard in shards.shards:
            largest = int(shard.index.members[:, PLACE, 1].max())
            if largest > form.size + MAX_HEADER:
                raise V2FlowError(
                    f"{shard.name}: expected latents of {form.size} bytes, found a member of {largest}; build them "
                    "again with `v2flow data latents`"
                )

    def content(self, sample: int, place: float = 0.5) -> np.ndarray:
        """Latents of the picture and of its mirror image, as they are stored, [M, C, h, w].

        Raises:
            BadSampleError: none, damaged ones, or those of another codec.
        """
        data = self.member(sample, PLACE)
        if data is None:
            raise BadSampleError("no latents; build them with `v2flow data latents`")
        return self.form.unpack(data)

    def mirrored(self, content: np.ndarray) -> np.ndarray:
        """The stored latents of the mirror image come first, [1, C, h, w]."""
        return content[1:]

    def blank(self) -> np.ndarray:
        """Cached latents stand in for training pictures only, which are never padded."""
        raise NotImplementedError("cached latents are for training; evaluation needs pictures")

    def stack(self, contents: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """{"latents": fp32 [B, C, h, w]}."""
        stored = torch.from_numpy(np.stack([content[0] for content in contents]))
        return {"latents": (stored.view(torch.bfloat16) if self.form.dtype == "bf16" else stored).float()}
