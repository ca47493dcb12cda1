"""The command `v2flow` outside training: help, bad input, and what its verbs do with a small tokenizer."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from v2flow import V2FlowTokenizer
from v2flow.cli import main
from v2flow.config import (
    DecoderConfig,
    ResamplerConfig,
    TokenizerConfig,
    VelocityConfig,
    VisualVocabularyConfig,
    VocabularyConfig,
)
from v2flow.images import load_image, save_image

ARGPARSE_VERBS = [
    [],
    ["data"],
    ["data", "openmoji"],
    ["data", "folder"],
    ["data", "validate"],
    ["data", "domains"],
    ["data", "shapes"],
    ["data", "tokens"],
    ["generate"],
    ["evaluate"],
    ["encode"],
    ["decode"],
    ["reconstruct"],
    ["export"],
    ["benchmark"],
]


@pytest.fixture(scope="module")
def tokenizer() -> V2FlowTokenizer:
    torch.manual_seed(0)
    config = TokenizerConfig(
        image_size=16,
        vocabulary=VocabularyConfig(source="random", size=64, dim=16),
        resampler=ResamplerConfig(width=8, depth=1, token_grid=[4, 4], key_dim=8),
        visual_vocabulary=VisualVocabularyConfig(size=32),
        decoder=DecoderConfig(width=16, heads=2, encoder_depth=1, decoder_depth=1),
        velocity=VelocityConfig(width=16, heads=2, depth=1),
    )
    return V2FlowTokenizer(config).eval()


@pytest.fixture(scope="module")
def exported(tokenizer: V2FlowTokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "exported"
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two pictures of the model's size: no resizing stands between them and the ids."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(1)
    paths = [folder / "one.png", folder / "two.png"]
    for path in paths:
        save_image(torch.rand(3, 16, 16, generator=generator), path)
    return [str(path) for path in paths]


def error_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The message of a command that must fail with status 2 and one line."""
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("v2flow: error: ")
    return lines[0].removeprefix("v2flow: error: ")


@pytest.mark.parametrize("verb", ARGPARSE_VERBS, ids=lambda verb: " ".join(verb) or "v2flow")
def test_help_fits_80_columns(
    verb: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        main([*verb, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert " ".join(["usage: v2flow", *verb]) in text
    assert max(map(len, text.splitlines())) <= 80


def test_help_and_import_do_without_torch() -> None:
    code = (
        "import sys, v2flow, v2flow.cli\n"
        "try:\n    v2flow.cli.main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "print(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for verb in (
        "data",
        "fit",
        "validate",
        "test",
        "generate",
        "evaluate",
        "encode",
        "decode",
        "reconstruct",
        "export",
        "benchmark",
    ):
        assert re.search(rf"\n    {verb}\s", done.stdout)


def test_public_names() -> None:
    import v2flow

    assert v2flow.V2FlowTokenizer is V2FlowTokenizer
    assert {"V2FlowTokenizer", "V2FlowError"} <= set(dir(v2flow))
    with pytest.raises(AttributeError, match="no attribute 'V2FlowTokeniser'"):
        v2flow.V2FlowTokeniser  # noqa: B018


def test_the_process_exits_with_2_and_one_line() -> None:
    done = subprocess.run([sys.executable, "-m", "v2flow", "recon"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "invalid choice: 'recon'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "VERB"),
        (["evaluate", "x.ckpt"], "--data"),
        (["evaluate", "x.ckpt", "--data", "a.tar", "--weights", "best"], "invalid choice: 'best'"),
        (["encode", "x.ckpt", "a.png", "--out", "ids.npz", "--steps", "3"], "--steps"),
        (["decode", "x.ckpt", "ids.npz", "--out", "o", "--solver", "rk4"], "'rk4'"),
        (["evaluate", "nowhere/last.ckpt", "--data", "a.tar"], "nowhere/last.ckpt: no such checkpoint"),
        (["export", "nowhere/last.ckpt", "nowhere/out"], "nowhere/last.ckpt: no such checkpoint"),
    ],
)
def test_wrong_words(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in error_line(capsys, arguments)


def test_foreign_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut, foreign = tmp_path / "cut.ckpt", tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    cut.write_bytes(foreign.read_bytes()[:100])
    assert str(cut) in error_line(capsys, ["export", str(cut), str(tmp_path / "out")])
    assert "not a v2flow checkpoint" in error_line(capsys, ["export", str(foreign), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_encode_then_decode_is_reconstruct(
    exported: str, tokenizer: V2FlowTokenizer, pictures: list[str], tmp_path: Path
) -> None:
    ids_file, decoded, reconstructed = tmp_path / "ids.npz", tmp_path / "decoded", tmp_path / "reconstructed"
    how = ["--steps", "3", "--seed", "5"]
    assert main(["encode", exported, *pictures, "--out", str(ids_file)]) == 0
    with np.load(ids_file) as archive:
        ids = {name: archive[name] for name in archive.files}
    assert list(ids) == ["one.png", "two.png"]
    expected = tokenizer.encode(torch.stack([load_image(path) for path in pictures]))
    assert np.array_equal(np.stack(list(ids.values())), expected.numpy())

    assert main(["decode", exported, str(ids_file), "--out", str(decoded), *how]) == 0
    assert main(["reconstruct", exported, *pictures, "--out", str(reconstructed), *how]) == 0
    for name in ("one.png", "two.png"):
        assert (decoded / name).read_bytes() == (reconstructed / name).read_bytes()
    assert (
        main(["decode", exported, str(ids_file), "--out", str(decoded), "--steps", "3", "--seed", "6"]) == 0
    )
    assert (decoded / "one.png").read_bytes() != (reconstructed / "one.png").read_bytes()


def test_reconstruct_reports_psnr_and_a_grid(
    exported: str, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, grid, figures = tmp_path / "out", tmp_path / "grid.png", tmp_path / "figures.json"
    assert (
        main(
            [
                "reconstruct",
                exported,
                *pictures,
                "--out",
                str(out),
                "--grid",
                str(grid),
                "--json",
                str(figures),
            ]
        )
        == 0
    )
    report = json.loads(figures.read_text())
    error = (load_image(pictures[0]) - load_image(out / "one.png")).mul(255).round().square().mean()
    assert report["psnr"]["one.png"] == pytest.approx(float(10 * torch.log10(255**2 / error)), abs=1e-3)
    assert report["decode"] == {"steps": 1, "temperature": 0.0}
    assert f"one.png: psnr {report['psnr']['one.png']:.2f} dB" in capsys.readouterr().out
    assert load_image(grid).shape == (3, 2 * (64 + 4), 2 * (64 + 4))


def test_other_sizes_are_cropped_at_the_centre(exported: str, pictures: list[str], tmp_path: Path) -> None:
    wide = torch.ones(3, 16, 40)
    wide[:, :, 12:28] = load_image(pictures[0])
    save_image(wide, tmp_path / "wide.png")
    assert (
        main(
            ["encode", exported, str(tmp_path / "wide.png"), pictures[0], "--out", str(tmp_path / "ids.npz")]
        )
        == 0
    )
    with np.load(tmp_path / "ids.npz") as archive:
        assert np.array_equal(archive["wide.png"], archive["one.png"])


def test_bad_pictures_leave_no_output(
    exported: str, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    out = tmp_path / "out"
    for words in (
        ["encode", exported, pictures[0], str(text)],
        ["reconstruct", exported, pictures[0], str(text)],
    ):
        assert str(text) in error_line(capsys, [*words, "--out", str(out)])
        assert not out.exists()
    missing = str(tmp_path / "missing.png")
    assert f"{missing}: no such picture" in error_line(
        capsys, ["encode", exported, missing, "--out", str(out)]
    )
    twice = tmp_path / "one.png"
    save_image(torch.zeros(3, 16, 16), twice)
    message = error_line(capsys, ["encode", exported, pictures[0], str(twice), "--out", str(out)])
    assert str(twice) in message and pictures[0] in message
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))] == []


def test_bad_ids(exported: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "ids.npz", tmp_path / "out"

    def message(**arrays: np.ndarray) -> str:
        np.savez(file, **arrays)
        return error_line(capsys, ["decode", exported, str(file), "--out", str(out)])

    assert "found a path" in message(**{"../escape": np.zeros(16, dtype=np.int64)})
    assert "expected integers of shape [N]" in message(a=np.zeros(16))
    assert "expected integers of shape [B, 16]" in message(a=np.zeros(9, dtype=np.int64))
    assert "expected values from 0 to 31" in message(a=np.full(16, 32))
    assert "expected at least one array" in message()
    file.write_text("no archive")
    assert "made by `v2flow encode`" in error_line(capsys, ["decode", exported, str(file), "--out", str(out)])
    assert not out.exists()


def test_pictures_before_a_mistake_are_kept(exported: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", a=np.zeros(16, dtype=np.int64), b=np.full(16, 32))
    assert main(["decode", exported, str(tmp_path / "ids.npz"), "--out", str(tmp_path / "out")]) != 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


def test_ids_of_a_picture_with_an_awkward_name(exported: str, pictures: list[str], tmp_path: Path) -> None:
    """numpy.savez cannot store an array of this name."""
    (tmp_path / "file").write_bytes(Path(pictures[0]).read_bytes())
    assert main(["encode", exported, str(tmp_path / "file"), "--out", str(tmp_path / "ids.npz")]) == 0
    assert main(["decode", exported, str(tmp_path / "ids.npz"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "file.png").is_file()


def test_decode_modes_and_options_exclude_each_other(
    exported: str, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reconstruct", exported, pictures[0], "--out", str(tmp_path / "out")]
    assert "--mode and --steps" in error_line(capsys, [*words, "--mode", "one_step", "--steps", "2"])
    assert "unknown decode mode 'finest'; expected some of one_step, fast, balanced, best" in error_line(
        capsys, [*words, "--mode", "finest"]
    )
    assert "steps" in error_line(capsys, [*words, "--steps", "0"])
    assert not (tmp_path / "out").exists()


def test_export_writes_all_or_nothing(
    exported: str, tokenizer: V2FlowTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "model"
    assert main(["export", exported, str(folder)]) == 0
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(V2FlowTokenizer.from_pretrained(str(folder)).encode(images), tokenizer.encode(images))
    before = sorted(path.name for path in folder.iterdir())
    assert f"{folder}: expected a new or empty folder" in error_line(
        capsys, ["export", exported, str(folder)]
    )
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
