"""Arrays of the public interface: each has a name of `v2flow.arrays`, real ones fit it, and wrong ones are refused."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from beartype import BeartypeConf, beartype
from core_toys import pictures, small_config
from jaxtyping import AbstractArray, TypeCheckError, jaxtyped
from t2i_toys import CAPTIONS, tiny_llm, tiny_tokenizer
from torch import Tensor

from v2flow import SoftTokens, V2FlowForTextToImage, V2FlowTokenizer, arrays
from v2flow.codec import FrozenAutoencoder, PatchCodec
from v2flow.config import DecoderConfig, ResamplerConfig, VelocityConfig
from v2flow.encoding import nearest_codes
from v2flow.samplers import SOLVERS, solve
from v2flow.t2i.extension import extend_vocabulary
from v2flow.vocabulary_attention import SoftDistribution

MODULES = [
    import_module(f"v2flow.{name}")
    for name in (
        "tokenizer", "codec", "resampler", "vocabulary_attention", "visual_vocabulary", "masked_decoder", "velocity",
        "flow", "samplers", "decoding", "encoding", "t2i.text_to_image", "t2i.generation",
    )
]  # fmt: skip
NAMES = {name: kind for name, kind in vars(arrays).items() if isinstance(kind, type(arrays.Pictures))}
UNNAMED = {
    "resampler.LayerNorm2d.forward": "a layer: any channels",
    "resampler.ConvBlock.forward": "a layer",
    "velocity.TimestepEmbedding.forward": "a layer",
    "velocity.AdaLNBlock.forward": "a layer",
    "velocity.JointBlock.forward": "a layer",
    "tokenizer.check_images": "says itself what is wrong with an array",
    "tokenizer.check_ids": "says itself what is wrong with an array",
    "masked_decoder.Prefix.__init__": "keys and values of the transformer's blocks",
}


# --- which functions, and what is wrong with their annotations ---------------------------------------------------


def own(owner: Any, prefix: str) -> Iterator[tuple[str, Any, str, Callable[..., Any]]]:
    """Name, owner, attribute and function of what is public in a module or class and was written there."""
    for attribute, value in list(vars(owner).items()):
        if attribute.startswith("_") and attribute not in ("__init__", "__new__"):
            continue
        value = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if isinstance(owner, ModuleType) and getattr(value, "__module__", "") != owner.__name__:
            continue
        if inspect.isclass(value):
            yield from own(value, f"{prefix}.{attribute}")
        elif inspect.isfunction(value):
            yield f"{prefix}.{attribute}".removeprefix("v2flow."), owner, attribute, value


PUBLIC = [found for module in MODULES for found in own(module, module.__name__)]


def kinds(annotation: Any) -> Iterator[Any]:
    """What a type is made of: `tuple[A | None, list[B]]` of A, None and B."""
    parts = annotation if isinstance(annotation, list) else get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from kinds(part)


def named(function: Callable[..., Any]) -> set[type]:
    """The names of `v2flow.arrays` in a signature."""
    signature = inspect.signature(function)
    annotations = [parameter.annotation for parameter in signature.parameters.values()]
    found = {kind for annotation in [*annotations, signature.return_annotation] for kind in kinds(annotation)}
    return {kind for kind in NAMES.values() if kind in found}


def problems(function: Callable[..., Any]) -> list[str]:
    """Parameters, `return` among them, without a type, of a bare tensor's or of one that is not named in `arrays`."""
    signature = inspect.signature(function)
    annotations = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    annotations = {name: kind for name, kind in annotations.items() if name not in ("self", "cls", "_cls")}
    if function.__name__ not in ("__init__", "__new__"):
        annotations["return"] = signature.return_annotation
    return [
        name
        for name, annotation in annotations.items()
        for kind in kinds(annotation)
        if kind is inspect.Parameter.empty
        or (
            inspect.isclass(kind) and issubclass(kind, (Tensor, AbstractArray)) and kind not in NAMES.values()
        )
    ]


def test_every_array_of_a_public_function_has_a_name() -> None:
    found = {name: problems(function) for name, _, _, function in PUBLIC}
    assert {name for name, wrong in found.items() if wrong} == set(UNNAMED)
    assert {"tokenizer.V2FlowTokenizer.encode", "samplers.History.__new__", "flow.gather_positions"} <= set(
        found
    )


def test_the_documents_name_these_modules(repository: Path) -> None:
    section = (repository / "docs" / "api.md").read_text().split("## Arrays")[1].split("## ")[0]
    listed = section.partition("of these modules")[2].partition("The others")[0]
    assert re.findall(r"`([\w.]+)`", listed) == [
        module.__name__.removeprefix("v2flow.") for module in MODULES
    ]


def test_every_name_is_used() -> None:
    used = set().union(*(named(function) for *_, function in PUBLIC))
    assert {name for name, kind in NAMES.items() if kind not in used} == set()


def test_each_name_says_what_it_is() -> None:
    lines = inspect.getsource(arrays).splitlines()
    places = {line.split(" = ")[0]: number for number, line in enumerate(lines) if " = " in line}
    assert set(NAMES) <= set(places)
    assert all(lines[places[name] + 1].startswith('"""') for name in NAMES)


def test_a_function_without_a_name_is_noticed() -> None:
    def bare(
        self: Any, x: Tensor, y: Tensor | None, *z: arrays.Latents
    ) -> tuple[arrays.Pictures, Tensor]: ...

    def untyped(x: int, y): ...  # type: ignore[no-untyped-def]

    again = arrays.Float[Tensor, "B 3 S S"]

    def elsewhere(x: again, step: Callable[[Tensor], arrays.Latents]) -> None: ...  # type: ignore[valid-type]

    assert problems(bare) == ["x", "y", "return"]
    assert problems(untyped) == ["y", "return"]
    assert problems(elsewhere) == ["x", "step"]


# --- real models under the checker ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked() -> Iterator[None]:
    """Every public function that names a shape checks it, wherever it was imported to."""
    checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
    ours = [module for name, module in sys.modules.items() if name.split(".")[0] in ("v2flow", __name__)]
    with pytest.MonkeyPatch.context() as patch:
        for _, owner, attribute, function in PUBLIC:
            if not named(function) or attribute == "__new__":
                continue
            wrapped = jaxtyped(function, typechecker=checker)
            patch.setattr(owner, attribute, wrapped)
            for module in ours if isinstance(owner, ModuleType) else []:
                if vars(module).get(attribute) is function:
                    patch.setattr(module, attribute, wrapped)
        yield


def small_model(**parts: Any) -> V2FlowTokenizer:
    torch.manual_seed(0)
    return V2FlowTokenizer(small_config(**parts)).eval()


@pytest.fixture(scope="module")
def tokenizer(checked: None) -> V2FlowTokenizer:
    return small_model()


RESAMPLER: dict[str, Any] = {"width": 16, "depth": 1, "token_grid": [4, 2], "key_dim": 8}
FIELD: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2}
DECODER: dict[str, Any] = {"width": 16, "heads": 2, "encoder_depth": 1, "decoder_depth": 1}
MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "per position": {"velocity": VelocityConfig(**FIELD, kind="per_position", fine_patch=1)},
    "velocity": {"velocity": VelocityConfig(**FIELD, fine_patch=1, target="velocity")},
    "no words": {"resampler": ResamplerConfig(**RESAMPLER, readout="none")},
    "hard": {"resampler": ResamplerConfig(**RESAMPLER, readout="linear", hard=True)},
    "prefix": {"decoder": DecoderConfig(**DECODER, prefix="attend", prefix_attention="self")},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_tokenizers_own_arrays_fit(checked: None, name: str) -> None:
    """Training, encoding, decoding with guidance by each solver."""
    model, images = small_model(**MODELS[name]), pictures(3)
    for trained in (False, True):
        losses = model.train(trained).losses(images, progress=0)
        assert losses.ids.shape == (3, 8) and losses.total.isfinite()
    soft = model.eval().encode(images, return_soft=True, top_words=4)
    assert torch.equal(soft.ids, model.encode(images))
    assert soft.words.shape == (3, 8, 0 if name == "no words" else 4)
    for solver in SOLVERS:
        rec = model.reconstruct(images, torch.Generator(), steps=2, iterations=3, guidance=1.5, solver=solver)
        assert rec.shape == images.shape
    assert len(model.decode(model.encode(images[:0]))) == 0
    assert isinstance(model.resampler.table, arrays.EmbeddingTable)


def test_an_autoencoders_pictures_need_not_be_square(checked: None) -> None:
    from diffusers import AutoencoderKL

    codec = FrozenAutoencoder(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), 4, 1, 0.5)
    latents = codec.encode(torch.rand(2, 3, 8, 4))
    assert latents.shape == (2, 4, 8, 4) and codec.decode(latents).shape == (2, 3, 8, 4)


def test_pictures_of_captions_fit(tokenizer: V2FlowTokenizer) -> None:
    words = tiny_tokenizer()
    llm = tiny_llm("llama", len(words))
    tokens = extend_vocabulary(llm, words, tokenizer.codebook_size)
    model = V2FlowForTextToImage(tokenizer, llm, words, tokens).eval()
    ids = tokenizer.encode(pictures(2))
    assert model.loss(CAPTIONS[:2], ids).total.isfinite()
    assert model.log_likelihood(CAPTIONS[:2], ids).shape == (2,)
    options: dict[str, Any] = {"guidance": 2.0, "top_k": 5, "top_p": 0.9, "generator": torch.Generator()}
    drawn = model.generate(CAPTIONS, batch_size=3, decode={"steps": 2}, **options)
    assert drawn.shape == (len(CAPTIONS), 3, 16, 16)


# --- wrong arrays -----------------------------------------------------------------------------------------------


def latents(batch: int = 2, positions: int = 16, channels: int = 48) -> Tensor:
    return torch.zeros(batch, positions, channels)


EVERYWHERE = torch.ones(2, 16).bool()
WRONG: dict[str, tuple[str, Callable[[V2FlowTokenizer], Any]]] = {
    "rank of pictures": ("images", lambda t: t.encode(pictures(2)[0])),
    "channels of pictures": ("images", lambda t: t.encode(pictures(2)[:, :1])),
    "pictures that are not square": ("images", lambda t: t.losses(pictures(2)[:, :, :8])),
    "pictures of integers": ("images", lambda t: t.reconstruct((255 * pictures(2)).to(torch.uint8))),
    "channels for a codec": ("images", lambda t: t.codec.encode(torch.zeros(2, 4, 16, 16))),
    "latents in a row": ("latents", lambda t: t.codec.decode(latents())),
    "float ids": ("ids", lambda t: t.decode(torch.zeros(2, 8))),
    "ids of one picture": ("ids", lambda t: t.visual_vocabulary.lookup(torch.zeros(8).long())),
    "codes of another width": ("codes", lambda t: nearest_codes(latents(2, 8, 16), torch.zeros(32, 15))),
    "a mask of numbers": ("mask", lambda t: t.decoder(latents(2, 8, 16), latents(), EVERYWHERE.float())),
    "fewer latents than tokens": ("latents", lambda t: t.decoder(latents(2, 8, 16), latents(1), EVERYWHERE)),
    "fewer conditions than positions": (
        "condition", lambda t: t.head.velocity(latents(), torch.ones(1, 1), latents(2, 15, 16), EVERYWHERE)
    ),
    "times of other pictures": (
        "t", lambda t: t.head.velocity(latents(), torch.ones(3, 1), latents(2, 16, 16), EVERYWHERE)
    ),
    "a mask of other positions": ("mask", lambda t: t.head.loss(latents(), latents(2, 16, 16), EVERYWHERE[:, 1:])),
    "a state of integers": ("x", lambda t: solve(lambda x, time: x, torch.zeros(3).long(), [1.0, 0.0])),
    "words without probabilities": (
        "probabilities",
        lambda t: SoftDistribution(latents(), torch.zeros(1, 16), torch.zeros(1, 16, 3).long(), torch.zeros(1, 16, 2)),
    ),
    "embeddings without ids": (
        "embeddings", lambda t: SoftTokens(torch.zeros(2, 7).long(), latents(2, 8), *[torch.zeros(2, 8)] * 3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arrays_are_refused(tokenizer: V2FlowTokenizer, name: str) -> None:
    argument, call = WRONG[name]
    with pytest.raises(TypeCheckError, match=rf"whilst typechecking parameter '{argument}'"):
        call(tokenizer)


def test_wrong_results_are_refused(checked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, decode = small_model(), PatchCodec.decode
    ids = model.encode(pictures(2))
    monkeypatch.setattr(PatchCodec, "decode", lambda self, latents: decode(self, latents)[:, :1])
    with pytest.raises(TypeCheckError, match=r"return value\s+of v2flow\.tokenizer\.V2FlowTokenizer\.decode"):
        model.decode(ids)
