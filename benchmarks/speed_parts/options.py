"""What is measured, at full size and at the size of a smoke test."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from v2flow.config import TokenizerConfig, from_dict
from v2flow.planning.experiment import read_experiment
from v2flow.training.tokenizer_module import TokenizerModule

CPU = torch.device("cpu")
_TOKENIZER = "model.init_args.tokenizer"
SMALL = [
    f"{_TOKENIZER}.{option}"
    for option in (
        "image_size=16",
        "vocabulary={source: random, size: 64, dim: 16}",
        "resampler.width=8", "resampler.depth=1", "resampler.token_grid=[4,4]", "resampler.key_dim=8",
        "visual_vocabulary.size=32", "decoder.width=16", "decoder.heads=2", "decoder.encoder_depth=1",
        "decoder.decoder_depth=1", "velocity.width=16", "velocity.heads=2", "velocity.depth=1",
    )
] + ["data.batch_size=4"]  # fmt: skip
"""Changes that make a toy of any experiment."""


@dataclass(frozen=True)
class Options:
    """Options of the command line that decide what is measured; the defaults are the full size.

    Attributes:
        experiment: of the parts step, data and scaling.
        reference: of the part reference.
        changes: `OPTION=VALUE` for both, as for `v2flow fit`.
        data: training shards of the part data; None takes the experiment's.
        rounds: repetitions in turns, after one that is thrown away.
        reference_rounds: the same for a picture of the reference's size.
        steps_a_round: training steps of a round of the part data.
        hook_steps: training steps of which callbacks' hooks are timed.
        memory_gb: GB (2**30 bytes) of data that a step of the reference's size may take.
        vocabulary_tokens: tokens of the part vocabulary.
        vocabulary_sizes: entries, width and width of queries and keys of each of its rows.
        axes: what the part scaling varies -> its values, ascending; see `scaling.point`.
        scaling_batch: pictures of a step where the batch is not what varies.
        smoke: everything at toy sizes, to see that it runs.
    """

    experiment: Path = Path("experiments/tokenizer/openmoji-64.yaml")
    reference: Path = Path("experiments/tokenizer/reference-512.yaml")
    changes: tuple[str, ...] = ()
    data: str | None = None
    rounds: int = 7
    reference_rounds: int = 2
    steps_a_round: int = 14
    hook_steps: int = 22
    memory_gb: float = 22.0
    vocabulary_tokens: int = 1024
    vocabulary_sizes: tuple[tuple[int, int, int], ...] = (
        (32000, 4096, 32), (32000, 4096, 512), (32000, 4096, 4096), (262144, 640, 32), (262144, 640, 512),
        (262144, 640, 640),
    )  # fmt: skip
    axes: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {
            "tokens": (16, 64, 144, 256), "vocabulary": (1024, 4096, 16384, 65536),
            "image size": (32, 64, 96, 128), "batch": (2, 4, 8, 16, 32),
        }
    )  # fmt: skip
    scaling_batch: int = 8
    smoke: bool = False

    @property
    def all_changes(self) -> list[str]:
        """Changes of the experiments, those of a smoke test first."""
        return [*(SMALL if self.smoke else []), *self.changes]

    def plain(self) -> dict[str, Any]:
        """As JSON says it."""
        values = asdict(self)
        values["vocabulary_sizes"] = [list(size) for size in self.vocabulary_sizes]
        values["axes"] = {name: list(points) for name, points in self.axes.items()}
        return values | {
            "experiment": str(self.experiment), "reference": str(self.reference), "changes": list(self.changes)
        }  # fmt: skip


def smoke_options(**given: Any) -> Options:
    """Toy sizes of everything."""
    toy: dict[str, Any] = {
        "rounds": 2, "reference_rounds": 1, "steps_a_round": 2, "hook_steps": 4, "memory_gb": 8.0,
        "vocabulary_tokens": 16, "vocabulary_sizes": ((64, 8, 4),), "scaling_batch": 2, "smoke": True,
        "axes": {"tokens": (1, 4, 9, 16), "vocabulary": (32, 64, 128, 256), "image size": (16, 20, 24, 32),
                 "batch": (1, 2, 4, 8)},
    }  # fmt: skip
    return Options(**(toy | given))


def tokenizer_config(path: Path, options: Options) -> tuple[TokenizerConfig, int]:
    """The tokenizer of an experiment file and its batch size; nothing is loaded. A toy has pixel patches as latents.

    Raises:
        V2FlowError: what is wrong with the file or a change.
    """
    experiment = read_experiment(path, options.all_changes)
    values = experiment.options["tokenizer"] | ({"codec": {}} if options.smoke else {})
    config: TokenizerConfig = from_dict(TokenizerConfig, values)
    return config, experiment.batch_size


def module_of(options: Options) -> tuple[TokenizerModule, int]:
    """The module of the experiment, and its batch size."""
    config, batch_size = tokenizer_config(options.experiment, options)
    return TokenizerModule(config), batch_size
