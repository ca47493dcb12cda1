"""`v2flow fit` on a handful of pictures: what it leaves, resuming, starting from weights, and bad experiment files."""

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from lightning.pytorch.strategies import SingleDeviceStrategy
from training_toys import experiment, write, write_shards

from v2flow import V2FlowTokenizer
from v2flow.cli import main
from v2flow.cli_training import condense
from v2flow.training.checkpoint_files import previous_of


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_shards(tmp_path_factory.mktemp("shards"))


def printed_config(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict[str, Any]:
    """What `v2flow fit … --print_config` prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *arguments, "--print_config"])
    assert exit_.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def error_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("v2flow: error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def trained(shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of four steps."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["fit", "--config", write(experiment(shards, folder), folder / "experiment.yaml")]) == 0
    return folder / "run" / "version_0"


def test_fit_leaves_config_checkpoints_figures_and_grid(trained: Path) -> None:
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 4 and config["model"]["init_args"]["seed"] == 1
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert list((trained / "checkpoints").glob("best-*.ckpt"))
    report = json.loads((trained / "metrics.json").read_text())
    assert report["step"] == 4 and report["weights"]["ema"]["images"] == 6
    assert (trained / "grid.png").is_file() and list((trained / "grids").glob("*.png"))


def test_an_export_says_what_it_was_trained_on_and_scored(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trained / "checkpoints" / "last.ckpt"), str(tmp_path / "model")]) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    report = json.loads((trained / "metrics.json").read_text())
    psnr = report["weights"]["ema"]["modes"]["one_step"]["psnr"]
    figures = card.partition("## Figures")[2]
    assert f"{psnr:.2f}" in figures and Path(report["checkpoint"]).name in figures
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])  # type: ignore[index]
    assert recipe["model"] == yaml.safe_load((trained / "config.yaml").read_text())["model"]["init_args"]
    assert "OpenMoji" not in card and "license: other" in card
    assert "4 steps of 4 samples" in card and str(tmp_path.parent) not in card.partition("```yaml")[0]
    order = [card.index(f"## {heading}") for heading in ("Training", "Figures", "Terms")]
    assert order == sorted(order)
    V2FlowTokenizer.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "README.md").read_text() == card
    # Of a checkpoint that lies by itself nothing is known; a damaged file beside it is one line.
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").write_bytes((trained / "checkpoints" / "last.ckpt").read_bytes())
    assert main(["export", str(run / "checkpoints" / "last.ckpt"), str(tmp_path / "alone")]) == 0
    assert "## Training" not in (tmp_path / "alone" / "README.md").read_text()
    config = yaml.safe_load((trained / "config.yaml").read_text())
    config["data"]["train"] = "data/openmoji/train-*.tar"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["export", str(run / "checkpoints" / "last.ckpt"), str(tmp_path / "emojis")]) == 0
    training = (tmp_path / "emojis" / "README.md").read_text().partition("## Training")[2]
    assert "[OpenMoji](https://openmoji.org/), [CC BY-SA 4.0](" in training
    (run / "metrics.json").write_text("[]")
    words = ["export", str(run / "checkpoints" / "last.ckpt"), str(tmp_path / "damaged")]
    assert "metrics.json: expected the file that `v2flow fit` wrote" in error_line(capsys, words)
    assert not (tmp_path / "damaged").exists()


def test_the_last_line_says_where_everything_lies(
    shards: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """And nothing on the way warns of what a user cannot change."""
    assert main(["fit", "--config", write(experiment(shards, tmp_path), tmp_path / "e.yaml")]) == 0
    captured = capfd.readouterr()
    last = captured.out.strip().splitlines()[-1]
    for name in ("last.ckpt", "metrics.json", "grid.png"):
        (path,) = re.findall(rf"\S+{name}", last)
        assert Path(path).is_file()
    assert not [str(warning.message) for warning in recwarn]
    assert "Tip" not in captured.err
    assert re.search(r"train: 100%.* 4/4 ", captured.err)


def test_resume_continues_and_init_from_starts_anew(
    shards: dict[str, str], tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = write(experiment(shards, tmp_path), tmp_path / "e.yaml")
    assert main(["fit", "--config", half, "--trainer.max_steps=2"]) == 0
    checkpoint = str(tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt")
    assert main(["fit", "--config", half, "--ckpt_path", checkpoint]) == 0
    whole = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    resumed = torch.load(tmp_path / "run" / "version_1" / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == whole["global_step"] == 4
    for name, tensor in whole["current_model_state"].items():
        assert torch.equal(resumed["current_model_state"][name], tensor), name

    started = [*("fit", "--config", half), "--init-from", str(trained / "checkpoints" / "last.ckpt")]
    assert main([*started, "--trainer.max_steps=2", "--model.init_args.optimizer.lr=1e-12"]) == 0
    fresh = torch.load(tmp_path / "run" / "version_2" / "checkpoints" / "last.ckpt", weights_only=True)
    assert fresh["global_step"] == 2
    weight = "model.decoder.encoder"
    names = [name for name in whole["state_dict"] if name.startswith(weight) and name.endswith("weight")]
    assert names
    for name in names:
        torch.testing.assert_close(
            fresh["current_model_state"][name], whole["state_dict"][name], atol=1e-6, rtol=0
        )
    assert "--init-from and --ckpt_path" in error_line(capsys, [*started, "--ckpt_path", checkpoint])


class ReadsItself(SingleDeviceStrategy):
    """Reads checkpoints without the trainer's `CheckpointIO`, as ModelParallelStrategy does."""

    asked: ClassVar[list[Any]] = []

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self.asked.append((checkpoint_path, weights_only))
        return torch.load(checkpoint_path, weights_only=bool(weights_only))  # type: ignore[no-any-return]


def test_every_strategy_is_given_a_whole_checkpoint_and_unpickles_nothing(
    shards: dict[str, str], tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = tmp_path / "last.ckpt"
    data = (trained / "checkpoints" / "last.ckpt").read_bytes()
    previous_of(last).write_bytes(data)
    last.write_bytes(data[:-9])
    fit = [
        "fit",
        "--config",
        write(experiment(shards, tmp_path), tmp_path / "e.yaml"),
        "--ckpt_path",
        str(last),
    ]
    own = [f"--trainer.strategy={__name__}.ReadsItself", "--trainer.strategy.device=cpu"]
    assert main([*fit, *own]) == 0
    assert ReadsItself.asked == [(str(previous_of(last)), True)]
    assert "--weights_only: expected true" in error_line(capsys, [*fit, "--weights_only=false"])


def test_fast_dev_run_leaves_nothing(
    shards: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where Lightning would put what it has no other place for
    config = write(experiment(shards, tmp_path), tmp_path / "e.yaml")
    assert main(["fit", "--config", config, "--trainer.fast_dev_run=true"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["e.yaml"]


def test_overrides_reach_every_interpolated_value(
    shards: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(experiment(shards, tmp_path), tmp_path / "e.yaml")
    words = ["--config", config, "--seed_everything=5", "--model.init_args.optimizer.total_steps=9"]
    printed = printed_config(capsys, words)
    assert printed["trainer"]["max_steps"] == 9
    assert printed["model"]["init_args"]["seed"] == printed["data"]["seed"] == 5


def test_the_data_take_the_size_of_the_model(
    shards: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(experiment(shards, tmp_path), tmp_path / "e.yaml")
    monkeypatch.chdir(tmp_path)
    words = ["--model.init_args.tokenizer.image_size=32", "--trainer.fast_dev_run=1"]
    assert main(["fit", "--config", config, *words]) == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bogus=3"], "unknown option --bogus=3"),
        (["--trainer.max_stepz=3"], "--trainer.max_stepz"),
        (["--trainer.max_steps=many"], "trainer.max_steps"),
        (["--model.init_args.tokenizer.resampler.widht=3"], "resampler.widht"),
        (["--model.init_args.tokenizer.resampler.width=wide"], "resampler.width"),
        (
            ["--model.init_args.tokenizer.visual_vocabulary.size=1"],
            "visual_vocabulary.size: expected at least 2",
        ),
        (["--model.class_path=v2flow.Nothing"], "v2flow.Nothing"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--init-from=nowhere.ckpt"], "nowhere.ckpt: no such checkpoint"),
        (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt: no such checkpoint"),
        (["--data.train=nowhere/train-000000.tar"], "nowhere/train-000000.tar"),
    ],
)
def test_bad_options_are_one_line(
    words: list[str],
    expected: str,
    shards: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write(experiment(shards, tmp_path), tmp_path / "e.yaml")
    message = error_line(capsys, ["fit", "--config", config, *words])
    assert expected in message and len(message) < 300


def test_typos_in_an_experiment_file(
    shards: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def message(change: Any) -> str:
        config = experiment(shards, tmp_path)
        change(config)
        return error_line(capsys, ["fit", "--config", write(config, tmp_path / "e.yaml")])

    assert "tokenizer.resampler.witdh" in message(
        lambda c: c["model"]["init_args"]["tokenizer"]["resampler"].update(witdh=3)
    )
    assert "trainner" in message(lambda c: c.update(trainner={"max_steps": 3}))
    assert "batchsize" in message(lambda c: c["data"].update(batchsize=3))
    assert "a value holds a NUL character" in message(lambda c: c.update(data="\0"))
    assert "model.optimizer.steps" in message(
        lambda c: c["trainer"].update(max_steps="${..model.optimizer.steps}")
    )


SCENES = ["--config", str(Path(__file__).parents[1] / "experiments/t2i/shapes-32-gemma270m.yaml")]


@pytest.mark.parametrize("option", ["layers", "pictures"])
def test_null_is_nothing_and_not_a_text(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a class inside the model too."""
    config = printed_config(capsys, [*SCENES, f"--model.init_args.text_to_image.{option}=null"])
    part = config["model"]["init_args"]["text_to_image"]
    assert part[option] is None and part["llm"] == "gemma3-270m"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.lr=fast", '"optimizer.lr": expected float, found fast;'),
        ("text_to_image.layers=six", '"text_to_image.layers": expected int, found six;'),
    ],
)
def test_another_type_is_named_with_what_was_expected(
    word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_line(capsys, ["fit", *SCENES, f"--model.init_args.{word}"])


def test_condense_keeps_option_and_reason() -> None:
    message = (
        'Parser key "model":\n  Does not validate against any of the Union subtypes\n  Subtypes: [A, B]\n'
        "  Errors:\n    - Problem with given class_path 'X':\n        Group 'tokenizer' does not accept option 'a.b'\n"
        "    - Expected a <class 'NoneType'>\n  Given value type: <class 'dict'>\n  Given value: {'much': 'more'}"
    )
    assert (
        condense(message)
        == "Parser key \"model\": Problem with given class_path 'X': unknown option 'tokenizer.a.b'"
    )
