"""CLIPScore (Hessel et al. 2021) through torchmetrics, when CLIP's weights are in the Hugging Face cache."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from v2flow.errors import first_line
from v2flow.t2i.metrics.rows import GENERATED, SHUFFLED, WORDS

CLIP = "openai/clip-vit-base-patch16"
_FILES = (
    ("config.json",),
    ("preprocessor_config.json",),
    ("tokenizer.json", "vocab.json"),
    ("model.safetensors", "pytorch_model.bin"),
)
"""What loading reads; of each line one file is enough."""


def clip_folder() -> Path | str:
    """The cached snapshot of CLIP, or one line that says how to get it; nothing is downloaded."""
    folder = None
    for names in _FILES:
        found = [try_to_load_from_cache(CLIP, name) for name in names]
        path = next((Path(file) for file in found if isinstance(file, str)), None)
        if path is None:
            return f"{names[-1]} of {CLIP} is not in the Hugging Face cache: run `hf download {CLIP}` with a network"
        folder = path.parent
    assert folder is not None
    return folder


def clip_rows(
    rows: Mapping[str, Tensor], captions: Sequence[str], order: Tensor, device: torch.device | str = "cpu"
) -> dict[str, float] | str:
    """Row name -> mean of max(0, 100 · cosine) between pictures and their captions; or one line why there is none.

    Args:
        rows: pictures uint8 `[n, 3, H, W]` with the row `generated`; `words_shuffled` is left out.
        captions: one for each picture.
        order: permutation `[n]` of the captions for `captions_shuffled`.
    """
    folder = clip_folder()
    if isinstance(folder, str):
        return folder
    try:
        metric = _metric(folder, device)
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        return f"{folder}: CLIP cannot be read ({reason}): download it again with `hf download {CLIP}`"
    shuffled = [captions[i] for i in order.tolist()]
    pairs = {name: (pictures, list(captions)) for name, pictures in rows.items() if name != WORDS}
    pairs[SHUFFLED] = (rows[GENERATED], shuffled)
    scores = {}
    for name, (pictures, texts) in pairs.items():
        metric.reset()
        for start in range(0, len(texts), 32):
            metric.update(pictures[start : start + 32].to(device), texts[start : start + 32])
        scores[name] = metric.compute().item()
    return scores


def _metric(folder: Path, device: torch.device | str) -> Any:
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    def load() -> tuple[Any, Any]:
        place = str(folder)
        return (
            CLIPModel.from_pretrained(place, local_files_only=True),
            CLIPProcessor.from_pretrained(place, local_files_only=True),
        )

    return CLIPScore(model_name_or_path=load).to(device)
