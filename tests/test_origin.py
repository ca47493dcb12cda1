"""When and by which code a figure was made."""

import shutil
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest

import v2flow.origin
from v2flow.origin import current_commit, origin


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another project's repository with one commit, the package copied into a folder in it."""
    package = tmp_path / "site-packages" / "v2flow" / "origin.py"
    package.parent.mkdir(parents=True)
    shutil.copy(v2flow.origin.__file__, package)
    (tmp_path / "own.txt").write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", "own.txt")
    git(tmp_path, "commit", "-m", "one")
    monkeypatch.setattr(v2flow.origin, "__file__", str(package))
    return tmp_path


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """The answer is kept for the life of a process."""
    current_commit.cache_clear()
    yield
    current_commit.cache_clear()


def git(project: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(project), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_inside_another_project_the_commit_is_not_that_ones(project: Path) -> None:
    assert current_commit() is None


def test_the_commit_of_a_clone_is_told_and_that_files_differ(project: Path) -> None:
    git(project, "add", "site-packages")
    git(project, "commit", "-m", "two")
    head = git(project, "rev-parse", "HEAD")
    assert current_commit() == head[:10]
    (project / "own.txt").write_text("2")
    assert current_commit() == head[:10]  # asked before the work
    current_commit.cache_clear()
    assert current_commit() == head[:10] + "+"


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert current_commit() is None


def test_the_date_is_in_utc() -> None:
    found = origin()
    assert found["commit"] == current_commit()
    age = datetime.now(timezone.utc) - datetime.fromisoformat(str(found["date"]))
    assert 0 <= age.total_seconds() < 60
