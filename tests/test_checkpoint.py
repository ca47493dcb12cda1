"""Checkpoints: what they hold, loading and resuming, and files that are refused."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from core_toys import pictures, small_config
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from v2flow.config import VisualVocabularyConfig, VocabularyConfig
from v2flow.errors import V2FlowError
from v2flow.hub import check_sizes
from v2flow.tokenizer import V2FlowTokenizer
from v2flow.training.checkpoint import initialise_from, load_model, read_checkpoint
from v2flow.training.module import _first_difference
from v2flow.training.optimizer import OptimizerConfig
from v2flow.training.tokenizer_module import TokenizerModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended"),
]
MODES = {"fast": {"steps": 1}}


def make_module(**parts: Any) -> TokenizerModule:
    return TokenizerModule(
        small_config(**parts), OptimizerConfig(total_steps=4, warmup_steps=1), decode_modes=MODES, seed=1
    )


def fit(module: TokenizerModule, steps: int, folder: Path, resume: Path | None = None) -> Trainer:
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    # Every batch is the same: a plain DataLoader starts anew on resume (the data module's own position is tested
    # with it), the draws of each step do not.
    loader = DataLoader([{"image": image} for image in pictures(4)] * 4, batch_size=4)
    trainer.fit(module, loader, ckpt_path=None if resume is None else str(resume))
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenizerModule, Path]:
    """A module after two of four steps and its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    module = make_module()
    fit(module, 2, folder).save_checkpoint(folder / "half.ckpt")
    module.model.eval()
    return module, folder / "half.ckpt"


def edited(path: Path, folder: Path, change: Any) -> Path:
    """A copy of the checkpoint with `change` applied to its contents."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / "edited.ckpt")
    return folder / "edited.ckpt"


def refused(call: Any, *parts: object) -> None:
    with pytest.raises(V2FlowError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(plain(k) and plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)


def test_contents(trained: tuple[TokenizerModule, Path]) -> None:
    module, path = trained
    checkpoint = torch.load(path, weights_only=True)
    assert plain(checkpoint["v2flow"]) and plain(checkpoint.get("hyper_parameters", {}))
    assert checkpoint["v2flow"]["model"] == "V2FlowTokenizer"
    assert checkpoint["v2flow"]["vocabulary_sha256"] == module.model.vocabulary_sha256
    assert checkpoint["v2flow"]["config"]["visual_vocabulary"]["size"] == 32
    assert checkpoint["v2flow"]["decode_modes"] == MODES
    assert set(checkpoint["state_dict"]) == {f"model.{name}" for name in module.model.state_dict()}


def test_the_frozen_table_is_not_stored(trained: tuple[TokenizerModule, Path]) -> None:
    module, path = trained

    def tensors(value: Any) -> list[torch.Tensor]:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            return [t for v in value for t in tensors(v)]
        return [value] if isinstance(value, torch.Tensor) else []

    found = tensors(torch.load(path, weights_only=True))
    assert len(found) > 50
    assert not any(t.shape == module.model.vocabulary.table.shape for t in found)


def test_round_trip(trained: tuple[TokenizerModule, Path]) -> None:
    module, path = trained
    model, info = load_model(path)
    assert info["model"] == "V2FlowTokenizer" and info["step"] == 2 and info["decode_modes"] == MODES
    assert not model.training
    ids = module.model.encode(pictures(3))
    assert torch.equal(model.encode(pictures(3)), ids)
    a, b = (m.decode(ids, torch.Generator().manual_seed(0), steps=2) for m in (model, module.model))
    assert torch.equal(a, b)


def test_averaged_and_raw_weights(trained: tuple[TokenizerModule, Path], tmp_path: Path) -> None:
    """A weight-averaging callback leaves the average in `state_dict` and the trained weights beside it."""
    module, path = trained

    def add_raw(checkpoint: dict[str, Any]) -> None:
        checkpoint["current_model_state"] = {
            k: torch.zeros_like(v) for k, v in checkpoint["state_dict"].items()
        }

    both = edited(path, tmp_path, add_raw)
    raw, _ = load_model(both, weights="raw")
    assert all((p == 0).all() for p in raw.parameters())
    averaged, _ = load_model(both, weights="ema")
    assert torch.equal(averaged.decoder.project.weight, module.model.decoder.project.weight)
    # Without averaging the two are the same.
    alone, _ = load_model(path, weights="raw")
    assert torch.equal(alone.decoder.project.weight, module.model.decoder.project.weight)


def test_exported_folders_load_as_well(trained: tuple[TokenizerModule, Path], tmp_path: Path) -> None:
    module, _ = trained
    module.model.save_pretrained(tmp_path)
    model, info = load_model(tmp_path)
    assert info["model"] == "V2FlowTokenizer"
    assert torch.equal(model.encode(pictures(3)), module.model.encode(pictures(3)))


# --- resuming ---------------------------------------------------------------------------------------------------


def test_half_and_half_is_the_whole(trained: tuple[TokenizerModule, Path], tmp_path: Path) -> None:
    """Two steps, a checkpoint, two more: bit for bit the weights of four in one go."""
    whole, rest = make_module(), make_module()
    fit(whole, 4, tmp_path)
    trainer = fit(rest, 4, tmp_path, resume=trained[1])
    assert trainer.global_step == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(rest.model.state_dict()[name], value), name
    assert not torch.equal(whole.model.decoder.project.weight, trained[0].model.decoder.project.weight)


def test_resuming_with_another_codebook_is_refused(
    trained: tuple[TokenizerModule, Path], tmp_path: Path
) -> None:
    other = make_module(visual_vocabulary=VisualVocabularyConfig(size=48))
    refused(lambda: fit(other, 4, tmp_path, resume=trained[1]), "visual_vocabulary.size", 32, 48)


def test_resuming_with_another_vocabulary_is_refused(
    trained: tuple[TokenizerModule, Path], tmp_path: Path
) -> None:
    other = make_module(vocabulary=VocabularyConfig(source="random", size=60, dim=16, seed=1))
    refused(lambda: fit(other, 4, tmp_path, resume=trained[1]), "vocabulary", "0", "1")


def test_resuming_with_other_rows_under_the_same_name_is_refused(
    trained: tuple[TokenizerModule, Path], tmp_path: Path
) -> None:
    """The same options, but the LLM package brought other rows."""
    path = edited(trained[1], tmp_path, lambda c: c["v2flow"].update(vocabulary_sha256="f" * 64))
    refused(lambda: fit(make_module(), 4, tmp_path, resume=path), "vocabulary_sha256", "f" * 64)


def test_resuming_from_a_foreign_checkpoint_is_refused(
    trained: tuple[TokenizerModule, Path], tmp_path: Path
) -> None:
    path = edited(trained[1], tmp_path, lambda c: c.pop("v2flow"))
    refused(lambda: fit(make_module(), 4, tmp_path, resume=path), "v2flow")


# --- starting from weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("exported", [False, True])
def test_initialise_from(trained: tuple[TokenizerModule, Path], tmp_path: Path, exported: bool) -> None:
    module, path = trained
    if exported:
        module.model.save_pretrained(tmp_path)
        path = tmp_path
    model = V2FlowTokenizer(small_config())
    assert not torch.equal(model.decoder.project.weight, module.model.decoder.project.weight)
    initialise_from(model, path)
    for name, value in module.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_initialise_from_another_configuration_is_refused(trained: tuple[TokenizerModule, Path]) -> None:
    model = V2FlowTokenizer(small_config(visual_vocabulary=VisualVocabularyConfig(size=48)))
    before = model.decoder.project.weight.clone()
    refused(
        lambda: initialise_from(model, trained[1]),
        trained[1],
        "visual_vocabulary.codes",
        "[32, 16]",
        "[48, 16]",
    )
    assert torch.equal(model.decoder.project.weight, before), "half of the weights were loaded"


def test_initialise_from_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    refused(lambda: initialise_from(V2FlowTokenizer(small_config()), tmp_path), "config.json", "not found")


@pytest.mark.parametrize("exported", [False, True])
def test_initialise_from_another_vocabulary_is_refused(
    trained: tuple[TokenizerModule, Path], tmp_path: Path, exported: bool
) -> None:
    """No shape of the weights tells two tables of equal width apart."""
    module, path = trained
    if exported:
        module.model.save_pretrained(tmp_path / "exported")
        path = tmp_path / "exported"
    config = replace(module.model.config, vocabulary=replace(module.model.config.vocabulary, seed=9))
    refused(lambda: initialise_from(V2FlowTokenizer(config), path), "trained on the LLM vocabulary", "found")


# --- files that are refused -------------------------------------------------------------------------------------


class Payload:
    """Unpickling this would run a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save(
        {"v2flow": {"model": "V2FlowTokenizer"}, "state_dict": {}, "x": Payload(tmp_path / "ran")}, path
    )
    refused(lambda: load_model(path), path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "the payload is real"


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_checkpoint_cut_short_is_refused(
    trained: tuple[TokenizerModule, Path], tmp_path: Path, keep: float
) -> None:
    data = trained[1].read_bytes()
    path = tmp_path / "cut.ckpt"
    path.write_bytes(data[: int(len(data) * keep)])
    refused(lambda: load_model(path), path, "not a readable checkpoint")


def test_other_files_are_refused(tmp_path: Path) -> None:
    refused(lambda: load_model(tmp_path / "none.ckpt"), "none.ckpt", "no such checkpoint")
    (tmp_path / "text.ckpt").write_text("hello\nworld\n")
    refused(lambda: read_checkpoint(tmp_path / "text.ckpt"), "text.ckpt", "not a readable checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    refused(lambda: read_checkpoint(tmp_path / "foreign.ckpt"), "foreign.ckpt", "not a v2flow checkpoint")
    torch.save([1, 2], tmp_path / "list.ckpt")
    refused(lambda: read_checkpoint(tmp_path / "list.ckpt"), "list.ckpt", "not a v2flow checkpoint")
    refused(lambda: load_model(tmp_path), "config.json", "not found")


def test_an_unknown_model_is_refused(trained: tuple[TokenizerModule, Path], tmp_path: Path) -> None:
    path = edited(trained[1], tmp_path, lambda c: c["v2flow"].update(model="Diffuser"))
    refused(lambda: load_model(path), path, "Diffuser")


def test_a_config_of_another_codebook_size_is_refused(
    trained: tuple[TokenizerModule, Path], tmp_path: Path
) -> None:
    path = edited(trained[1], tmp_path, lambda c: c["v2flow"]["config"]["visual_vocabulary"].update(size=48))
    refused(lambda: load_model(path), path, "visual_vocabulary.codes", "[32, 16]", "[48, 16]")


def test_a_config_of_another_vocabulary_is_refused(
    trained: tuple[TokenizerModule, Path], tmp_path: Path
) -> None:
    path = edited(trained[1], tmp_path, lambda c: c["v2flow"]["config"]["vocabulary"].update(seed=9))
    refused(lambda: load_model(path), path, "trained on the LLM vocabulary")


def test_an_unknown_option_is_named(trained: tuple[TokenizerModule, Path], tmp_path: Path) -> None:
    path = edited(trained[1], tmp_path, lambda c: c["v2flow"]["config"]["decoder"].update(widht=3))
    refused(lambda: load_model(path), path, "widht")


def test_options_that_do_not_touch_the_weights_may_change_at_resume() -> None:
    saved = {"config": {"codec": {"path": "a", "scale": 1.0}, "decoder": {"checkpointing": False}}}
    moved = {"config": {"codec": {"path": "b", "scale": 1.0}, "decoder": {"checkpointing": True}}}
    scaled = {"config": {"codec": {"path": "b", "scale": 2.0}, "decoder": {"checkpointing": True}}}
    free = TokenizerModule.free_options
    assert _first_difference("", saved, moved, free) is None
    assert _first_difference("", saved, scaled, free) == (
        "config.codec.scale is 1.0 in the checkpoint and 2.0 in this experiment"
    )


@pytest.mark.parametrize("quantizer", ["vq", "rvq", "simvq", "fsq", "lfq", "bsq"])
def test_sizes_of_every_baseline_are_compared_before_it_is_built(quantizer: str) -> None:
    from v2flow.baselines.titok import TiTokAutoencoder, TiTokConfig

    config = TiTokConfig(
        image_size=16, quantizer=quantizer, codebook_size=64, code_dim=8, num_tokens=6, width=16, heads=2,
        encoder_depth=1, decoder_depth=1,
    )  # fmt: skip
    weights = TiTokAutoencoder(config).state_dict()
    check_sizes(TiTokAutoencoder, config, None, weights, "x.ckpt")
    config.width = 1 << 20  # a block's matrices would take terabytes
    refused(lambda: check_sizes(TiTokAutoencoder, config, None, weights, "x.ckpt"), "x.ckpt", "has shape")
    with pytest.raises(V2FlowError, match="option codebook_size: expected 1 to"):
        TiTokConfig(quantizer=quantizer, codebook_size=1 << 40)
