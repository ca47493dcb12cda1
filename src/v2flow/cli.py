"""The command `v2flow`: verbs, their options, and one place where mistakes become one line and exit status 2.

docs/command-line.md has all exit statuses. What a verb imports is imported inside it, so that `v2flow --help` answers
at once.
"""

import argparse
import sys
from typing import NoReturn

from v2flow import __version__
from v2flow.cli_benchmark import add_benchmark_verb
from v2flow.cli_completion import add_completion_verb
from v2flow.cli_data import add_data_verbs
from v2flow.cli_demo import add_demo_verb
from v2flow.cli_exit_status import INTERRUPTED, MISTAKE, READER_GONE, reader_is_gone
from v2flow.cli_generate import add_generate_verb
from v2flow.cli_model import add_model_verbs
from v2flow.cli_plan import add_plan_verb
from v2flow.errors import V2FlowError

TRAINING_VERBS = {
    "fit": "train what an experiment file describes",
    "validate": "score the validation shards of an experiment file",
    "test": "run the test shards of an experiment file",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are `V2FlowError`s instead of a usage text and an exit."""

    def error(self, message: str) -> NoReturn:
        """Raises the mistake instead of printing a usage text."""
        raise V2FlowError(f"{message}; see `{self.prog} --help`")


def build_parser() -> Parser:
    """The parser of all verbs; `arguments.run(arguments)` does the work of the chosen one."""
    parser = Parser(
        prog="v2flow",
        description="Train, score and use image tokenizers whose tokens live in the vocabulary space of an LLM.",
        epilog="Exit status: 0 if all went well, 1 after an error that is not yours (a traceback), 2 after a mistake "
        "in the input (one line on standard error), 130 after Ctrl-C, 138 for a training that SLURM is to run again, "
        "141 if what read the output has gone, 143 for a training or benchmark that SIGTERM has stopped.",
    )
    parser.add_argument("--version", action="version", version=f"v2flow {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    add_data_verbs(verbs)
    for verb, summary in TRAINING_VERBS.items():
        # Only listed here: their options are those of the experiment files, see `main`.
        verbs.add_parser(verb, help=summary, add_help=False)
    add_model_verbs(verbs)
    add_generate_verb(verbs)
    add_benchmark_verb(verbs)
    add_plan_verb(verbs)
    add_demo_verb(verbs)
    add_completion_verb(verbs)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one verb.

    Args:
        argv: the words after `v2flow`; those of the process when left out.

    Returns:
        Exit status: 0; 2 after a mistake in the input, which is one line on standard error; 130 after Ctrl-C; 141 if
        what reads the output has gone, as `head` does.

    Raises:
        SystemExit: after `--help` and `--version`; a training that a signal has stopped, see `run_training`.
    """
    try:
        _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except V2FlowError as error:
        return _fail(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            return READER_GONE
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("v2flow: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _run(arguments: list[str]) -> None:
    if arguments and arguments[0] in TRAINING_VERBS:
        from v2flow.cli_training import run_training

        run_training(arguments)
    else:
        options = build_parser().parse_args(arguments)
        options.run(options)


def _fail(message: str) -> int:
    print("v2flow: error:", " ".join(message.split()), file=sys.stderr)
    return MISTAKE
