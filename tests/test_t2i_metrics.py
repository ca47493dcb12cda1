"""Metrics of text to image: each figure on cases whose value is known, and the whole report of a small training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from core_toys import small_config
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from t2i_toys import tiny_llm, tiny_tokenizer
from t2i_training_toys import Toys, toy_tokenizer
from torch import Tensor, nn

from v2flow.cli import main
from v2flow.data.scene_sampler import held_out, sample_scene
from v2flow.data.shapes import build_shapes, render
from v2flow.data.tokens import build_tokens
from v2flow.decode_modes import shipped_presets
from v2flow.errors import V2FlowError
from v2flow.images import load_image
from v2flow.metrics.extractors import efficientnet
from v2flow.metrics.scene_verifier import satisfies
from v2flow.origin import current_commit
from v2flow.t2i.config import TextToImageConfig
from v2flow.t2i.extension import extend_vocabulary
from v2flow.t2i.metrics.clip_score import clip_rows
from v2flow.t2i.metrics.language import image_positions
from v2flow.t2i.metrics.marginal import marginal_ids, sample_marginal
from v2flow.t2i.metrics.picture_distance import distance_rows, nearest_training_pictures
from v2flow.t2i.metrics.retrieval import distractors, is_first, retrieval_accuracy
from v2flow.t2i.metrics.rows import Drawing, deal_words, draw_rows, shuffled_order
from v2flow.t2i.metrics.samples import CaptionedSamples, read_samples, scene_group
from v2flow.t2i.metrics.shapes_score import duo_rows, shapes_rows
from v2flow.t2i.metrics.training_set import open_training_set
from v2flow.t2i.text_to_image import V2FlowForTextToImage
from v2flow.tokenizer import V2FlowTokenizer
from v2flow.training import t2i_callbacks
from v2flow.training.t2i_callbacks import TextToImageCallback
from v2flow.training.t2i_module import TextToImageModule
from v2flow.training.token_data_module import TokenDataModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers",
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning on a newer torch
)
EIGHT = [
    "a red strawberry", "two green apples", "a dog", "the moon", "a house by the sea", "three birds", "a key", "rain",
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build() -> V2FlowForTextToImage:
    """A model whose tokens depend on all that stands before them: its blocks' weights are large."""
    torch.manual_seed(0)
    tokenizer = V2FlowTokenizer(small_config())
    words = tiny_tokenizer()
    llm = tiny_llm("gpt2", len(words))
    model = V2FlowForTextToImage(tokenizer, llm, words, extend_vocabulary(llm, words, 32))
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if parameter.ndim == 2 and ".h." in name:
                parameter.normal_(std=0.25)
        for parameter in model.rows.parameters():
            parameter.normal_(std=0.5)
    return model.eval()


def samples_of(captions: list[str], seed: int = 1) -> CaptionedSamples:
    ids = torch.randint(32, (len(captions), 8), generator=seeded(seed))
    return CaptionedSamples([str(i) for i in range(len(captions))], captions, captions, ids)


# --- retrieval --------------------------------------------------------------------------------------------------


def test_a_model_that_knows_its_captions_finds_all_of_them() -> None:
    model, samples = build(), samples_of(EIGHT)
    learned = [
        p for name, p in model.named_parameters() if not name.startswith("tokenizer") and p.requires_grad
    ]
    optimizer = torch.optim.Adam(learned, lr=1e-2)
    for _ in range(50):
        loss = model.loss(samples.captions, samples.ids, 0.0).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
    found = retrieval_accuracy(model, samples, ways=8)
    assert found == {"accuracy": 1.0, "accuracy_se": 0.0, "chance": 1 / 8, "ways": 8, "pictures": 8}
    # The same captions beside other pictures: not what it knows.
    others = CaptionedSamples(samples.keys, EIGHT, EIGHT, samples.ids.roll(1, 0))
    assert retrieval_accuracy(model, others, ways=8)["accuracy"] == 0.0


def test_a_random_model_is_near_chance() -> None:
    captions = [
        f"{number} {thing}" for number in range(10) for thing in ("dogs", "apples", "houses", "moons", "keys")
    ]
    found = retrieval_accuracy(build(), samples_of(captions), ways=4)
    assert abs(found["accuracy"] - 0.25) < 4 * (0.25 * 0.75 / 50) ** 0.5
    assert found["accuracy_se"] == pytest.approx((found["accuracy"] * (1 - found["accuracy"]) / 50) ** 0.5)


class Indifferent(nn.Module):
    """Finds every caption equally likely."""

    def log_likelihood(self, captions: list[str], ids: Tensor) -> Tensor:
        assert len(captions) == len(ids)
        return torch.zeros(len(captions))


def test_ties_are_wrong() -> None:
    assert retrieval_accuracy(Indifferent(), samples_of(EIGHT), ways=2)["accuracy"] == 0.0
    assert is_first(torch.tensor([0.1, 0.0, -1.0]))
    assert not is_first(torch.tensor([0.1, 0.0, 0.1])) and not is_first(torch.tensor([torch.nan, 0.0]))


def test_captions_come_from_other_groups_and_depend_on_the_seed_alone() -> None:
    captions = [f"caption {i}" for i in range(30)]
    groups = [f"group {i // 3}" for i in range(30)]
    samples = CaptionedSamples(captions, captions, groups, torch.arange(30)[:, None])
    chosen = [distractors(samples, i, 10, seed=3) for i in range(30)]
    for index, others in enumerate(chosen):
        assert {groups[i] for i in others} == set(groups) - {groups[index]} and len(others) == 9
    assert chosen[4] == distractors(samples, 4, 10, seed=3) != distractors(samples, 4, 10, seed=4)
    with pytest.raises(V2FlowError, match="expected 10 further groups.* found 9"):
        distractors(samples, 0, 11, seed=3)
    with pytest.raises(V2FlowError, match="ways: expected at least 2"):
        distractors(samples, 0, 1, seed=3)


def test_pictures_with_the_same_ids_and_captions_that_read_the_same_are_not_asked_about() -> None:
    samples = CaptionedSamples("abcd", ["x", "y", "x", "z"], "abcd", torch.tensor([[0], [0], [1], [2]]))
    assert distractors(samples, 0, 2, seed=0) == [3]  # 1 has its ids, 2 its caption


def test_captions_of_scenes_are_untrue_of_the_picture() -> None:
    scenes = [sample_scene(0, "test", index) for index in range(120)]
    captions, groups = [s.caption for s in scenes], [scene_group(s) for s in scenes]
    samples = CaptionedSamples(captions, captions, groups, torch.arange(120)[:, None], scenes=scenes)
    for index in range(0, 120, 7):
        others = distractors(samples, index, 16, seed=0)
        assert not any(satisfies(scenes[index].objects, scenes[i]) for i in others)
        assert len({groups[i] for i in [index, *others]}) == 16


# --- rows -------------------------------------------------------------------------------------------------------


def test_marginal_counts_and_draws() -> None:
    batches = [
        {"ids": torch.tensor([[0, 2], [0, 1]])},
        {"ids": torch.tensor([[1, 1], [3, 3]]), "valid": torch.tensor([True, False])},
    ]
    counts = marginal_ids(batches, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 2, 1, 0]]
    ids = sample_marginal(counts, 30_000, seeded())
    assert ids.shape == (30_000, 2)
    for position in range(2):
        share = ids[:, position].bincount(minlength=4) / 30_000
        assert torch.allclose(share, counts[position] / 3, atol=0.012)  # over 4 standard errors
        assert not share[counts[position] == 0].any()
    together = ((ids[:, 0] == 0) & (ids[:, 1] == 1)).float().mean().item()
    assert together == pytest.approx(4 / 9, abs=0.012)  # positions are independent
    assert torch.equal(ids, sample_marginal(counts, 30_000, seeded()))
    with pytest.raises(V2FlowError, match="no picture"):
        marginal_ids([], 4)


def test_rows_are_repeatable_and_what_they_say() -> None:
    model, samples = build(), samples_of(EIGHT)
    drawing = Drawing({"temperature": 0.0}, seed=5)
    fixed = torch.zeros(8, 32, dtype=torch.long)
    fixed[:, 7] = 1
    rows = draw_rows(model, samples, drawing, marginal=fixed, untrained=build())
    assert list(rows) == ["generated", "words_shuffled", "marginal_ids", "untrained", "reconstructed"]
    assert all(row.shape == (8, 3, 16, 16) and row.dtype == torch.uint8 for row in rows.values())
    assert torch.equal(rows["generated"], rows["untrained"])  # the same weights
    assert torch.equal(rows["marginal_ids"], drawing.pictures(model.tokenizer, torch.full((8, 8), 7)))
    assert torch.equal(rows["reconstructed"], drawing.pictures(model.tokenizer, samples.ids))
    assert not torch.equal(rows["generated"], rows["words_shuffled"])
    with pytest.raises(V2FlowError, match="unknown"):
        Drawing({"top": 3})


def test_further_draws_are_those_of_the_next_seeds() -> None:
    model, samples = build(), samples_of(EIGHT)
    rows = draw_rows(model, samples, Drawing(seed=5, draws=2))
    first, second = (draw_rows(model, samples, Drawing(seed=seed)) for seed in (5, 6))
    for name in ("generated", "words_shuffled"):
        assert torch.equal(rows[name], torch.cat([first[name], second[name]]))
    assert len(rows["reconstructed"]) == len(samples)
    with pytest.raises(V2FlowError, match="option draws: expected at least 1, found 0"):
        Drawing(draws=0)


def test_words_are_dealt_out_anew_and_orders_leave_nothing_in_place() -> None:
    dealt = deal_words(EIGHT, seeded())
    assert sorted(" ".join(dealt).split()) == sorted(" ".join(EIGHT).split()) and dealt != EIGHT
    assert [len(text.split()) for text in dealt] == [len(text.split()) for text in EIGHT]
    for count in (2, 3, 50):
        order = shuffled_order(count, Drawing())
        assert order.sort().values.tolist() == list(range(count)) and not (order == torch.arange(count)).any()


# --- shapes, distances, language --------------------------------------------------------------------------------


def test_shapes_rows_of_true_renderings() -> None:
    scenes = [sample_scene(0, "test", index) for index in range(60)]
    true = torch.stack([torch.from_numpy(render(scene, 32)).permute(2, 0, 1) for scene in scenes])
    rows = {
        "generated": true,
        "reconstructed": true,
        "marginal_ids": torch.full_like(true, 255),
        "words_shuffled": true,
    }
    scores = shapes_rows(rows, scenes, shuffled_order(60, Drawing()))
    assert list(scores) == ["generated", "captions_shuffled", "reconstructed", "marginal_ids"]
    assert scores["reconstructed"]["overall"] >= 0.98 and set(scores["generated"].values()) >= {1.0}
    assert scores["captions_shuffled"]["overall"] < 0.35
    assert scores["marginal_ids"]["overall"] == 0.0


def test_duo_rows_tell_new_pairs_of_shapes_from_seen_ones() -> None:
    scenes = [sample_scene(0, "test", index) for index in range(120)]
    pictures = torch.stack([torch.from_numpy(render(scene, 32)).permute(2, 0, 1) for scene in scenes])
    shapes = [{each.shape for each in scene.objects} for scene in scenes]
    new = [frozenset(each) in held_out().duos for each in shapes]
    pictures[torch.tensor(new)] = 255
    rows = duo_rows(pictures, scenes)
    shared = [
        i
        for i, scene in enumerate(scenes)
        if scene.task in ("color_attr", "position") and len(shapes[i]) == 2
    ]
    count = sum(new[i] for i in shared)
    assert rows["new_duo"] == {"color_attr": 0, "position": 0, "overall": 0, "pictures": count}
    assert rows["seen_duo"]["overall"] >= 0.98 and rows["seen_duo"]["pictures"] == len(shared) - count
    assert duo_rows(pictures[:8], [sample_scene(0, "val", index) for index in range(8)]) == {}


def test_distances_tell_sets_and_pairs_apart() -> None:
    scenes = [sample_scene(0, "test", index) for index in range(12)]
    real = torch.stack([torch.from_numpy(render(scene, 32)).permute(2, 0, 1) for scene in scenes])
    noise = torch.randint(0, 256, real.shape, dtype=torch.uint8, generator=seeded())
    rows = {"generated": real, "marginal_ids": noise, "reconstructed": real}
    found = distance_rows(real, rows, [efficientnet(32)], shuffled_order(12, Drawing()))
    kid, pair = "kid-efficientnet-lite0", "pair-efficientnet-lite0"
    assert found["generated"][pair] == pytest.approx(1.0) and found["generated"][f"{pair}_se"] < 1e-6
    assert abs(found["captions_shuffled"][pair]) < 0.4
    assert found["captions_shuffled"][kid] == pytest.approx(found["generated"][kid], abs=1e-9)
    assert found["marginal_ids"][kid] > found["generated"][kid] + 3 * found["marginal_ids"][f"{kid}_se"]
    above = found["marginal_ids"][kid] - found["generated"][f"{kid}_u"]
    assert found["marginal_ids"][f"{kid}_above_generated"] == pytest.approx(above)
    assert f"{kid}_u" in found["reconstructed"] and kid in found["real_vs_real"]
    twice = distance_rows(
        real, rows | {"generated": torch.cat([real, real])}, [efficientnet(32)], shuffled_order(12, Drawing())
    )
    for name in ("generated", "captions_shuffled", "marginal_ids"):
        assert twice[name] == pytest.approx(found[name], abs=1e-5)


def test_nearest_training_pictures_are_found() -> None:
    train = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=seeded())
    copies = train[[3, 17]]
    batches = [{"image": part.float() / 255} for part in train.split(6)]
    nearest, psnr = nearest_training_pictures(batches, copies)
    assert torch.equal(nearest, copies) and psnr == 60.0
    _, further = nearest_training_pictures(batches, 255 - copies)
    assert further < 20


def test_without_clip_a_note_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    note = clip_rows({"generated": torch.zeros(1, 3, 16, 16)}, ["a dog"], torch.zeros(1).long())
    assert isinstance(note, str) and "hf download openai/clip-vit-base-patch16" in note


def test_language_figures_equal_a_plain_pass_of_the_merged_model() -> None:
    from v2flow.t2i.hub import merged_llm
    from v2flow.t2i.text_loss import HELD_OUT

    model, samples = build(), samples_of(EIGHT[:3])
    model.train()
    found, positions = model.text_perplexity(), image_positions(model, samples, batch_size=2)
    assert model.llm.training
    llm = merged_llm(model).eval()
    total, count, mass = 0.0, 0, []
    with torch.no_grad():
        for text in HELD_OUT:
            ids = torch.tensor(model.llm_tokenizer(text).input_ids)
            logs = llm(input_ids=ids[None]).logits[0].log_softmax(-1)
            total -= logs[:-1].gather(1, ids[1:, None]).sum().item()
            count += len(ids) - 1
        for caption, picture in zip(samples.captions, samples.ids, strict=True):
            ids = [
                *model.caption_ids([caption])[0],
                model.tokens.boi,
                *(picture + model.tokens.first).tolist(),
            ]
            chances = llm(input_ids=torch.tensor([ids])).logits[0, -9:].softmax(-1)
            mass.append(1 - chances[:, model.tokens.rows].sum(1).mean())
    assert found == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)
    assert positions["text_mass"] == pytest.approx(torch.stack(mass).mean().item(), abs=1e-5)


# --- samples ----------------------------------------------------------------------------------------------------


def test_token_shards_and_picture_shards_give_the_same_samples(tmp_path: Path) -> None:
    toys = Toys(tmp_path)
    tokenizer = toy_tokenizer()
    tokens = read_samples(toys.shards("val"), tokenizer)
    pictures = read_samples(str(tmp_path / "pictures/val-*.tar"), tokenizer, batch_size=4)
    assert tokens.fingerprints() == pictures.fingerprints() and len(tokens) == 6
    assert tokens.pictures is None and tokens.scenes is None and list(tokens.groups) == list(tokens.captions)
    assert pictures.pictures is not None and pictures.pictures.shape == (6, 3, 16, 16)
    assert len(read_samples(toys.shards("val"), tokenizer, limit=2)) == 2
    with pytest.raises(V2FlowError, match="another tokenizer"):
        read_samples(toys.shards("val"), toy_tokenizer(seed=1))
    counts = [
        open_training_set(p, tokenizer)
        for p in (toys.shards("train"), str(tmp_path / "pictures/train-*.tar"))
    ]
    assert (
        torch.equal(counts[0].marginal(), counts[1].marginal()) and int(counts[0].marginal().sum()) == 24 * 4
    )
    assert not counts[0].has_pictures and counts[1].has_pictures


def test_scenes_in_token_shards_are_drawn(tmp_path: Path) -> None:
    build_shapes(tmp_path / "pictures", train=0, val=0, test=7, size=32, progress=False)
    tokenizer = V2FlowTokenizer(
        small_config(image_size=32, resampler=toy_tokenizer().config.resampler)
    ).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shards = str(tmp_path / "pictures/*.tar")
    build_tokens(str(tmp_path / "tokenizer"), shards, tmp_path / "tokens", progress=False)
    drawn, read = (
        read_samples(data, tokenizer, batch_size=3) for data in (str(tmp_path / "tokens/*.tar"), shards)
    )
    assert (
        drawn.fingerprints() == read.fingerprints()
        and drawn.scenes == read.scenes
        and drawn.scenes is not None
    )
    assert (
        drawn.pictures is not None
        and read.pictures is not None
        and torch.equal(drawn.pictures, read.pictures)
    )
    assert drawn.groups == [scene_group(scene) for scene in drawn.scenes]
    nearest, psnr = open_training_set(str(tmp_path / "tokens/*.tar"), tokenizer).nearest(drawn.pictures[2:4])
    assert torch.equal(nearest, drawn.pictures[2:4]) and psnr == 60.0


# --- callback and command ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Toys, Path, Path]:
    """A training of 4 steps under the callback: its data, its log directory, its checkpoint."""
    folder = tmp_path_factory.mktemp("t2i")
    toys = Toys(folder)
    trainer = Trainer(
        accelerator="cpu", max_steps=4, max_epochs=-1, val_check_interval=2, check_val_every_n_epoch=None,
        logger=CSVLogger(folder, "run"), enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            TextToImageCallback(retrieval_pictures=5, ways=4, final_features=False),
            ModelCheckpoint(folder / "checkpoints", filename="last"),
        ],
    )  # fmt: skip
    module = TextToImageModule(TextToImageConfig(**toys.config()))
    trainer.fit(module, datamodule=TokenDataModule(toys.shards("train"), toys.shards("val"), batch_size=4))
    assert trainer.log_dir is not None
    return toys, Path(trainer.log_dir), folder / "checkpoints/last.ckpt"


def test_the_callback_logs_and_leaves_files(trained: tuple[Toys, Path, Path]) -> None:
    _, logs, checkpoint = trained
    lines = [json.loads(line) for line in (logs / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and 0 <= lines[0]["retrieval"] <= 1
    assert "val/retrieval" in (logs / "metrics.csv").read_text()
    report = json.loads((logs / "metrics.json").read_text())
    assert report["checkpoint"] == str(checkpoint) and report["step"] == 4
    assert report["retrieval"]["pictures"] == 6 and report["retrieval"]["ways"] == 4
    assert report["language"]["perplexity_before"] != report["language"]["perplexity"] > 1
    assert report["notes"].keys() == {"memorisation"} and "shapes" not in report
    assert len((logs / "grid.txt").read_text().splitlines()) == 6
    assert load_image(logs / "grid.png").shape[1] > 64


def test_the_command_gives_the_same_figures_and_more(
    trained: tuple[Toys, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toys, logs, checkpoint = trained
    assert evaluate(checkpoint, toys.shards("val"), "--ways", "4", "--json", tmp_path / "r.json", "--no-features",
                    "--floors-train", toys.shards("train"), "--batch-size", "16") == 0  # fmt: skip
    found, logged = (
        json.loads((tmp_path / "r.json").read_text()),
        json.loads((logs / "metrics.json").read_text()),
    )
    assert found["retrieval"] == logged["retrieval"]
    for name, value in logged["language"].items():
        assert found["language"][name] == pytest.approx(value, rel=1e-4)
    assert found["protocol"]["ids_sha256"] == logged["protocol"]["ids_sha256"]
    assert found["protocol"]["set"] == "tokens" and found["protocol"]["split"] == "val"
    pictures = str(Path(toys.tokens).parent / "pictures")
    assert evaluate(checkpoint, f"{pictures}/val-*.tar", "--ways", "4", "--json", tmp_path / "p.json",
                    "--floors-train", f"{pictures}/train-*.tar", "--grid", tmp_path / "g.png", "--top-k",
                    "5", "--draws", "2", "--modes", "balanced") == 0  # fmt: skip
    report = json.loads((tmp_path / "p.json").read_text())
    assert report["retrieval"] == logged["retrieval"]
    assert set(report["distances"]) == {
        "generated", "captions_shuffled", "words_shuffled", "marginal_ids", "untrained", "reconstructed",
        "nearest_training_picture", "real_vs_real",
    }  # fmt: skip
    assert report["protocol"]["generation"]["top_k"] == 5 and report["memorisation"]
    assert shipped_presets()["balanced"].items() <= report["protocol"]["decode"].items()
    assert report["protocol"]["draws"] == 2 and found["protocol"]["draws"] == 1
    for each in (report, found, logged):
        assert each["commit"] == current_commit() and each["date"] > "2026"
    table = capsys.readouterr().out
    assert "nearest_training_picture" in table and "retrieval: " in table and "no clip_score" in table
    assert "6 captions, 2 draws of each" in table
    assert (tmp_path / "g.txt").read_text() == (logs / "grid.txt").read_text()


def test_options_of_the_other_kind_of_model_are_refused(
    trained: tuple[Toys, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    toys, _, checkpoint = trained
    assert evaluate(checkpoint, toys.shards("val"), "--probes", "alignment") != 0
    assert "--probes: expected a tokenizer" in capsys.readouterr().err
    assert evaluate(toys.tokenizer, toys.shards("val"), "--ways", "4") != 0
    assert "--ways: expected a text-to-image model" in capsys.readouterr().err


def test_draws_are_refused_where_they_would_be_thrown_away(
    trained: tuple[Toys, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    toys, _, checkpoint = trained
    assert evaluate(checkpoint, toys.shards("val"), "--ways", "4", "--draws", "2") != 0
    assert "option draws: expected 1 where no distances are measured, found 2" in capsys.readouterr().err


def test_the_callback_refuses_data_that_it_cannot_score(
    trained: tuple[Toys, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    toys = trained[0]
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data = TokenDataModule(toys.shards("train"), toys.shards("val"))
    trainer.datamodule = data
    module: Any = type("Module", (), {"model": type("Model", (), {"tokenizer": toy_tokenizer()})})
    with pytest.raises(V2FlowError, match="ways: expected at most 6.* found 16"):
        TextToImageCallback().setup(trainer, module, "fit")
    with monkeypatch.context() as patch:  # six captions of one and the same picture
        patch.setattr(
            t2i_callbacks,
            "read_samples",
            lambda *a, **k: replace(read_samples(*a, **k), ids=torch.zeros(6, 4).long()),
        )
        with pytest.raises(V2FlowError, match="retrieval: expected 3 further groups .* found 0"):
            TextToImageCallback(ways=4).setup(trainer, module, "fit")
    with pytest.raises(V2FlowError, match="shapes_pictures: expected scenes"):
        TextToImageCallback(shapes_pictures=4).setup(trainer, module, "fit")
    trainer.datamodule = None
    with pytest.raises(V2FlowError, match="data module with val shards"):
        TextToImageCallback().setup(trainer, module, "fit")
    with pytest.raises(V2FlowError, match="ways: expected at least 2"):
        TextToImageCallback(ways=1)


def evaluate(checkpoint: Any, data: str, *options: Any) -> int:
    return main(["evaluate", str(checkpoint), "--data", data, *map(str, options)])
