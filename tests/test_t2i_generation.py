"""Generated ids against the plain merged LLM: `generate` of transformers, and single sequences without a cache."""

from typing import Any

import pytest
import torch
from core_toys import small_config
from t2i_toys import CAPTIONS, FAMILIES, tiny_llm, tiny_tokenizer

from v2flow.errors import V2FlowError
from v2flow.t2i.extension import extend_vocabulary
from v2flow.t2i.generation import GenerationOptions, draw, generate_ids
from v2flow.t2i.hub import merged_llm
from v2flow.t2i.speed import CACHED, OURS, UNCACHED, generation_speed, plain_generate
from v2flow.t2i.text_to_image import V2FlowForTextToImage
from v2flow.tokenizer import V2FlowTokenizer

MIXED = ["a dog", *CAPTIONS, "the red moon above two green apples beside a house"]


def build(family: str = "llama", grid: tuple[int, int] = (4, 2)) -> V2FlowForTextToImage:
    """A model whose tokens depend on all that stands before them: its blocks' weights are large."""
    torch.manual_seed(0)
    resampler = small_config().resampler
    resampler.token_grid = list(grid)
    tokenizer = V2FlowTokenizer(small_config(resampler=resampler)).eval()
    words = tiny_tokenizer()
    llm = tiny_llm(family, len(words))
    tokens = extend_vocabulary(llm, words, tokenizer.codebook_size)
    tables = {id(llm.get_input_embeddings().weight), id(llm.get_output_embeddings().weight)}
    model = V2FlowForTextToImage(tokenizer, llm, words, tokens)
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if parameter.ndim == 2 and id(parameter) not in tables:
                parameter.normal_(std=0.25)
            elif "gemma" in family and ".post_" in name:  # what a block adds is normalised: make it count
                parameter.fill_(8.0)
        for parameter in model.rows.parameters():
            parameter.normal_(std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> V2FlowForTextToImage:
    return build()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- greedy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_are_those_of_plain_generate(family: str) -> None:
    """16 tokens after captions of different lengths: beyond Gemma 3's window of 8 in the toy."""
    model = build(family, (4, 4))
    ids = generate_ids(model, MIXED, temperature=0.0)
    assert ids.shape == (len(MIXED), 16) and len(ids.unique(dim=0)) > 4
    assert len(ids.unique()) > 3
    llm = merged_llm(model)
    assert torch.equal(ids, plain_generate(model, llm, MIXED))
    assert torch.equal(ids, plain_generate(model, llm, MIXED, use_cache=False))


def slow_guided(model: V2FlowForTextToImage, caption: str, guidance: float) -> list[int]:
    """The most probable ids under guidance, each from two whole passes over one unpadded sequence."""
    llm, tokens = merged_llm(model), model.tokens
    bos = model.llm_tokenizer.bos_token_id
    prompts = [model.caption_ids([caption])[0] + [tokens.boi], [bos, tokens.boi]]
    found: list[int] = []
    for _ in range(model.num_tokens):
        with torch.no_grad():
            conditional, base = (
                llm(input_ids=torch.tensor([p + [tokens.first + i for i in found]])).logits[
                    0, -1, tokens.first : tokens.eoi
                ]
                for p in prompts
            )
        found.append(int((base + guidance * (conditional - base)).argmax()))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_guided_ids_are_those_of_two_whole_passes(family: str) -> None:
    model = build(family)
    ids = generate_ids(model, MIXED[:2], temperature=0.0, guidance=3.0)
    assert ids.tolist() == [slow_guided(model, caption, 3.0) for caption in MIXED[:2]]
    assert not torch.equal(ids, generate_ids(model, MIXED[:2], temperature=0.0))


def test_no_guidance_at_all_ignores_the_caption(model: V2FlowForTextToImage) -> None:
    ids = generate_ids(model, MIXED, temperature=0.0, guidance=0.0)
    assert (ids == ids[0]).all() and ids[0].tolist() == slow_guided(model, MIXED[0], 0.0)


# --- draws ------------------------------------------------------------------------------------------------------


def frequencies(logits: torch.Tensor, options: GenerationOptions, count: int = 40_000) -> torch.Tensor:
    index = draw(
        logits.expand(count, -1), torch.rand(count, generator=seeded(), dtype=torch.float64), options
    )
    return torch.bincount(index, minlength=logits.shape[-1]) / count


def test_draws_follow_the_filtered_distribution() -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    logits = probabilities.log()
    tempered = probabilities**2 / (probabilities**2).sum()
    for options, expected in (
        (GenerationOptions(), probabilities),
        (GenerationOptions(temperature=0.5), tempered),
        (GenerationOptions(top_k=2), torch.tensor([0, 4 / 7, 0, 3 / 7, 0])),
        (GenerationOptions(top_k=99), probabilities),
        (GenerationOptions(top_p=0.75), torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85),
        (GenerationOptions(top_p=0.65), torch.tensor([0, 4 / 7, 0, 3 / 7, 0])),
        (GenerationOptions(top_p=1e-6), torch.tensor([0.0, 1, 0, 0, 0])),
        (GenerationOptions(top_p=1.0), probabilities),
        (GenerationOptions(top_k=4, top_p=0.5), torch.tensor([0, 4 / 7, 0, 3 / 7, 0])),
    ):
        torch.testing.assert_close(frequencies(logits, options), expected, atol=0.012, rtol=0)


def test_extreme_draws_stay_among_the_tokens_left() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, -torch.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, ends, GenerationOptions()).tolist() == [1, 0]
    assert draw(logits, ends, GenerationOptions(top_k=2)).tolist() == [1, 2]
    draw(
        torch.full((2, 4), torch.nan), ends, GenerationOptions()
    )  # some id: the loss is where such a model is told


def test_ids_depend_on_the_seed_but_not_on_neighbours(model: V2FlowForTextToImage) -> None:
    options = {"top_k": 20, "top_p": 0.95, "guidance": 1.5}
    whole = generate_ids(model, MIXED, generator=seeded(), **options)
    assert torch.equal(whole, generate_ids(model, MIXED, generator=seeded(), **options))
    assert torch.equal(whole, generate_ids(model, MIXED, generator=seeded(), batch_size=1, **options))
    assert torch.equal(whole[:2], generate_ids(model, MIXED[:2], generator=seeded(), **options))
    assert not torch.equal(whole, generate_ids(model, MIXED, generator=seeded(1), **options))
    twice = generate_ids(model, [MIXED[0]] * 2, generator=seeded())
    assert not torch.equal(*twice)


def test_modes_and_gradients_are_left_as_they_were(model: V2FlowForTextToImage) -> None:
    model.train()
    ids = generate_ids(model, MIXED, temperature=0.0)
    assert model.training and model.llm.training and not ids.requires_grad
    model.eval()
    assert torch.equal(ids, generate_ids(model, MIXED, temperature=0.0))


# --- pictures ---------------------------------------------------------------------------------------------------


def test_generate_gives_the_pictures_of_its_ids(model: V2FlowForTextToImage) -> None:
    pictures = model.generate(MIXED, temperature=0.0, batch_size=4)
    assert pictures.shape == (len(MIXED), 3, 16, 16) and pictures.min() >= 0 and pictures.max() <= 1
    ids = generate_ids(model, MIXED, temperature=0.0)
    expected = model.tokenizer.decode(ids, steps=1, temperature=0.0)
    torch.testing.assert_close(pictures, expected, atol=1e-5, rtol=0)
    options = {"decode": {"steps": 2, "temperature": 0.7}, "top_k": 5}
    noisy = model.generate(MIXED, generator=seeded(), **options)
    assert torch.equal(noisy, model.generate(MIXED, generator=seeded(), **options))
    assert model.generate([]).shape == (0, 3, 16, 16)


def test_bf16_decoding_stays_near_fp32(model: V2FlowForTextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast, which `decode` turns on for a GPU alone, turned on here as well."""
    ids = generate_ids(model, MIXED, generator=seeded())
    real, kept = torch.autocast, {"steps": 4, "iterations": 2}
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.tokenizer.head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    single = model.tokenizer.decode(ids, seeded(), **kept)
    used: list[Any] = []

    def autocast(device: str, dtype: torch.dtype = torch.bfloat16, enabled: bool = True) -> Any:
        used.append(dtype)
        return real(device, dtype, enabled=True)

    monkeypatch.setattr(torch, "autocast", autocast)
    half = model.tokenizer.decode(ids, seeded(), **kept)
    assert used and not torch.equal(half, single) and single.std() > 0.05
    psnr = -10 * torch.log10((half - single).square().mean((1, 2, 3)))
    assert psnr.min() >= 35, psnr


# --- speed ------------------------------------------------------------------------------------------------------


def test_speed_is_measured_on_equal_ids(model: V2FlowForTextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    report = generation_speed(model, MIXED[:2], rounds=2)
    assert set(report["images_per_second"]) == {OURS, CACHED, UNCACHED}
    assert set(report["speed_ratio"]) == {CACHED, UNCACHED}
    assert all(spread["low"] > 0 for spread in report["images_per_second"].values())
    monkeypatch.setattr("v2flow.t2i.speed.plain_generate", lambda m, *_, **__: torch.zeros(2, 8).long())
    with pytest.raises(V2FlowError, match="expected the same ids of v2flow and transformers"):
        generation_speed(model, MIXED[:2], rounds=1)


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "option temperature: expected a number >= 0, found -1.0"),
        ({"temperature": float("nan")}, "option temperature"),
        ({"top_k": 0}, "option top_k: expected at least 1, or none, found 0"),
        ({"top_p": 0.0}, "option top_p: expected above 0 and at most 1"),
        ({"top_p": 1.5}, "option top_p"),
        ({"guidance": -1.0}, "option guidance"),
        ({"batch_size": 0}, "option batch_size: expected at least 1, found 0"),
        ({"steps": 4}, "generation option 'steps': unknown; expected one of temperature, top_k"),
        ({"decode": {"steps": 0}}, "steps"),
        ({"decode": {"top_k": 1}}, "decode option 'top_k': unknown"),
    ],
)
def test_bad_options_are_refused(model: V2FlowForTextToImage, options: dict[str, Any], message: str) -> None:
    with pytest.raises(V2FlowError, match=message) as error:
        model.generate(MIXED, **options)
    assert "\n" not in str(error.value)


def test_bad_captions_are_refused(model: V2FlowForTextToImage) -> None:
    with pytest.raises(V2FlowError, match="caption 1: expected some words"):
        model.generate(["a dog", " "])
    with pytest.raises(V2FlowError, match="caption 0 .*expected at most 64 tokens"):
        model.generate(["a dog " * 100])
