"""benchmarks/generation_speed.py: an exported model, prompts of a file, ratios in a document."""

import json
import sys
from pathlib import Path

import pytest
from demo_toys import demo_tokenizer, write_text_to_image

pytest.importorskip("transformers", reason="needs the extra t2i")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import generation_speed


def test_ratios_are_of_the_captions_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo_tokenizer().save_pretrained(tmp_path / "tokenizer")
    painter = write_text_to_image(tmp_path / "t2i")
    (tmp_path / "prompts.txt").write_text("a red ring\n\ntwo dogs\nthe sea\n")
    words = [str(painter), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "speed.json")]
    assert generation_speed.main([*words, "--captions", "2", "--rounds", "1"]) == 0
    found = json.loads((tmp_path / "speed.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert found["captions"] == 2 and set(found["speed_ratio"]) == {"transformers", "transformers-uncached"}
    assert found["command"][1:3] == ["benchmarks/generation_speed.py", str(painter)]
    assert generation_speed.main([*words, "--captions", "4"]) == 2
    assert "option --captions: expected 1 to 3, the prompts of" in capsys.readouterr().err
