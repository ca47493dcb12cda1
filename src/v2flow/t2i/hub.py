"""Saving and loading a text-to-image model in the Hugging Face way.

The folder is a plain causal LLM with its tokenizer, visual tokens included, that `AutoModelForCausalLM` loads without
v2flow. Beside them lie ``v2flow.json`` and, in the subfolder ``tokenizer``, the V2Flow tokenizer that turns visual
tokens into pictures.
"""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelHubMixin
from transformers import AutoTokenizer, GenerationConfig

from v2flow.errors import V2FlowError, first_line
from v2flow.hub import CARD, local_folder, makes_a, read_document
from v2flow.model_card import training_record, with_record
from v2flow.t2i.compatibility import write_old_places
from v2flow.t2i.extension import EOI, find_visual_tokens
from v2flow.t2i.model_card import model_card, pretrained_name
from v2flow.t2i.pretrained import read_causal_llm
from v2flow.t2i.visual_rows import merge
from v2flow.tokenizer import V2FlowTokenizer

if TYPE_CHECKING:
    from v2flow.t2i.text_to_image import V2FlowForTextToImage

DOCUMENT, TOKENIZER, MODEL_TYPE = "v2flow.json", "tokenizer", "v2flow-text-to-image"


class PretrainedTextToImage(
    ModelHubMixin,
    library_name="transformers",
    tags=["text-to-image", "v2flow"],
    paper_url="https://arxiv.org/abs/2503.07493",
):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` (revision, cache_dir, local_files_only, token).

    Attributes:
        record: as of `v2flow.hub.PretrainedMixin`.
    """

    record: str = ""

    def _save_pretrained(self, save_directory: Path) -> None:
        model: V2FlowForTextToImage = self  # type: ignore[assignment]
        llm = merged_llm(model)
        words = copy.deepcopy(model.llm_tokenizer)
        words.padding_side = words.init_kwargs["padding_side"] = "left"  # the latter is what is saved
        if words.pad_token_id is None:
            words.pad_token = EOI
        llm.generation_config = GenerationConfig(
            bos_token_id=words.bos_token_id, eos_token_id=model.tokens.eoi, pad_token_id=words.pad_token_id,
            max_new_tokens=model.num_tokens + 1, do_sample=False,
        )  # fmt: skip
        llm.save_pretrained(save_directory)
        words.save_pretrained(save_directory)
        write_old_places(save_directory, words)
        model.tokenizer.save_pretrained(save_directory / TOKENIZER)
        document = {
            "model_type": MODEL_TYPE,
            "max_caption": model.max_caption,
            "base": pretrained_name(model),
        }
        (save_directory / DOCUMENT).write_text(json.dumps(document, indent=2) + "\n")
        (save_directory / CARD).write_text(with_record(model_card(model), self.record))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        map_location: str | torch.device = "cpu",
    ) -> Any:
        """The text-to-image model of a folder or hub repository, in evaluation mode on `map_location`.

        Raises:
            V2FlowError: neither of both, a damaged file, or another model's.
        """
        folder = local_folder(
            pretrained_model_name_or_path, revision=revision, cache_dir=cache_dir, force_download=force_download,
            local_files_only=local_files_only, token=token,
        )  # fmt: skip
        return _load_folder(cls, folder).to(map_location)


def merged_llm(model: "V2FlowForTextToImage") -> Any:
    """The LLM with the visual rows, and adapters if it has any, written into its own weights.

    Rows go into the model itself, which does not read its own; adapters are merged into a copy.
    """
    merge(model.llm, model.rows)
    if not hasattr(model.llm, "merge_and_unload"):
        return model.llm
    return copy.deepcopy(model.llm).merge_and_unload()


def _load_folder(cls: Any, folder: Path) -> Any:
    document = _read_document(folder)
    tokenizer = V2FlowTokenizer.from_pretrained(folder / TOKENIZER)
    try:
        # Files of the folder may name others to be fetched, such as the base of an adapter.
        words = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        llm = read_causal_llm(folder, "auto", local=True)
        tokens = find_visual_tokens(words)
        if len(llm.get_input_embeddings().weight) <= tokens.eoi:
            raise ValueError(f"no row of {EOI}, whose id is {tokens.eoi}")
    except V2FlowError:
        raise
    except Exception as error:  # of many classes, as what is wrong with the files
        reason = first_line(error)
        raise V2FlowError(
            f"{folder}: expected a causal language model with its tokenizer, found none that can be read ({reason}); "
            "export it again"
        ) from error
    llm.config._name_or_path = str(document.get("base", ""))  # of the pretrained LLM, not of this folder
    with makes_a(cls.__name__, str(folder)):
        model = cls(tokenizer, llm, words, tokens, max_caption=document["max_caption"])
    model.record = training_record(folder / CARD)
    return model.eval()


def _read_document(folder: Path) -> dict[str, Any]:
    """The ``v2flow.json`` of an exported text-to-image model."""
    path = folder / DOCUMENT
    document = read_document(path, MODEL_TYPE)
    length = document.get("max_caption")
    if type(length) is not int or length < 1:
        raise V2FlowError(f"{path}: max_caption: expected a positive integer, found {length!r}")
    return document
