"""Where the visual tokens' rows start: lengths, directions, words of one LLM in the embeddings of another."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core_toys import pictures, small_config
from t2i_toys import WIDTH, tiny_llm, tiny_tokenizer
from torch import Tensor

from v2flow.config import ResamplerConfig
from v2flow.errors import V2FlowError
from v2flow.llm import LLMVocabulary
from v2flow.t2i.extension import VisualTokens, extend_vocabulary
from v2flow.t2i.initial_rows import initial_rows, mean_and_radius, projected_directions
from v2flow.t2i.word_directions import (
    TokenWords,
    matching_ids,
    surface_forms,
    token_words,
    word_directions,
    words_batch,
)
from v2flow.tokenizer import V2FlowTokenizer

K = 12


@pytest.fixture
def codes() -> Tensor:
    return F.normalize(torch.randn(K, WIDTH, generator=torch.Generator().manual_seed(3)), dim=-1)


def extended(family: str = "gemma3", num_visual: int = K) -> tuple[Any, Any, VisualTokens]:
    tokenizer = tiny_tokenizer()
    model = tiny_llm(family, len(tokenizer))
    return model, tokenizer, extend_vocabulary(model, tokenizer, num_visual)


def some_words(tokenizer: Any, count: int = 20) -> TokenWords:
    """Random distributions over ordinary words of the tokenizer."""
    words = [w for w, i in sorted(tokenizer.get_vocab().items(), key=lambda x: x[1]) if 3 <= i < 3 + count]
    return TokenWords(torch.rand(K, count).softmax(1), torch.ones(K, dtype=torch.long), words)


# --- lengths and directions -------------------------------------------------------------------------------------


def test_mean_and_radius_are_those_of_the_definition() -> None:
    table = torch.randn(500, 8) * 0.2 + 3
    mean, radius = mean_and_radius(table)
    torch.testing.assert_close(mean, table.mean(0))
    assert radius == pytest.approx(
        float((table - table.mean(0)).norm(dim=1).square().mean().sqrt()), rel=1e-5
    )


@pytest.mark.parametrize("method", ["vocabulary", "words", "projection", "random"])
@pytest.mark.parametrize("family", ["gemma3", "llama"], ids=["tied", "untied"])
def test_rows_lie_at_the_tables_radius_around_its_mean(family: str, method: Any, codes: Tensor) -> None:
    model, tokenizer, tokens = extended(family)
    found = initial_rows(method, codes, model, tokenizer, tokens, words=some_words(tokenizer), seed=4)
    tables = [(found.input, model.get_input_embeddings().weight[: tokens.boi])]
    assert (found.output is None) == (family == "gemma3")
    if found.output is not None:
        tables.append((found.output, model.get_output_embeddings().weight[: tokens.boi]))
    for rows, table in tables:
        assert rows.shape == (K + 2, WIDTH) and rows.dtype == torch.float32
        mean = table.mean(0)
        radius = (table - mean).norm(dim=1).square().mean().sqrt()
        torch.testing.assert_close((rows - mean).norm(dim=1), radius.expand(K + 2), rtol=1e-4, atol=0)
    # <boi> and <eoi>: directions of their own, whatever the tokens' are
    ends = F.normalize(
        found.input[[0, -1]] - model.get_input_embeddings().weight[: tokens.boi].mean(0), dim=1
    )
    assert abs(ends[0] @ ends[1]) < 0.7
    again = initial_rows(method, codes, model, tokenizer, tokens, words=some_words(tokenizer), seed=5)
    assert not torch.allclose(found.input[0], again.input[0])


def test_vocabulary_rows_point_along_the_codes_and_random_ones_do_not(codes: Tensor) -> None:
    model, tokenizer, tokens = extended()
    mean = model.get_input_embeddings().weight[: tokens.boi].mean(0)
    aligned = {}
    for method in ("vocabulary", "random"):
        rows = initial_rows(method, codes, model, tokenizer, tokens).input  # type: ignore[arg-type]
        aligned[method] = (F.normalize(rows[1:-1] - mean, dim=1) * codes).sum(1)
    torch.testing.assert_close(aligned["vocabulary"], torch.ones(K), rtol=0, atol=1e-5)
    assert aligned["random"].abs().mean() < 0.4


@pytest.mark.parametrize("method", ["random", "projection"])
def test_random_directions_depend_on_the_seed_alone(method: Any, codes: Tensor) -> None:
    model, tokenizer, tokens = extended()
    a, b, c = (initial_rows(method, codes, model, tokenizer, tokens, seed=s).input for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.allclose(a, c)


def test_a_projection_keeps_similarities_exactly_when_the_llm_is_wider_and_about_when_narrower() -> None:
    codes = F.normalize(torch.randn(40, 48), dim=1)
    similarities = codes @ codes.T
    for width in (48, 64):
        wider = projected_directions(codes, width, seed=0)
        torch.testing.assert_close(wider @ wider.T, similarities, rtol=0, atol=1e-5)
    narrower = F.normalize(projected_directions(codes, 36, seed=0), dim=1)
    pairs = torch.triu_indices(40, 40, 1)
    both = torch.stack([similarities[pairs[0], pairs[1]], (narrower @ narrower.T)[pairs[0], pairs[1]]])
    assert torch.corrcoef(both)[0, 1] > 0.75


def test_what_does_not_fit_is_refused(codes: Tensor) -> None:
    model, tokenizer, tokens = extended()
    wide = torch.randn(K, WIDTH + 1)
    with pytest.raises(
        V2FlowError, match="width 33, found one of width 32; use rows=words or rows=projection"
    ):
        initial_rows("vocabulary", wide, model, tokenizer, tokens)
    assert initial_rows("projection", wide, model, tokenizer, tokens).input.shape == (K + 2, WIDTH)
    with pytest.raises(V2FlowError, match="codes: expected 12, .* found 11"):
        initial_rows("random", codes[1:], model, tokenizer, tokens)
    with pytest.raises(V2FlowError, match="option rows: expected one of vocabulary, words.* found 'mean'"):
        initial_rows("mean", codes, model, tokenizer, tokens)  # type: ignore[arg-type]
    with pytest.raises(V2FlowError, match="see token_words"):
        initial_rows("words", codes, model, tokenizer, tokens)


# --- words by their strings -------------------------------------------------------------------------------------


def test_vocabularies_of_both_spellings_say_the_same_text() -> None:
    pieces = ["▁dog", "dog", "▁ö", "<0x0A>", "<0xE6>", "▁▁"]
    bytes_ = ["Ġdog", "dog", "ĠÃ¶", "Ċ", "æ", "ĠĠ"]
    assert surface_forms(pieces) == surface_forms(bytes_) == [" dog", "dog", " ö", "\n", None, "  "]


def test_words_are_found_in_a_byte_level_vocabulary_whatever_marks_their_spaces() -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = tokenizer.get_vocab()
    words = ["▁red", "▁the", "red", "▁zebra", "<bos>", "a", "▁a"]
    expected = [vocabulary.get(w, -1) for w in ("Ġred", "Ġthe", "red", "Ġzebra")] + [
        -1,
        vocabulary["a"],
        vocabulary["Ġa"],
    ]
    assert expected[0] >= 0 and expected[1] >= 0 and expected[3] == -1
    assert matching_ids(words, tokenizer, len(tokenizer)).tolist() == expected
    # Words beyond the table have no row.
    assert matching_ids(words, tokenizer, expected[0])[0] == -1


def test_a_byte_level_vocabulary_matches_itself_and_its_visual_tokens_match_nothing() -> None:
    _, tokenizer, tokens = extended()
    words = [w for w, _ in sorted(tokenizer.get_vocab().items(), key=lambda x: x[1])]
    found = matching_ids(words, tokenizer, len(tokenizer))
    texts = surface_forms(words)
    ordinary = [i for i in range(3, tokens.boi) if texts[i] is not None]
    assert len(ordinary) > 100 and found[ordinary].tolist() == ordinary
    assert (found[tokens.boi :] == -1).all() and (found[:3] == -1).all()


def test_expected_embeddings_by_hand_and_mass_without_a_match() -> None:
    tokenizer = tiny_tokenizer()
    vocabulary, table = tokenizer.get_vocab(), torch.randn(len(tokenizer), 5)
    words = ["▁red", "▁zebra", "▁the", "▁a"]
    probabilities = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.9, 0.0, 0.1]])
    said = word_directions(TokenWords(probabilities, torch.ones(2), words), tokenizer, table)
    red, the, a = (table[vocabulary[w]] for w in ("Ġred", "Ġthe", "Ġa"))
    centre = (red + the + a) / 3
    expected = torch.stack([0.5 * (red - centre) + 0.25 * (the - centre), 0.1 * (a - centre)])
    torch.testing.assert_close(said.directions, expected)
    torch.testing.assert_close(said.mass, torch.tensor([0.75, 0.1]))
    assert said.matched == 3
    with pytest.raises(V2FlowError, match="none of the tokenizer's 2 words"):
        word_directions(TokenWords(torch.ones(1, 2) / 2, torch.ones(1), ["▁zebra", "▁qq"]), tokenizer, table)


# --- what the visual tokens mean --------------------------------------------------------------------------------


def llms_own_tokenizer(model: Any, llm_tokenizer: Any, rows: int, readout: Any = "keys") -> V2FlowTokenizer:
    """A small V2Flow tokenizer over `rows` ordinary words of the LLM, spelt the other way (▁)."""
    entries = [w for w, i in sorted(llm_tokenizer.get_vocab().items(), key=lambda x: x[1])]
    texts = surface_forms(entries)
    special = set(llm_tokenizer.added_tokens_decoder)
    chosen = [i for i in range(len(entries)) if texts[i] is not None and i not in special][-rows:]
    words = [str(texts[i]).replace(" ", "▁") for i in chosen]
    table = model.get_input_embeddings().weight.detach()[chosen]
    resampler = ResamplerConfig(width=16, depth=1, token_grid=[4, 2], key_dim=8, readout=readout)
    tokenizer = V2FlowTokenizer(
        small_config(resampler=resampler), LLMVocabulary.from_table(table, words, "toy")
    )
    # Codes as training would set them: the tokens of pictures.
    with torch.no_grad():
        soft = tokenizer.encode(pictures(8, seed=1), return_soft=True)
        tokenizer.visual_vocabulary.codes[:] = F.normalize(soft.embeddings.flatten(0, 1)[:32], dim=-1)
    return tokenizer.eval()


def batches(images: Tensor) -> Iterator[dict[str, Any]]:
    """Two batches, the second padded."""
    yield {"image": images[:5]}
    padded = torch.cat([images[5:], images[-1:].expand(2, -1, -1, -1)])
    yield {"image": padded, "valid": torch.arange(len(padded)) < len(images) - 5}


def test_mean_distributions_are_those_of_a_plain_loop() -> None:
    llm_tokenizer = tiny_tokenizer()
    tokenizer = llms_own_tokenizer(tiny_llm("gemma3", len(llm_tokenizer)), llm_tokenizer, 40)
    images = pictures(8, seed=2)
    found = token_words(tokenizer, batches(images))
    sums, counts = torch.zeros(32, 40), torch.zeros(32, dtype=torch.long)
    for image in images:
        soft = tokenizer.encode(image[None], return_soft=True, top_words=40)
        for token in range(8):
            index = int(soft.ids[0, token])
            counts[index] += 1
            sums[index] += torch.zeros(40).scatter_(0, soft.words[0, token], soft.probabilities[0, token])
    assert torch.equal(found.counts, counts) and int(counts.sum()) == 64
    used = counts > 0
    assert 1 < int(used.sum()) < 32 and found.unused == 32 - int(used.sum())
    torch.testing.assert_close(found.probabilities[used], sums[used] / counts[used, None])
    codes = tokenizer.visual_vocabulary.codes
    for index in (~used).nonzero().flatten().tolist():
        similarity = (codes @ codes[index]).masked_fill(~used, -2)
        assert torch.equal(found.probabilities[index], found.probabilities[int(similarity.argmax())])
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(32))
    assert int(token_words(tokenizer, batches(images), pictures=5).counts.sum()) == 40


def test_pictures_read_at_once_keep_within_half_a_gigabyte() -> None:
    for tokens, words in ((64, 2048), (64, 262_144), (1024, 32_000), (1, 1)):
        tokenizer: Any = SimpleNamespace(num_tokens=tokens, words=range(words))
        batch = words_batch(tokenizer)
        assert 1 <= batch <= 32 and (batch == 1 or batch * tokens * words * 32 <= 1 << 29)


def test_in_its_own_llm_words_point_along_the_mean_soft_token_of_each_code() -> None:
    """Which is about the code itself: words and vocabulary are then one way of saying the same."""
    model, llm_tokenizer, tokens = extended(num_visual=32)
    tokenizer = llms_own_tokenizer(model, llm_tokenizer, 40)
    images = pictures(8, seed=1)
    soft, codes = tokenizer.encode(images, return_soft=True), tokenizer.visual_vocabulary.codes
    source = token_words(tokenizer, batches(images))
    rows = initial_rows("words", codes, model, llm_tokenizer, tokens, words=source)
    directions = rows.input[1:-1] - model.get_input_embeddings().weight[: tokens.boi].mean(0)
    used = source.counts.nonzero().flatten()
    means = torch.stack([soft.embeddings[soft.ids == k].mean(0) for k in used])
    alike = F.cosine_similarity(directions[used], means)
    torch.testing.assert_close(alike, torch.ones(len(used)), rtol=0, atol=1e-4)
    assert F.cosine_similarity(directions, codes)[used].mean() > 0.7
    assert rows.report["words_matched"] == 1 and rows.report["mass_matched"] == pytest.approx(1, abs=1e-5)
    assert rows.report["tokens_unused"] == source.unused / 32


def test_in_another_llm_words_keep_what_the_tokens_have_in_common() -> None:
    """A second LLM whose table is a rotation of the first's: the rows must be the first's, rotated."""
    first, llm_tokenizer, tokens = extended(num_visual=32)
    second, _, _ = extended(num_visual=32)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
    with torch.no_grad():
        second.get_input_embeddings().weight.copy_(first.get_input_embeddings().weight @ rotation)
    tokenizer = llms_own_tokenizer(first, llm_tokenizer, 40)
    source = token_words(tokenizer, batches(pictures(8, seed=1)))
    codes = tokenizer.visual_vocabulary.codes
    here = initial_rows("words", codes, first, llm_tokenizer, tokens, words=source).input[1:-1]
    there = initial_rows("words", codes, second, llm_tokenizer, tokens, words=source).input[1:-1]
    torch.testing.assert_close(there, here @ rotation, rtol=0, atol=1e-4)


def test_a_tokenizer_without_words_and_a_loader_without_pictures_are_refused() -> None:
    llm_tokenizer = tiny_tokenizer()
    model = tiny_llm("gemma3", len(llm_tokenizer))
    tokenizer = llms_own_tokenizer(model, llm_tokenizer, 40)
    with pytest.raises(V2FlowError, match="found none"):
        token_words(tokenizer, [])
    plain = V2FlowTokenizer(
        small_config(
            resampler=ResamplerConfig(width=16, depth=1, token_grid=[4, 2], key_dim=8, readout="none")
        )
    )
    with pytest.raises(V2FlowError, match="readout=none; use rows=projection"):
        token_words(plain, batches(pictures(8)))
