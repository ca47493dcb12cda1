"""Benchmark suites: every row is a real training of its own process, finished rows are kept, and mistakes are named."""

import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_toys import experiment, write, write_shards

from v2flow.benchmark.plan import check_held_out, plan_suite
from v2flow.benchmark.runs import _curve, kept_results
from v2flow.benchmark.suite import Suite, fit_command, read_suite
from v2flow.cli import main
from v2flow.errors import V2FlowError

SUITES = sorted((Path(__file__).parent.parent / "experiments" / "benchmark").glob("*.yaml"))
OWN = """
import torch

class Rounded(torch.nn.Module):
    image_size, num_tokens, codebook_size = 16, 16, 32

    def encode(self, images):
        return (images.mean(1).unfold(1, 4, 4).unfold(2, 4, 4).mean((-1, -2)) * 31).round().long().flatten(1)

    def decode(self, ids):
        grey = (ids / 31).view(-1, 1, 4, 4).expand(-1, 3, -1, -1)
        return torch.nn.functional.interpolate(grey, 16)

def build():
    return Rounded()
"""
ROWS: list[dict[str, Any]] = [
    {"name": "As it stands"},
    {"name": "Keys of 4", "arguments": ["--model.init_args.tokenizer.resampler.key_dim=4"]},
    {"name": "Mine", "tokenizer": "rounded_tokenizer:build"},
    {"name": "Breaks", "arguments": ["--data.batch_size=1000"]},
]


def write_suite(folder: Path, **changes: Any) -> Path:
    values = {
        "title": "A suite",
        "experiment": str(folder / "experiment.yaml"),
        "arguments": ["--model.init_args.optimizer.total_steps=2"],
        "evaluate": {"data": str(folder / "test-000000.tar")},
        "seeds": [3],
        "rows": ROWS[:2],
    } | changes
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_experiment(folder: Path, **tokenizer: Any) -> dict[str, str]:
    """The toy experiment with its own training and test shards beside it."""
    shards = write_shards(folder)
    (folder / "test-000000.tar").write_bytes(Path(shards["val"]).read_bytes())
    config = experiment(shards, folder)
    for part, options in tokenizer.items():
        config["model"]["init_args"]["tokenizer"][part] |= options
    write(config, folder / "experiment.yaml")
    return shards


def run(suite: Path, *words: str) -> int:
    out, runs = suite.parent / "out", suite.parent / "runs"
    return main(["benchmark", str(suite), "--out", str(out), "--runs", str(runs), *words])


def results(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "out" / "results.json").read_text())["rows"]
    return rows


@dataclass(frozen=True)
class Finished:
    """A suite that was run to its end once; the tests below go on from it, in their order."""

    folder: Path
    status: int
    output: str
    error: str
    files: list[str]
    rows: list[dict[str, Any]]
    pending: list[list[Any]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """All of `ROWS`; the last one breaks."""
    folder = tmp_path_factory.mktemp("suite")
    write_experiment(folder)
    (folder / "rounded_tokenizer.py").write_text(OWN)
    output, error = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(error):
        patch.chdir(folder)
        status = run(write_suite(folder, rows=ROWS))
    files = sorted(path.name for path in (folder / "out").glob("*-seed3.json"))
    document = json.loads((folder / "out" / "results.json").read_text())
    return Finished(
        folder, status, output.getvalue(), error.getvalue(), files, document["rows"], document["pending"]
    )


@pytest.mark.slow
def test_rows_are_trained_once_scored_and_reported(
    finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "2 of 4 done" in finished.output and "3 of 4 done" in finished.output
    first, second, _ = finished.rows
    assert first["step"] == second["step"] == 2 and first["minutes"] > 0
    assert (first["tokens"], first["codebook_size"], first["bits"]) == (16, 32, 80)
    assert first["parameters"] > second["parameters"]
    assert second["command"][-1] == "--model.init_args.tokenizer.resampler.key_dim=4"
    assert "--seed_everything=3" in second["command"]
    assert str(finished.folder / "runs") not in str(second["command"])
    assert first["weights"]["ema"]["images"] == 6 and first["protocol"]["split"] == "test"

    out = finished.folder / "out"
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*-seed3.json")}
    monkeypatch.chdir(finished.folder)
    assert run(write_suite(finished.folder, rows=ROWS[:3])) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "run again"
    assert "+0.0%" in capsys.readouterr().out
    assert (out / first["grid"]).is_file()
    page = (out / "README.md").read_text()
    assert f"{second['weights']['ema']['modes']['one_step']['psnr']:.2f}" in page
    assert page.count("v2flow fit --config") == 2
    assert "<html" in (out / "report.html").read_text()


def test_a_failed_row_is_named_and_the_others_are_kept(finished: Finished) -> None:
    assert finished.status == 2 and "row 'Breaks'" in finished.error
    assert [row["name"] for row in finished.rows] == ["As it stands", "Keys of 4", "Mine"]
    assert finished.files == ["as-it-stands-seed3.json", "keys-of-4-seed3.json", "mine-seed3.json"]
    assert finished.pending == [["Breaks", 3]]


def test_a_tokenizer_of_ones_own_is_scored_beside_the_others(finished: Finished) -> None:
    mine = finished.rows[2]
    assert mine["command"] is None and mine["bits"] == 80
    assert mine["weights"]["ema"]["modes"]["own"]["psnr"] > 5


@pytest.mark.slow
def test_a_killed_training_goes_on_from_its_last_checkpoint(finished: Finished) -> None:
    (finished.folder / "out" / "keys-of-4-seed3.json").unlink()
    (folder,) = (finished.folder / "runs").glob("keys-of-4-seed3-*")
    (folder / "trained.json").unlink()
    assert run(write_suite(finished.folder, rows=[ROWS[1]])) == 0
    (again,) = results(finished.folder)
    assert len(list(folder.glob("fit/version_*"))) == 2
    assert again["step"] == 2 and again["weights"] == finished.rows[1]["weights"]


@pytest.mark.slow
def test_a_row_that_is_scored_in_another_way_is_not_trained_again(finished: Finished) -> None:
    evaluate = {"data": str(finished.folder / "test-000000.tar"), "limit": 4}
    assert run(write_suite(finished.folder, rows=[ROWS[0]], evaluate=evaluate)) == 0
    (again,) = results(finished.folder)
    assert again["weights"]["ema"]["images"] == 4
    assert len(list((finished.folder / "runs").glob("as-it-stands-seed3-*/fit/version_*"))) == 1


@pytest.mark.slow
def test_a_row_of_another_command_is_trained_again(finished: Finished) -> None:
    """A result belongs to the words and the experiment file that made it, not to the name of its row alone."""
    row = {"name": "Keys of 4", "arguments": ["--model.init_args.tokenizer.visual_vocabulary.size=24"]}
    assert run(write_suite(finished.folder, rows=[row])) == 0
    (again,) = results(finished.folder)
    assert again["codebook_size"] == 24 and again["identity"] != finished.rows[1]["identity"]

    suite, out = read_suite(write_suite(finished.folder, rows=[row])), finished.folder / "out"
    assert len(kept_results(suite, plan_suite(suite, out, progress=False), out)) == 1
    file = finished.folder / "experiment.yaml"
    before = file.read_text()
    try:
        write_experiment(finished.folder, decoder={"heads": 4})
        assert kept_results(suite, plan_suite(suite, out, progress=False), out) == []
    finally:
        file.write_text(before)


@pytest.mark.slow
def test_minutes_become_steps_of_each_rows_own(tmp_path: Path) -> None:
    write_experiment(tmp_path)
    wide = {"name": "wide", "arguments": ["--model.init_args.tokenizer.resampler.depth=12"]}
    assert run(write_suite(tmp_path, rows=[{"name": "narrow"}, wide], minutes=0.2), "--plan") == 0
    kept = json.loads((tmp_path / "out" / "overhead.json").read_text())["rows"]
    assert kept["wide"]["step_flops"] > kept["narrow"]["step_flops"]
    assert kept["narrow"]["step_time_ratio"]["median"] == 1.0


def test_a_line_of_the_curve_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    for version, text in enumerate(('{"step": 2, "psnr": 9}\n{"step": 4, "ps', '{"step": 4, "psnr": 11}\n')):
        path = tmp_path / "fit" / f"version_{version}" / "validation.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert _curve(tmp_path) == [{"step": 2, "psnr": 9}, {"step": 4, "psnr": 11}]


def test_a_report_measures_nothing_and_keeps_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_experiment(tmp_path)
    suite = write_suite(tmp_path, minutes=0.2)
    assert run(suite, "--report") == 2 and not list((tmp_path / "out").iterdir())
    (tmp_path / "out" / "overhead.json").write_text('{"key": "of other rows", "rows": {}}')
    assert run(suite, "--report") == 2
    assert "overhead.json: expected the step times of" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["overhead.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row": []}, "unknown key 'row'; expected one of title, experiment, evaluate, rows"),
        ({"rows": [{"arguments": []}]}, "row 1: missing 1 required positional argument: 'name'"),
        ({"rows": [{"name": "a b"}, {"name": "A-B"}]}, "a name of its own for each row, found 'a-b'"),
        ({"rows": None}, "rows: expected a list of trainings, found None"),
        ({"rows": [{"name": 3}]}, "expected a name in words, found 3"),
        ({"rows": ["name"]}, "row 1: expected the keys name, arguments, experiment"),
        ({"evaluate": {"date": 1}}, "evaluate: unknown key 'date'"),
        ({"reference": "VQ"}, "reference: expected the name of a row, found 'VQ'"),
        ({"minutes": -1}, "minutes: expected a positive number or null, found -1"),
        ({"seeds": 1}, "seeds: expected a list of integers such as [0, 1], found 1"),
        ({"seeds": []}, "seeds: expected a list of integers such as [0, 1], found []"),
        ({"arguments": "--x=1"}, "suite.yaml: arguments: expected a list of words, found '--x=1'"),
        ({"rows": [{"name": "a", "arguments": ["--x", 5]}]}, "row 'a': arguments: expected a list of words"),
        (
            {"rows": [{"name": "a", "tokenizer": "no_such:build", "optional": True}]},
            "none of them can be built",
        ),
        (
            {"rows": [{"name": "a", "tokenizer": "m:f", "arguments": ["x"]}]},
            "either a tokenizer or an experiment",
        ),
    ],
)
def test_mistakes_in_a_suite(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = write_suite(tmp_path, **changes)
    assert run(suite) == 2
    error = capsys.readouterr().err
    assert str(suite) in error and message in error


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"arguments": ["--model.init_args.tokenizer.visual_vocabulary.size=16"]},
            "found 16 from 16 (64 bits)",
        ),
        (
            {"arguments": ["--model.init_args.tokenizer.resampler.token_grid=[2,2]"]},
            "found 4 from 32 (20 bits)",
        ),
        ({"arguments": ["--model.class_path=v2flow.Nothing"]}, "v2flow.Nothing"),
        ({"arguments": ["--nothing=1"]}, "nothing"),
        ({"experiment": "no/such.yaml"}, "no/such.yaml"),
        ({"tokenizer": "no_such_module:build"}, "no_such_module"),
    ],
)
def test_a_row_that_cannot_be_compared_or_built_is_refused_before_any_training(
    row: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_experiment(tmp_path)
    assert run(write_suite(tmp_path, rows=[{"name": "As it stands"}, {"name": "Other"} | row])) == 2
    error = capsys.readouterr().err
    assert "row 'Other'" in error and message in error and error.count("\n") <= 2
    assert not (tmp_path / "runs").exists()


def test_an_optional_row_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_experiment(tmp_path)
    rows = [{"name": "As it stands"}, {"name": "Public", "tokenizer": "no_such:build", "optional": True}]
    assert run(write_suite(tmp_path, rows=rows), "--plan") == 0
    assert "row 'Public' is left out" in capsys.readouterr().err


def test_evaluation_pictures_are_held_out(tmp_path: Path) -> None:
    train = write_experiment(tmp_path)["train"]
    with pytest.raises(V2FlowError, match=r"train-000000.tar is also a training shard"):
        check_held_out(train, train, "row 'a'")
    copy = tmp_path / "copy-000000.tar"
    copy.write_bytes(Path(train).read_bytes())
    with pytest.raises(V2FlowError, match=r"24 groups of .* are in the training shards as well, train000"):
        check_held_out(str(copy), train, "row 'a'")
    check_held_out(str(tmp_path / "test-000000.tar"), train, "row 'a'")


def test_too_few_pictures_for_a_frechet_distance_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_experiment(tmp_path)
    suite = write_suite(tmp_path, evaluate={"data": str(tmp_path / "test-000000.tar"), "limit": 6})
    assert run(suite, "--plan") == 0
    assert "6 evaluation pictures: no Fréchet distance is given below 2560" in capsys.readouterr().err


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_rows_of_a_shipped_suite_are_read_by_the_command_line(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent.parent.parent)
    suite: Suite = read_suite(path)
    configs = []
    for row in suite.rows:
        if row.tokenizer is not None:
            continue
        with pytest.raises(SystemExit) as exit_:
            main([*fit_command(suite, row, 5, 100), "--print_config"])
        assert exit_.value.code == 0, row.name
        configs.append(capsys.readouterr().out)
        trainer = yaml.safe_load(configs[-1])["trainer"]
        assert trainer["max_steps"] % trainer["val_check_interval"] == 0
    assert len(set(configs)) == len(configs), "two rows are the same training"
