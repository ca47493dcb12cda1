"""Evaluation of a text-to-image model on held-out captions: all figures, with the protocol behind them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v2flow.decoding import decode_options
from v2flow.errors import V2FlowError
from v2flow.images import GRID_COLUMNS, GRID_PICTURES, save_grid
from v2flow.metrics.evaluator import LIBRARIES, describe_networks, library_versions
from v2flow.metrics.extractors import FeatureNetwork
from v2flow.metrics.features import load_networks
from v2flow.metrics.files import write_atomically
from v2flow.t2i.generation import generation_options
from v2flow.t2i.metrics.clip_score import clip_rows
from v2flow.t2i.metrics.language import image_positions
from v2flow.t2i.metrics.picture_distance import distance_rows
from v2flow.t2i.metrics.retrieval import retrieval_accuracy
from v2flow.t2i.metrics.rows import (
    GENERATED,
    NEAREST,
    REAL,
    WORDS,
    Drawing,
    draw_rows,
    shuffled_order,
)
from v2flow.t2i.metrics.samples import CaptionedSamples
from v2flow.t2i.metrics.shapes_score import duo_rows, shapes_rows
from v2flow.t2i.metrics.training_set import TrainingSet

POSITION_PICTURES = 64
"""The whole vocabulary at every image position is dear: the figures there are of so many pictures."""


@dataclass(frozen=True)
class TextToImageEvaluation:
    """What was found.

    Attributes:
        report: plain types, ready for JSON.
        captions: the first 64 held-out captions at most, in order.
        pictures: those generated of them, uint8 `[n, 3, S, S]`.
    """

    report: dict[str, Any]
    captions: list[str]
    pictures: Tensor

    def save_grid(self, path: str | Path) -> None:
        """Writes the pictures as one PNG, eight in a row, and the captions in the same order beside it, as .txt."""
        path = Path(path)
        save_grid([self.pictures.float() / 255.0], path, GRID_COLUMNS)
        text = "".join(f"{caption}\n" for caption in self.captions)
        write_atomically(path.with_suffix(".txt"), lambda file: file.write(text.encode()))


def evaluate_text_to_image(
    model: Any,
    samples: CaptionedSamples,
    *,
    pictures: int = 256,
    retrieval_pictures: int = 256,
    ways: int = 16,
    drawing: Drawing = Drawing(),
    features: bool = True,
    training: TrainingSet | None = None,
    untrained: Any = None,
    perplexity_before: float | None = None,
    protocol: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> TextToImageEvaluation:
    """Scores a model on held-out captions.

    Under torch.distributed every rank calls it and computes the same.

    Args:
        model: V2FlowForTextToImage.
        samples: held-out captions; see `read_samples`.
        pictures: the first so many captions are drawn and scored; more than there are means all.
        retrieval_pictures: the first so many pictures that retrieval is asked about.
        ways: captions among which the true one is to be found.
        drawing: how pictures are made.
        features: feature distances and CLIPScore.
        training: adds the row `marginal_ids` and, if there are training pictures, `nearest_training_picture`.
        untrained: the model before its training; adds the row `untrained` and the perplexity before.
        perplexity_before: that perplexity, where it is known without the model.
        protocol: what else is known of the run; merged into the protocol.
        progress: show progress bars on stderr.

    Returns:
        A report with `samples`, `retrieval` (see `retrieval_accuracy`), `language` (perplexity, perplexity_before,
        text_mass, nats_per_token), where there are scenes `shapes` (row -> task -> share) and `duos` (see `duo_rows`),
        where there are pictures `distances` (row -> figures, see `distance_rows`) and `memorisation`, where there are
        CLIP's weights `clip_score` (row -> score), `notes` (absent figure -> reason) and `protocol`.

    Raises:
        V2FlowError: an option out of range, or too few groups of captions for retrieval.
    """
    for name, value in (("pictures", pictures), ("retrieval_pictures", retrieval_pictures)):
        if value < 1:
            raise V2FlowError(f"option {name}: expected at least 1, found {value}")
    if drawing.draws > 1 and not (features and samples.pictures is not None):
        raise V2FlowError(
            f"option draws: expected 1 where no distances are measured, found {drawing.draws}; name picture shards and "
            "measure features, or leave it out"
        )
    report: dict[str, Any] = {"samples": len(samples)}
    report["retrieval"] = retrieval_accuracy(
        model, samples, ways, drawing.seed, retrieval_pictures, progress=progress
    )
    report["language"] = {"perplexity": model.text_perplexity()}
    if untrained is not None:
        perplexity_before = untrained.text_perplexity()
    if perplexity_before is not None:
        report["language"]["perplexity_before"] = perplexity_before
    report["language"] |= image_positions(model, samples.first(POSITION_PICTURES))
    few = samples.first(pictures)
    marginal = training.marginal() if training is not None else None
    rows = draw_rows(model, few, drawing, marginal=marginal, untrained=untrained, progress=progress)
    report |= {"drawn": len(few), "notes": {}}
    if WORDS not in rows:
        report["notes"][WORDS] = "a caption with other captions' words became longer than max_caption"
    networks = _score_rows(report, rows, few, drawing, features, training, model.device)
    report["protocol"] = dict(protocol or {}) | _protocol(
        few, drawing, ways, networks, model, retrieval_pictures, samples
    )
    shown = min(GRID_PICTURES, len(few))
    return TextToImageEvaluation(report, list(few.captions[:shown]), rows[GENERATED][:shown])


def _score_rows(
    report: dict[str, Any], rows: dict[str, Tensor], samples: CaptionedSamples, drawing: Drawing, features: bool,
    training: TrainingSet | None, place: torch.device,
) -> list[FeatureNetwork]:  # fmt: skip
    """Adds the figures of pictures to the report; returns the networks that took part."""
    order = shuffled_order(len(samples), drawing)
    draws, rows = rows, {name: pictures[: len(samples)] for name, pictures in rows.items()}
    real = {} if samples.pictures is None else {REAL: samples.pictures}
    if samples.scenes is not None:
        try:
            report["shapes"] = shapes_rows(rows | real, samples.scenes, order)
            report["duos"] = duo_rows(rows[GENERATED], samples.scenes)
        except V2FlowError as error:  # pictures smaller than the verifier reads
            report["notes"]["shapes"] = str(error)
    if training is not None and training.has_pictures:
        nearest, psnr = training.nearest(rows[GENERATED])
        report["memorisation"] = {"psnr_to_nearest_training_picture": psnr}
        rows, draws = rows | {NEAREST: nearest}, draws | {NEAREST: nearest}
    elif training is not None:
        report["notes"]["memorisation"] = (
            "token shards without pictures: name training picture shards instead"
        )
    if not features:
        return []
    device = torch.device("cpu") if place.type == "mps" else place
    scores = clip_rows(rows | real, samples.captions, order, device)
    if isinstance(scores, str):
        report["notes"]["clip_score"] = scores
    else:
        report["clip_score"] = scores
    if samples.pictures is None:
        report["notes"]["distances"] = "token shards without pictures: name picture shards instead"
        return []
    height, width = samples.pictures.shape[2:]
    found = load_networks(height, width, device)
    report["notes"] |= {name: note for name, note in found.notes.items() if name == "kid-inception"}
    report["distances"] = distance_rows(samples.pictures, draws, found.networks, order, device)
    return found.networks


def _protocol(
    samples: CaptionedSamples, drawing: Drawing, ways: int, networks: list[FeatureNetwork], model: Any,
    retrieval_pictures: int, whole: CaptionedSamples,
) -> dict[str, Any]:  # fmt: skip
    protocol: dict[str, Any] = {
        **whole.fingerprints(),
        "samples": len(whole),
        "drawn": f"the first {len(samples)} captions",
        "generation": asdict(generation_options(drawing.options)),
        "decode": asdict(decode_options(dict(drawing.decode))),
        "seed": drawing.seed,
        "draws": drawing.draws,
        "batch_size": drawing.batch_size,
        "tokens": model.num_tokens,
        "retrieval": f"log-likelihood of the first {min(retrieval_pictures, len(whole))} pictures' ids among {ways} "
        "captions of different groups, ties wrong",
        "captions_shuffled": "generated pictures against the captions or pictures of others",
        "words_shuffled": "drawn of captions whose words were dealt out anew among all of them",
        "image_positions": f"text_mass and nats_per_token over the first {min(POSITION_PICTURES, len(whole))} pictures",
        "device": model.device.type,
        "libraries": library_versions((*LIBRARIES, "transformers", "tokenizers")),
    }
    if networks:
        protocol |= describe_networks(networks)
        protocol["kid_se"] = (
            "delete-one jackknife of both sets, a caption with all its draws; of pairs for generated and reconstructed"
        )
        protocol["kid_above_generated"] = "difference to kid_u of generated; real pictures leave both at once"
        protocol["pair"] = "mean cosine of features with the real picture of the caption, less the real mean"
    return protocol
