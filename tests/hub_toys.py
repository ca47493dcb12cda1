"""A stand-in for the hub: what would be uploaded is copied into a folder."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi


def stand_in_for_the_hub(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[str]:
    """Puts `ROOT/OWNER/NAME` in place of repositories; returns the list of those that are uploaded, as it grows."""
    uploaded: list[str] = []

    def create_repo(self: HfApi, repo_id: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(
        self: HfApi,
        *,
        repo_id: str,
        folder_path: Path,
        allow_patterns: Any,
        ignore_patterns: Any,
        **options: Any,
    ) -> str:
        assert allow_patterns is None and ignore_patterns is None  # everything in the folder
        shutil.copytree(folder_path, root / repo_id)
        uploaded.append(repo_id)
        return f"https://example.org/{repo_id}"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return uploaded


def tree(folder: Path) -> dict[str, bytes]:
    """Contents of all files by their path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
