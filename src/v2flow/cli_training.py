"""`v2flow fit|validate|test`: Lightning's command line over experiment files, with short error messages."""

import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from omegaconf.errors import OmegaConfBaseException

import v2flow.training.ddp  # registers --trainer.strategy=ddp_local_buffers
import v2flow.training.fsdp2  # noqa: F401 registers --trainer.strategy=fsdp2
from v2flow.cli_exit_status import signals_in_trainer
from v2flow.cli_experiment import data_module_class
from v2flow.cli_quiet import quiet, silence_lightning
from v2flow.cli_run_files import RunConfigCallback, write_figures
from v2flow.cli_training_help import TrainingHelp
from v2flow.errors import V2FlowError, first_line
from v2flow.paths import name_pictures_folder
from v2flow.training.checkpoint import read_checkpoint
from v2flow.training.checkpoint_files import is_sharded, newest_checkpoint, previous_of, usable_checkpoint
from v2flow.training.checkpoint_folders import check_sharded_checkpoint
from v2flow.training.checkpoint_io import CheckedCheckpointIO
from v2flow.training.data_module import ShardDataModule
from v2flow.training.exhaustion import clear_exhaustion
from v2flow.training.health import HealthCallback
from v2flow.training.interruption import InterruptionCallback, TrainingInterrupted
from v2flow.training.resume import ExactResumeCallback
from v2flow.training.streaming import StreamingDataModule

LIGHTNING_CHECKPOINTS = ("best", "hpc")
"""Words that Lightning accepts as --ckpt_path and resolves itself; `last` it seeks in the new run's folder only."""


class TrainingCLI(LightningCLI):
    """LightningCLI with `--init-from` and `--json`, and the pictures' size handed from the model to the data."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs of Lightning's command line that v2flow has."""
        verbs = LightningCLI.subcommands()
        return {verb: verbs[verb] for verb in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--init-from` and `--json`, and hands the model's picture size to the data."""
        parser.add_argument(
            "--init-from",
            type=Optional[str],
            default=None,
            help="Checkpoint or exported folder whose weights to start from. Unlike --ckpt_path it leaves the "
            "optimiser, the step count and the position in the data as at the start of a run.",
        )
        parser.add_argument(
            "--json",
            type=Optional[str],
            default=None,
            help="File for the figures logged last, beside those that the run leaves in its own folder.",
        )
        if self.datamodule_class is ShardDataModule:
            # One size for both, whatever class the model is.
            parser.link_arguments(
                "model",
                "data.image_size",
                compute_fn=lambda module: module.model.config.image_size,
                apply_on="instantiate",
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds what makes a run outlive interruptions, as far as the experiment does not name it itself."""
        options: Any = self._get(self.config_init, "trainer")
        plugins, callbacks = _as_list(options.plugins), _as_list(options.callbacks)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(CheckedCheckpointIO())
        kinds = (ExactResumeCallback, InterruptionCallback, HealthCallback)
        callbacks += [kind() for kind in kinds if not any(isinstance(c, kind) for c in callbacks)]
        return super().instantiate_trainer(**{"plugins": plugins, "callbacks": callbacks} | kwargs)

    def _initialise(self) -> None:
        """Takes the weights of `--init-from`, or looks at `--ckpt_path` before Lightning fails on it at length."""
        options: Any = self.config[self.subcommand]
        if options.init_from is not None and options.ckpt_path is not None:
            raise V2FlowError(
                "options --init-from and --ckpt_path: expected one of them; --ckpt_path resumes a run, "
                "--init-from starts a new one from its weights"
            )
        if options.init_from is not None:
            self.model.initialise_from(options.init_from)
        path = options.ckpt_path
        if path == "last":
            path = self._newest()
        if path is not None and path not in LIGHTNING_CHECKPOINTS:
            path = _checked(path)
        if options.weights_only is False:
            raise V2FlowError(
                "option --weights_only: expected true: checkpoints hold tensors and plain types only"
            )
        # Said here, for strategies that read checkpoints themselves; without it an environment variable may forbid it.
        given = self.config_init[self.subcommand]
        given["ckpt_path"], given["weights_only"] = path, True

    def _newest(self) -> str | None:
        """The newest `last.ckpt` of all runs of this experiment; a training without one starts anew."""
        where = _checkpoint_folders(self.trainer)
        path = newest_checkpoint(*where)
        if path is None and self.subcommand != "fit":
            raise V2FlowError(f"option --ckpt_path last: expected {where[1]} in {where[0]}, found none")
        if path is None:
            rank_zero_info(f"--ckpt_path last: no {where[1]} in {where[0]} yet, a new run starts")
        return None if path is None else str(path)

    def before_fit(self) -> None:
        """Takes the start weights or looks at the checkpoint to resume from."""
        self._initialise()

    def before_validate(self) -> None:
        """Takes the weights to be scored."""
        self._initialise()

    def before_test(self) -> None:
        """Takes the weights to be scored."""
        self._initialise()

    def after_fit(self) -> None:
        """Writes the figures for `--json`."""
        write_figures(self.trainer, self.config[self.subcommand].json)

    after_validate = after_test = after_fit


def run_training(arguments: list[str]) -> None:
    """Runs `fit`, `validate` or `test` with the words after `v2flow`.

    Raises:
        V2FlowError: an unknown option, a value of the wrong type, a missing file or an unresolved `${…}`.
        KeyboardInterrupt: Ctrl-C, where it has not stopped a training between two steps.
        SystemExit: a signal has stopped the training; see `TrainingInterrupted` for the exit status.
    """
    verbs: dict[str, Any] = {
        # argparse's own usage text would list a hundred options before saying anything.
        verb: _SETTINGS | {"usage": f"v2flow {verb} --config FILE [--OPTION VALUE ...]"}
        for verb in TrainingCLI.subcommands()
    }
    with clear_exhaustion(), _clear_errors(f"v2flow {arguments[0]}"), _command_line(arguments):
        try:
            with signals_in_trainer():
                _training_cli(data_module_class(arguments), parser_kwargs=_SETTINGS | verbs)
        except TrainingInterrupted as stop:
            if stop.message:
                print(stop.message, file=sys.stderr)
            raise


def build_experiment(arguments: list[str]) -> tuple[Any, StreamingDataModule]:
    """The LightningModule and the data module that the words after `v2flow fit` describe; nothing is run.

    Raises:
        V2FlowError: as :func:`run_training`.
    """
    cli = experiment_cli(arguments)
    return cli.model, cli.datamodule


def experiment_cli(arguments: list[str], kind: type[TrainingCLI] = TrainingCLI) -> TrainingCLI:
    """The command line for the words after `v2flow fit`, as far as it comes without running anything.

    Raises:
        V2FlowError: as :func:`run_training`.
    """
    with _clear_errors("v2flow fit"), _command_line(arguments), quiet():
        return _training_cli(data_module_class(arguments), kind, parser_kwargs=_SETTINGS, run=False)


_SETTINGS: dict[str, Any] = {
    "parser_mode": "omegaconf+",
    "exit_on_error": False,
    "formatter_class": TrainingHelp,
}


def _training_cli(
    data: type[StreamingDataModule], kind: type[TrainingCLI] = TrainingCLI, **options: Any
) -> TrainingCLI:
    name_pictures_folder()
    silence_lightning()
    return kind(
        LightningModule,
        data,
        subclass_mode_model=True,
        save_config_callback=RunConfigCallback,
        # The modules configure their own optimiser: options for another one would do nothing.
        auto_configure_optimizers=False,
        **options,
    )


def _checked(path: str) -> str:
    """The checkpoint to be read for `path`: itself, or the one before it if it is damaged.

    Some strategies read it themselves, and not through `CheckedCheckpointIO`.
    """
    other = Path(path).is_dir() and not is_sharded(path) and not previous_of(path).exists()
    found = Path(path) if other else usable_checkpoint(path)
    if found.is_dir():
        check_sharded_checkpoint(found)  # which knows best what to say of another folder
    read_checkpoint(found, mmap=found.is_dir())
    return str(found)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _checkpoint_folders(trainer: Trainer) -> tuple[Path, str]:
    """A folder, and how to find `last.ckpt` of this experiment's runs in it."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return Path(callback.dirpath), "last*.ckpt"
    if not trainer.loggers:
        return Path(trainer.default_root_dir), "checkpoints/last*.ckpt"
    logger = trainer.loggers[0]
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name)), "*/checkpoints/last*.ckpt"


@contextmanager
def _clear_errors(command: str) -> Iterator[None]:
    """The parser's errors as one line each."""
    try:
        yield
    except ArgumentError as error:
        raise V2FlowError(f"{condense(str(error))}; see `{command} --help`") from error
    except MisconfigurationException as error:
        raise V2FlowError(f"experiment: {first_line(error)}") from error
    except OmegaConfBaseException as error:
        raise V2FlowError(f"experiment file: {first_line(error)}") from error
    except ValueError as error:
        if _raised_by_lightning(error):  # such as an accelerator that it does not know
            raise V2FlowError(f"experiment: {first_line(error)}") from error
        if "embedded null" in str(error):  # jsonargparse has taken the value for a path
            raise V2FlowError("experiment file: a value holds a NUL character; expected text") from error
        # jsonargparse wraps what an option's own check says in the story of every type that it tried.
        if isinstance(error, V2FlowError) or "Does not validate against" not in str(error):
            raise
        raise V2FlowError(condense(str(error))) from error


def _raised_by_lightning(error: BaseException) -> bool:
    """Whether the innermost frame of an error is Lightning's own, and not of what runs inside of it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return bool(str(error)) and str(name).startswith("lightning.")


def condense(message: str) -> str:
    """The words of a jsonargparse message that name the option and what is wrong with it, on one line.

    >>> condense("Parser key 'model':\\n  Does not validate against any of the Union subtypes\\n  Errors:\\n    - bad")
    "Parser key 'model': bad"
    """
    message, *given = re.split(r"\n\s*Given value type:", message)
    noise = re.compile(r"Does not validate against any|Subtypes:|Errors:$|Expected a <class 'NoneType'>")
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    lines = [line for line in lines if line and not noise.match(line)]
    # Where one of an option's types has said more than that it was not meant, the others have nothing to add.
    reasons = [line for line in lines[1:] if not line.startswith("Expected a <class ")]
    text = " ".join([*lines[:1], *reasons] if reasons else lines)
    if text.endswith(":") and given:  # an option of a class's own class, of which it says the type alone
        kinds = dict.fromkeys(re.findall(r"Expected a <class '(?!NoneType)([\w.]+)'>", message))
        found = re.search(r"Given value: (?:NestedArg\(.*val=)?'?(.*?)'?\)?(?:\n|$)", given[0])
        text += f" expected {' or '.join(kinds)}, found {found[1] if found else 'another type'}"
    text = re.sub(r"Group '([\w.]+)' does not accept option '([\w.]+)'", r"unknown option '\1.\2'", text)
    return text.replace("unrecognized arguments:", "unknown option")


def _nested_null(word: str) -> str:
    """`--model.init_args.part.option=null` as a mapping: of options so deep the parser makes the text `None` instead.

    >>> _nested_null("--model.init_args.text_to_image.layers=null")
    '--model.init_args.text_to_image={layers: null}'
    """
    return re.sub(r"^(--\w+\.init_args(?:\.\w+)+)\.(\w+)=null$", r"\1={\2: null}", word)


@contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    """LightningCLI reads the process's own words, also when it names itself in usage texts."""
    before = sys.argv
    # Lightning's launcher starts other ranks with the first word, where the command is a script and not a module.
    command = before[0] if Path(before[0]).name == "v2flow" else "v2flow"
    sys.argv = [command, *map(_nested_null, arguments)]
    try:
        yield
    finally:
        sys.argv = before
