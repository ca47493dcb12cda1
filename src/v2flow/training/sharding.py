"""What learns in a text-to-image model, shared out over ranks by FSDP2 (`fully_shard`)."""

from typing import Any

from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from v2flow.t2i.text_to_image import V2FlowForTextToImage
from v2flow.t2i.trainable import find_blocks


def shard_text_to_image(model: V2FlowForTextToImage, mesh: Any) -> None:
    """Shard the LLM's body block by block, and what else learns with the whole model; once, however often it is called.

    The visual rows are read several times in a step, at the input and at the head: they belong to the model as a whole,
    whose parameters stay together from a method's start to the end of its backward pass. The table, the head and the
    tokenizer stay whole on every rank: they are frozen.
    """
    if isinstance(model, FSDPModule):
        return
    for block in find_blocks(model.llm):
        fully_shard(block, mesh=mesh)
    table, head = model.llm.get_input_embeddings(), model.llm.get_output_embeddings()
    frozen = {*table.parameters(), *head.parameters(), *model.tokenizer.parameters()}
    fully_shard(model, mesh=mesh, ignored_params=frozen)
    for name in ("loss", "log_likelihood", "text_perplexity", "generate"):
        register_fsdp_forward_method(model, name)
