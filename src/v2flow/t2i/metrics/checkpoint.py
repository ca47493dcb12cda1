"""Evaluation of a text-to-image checkpoint or exported folder on shards: `v2flow evaluate` of stage 2."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from v2flow.config import from_dict
from v2flow.decode_modes import preset_options, presets_of
from v2flow.devices import pick_device
from v2flow.errors import V2FlowError
from v2flow.evaluate import describe_shards
from v2flow.metrics.files import write_json
from v2flow.origin import current_commit, origin
from v2flow.t2i.build import build_text_to_image
from v2flow.t2i.checkpoint import load_text_to_image
from v2flow.t2i.config import TextToImageConfig
from v2flow.t2i.metrics.evaluation import evaluate_text_to_image
from v2flow.t2i.metrics.rows import Drawing
from v2flow.t2i.metrics.samples import read_samples
from v2flow.t2i.metrics.training_set import open_training_set
from v2flow.training.checkpoint import read_checkpoint
from v2flow.training.checkpoint_files import is_sharded


def evaluate_text_to_image_checkpoint(
    path: str | Path,
    data: str | list[str],
    *,
    train: str | list[str] | None = None,
    limit: int | None = None,
    pictures: int = 256,
    retrieval_pictures: int = 256,
    ways: int = 16,
    drawing: Drawing = Drawing(),
    preset: str | None = None,
    features: bool = True,
    untrained: bool = True,
    json_path: str | Path | None = None,
    grid_path: str | Path | None = None,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    allow_pipe: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores the model of a checkpoint on held-out shards.

    Args:
        path: a .ckpt file of `v2flow fit`, whose averaged weights are taken if there are any, or an exported folder.
        data: token shards or captioned pictures; only the latter, and token shards of scenes, have real pictures.
        train: training shards of either kind, see `evaluate_text_to_image`.
        limit: the first so many samples only.
        preset: decode by this preset of the tokenizer, see `V2FlowTokenizer.decode`, in place of `drawing.decode`.
        untrained: build the model before its training once more, for its row; an exported folder does not tell it.
        json_path: the report is also written there, atomically.
        grid_path: a PNG of the first 64 captions' pictures; the captions go beside it, as .txt.
        device: cuda where there is one, else cpu, when left out.

    Returns:
        The report of `evaluate_text_to_image` with `checkpoint`, `model`, `step`, `date`, `commit` and the set and
        split in its protocol.

    Raises:
        V2FlowError: unusable checkpoint, data or option.
    """
    current_commit()
    place = pick_device(device)
    model = load_text_to_image(path).to(place)
    if preset is not None:
        drawing = replace(drawing, decode=preset_options(presets_of(model.tokenizer), preset, {}))
    samples = read_samples(data, model.tokenizer, limit=limit, num_workers=num_workers, allow_pipe=allow_pipe)
    training = None
    if train is not None:
        training = open_training_set(train, model.tokenizer, num_workers, allow_pipe)
    step, before, note = _before_training(path, untrained)
    found = evaluate_text_to_image(
        model,
        samples,
        pictures=pictures,
        retrieval_pictures=retrieval_pictures,
        ways=ways,
        drawing=drawing,
        features=features,
        training=training,
        untrained=None if before is None else before.to(place),
        protocol=describe_shards(data) | {"limit": limit, "train": train},
        progress=progress,
    )
    if note is not None:
        found.report["notes"]["untrained"] = note
    report = {"checkpoint": str(path), "model": type(model).__name__, "step": step} | origin() | found.report
    if json_path is not None:
        write_json(json_path, report)
    if grid_path is not None:
        found.save_grid(grid_path)
    return report


def _before_training(path: str | Path, wanted: bool) -> tuple[int | None, Any, str | None]:
    """Step of a checkpoint, and the model that it was trained from or one line why there is none."""
    if Path(path).is_dir() and not is_sharded(path):
        note = "an exported folder does not hold the model before its training: evaluate the .ckpt file"
        return None, None, note if wanted else None
    checkpoint = read_checkpoint(path, mmap=True)
    step = checkpoint.get("global_step")
    if not wanted:
        return step, None, None
    info = checkpoint["v2flow"]
    config: TextToImageConfig = from_dict(TextToImageConfig, info["config"], str(path))
    try:
        return step, build_text_to_image(config, info["llm_tokenizer"]).eval(), None
    except V2FlowError as error:  # the pictures that its rows were made of are gone, for one
        return step, None, str(error)
