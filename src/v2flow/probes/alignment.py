"""How near the visual vocabulary is to the LLM's: the paper's second figure as numbers.

Everything is said of directions, as codes are unit vectors, in the space of the table that the resampler mixes (centred
unless the configuration says otherwise). Two rows give the scale: the table against itself, and random directions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from v2flow.errors import V2FlowError
from v2flow.metrics.distances import GaussianStatistics, frechet_distance, kernel_distance
from v2flow.probes.alignment_plane import plane_points, sample
from v2flow.probes.findings import Batches, Findings, ProbeSettings
from v2flow.tokenizer import V2FlowTokenizer

SAMPLE = 4096
"""Vectors of each kind that are compared at most, drawn at random; nearest rows are sought in the whole table."""
TOKENS_A_PICTURE = 4
WORDS = 4096
"""Most probable words of a token that are added up; the others count as improbable."""
ENERGY_DIRECTIONS = (32, 128)


def measure_alignment(
    model: Any, loader: Batches, settings: ProbeSettings | None = None, top_tokens: int = 16
) -> Findings:
    """Distances between the visual vocabulary and the LLM's; in one process.

    Args:
        model: a V2FlowTokenizer. Any other tokenizer has no such vocabulary, and tokens of another width than the
            table's (readout=none) cannot be compared: they get a note instead of figures.
        top_tokens: the most used visual tokens to describe in words.

    Returns:
        `norm_ratio`: mean length of the pictures' tokens before they are normalised, over that of the table's rows;
        `codes`, `tokens` (of the pictures, before they are quantised), `rows` (of the table; nearest *other* row, and
        one half against the other) and `random` (directions): see :func:`compare_directions`;
        `top_tokens`: id, share of all tokens, the words of the largest mean probability, and the nearest rows;
        `plane`: see :func:`v2flow.probes.alignment_plane.plane_points`.

    Raises:
        V2FlowError: no picture.
    """
    settings = settings or ProbeSettings()
    reason = cannot_compare(model)
    if reason is not None:
        return Findings(notes={"alignment": reason})
    table, codes = model.resampler.table.double(), model.visual_vocabulary.codes.double()
    draws = torch.Generator().manual_seed(settings.seed)
    tokens = collect_tokens(model, loader, draws, settings.progress)
    random = torch.randn(codes.shape, generator=draws, dtype=torch.float64).to(codes.device)
    basis = principal_directions(table)
    figures: dict[str, Any] = {"norm_ratio": tokens.mean_norm / table.norm(dim=-1).mean().item()}
    for name, vectors in (("codes", codes), ("tokens", tokens.sample), ("random", random)):
        figures[name] = compare_directions(sample(vectors, draws, SAMPLE), table, basis, draws)
    figures["rows"] = compare_rows(table, basis, draws)
    figures["top_tokens"] = describe_tokens(model, loader, tokens.counts, top_tokens, settings.progress)
    figures["plane"] = plane_points(table, codes, tokens.counts, draws)
    notes = {} if model.config.resampler.readout != "none" else {"words": "readout=none has no distribution"}
    protocol = {
        "images": tokens.images,
        "seed": settings.seed,
        "table": f"{len(table)} rows of {model.vocabulary.source}, centred: {model.config.vocabulary.center}",
        "kernel_distance": "unbiased squared MMD of unit vectors, kernel (cos + 1)^3; rows: even against odd",
        "energy": "mean share of squared length in the table's first principal directions",
    }
    return Findings(figures, notes, protocol)


def cannot_compare(model: Any) -> str | None:
    """Why a tokenizer's tokens cannot be compared with an LLM's vocabulary; None where they can."""
    if not isinstance(model, V2FlowTokenizer):
        return f"{type(model).__name__} has no LLM vocabulary"
    width, tokens = model.resampler.table.shape[1], model.resampler.dim
    if tokens != width:
        return f"tokens of {tokens} dimensions cannot be compared with rows of {width} (readout=none)"
    return None


@dataclass
class TokenStatistics:
    """Tokens of a set of pictures.

    Attributes:
        images: number of pictures.
        counts: how often each id occurs, `[K]` long.
        mean_norm: mean length of the tokens before they are normalised.
        sample: a few tokens of each picture, `[n, D]` fp64.
    """

    images: int
    counts: Tensor
    mean_norm: float
    sample: Tensor


def collect_tokens(
    model: V2FlowTokenizer, loader: Batches, draws: torch.Generator, progress: bool = False
) -> TokenStatistics:
    """Statistics of the tokens of all pictures of `loader`.

    Raises:
        V2FlowError: no picture.
    """
    counts = torch.zeros(model.codebook_size, dtype=torch.long)
    images, norms, kept = 0, 0.0, []
    for pictures in _pictures(model, loader, "tokens", progress):
        soft = model.encode(pictures, return_soft=True, top_words=1)
        images += len(pictures)
        counts += torch.bincount(soft.ids.flatten(), minlength=model.codebook_size).cpu()
        norms += soft.embeddings.norm(dim=-1).double().sum().item()
        places = torch.rand(soft.ids.shape, generator=draws).argsort(dim=1)[:, :TOKENS_A_PICTURE]
        places = places[..., None].expand(-1, -1, soft.embeddings.shape[-1]).to(pictures.device)
        kept.append(soft.embeddings.gather(1, places).flatten(0, 1).double())
    if not images:
        raise V2FlowError("alignment: the data held no picture; expected at least one")
    return TokenStatistics(images, counts, norms / (images * model.num_tokens), torch.cat(kept))


def principal_directions(table: Tensor) -> Tensor:
    """Directions of the largest mean square of rows `[V, D]`, as columns `[D, D]`, largest first."""
    return torch.linalg.eigh(table.T @ table)[1].flip(1)


def compare_directions(
    vectors: Tensor, table: Tensor, basis: Tensor, draws: torch.Generator
) -> dict[str, Any]:
    """Directions of vectors `[n, D]` against those of the table's rows `[V, D]`; any lengths, fp64.

    Args:
        basis: the table's :func:`principal_directions`.

    Returns:
        `nearest_cosine`: to the nearest row: mean, q05, median, q95; `kernel_distance` and its `_se`;
        `frechet_distance`; `energy_32` and `energy_128`, in [0, 1]. Distances need three vectors of each kind.
    """
    figures = {"nearest_cosine": _spread(nearest_rows(vectors, table)[0][:, 0])}
    return figures | _distances(vectors, sample(table, draws, SAMPLE)) | _energy(vectors, basis)


def compare_rows(table: Tensor, basis: Tensor, draws: torch.Generator) -> dict[str, Any]:
    """The table `[V, D]` against itself: nearest other rows, even against odd rows, and its own energy."""
    rows = sample(table, draws, SAMPLE)
    # The nearest row of a row is itself (or its double): the second nearest is the nearest other one.
    figures = {"nearest_cosine": _spread(nearest_rows(rows, table, 2)[0][:, 1])}
    return figures | _distances(rows[0::2], rows[1::2]) | _energy(rows, basis)


def nearest_rows(vectors: Tensor, table: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Cosines (falling) and indices of the `count` nearest rows of a table `[V, D]`, both `[n, count]`."""
    rows = F.normalize(table, dim=-1)
    found = [(part @ rows.T).topk(count, dim=-1) for part in F.normalize(vectors, dim=-1).split(1024)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _distances(x: Tensor, y: Tensor) -> dict[str, float]:
    if min(len(x), len(y)) < 3:
        return {}
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    # The kernel divides products by the dimension: vectors of length sqrt(D) turn them into cosines.
    kernel = kernel_distance(x * x.shape[1] ** 0.5, y * y.shape[1] ** 0.5, paired=False)
    return {
        "kernel_distance": kernel.value,
        "kernel_distance_se": kernel.standard_error,
        "frechet_distance": frechet_distance(_statistics(x), _statistics(y)),
    }


def _statistics(x: Tensor) -> GaussianStatistics:
    return GaussianStatistics(x.mean(0), x.T.cov(), len(x))


def _energy(vectors: Tensor, basis: Tensor) -> dict[str, float]:
    energy = (F.normalize(vectors, dim=-1) @ basis).square().mean(0).cumsum(0)
    return {f"energy_{count}": energy[:count][-1].item() for count in ENERGY_DIRECTIONS}


def _spread(values: Tensor) -> dict[str, float]:
    low, median, high = torch.quantile(values, values.new_tensor([0.05, 0.5, 0.95])).tolist()
    return {"mean": values.mean().item(), "q05": low, "median": median, "q95": high}


def describe_tokens(
    model: V2FlowTokenizer, loader: Batches, counts: Tensor, top: int, progress: bool = False, words: int = 5
) -> list[dict[str, Any]]:
    """The most used visual tokens in words.

    Args:
        counts: how often each id occurs, `[K]`.
        words: words and nearest rows of each.
    """
    ids = counts.argsort(descending=True, stable=True)[: min(top, int((counts > 0).sum()))]
    means = _mean_probabilities(model, loader, ids, counts, progress)
    table = model.resampler.table.double()
    codes = model.visual_vocabulary.codes[ids.to(table.device)].double()
    cosines, rows = nearest_rows(codes, table, min(words, len(table)))
    described = []
    for place, token in enumerate(ids.tolist()):
        found = means[place].topk(min(words, means.shape[1]))
        near = zip(rows[place].tolist(), cosines[place].tolist(), strict=True)
        probable = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        described.append({
            "id": token,
            "share": counts[token].item() / counts.sum().item(),
            "words": [{"word": model.words[row], "probability": p} for row, p in probable],
            "nearest": [{"word": model.words[row], "cosine": cosine} for row, cosine in near],
        })  # fmt: skip
    return described


def _mean_probabilities(
    model: V2FlowTokenizer, loader: Batches, ids: Tensor, counts: Tensor, progress: bool
) -> Tensor:
    """Mean distribution over words of the tokens with each of `ids [T]`: `[T, V]`, or `[T, 0]` without words."""
    if model.config.resampler.readout == "none":
        return torch.zeros(len(ids), 0)
    place = torch.full((model.codebook_size,), -1)
    place[ids] = torch.arange(len(ids))
    sums = torch.zeros(len(ids), len(model.words), dtype=torch.float64)
    for pictures in _pictures(model, loader, "words", progress):
        soft = model.encode(pictures, return_soft=True, top_words=WORDS)
        places = place[soft.ids.cpu()]
        wanted = places >= 0
        rows = places[wanted][:, None].expand(-1, soft.words.shape[-1])
        chosen = wanted.to(soft.words.device)
        values = soft.probabilities[chosen].cpu().double()
        sums.index_put_((rows, soft.words[chosen].cpu()), values, accumulate=True)
    return sums / counts[ids][:, None]


def _pictures(model: V2FlowTokenizer, loader: Batches, what: str, progress: bool) -> Iterator[Tensor]:
    """Pictures `[B, 3, H, W]` on the model's device, batch by batch, without padding."""
    for batch in tqdm(loader, f"alignment: {what}", unit="batch", disable=not progress):
        images: Tensor = batch["image"]
        images = images[batch["valid"]] if "valid" in batch else images
        if len(images):
            yield images.to(model.visual_vocabulary.codes.device)
