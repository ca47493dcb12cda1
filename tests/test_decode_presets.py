"""Presets of decoding, and the frontier that they come from."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from core_toys import small_config
from training_toys import write_shards

from v2flow.decode_modes import PRESETS, presets_of, read_presets, select_modes, shipped_presets
from v2flow.decoding import decode_options
from v2flow.errors import V2FlowError
from v2flow.probes.frontier import KID, equal_in_quality, pareto, pick_presets, thinned, tune, within
from v2flow.tokenizer import V2FlowTokenizer

OWN = {"presets": {name: {"options": {"steps": i + 2}} for i, name in enumerate(PRESETS)}}


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer() -> V2FlowTokenizer:
    torch.manual_seed(0)
    model = V2FlowTokenizer(small_config()).eval()
    for parameter in model.head.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def row(seconds: float, kid: float, psnr: float = 20.0, se: float = 0.01) -> dict[str, float]:
    return {"seconds": seconds, KID: kid, f"{KID}_se": se, "psnr": psnr}


ROWS = {"a": row(1, 0.60), "b": row(2, 0.52), "c": row(3, 0.55), "d": row(4, 0.50, 25.0), "e": row(9, 0.51)}


def test_the_frontier_and_the_presets_by_hand() -> None:
    assert pareto(ROWS) == ["a", "b", "d"]
    assert thinned("abcdefg", 3) == ["a", "d", "g"] and thinned("ab", 3) == ["a", "b"]
    assert pick_presets(ROWS, 0.25, 0.05) == {"fast": "a", "balanced": "b", "best": "d"}
    assert pick_presets(ROWS, 0.05, 0.01) == {"fast": "b", "balanced": "d", "best": "d"}
    assert within(ROWS, 0.0, errors=2.5) == "b" and within(ROWS, 0.0, errors=1.0) == "d"


def test_equal_in_quality_needs_both_figures() -> None:
    assert equal_in_quality(ROWS, row(20, 0.51, 20.05)) == "b"
    assert equal_in_quality(ROWS, row(20, 0.51, 20.2)) == "d"
    assert equal_in_quality(ROWS, row(20, 0.40)) is None


def test_tuning_takes_the_cheapest_of_the_equal_ones() -> None:
    asked = []

    def measure(options: dict[str, Any]) -> dict[str, float]:
        asked.append(options)
        return row(
            options["steps"] * options["guidance"],
            0.5 + 0.1 * abs(options["guidance"] - 1.5) + 0.005 / options["steps"],
        )

    assert tune(measure, {"guidance": 3.0, "steps": 20}, {"guidance": [1.0, 1.5, 3.0], "steps": [5, 20]}) == {
        "guidance": 1.5, "steps": 5,
    }  # fmt: skip
    assert [o["steps"] for o in asked] == [20, 20, 20, 5, 20]


def test_a_preset_is_its_options(tokenizer: V2FlowTokenizer) -> None:
    ids = torch.randint(0, 32, (2, 8), generator=draws(1))
    pictures = {name: tokenizer.decode(ids, draws(), preset=name) for name in PRESETS}
    for name, options in shipped_presets().items():
        decode_options(dict(options))
        assert torch.equal(pictures[name], tokenizer.decode(ids, draws(), **options))
    assert not torch.allclose(pictures["fast"], pictures["best"], atol=1e-4)
    with pytest.raises(
        V2FlowError, match="option preset: expected one of fast, balanced, best, found 'quick'"
    ):
        tokenizer.decode(ids, preset="quick")
    with pytest.raises(V2FlowError, match="options preset and steps: expected one of them"):
        tokenizer.decode(ids, preset="fast", steps=3)


def test_presets_are_modes_of_tokenizers_that_have_them(tokenizer: V2FlowTokenizer) -> None:
    known = {"own": {"steps": 3}, "fast": {"steps": 7}}
    chosen = select_modes(["best", "fast"], known, presets_of(tokenizer))
    assert chosen == {"best": dict(shipped_presets()["best"]), "fast": {"steps": 7}}, (
        "the checkpoint's own come first"
    )
    assert select_modes(None, known, presets_of(tokenizer)) == known
    with pytest.raises(V2FlowError, match="unknown decode mode 'best'"):
        select_modes(["best"], known, presets_of(torch.nn.Linear(1, 1)))
    written = "steps=4,guidance=2,guidance_interval=0.3:0.8"
    assert select_modes([written], known)[written]["guidance_interval"] == [0.3, 0.8]


def test_an_exported_tokenizer_keeps_presets_of_its_own(tokenizer: V2FlowTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "plain")
    assert "decode_presets" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    benchmark().write_presets(tmp_path / "plain", OWN)
    loaded = V2FlowTokenizer.from_pretrained(tmp_path / "plain")
    assert loaded.decode_presets["best"] == {"steps": 4}
    loaded.save_pretrained(tmp_path / "again")
    assert V2FlowTokenizer.from_pretrained(tmp_path / "again").decode_presets == loaded.decode_presets


@pytest.mark.parametrize(
    "bad", [{}, [], {"presets": {"fast": {}}}, {"presets": dict.fromkeys(PRESETS, {"options": {"stepz": 1}})},
            {"presets": dict.fromkeys(PRESETS, {})}],
)  # fmt: skip
def test_bad_presets_are_one_line(bad: Any) -> None:
    with pytest.raises(V2FlowError, match="^here: ") as error:
        read_presets(bad, "here")
    assert "\n" not in str(error.value)


def benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "decoding_frontier.py"
    spec = importlib.util.spec_from_file_location("decoding_frontier", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_frontier_is_measured_resumed_and_becomes_presets(
    tokenizer: V2FlowTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The whole script on 6 pictures: its files, its presets, and a second start that measures nothing again."""
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    shards = write_shards(tmp_path)["val"]
    tokenizer.save_pretrained(tmp_path / "model")
    script, out = benchmark(), tmp_path / "out"
    monkeypatch.setattr(script, "LITERAL", script.LITERAL | {"steps": 2})
    monkeypatch.setattr(script, "TUNING", {"guidance": [1.0, 2.9], "steps": [1]})
    monkeypatch.setattr(script, "STRONGER", {"temperature": [0.8]})
    words = [str(tmp_path / "model"), "--data", shards, "--out", str(out), "--points", "one_step", "steps_2",
             "--pictures", "6", "--screen", "4", "--literal-screen", "4", "--batch-size", "3", "--rounds", "2",
             "--tuning-data", shards, "--presets", str(tmp_path / "presets.json")]  # fmt: skip
    script.main(words)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    document = json.loads((out / "frontier.json").read_text())
    assert found == document["found"] and set(found["presets"]) == set(PRESETS)
    assert set(document["screen"]) == {"one_step", "steps_2"} and len(document["literal"]) == 4
    assert all(len(seconds) == 2 for seconds in document["seconds"].values())
    assert document["literal"]["literal,guidance=2.9,steps=2,temperature=1.0"]["field_evaluations"] == 16
    presets = read_presets(json.loads((tmp_path / "presets.json").read_text()), "presets")
    assert presets["best"] == document["final"][found["presets"]["best"]]["options"]
    assert "field evaluations" in (out / "README.md").read_text()
    assert (out / "frontier.svg").read_text().startswith("<svg")

    monkeypatch.setattr(script, "sweep_decoding", lambda *_: pytest.fail("measured again"))
    script.main(words)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    with pytest.raises(V2FlowError, match="name another folder"):
        script.main([*words, "--seed", "1"])
