"""Training of stage 2: what learns and what stays, what a checkpoint holds, resuming, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from t2i_toys import tiny_llm, tiny_tokenizer
from t2i_training_toys import Toys, toy_tokenizer, write_pictures
from test_cli_training import error_line

from v2flow.cli import main
from v2flow.data.tokens import build_tokens
from v2flow.errors import V2FlowError
from v2flow.t2i.build import assemble, build_text_to_image
from v2flow.t2i.checkpoint import load_text_to_image
from v2flow.t2i.config import LoraOptions, TextToImageConfig
from v2flow.t2i.image_loss import run
from v2flow.t2i.sequences import join
from v2flow.t2i.text_loss import caption_loss, text_perplexity
from v2flow.t2i.text_to_image import V2FlowForTextToImage
from v2flow.training.frozen import trained_names
from v2flow.training.optimizer import OptimizerConfig
from v2flow.training.t2i_module import TextToImageModule


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def make_module(
    toys: Toys, steps: int = 100, lr: float = 1e-3, seed: int = 0, **options: Any
) -> TextToImageModule:
    optimizer = OptimizerConfig(lr=lr, total_steps=steps, warmup_steps=1)
    return TextToImageModule(TextToImageConfig(**toys.config(**options)), optimizer, seed)


def toy_model(family: str = "gemma3", **options: Any) -> V2FlowForTextToImage:
    words = tiny_tokenizer()
    config = TextToImageConfig(tokenizer="unused", max_caption=16, rows="projection", **options)
    return assemble(config, toy_tokenizer(dim=16), tiny_llm(family, len(words)), words)


def batch_of(model: V2FlowForTextToImage, count: int = 4) -> tuple[list[str | None], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.tokens.num_visual, (count, model.num_tokens), generator=generator)
    return ["a red strawberry", "two green apples", "the moon above the sea", None][:count], ids


def step(
    module: TextToImageModule, optimizer: torch.optim.Optimizer, batch: Any, generator: torch.Generator
) -> float:
    terms = module.losses(*batch, generator)
    optimizer.zero_grad()
    terms["loss"].backward()
    optimizer.step()
    return terms["visual"].item()


def test_one_batch_is_learned_by_heart(toys: Toys) -> None:
    module = make_module(toys, lr=3e-3, steps=80)
    batch = batch_of(module.model)
    optimizer = module.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    generator = torch.Generator().manual_seed(0)
    found = [step(module, optimizer, batch, generator) for _ in range(80)]
    assert found[0] > 2.5 and found[-1] < 0.2
    assert torch.equal(
        module.model.llm.transformer.wte.weight, make_module(toys).model.llm.transformer.wte.weight
    )


@pytest.mark.parametrize(("mode", "family"), [
    ("full", "gemma3"), ("full", "gpt2"), ("rows", "llama"), ("lora", "gemma3"), ("lora", "gpt2"),
    ("last_layers", "gemma3"), ("last_layers", "llama"), ("last_layers", "phi"), ("last_layers", "gpt2"),
])  # fmt: skip
def test_modes_train_what_they_say(family: str, mode: Any) -> None:
    model = toy_model(family, train=mode, train_layers=1, lora=LoraOptions(rank=2))
    names = trained_names(model)
    rows = {name for name in names if name.startswith("rows.")}
    assert rows == {f"rows.{name}" for name, _ in model.rows.named_parameters()}
    others = names - rows
    last = ".h.1." if family == "gpt2" else ".layers.1."
    if mode == "rows":
        assert not others
    elif mode == "lora":
        assert others and all("lora_" in name for name in others)
        adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in others}
        assert adapted >= ({"c_attn", "c_fc"} if family == "gpt2" else {"q_proj", "v_proj"})
    elif mode == "last_layers":
        blocks = {name for name in others if last in name}
        assert blocks and others - blocks
        assert all("norm" in name or "ln_f" in name for name in others - blocks)
        every = {name for name, _ in model.named_parameters() if last in name}
        assert blocks == every
    else:
        frozen = {n for n, _ in model.llm.named_parameters()} - {n.removeprefix("llm.") for n in others}
        assert frozen and all("embed_tokens" in n or "wte" in n or "lm_head" in n for n in frozen)
    tables = {id(p) for part in (model.llm.get_input_embeddings(), model.llm.get_output_embeddings())
              for p in part.parameters()}  # fmt: skip
    assert not tables & {id(p) for p in model.parameters() if p.requires_grad}
    assert not any(name.startswith("tokenizer.") for name in names)
    loss = model.loss(*batch_of(model), full_share=0.5).total
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in names), name


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_frozen_rows_keep_every_bit(mode: Any) -> None:
    model = toy_model("llama", train=mode)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1
    )
    for _ in range(2):
        model.loss(*batch_of(model), full_share=0.5).total.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_too_many_blocks_are_refused() -> None:
    with pytest.raises(V2FlowError, match="train_layers: expected at most 2"):
        toy_model(train="last_layers", train_layers=3)


def test_the_whole_vocabulary_every_so_often_has_the_share_that_was_asked_for(toys: Toys) -> None:
    """Every fourth step has it, at four times the positions and with four times the weight."""
    module = make_module(toys, caption_dropout=0.0, full_share=0.125, full_every=4)
    batch = batch_of(module.model)

    def terms(step: int | None) -> dict[str, torch.Tensor]:
        return module.losses(*batch, torch.Generator().manual_seed(0), step)

    for step in (1, 2, 3, 5):
        assert "text_mass" not in terms(step) and torch.equal(terms(step)["loss"], terms(1)["loss"])
    half = module.model.loss(*batch, 0.5, 0.0, torch.Generator().manual_seed(0))
    added = half.total - terms(1)["loss"]
    assert added > 0
    for step in (0, 4):
        assert torch.allclose(terms(step)["loss"] - terms(1)["loss"], 4 * added)
    eighth = module.model.loss(*batch, 0.125, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(terms(None)["text_mass"], eighth.text_mass)
    assert module.config.step_kinds() == {"whole vocabulary": (0.0, 0.25), "visual columns": (0.25, 1.0)}
    sampled = make_module(toys, caption_dropout=0.0, full_share=0.125, full_every=4, sampled_words=16)
    assert [sampled.config.full_at(step) for step in (0, 1, 4)] == [(0.5, 4), (0.0, 1), (0.5, 4)]
    costs = [sampled.losses(*batch, torch.Generator().manual_seed(0), step) for step in (0, 1, None)]
    assert costs[0]["loss"] > costs[0]["visual"] and costs[1]["loss"] > costs[1]["visual"]
    assert "text_mass" not in costs[1] and torch.equal(costs[2]["text_mass"], eighth.text_mass)
    with pytest.raises(V2FlowError, match="full_every: expected at most 1 / full_share = 8, found 9"):
        TextToImageConfig(tokenizer="unused", full_every=9)


def test_a_share_of_the_captions_is_dropped(toys: Toys) -> None:
    module = make_module(toys, caption_dropout=0.25)
    captions = ["one red thing"] * 4000
    generator = torch.Generator().manual_seed(0)
    dropped = sum(caption is None for caption in module.drop_captions(captions, generator))
    assert abs(dropped - 1000) < 5 * math.sqrt(4000 * 0.25 * 0.75)
    assert module.drop_captions(captions[:8], torch.Generator().manual_seed(3)) == module.drop_captions(
        captions[:8], torch.Generator().manual_seed(3)
    )
    assert make_module(toys, caption_dropout=0.0).drop_captions(["a"], generator) == ["a"]


def test_dropout_of_the_llm_is_drawn_by_the_steps_key(toys: Toys) -> None:
    module = make_module(toys, train="lora", lora=LoraOptions(dropout=0.5))
    torch.nn.init.ones_(next(p for n, p in module.named_parameters() if "lora_B" in n))
    batch = batch_of(module.model)
    before = torch.get_rng_state()
    losses = [
        module.losses(*batch, torch.Generator().manual_seed(seed))["visual"].item() for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_of_padding_alone_counts_for_nothing(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a rank has it whose share of the validation samples is empty."""
    module = make_module(toys)
    logged: list[tuple[dict[str, torch.Tensor], int]] = []
    monkeypatch.setattr(module, "log_losses", lambda terms, stage, count: logged.append((terms, count)))
    captions, ids = batch_of(module.model, 3)
    for valid in ([True, True, False], [False] * 3):
        module.validation_step({"caption": captions, "ids": ids, "valid": torch.tensor(valid)}, 0)
    assert [count for _, count in logged] == [2, 0]
    assert logged[1][0].keys() == logged[0][0].keys()  # every rank logs the same names


def test_caption_loss_is_that_of_the_plain_llm() -> None:
    model = toy_model("gemma3", train="full")
    captions, ids = batch_of(model)
    batch = join(model.caption_ids(captions), model.tokens, ids)
    hidden = run(model.llm, model.rows, batch)
    found = caption_loss(model.llm, model.rows, batch, model.num_tokens, hidden)
    model.llm.get_input_embeddings().weight.data[model.tokens.rows] = model.rows.input.detach()
    terms = []
    for caption in model.caption_ids(captions):
        logits = model.llm(input_ids=torch.tensor([caption])).logits[0].log_softmax(-1)
        terms += [logits[i, word] for i, word in enumerate(caption[1:])]
    assert len(terms) > 20
    torch.testing.assert_close(found, -torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)
    alone = join(model.caption_ids([None]), model.tokens, ids[:1])
    nothing = caption_loss(model.llm, model.rows, alone, model.num_tokens, run(model.llm, model.rows, alone))
    assert nothing.item() == 0.0


def test_perplexity_is_that_of_each_text_alone() -> None:
    model = toy_model("llama", train="rows")
    texts = ["the moon above the sea", "a dog"]
    terms = []
    for text in model.caption_ids(texts):
        logits = model.llm.get_decoder()(input_ids=torch.tensor([text])).last_hidden_state
        full = model.rows.full_vocabulary(model.llm, logits[0, :-1], torch.tensor(text[1:]))
        terms.append(full.log_probabilities)
    expected = float(torch.cat(terms).mean().neg().exp())
    assert text_perplexity(model.llm, model.rows, model.llm_tokenizer, texts) == pytest.approx(
        expected, rel=1e-4
    )


def test_text_weight_keeps_the_language(toys: Toys) -> None:
    """The captions' loss is part of the total and reaches the body."""
    plain, weighted = (make_module(toys, text_weight=w, caption_dropout=0.0) for w in (0.0, 2.0))
    batch = batch_of(plain.model)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    one, two = plain.losses(*batch, generators[0]), weighted.losses(*batch, generators[1])
    torch.testing.assert_close(two["loss"], one["loss"] + 2 * two["text"])
    assert two["text"].item() > 0


@pytest.fixture(scope="module")
def trained(toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of four steps."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["fit", "--config", toys.write(folder)]) == 0
    return folder / "run" / "version_0"


def test_checkpoint_holds_what_was_trained_alone(toys: Toys, trained: Path) -> None:
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    assert "model.rows.input" in state and any(".h.0." in name for name in state)
    assert not any("wte" in name or "lm_head" in name or ".tokenizer." in name for name in state)
    assert set(state) == trained_names(make_module(toys))
    moments = sum(len(values) for values in checkpoint["optimizer_states"][0]["state"].values())
    assert moments == 3 * len(state)
    assert checkpoint["v2flow"]["config"]["llm"] == "gpt2-style:tiny"


def test_checkpoint_gives_the_same_model(toys: Toys, trained: Path, tmp_path: Path) -> None:
    path = trained / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    # Neither pictures nor the first tokenizer's place are needed any more.
    moved = tmp_path / "moved"
    toy_tokenizer().save_pretrained(moved)
    checkpoint["v2flow"]["config"] |= {"pictures": None, "tokenizer": "gone"}
    torch.save(checkpoint, tmp_path / "copy.ckpt")
    model = load_text_to_image(tmp_path / "copy.ckpt", tokenizer=str(moved))
    assert not model.training
    original = make_module(toys, seed=1)
    original.load_state_dict(checkpoint["state_dict"])
    captions, ids = batch_of(model)
    assert torch.equal(
        model.log_likelihood(captions, ids), original.model.eval().log_likelihood(captions, ids)
    )
    again = load_text_to_image(path)
    pictures = (m.generate(["one red things"], temperature=0.0) for m in (model, again))
    assert torch.equal(*pictures)


def test_a_resumed_training_knows_the_language_from_before_it(toys: Toys, trained: Path) -> None:
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    untrained = make_module(toys, seed=1)
    assert untrained.perplexity_before is None
    assert checkpoint["v2flow"]["perplexity_before"] == pytest.approx(untrained.model.text_perplexity())
    untrained.on_load_checkpoint(checkpoint)
    assert untrained.perplexity_before == checkpoint["v2flow"]["perplexity_before"]


def test_another_tokenizer_is_refused_by_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    toy_tokenizer(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(V2FlowError, match="trained with the tokenizer"):
        load_text_to_image(trained / "checkpoints" / "last.ckpt", tokenizer=str(tmp_path / "other"))


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "v2flow": {"model": "VQAutoencoder"}}, tmp_path / "vq.ckpt")
    with pytest.raises(V2FlowError, match="expected a text-to-image checkpoint, found a VQAutoencoder"):
        load_text_to_image(tmp_path / "vq.ckpt")


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_resume_is_exact(toys: Toys, trained: Path, tmp_path: Path, mode: str) -> None:
    """Four steps are two and two more, bit for bit, with accumulated gradients as well."""
    options = (
        [] if mode == "full" else ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=4"]
    )
    file = toys.write(tmp_path, train=mode)
    whole = trained / "checkpoints" / "last.ckpt"
    version = 0
    if mode != "full":
        assert main(["fit", "--config", file, *options]) == 0
        whole, version = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt", 1
    assert main(["fit", "--config", file, *options, "--trainer.max_steps=2"]) == 0
    half = tmp_path / "run" / f"version_{version}" / "checkpoints" / "last.ckpt"
    assert torch.load(half, weights_only=True)["global_step"] == 2
    assert main(["fit", "--config", file, *options, "--ckpt_path", str(half)]) == 0
    resumed = tmp_path / "run" / f"version_{version + 1}" / "checkpoints" / "last.ckpt"
    one, two = (torch.load(path, weights_only=True) for path in (whole, resumed))
    assert one["global_step"] == two["global_step"] == 4
    assert set(one["state_dict"]) == set(two["state_dict"])
    for name, tensor in one["state_dict"].items():
        assert torch.equal(two["state_dict"][name], tensor), name


def test_averaged_weights_leave_frozen_ones_out_too(toys: Toys, tmp_path: Path) -> None:
    file = toys.write(tmp_path, train="last_layers", train_layers=1)
    ema = (
        '--trainer.callbacks+={"class_path": "v2flow.training.ema.EMACallback", "init_args": {"decay": 0.5}}'
    )
    assert main(["fit", "--config", file, ema, "--trainer.max_steps=2"]) == 0
    half = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(half, weights_only=True)
    assert set(checkpoint["current_model_state"]) == set(checkpoint["state_dict"])
    assert not any("wte" in name for name in checkpoint["state_dict"])
    assert main(["fit", "--config", file, ema, "--ckpt_path", str(half)]) == 0


def test_init_from_takes_weights_alone(
    toys: Toys, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = str(trained / "checkpoints" / "last.ckpt")
    file = toys.write(tmp_path)
    words = ["fit", "--config", file, "--init-from", start, "--trainer.max_steps=2"]
    assert main([*words, "--model.init_args.optimizer.lr=1e-12"]) == 0
    fresh = torch.load(tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert fresh["global_step"] == 2
    for name, tensor in torch.load(start, weights_only=True)["state_dict"].items():
        torch.testing.assert_close(fresh["state_dict"][name], tensor, rtol=0, atol=1e-9)
    assert "with the same LLM" in error_line(capsys, [*words, "--model.init_args.text_to_image.train=rows"])
    assert "trained from another LLM" in error_line(
        capsys, [*words, "--model.init_args.text_to_image.seed=7"]
    )
    # Other captions, so other words of the small LLM.
    other = write_pictures(tmp_path / "other", {"train": 4})
    assert "trained from another LLM" in error_line(
        capsys, [*words, f"--model.init_args.text_to_image.pictures={other}"]
    )


@pytest.mark.parametrize(("size", "grid", "seed", "expected"), [
    (16, (2, 2), 0, "the codebook size K is 32 in the shards and 16 in the tokenizer checkpoint"),
    (32, (4, 2), 0, "the number of tokens a picture N is 4 in the shards and 8"),
    (32, (2, 2), 7, "ids of another tokenizer: its SHA-256 is"),
])  # fmt: skip
def test_another_tokenizer_is_refused(
    toys: Toys,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    size: int,
    grid: Any,
    seed: int,
    expected: str,
) -> None:
    toy_tokenizer(size, grid, seed).save_pretrained(tmp_path / "other")
    file = toys.write(tmp_path, tokenizer=str(tmp_path / "other"))
    assert expected in error_line(capsys, ["fit", "--config", file])


@pytest.mark.parametrize(("options", "expected"), [
    ({"max_caption": 3}, "expected at most 3 tokens"),
    ({"pictures": None}, "option text_to_image.pictures: llm=gpt2-style:tiny reads captioned pictures"),
    ({"caption_dropout": 1.5}, "caption_dropout: expected a share in [0, 1], found 1.5"),
    ({"max_caption": 1278}, "need a context of 1284, found an LLM with 1280"),
    ({"llm": "gpt2-style:small"}, "vocabulary needs an LLM of the codes' width 64, found one of width 256"),
])  # fmt: skip
def test_bad_options_are_one_line(
    toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], expected: str
) -> None:
    assert expected in error_line(capsys, ["fit", "--config", toys.write(tmp_path, **options)])


def test_a_short_caption_of_many_tokens_is_found_before_the_training(
    toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Far behind the longest ones by its bytes."""
    pictures = write_pictures(tmp_path / "pictures", {"train": 80, "val": 6, "test": 1}, {70: "xq7 zj9"})
    build_tokens(toys.tokenizer, pictures, tmp_path / "tokens", progress=False)
    file = toys.write(tmp_path, max_caption=6)
    words = ["fit", "--config", file, f"--data.train={tmp_path}/tokens/train-*.tar"]
    assert "sample 'train070': caption 0 ('xq7 zj9'…): expected at most 6 tokens" in error_line(capsys, words)


def test_pictures_are_no_tokens(toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = str(Path(toys.pictures).parent / "train-000000.tar")
    file = toys.write(tmp_path)
    line = error_line(capsys, ["fit", "--config", file, f"--data.train={pictures}"])
    assert "expected a member json with a list of integers 'ids'" in line


def test_rows_from_words_read_pictures(toys: Toys) -> None:
    config = toys.config(rows="words", words_pictures=4)
    with pytest.raises(
        V2FlowError, match="none of the tokenizer's 64 words"
    ):  # they are "random_0" and so on
        build_text_to_image(TextToImageConfig(**config))


def test_validate_and_test_run(toys: Toys, trained: Path, tmp_path: Path) -> None:
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    for verb in ("validate", "test"):
        assert main([verb, "--config", toys.write(tmp_path), "--ckpt_path", checkpoint]) == 0
