"""Every shipped experiment file is read by the real command line; the large ones are built without memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from v2flow.cli import main

EXPERIMENTS = sorted((Path(__file__).parent.parent / "experiments" / "tokenizer").glob("*.yaml"))


def printed_config(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(path), *words, "--print_config"])
    assert exit_.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_file_is_complete(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It parses as it stands, keeps its runs apart, and its last step is one that a checkpoint follows."""
    config = printed_config(path, capsys)
    trainer = config["trainer"]
    assert trainer["logger"]["init_args"]["name"] == path.stem
    assert trainer["max_steps"] > 0 and trainer["max_steps"] % trainer["val_check_interval"] == 0
    assert config["model"]["init_args"]["optimizer"]["total_steps"] == trainer["max_steps"]
    assert config["model"]["init_args"]["seed"] == config["data"]["seed"] == config["seed_everything"]
    assert all(config["data"][split] for split in ("train", "val", "test"))
    callbacks = [callback["class_path"].rsplit(".", 1)[1] for callback in trainer["callbacks"]]
    assert {"EMACallback", "ReconstructionCallback", "ModelCheckpoint", "RunProgressBar"} <= set(callbacks)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_averaged_weights_forget_the_start(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The half-life of the average is at most 5 % of the run."""
    config = printed_config(path, capsys)
    (ema,) = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith("EMACallback")]
    half_life = -0.6931 / torch.tensor(ema["init_args"]["decay"], dtype=torch.float64).log().item()
    assert half_life <= 0.05 * config["trainer"]["max_steps"]


def test_splits_do_not_overlap(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder comes from V2FLOW_DATA, and braces survive the parser."""
    monkeypatch.setenv("V2FLOW_DATA", "somewhere/pictures")
    (path,) = [path for path in EXPERIMENTS if path.stem == "cifar10-32"]
    data = printed_config(path, capsys)["data"]
    assert data["train"] == "somewhere/pictures/cifar10/train-{000000..000008}.tar"
    assert data["val"] == "somewhere/pictures/cifar10/train-000009.tar"
    assert data["test"] == "somewhere/pictures/cifar10/test-{000000..000001}.tar"


def test_the_baseline_differs_in_the_model_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """And in its number of steps: the two are compared at equal minutes."""
    folder = EXPERIMENTS[0].parent
    ours, baseline = (
        printed_config(folder / f"{name}.yaml", capsys) for name in ("cifar10-32", "cifar10-32-vq")
    )
    assert ours["data"] == baseline["data"]
    for name in ("callbacks", "logger", "max_steps", "val_check_interval"):
        ours["trainer"].pop(name), baseline["trainer"].pop(name)
    assert ours["trainer"] == baseline["trainer"]
    tokenizer, plain = ours["model"]["init_args"]["tokenizer"], baseline["model"]["init_args"]["autoencoder"]
    assert tokenizer["visual_vocabulary"]["size"] == plain["codebook_size"]
    for option in ("width", "depth", "token_grid"):
        assert tokenizer["resampler"][option] == plain["encoder"][option]


def on_meta(path: Path, capsys: pytest.CaptureFixture[str], dim: int) -> Any:
    """The experiment's tokenizer over a vocabulary of width `dim`, without weights or memory."""
    from v2flow.config import TokenizerConfig, from_dict
    from v2flow.llm import LLMVocabulary
    from v2flow.tokenizer import V2FlowTokenizer

    config = from_dict(TokenizerConfig, printed_config(path, capsys)["model"]["init_args"]["tokenizer"])
    rows = config.vocabulary.size or 32000
    with torch.device("meta"):
        table = torch.empty(rows, dim)
        return V2FlowTokenizer(config, LLMVocabulary.from_table(table, [""] * rows, "meta"))


@pytest.mark.parametrize("name", ["reference-512", "reference-1024"])
def test_reference_is_the_papers_size(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Built on the meta device: the paper's shapes, without weights or memory."""
    (path,) = [path for path in EXPERIMENTS if path.stem == name]
    tokenizer = on_meta(path, capsys, 4096)
    side = {"reference-512": 16, "reference-1024": 32}[name]
    assert tokenizer.num_tokens == side**2 and tokenizer.codebook_size == 16384
    assert tokenizer.latent_grid == (side, side)
    assert tuple(tokenizer.visual_vocabulary.codes.shape) == (16384, 4096)
    assert all(parameter.is_meta for parameter in tokenizer.decoder.parameters())


def test_imagenet_fits_together(capsys: pytest.CaptureFixture[str]) -> None:
    """Its parts are built on the meta device, on the latents of an autoencoder of the usual architecture."""
    (path,) = [path for path in EXPERIMENTS if path.stem == "imagenet-256"]
    tokenizer = on_meta(path, capsys, 640)
    assert tokenizer.config.vocabulary.size is not None
    assert tokenizer.latent_grid == (32, 32) and tokenizer.num_tokens == 256
    assert tokenizer.codec.channels == 4 and tokenizer.codec.downsample == 8
