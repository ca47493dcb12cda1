"""Exported folders: what they hold, loading them, and what is refused in one line."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from core_toys import pictures, small_config
from hub_toys import stand_in_for_the_hub, tree
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from v2flow.config import CodecConfig, VelocityConfig, VocabularyConfig, from_dict
from v2flow.errors import V2FlowError
from v2flow.hub import CONFIG, VOCABULARY, WEIGHTS, load_weights
from v2flow.model_card import GEMMA_NOTICE, tokenizer_card, with_record
from v2flow.tokenizer import V2FlowTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> V2FlowTokenizer:
    torch.manual_seed(0)
    model = V2FlowTokenizer(small_config())
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


@pytest.fixture
def folder(tokenizer: V2FlowTokenizer, tmp_path: Path) -> Path:
    tokenizer.save_pretrained(tmp_path / "exported")
    return tmp_path / "exported"


def edit(folder: Path, change) -> None:
    document = json.loads((folder / CONFIG).read_text())
    change(document)
    (folder / CONFIG).write_text(json.dumps(document))


def refused(folder: Path, *parts: str) -> None:
    """Loading is refused in one line that names all of `parts`."""
    with pytest.raises(V2FlowError) as error:
        V2FlowTokenizer.from_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_round_trip(tokenizer: V2FlowTokenizer, folder: Path) -> None:
    again = V2FlowTokenizer.from_pretrained(folder)
    assert again.config == tokenizer.config
    assert not again.training
    assert again.words == tokenizer.words and again.vocabulary_sha256 == tokenizer.vocabulary_sha256
    images = pictures(4)
    ids = tokenizer.encode(images)
    assert torch.equal(again.encode(images), ids)
    options = {"steps": 2, "iterations": 2}
    a, b = (m.decode(ids, torch.Generator().manual_seed(0), **options) for m in (tokenizer, again))
    assert torch.equal(a, b)


def test_a_second_export_is_the_same(folder: Path, tmp_path: Path) -> None:
    V2FlowTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for name in (CONFIG, VOCABULARY, WEIGHTS):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_the_table_is_stored_once(folder: Path) -> None:
    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes |= {(path.name, name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert [key for key, shape in shapes.items() if shape == (60, 16)] == [(VOCABULARY, "table")]


def test_without_the_stored_rows_the_same_source_serves(tokenizer: V2FlowTokenizer, folder: Path) -> None:
    (folder / VOCABULARY).unlink()
    again = V2FlowTokenizer.from_pretrained(folder)
    assert torch.equal(again.encode(pictures(4)), tokenizer.encode(pictures(4)))


def test_another_vocabulary_is_refused(folder: Path) -> None:
    (folder / VOCABULARY).unlink()
    edit(folder, lambda d: d["tokenizer"]["vocabulary"].update(seed=1))
    refused(folder, str(folder), "trained on the LLM vocabulary")


def test_tampered_rows_are_refused(folder: Path) -> None:
    with safe_open(folder / VOCABULARY, framework="pt") as file:
        table, metadata = file.get_tensor("table"), file.metadata()
    save_file({"table": table + 1e-6}, folder / VOCABULARY, metadata=metadata)
    refused(folder, "trained on the LLM vocabulary")


def test_another_codebook_size_is_refused(folder: Path) -> None:
    edit(folder, lambda d: d["tokenizer"]["visual_vocabulary"].update(size=48))
    refused(folder, WEIGHTS, "visual_vocabulary.codes", "[32, 16]", "[48, 16]")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["decoder.mask_token"]
    save_file(weights, folder / WEIGHTS)
    refused(folder, WEIGHTS, "missing", "decoder.mask_token")


def test_a_foreign_tensor_is_named(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS) | {"surprise": torch.zeros(1)}, folder / WEIGHTS)
    refused(folder, WEIGHTS, "unexpected", "surprise")


@pytest.mark.parametrize("name", [WEIGHTS, VOCABULARY])
def test_a_file_cut_short_is_refused(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    refused(folder, name)


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refused(folder, WEIGHTS)


def test_an_unknown_option_is_named(folder: Path) -> None:
    edit(folder, lambda d: d["tokenizer"]["decoder"].update(widht=3))
    refused(folder, CONFIG, "decoder", "'widht'")


def test_a_bad_value_is_refused(folder: Path) -> None:
    edit(folder, lambda d: d["tokenizer"]["decoder"].update(heads=5))
    refused(folder, "decoder.heads")


def test_another_model_s_folder_is_refused(folder: Path) -> None:
    edit(folder, lambda d: d.update(model_type="llama"))
    refused(folder, CONFIG, "v2flow-tokenizer")


def test_a_config_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / CONFIG).write_text("{")
    refused(folder, CONFIG, "not JSON")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, CONFIG, "not found")


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere" / "at all", "nowhere")


def test_an_unreachable_repository_is_refused_offline() -> None:
    with pytest.raises(V2FlowError, match="nobody/nothing") as error:
        V2FlowTokenizer.from_pretrained("nobody/nothing", local_files_only=True)
    assert "\n" not in str(error.value)


def test_a_frozen_codec_is_named_not_stored(tmp_path: Path) -> None:
    """A real (tiny) AutoencoderKL: its weights stay where they are, an export names the path."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    autoencoder.save_pretrained(tmp_path / "kl")
    config = small_config(
        codec=CodecConfig(kind="kl", path=str(tmp_path / "kl"), scale=0.5),
        velocity=VelocityConfig(width=16, depth=1, heads=2, fine_patch=1),
    )
    model = V2FlowTokenizer(config).train()
    model.losses(pictures(2)).total.backward()
    frozen = model.codec.autoencoder
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert not any(part.training for part in frozen.modules())
    model.save_pretrained(tmp_path / "exported")
    assert not any(name.startswith("codec") for name in load_file(tmp_path / "exported" / WEIGHTS))
    again = V2FlowTokenizer.from_pretrained(tmp_path / "exported")
    ids = model.encode(pictures(2))
    assert torch.equal(again.encode(pictures(2)), ids)
    assert model.decode(ids).shape == (2, 3, 16, 16)
    torch.testing.assert_close(
        again.decode(ids, torch.Generator().manual_seed(0)),
        model.decode(ids, torch.Generator().manual_seed(0)),
    )
    with torch.no_grad():
        next(autoencoder.parameters()).add_(1.0)
    autoencoder.save_pretrained(tmp_path / "kl")
    with pytest.raises(V2FlowError, match="trained with the codec .* found .* at codec.path"):
        V2FlowTokenizer.from_pretrained(tmp_path / "exported")


def test_the_card_names_whose_terms_hold(tokenizer: V2FlowTokenizer, folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "other"
    assert "derive from no pretrained model" in card and GEMMA_NOTICE not in card
    for source, licence, said in (
        ("wordllama", "other", "derive from wordllama, whose terms"),
        ("gemma3-270m", "gemma", GEMMA_NOTICE),
    ):
        config = replace(tokenizer.config, vocabulary=VocabularyConfig(source=source))
        model = copy.copy(tokenizer)
        model.config = config
        card = tokenizer_card(model)
        assert yaml.safe_load(card.split("---")[1])["license"] == licence
        assert said in card and "no pretrained model" not in card


def test_push_to_hub_uploads_the_whole_folder(
    tokenizer: V2FlowTokenizer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card with its record of the training, and files that make the same tokenizer."""
    card = folder / "README.md"
    card.write_text(with_record(card.read_text(), "## Training\n\nTen steps.\n\n"))
    uploaded = stand_in_for_the_hub(monkeypatch, tmp_path / "hub")
    V2FlowTokenizer.from_pretrained(folder).push_to_hub("me/tokenizer")
    assert uploaded == ["me/tokenizer"]
    pushed = tmp_path / "hub" / "me" / "tokenizer"
    assert tree(pushed) == tree(folder) and set(tree(folder)) == {CONFIG, VOCABULARY, WEIGHTS, "README.md"}
    again = V2FlowTokenizer.from_pretrained(pushed)
    assert torch.equal(again.encode(pictures(4)), tokenizer.encode(pictures(4)))


def test_load_weights_is_strict_and_leaves_codecs_alone(tokenizer: V2FlowTokenizer) -> None:
    weights = {name: torch.full_like(value, 0.5) for name, value in tokenizer.state_dict().items()}
    model = V2FlowTokenizer(small_config())
    load_weights(model, weights, "here")
    assert all((value == 0.5).all() for value in model.state_dict().values())
    with pytest.raises(V2FlowError, match="here: missing tensor"):
        load_weights(model, {}, "here")


def test_from_dict_is_the_inverse_of_the_document(folder: Path, tokenizer: V2FlowTokenizer) -> None:
    document = json.loads((folder / CONFIG).read_text())["tokenizer"]
    assert from_dict(type(tokenizer.config), document) == tokenizer.config
    assert isinstance(from_dict(type(tokenizer.config), document).vocabulary, VocabularyConfig)
