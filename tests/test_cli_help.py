"""Help of every verb at 80 columns, completion in the shell, and which verbs write their figures for a program."""

import shutil
import subprocess
from pathlib import Path

import pytest

from v2flow.cli import TRAINING_VERBS, build_parser, main
from v2flow.cli_completion import verbs_of

REPORTING = {
    "data openmoji", "data folder", "data cifar10", "data validate", "data domains", "data shapes", "data tokens",
    "data latents", "evaluate", "reconstruct", "benchmark", "plan",
}  # fmt: skip
"""Verbs of our own parser that report figures; `fit`, `validate` and `test` do as well."""


VERBS = [words for words, _ in verbs_of(build_parser()) if words[0] not in TRAINING_VERBS]


def help_of(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [(), *VERBS, *((verb,) for verb in TRAINING_VERBS)], ids=" ".join)
def test_help_is_readable_at_80_columns(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(words, capsys)
    assert text.lower().startswith(" ".join(["usage: v2flow", *words]))
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_every_verb_that_reports_has_json(capsys: pytest.CaptureFixture[str]) -> None:
    with_json = {" ".join(words) for words in VERBS if "--json FILE" in help_of(words, capsys)}
    assert with_json == REPORTING


# --- completion -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script for bash, as the command prints it."""
    pytest.importorskip("shtab")
    path = tmp_path_factory.mktemp("completion") / "v2flow"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        assert main(["completion", "bash"]) == 0
    return path


def completed(script: Path, *words: str) -> list[str]:
    """What bash makes of `v2flow WORDS` and the tabulator after it."""
    places = " ".join(f'"{word}"' for word in ("v2flow", *words))
    code = f'source "{script}"; COMP_WORDS=({places}); COMP_CWORD={len(words)}; _shtab_v2flow; '
    code += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=script.parent)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return [word.strip() for word in done.stdout.splitlines()]


def test_bash_completes_verbs_options_values_and_files(script: Path) -> None:
    (script.parent / "picture.png").touch()
    assert completed(script, "rec") == ["reconstruct"]
    assert completed(script, "data", "lat") == ["latents"]
    assert "--json" in completed(script, "plan", "--js")
    assert set(completed(script, "data", "latents", "--dtype", "")) == {"fp16", "bf16", "fp32"}
    assert completed(script, "evaluate", "pic") == ["picture.png"]
    assert {"--trainer.max_steps", "--trainer.max_epochs"} <= set(completed(script, "fit", "--trainer.max"))
    assert completed(script, "fit", "--config", "pic") == ["picture.png"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_reads_its_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "zsh"]) == 0
    (tmp_path / "_v2flow").write_text(capsys.readouterr().out)
    assert subprocess.run(["zsh", "-n", str(tmp_path / "_v2flow")]).returncode == 0
