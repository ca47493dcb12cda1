"""When and by which code a figure was made."""

import shutil
import subprocess
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
    for words in (["init", "-q"], ["add", "own.txt"], ["commit", "-q", "-m", "one"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True)
    monkeypatch.setattr(v2flow.origin, "__file__", str(package))
    return tmp_path


def test_the_commit_of_a_clone_is_told_and_that_files_differ(project: Path) -> None:
    assert current_commit() is None  # installed into another project's folder
    subprocess.run(["git", "-C", str(project), "add", "site-packages"], check=True)
    head = subprocess.run(
        ["git", "-C", str(project), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout
    assert current_commit() == head[:10] + "+"


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert current_commit() is None


def test_the_date_is_in_utc() -> None:
    found = origin()
    assert found["commit"] == current_commit()
    age = datetime.now(timezone.utc) - datetime.fromisoformat(str(found["date"]))
    assert 0 <= age.total_seconds() < 60
