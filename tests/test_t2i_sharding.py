"""FSDP2 on two CPU processes does what one process does, goes on exactly from a sharded checkpoint, and falls back."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rank_losses import fit, losses, rank_losses, validation_loss
from t2i_training_toys import Toys
from training_toys import experiment, write, write_shards

from v2flow.cli import main
from v2flow.errors import V2FlowError
from v2flow.t2i.checkpoint import load_text_to_image
from v2flow.t2i.config import TextToImageConfig
from v2flow.training.checkpoint_files import damage, previous_of, usable_checkpoint
from v2flow.training.checkpoint_folders import SEAL, folder_damage, remove, seal_folder, sums_of
from v2flow.training.optimizer import parameter_groups
from v2flow.training.t2i_module import TextToImageModule

# No draws, which differ between ranks: captions stay, and at all positions all words stand for text.
CONFIG = {"caption_dropout": 0.0, "full_share": 0.0, "sampled_words": 10**6}
TWO = ("--trainer.devices=2", "--data.batch_size=2", "--trainer.strategy=fsdp2")
FOLDERS = (
    "--trainer.devices=2", "--data.batch_size=2",
    "--trainer.strategy=v2flow.training.fsdp2.FSDP2Strategy", "--trainer.strategy.save_distributed_checkpoint=true",
)  # fmt: skip


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def last(folder: Path, version: int) -> Path:
    return folder / "run" / f"version_{version}" / "checkpoints" / "last.ckpt"


def weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a sharded checkpoint, optimiser's too, put together."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    kinds = FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in kinds.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    load(state, checkpoint_id=path, no_dist=True)
    return state


@pytest.mark.slow
def test_two_shards_learn_what_one_process_learns(toys: Toys, tmp_path: Path) -> None:
    file = toys.write(tmp_path, **CONFIG)
    module = TextToImageModule(TextToImageConfig(**toys.config(**CONFIG)))
    torch.save(module.state_dict(), tmp_path / "start.ckpt")
    few = ("--data.val_limit=3", "--data.eval_batch_size=4")  # of which the second rank has none
    fit(file, *few, *rank_losses(tmp_path))
    fit(file, *TWO, *few, *rank_losses(tmp_path))
    assert len(set(losses(tmp_path, 1))) == 4
    assert losses(tmp_path, 2) == pytest.approx(losses(tmp_path, 1), rel=1e-4)
    assert validation_loss(tmp_path, 2) == pytest.approx(validation_loss(tmp_path, 1), rel=1e-4)
    one, other = (torch.load(last(tmp_path, i), weights_only=True)["state_dict"] for i in range(2))
    assert set(one) == set(other)
    start = torch.load(tmp_path / "start.ckpt", weights_only=True)
    assert start.keys() == one.keys()
    for name in start:
        assert not torch.equal(one[name], start[name])
        assert torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-5), name
    assert load_text_to_image(last(tmp_path, 1)).num_tokens == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_sharded_checkpoint_is_resumed_exactly_and_falls_back(toys: Toys, tmp_path: Path) -> None:
    """The last checkpoint, of step 4, is damaged: the training goes on from the one before, and ends in the same, but
    for rounding also on one device in place of two."""
    file = toys.write(tmp_path, **CONFIG)
    fit(file, *FOLDERS, *rank_losses(tmp_path))
    first = last(tmp_path, 0)
    assert {path.name for path in first.iterdir()} >= {SEAL, ".metadata", "meta.pt"}
    assert not list(first.parent.glob(".*.part"))
    expected = weights(first)
    learnt = load_text_to_image(first)
    assert torch.equal(learnt.rows.input, expected["state_dict.model.rows.input"])
    assert main(["export", str(first), str(tmp_path / "exported")]) == 0
    shard = next(first.glob("__1_*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    said = fit(file, *FOLDERS, "--ckpt_path=last")
    assert f"the checksum of its {shard.name} is wrong; taking the one before it" in said
    resumed = last(tmp_path, 1)
    assert torch.load(resumed / "meta.pt", weights_only=True)["global_step"] == 4
    found = weights(resumed)
    assert found.keys() == expected.keys() and any(name.startswith("optimizer_0") for name in found)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    one = ("--trainer.devices=1", "--data.batch_size=4", f"--ckpt_path={previous_of(first)}")
    fit(file, *FOLDERS, *one, *rank_losses(tmp_path))
    assert losses(tmp_path, 1) == pytest.approx(losses(tmp_path, 2)[2:], rel=1e-4)
    alone = weights(last(tmp_path, 2))
    assert alone.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(alone[name], expected[name], rtol=1e-3, atol=1e-5), name


def sealed(path: Path, content: bytes) -> Path:
    part = path.with_name(".part")
    part.mkdir()
    for name in (".metadata", "meta.pt", "__0_0.distcp", "__1_0.distcp"):
        (part / name).write_bytes(content)
    seal_folder(part, path, sums_of(part, 0) | sums_of(part, 1))
    return path


def test_a_folder_keeps_the_one_before(tmp_path: Path) -> None:
    path = sealed(tmp_path / "last.ckpt", b"one")
    assert damage(path) is None and not previous_of(path).exists()
    sealed(path, b"two")
    assert (path / "meta.pt").read_bytes() == b"two" and (
        previous_of(path) / "meta.pt"
    ).read_bytes() == b"one"
    # Killed between two renames: only the previous one is there.
    aside = path.rename(tmp_path / "aside")
    assert usable_checkpoint(path) == previous_of(path)
    aside.rename(path)
    (path / "__1_0.distcp").write_bytes(b"tw")
    assert damage(path) == "its __1_0.distcp is cut short" and usable_checkpoint(path) == previous_of(path)
    sealed(path, b"new")
    assert (previous_of(path) / "meta.pt").read_bytes() == b"one", "a damaged one replaces none"
    (path / "__1_0.distcp").write_bytes(b"odd")
    assert damage(path) is None, "left to the ranks"
    assert [folder_damage(path, rank=rank, ranks=2) is None for rank in range(2)].count(False) == 1
    (path / "meta.pt").write_bytes(b"odd")
    assert damage(path) == "the checksum of its meta.pt is wrong"
    remove(previous_of(path))
    with pytest.raises(V2FlowError, match="is it cut short or foreign"):
        usable_checkpoint(path)


LIGHTNINGS_OWN = (
    "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy", "--trainer.strategy.data_parallel_size=1",
    "--trainer.strategy.tensor_parallel_size=1",
)  # fmt: skip


@pytest.mark.parametrize("strategy", [["--trainer.strategy=fsdp2"], LIGHTNINGS_OWN], ids=["fsdp2", "plain"])
def test_what_cannot_be_sharded(
    strategy: Sequence[str],
    toys: Toys,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """Averages of shards, and tokenizers: one line each, also under Lightning's own strategy."""
    request.addfinalizer(torch.distributed.destroy_process_group)
    file = toys.write(tmp_path)
    for average in ("v2flow.training.ema.EMACallback", "lightning.pytorch.callbacks.EMAWeightAveraging"):
        assert main(["fit", "--config", file, *strategy, f"--trainer.callbacks+={average}"]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "option" in line]
        assert f"option trainer.callbacks: {average.rpartition('.')[2]} cannot average weights" in line
    tokenizer = write(experiment(write_shards(tmp_path), tmp_path), tmp_path / "tokenizer.yaml")
    assert main(["fit", "--config", tokenizer, *strategy]) == 2
    assert "option trainer.strategy: TokenizerModule is not sharded" in capsys.readouterr().err


def test_no_group_of_parameters_is_empty(toys: Toys) -> None:
    """A sharded checkpoint with an empty one cannot be read; GPT-2's matrices decay as other LLMs' do."""
    module = TextToImageModule(TextToImageConfig(**toys.config()))
    decayed, plain = parameter_groups(module, 0.1)
    assert all(parameter.ndim == 2 for parameter in decayed["params"]) and len(decayed["params"]) >= 4
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    module.requires_grad_(False)
    module.model.rows.requires_grad_(True)
    (only,) = parameter_groups(module, 0.1)
    assert only["weight_decay"] == 0.0
