"""Building a text-to-image model from its configuration: tokenizer, LLM, visual rows, and what of them learns."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from v2flow.data.batches import EvaluationBatches, SampleReader
from v2flow.data.loaders import EvaluationLoader
from v2flow.data.shards import ShardSet, open_shards
from v2flow.errors import V2FlowError
from v2flow.t2i.config import TextToImageConfig
from v2flow.t2i.extension import extend_vocabulary
from v2flow.t2i.initial_rows import initial_rows
from v2flow.t2i.language_model import load_language_model
from v2flow.t2i.small_llm import PREFIXES, caption_llm_tokenizer
from v2flow.t2i.text_to_image import V2FlowForTextToImage
from v2flow.t2i.trainable import set_trainable
from v2flow.t2i.visual_rows import VisualRows, check_family
from v2flow.t2i.word_directions import TokenWords, token_words, words_batch
from v2flow.tokenizer import V2FlowTokenizer


def build_text_to_image(config: TextToImageConfig, llm_tokenizer: str | None = None) -> V2FlowForTextToImage:
    """A text-to-image model before its training, in fp32 on the CPU.

    Args:
        llm_tokenizer: of a small LLM made here: the backend of a tokenizer trained before.

    Raises:
        V2FlowError: a tokenizer or an LLM that cannot be loaded or does not fit, or `config.pictures` missing where
            pictures are needed.
    """
    from v2flow.training.checkpoint import load_tokenizer

    where = f"option text_to_image.tokenizer: {config.tokenizer}"
    tokenizer = load_tokenizer(config.tokenizer, where)
    small = config.llm.startswith(PREFIXES)
    llm, words_tokenizer = load_language_model(
        config.llm,
        layers=config.layers,
        random_weights=config.random_weights,
        captions=_captions(config) if small and llm_tokenizer is None else None,
        tokenizer=caption_llm_tokenizer(llm_tokenizer) if small and llm_tokenizer is not None else None,
        seed=config.seed,
    )
    words = _words(tokenizer, config) if config.rows == "words" else None
    return assemble(config, tokenizer, llm, words_tokenizer, words)


def assemble(
    config: TextToImageConfig, tokenizer: V2FlowTokenizer, llm: Any, llm_tokenizer: Any,
    words: TokenWords | None = None,
) -> V2FlowForTextToImage:  # fmt: skip
    """The model of these parts; `llm` and `llm_tokenizer` are extended by the visual tokens, in place.

    Parts on the meta device give a model there, whose rows start nowhere.

    Args:
        words: what the visual tokens mean, for rows=words.
    """
    tokens = extend_vocabulary(llm, llm_tokenizer, tokenizer.codebook_size)
    if llm.get_input_embeddings().weight.is_meta:
        rows = VisualRows(llm, tokens)
    else:
        check_family(llm, tokens)
        codes = tokenizer.visual_vocabulary.codes
        start = initial_rows(config.rows, codes, llm, llm_tokenizer, tokens, words, config.seed)
        if start.report:
            found = ", ".join(f"{name} {share:.1%}" for name, share in start.report.items())
            rank_zero_info(f"visual rows from words: {found}")
        rows = VisualRows(llm, tokens, start.input, start.output)
    llm = set_trainable(llm, config)
    if config.checkpointing:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return V2FlowForTextToImage(tokenizer, llm, llm_tokenizer, tokens, rows, config.max_caption)


def _shards(config: TextToImageConfig, needed_by: str) -> ShardSet:
    if config.pictures is None:
        raise V2FlowError(
            f"option text_to_image.pictures: {needed_by} reads captioned pictures, found none named; "
            "name the training shards that the token shards were made of"
        )
    return open_shards(config.pictures)


def _captions(config: TextToImageConfig) -> Sequence[str]:
    shards = _shards(config, f"llm={config.llm}")
    reader = SampleReader(shards, 1, captions=True)
    return [reader.caption(sample) for sample in range(len(shards))]


def _words(tokenizer: V2FlowTokenizer, config: TextToImageConfig) -> TokenWords:
    shards = _shards(config, "rows=words")
    reader = SampleReader(shards, tokenizer.config.image_size)
    count = min(len(shards), config.words_pictures)
    return token_words(tokenizer, EvaluationLoader(EvaluationBatches(reader, count), words_batch(tokenizer)))
