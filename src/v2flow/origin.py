"""When and by which code a figure was made."""

import os
import shutil
import subprocess
from datetime import datetime, timezone
from functools import cache
from pathlib import Path


def origin() -> dict[str, str | None]:
    """For a report: `date`, of now, in UTC to the second, and the `commit` of the code, see :func:`current_commit`."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": current_commit(),
    }


@cache
def current_commit() -> str | None:
    """The commit of the working tree that this package lies in, with `+` after it if files differ from it.

    It is looked up once: ask before the work, during which the clone may move on while the code that runs does not.
    None for an installed package, even inside another project's repository, and without git.
    """
    package = Path(__file__)
    if shutil.which("git") is None:
        return None
    git = ["git", "-C", os.fspath(package.parent)]
    known = subprocess.run([*git, "ls-files", "--error-unmatch", package.name], capture_output=True)
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    if known.returncode or head.returncode:
        return None
    status = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True)
    return head.stdout.strip() + ("+" if status.stdout else "")
