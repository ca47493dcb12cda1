"""Stage 2 on fake tensors: an LLM of the right sizes beside a tokenizer that need not have been trained yet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from v2flow.config import TokenizerConfig, from_dict
from v2flow.errors import V2FlowError
from v2flow.hub import CONFIG, read_config
from v2flow.planning.experiment import Experiment, read_experiment
from v2flow.planning.language_models import CAPTION_VOCABULARY, language_model_config
from v2flow.planning.training import Training
from v2flow.planning.without_weights import make_fake, nothing_loaded
from v2flow.t2i.config import TextToImageConfig
from v2flow.t2i.extension import VisualTokens
from v2flow.t2i.small_llm import PREFIXES
from v2flow.t2i.text_to_image import V2FlowForTextToImage
from v2flow.t2i.trainable import find_blocks, set_trainable
from v2flow.t2i.visual_rows import VisualRows
from v2flow.tokenizer import V2FlowTokenizer
from v2flow.training.checkpoint import read_checkpoint
from v2flow.training.module import seeded_generator


class _WithoutWords(V2FlowForTextToImage):
    """Needs no LLM tokenizer: every caption has `max_caption` ids."""

    def caption_ids(self, captions: Sequence[str | None]) -> list[list[int]]:
        return [[0] * self.max_caption for _ in captions]


def text_to_image_training(experiment: Experiment, caption_tokens: int | None) -> Training:
    """The training of a text-to-image experiment.

    Raises:
        V2FlowError: an LLM or a tokenizer whose sizes are not known.
    """
    config: TextToImageConfig = from_dict(TextToImageConfig, experiment.options["text_to_image"])
    sizes, assumptions = _tokenizer_config(experiment, config.tokenizer)
    with nothing_loaded():
        tokenizer = V2FlowTokenizer(sizes)
        llm: Any = AutoModelForCausalLM.from_config(language_model_config(config.llm, config.layers))
        model = _assemble(config, tokenizer, llm)
    if config.llm.startswith(PREFIXES):
        assumptions.append(
            f"the LLM's own tokenizer finds {CAPTION_VOCABULARY:,} entries in the captions, the most"
        )
    if caption_tokens is not None:
        model.max_caption = caption_tokens
        assumptions.append(f"captions of {caption_tokens} LLM ids")
    else:
        assumptions.append(
            f"captions of {config.max_caption} LLM ids, as long as they may be; see --caption-tokens"
        )
    stages = config.step_kinds()
    mode = FakeTensorMode()
    values = make_fake(model, mode)
    model.train()
    tokenizer.eval()  # its codebook stands still

    def loss(stage: str, batch_size: int, draw: int) -> Tensor:
        generator = seeded_generator(torch.device("cpu"), draw)
        ids = torch.randint(0, tokenizer.codebook_size, (batch_size, model.num_tokens), generator=generator)
        share = config.full_at(config.step_of(stage))[0]
        words = config.sampled_words
        return model.loss(
            [None] * batch_size, ids, share, config.text_weight, generator, sampled_words=words
        ).total

    table, head = model.llm.get_input_embeddings(), model.llm.get_output_embeddings()
    whole = [*table.parameters(), *head.parameters(), *tokenizer.parameters()]
    return Training(model, mode, stages, loss, list(find_blocks(model.llm)), values, whole, assumptions)


def _assemble(config: TextToImageConfig, tokenizer: V2FlowTokenizer, llm: Any) -> _WithoutWords:
    """As `v2flow.t2i.build.assemble`, with the visual tokens behind the LLM's own rows and no strings for them."""
    known, codes = llm.get_input_embeddings().weight.shape[0], tokenizer.codebook_size
    tokens = VisualTokens(boi=known, first=known + 1, eoi=known + codes + 1, num_visual=codes)
    llm.resize_token_embeddings(tokens.eoi + 1, mean_resizing=False)
    rows = VisualRows(llm, tokens)
    llm = set_trainable(llm, config)
    if config.checkpointing:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return _WithoutWords(tokenizer, llm, None, tokens, rows, config.max_caption)


def _tokenizer_config(experiment: Experiment, name: str) -> tuple[TokenizerConfig, list[str]]:
    """Of the trained tokenizer, or of the experiment of its name beside this one's folder."""
    place = Path(name)
    if (place / CONFIG).is_file():
        return from_dict(TokenizerConfig, read_config(place)["tokenizer"]), []
    if place.is_file():
        return from_dict(TokenizerConfig, read_checkpoint(place, mmap=True)["v2flow"]["config"]), []
    file = experiment.path.resolve().parent.parent / "tokenizer" / f"{place.stem}.yaml"
    if not file.is_file():
        raise V2FlowError(
            f"{experiment.path}: option text_to_image.tokenizer: expected a trained tokenizer at {name} or its "
            f"experiment tokenizer/{place.stem}.yaml beside the folder of this one, found neither"
        )
    options = read_experiment(file).options["tokenizer"]
    return from_dict(TokenizerConfig, options), [
        f"a tokenizer as in tokenizer/{file.name}: {name} is not there yet"
    ]
