"""Shared fixtures, and conditions stricter than a user's: deterministic algorithms, no network."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from loopback import connect_here

from v2flow.config import VocabularyConfig

REPOSITORY = Path(__file__).resolve().parent.parent
# Looked up before any test: a command that a test runs in another folder leaves what it found there in the environment.
PHOTOGRAPHS = Path(os.environ.get("V2FLOW_DATA") or REPOSITORY.parent / "shared" / "data").absolute()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first: whichever of two processes is done last, the other has not waited long."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session", autouse=True)
def strict_torch() -> None:
    """The same numbers in every run, and no more threads than the smallest machine has cores."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts from the same global random state, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """A connection to anything but this machine is an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the shared photographs (see its README), or the test is skipped."""
    if not (PHOTOGRAPHS / "cifar10").is_dir():
        pytest.skip(
            f"no photographs in {PHOTOGRAPHS}; set V2FLOW_DATA to a folder that holds cifar10/ and imagenet-sample/"
        )
    return PHOTOGRAPHS


@pytest.fixture
def tiny_vocabulary() -> VocabularyConfig:
    """64 random rows of width 16: as quick as a vocabulary can be."""
    return VocabularyConfig(source="random", size=64, dim=16)


@pytest.fixture
def slurm_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the test job 77 of SLURM, in `tmp_path`; gives the file that gets the words of `scontrol`."""
    command = tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/requeued"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    job = {"JOB_ID": "77", "JOB_NAME": "train", "NTASKS": "1", "NODEID": "0", "PROCID": "0", "LOCALID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "requeued"
