"""Decode modes that somebody wrote: values of another type are one line, wherever they come from."""

from typing import Any

import pytest

from v2flow.decode_modes import PRESETS, read_presets, select_modes
from v2flow.errors import V2FlowError


@pytest.mark.parametrize(
    ("mode", "found"),
    [
        ("steps=two", "'two'"), ("steps=2.5", "2.5"), ("iterations=1.5", "1.5"), ("temperature=nan", "nan"),
        ("guidance=inf", "inf"), ("solver=1", "1"), ("guidance_interval=0.5", "0.5"),
        ("guidance_interval=0:x", "[0, 'x']"), ("steps=1:2", "[1, 2]"),
    ],
)  # fmt: skip
def test_a_mode_written_out_with_another_type(mode: str, found: str) -> None:
    name = mode.partition("=")[0]
    with pytest.raises(V2FlowError, match=f"^decode option {name}: expected a value such as ") as caught:
        select_modes([mode], {})
    assert str(caught.value).endswith(f"found {found}")


@pytest.mark.parametrize(
    "options", [{"iterations": 2.5}, {"steps": True}, {"guidance_interval": "ab"}, 3, [[1]]]
)
def test_presets_with_another_type(options: Any) -> None:
    with pytest.raises(V2FlowError, match="^here: presets: expected options of decode, found") as caught:
        read_presets({"presets": dict.fromkeys(PRESETS, {"options": options})}, "here")
    assert "\n" not in str(caught.value)
    assert read_presets({"presets": dict.fromkeys(PRESETS, {"options": {"guidance": 2}})}, "here")["best"]
