"""The experiment files of stage 2 are read by the real command line and built: small ones with toys, the reference on
the meta device."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from t2i_toys import tiny_llm, tiny_tokenizer
from t2i_training_toys import Toys, toy_tokenizer
from test_experiments import on_meta, printed_config
from transformers import AutoModelForCausalLM, LlamaConfig

from v2flow.cli_training import build_experiment
from v2flow.config import from_dict
from v2flow.t2i import build
from v2flow.t2i.config import TextToImageConfig
from v2flow.t2i.small_llm import PREFIXES
from v2flow.training.t2i_module import TextToImageModule
from v2flow.training.token_data_module import TokenDataModule

FOLDER = Path(__file__).parent.parent / "experiments"
EXPERIMENTS = sorted((FOLDER / "t2i").glob("*.yaml"))
SMALL = [path for path in EXPERIMENTS if not path.stem.startswith("reference")]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def test_all_are_here() -> None:
    assert {path.stem for path in EXPERIMENTS} == {
        "openmoji-32-gemma270m",
        "shapes-32",
        "shapes-32-gemma270m",
        "reference-llama2-7b",
    }


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_file_is_complete(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It parses as it stands, keeps its runs apart, and its last step is one that a checkpoint follows."""
    config = printed_config(path, capsys)
    trainer, model, data = config["trainer"], config["model"]["init_args"], config["data"]
    assert trainer["logger"]["init_args"]["name"] == path.stem
    assert trainer["logger"]["init_args"]["save_dir"] == "checkpoints/t2i", (
        "not among the runs of a tokenizer"
    )
    assert trainer["max_steps"] > 0 and trainer["max_steps"] % trainer["val_check_interval"] == 0
    assert model["optimizer"]["total_steps"] == trainer["max_steps"]
    assert model["seed"] == model["text_to_image"]["seed"] == data["seed"] == config["seed_everything"]
    assert all(data[split] for split in ("train", "val", "test"))
    global_batch = data["batch_size"] * (1 if trainer["devices"] == 1 else 8 * trainer["num_nodes"])
    assert data["length_window"] % (8 * global_batch) == 0
    callbacks = [callback["class_path"].rsplit(".", 1)[1] for callback in trainer["callbacks"]]
    assert {"ModelCheckpoint", "RunProgressBar"} <= set(callbacks)


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_its_tokenizer_is_an_experiment_of_ours(path: Path) -> None:
    """`make train-t2i` finds its name, its pictures and the folder of its token shards in these lines."""
    text = path.read_text()
    (name,) = re.findall(r"^ *tokenizer: checkpoints/tokenizers/([^ ]*)", text, re.MULTILINE)
    tokenizer = yaml.safe_load((FOLDER / "tokenizer" / f"{name}.yaml").read_text())
    assert re.fullmatch(r"data/\w+/train-\*\.tar", tokenizer["data"]["train"])
    data = yaml.safe_load(text)["data"]
    for split in ("train", "val", "test"):
        assert data[split] == f"data/tokens/{name}/{split}-*.tar"
    assert tokenizer["model"]["init_args"]["tokenizer"]["vocabulary"]["source"] == "gemma3-270m"


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_experiment_is_built(path: Path, toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small tokenizer, its token shards, and a small LLM of Gemma's kind in place of Gemma; GPT-2 as it is."""
    asked: dict[str, Any] = {}

    def load(source: str, **options: Any) -> tuple[Any, Any]:
        asked.update(options, source=source)
        words = tiny_tokenizer()
        return tiny_llm("gemma3", len(words)), words

    text_to_image = yaml.safe_load(path.read_text())["model"]["init_args"]["text_to_image"]
    from_scratch = text_to_image["llm"].startswith(PREFIXES)
    if not from_scratch:
        monkeypatch.setattr(build, "load_language_model", load)
    folder = tmp_path / "tokenizer"
    toy_tokenizer(dim=32).save_pretrained(folder)
    text = "--model.init_args.text_to_image"
    options = [f"{text}.train_layers=1", f"{text}.pictures={toys.pictures}"]
    data = [f"--data.{split}={toys.shards(split)}" for split in ("train", "val", "test")]
    data.append("--data.batch_size=8")  # of 24 toys
    module, datamodule = build_experiment(
        ["--config", str(path), f"--model.init_args.text_to_image.tokenizer={folder}", *options, *data]
    )
    assert isinstance(module, TextToImageModule) and isinstance(datamodule, TokenDataModule)
    assert from_scratch or asked["source"] == "gemma3-270m"
    assert module.model.tokens.num_visual == 32
    batch = next(iter(datamodule.train_dataloader()))
    loss = module.losses(batch["caption"], batch["ids"], torch.Generator().manual_seed(0))["loss"]
    assert torch.isfinite(loss)
    loss.backward()


def test_reference_is_the_papers_size(capsys: pytest.CaptureFixture[str]) -> None:
    """LLaMA-2-7B with 16,384 visual tokens, built on the meta device: the paper's shapes without weights or memory."""
    options = printed_config(FOLDER / "t2i" / "reference-llama2-7b.yaml", capsys)
    config = from_dict(TextToImageConfig, options["model"]["init_args"]["text_to_image"])
    tokenizer = on_meta(FOLDER / "tokenizer" / "reference-512.yaml", capsys, 4096)
    llama = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    words = tiny_tokenizer()
    words.add_tokens([f"word{i}" for i in range(32000 - len(words))])
    with torch.device("meta"):
        model = build.assemble(config, tokenizer, AutoModelForCausalLM.from_config(llama), words)
    assert model.num_tokens == 256 and model.tokens.boi == 32000
    assert tuple(model.rows.input.shape) == (16386, 4096) and model.rows.output is not None
    assert model.llm.get_input_embeddings().weight.shape == (32000 + 16386, 4096)
    assert all(parameter.is_meta for parameter in model.llm.parameters())
    body = sum(p.numel() for p in model.llm.parameters() if p.requires_grad)
    assert body == 6_476_271_616, "LLaMA-2-7B's 6,738,415,616 without table and head"
    assert options["trainer"]["strategy"] == "fsdp2"
