"""One round of the faults of data, disk, memory and clock; `tests/faults/run.py --data 20` has many."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What was not as stated, by fault. In a process of its own: one that has trained must not be forked."""
    folder = tmp_path_factory.mktemp("faults")
    words = ["--stages", "--data=1", "--seed=7", f"--out={folder / 'faults.json'}", f"--folder={folder}"]
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run.py")), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (folder / "faults.json").is_file(), run.stdout + run.stderr
    found = json.loads((folder / "faults.json").read_text())["data_faults"]
    return {name: fault["differences"] for name, fault in found.items()}


def test_a_worker_that_is_killed(differences: dict[str, list[str]]) -> None:
    assert differences["worker_killed"] == []


def test_workers_that_are_always_killed(differences: dict[str, list[str]]) -> None:
    assert differences["worker_always_killed"] == []


def test_a_shard_that_vanishes(differences: dict[str, list[str]]) -> None:
    assert differences["shard_vanishes"] == []


def test_a_shard_cut_inside_a_member(differences: dict[str, list[str]]) -> None:
    assert differences["shard_cut_inside_a_member"] == []


def test_a_shard_cut_between_members(differences: dict[str, list[str]]) -> None:
    assert differences["shard_cut_at_a_member"] == []


def test_a_server_with_errors_that_pass(differences: dict[str, list[str]]) -> None:
    assert differences["server_errors_pass"] == []


def test_a_server_with_errors_that_last(differences: dict[str, list[str]]) -> None:
    assert differences["server_errors_last"] == []


def test_a_slow_server(differences: dict[str, list[str]]) -> None:
    assert differences["server_is_slow"] == []


def test_a_server_that_crawls(differences: dict[str, list[str]]) -> None:
    assert differences["server_crawls"] == []


def test_a_disk_that_is_full(differences: dict[str, list[str]]) -> None:
    assert differences["disk_full"] == []


def test_a_read_only_output_folder(differences: dict[str, list[str]]) -> None:
    assert differences["output_read_only"] == []


def test_out_of_memory(differences: dict[str, list[str]]) -> None:
    assert differences["out_of_memory"] == []


def test_losses_that_are_not_finite(differences: dict[str, list[str]]) -> None:
    assert differences["loss_not_finite"] == []


def test_a_clock_that_jumps(differences: dict[str, list[str]]) -> None:
    assert differences["clock_jumps"] == []
