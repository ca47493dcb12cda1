"""Parameters of a model by part."""

from typing import Any

from torch import nn

from v2flow.planning.without_weights import held_networks
from v2flow.t2i.text_to_image import V2FlowForTextToImage


def parameters_by_part(model: nn.Module) -> dict[str, dict[str, int]]:
    """Part -> {"trained", "frozen", "buffers"}: parameters that learn, that do not, and elements of buffers.

    Parts are the model's own children; of a velocity head its parts, of an LLM its body, table and head. A codec's
    frozen autoencoder is counted with the codec. Shared tensors count once.
    """
    seen: set[int] = set()
    return {name: counts for name, part in _parts(model) if any((counts := _count(part, seen)).values())}


def _parts(model: Any) -> list[tuple[str, nn.Module]]:
    if isinstance(model, V2FlowForTextToImage):
        llm: Any = model.llm
        table, head = llm.get_input_embeddings(), llm.get_output_embeddings()
        return [
            ("visual rows", model.rows), ("LLM table", table), ("LLM head", head), ("LLM body", llm),
            ("tokenizer", model.tokenizer),
        ]  # fmt: skip
    parts: list[tuple[str, nn.Module]] = []
    for name, child in model.named_children():
        inner = [(f"{name}.{n}", part) for n, part in child.named_children()] if name == "head" else []
        parts += [*inner, (name, child)]
    own = nn.Module()
    own._parameters, own._buffers = model._parameters, model._buffers
    return [*parts, ("own", own)]


def _count(part: nn.Module, seen: set[int]) -> dict[str, int]:
    held = [p for network in held_networks(part) for p in network.parameters()]
    counts = {"trained": 0, "frozen": 0, "buffers": 0}
    for kind, tensors in (("parameters", [*part.parameters(), *held]), ("buffers", list(part.buffers()))):
        for tensor in tensors:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            learns = "trained" if tensor.requires_grad else "frozen"
            counts["buffers" if kind == "buffers" else learns] += tensor.numel()
    return counts
