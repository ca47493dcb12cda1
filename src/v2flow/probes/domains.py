"""How far a tokenizer carries beyond what it was trained on: pictures of other domains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from v2flow.data.domains import DOMAINS
from v2flow.devices import pick_device
from v2flow.errors import V2FlowError
from v2flow.evaluate import (
    FOLDER_MODES,
    describe_shards,
    evaluate_model,
    evaluation_loader,
    image_size_of,
)
from v2flow.paths import pictures_folder
from v2flow.probes.findings import Batches, Findings, ProbeSettings


def score_domains(model: Any, loader: Batches, settings: ProbeSettings | None = None) -> Findings:
    """Scores a tokenizer on the domains whose pictures are there, see :func:`evaluate_domains`.

    Args:
        loader: not read: the domains have pictures of their own.

    Returns:
        Domain -> the evaluation's figures and protocol.
    """
    settings = settings or ProbeSettings()
    domains = default_domains()
    if not domains:
        return Findings(notes={"domains": "no pictures found; build some with `v2flow data domains`"})
    figures = evaluate_domains(
        model, domains, settings.modes or FOLDER_MODES, limit=settings.limit, batch_size=settings.batch_size,
        features=settings.features, seed=settings.seed, inception_weights=settings.inception_weights,
        device=settings.device, progress=settings.progress,
    )  # fmt: skip
    return Findings(figures)


def default_domains(data_root: str | Path = "data", shared: str | Path | None = None) -> dict[str, str]:
    """Domain -> shards of its test pictures, for those that are there.

    `openmoji` and the domains that `v2flow data domains` builds are looked for in `data_root`, `cifar10` and
    `imagenet` (photographs, of any size) in `shared`.

    Args:
        data_root: holds openmoji/ and domains/.
        shared: holds cifar10/ and imagenet-sample/; None takes the folder of :func:`v2flow.paths.pictures_folder`.
    """
    root = Path(data_root)
    photographs = Path(shared) if shared is not None else pictures_folder()
    places = {
        "openmoji": root / "openmoji" / "test-*.tar",
        "cifar10": photographs / "cifar10" / "test-*.tar",
        "imagenet": photographs / "imagenet-sample" / "val-*.tar",
    }
    places |= {name: root / "domains" / name / "test-*.tar" for name in DOMAINS}
    return {name: str(place) for name, place in places.items() if any(place.parent.glob(place.name))}


def evaluate_domains(
    model: nn.Module,
    domains: Mapping[str, str | list[str]],
    modes: Mapping[str, Mapping[str, Any]],
    *,
    limit: int | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    features: bool = True,
    seed: int = 0,
    inception_weights: str | Path | None = None,
    num_workers: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores a tokenizer on each domain as :func:`v2flow.evaluate.evaluate_model` does on one.

    Pictures of another size than the model's are resized (shorter side, bicubic) and centre-cropped. All shards are
    opened before the first domain is scored, so that a wrong path costs no time.

    Args:
        model: a tokenizer; it is moved to `device`.
        domains: name -> shards, from :func:`default_domains` or your own.
        modes: name -> options of `model.decode`.
        limit: the first so many pictures of each domain only.
        batch_size: pictures decoded at once; it decides which noise a picture gets.
        device: cuda where there is one, else cpu, when left out.
        features: also compute feature distances; a kernel distance needs at least
            `v2flow.metrics.features.KID_MINIMUM` pictures, and its standard error tells what few of them are worth.
        seed: seed of the decoding noise.
        inception_weights: torch-fidelity's weights file for rfid and kid-inception.

    Returns:
        Domain -> `images`, `modes` (mode -> psnr, psnr_pooled, ssim and distances), `codebook` (size, usage,
        perplexity), `real_vs_real`, `notes` (absent figure -> reason) and `protocol`.

    Raises:
        V2FlowError: no domain, or unusable shards; the message names the domain.
    """
    if not domains:
        raise V2FlowError(
            "cross-domain evaluation: expected at least one domain with its shards, found none; build some with "
            "`v2flow data domains` and `v2flow data openmoji`"
        )
    place = pick_device(device)
    loaders = {}
    for name, shards in domains.items():
        try:
            loaders[name] = evaluation_loader(shards, image_size_of(model), batch_size, limit, num_workers)
        except V2FlowError as error:
            raise V2FlowError(f"domain {name}: {error}") from error
    model = model.to(place)
    results = {}
    for name, loader in loaders.items():
        results[name] = evaluate_model(
            model,
            loader,
            modes,
            seed=seed,
            features=features,
            inception_weights=inception_weights,
            device=place,
            protocol={"domain": name} | describe_shards(domains[name]) | {"crop": "center", "limit": limit},
            progress=progress,
        )
    return results
