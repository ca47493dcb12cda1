"""What Lightning says of its own accord and a user can do nothing about is left out."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """No word of Lightning's on seeds and devices: what is only built uses neither."""
    talkers = [
        logging.getLogger(f"lightning.{name}")
        for name in ("fabric.utilities.seed", "pytorch.utilities.rank_zero")
    ]
    levels = [talker.level for talker in talkers]
    try:
        for talker in talkers:
            talker.setLevel(logging.ERROR)
        yield
    finally:
        for talker, level in zip(talkers, levels, strict=True):
            talker.setLevel(level)


def silence_lightning() -> None:
    """Leaves out what Lightning says about itself and a user can do nothing about."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    # Lightning 2.6 calls older names of jsonargparse and of PyTorch's pytree.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", module="lightning")
    # It says so whether the model is sharded or not; where it is, averaging is refused.
    warnings.filterwarnings(
        "ignore", message="You're using the WeightAveraging callback with a model that overrides"
    )
    # Each run has a folder of its own; Lightning says this of the parent folder when it will save nothing.
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
