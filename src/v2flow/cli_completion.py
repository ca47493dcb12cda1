"""The verb `v2flow completion`: the script with which a shell completes verbs, options and file names."""

import argparse
import inspect
from collections.abc import Iterator
from typing import Any

from v2flow.cli_words import sentence
from v2flow.errors import V2FlowError, missing

FILES = {"CHECKPOINT", "CSV", "EXPERIMENT", "FILE", "FILE.md", "IDS", "IMAGE", "SHARDS", "SUITE"}
"""Placeholders of options and arguments that are completed with the names of files and folders."""
FOLDERS = {"DIR"}

_EPILOG = """\
bash:
  mkdir -p ~/.local/share/bash-completion/completions
  v2flow completion bash > ~/.local/share/bash-completion/completions/v2flow
zsh, if ~/.zfunc is in $fpath:
  mkdir -p ~/.zfunc
  v2flow completion zsh > ~/.zfunc/_v2flow
It takes effect in the next shell."""


def add_completion_verb(verbs: Any) -> None:
    """Adds the verb to the subparsers of `v2flow`."""
    summary = "print the script with which a shell completes words"
    parser = verbs.add_parser(
        "completion",
        help=summary,
        description=sentence(summary),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    parser.set_defaults(run=run_completion)


def run_completion(options: argparse.Namespace) -> None:
    """`v2flow completion`."""
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise V2FlowError(f"completion {missing('shtab', 'cli')}") from error
    from v2flow.cli import TRAINING_VERBS, build_parser

    parser = build_parser()
    for words, verb in verbs_of(parser):
        if words[0] in TRAINING_VERBS:
            _add_training_options(verb)
        for action in verb._actions:
            if action.metavar in FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.metavar in FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(parser, options.shell))


def verbs_of(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Words and parsers of all verbs, such as `("data",)` and `("data", "folder")`."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                yield (*words, name), verb
                yield from verbs_of(verb, (*words, name))


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    """Those that every experiment has; what a model or a callback takes depends on its class, and is left out."""
    from lightning.pytorch import Trainer

    from v2flow.training.data_module import ShardDataModule
    from v2flow.training.token_data_module import TokenDataModule

    for name, words in (
        ("--config", "experiment file"),
        ("--ckpt_path", "checkpoint to go on from, or last"),
        ("--init-from", "checkpoint whose weights to start from"),
        ("--json", "also write the last figures here"),
    ):
        parser.add_argument(name, metavar="FILE", help=words)
    parser.add_argument("--help", action="store_true", help="all options of the verb")
    parser.add_argument("--print_config", action="store_true", help="all values, and run nothing")
    names = [f"--trainer.{name}" for name in inspect.signature(Trainer).parameters]
    for data in (ShardDataModule, TokenDataModule):
        names += [f"--data.{name}" for name in inspect.signature(data).parameters if name != "image_size"]
    for name in dict.fromkeys(names):
        parser.add_argument(name)
