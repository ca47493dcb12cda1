"""Evaluation of a tokenizer: figures, protocol, floors, result files."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from metric_toys import MODES, ColourTokenizer, PlainTokenizer, ToyLoader

from v2flow.decode_modes import select_modes
from v2flow.errors import V2FlowError
from v2flow.evaluate import describe_shards, evaluate_checkpoint, evaluate_model, make_report
from v2flow.images import load_image, save_grid, save_image
from v2flow.metrics.codebook import codebook_statistics
from v2flow.metrics.files import write_atomically, write_json
from v2flow.metrics.floors import data_floors
from v2flow.metrics.reconstruction import psnr_per_image, to_uint8


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def score(
    model: torch.nn.Module, loader: ToyLoader, modes: dict[str, dict[str, Any]], **options: Any
) -> dict[str, Any]:
    return evaluate_model(model, loader, modes, **({"features": False} | options))


def test_figures_of_a_model_are_those_worked_out_directly() -> None:
    model, loader = ColourTokenizer().eval(), ToyLoader(10, batch_size=4)
    found = score(model, loader, MODES)
    ids = model.encode(loader.images)
    psnr = psnr_per_image(loader.images, model.decode(ids)).mean().item()
    assert found["images"] == 10
    assert found["modes"]["mean"]["psnr"] == pytest.approx(psnr, abs=1e-9)
    assert found["modes"]["sampled"]["psnr"] < psnr - 1
    expected = codebook_statistics(torch.bincount(ids.flatten(), minlength=64))
    assert found["codebook"] == {"size": 64} | expected
    assert 0 < expected["usage"] < 1


def test_noise_depends_on_seed_and_sample_only() -> None:
    model = ColourTokenizer()
    both = score(model, ToyLoader(10, 4), MODES)
    alone = score(model, ToyLoader(10, 4), {"sampled": MODES["sampled"]})
    torch.manual_seed(1234)
    torch.rand(7)
    assert score(model, ToyLoader(10, 4), MODES) == both
    assert alone["modes"]["sampled"] == both["modes"]["sampled"]
    assert score(model, ToyLoader(10, 4), MODES, seed=1)["modes"]["sampled"] != both["modes"]["sampled"]
    # Batch 1 does not repeat the noise of batch 0: the same picture twice is reconstructed in two ways.
    loader = ToyLoader(2, 1)
    loader.images[1] = loader.images[0]
    single, double = ToyLoader(1, 1), score(model, loader, MODES)
    single.images = loader.images[:1]
    assert score(model, single, MODES)["modes"]["sampled"]["psnr"] != double["modes"]["sampled"]["psnr"]


def test_modes_of_training_are_put_back() -> None:
    model = ColourTokenizer().train()
    model.frozen = torch.nn.Dropout().eval()  # a part that stays in evaluation mode while the rest trains
    score(model, ToyLoader(4, 4), MODES)
    assert model.training and not model.frozen.training


def test_a_decoder_without_randomness_takes_no_generator() -> None:
    assert score(PlainTokenizer(), ToyLoader(4, 4), {"one_step": {}})["modes"]["one_step"]["psnr"] > 15


def test_protocol_names_what_was_scored() -> None:
    loader = ToyLoader(10, 4)
    protocol = score(ColourTokenizer(), loader, MODES, seed=3, protocol={"split": "test"})["protocol"]
    assert protocol["split"] == "test" and protocol["seed"] == 3 and protocol["batch_size"] == 4
    assert protocol["images"] == 10 and (protocol["height"], protocol["width"]) == (16, 16)
    assert protocol["decode_modes"] == MODES and "torch-fidelity" in protocol["libraries"]
    other_batches = score(ColourTokenizer(), ToyLoader(10, 5), MODES)["protocol"]
    loader.images[3] += 0.2
    other_pixels = score(ColourTokenizer(), loader, MODES)["protocol"]
    fewer = score(ColourTokenizer(), ToyLoader(10, 4), MODES, max_batches=2)["protocol"]
    assert other_batches["keys_sha256"] == protocol["keys_sha256"] == other_pixels["keys_sha256"]
    assert other_batches["pixels_sha256"] == protocol["pixels_sha256"] != other_pixels["pixels_sha256"]
    assert fewer["images"] == 8 and fewer["keys_sha256"] != protocol["keys_sha256"]


def test_features_are_reported_with_standard_error_protocol_and_notes(tmp_path: Path) -> None:
    found = score(ColourTokenizer(), ToyLoader(10, 4), MODES, features=True)
    for figures in (*found["modes"].values(), found["real_vs_real"]):
        assert figures["kid-efficientnet-lite0_se"] > 0
    assert found["modes"]["mean"]["kid-efficientnet-lite0"] > 0.1
    assert {"rfid", "kid-inception", "lpips", "rfd-efficientnet-lite0"} <= found["notes"].keys()
    assert found["protocol"]["extractors"] == [
        {"name": "efficientnet-lite0-128-57934424-v1", "resolution": 128}
    ]
    files = sorted((tmp_path / "cache" / "features").rglob("*.npy"))
    assert [file.name.split("-")[1] for file in files].count("4x16x16.npy") == 2 and len(files) == 3
    assert score(ColourTokenizer(), ToyLoader(10, 4), MODES, features=True) == found  # now from the cache


def test_a_picture_that_could_not_be_decoded_leaves_no_trace() -> None:
    """`valid` may be False in the middle of a batch; the other pictures keep their reconstructions and keys."""
    (batch,) = ToyLoader(4, 4)
    batch["valid"][1] = False
    found = evaluate_model(ColourTokenizer(), [batch], MODES, features=False)
    whole = ToyLoader(4, 4)
    model = ColourTokenizer().eval()
    kept = whole.images[[0, 2, 3]]
    assert found["images"] == 3
    psnr = psnr_per_image(kept, model.decode(model.encode(kept))).mean().item()
    assert found["modes"]["mean"]["psnr"] == pytest.approx(psnr, abs=1e-9)


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(V2FlowError, match="held no picture"):
        score(ColourTokenizer(), ToyLoader(0, 4), MODES)
    with pytest.raises(V2FlowError, match="at least one decode mode"):
        score(ColourTokenizer(), ToyLoader(4, 4), {})


def test_floors_are_the_mean_and_the_nearest_picture() -> None:
    train, held_out = ToyLoader(20, 8), ToyLoader(6, 4)
    generator = torch.Generator().manual_seed(0)
    train.images = torch.rand(20, 3, 16, 16, generator=generator)
    held_out.images = torch.rand(6, 3, 16, 16, generator=generator)
    train.images[13] = held_out.images[2]  # a leak
    train.images[17] = held_out.images[4] * 0.9
    rows = data_floors(train, held_out, features=True)
    real, known = to_uint8(held_out.images), to_uint8(train.images)
    distance = (real[:, None].double() - known[None].double()).square().flatten(2).sum(2)
    assert distance.argmin(1)[[2, 4]].tolist() == [13, 17]
    nearest = psnr_per_image(real, known[distance.argmin(1)])
    assert nearest[2] == 60.0
    assert rows["nearest_training_picture"]["psnr"] == pytest.approx(nearest.mean().item(), abs=1e-9)
    mean = known.double().mean(0).round().to(torch.uint8)
    assert rows["mean_image"]["psnr"] == pytest.approx(
        psnr_per_image(real, mean.expand_as(real)).mean().item(), abs=1e-9
    )
    assert (
        rows["mean_image"]["kid-efficientnet-lite0"]
        > rows["nearest_training_picture"]["kid-efficientnet-lite0"]
    )


def test_floors_of_different_sizes_are_refused() -> None:
    train = ToyLoader(4, 4)
    train.images = train.images[:, :, :8]
    with pytest.raises(
        V2FlowError, match=r"training pictures are \[3, 8, 16\], evaluation pictures \[3, 16, 16\]"
    ):
        data_floors(train, ToyLoader(4, 4), features=False)


def test_report_and_json(tmp_path: Path) -> None:
    result = score(ColourTokenizer(), ToyLoader(4, 4), MODES)
    report = make_report(
        "model.ckpt", "ColourTokenizer", 7, {"ema": result, "raw": result}, {"mean_image": {"psnr": 1.0}}
    )
    write_json(tmp_path / "out" / "metrics.json", report)
    read = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert read == report
    assert read["weights"]["raw"]["modes"] == result["modes"] and read["protocol"]["weights"] == [
        "ema",
        "raw",
    ]
    assert read["floors"] == {"mean_image": {"psnr": 1.0}}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})

    def fail(file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        write_atomically(path, fail)
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["metrics.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_decode_modes_are_chosen_by_name() -> None:
    assert select_modes(None, MODES) == MODES
    assert select_modes(["sampled"], MODES) == {"sampled": MODES["sampled"]}
    assert select_modes({"own": {"steps": 2}}, MODES) == {"own": {"steps": 2}}
    with pytest.raises(V2FlowError, match="unknown decode mode 'smapled'; expected some of mean, sampled"):
        select_modes(["smapled"], MODES)


def test_set_and_split_come_from_the_shards_names() -> None:
    found = describe_shards("data/cifar10/test-{000000..000001}.tar")
    assert (found["set"], found["split"]) == ("cifar10", "test")


def test_checkpoint_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(V2FlowError, match="option weights: expected ema and/or raw, found best"):
        evaluate_checkpoint("x.ckpt", "y.tar", weights=["best"])  # type: ignore[list-item]
    with pytest.raises(V2FlowError, match="missing.ckpt"):
        evaluate_checkpoint(tmp_path / "missing.ckpt", "y.tar")


def test_pictures_and_grids_are_8_bit_pngs(tmp_path: Path) -> None:
    rows = [torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    save_image(rows[0][0], tmp_path / "one.png")
    assert torch.equal(to_uint8(load_image(tmp_path / "one.png")), to_uint8(rows[0][0]))
    save_grid(rows, tmp_path / "new" / "grid.png", columns=3)
    grid = load_image(tmp_path / "new" / "grid.png")
    cell = 16 * 4 + 4
    assert grid.shape == (3, 4 * cell, 3 * cell)  # two blocks of two rows
    for row, column, picture in ((1, 2, rows[1][2]), (2, 1, rows[0][4]), (3, 0, rows[1][3])):
        shown = grid[
            :, row * cell + 2 : (row + 1) * cell - 2 : 4, column * cell + 2 : (column + 1) * cell - 2 : 4
        ]
        assert torch.equal(to_uint8(shown), to_uint8(picture))
    with pytest.raises(V2FlowError, match="no such picture"):
        load_image(tmp_path / "missing.png")
    (tmp_path / "bad.png").write_text("text")
    with pytest.raises(V2FlowError, match="bad.png: expected a picture"):
        load_image(tmp_path / "bad.png")


def test_decode_modes_by_name_and_written_out() -> None:
    known = {"one_step": {"steps": 1}, "sampled": {"steps": 10}}
    assert select_modes(None, known) == known
    assert select_modes(["sampled"], known) == {"sampled": {"steps": 10}}
    written = "steps=8,temperature=0.5,solver=heun"
    assert select_modes([written], known) == {written: {"steps": 8, "temperature": 0.5, "solver": "heun"}}
    with pytest.raises(V2FlowError, match="unknown decode mode 'samled'; expected some of one_step, sampled"):
        select_modes(["samled"], known)
    with pytest.raises(V2FlowError, match="decode option 'step': unknown"):
        select_modes(["step=8"], known)
