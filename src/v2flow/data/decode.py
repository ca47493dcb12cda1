"""Decoding pictures and captions by an allow-list of formats. Nothing is ever unpickled, no other program is run."""

import io
import json
import struct
import zlib

import numpy as np
import PIL.WebPImagePlugin  # noqa: F401  (to look for a format that it lacks, Pillow would import them all)
from PIL import Image, ImageOps

from v2flow.errors import first_line

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded: a few kilobytes can unfold to gigabytes."""
MAX_CAPTION = 1 << 20
"""Bytes of a caption; a longer one is a mistake, or an attempt to fill the memory."""
FORMATS = ("JPEG", "PNG", "WEBP")
"""Decoders that may run on shards, whatever a member is called."""
FILE_FORMATS = (*FORMATS, "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""Those for picture files. Of all that Pillow knows some hand a file, whatever it is called, to Ghostscript."""
_BAND = 1 << 22  # pixels that are converted at a time
RESAMPLING = Image.Resampling.BICUBIC
_FAILURES = (
    OSError, ValueError, SyntaxError, TypeError, EOFError, IndexError, KeyError, AttributeError, OverflowError,
    MemoryError, ArithmeticError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # fmt: skip


class BadSampleError(Exception):
    """A sample that cannot be used; the message is the reason, on one line."""


def decode_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """An encoded picture as it is meant to be seen, mode RGB.

    The EXIF orientation is applied, transparency laid on white, 16-bit grey scaled to 8 bits.

    Args:
        formats: Pillow's names of the formats that may be decoded.

    Raises:
        BadSampleError: not such a picture, damaged, or of more than `MAX_PIXELS` pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        if image.width * image.height > MAX_PIXELS:
            raise BadSampleError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        image.load()
        return to_rgb(image)
    except _FAILURES as error:
        reason = first_line(error)
        if "cannot identify image file" in reason:
            names = "JPEG, PNG or WebP" if formats == FORMATS else "/".join(formats)
            reason = f"not a {names} picture"
        raise BadSampleError(reason) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture, turned upright (the one given is changed), in mode RGB."""
    if image.format != "JPEG" or "exif" in image.info or "xmp" in image.info:
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    width, height = image.size
    rows = max(1, _BAND // width)
    if rows >= height:
        return _colours(image)
    # In bands: what lies between takes up to 24 bytes a pixel, which of 64 million pixels would be gigabytes.
    result = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        result.paste(_colours(image.crop((0, top, width, min(top + rows, height)))), (0, top))
    return result


def _colours(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit grey instead of scaling it.
        grey = np.asarray(image).astype(np.float64) / 257.0
        return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert(
            "RGB"
        )
    return image.convert("RGB")


def square_crop(image: Image.Image, size: int, place: float = 0.5) -> np.ndarray:
    """Resizes the shorter side to `size` (bicubic, antialiased) and crops a square.

    Args:
        image: mode RGB.
        place: where along the longer side, in [0, 1]; 0.5 is the centre.

    Returns:
        uint8 [size, size, 3].
    """
    width, height = image.size
    short = min(width, height)
    left, top = (width - short) * place, (height - short) * place
    if short == size:  # no resampling: whole pixels only
        left, top = round(left), round(top)
        if width != height:
            image = image.crop((left, top, left + size, top + size))
    else:
        image = image.resize((size, size), RESAMPLING, box=(left, top, left + short, top + short))
    return np.asarray(image)


def decode_caption(txt: bytes | None, json_text: bytes | None) -> str | None:
    """The caption of a sample: its `txt` member, else the string `caption` of its `json` member, else None.

    Raises:
        BadSampleError: the member is there and cannot be read, or is longer than `MAX_CAPTION`.
    """
    length = len(txt if txt is not None else json_text or b"")
    if length > MAX_CAPTION:
        raise BadSampleError(f"caption: {length:,} bytes, more than {MAX_CAPTION:,}")
    try:
        if txt is not None:
            return txt.decode().strip()
        caption = json.loads(json_text).get("caption") if json_text is not None else None
        if isinstance(caption, str):
            caption.encode()  # half of a surrogate pair, which JSON can hold, is no text
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadSampleError(f"caption: {first_line(error)}") from error
    return caption.strip() if isinstance(caption, str) else None
