"""Saving and loading a tokenizer in the Hugging Face way: a folder or a hub repository.

The folder holds ``config.json``, ``model.safetensors`` and, once, the frozen rows of the LLM vocabulary
(``vocabulary.safetensors`` with their strings): without it the rows are loaded anew from their source and
compared by SHA-256.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from v2flow.config import TokenizerConfig, from_dict, to_dict
from v2flow.decode_modes import read_presets, shipped_presets
from v2flow.downloads import no_downloads
from v2flow.errors import V2FlowError, first_line
from v2flow.llm import LLMVocabulary, load_vocabulary
from v2flow.model_card import tokenizer_card, training_record, with_record

if TYPE_CHECKING:
    from v2flow.tokenizer import V2FlowTokenizer

CONFIG, WEIGHTS, VOCABULARY, CARD = "config.json", "model.safetensors", "vocabulary.safetensors", "README.md"


class PretrainedMixin(
    ModelHubMixin,
    library_name="v2flow",
    tags=["image-tokenizer", "rectified-flow"],
    paper_url="https://arxiv.org/abs/2503.07493",
):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` (revision, cache_dir, local_files_only, token).

    Attributes:
        record: of an exported folder what its card says of the training, which the next card says again.
    """

    record: str = ""

    def _save_pretrained(self, save_directory: Path) -> None:
        model: V2FlowTokenizer = self  # type: ignore[assignment]
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, save_directory / WEIGHTS, metadata={"format": "pt"})
        model.vocabulary.save(save_directory / VOCABULARY)
        document = {
            "model_type": "v2flow-tokenizer",
            "vocabulary_sha256": model.vocabulary_sha256,
            "codec_sha256": model.codec.fingerprint(),
            "tokenizer": to_dict(model.config),
        }
        if model.decode_presets != shipped_presets():
            own = {name: {"options": options} for name, options in model.decode_presets.items()}
            document["decode_presets"] = {"presets": own}
        (save_directory / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
        (save_directory / CARD).write_text(with_record(tokenizer_card(model), self.record))

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
        """The tokenizer of a folder or hub repository, in evaluation mode on `map_location`.

        Raises:
            V2FlowError: neither of both, a damaged file, or another model's.
        """
        folder = local_folder(
            pretrained_model_name_or_path, revision=revision, cache_dir=cache_dir, force_download=force_download,
            local_files_only=local_files_only, token=token,
        )  # fmt: skip
        return load_folder(cls, folder).to(map_location)


def local_folder(name: str | Path, **download: Any) -> Path:
    """The folder `name`, or a local copy of the hub repository `name`.

    Args:
        download: options of `huggingface_hub.snapshot_download`.

    Raises:
        V2FlowError: neither of both.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(name), **download))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise V2FlowError(
            f"{name}: neither an exported folder nor a hub repository that can be reached ({reason})"
        ) from error


def load_folder(cls: Any, folder: Path) -> Any:
    """The tokenizer saved in `folder`, in evaluation mode.

    Raises:
        V2FlowError: a missing or foreign file, weights of other sizes, or another LLM's vocabulary.
    """
    document, weights = read_config(folder), read_weights(folder / WEIGHTS)
    with makes_a(cls.__name__, str(folder / CONFIG)), no_downloads():
        config = from_dict(TokenizerConfig, document["tokenizer"], str(folder / CONFIG))
        vocabulary = _read_vocabulary(folder, config)
        check_vocabulary(vocabulary.sha256, document.get("vocabulary_sha256"), str(folder))
        check_sizes(cls, config, vocabulary, weights, str(folder / WEIGHTS))
        model = cls(config, vocabulary)
    check_codec(model.codec.fingerprint(), document.get("codec_sha256"), str(folder))
    load_weights(model, weights, str(folder / WEIGHTS))
    if "decode_presets" in document:
        model.decode_presets = read_presets(document["decode_presets"], str(folder / CONFIG))
    model.record = training_record(folder / CARD)
    return model.eval()


@contextmanager
def makes_a(name: str, where: str) -> Iterator[None]:
    """Tells in one line that a configuration of somebody else's makes no model `name`.

    Raises:
        V2FlowError: in place of what building it raised.
    """
    try:
        yield
    except V2FlowError as error:
        if where in str(error):
            raise
        raise V2FlowError(f"{where}: {error}") from error
    except (
        TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, OSError, MemoryError,
    ) as error:  # fmt: skip
        reason = first_line(error)
        raise V2FlowError(
            f"{where}: its configuration makes no {name} ({reason}); is it damaged or foreign?"
        ) from error


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], where: str) -> None:
    """Strict load that names the first tensor that does not fit."""
    check_shapes(model.state_dict(), weights, where)
    with makes_a(type(model).__name__, where):  # sparse tensors, for example, fit nowhere
        model.load_state_dict(weights)


def check_sizes(
    kind: Any, config: Any, vocabulary: LLMVocabulary | None, weights: dict[str, torch.Tensor], where: str
) -> None:
    """Compares the model that a configuration describes with the weights of a file, before it takes any memory.

    Latents of a frozen autoencoder are as wide as it is, so that nothing is known without loading it.
    """
    if config.codec.kind != "patch":
        return
    with torch.device("meta"):
        parts = () if vocabulary is None else (
            LLMVocabulary.from_table(vocabulary.table.to("meta"), vocabulary.words, "meta"),
        )  # fmt: skip
        check_shapes(kind(config, *parts).state_dict(), weights, where)


def check_shapes(expected: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], where: str) -> None:
    """Refuses weights of other names or shapes in a line that names the first one."""
    for name in sorted(set(expected) | set(weights)):
        if name not in weights or name not in expected:
            side = "missing" if name in expected else "unexpected"
            raise V2FlowError(
                f"{where}: {side} tensor {name!r}; is it a checkpoint of another configuration?"
            )
        if expected[name].shape != weights[name].shape:
            raise V2FlowError(
                f"{where}: tensor {name!r} has shape {list(weights[name].shape)}, the configuration needs "
                f"{list(expected[name].shape)}; was it trained with another codebook size or LLM?"
            )


def check_codec(found: str, expected: str | None, where: str) -> None:
    """Refuse weights that were trained on the latents of another frozen codec."""
    if expected is not None and found != expected:
        raise V2FlowError(
            f"{where}: trained with the codec {expected[:12]}, found {found[:12]} at codec.path; "
            "put back the autoencoder that it was trained with"
        )


def check_vocabulary(found: str, expected: str | None, where: str) -> None:
    """Refuse weights that were trained on other embedding rows."""
    if expected is not None and found != expected:
        raise V2FlowError(
            f"{where}: trained on the LLM vocabulary {expected[:12]}, found {found[:12]}; "
            "install the same LLM package or keep the vocabulary file beside the weights"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of an exported folder.

    Raises:
        V2FlowError: missing, not JSON, or another kind of model's.
    """
    document = read_document(folder / CONFIG, "v2flow-tokenizer")
    types: dict[str, type] = {"tokenizer": dict, "vocabulary_sha256": str, "codec_sha256": str}
    check_types(document, types, str(folder / CONFIG))
    return document


def read_document(path: Path, model_type: str) -> dict[str, Any]:
    """The JSON file of an exported folder that says what model it holds.

    Raises:
        V2FlowError: missing, not JSON, or another kind of model's.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise V2FlowError(f"{path}: not found; expected a folder made by `v2flow export`") from error
    except (OSError, ValueError, RecursionError) as error:
        raise V2FlowError(f"{path}: not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("model_type") != model_type:
        raise V2FlowError(f"{path}: expected model_type {model_type!r}; is it another model's folder?")
    return document


def check_types(document: Mapping[str, Any], types: Mapping[str, type], where: str) -> None:
    """Refuses entries of other types; those that are missing or None are left to whoever needs them."""
    for name, kind in types.items():
        value = document.get(name)
        if value is not None and not isinstance(value, kind):
            raise V2FlowError(
                f"{where}: {name}: expected a {kind.__name__}, found {type(value).__name__}; is it damaged or foreign?"
            )


def _read_vocabulary(folder: Path, config: TokenizerConfig) -> LLMVocabulary:
    path = folder / VOCABULARY
    if not path.exists():
        return load_vocabulary(config.vocabulary)
    return LLMVocabulary.load(path, config.vocabulary.source)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file.

    Raises:
        V2FlowError: missing or damaged.
    """
    if not path.is_file():
        raise V2FlowError(f"{path}: not found; expected a folder made by `v2flow export`")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise V2FlowError(f"{path}: not a readable safetensors file ({error}); export it again") from error
