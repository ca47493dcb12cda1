"""Sequences of captions and pictures, and their loss, against a plain merged model on one sequence at a time."""

from typing import Any

import pytest
import torch
from core_toys import pictures, small_config
from t2i_toys import CAPTIONS, FAMILIES, tiny_llm, tiny_tokenizer

from v2flow.errors import V2FlowError
from v2flow.t2i.extension import extend_vocabulary
from v2flow.t2i.image_loss import ImageLoss
from v2flow.t2i.sequences import caption_ids, join
from v2flow.t2i.text_to_image import V2FlowForTextToImage
from v2flow.t2i.visual_rows import merge
from v2flow.tokenizer import V2FlowTokenizer


def build(family: str, **options: Any) -> V2FlowForTextToImage:
    tokenizer = V2FlowTokenizer(small_config())
    words = tiny_tokenizer()
    llm = tiny_llm(family, len(words))
    tokens = extend_vocabulary(llm, words, tokenizer.codebook_size)
    model = V2FlowForTextToImage(tokenizer, llm, words, tokens, **options).eval()
    with torch.no_grad():
        model.rows.input.normal_(std=0.5)
    merge(llm, model.rows)
    return model


def plain_logits(model: V2FlowForTextToImage, caption: list[int], ids: torch.Tensor) -> torch.Tensor:
    """Logits `[N + 1, V]` of the merged LLM at the image positions of one sequence without padding."""
    tokens = model.tokens
    row = torch.tensor([[*caption, tokens.boi, *(ids + tokens.first).tolist()]])
    with torch.no_grad():
        logits: torch.Tensor = model.llm(input_ids=row).logits[0, len(caption) :]
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_single_sequences_without_padding(family: str) -> None:
    model = build(family)
    ids = model.tokenizer.encode(pictures(3))
    captions = [CAPTIONS[0], None, CAPTIONS[1]]
    targets = torch.cat([ids + model.tokens.first, torch.full((3, 1), model.tokens.eoi)], dim=1)
    rows = [plain_logits(model, c, i) for c, i in zip(model.caption_ids(captions), ids, strict=True)]
    full = torch.stack(
        [row.log_softmax(-1).gather(1, t[:, None]) for row, t in zip(rows, targets, strict=True)]
    )
    visual = torch.stack(
        [
            row[:, model.tokens.rows].log_softmax(-1).gather(1, (t - model.tokens.boi)[:, None])
            for row, t in zip(rows, targets, strict=True)
        ]
    )
    everywhere, nowhere = (model.loss(captions, ids, share) for share in (1.0, 0.0))
    assert torch.allclose(everywhere.total, -full.mean(), atol=1e-4)
    assert torch.allclose(nowhere.total, -visual.mean(), atol=1e-4)
    assert torch.allclose(everywhere.visual, nowhere.total, atol=1e-5) and nowhere.text_mass == 0
    text = 1 - torch.stack(rows).softmax(-1)[..., model.tokens.rows].sum(-1).mean()
    assert torch.allclose(everywhere.text_mass, text, atol=1e-4)
    assert torch.allclose(model.log_likelihood(captions, ids), visual.sum((1, 2)), atol=1e-3)
    # A share of the positions stands for all of them.
    found = [
        model.loss(captions, ids, 0.5, 0.0, torch.Generator().manual_seed(seed)).total for seed in range(200)
    ]
    error = torch.stack(found).std() / 200**0.5
    assert error > 0 and abs(torch.stack(found).mean() - everywhere.total) < 4 * error
    assert min(found) > nowhere.total


def test_sampled_words_cost_where_the_whole_vocabulary_is_not_asked() -> None:
    model = build("gemma3")
    captions, ids = CAPTIONS[:2], model.tokenizer.encode(pictures(2))

    def loss(share: float, words: int, seed: int = 0) -> ImageLoss:
        return model.loss(
            captions, ids, share, generator=torch.Generator().manual_seed(seed), sampled_words=words
        )

    everywhere, nowhere = loss(1.0, 0), loss(0.0, 0)
    # Of all words, and of few words under the exact loss at each position, nothing is left to chance.
    for exact in (loss(0.0, 10**6), loss(0.25, 10**6), loss(1.0, 8)):
        assert torch.allclose(exact.total, everywhere.total, atol=1e-4)
    assert torch.equal(loss(0.0, 8).visual, nowhere.visual) and loss(0.0, 8).text_mass == 0
    assert loss(0.0, 8).total != loss(0.0, 8, seed=1).total
    # The exact positions take the place of the estimate there, and each position counts once.
    estimated = [loss(0.0, 64, seed).total for seed in range(40)]
    mixed = [loss(0.5, 64, seed).total for seed in range(40)]
    distance = [(torch.stack(found) - everywhere.total).abs().mean() for found in (estimated, mixed)]
    assert 0 < distance[1] < distance[0]


def test_gradients_reach_the_rows_and_the_blocks_and_not_the_text_table() -> None:
    model = build("gemma3")
    model.loss(CAPTIONS[:2], model.tokenizer.encode(pictures(2)), 0.5).total.backward()
    assert model.rows.input.grad is not None and bool(model.rows.input.grad.abs().sum() > 0)
    table = model.llm.get_input_embeddings().weight
    assert table.grad is None and not any(p.requires_grad for p in model.tokenizer.parameters())
    assert all(p.grad is not None for p in model.llm.parameters() if p.requires_grad)


def test_sequences_are_padded_on_the_left_and_end_with_the_picture() -> None:
    model = build("llama")
    tokens = model.tokens
    batch = join([[5, 6, 7], [8]], tokens, torch.tensor([[0, 3], [1, 2]]))
    first = tokens.first
    assert batch.ids.tolist() == [
        [5, 6, 7, tokens.boi, first, first + 3, tokens.eoi],
        [0, 0, 8, tokens.boi, first + 1, first + 2, tokens.eoi],
    ]
    assert batch.mask.tolist() == [[True] * 7, [False] * 2 + [True] * 5]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3, 4]]
    start = join([[5, 6, 7], []], tokens)
    assert start.ids.tolist() == [[5, 6, 7, tokens.boi], [0, 0, 0, tokens.boi]]


def test_no_caption_is_not_an_empty_one() -> None:
    model = build("gemma3")
    ids = caption_ids(model.llm_tokenizer, [None, CAPTIONS[0], None], 64)
    assert ids[0] == ids[2] and len(ids[0]) <= 1 < len(ids[1])
    with pytest.raises(V2FlowError, match="expected some words"):
        caption_ids(model.llm_tokenizer, [""], 64)


def test_what_does_not_fit_together_is_refused() -> None:
    model = build("gpt2")
    with pytest.raises(V2FlowError, match=r"a context of \d+, found an LLM with"):
        V2FlowForTextToImage(
            model.tokenizer, model.llm, model.llm_tokenizer, model.tokens, model.rows, max_caption=10**6
        )
    other = V2FlowTokenizer(
        small_config(visual_vocabulary=type(model.tokenizer.config.visual_vocabulary)(size=16))
    )
    with pytest.raises(V2FlowError, match="expected 32 codes"):
        V2FlowForTextToImage(other, model.llm, model.llm_tokenizer, model.tokens, model.rows)
