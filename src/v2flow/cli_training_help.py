"""How `v2flow fit --help` looks."""

import textwrap
from typing import Any

from jsonargparse import DefaultHelpFormatter


class TrainingHelp(DefaultHelpFormatter):
    """Help with headings that are wrapped, and room for the longest class names in a line of 80 columns."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **({"max_help_position": 10} | options))

    def start_section(self, heading: str | None) -> None:
        """Headings are the first lines of docstrings, and as long as these."""
        super().start_section(textwrap.fill(heading, self._width) if heading else heading)
