"""What learns in a text-to-image model, shared out over ranks by FSDP2 (`fully_shard`)."""

from typing import Any

from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from v2flow.t2i.text_to_image import V2FlowForTextToImage
from v2flow.t2i.trainable import find_blocks


def shard_text_to_image(model: V2FlowForTextToImage, mesh: Any) -> None:
    """Shard the LLM's body block by block, and the visual rows; once, however often it is called.

    The table and the head stay whole on every rank: they are frozen, and their rows are read outside of any forward.
    """
    decoder = model.llm.get_decoder()
    if isinstance(decoder, FSDPModule):
        return
    for block in find_blocks(model.llm):
        fully_shard(block, mesh=mesh)
    table, head = model.llm.get_input_embeddings(), model.llm.get_output_embeddings()
    fully_shard(decoder, mesh=mesh, ignored_params={*table.parameters(), *head.parameters()})
    fully_shard(model.rows, mesh=mesh)
    for name in ("embed", "visual_logits", "text_log_sum_exp", "full_vocabulary"):
        register_fsdp_forward_method(model.rows, name)
