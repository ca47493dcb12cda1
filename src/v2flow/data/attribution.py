"""Which shards hold OpenMoji's pictures, and what is said of them: their licence asks for it wherever they show."""

import json
from collections.abc import Sequence
from pathlib import Path

OPENMOJI_SITE, OPENMOJI_LICENCE = "https://openmoji.org/", "https://creativecommons.org/licenses/by-sa/4.0/"


def made_of_openmoji(shards: str | Sequence[str]) -> bool:
    """Whether some of the shards, by pattern, path or URL, are OpenMoji's.

    The manifest of a local folder says so, else the folder's name: shards of tokens and latents, remote ones, and those
    of another machine tell no more. Nothing needs to be there.
    """
    patterns = [shards] if isinstance(shards, str) else shards
    return any(_is_openmoji(Path(pattern).parent) for pattern in patterns)


def _is_openmoji(folder: Path) -> bool:
    if "openmoji" in folder.name.lower():
        return True
    try:
        return bool(json.loads((folder / "manifest.json").read_text())["build"]["kind"] == "openmoji")
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def report_attribution(shards: str | Sequence[str]) -> str:
    """The line, in plain text, of a report that shows these pictures and reconstructions; empty if it needs none."""
    if not made_of_openmoji(shards):
        return ""
    return (
        f"The pictures are made of OpenMoji ({OPENMOJI_SITE}), CC BY-SA 4.0 ({OPENMOJI_LICENCE}); reconstructions are "
        "adapted from them under the same licence."
    )


def card_attribution(shards: str | Sequence[str]) -> str:
    """Source and licence of a training set in Markdown; empty if they are not known."""
    if not made_of_openmoji(shards):
        return ""
    return f"Made of [OpenMoji]({OPENMOJI_SITE}), [CC BY-SA 4.0]({OPENMOJI_LICENCE})."
