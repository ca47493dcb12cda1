"""`--json FILE`: figures of trainings and of a benchmark, as they stand in the run's own files."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_benchmark import run, write_experiment, write_suite
from training_toys import experiment, write, write_shards

from v2flow.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_fit_and_validate_write_what_was_logged_last(tmp_path: Path) -> None:
    config = experiment(write_shards(tmp_path), tmp_path, max_steps=2)
    config["model"]["init_args"]["decode_modes"] = {"one_step": {"steps": 1, "temperature": 0.0}}
    path = write(config, tmp_path / "e.yaml")
    assert main(["fit", "--config", path, "--json", str(tmp_path / "new" / "fit.json")]) == 0
    fitted = read(tmp_path / "new" / "fit.json")
    (line,) = (tmp_path / "run" / "version_0" / "validation.jsonl").read_text().splitlines()
    assert fitted["step"] == 2 and fitted["figures"]["train/loss"] > 0
    assert fitted["figures"]["val/psnr"] == pytest.approx(json.loads(line)["psnr"], rel=1e-6)
    scored = tmp_path / "validate.json"
    assert main(["validate", "--config", path, "--ckpt_path", "last", "--json", str(scored)]) == 0
    assert read(scored)["figures"]["val/psnr"] == pytest.approx(fitted["figures"]["val/psnr"], rel=1e-6)
    assert not any(name.startswith("train/") for name in read(scored)["figures"])


def test_benchmark_writes_plan_and_results(tmp_path: Path) -> None:
    write_experiment(tmp_path)
    suite, out = write_suite(tmp_path), tmp_path / "figures.json"
    assert run(suite, "--plan", "--json", str(out)) == 0
    rows = read(out)["rows"]
    assert list(rows) == ["As it stands", "Keys of 4"] and rows["Keys of 4"]["tokens"] == 16
    assert run(suite, "--report", "--json", str(out)) == 0
    assert read(out) == read(tmp_path / "out" / "results.json") and len(read(out)["pending"]) == 2
