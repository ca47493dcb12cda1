"""Which data an experiment's model learns from: pictures, or token ids for a text-to-image model.

Lightning's command line has to know the class of the data before it reads the experiment file.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

from v2flow.training.data_module import ShardDataModule
from v2flow.training.streaming import StreamingDataModule

TEXT_TO_IMAGE = "TextToImageModule"


def data_module_class(arguments: list[str]) -> type[StreamingDataModule]:
    """The class of the data module for the words after `v2flow`."""
    if model_class(arguments).rpartition(".")[2] != TEXT_TO_IMAGE:
        return ShardDataModule
    from v2flow.training.token_data_module import TokenDataModule

    return TokenDataModule


def model_class(arguments: list[str]) -> str:
    """The class of the model that experiment files and options name, the last one counts; empty without any.

    What is wrong with them, the command line itself says later.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--model", "--model.class_path", dest="model")
    try:
        options, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return ""
    if options.model is not None:
        return str(options.model)
    named = [_named_in(path) for path in options.config]
    return next((name for name in reversed(named) if name), "")


def _named_in(path: str) -> str:
    try:
        document: Any = yaml.safe_load(Path(path).read_text())
        return str(document["model"]["class_path"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return ""
