"""Benchmark suites: every row is a real training of its own process, finished rows are kept, and mistakes are named."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_toys import experiment, write, write_shards

from v2flow.benchmark import read_suite, row_command
from v2flow.cli import main

SUITES = sorted((Path(__file__).parent.parent / "experiments" / "benchmark").glob("*.yaml"))


def write_suite(folder: Path, **changes: Any) -> Path:
    values = {
        "title": "A suite",
        "experiment": str(folder / "experiment.yaml"),
        "arguments": ["--model.init_args.optimizer.total_steps=2"],
        "seeds": [3],
        "rows": [
            {"name": "As it stands"},
            {"name": "16 codes", "arguments": ["--model.init_args.tokenizer.visual_vocabulary.size=16"]},
        ],
    } | changes
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(suite: Path) -> int:
    return main(
        ["benchmark", str(suite), "--out", str(suite.parent / "out"), "--runs", str(suite.parent / "runs")]
    )


def test_rows_are_trained_once_and_tabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(experiment(write_shards(tmp_path), tmp_path), tmp_path / "experiment.yaml")
    broken = write_suite(
        tmp_path, rows=[{"name": "As it stands"}, {"name": "16 codes", "arguments": ["--nothing=1"]}]
    )
    assert run(broken) == 2
    error = capsys.readouterr().err
    assert "row '16 codes'" in error and "--nothing=1" in error and "fit.log" in error

    assert run(write_suite(tmp_path)) == 0
    output = capsys.readouterr().out
    assert "row 1 of 2" not in output and "row 2 of 2: 16 codes, seed 3" in output
    first, second = (
        json.loads((tmp_path / "out" / f"{slug}-seed3.json").read_text())
        for slug in ("as-it-stands", "16-codes")
    )
    assert [r["weights"]["ema"]["codebook"]["size"] for r in (first, second)] == [32, 16]
    assert first["step"] == second["step"] == 2 and first["minutes"] > 0
    assert second["command"][-1] == "--model.init_args.tokenizer.visual_vocabulary.size=16"
    assert "--seed_everything=3" in second["command"] and str(tmp_path / "runs") not in str(second)

    table = (tmp_path / "out" / "README.md").read_text()
    psnr = second["weights"]["ema"]["modes"]["one_step"]["psnr"]
    assert f"| 16 codes | 3 | one_step | {psnr:.2f} |" in table
    assert table.count("v2flow fit --config") == 2

    assert run(write_suite(tmp_path)) == 0
    assert "row" not in capsys.readouterr().out.split("# A suite")[0]


def test_a_row_of_another_command_is_trained_again(tmp_path: Path) -> None:
    """A result belongs to the words and the experiment file that made it, not to the name of its row alone."""
    write(experiment(write_shards(tmp_path), tmp_path), tmp_path / "experiment.yaml")
    result = tmp_path / "out" / "one-seed0.json"
    for size in (16, 24):
        rows = [{"name": "one", "arguments": [f"--model.init_args.tokenizer.visual_vocabulary.size={size}"]}]
        assert run(write_suite(tmp_path, rows=rows, seeds=[0])) == 0
        assert json.loads(result.read_text())["weights"]["ema"]["codebook"]["size"] == size
    minutes = result.read_text()
    changed = experiment(write_shards(tmp_path), tmp_path)
    changed["model"]["init_args"]["tokenizer"]["decoder"]["heads"] = 4
    write(changed, tmp_path / "experiment.yaml")
    assert run(write_suite(tmp_path, rows=rows, seeds=[0])) == 0
    assert result.read_text() != minutes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row": []}, "unknown key 'row'; expected one of title, experiment, rows"),
        ({"rows": [{"arguments": []}]}, "row 1: missing 1 required positional argument: 'name'"),
        ({"rows": [{"name": "a b"}, {"name": "A-B"}]}, "a name of its own for each row, found 'a-b'"),
        ({"rows": None}, "rows: expected a list of trainings, found None"),
        ({"rows": [{"name": 3}]}, "expected a name in words, found 3"),
        ({"rows": ["name"]}, "row 1: expected the keys name, arguments, experiment, found str"),
    ],
)
def test_mistakes_in_a_suite(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = write_suite(tmp_path, **changes)
    assert run(suite) == 2
    error = capsys.readouterr().err
    assert str(suite) in error and message in error


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_rows_of_a_shipped_suite_are_read_by_the_command_line(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent.parent.parent)
    suite = read_suite(path)
    configs = []
    for row in suite.rows:
        with pytest.raises(SystemExit) as exit_:
            main([*row_command(suite, row, 5), "--print_config"])
        assert exit_.value.code == 0, row.name
        configs.append(capsys.readouterr().out)
        trainer = yaml.safe_load(configs[-1])["trainer"]
        assert trainer["max_steps"] % trainer["val_check_interval"] == 0
    assert len(set(configs)) == len(suite.rows), "two rows are the same training"
