"""Bytes on one device under DDP and under FSDP2, and what each sends over the links in a step."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from v2flow.planning.training import Training
from v2flow.planning.without_weights import held_networks
from v2flow.visual_vocabulary import VisualVocabulary


@dataclass
class Sizes:
    """Bytes of a model's parts, all of them in the type that they are kept in.

    Attributes:
        trained: parameters that learn; gradients take as much, AdamW's two means twice as much.
        whole: frozen parameters that every device keeps, codecs included.
        frozen: other frozen parameters, which FSDP2 shares out as well.
        buffers: tables, codebooks and statistics.
        averaged: what weight averaging keeps a copy of.
        block: the largest part that FSDP2 gathers at a time.
        root: what it gathers for the whole step.
        reduced: statistics that ranks add up in every step, beside gradients.
    """

    trained: int
    whole: int
    frozen: int
    buffers: int
    averaged: int
    block: int
    root: int
    reduced: int


def sizes_of(training: Training, ema: bool) -> Sizes:
    """The sizes of what is trained."""
    model = training.model
    parameters = list(model.parameters())
    kept = {id(p) for p in training.whole}
    held = [p for network in held_networks(model) for p in network.parameters()]
    learning = [p for p in parameters if p.requires_grad]
    sharded = [p for p in parameters if id(p) not in kept]
    in_blocks = {id(p) for block in training.blocks for p in block.parameters()}
    codebooks = [part for part in model.modules() if isinstance(part, VisualVocabulary) and part.training]
    saved = model.state_dict().keys()
    persistent = [x for name, x in model.named_buffers() if name in saved]
    return Sizes(
        trained=bytes_of(learning),
        whole=bytes_of([p for p in parameters if id(p) in kept]) + bytes_of(held),
        frozen=bytes_of([p for p in sharded if not p.requires_grad]),
        buffers=bytes_of(model.buffers()),
        averaged=(bytes_of(learning) + bytes_of(persistent)) if ema else 0,
        block=max((bytes_of(block.parameters()) for block in training.blocks), default=0),
        root=bytes_of([p for p in sharded if id(p) not in in_blocks]),
        reduced=sum(bytes_of([c.sums, c.counts]) for c in codebooks),
    )


@dataclass
class Memory:
    """Bytes on one device at the step's peak.

    Attributes:
        weights: parameters, or the share of them that a device keeps.
        gathered: parameters of other devices' shares that lie here as well, and their gradients.
        gradients: of what learns, with DDP's buckets.
        optimizer: AdamW's two means.
        ema: averaged weights.
        frozen: what every device keeps whole: codecs, tables, codebooks.
        working: activations; AdamW is fused and has no temporaries.
        total: all of it.
    """

    weights: float
    gathered: float
    gradients: float
    optimizer: float
    ema: float
    frozen: float
    working: float

    @property
    def total(self) -> float:
        """Bytes of all parts together."""
        return sum(asdict(self).values())


def ddp_memory(sizes: Sizes, activations: float, devices: int) -> Memory:
    """A whole copy of everything on each of `devices`.

    With more than one, DDP's buckets hold the gradients a second time (gradient_as_bucket_view is false by default).
    """
    return Memory(
        weights=sizes.trained + sizes.frozen,
        gathered=0,
        gradients=sizes.trained * (2 if devices > 1 else 1),
        optimizer=2 * sizes.trained,
        ema=sizes.averaged,
        frozen=sizes.whole + sizes.buffers,
        working=activations,
    )


def fsdp_memory(sizes: Sizes, activations: float, devices: int) -> Memory:
    """Parameters, gradients, optimiser and average shared out over `devices`; one block gathered, the next on its way.

    The gradient of a block is whole before it is shared out; the root's parameters stay from a step's start to its end.
    """
    own = 1 / devices
    return Memory(
        weights=(sizes.trained + sizes.frozen) * own,
        gathered=3 * sizes.block + 2 * sizes.root if devices > 1 else 0,
        gradients=sizes.trained * own,
        optimizer=2 * sizes.trained * own,
        ema=sizes.averaged * own,
        frozen=sizes.whole + sizes.buffers,
        working=activations,
    )


@dataclass
class Traffic:
    """Bytes that one device sends in a step.

    Attributes:
        behind: while it computes: gradients, and under FSDP2 parameters.
        before: while it waits: buffers where DDP broadcasts them, and sums of codebook statistics.
    """

    behind: float
    before: float


def ddp_traffic(sizes: Sizes, devices: int, local_buffers: bool) -> Traffic:
    """A ring all-reduce of the gradients: each device sends 2·(n−1)/n of their bytes.

    Args:
        local_buffers: DDP does not broadcast all buffers, frozen tables too, before each forward pass.
    """
    ring = 2 * (devices - 1) / devices
    broadcast = 0 if devices == 1 or local_buffers else sizes.buffers
    return Traffic(ring * sizes.trained, broadcast + ring * sizes.reduced)


def fsdp_traffic(sizes: Sizes, devices: int) -> Traffic:
    """Two all-gathers of the parameters and a reduce-scatter of the gradients: (n−1)/n of their bytes each."""
    ring = (devices - 1) / devices
    parameters = 2 * (sizes.trained + sizes.frozen)
    return Traffic(ring * (parameters + sizes.trained), 2 * ring * sizes.reduced)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' elements."""
    return sum(x.numel() * x.element_size() for x in tensors)
