"""`v2flow generate`: files that it writes, GenEval's layout, and bad input in one line."""

import json
from pathlib import Path

import pytest
import torch
from core_toys import small_config
from t2i_toys import tiny_llm, tiny_tokenizer

from v2flow import V2FlowForTextToImage, V2FlowTokenizer
from v2flow.cli import main
from v2flow.images import load_image
from v2flow.t2i.extension import extend_vocabulary
from v2flow.t2i.prompts import read_prompts
from v2flow.training.module import seeded_generator

RECORDS = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    {"tag": "counting", "include": [{"class": "apple", "count": 2}], "prompt": "a photo of two apples"},
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    tokenizer = V2FlowTokenizer(small_config()).eval()
    words = tiny_tokenizer()
    llm = tiny_llm("llama", len(words))
    tokens = extend_vocabulary(llm, words, tokenizer.codebook_size)
    model = V2FlowForTextToImage(tokenizer, llm, words, tokens)
    with torch.no_grad():
        for parameter in model.rows.parameters():
            parameter.normal_(std=0.5)
    folder = tmp_path_factory.mktemp("model") / "exported"
    model.save_pretrained(folder)
    return str(folder)


def error_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("v2flow: error: ")]
    assert len(errors) == 1 and errors[0] == lines[-1]
    return errors[0].removeprefix("v2flow: error: ")


def test_pictures_are_named_by_caption_and_listed(exported: str, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("the Moon, above!\n\n月\n")
    out = tmp_path / "out"
    command = ["generate", exported, "a dog", "--prompts", str(tmp_path / "more.txt"), "--out", str(out)]
    more = ["--top-k", "9", "--seed", "3", "--batch-size", "2"]  # whose batches change nothing
    assert main([*command, "--grid", str(tmp_path / "grid.png"), *more]) == 0
    report = json.loads((out / "generate.json").read_text())
    names = ["0000-a-dog.png", "0001-the-moon-above.png", "0002.png"]
    captions = ["a dog", "the Moon, above!", "月"]
    assert report["pictures"] == [{"file": n, "caption": c} for n, c in zip(names, captions, strict=True)]
    assert (report["seed"], report["top_k"], report["temperature"], report["guidance"]) == (3, 9, 1.0, 1.0)
    assert report["decode"] == {"steps": 1, "temperature": 0.0}
    assert sorted(p.name for p in out.glob("*.png")) == names
    model = V2FlowForTextToImage.from_pretrained(exported)
    expected = model.generate(captions, top_k=9, generator=seeded_generator(torch.device("cpu"), 3, 0))
    for name, picture in zip(names, expected, strict=True):
        torch.testing.assert_close(load_image(out / name), picture, atol=0.5 / 255 + 1e-5, rtol=0)
    assert load_image(tmp_path / "grid.png").shape[1] > 16
    before = (out / names[0]).read_bytes()
    assert main([*command, "--top-k", "9", "--seed", "3"]) == 0
    assert (out / names[0]).read_bytes() == before


def test_geneval_s_layout(exported: str, tmp_path: Path) -> None:
    """As the official evaluator walks it: folders of digits, metadata.jsonl of one object, samples/DIGITS.png."""
    prompts = tmp_path / "evaluation_metadata.jsonl"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    folder = tmp_path / "geneval"
    command = ["generate", exported, "--prompts", str(prompts), "--geneval", str(folder), "--samples", "2"]
    assert main([*command, "--mode", "steps=2,temperature=1.0", "--guidance", "2"]) == 0
    found = sorted(folder.iterdir())
    assert [path.name for path in found] == ["00000", "00001"]
    for path, record in zip(found, RECORDS, strict=True):
        assert json.loads((path / "metadata.jsonl").read_text()) == record
        samples = sorted((path / "samples").iterdir())
        assert [sample.name for sample in samples] == ["0000.png", "0001.png"]
        assert all(load_image(sample).shape == (3, 16, 16) for sample in samples)
        assert samples[0].read_bytes() != samples[1].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a dog"], "options --out and --geneval"),
        (["--out", "OUT"], "captions: expected at least one, found none"),
        (["", "--out", "OUT"], "caption 0: expected some words, found ''"),
        (["a dog " * 100, "--out", "OUT"], "expected at most 64 tokens"),
        (
            ["caf\udce9", "--out", "OUT"],
            "caption 0: expected text, found 'caf\\udce9' (surrogates not allowed)",
        ),
        (["a dog", "--out", "OUT", "--samples", "0"], "option --samples: expected at least 1"),
        (["a dog", "--out", "OUT", "--top-p", "2"], "option top_p"),
        (["a dog", "--out", "OUT", "--mode", "fastest"], "unknown decode mode 'fastest'"),
        (["a dog", "--out", "OUT", "--batch-size", "0"], "option batch_size"),
        (["--prompts", "nowhere.txt", "--out", "OUT"], "nowhere.txt: no such file"),
        (["a dog", "--geneval", "OUT"], "option --geneval: prompt 0 ('a dog'): expected the key 'tag'"),
    ],
)
def test_bad_input_is_one_line(
    exported: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    assert message in error_line(capsys, ["generate", exported, *arguments])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.txt", "\n \n", "expected at least one caption, found none"),
        ("bad.jsonl", '{"prompt": "a dog"}\n{', "bad.jsonl, line 2: not JSON"),
        (
            "other.jsonl",
            '{"caption": "a dog"}',
            'other.jsonl, line 1: expected a JSON object with the text "prompt"',
        ),
    ],
)
def test_bad_prompt_files_are_one_line(
    name: str, text: str, message: str, exported: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    command = ["generate", exported, "--prompts", str(tmp_path / name), "--out", str(tmp_path / "out")]
    assert message in error_line(capsys, command)


def test_marks_of_windows_and_unicode_line_ends_are_no_captions(tmp_path: Path) -> None:
    plain, records = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_bytes("\ufeffa dog\r\na cat\u2028asleep\r\n".encode())
    assert [prompt.caption for prompt in read_prompts(plain)] == ["a dog", "a cat\u2028asleep"]
    records.write_bytes('\ufeff{"prompt": "a dog\u2028asleep"}\n'.encode())
    assert [prompt.caption for prompt in read_prompts(records)] == ["a dog\u2028asleep"]


def test_a_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["generate", str(tmp_path / "nowhere"), "a dog", "--out", str(tmp_path / "out")]
    assert "nowhere: neither an exported folder nor a hub repository" in error_line(capsys, command)
