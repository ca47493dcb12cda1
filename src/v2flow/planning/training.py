"""A training on fake tensors: the model, and the loss of a step of each stage."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from v2flow.config import from_dict
from v2flow.errors import V2FlowError
from v2flow.planning.experiment import Experiment
from v2flow.planning.without_weights import make_fake, nothing_loaded
from v2flow.tokenizer import V2FlowTokenizer
from v2flow.training.module import ReconstructionModule, seeded_generator

Loss = Callable[[str, int, int], Tensor]
"""(stage, batch size, draw) to the loss of a step."""


@dataclass
class Training:
    """What is trained, on fake tensors.

    Attributes:
        model: all of it, frozen parts included.
        mode: of its fake tensors.
        stages: kinds of steps, and the shares of the training between which they are taken.
        loss: of a step; to be called inside `mode`.
        blocks: parts that FSDP2 would gather one at a time.
        values: of the fake tensors that have one, see `make_fake`.
        whole: parameters that FSDP2 leaves whole on every device.
        assumptions: what was not known and how it was taken.
    """

    model: nn.Module
    mode: FakeTensorMode
    stages: dict[str, tuple[float, float]]
    loss: Loss
    blocks: list[nn.Module]
    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    whole: list[nn.Parameter] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)


def build_training(experiment: Experiment, caption_tokens: int | None = None) -> Training:
    """The training that an experiment describes.

    Args:
        caption_tokens: LLM ids of a caption; by default as many as a caption may have.

    Raises:
        V2FlowError: a module that is no tokenizer's and no text-to-image model's, or sizes that are not known.
    """
    if experiment.text_to_image:
        from v2flow.planning.text_to_image import text_to_image_training

        return text_to_image_training(experiment, caption_tokens)
    if caption_tokens is not None:
        raise V2FlowError(
            "option --caption-tokens: expected a text-to-image experiment, found a tokenizer's; leave it out"
        )
    with nothing_loaded():
        module = _instantiate(experiment)
    return tokenizer_training(module)


def tokenizer_training(module: ReconstructionModule) -> Training:
    """The training of a tokenizer's module; its tensors, wherever they were, become fake ones."""
    mode = FakeTensorMode()
    model: Any = module.model
    values = make_fake(module, mode)
    module.train()
    stages = module.training_stages()
    assumptions = []
    if isinstance(model, V2FlowTokenizer) and any(model.resampler.config.noise):
        # Made block by block, in no more memory than a block: thousands of small operators without a product.
        model.resampler.config = replace(model.resampler.config, noise=[0.0, 0.0])
        assumptions.append("Gumbel noise costs nothing beside the logits that it is added to")

    def loss(stage: str, batch_size: int, draw: int) -> Tensor:
        images = torch.empty(batch_size, 3, model.config.image_size, model.config.image_size)
        return module.training_losses(images, sum(stages[stage]) / 2, seeded_generator(images.device, draw))[
            "loss"
        ]

    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    blocks = [block for part in lists for block in part]
    return Training(model, mode, stages, loss, blocks, values, assumptions=assumptions)


def _instantiate(experiment: Experiment) -> ReconstructionModule:
    place, _, name = experiment.model.rpartition(".")
    kind = getattr(importlib.import_module(place), name)
    if not issubclass(kind, ReconstructionModule):
        raise V2FlowError(
            f"{experiment.path}: option model.class_path: expected a ReconstructionModule or a TextToImageModule, "
            f"found {experiment.model}; only these can be planned"
        )
    hints = get_type_hints(kind.__init__)
    options = {
        key: from_dict(hints[key], value) if is_dataclass(hints[key]) and isinstance(value, dict) else value
        for key, value in experiment.options.items()
    }
    return kind(**options)
