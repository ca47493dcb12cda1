"""Evaluation of a tokenizer on a set of pictures: figures of every decode mode, with the protocol behind them."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from v2flow.decode_modes import presets_of, select_modes
from v2flow.devices import pick_device
from v2flow.errors import V2FlowError
from v2flow.images import save_grid
from v2flow.metrics.evaluator import ReconstructionEvaluator
from v2flow.metrics.features import load_networks
from v2flow.metrics.files import write_json
from v2flow.metrics.floors import data_floors
from v2flow.origin import current_commit, origin
from v2flow.training.checkpoint import load_model

Weights = Literal["ema", "raw"]
Batches = Iterable[Mapping[str, Any]]
GRID_IMAGES = 16
FOLDER_MODES: dict[str, dict[str, Any]] = {"one_step": {"steps": 1, "temperature": 0.0}}
"""An exported folder names no decode modes; it is scored by its conditional mean."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every submodule's own mode is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def run_evaluator(
    model: nn.Module,
    loader: Batches,
    modes: Mapping[str, Mapping[str, Any]],
    *,
    seed: int = 0,
    features: bool = True,
    inception_weights: str | Path | None = None,
    grid_images: int = 0,
    max_batches: int | None = None,
    device: torch.device | None = None,
    progress: bool = False,
) -> ReconstructionEvaluator:
    """Scores the batches of `loader`; see :func:`evaluate_model`. Also holds the pictures for a grid.

    Raises:
        V2FlowError: the loader gave no batch.
    """
    device = device if device is not None else _device_of(model)
    evaluator: ReconstructionEvaluator | None = None
    total = min(len(loader), max_batches or len(loader)) if isinstance(loader, Sized) else max_batches
    batches = tqdm(islice(loader, max_batches), "evaluate", total, unit="batch", disable=not progress)
    with evaluation_mode(model):
        for index, batch in enumerate(batches):
            batch = dict(batch) | {"image": batch["image"].to(device)}
            if evaluator is None:
                height, width = batch["image"].shape[2:]
                networks = load_networks(height, width, device, inception_weights) if features else None
                evaluator = ReconstructionEvaluator(
                    model, modes, device=device, seed=seed, networks=networks, grid_images=grid_images
                )
            evaluator.update(batch, index)
    if evaluator is None:
        raise V2FlowError("evaluation: the data held no picture; expected at least one")
    return evaluator


def evaluate_model(
    model: nn.Module,
    loader: Batches,
    modes: Mapping[str, Mapping[str, Any]],
    *,
    seed: int = 0,
    features: bool = True,
    inception_weights: str | Path | None = None,
    max_batches: int | None = None,
    device: torch.device | None = None,
    protocol: Mapping[str, Any] | None = None,
    grid_path: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Reconstructs every picture of `loader` in every mode and scores the reconstructions.

    Args:
        model: has `encode`, `decode` and `codebook_size`; it is put in evaluation mode and back.
        loader: batches {"image": [B, 3, H, W] in [0, 1], "key": B strings, optional "valid": bool [B]},
            always in the same order; under torch.distributed each rank has its own part and the same number
            of batches.
        modes: name -> options of `model.decode`.
        seed: seed of the decoding noise.
        features: also compute feature distances (KID; Fréchet from enough pictures on) and, where possible,
            LPIPS.
        inception_weights: torch-fidelity's weights file for rfid and kid-inception; None looks in the torch
            hub cache.
        max_batches: stop after so many batches.
        device: where the model lives; found from its parameters when left out.
        protocol: what else is known of the run (set, split, crop, weights); merged into the protocol.
        grid_path: a picture file for the first 16 pictures, originals first and each mode beneath.
        progress: show a progress bar on stderr.

    Returns:
        The figures and their `protocol`, see :meth:`v2flow.metrics.evaluator.ReconstructionEvaluator.compute`.

    Raises:
        V2FlowError: no picture, no mode, or unusable Inception weights.
    """
    evaluator = run_evaluator(
        model,
        loader,
        modes,
        seed=seed,
        features=features,
        inception_weights=inception_weights,
        grid_images=GRID_IMAGES if grid_path is not None else 0,
        max_batches=max_batches,
        device=device,
        progress=progress,
    )
    result = evaluator.compute()
    if grid_path is not None:
        save_grid([row.float() / 255.0 for row in evaluator.grid().values()], grid_path)
    result["protocol"] = dict(protocol or {}) | result["protocol"]
    return result


def evaluate_checkpoint(
    path: str | Path,
    data: str | list[str],
    *,
    weights: Sequence[Weights] = ("ema", "raw"),
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    modes: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
    features: bool = True,
    inception_weights: str | Path | None = None,
    floors_train: str | list[str] | None = None,
    json_path: str | Path | None = None,
    grid_path: str | Path | None = None,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    allow_pipe: bool = False,
    probes: Sequence[str] = (),
    probe_limit: int = 1000,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluates a checkpoint or an exported folder on shards: `v2flow evaluate CHECKPOINT --data SHARDS`.

    Pictures are centre-cropped to the model's size. The figures are those of the training callback when the
    data and the batch size are the same.

    Args:
        path: a .ckpt file of `v2flow fit`, or a folder of `v2flow export`.
        data: shards, as the data module takes them.
        weights: averaged and/or raw weights; a folder holds one set, reported as `exported`.
        limit: the first so many samples only.
        batch_size: pictures decoded at once; it decides which noise a picture gets.
        modes: names among the checkpoint's decode modes, or name -> options of decode; None for all of the
            checkpoint's.
        floors_train: training shards; adds the rows mean_image and nearest_training_picture.
        json_path: the result is also written there, atomically.
        grid_path: see :func:`evaluate_model`; of the first of the weights.
        device: cuda where there is one, else cpu, when left out.
        allow_pipe: accept shards `pipe:COMMAND`, which run a shell command.
        probes: further questions put to the averaged (or exported) weights, see `v2flow.probes.PROBES`.
        probe_limit: the first so many pictures for those.

    Returns:
        `checkpoint`, `model`, `step`, `date`, `commit`, `protocol`, `weights` (ema/raw/exported -> figures) and, if
        asked for, `floors`, and what :func:`v2flow.probes.run_probes` returns.

    Raises:
        V2FlowError: unusable checkpoint, data, mode, probe or Inception weights.
    """
    from v2flow.probes import ProbeSettings, check_probes, run_probes  # these evaluate, too

    current_commit()
    unknown = sorted(set(weights) - {"ema", "raw"})
    if unknown or not weights:
        raise V2FlowError(f"option weights: expected ema and/or raw, found {', '.join(unknown) or 'nothing'}")
    place = pick_device(device)
    names: Sequence[str] = ("exported",) if Path(path).is_dir() else weights
    check_probes(probes, names, probe_limit)
    results: dict[str, dict[str, Any]] = {}
    probed: dict[str, Any] = {}
    previous: dict[str, torch.Tensor] = {}
    train: Iterable[Mapping[str, Any]] | None = None
    for name in names:
        model, info = load_model(path, "raw" if name == "raw" else "ema", allow_own=True)
        chosen = select_modes(modes, info["decode_modes"] or FOLDER_MODES, presets_of(model))
        loader = evaluation_loader(data, image_size_of(model), batch_size, limit, num_workers, allow_pipe)
        if floors_train is not None and train is None:  # a mistake in it is told before anything is scored
            train = evaluation_loader(
                floors_train, image_size_of(model), batch_size, None, num_workers, allow_pipe
            )
        model = model.to(place)
        if results and _same_tensors(previous, model.state_dict()):
            results[name] = next(iter(results.values()))  # trained without averaging: nothing to score again
        else:
            results[name] = evaluate_model(
                model,
                loader,
                chosen,
                seed=seed,
                features=features,
                inception_weights=inception_weights,
                device=place,
                protocol=describe_shards(data) | {"crop": "center", "limit": limit},
                grid_path=grid_path if not results else None,
                progress=progress,
            )
            previous = {key: value.cpu() for key, value in model.state_dict().items()}
        if probes and name != "raw":
            settings = ProbeSettings(
                seed, features, inception_weights, chosen, probe_limit, batch_size, place, progress
            )
            few = min(limit or probe_limit, probe_limit)
            loader_of_few = evaluation_loader(
                data, image_size_of(model), batch_size, few, num_workers, allow_pipe
            )
            probed = run_probes(probes, model, loader_of_few, settings)
    floors = None
    if train is not None:
        floors = data_floors(
            train, loader, features=features, inception_weights=inception_weights, device=place
        )
    report = make_report(str(path), info["model"], info["step"], results, floors) | probed
    if json_path is not None:
        write_json(json_path, report)
    return report


def make_report(
    checkpoint: str,
    model: str,
    step: int | None,
    results: Mapping[str, Mapping[str, Any]],
    floors: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """The document that `v2flow evaluate --json` and the callback's metrics.json share.

    Args:
        results: weights (ema, raw, exported) -> what :func:`evaluate_model` returned; their protocols are the
            same.
    """
    protocol = dict(next(iter(results.values()))["protocol"]) | {"weights": list(results)}
    figures = {name: {k: v for k, v in result.items() if k != "protocol"} for name, result in results.items()}
    report: dict[str, Any] = {"checkpoint": checkpoint, "model": model, "step": step}
    report |= origin() | {"weights": figures, "protocol": protocol}
    if floors is not None:
        report["floors"] = {row: dict(values) for row, values in floors.items()}
    return report


def evaluation_loader(
    data: str | list[str],
    image_size: int,
    batch_size: int,
    limit: int | None = None,
    num_workers: int = 0,
    allow_pipe: bool = False,
) -> Batches:
    """Batches of shards for evaluation: in their order, centre crop, padded and masked with `valid`."""
    from v2flow.training.data_module import ShardDataModule

    module = ShardDataModule(
        test=data,
        image_size=image_size,
        eval_batch_size=batch_size,
        num_workers=num_workers,
        test_limit=limit,
        allow_pipe=allow_pipe,
    )
    module.setup("test")
    return module.test_dataloader()


def describe_shards(data: str | list[str]) -> dict[str, Any]:
    """Set and split by name for the protocol: `cifar10/test-000000.tar` is the split `test` of the set `cifar10`."""
    shards = [data] if isinstance(data, str) else list(data)
    first = Path(shards[0])
    split = re.match(r"[A-Za-z]*", first.name)
    return {"set": first.parent.name or ".", "split": split.group() if split else "", "shards": shards}


def image_size_of(model: Any) -> int:
    """Side of the pictures that a tokenizer takes; one of the user's own says it itself."""
    own = getattr(model, "image_size", None)
    return own if own is not None else model.config.image_size


def _device_of(model: nn.Module) -> torch.device:
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return tensor.device if tensor is not None else torch.device("cpu")


def _same_tensors(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key].cpu()) for key in first)
