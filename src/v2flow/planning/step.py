"""What one training step takes: FLOPs, traffic and memory of each stage, read from a ledger of it."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from v2flow.errors import V2FlowError, first_line
from v2flow.planning.ledger import Ledger
from v2flow.planning.memory import bytes_of
from v2flow.planning.training import Training

ADAMW_PASSES = 20
"""Reads and writes of a parameter's size in torch's AdamW, one operator after another."""


@dataclass
class StepCost:
    """Forward and backward of one batch on one device.

    Attributes:
        share: of the training's steps.
        flops: forward and backward, recomputation included.
        backward: share of the FLOPs that backward has.
        traffic: bytes that operators read and write.
        operators: how many run.
        saved: bytes that are alive at the end of forward.
        activations: most bytes beside weights and gradients, so that these and all gradients are the step's peak.
    """

    share: float
    flops: float
    backward: float
    traffic: float
    operators: float
    saved: int
    activations: int


def step_costs(training: Training, batch_size: int, bf16: bool, draws: int = 1) -> dict[str, StepCost]:
    """The cost of a step of each stage: means over the draws, the most of memory.

    Args:
        bf16: under autocast to bfloat16, as Lightning's bf16-mixed.
        draws: of the random numbers that decide how much of a picture is masked.

    Raises:
        V2FlowError: a step whose shapes depend on weights or pictures.
    """
    costs = {}
    for stage, (begin, end) in training.stages.items():
        try:
            found = [_step(training, stage, batch_size, bf16, draw) for draw in range(draws)]
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise V2FlowError(
                f"stage {stage}: expected a step whose shapes need no data, found {first_line(error)}; this "
                "model cannot be planned"
            ) from error
        costs[stage] = StepCost(
            share=end - begin,
            flops=sum(c.flops for c in found) / draws,
            backward=sum(c.backward for c in found) / draws,
            traffic=sum(c.traffic for c in found) / draws,
            operators=sum(c.operators for c in found) / draws,
            saved=max(c.saved for c in found),
            activations=max(c.activations for c in found),
        )
    return costs


def trained_bytes(model: nn.Module) -> int:
    """Bytes of what learns, and of its gradients."""
    return bytes_of(p for p in model.parameters() if p.requires_grad)


def _step(training: Training, stage: str, batch_size: int, bf16: bool, draw: int) -> StepCost:
    for parameter in training.model.parameters():
        parameter.grad = None
    gradients = trained_bytes(training.model)
    ledger = Ledger(training.values)
    with torch.random.fork_rng(devices=[]), training.mode, ledger:
        torch.manual_seed(draw)
        with _autocast(bf16):
            loss = training.loss(stage, batch_size, draw)
        forward, saved, peak = ledger.flops, ledger.live, ledger.peak
        ledger.peak = ledger.live
        loss.backward()
        # In forward the gradients of the step before lie there as well, in backward they come one by one.
        activations = max(peak, ledger.peak - gradients)
        del loss
    for parameter in training.model.parameters():
        parameter.grad = None
    return StepCost(
        share=1.0,
        flops=ledger.flops,
        backward=1 - forward / max(ledger.flops, 1),
        traffic=ledger.traffic + ADAMW_PASSES * gradients,
        operators=ledger.operators,
        saved=saved,
        activations=activations,
    )


def _autocast(bf16: bool) -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16)
