"""Latents to ids that do not depend on the batch: in single precision, and again in double where that could matter."""

import torch
import torch.nn.functional as F
from torch.func import functional_call

from v2flow.arrays import Codebook, Latents, PerToken, TokenEmbeddings, TokenFlags, VisualIds
from v2flow.resampler import VisualVocabularyResampler
from v2flow.vocabulary_attention import SoftDistribution

MARGIN = 8.0
"""How much nearer the nearest code has to be than the second to stand without double precision.

In units of single precision's rounding of the table's rows, as seen from the token. A trained tokenizer's cosines were
off by 0.4 of these units at most (20,480 tokens by 512 codes); 6 % of its pictures have a token within 8.
"""


def soft_tokens(
    resampler: VisualVocabularyResampler,
    latents: Latents,
    dtype: torch.dtype,
    described: int | None,
    top: int = 1,
    chosen: TokenFlags | None = None,
) -> SoftDistribution:
    """What the resampler, in evaluation mode, makes of latents `[B, C, h, w]` when all of it is computed in `dtype`.

    The options are those of `VisualVocabularyResampler.forward`.
    """
    state = dict(resampler.named_parameters()) | dict(resampler.named_buffers())
    state = {name: value.to(dtype) for name, value in state.items()}
    options = {"described": described, "top": top, "chosen": chosen}
    found: SoftDistribution = functional_call(resampler, state, (latents.to(dtype),), options)
    return found


def nearest_codes(embeddings: TokenEmbeddings, codes: Codebook) -> tuple[VisualIds, PerToken]:
    """Ids `[B, N]` of the codes `[K, D]` nearest by cosine to embeddings `[B, N, D]`, and by how much, `[B, N]`."""
    cosines = F.normalize(embeddings, dim=-1) @ codes.to(embeddings.dtype).T
    best = cosines.topk(min(2, len(codes)), dim=-1).values
    lead = best[..., 0] - best[..., 1] if len(codes) > 1 else torch.full_like(best[..., 0], 2.0)
    return cosines.argmax(-1), lead


def encode_ids(resampler: VisualVocabularyResampler, codes: Codebook, latents: Latents) -> VisualIds:
    """Ids `[B, N]` of latents `[B, C, h, w]`, those of double precision; codes are `[K, D]` unit vectors.

    Rounding depends on batch size, order and threads. Tokens that do not lie near the border between two codes keep
    their ids from single precision; the others are computed again. Hard tokens jump where two words are equally
    probable, which no distance between codes shows: they are computed in double precision throughout.
    """
    if resampler.config.hard:
        return double_ids(resampler, codes, latents)
    chosen, kinds = distinct_tokens(resampler, latents)
    embeddings = soft_tokens(
        resampler, latents, torch.float32, described=0, chosen=chosen
    ).embeddings  # [1, U, D]
    ids, lead = nearest_codes(embeddings, codes)
    # An embedding shorter than the rows it is a mean of is the small remainder of larger sums, and their rounding.
    table = resampler.table
    rows = torch.linalg.vector_norm(table, dtype=torch.float32) / len(table) ** 0.5  # without a copy of it
    shortness = (rows / embeddings.norm(dim=-1)).clamp_min(1.0)
    near = ~(lead > MARGIN * torch.finfo(torch.float32).eps * shortness)
    chosen[chosen.clone()] = near[0]
    pictures = chosen.any(dim=-1)
    if pictures.any():
        again = soft_tokens(resampler, latents[pictures], torch.float64, described=0, chosen=chosen[pictures])
        ids[near] = nearest_codes(again.embeddings, codes)[0][0]
    return ids[0, kinds]


def distinct_tokens(resampler: VisualVocabularyResampler, latents: Latents) -> tuple[TokenFlags, VisualIds]:
    """Which tokens `[B, N]` to compute, one of each kind, and each token's kind `[B, N]`: the place among the chosen.

    A token without convolutions before it knows its own patch alone, and in drawings most patches are white. With
    convolutions hardly two tokens are equal, and all are chosen.
    """
    grid = (len(latents), resampler.encoder.token_grid[0] * resampler.encoder.token_grid[1])
    if resampler.config.depth > 0:
        places = torch.arange(grid[0] * grid[1], device=latents.device).view(grid)
        return torch.ones_like(places, dtype=torch.bool), places
    features = resampler.encoder(latents).flatten(0, 1)
    _, kinds = torch.unique(features, dim=0, return_inverse=True)
    places = torch.arange(len(kinds), device=kinds.device)
    first = torch.full_like(kinds, len(kinds)).scatter_reduce(0, kinds, places, "amin")[
        kinds
    ]  # of each token's kind
    chosen = first == places
    return chosen.view(grid), (chosen.long().cumsum(0) - 1)[first].view(grid)


def double_ids(resampler: VisualVocabularyResampler, codes: Codebook, latents: Latents) -> VisualIds:
    """`encode_ids` in double precision throughout."""
    return nearest_codes(soft_tokens(resampler, latents, torch.float64, described=0).embeddings, codes)[0]
