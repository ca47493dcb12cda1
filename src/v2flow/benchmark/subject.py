"""One row under measurement: its training steps, what they hold in memory, and of a tokenizer how fast it codes."""

import copy
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from v2flow.decode_modes import takes_generator
from v2flow.planning.ledger import IN_PLACE
from v2flow.training.module import ReconstructionModule, SeededModule, seeded_generator

CLIP = 3.0
"""Norm to which gradients are clipped, as in the shipped experiments; it does not change the cost."""


class TrainingSubject:
    """A module with an optimiser that changes nothing; what a step is trained on, the subclasses say.

    Attributes:
        stages: kinds of training steps, and the shares of the training between which steps are of that kind.
    """

    def __init__(self, module: SeededModule, batch_size: int, device: torch.device) -> None:
        self.module = module.to(device)
        self.model = cast(Any, self.module.model)
        self.stages: dict[str, tuple[float, float]] = {"all": (0.0, 1.0)}
        configured: Any = self.module.configure_optimizers()
        self.optimizer: torch.optim.Optimizer = (
            configured["optimizer"] if isinstance(configured, dict) else configured
        )
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.device, self.batch_size = device, batch_size

    def loss(self, stage: str, draw: int) -> Tensor:
        """The loss of a step of this stage; a draw is the same at every call."""
        raise NotImplementedError

    def time(self, draw: int) -> dict[str, float]:
        """Seconds of each stage's step, of their mean `step`, and of whatever else is timed, once."""
        raise NotImplementedError

    def share(self, stage: str) -> float:
        """Share of the training that a stage takes, in [0, 1]."""
        begin, end = self.stages[stage]
        return end - begin

    def step(self, stage: str, draw: int) -> None:
        """A training step in the Trainer's order: the last step's gradients lie there during forward."""
        loss = self.loss(stage, draw)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()

    def step_seconds(self, draw: int) -> dict[str, float]:
        """Seconds of each stage's step, and of their mean `step`, once."""
        seconds = {
            f"step {stage}": seconds_of(partial(self.step, stage, draw), self.device) for stage in self.stages
        }
        return seconds | {"step": sum(self.share(stage) * seconds[f"step {stage}"] for stage in self.stages)}

    def flops(self, stage: str, draw: int) -> int:
        """FLOPs of forward and backward."""
        return count_flops(lambda: self.loss(stage, draw).backward())

    def resident_bytes(self) -> int:
        """Weights, buffers and optimiser state."""
        state = [x for values in self.optimizer.state.values() for x in values.values()]
        held = [*self.module.parameters(), *self.module.buffers(), *state]
        return sum(x.numel() * x.element_size() for x in held if isinstance(x, Tensor))

    def peak_memory(self, stage: str, draws: int) -> int:
        """Largest number of bytes in tensors at any moment of steps of this stage."""

        def steps() -> None:
            # One more than the draws: no gradients lie there during the forward pass of the first.
            for draw in (0, *range(draws)):
                self.step(stage, draw)

        self.optimizer.zero_grad()
        return self.resident_bytes() + peak_rise(steps, self.device)


class Subject(TrainingSubject):
    """A copy of a tokenizer's module, on pictures and ids of noise."""

    module: ReconstructionModule

    def __init__(self, module: ReconstructionModule, batch_size: int, device: torch.device) -> None:
        super().__init__(copy.deepcopy(module), batch_size, device)
        self.stages = module.training_stages()
        self.takes_generator = takes_generator(self.model)
        noise, size = seeded_generator(device, batch_size), self.model.config.image_size
        self.images = torch.rand(batch_size, 3, size, size, generator=noise, device=device)
        shape = (batch_size, self.model.num_tokens)
        self.ids = torch.randint(0, self.model.codebook_size, shape, generator=noise, device=device)

    def loss(self, stage: str, draw: int) -> Tensor:
        """The loss in the middle of a stage; the draw decides its random numbers."""
        progress = sum(self.stages[stage]) / 2
        return self.module.training_losses(self.images, progress, seeded_generator(self.device, draw))["loss"]

    def encode(self) -> None:
        """Encodes the batch once."""
        self.model.encode(self.images)

    def decode(self, mode: str, draw: int) -> None:
        """Decodes the batch's ids once in this mode."""
        options = dict(self.module.decode_modes[mode])
        if self.takes_generator:
            options["generator"] = seeded_generator(self.device, draw)
        self.model.decode(self.ids, **options)

    def time(self, draw: int) -> dict[str, float]:
        """Seconds of each stage's step, of encoding, and of each way to decode, once."""
        self.module.train()
        seconds = self.step_seconds(draw)
        self.module.eval()
        seconds["encode"] = seconds_of(self.encode, self.device)
        for mode in self.module.decode_modes:
            seconds[f"decode {mode}"] = seconds_of(partial(self.decode, mode, draw), self.device)
        return seconds


def _taking_tensors(formula: Callable[..., Any]) -> Callable[..., Any]:
    """A formula of torch's own table for a counter, which gives to others shapes in place of tensors."""

    def count(*args: Any, **kwargs: Any) -> Any:
        return formula(*args, **kwargs)

    count._get_raw = True  # type: ignore[attr-defined]
    return count


_IN_PLACE = {operator: _taking_tensors(formula) for operator, formula in IN_PLACE.items()}


def count_flops(action: Callable[[], Any]) -> int:
    """FLOPs of the matrix products and convolutions in a call, attention counted as the two products it is."""
    counter = FlopCounterMode(display=False, custom_mapping=_IN_PLACE)
    with sdpa_kernel(SDPBackend.MATH), counter:
        action()
    return counter.get_total_flops()


def peak_rise(action: Callable[[], Any], device: torch.device) -> int:
    """Largest number of bytes in tensors at any moment of `action`, beyond those that were there before it.

    On a CPU `action` should free none of those: the profiler does not know their sizes.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    # Read when the first profiler starts: without it every profile writes lines of its own to standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def seconds_of(action: Callable[[], None], device: torch.device) -> float:
    """Wall-clock seconds of a call, with the device synchronised before and after."""
    _synchronize(device)
    start = time.perf_counter()
    action()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
