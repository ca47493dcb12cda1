"""Pictures as they are meant to be seen, squares, captions, and what is refused."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from data_toys import encode
from PIL import Image

from v2flow.data.decode import (
    MAX_PIXELS,
    BadSampleError,
    decode_caption,
    decode_image,
    square_crop,
)


def half_red(width: int = 16, height: int = 8) -> np.ndarray:
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return pixels


@pytest.mark.parametrize(("orientation", "red"), [(1, "left"), (3, "right"), (6, "top"), (8, "bottom")])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, red: str, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = np.asarray(decode_image(encode(half_red(), format, exif=exif))).astype(int)
    half = {
        "left": seen[:, : seen.shape[1] // 2],
        "right": seen[:, seen.shape[1] // 2 :],
        "top": seen[: seen.shape[0] // 2],
        "bottom": seen[seen.shape[0] // 2 :],
    }[red]
    assert half[..., 0].mean() > 200 and half[..., 2].mean() < 60
    assert seen.shape[:2] == ((8, 16) if orientation in (1, 3) else (16, 8))


def test_transparency_is_laid_on_white() -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (255, 0, 0, 255)
    pixels[2] = (0, 0, 0, 0)
    pixels[3] = (0, 0, 255, 127)
    seen = np.asarray(decode_image(encode(pixels)))
    assert seen[0, 0].tolist() == [255, 0, 0] and seen[2, 0].tolist() == [255, 255, 255]
    np.testing.assert_allclose(seen[3, 0], [128, 128, 255], atol=1)


def test_palettes_with_and_without_transparency() -> None:
    image = Image.fromarray(half_red()).quantize(2)
    np.testing.assert_array_equal(np.asarray(decode_image(encode(image))), half_red())
    blue = image.getpixel((15, 0))
    seen = np.asarray(decode_image(encode(image, transparency=blue)))
    assert seen[0, 0].tolist() == [255, 0, 0] and seen[0, 15].tolist() == [255, 255, 255]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    levels = np.array([[0, 257, 128 * 257, 65535]], np.uint16).repeat(4, 0)
    seen = np.asarray(decode_image(encode(Image.fromarray(levels))))
    assert seen[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_cmyk_and_grey() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(np.asarray(decode_image(encode(cmyk, "JPEG")))[4, 4], [254, 0, 0], atol=8)
    grey = Image.new("L", (8, 8), 77)
    assert np.asarray(decode_image(encode(grey)))[0, 0].tolist() == [77] * 3


def bomb(side: int) -> bytes:
    """A PNG that says it has side × side pixels, and has hardly any."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 1, 9_600, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_decoding(side: int) -> None:
    with pytest.raises(BadSampleError, match="pixels"):
        decode_image(bomb(side))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a picture",
        encode(half_red(), "JPEG")[:200],
        encode(half_red(64, 64), "PNG")[:90],
        encode(half_red(), "GIF"),
        encode(half_red(), "TIFF"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "gif", "tiff", "postscript"],
)
def test_what_is_no_whole_picture_of_the_allowed_formats_is_bad(data: bytes) -> None:
    with pytest.raises(BadSampleError) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value) and "BytesIO" not in str(caught.value)


def test_random_bytes_never_escape_as_other_errors() -> None:
    """Every damage of a valid file is a picture or a BadSampleError."""
    generator = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP"):
        original = encode(generator.integers(0, 256, (24, 24, 3), np.uint8), format)
        for _ in range(150):
            data = bytearray(original)
            for place in generator.integers(0, len(data), 3):
                data[place] = generator.integers(256)
            with contextlib.suppress(BadSampleError):
                assert decode_image(bytes(data)).mode == "RGB"


def test_square_crop_places() -> None:
    image = Image.fromarray(half_red(24, 8))
    assert square_crop(image, 8, 0.0)[..., 0].min() == 255
    assert square_crop(image, 8, 1.0)[..., 2].min() == 255
    centre = square_crop(image, 8)
    np.testing.assert_array_equal(centre, half_red(24, 8)[:, 8:16])
    assert square_crop(Image.fromarray(half_red(8, 24)), 8, 0.3).shape == (8, 8, 3)


def test_resizing_is_pillows_bicubic_then_a_crop() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (60, 100, 3), np.uint8)
    image = Image.fromarray(pixels)
    resized = np.asarray(image.resize((50, 30), Image.Resampling.BICUBIC))[:, 10:40].astype(int)
    assert np.abs(square_crop(image, 30).astype(int) - resized).max() <= 1
    same = np.asarray(image.crop((0, 0, 60, 60)))
    np.testing.assert_array_equal(square_crop(Image.fromarray(same), 60), same)
    assert square_crop(image, 128).shape == (128, 128, 3)


def test_captions() -> None:
    assert decode_caption("ein Käse\n".encode(), b'{"caption": "other"}') == "ein Käse"
    assert decode_caption(None, b'{"caption": " a cat ", "width": 3}') == "a cat"
    assert decode_caption(None, b'{"width": 3}') is None and decode_caption(None, None) is None
    for txt, json_text in ((b"\xff\xfe", None), (None, b"{"), (None, b"[1]")):
        with pytest.raises(BadSampleError, match="caption"):
            decode_caption(txt, json_text)


def test_truncated_pictures_do_not_change_pillow_for_others() -> None:
    from PIL import ImageFile

    assert ImageFile.LOAD_TRUNCATED_IMAGES is False and Image.open(io.BytesIO(encode(half_red()))).size == (
        16,
        8,
    )
